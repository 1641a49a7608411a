"What `all` would do, and roughly how long and how large; trains nothing."
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, say, table
from aptos_fastai.common.distributed import cores
from aptos_fastai.common.io import AptosError
from aptos_fastai.pipeline.graph import check_run, predictions_up_to_date
from aptos_fastai.pipeline.summary import tables_text
from aptos_fastai.recipe import Recipe, Stage, read_recipe
from aptos_fastai.run_folder import Run

BYTES_PER_PIXEL = .28                        # of a stored JPEG: 74 kB at 512 px, quality 95, 4:4:4 (measured on IDRiD)
CHECKPOINT = 5.                              # times what a stage leaves: weights, best weights, two moments, twice while one replaces the other
PREPARE_SECONDS = .03                        # an original of 12 megapixels, one core (benchmarks/images.py)


def measured_step(s: Stage, measured: dict) -> tuple[float, float, int]:
    "Seconds an image of a training step as it would be trained, and of a forward pass; parameters"
    from aptos_fastai.training.precision import precisions, step_seconds
    key = s.arch, s.size, s.precision
    if key not in measured: measured[key] = step_seconds(s, precisions(s), n=min(s.bs, max(4, 2 ** 18 // s.size ** 2)))
    steps, forward, params = measured[key]
    return min(steps.values()), forward, params


def scored_by(r: Recipe, stage: str) -> set[str]:
    "Ungraded tables that a stage scores: for labels, for the answer"
    nodes = {(t, name) for s in r.stages.values() for t, name in s.sources if t} | {(n, r.submit.table) for n in [r.submit.final, *r.submit.also]}
    return {name for n, name in nodes if stage in r.members(n)}


def stage_cost(run: Run, name: str, folds: list[int], measured: dict) -> tuple[int, int, float, float]:
    "(training images, validation images, seconds, bytes) of training the folds of a stage, and of what it scores"
    from aptos_fastai.inference.views import VIEWS
    s = run.recipe.stages[name]
    step, forward, params = measured_step(s, measured)
    train = sum(len(run.frames[t]) if teacher else int((run.frames[t].fold != folds[0]).sum()) for teacher, t in s.sources)
    valid = sum(int((run.frames[t].fold == folds[0]).sum()) for teacher, t in s.sources if not teacher)
    epochs = s.epochs + s.freeze_epochs
    answers = valid + sum(len(run.frames[t]) for t in scored_by(run.recipe, name))
    seconds = epochs * train * step + (epochs * valid + VIEWS[s.tta] * answers) * forward
    return train, valid, len(folds) * seconds, len(folds) * params * 8.


@dataclass
class Costs:
    "What `all` would still do: a row a node for the table, seconds, bytes on disk, images to prepare"
    rows: list[list]
    seconds: float
    disk: float
    new: int


def costs(run: Run, todo: dict[str, list[int]]) -> Costs:
    "Of the folds in `todo`, by one timed step of each network on this machine"
    r, measured = run.recipe, {}
    rows, seconds, disk, most = [], 0., 0., 0.
    for n in r.order:
        s = r.stages.get(n)
        if s is None: rows.append([n, 'mean of ' + ', '.join(r.members(n)), '', '', '', '']); continue
        ks = todo.get(n, [])
        train, valid, t, b = stage_cost(run, n, ks or [0], measured)
        if ks: seconds, disk, most = seconds + t, disk + b, max(most, CHECKPOINT * b / len(ks))
        start = s.init or dict(none='random').get(s.weights, s.weights) + ' weights'
        rows.append([n, f'{start}; {tables_text(s)}', f'{s.arch}\n{s.size} px', f'{train}+{valid}',
                     f'{s.folds} x {s.freeze_epochs + s.epochs}', format_duration(t) if ks else 'finished'])
    new = sum(len(f) for f in run.frames.values() if 'pixel_sha256' not in f)
    disk += most + new * r.store_size ** 2 * BYTES_PER_PIXEL
    return Costs(rows, seconds + new * PREPARE_SECONDS / cores(), disk, new)


def made_up(recipe: Recipe, images: str) -> Run:
    "A run on tables of as many images as `TABLE=N TABLE=N …` says, none of which need be there"
    try: counts = {t: int(n) for t, n in (o.split('=') for o in images.split())}
    except ValueError: raise AptosError(f'--images "{images}": TABLE=NUMBER pairs are needed') from None
    names = [t.name for t in recipe.used_tables]
    if set(counts) != set(names) or min(counts.values()) < 1:
        raise AptosError(f'--images "{images}": a number above 0 is needed for each table of {recipe.path}: ' + ' '.join(f'{n}=…' for n in names))
    folds = {n: np.arange(counts[n]) % recipe.splits if recipe.tables[n].graded else np.full(counts[n], -1) for n in names}
    return Run(recipe, Path('as many images as were asked about'), Path('runs') / recipe.name, {n: pd.DataFrame(dict(fold=f)) for n, f in folds.items()})


def plan_images(recipe: str, sets: list[str], images: str):
    "`plan --images`: time and disk of tables that are not here"
    from aptos_fastai.training.weights import check_arch
    run = made_up(read_recipe(recipe, sets=sets), images)
    todo = {n: list(range(s.folds)) for n, s in run.recipe.stages.items()}
    for s in run.recipe.stages.values(): check_arch(s.arch)
    o = costs(run, todo)
    show_costs(run, o)
    say(f'about {format_duration(o.seconds)}, {format_duration(o.new * PREPARE_SECONDS / cores())} of it to prepare 12-megapixel originals, and {o.disk / 1e9:.1f} GB on disk, '
        'by a few steps of each network timed on this machine just now')


def show_plan(run: Run):
    "The graph as a table: what stands, what would run, on what, for how long"
    r, todo = run.recipe, run.todo()
    o = costs(run, todo)
    show_costs(run, o)
    if not todo and predictions_up_to_date(run): return say('Everything is done already: `all` would do nothing.')
    say(f'{r.submit.final} answers {r.submit.table}: {run.root / "submission.csv"}')
    say(f'about {format_duration(o.seconds)} (a few steps of each network timed just now: more, where the machine is busy) and {o.disk / 1e9:.2f} GB on disk')
    check_run(run, todo)                     # what would stop `all` comes last, as an error


def show_costs(run: Run, o: Costs):
    "The table of `plan`, and what there is to prepare"
    title = f'{run.recipe.path} on {run.data}' + (' (SYNTHETIC demo)' if run.recipe.demo else '')
    table(title, ['stage', 'starts from; trains on', 'network', 'images', 'epochs', 'to do'], o.rows,
          right=('images', 'epochs'), wrap=('starts from; trains on',))
    say('tables: ' + ', '.join(f'{n} {len(f)}' for n, f in run.frames.items()) + f'. To prepare: {o.new} images at {run.recipe.store_size} px.')
