"Show what `all` would do, with an estimate of time and disk space. Train nothing."
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from aptos_fastai.common import clock
from aptos_fastai.common.console import Bars, format_duration, say, table
from aptos_fastai.common.distributed import cores, world_size
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import Prep, prepare_sizes, square_of
from aptos_fastai.data.store import missing_images
from aptos_fastai.pipeline.graph import (
    check_settings,
    check_training,
    is_prepared,
    outputs_up_to_date,
    submitted_nodes,
    weight_problems,
)
from aptos_fastai.pipeline.other_runs import check_other_runs
from aptos_fastai.pipeline.reasons import training_reasons
from aptos_fastai.pipeline.share import shared_lines, with_shared
from aptos_fastai.pipeline.summary import tables_text
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.recipe.smaller import without_tables
from aptos_fastai.run_folder import Run

BYTES_PER_PIXEL = .28                        # of a stored JPEG: 74 kB at 512 px, quality 95, 4:4:4 (measured on IDRiD)
# Disk space of a training relative to the finished fold: weights, best weights and two moments, twice while one
# checkpoint replaces the other
CHECKPOINT_RATIO = 5.
CPU_PIXELS = 2 ** 20                         # of a batch: 16 images at 256 px
PREPARE_SECONDS = .03                        # a 12-megapixel original on one core (benchmarks/images.py)
FOLD_SECONDS = 1.                            # to build the network of a fold and to write its folder
REPORT_SECONDS = 20.                         # outputs and report, without scores and heat maps (docs/performance.md)
HEAT_MAPS = 24                               # images of a report with heat maps, by each network of a fold
TIMED_IMAGES = 6                             # that are prepared and loaded to time both


class Speed(NamedTuple):
    "Seconds per image to train, to validate in an epoch (in the training's precision) and to score (f32); parameters"
    train: float
    validate: float
    score: float
    parameters: int


class ImageSeconds(NamedTuple):
    "Seconds of one core to prepare an original, and to load a prepared image for training"
    prepare: float
    load: float


@dataclass
class StageCost:
    "Estimate for the folds of a stage: images of one fold; seconds to train and to score tables, and bytes, of all"
    train: int
    valid: int
    training: float
    scoring: float
    disk: float

    @property
    def seconds(self) -> float:
        "Seconds of all folds"
        return self.training + self.scoring


@dataclass
class PlanCost:
    """Estimate of what `all` has still to do: a row of the table for each node, seconds, bytes, images to prepare.

    `prepare_seconds` are part of `seconds`.
    """
    rows: list[list]
    seconds: float
    disk: float
    new_images: int
    prepare_seconds: float


def speed_key(stage: Stage) -> tuple:
    "Return what the speed of a stage's network depends on"
    return stage.arch, stage.size, stage.bs, stage.precision, stage.optimizer


def measured_speed(stage: Stage, measured: dict) -> Speed:
    """Return the speed of a stage's network on this machine, in the fastest precision allowed. `measured` is a cache.

    It is timed at the stage's batch; on a CPU at `CPU_PIXELS` at most, where larger batches change little.
    """
    from torch.cuda import is_available as has_gpu

    from aptos_fastai.training.precision import candidate_precisions, step_seconds
    key = speed_key(stage)
    if key not in measured:
        images = max(1, stage.bs // world_size())
        if not has_gpu(): images = min(images, max(4, CPU_PIXELS // stage.size ** 2))
        measured[key] = step_seconds(stage, candidate_precisions(stage), n=images)
    train, forward, parameters = measured[key]
    fastest = min(train, key=train.__getitem__)
    return Speed(train[fastest], forward[fastest], forward['f32'], parameters)


def measured_networks(run: Run) -> dict:
    "Try and time the networks of all stages, with a progress bar; return what `plan_cost` takes as `measured`"
    measured: dict = {}
    with Bars() as bars, bars('timing networks', len(run.recipe.stages), 'stages') as bar:
        for i, (name, stage) in enumerate(run.recipe.stages.items(), 1):
            check_training(run, [name])
            measured_speed(stage, measured)
            bar.to(i, name)
    return measured


def tables_scored_by(recipe: Recipe, stage: str) -> set[tuple[str, str]]:
    "Return the ungraded tables that a stage scores, each with the views: for pseudo-labels, or for the submission"
    labelled = {(teacher, name) for s in recipe.stages.values() for teacher, name in s.sources if teacher}
    submitted = {(node, recipe.submit.table) for node in submitted_nodes(recipe)} if recipe.submit.table else set()
    s = recipe.stages[stage]
    return {(name, tta) for pairs, tta in ((labelled, s.label_views), (submitted, s.tta)) for node, name in pairs
            if stage in recipe.members(node)}


def image_seconds(run: Run, stage: Stage, measured: dict) -> ImageSeconds:
    """Return how long a core takes to prepare an image of the run and to load it for a stage: by a few graded ones.

    Of hypothetical tables: that of 12-megapixel originals, without loading.
    """
    images = next(frame for name, frame in run.frames.items() if run.recipe.tables[name].graded)
    if 'path' not in images: return ImageSeconds(PREPARE_SECONDS, 0.)
    prep = run.prep_of(stage)
    if (prep, stage.size) not in measured:
        paths = images.path.iloc[np.linspace(0, len(images) - 1, TIMED_IMAGES).astype(int)]
        measured[prep, stage.size] = _timed_images(run, stage, prep, list(paths))
    return measured[prep, stage.size]


def _timed_images(run: Run, stage: Stage, prep: Prep, paths: list[str]) -> ImageSeconds:
    "Return the mean seconds to prepare and to load the images that can be read"
    import torch

    from aptos_fastai.training.loaders import FundusAugment
    on_device = run.recipe.augment.mode == 'batch' or run.recipe.augment.mode == 'auto' and torch.cuda.is_available()
    augment = None if on_device else FundusAugment(run.recipe.augment)
    times = []
    for path in paths:
        with suppress(ImageError, OSError):
            start = clock.seconds()
            jpegs, _ = prepare_sizes(Path(path).read_bytes(), prep, run.recipe.prepared_sizes)
            prepared = clock.seconds()
            square = square_of(jpegs[prep.size], prep, stage.size)
            if augment: augment.apply(square, 0)
            times.append((prepared - start, clock.seconds() - prepared))
    return ImageSeconds(*np.mean(times, 0)) if times else ImageSeconds(PREPARE_SECONDS, 0.)


def with_loading(step: float, stage: Stage, load: float) -> float:
    "Return the seconds of an image in a step with those to load it: beside the step on a GPU, before it on a CPU"
    from torch.cuda import is_available as has_gpu

    from aptos_fastai.training.loaders import loader_workers
    waiting = load / max(1, loader_workers(stage))
    return max(step, waiting) if has_gpu() else step + waiting


def stage_cost(run: Run, name: str, folds: list[int], measured: dict) -> StageCost:
    """Estimate the training of the folds of a stage and the scoring of its tables.

    The folds of a linear probe share the features of its tables, which fold 0 counts.
    """
    from aptos_fastai.inference.views import VIEWS
    from aptos_fastai.pipeline.stage import DISTANCE_IMAGES
    stage = run.recipe.stages[name]
    speed, load = measured_speed(stage, measured), image_seconds(run, stage, measured).load
    train = valid = 0
    for _, source in stage.sources:
        train += int(run.training_part(stage, source, folds[0]).sum())
        if source in stage.graded_tables: valid += int(run.validation_part(stage, source, folds[0]).sum())
    def score_seconds(tta: str) -> float: return with_loading(VIEWS[tta] * speed.score, stage, load)
    scoring = sum(len(run.frames[table]) * score_seconds(tta) for table, tta in tables_scored_by(run.recipe, name))
    score = score_seconds(stage.tta)
    if stage.epochs:
        epoch = train * with_loading(speed.train, stage, load) + valid * with_loading(speed.validate, stage, load)
        distances = min(train, DISTANCE_IMAGES) * with_loading(speed.score, stage, load)
        training = len(folds) * ((stage.epochs + stage.freeze_epochs) * epoch + valid * score + distances)
    else: training = score * sum(len(run.frames[t]) for _, t in stage.sources) * (0 in folds)
    training += FOLD_SECONDS * len(folds)
    return StageCost(train, valid, training, len(folds) * scoring, len(folds) * speed.parameters * 8.)


def plan_cost(run: Run, todo: dict[str, list[int]], outdated: Collection[str] = (),
              measured: dict | None = None) -> PlanCost:
    """Estimate the folds in `todo` (stage -> folds), by a few timed steps of each network on this machine.

    `outdated` are finished stages that are only scored or recorded again, which is not estimated. `measured` is a cache
    of what was timed.
    """
    measured = {} if measured is None else measured
    rows, seconds, disk, largest_checkpoint = [], 0., 0., 0.
    for name in run.recipe.order:
        stage = run.recipe.stages.get(name)
        if stage is None:
            fitted = '; weights fitted' if run.recipe.is_fitted(name) else ''
            rows.append([name, 'mean of ' + ', '.join(run.recipe.members(name)) + fitted, '', '', '', ''])
            continue
        folds = todo.get(name, [])
        cost = stage_cost(run, name, folds or [0], measured)
        to_do = 'no training' if name in outdated else 'finished'
        rows.append(stage_row(stage, cost, format_duration(cost.seconds) if folds else to_do))
        if not folds: continue
        seconds += cost.seconds
        disk += cost.disk
        largest_checkpoint = max(largest_checkpoint, CHECKPOINT_RATIO * cost.disk / len(folds))
    missing = images_to_prepare(run)
    pixels = sum(size ** 2 * n for by_size in missing for size, n in by_size.items())
    new_images = sum(max(by_size.values()) for by_size in missing)
    disk += largest_checkpoint + pixels * BYTES_PER_PIXEL
    preparing = preparing_seconds(run, measured)
    return PlanCost(rows, seconds + preparing, disk, new_images, preparing)


def preparing_seconds(run: Run, measured: dict) -> float:
    "Return the seconds to prepare the images of a run that are not prepared yet, on this machine"
    new_images = sum(max(by_size.values()) for by_size in images_to_prepare(run))
    if not new_images: return 0.
    return new_images * image_seconds(run, next(iter(run.recipe.stages.values())), measured).prepare / cores()


def report_seconds(run: Run, stages: Iterable[str], measured: dict) -> float:
    "Return the seconds of the outputs and the report of some stages, without their scores"
    heat_maps = sum(HEAT_MAPS * measured_speed(run.recipe.stages[name], measured).train for name in stages)
    return REPORT_SECONDS + heat_maps


def images_to_prepare(run: Run) -> list[dict[int, int]]:
    "Return for each table how many of its images are not prepared yet at each size; all of a hypothetical table"
    sizes = run.recipe.prepared_sizes
    return [dict.fromkeys(sizes, len(frame)) if 'path' not in frame else
            {size: len(ids) for size, ids in missing_images(frame, run.store, run.prep, sizes).items()}
            for frame in run.frames.values()]


def stage_row(stage: Stage, cost: StageCost, to_do: str) -> list:
    "Return the row of a stage in the table of `plan`"
    weights = 'random' if stage.weights == 'none' else stage.weights
    start = stage.init or f'{weights} weights'
    epochs = f'{stage.folds} x {stage.freeze_epochs + stage.epochs}'
    return [stage.name, f'{start}; {tables_text(stage)}', f'{stage.arch}\n{stage.size} px',
            f'{cost.train}+{cost.valid}', epochs, to_do]


def hypothetical_run(recipe: Recipe, images: str) -> Run:
    "Return a run on tables of the given numbers of images ('TABLE=N TABLE=N'), which need not exist"
    try: counts = {name: int(n) for name, n in (pair.split('=') for pair in images.split())}
    except ValueError: raise AptosError(f'--images "{images}": write TABLE=NUMBER TABLE=NUMBER') from None
    optional = {t.name for t in recipe.used_tables if t.optional == 'yes'} - set(counts)
    if optional: recipe = without_tables(recipe, optional)
    names = [t.name for t in recipe.used_tables]
    if set(counts) != set(names) or min(counts.values()) < 1:
        wanted = ' '.join(f'{n}=N' for n in names)
        raise AptosError(f'--images "{images}": give a number above 0 for each table of {recipe.path}: "{wanted}"')
    frames = {}
    for name, n in counts.items():
        fold = np.arange(n) % recipe.splits if recipe.tables[name].graded else np.full(n, -1)
        frames[name] = pd.DataFrame(dict(fold=fold, group=[f'{name}:{i}' for i in range(n)]))
    return Run(recipe, Path('hypothetical tables'), Path('runs') / recipe.name, frames)


def plan_images(recipe: str, sets: list[str], images: str) -> None:
    "Print time and disk space for tables of given sizes, which need not exist"
    run = hypothetical_run(read_recipe(recipe, sets=sets), images)
    measured = measured_networks(run)
    plan = plan_cost(run, {name: list(range(s.folds)) for name, s in run.recipe.stages.items()}, measured=measured)
    show_table(run, plan)
    say(f'estimate: {format_duration(plan.seconds)} (of which {format_duration(plan.prepare_seconds)} to prepare '
        f'12-megapixel originals) and {plan.disk / 1e9:.1f} GB on disk,\n'
        'from a few training steps of each network on this machine')


def show_plan(run: Run) -> None:
    """Print what is finished and what `all` would train, and time and disk space. Raises `AptosError` if it would fail.

    Initial weights that are missing are a note: they change no estimate.
    """
    run = with_shared(run, run.recipe.stages)
    if is_prepared(run): check_other_runs(run, run.recipe.stages)
    todo = run.todo()
    check_settings(run, todo)
    outdated = run.to_refresh(todo)
    plan = plan_cost(run, todo, outdated, measured_networks(run))
    show_table(run, plan)
    if outputs_up_to_date(run):
        say('Nothing to do: every stage is up to date.')
        return
    show_reasons(run, todo, outdated)
    submit = run.recipe.submit
    if submit.table: say(f'submission: {submit.table} by {submit.final} -> {run.root / "submission.csv"}')
    else: say(f'no table to predict: the model is {submit.final} -> {run.root}')
    say(f'estimate: {format_duration(plan.seconds)} and {plan.disk / 1e9:.2f} GB on disk,\n'
        'from a few training steps of each network on this machine (longer if it is busy)')
    for problem in weight_problems(run, todo): say(f'before `all`: {problem}', 'yellow')


def show_reasons(run: Run, todo: dict[str, list[int]], outdated: dict[str, list[int]]) -> None:
    "Print why each stage in `todo` is trained, and what of finished ones is made again without a training"
    for name, old in run.renamed.items(): say(f'renamed: {old} is called {name} now; its folder is renamed')
    for line in shared_lines(run.shared): say(f'shared: {line}')
    for line in training_reasons(run, todo): say(f'to train: {line}')
    scored = [name for name, folds in outdated.items() if any(run.outdated(name, k) == 'scores' for k in folds)]
    if scored: say(f'no training, only new scores of the validation images: {", ".join(scored)}')
    if not todo: say('no stage is trained again: only what `all` writes after them is out of date or missing')


def show_table(run: Run, plan: PlanCost) -> None:
    "Print the table of stages, the size of each table and the images to prepare"
    demo = ' (SYNTHETIC demo)' if run.synthetic else ''
    columns = ['stage', 'starts from; trains on', 'network', 'images', 'epochs', 'to do']
    table(f'{run.recipe.path} on {run.data}{demo}', columns, plan.rows,
          right=('images', 'epochs'), wrap=('starts from; trains on',))
    sizes = ', '.join(f'{name} {len(frame)}' for name, frame in run.frames.items())
    say(f'tables: {sizes} images. To prepare: {plan.new_images} images at '
        f'{", ".join(map(str, run.recipe.prepared_sizes))} px.')
