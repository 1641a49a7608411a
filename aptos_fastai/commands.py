"What each command does."
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import Bars, format_duration, say, table
from aptos_fastai.common.distributed import world_size
from aptos_fastai.common.io import AptosError, file_hash, read_record, write_csv, write_record
from aptos_fastai.data.store import read_prepared, store_folder
from aptos_fastai.pipeline.graph import (
    check_run,
    label,
    made_from,
    predict,
    predictions_up_to_date,
    start_run,
    submit,
    train_nodes,
)
from aptos_fastai.pipeline.summary import SYNTHETIC, oof_table, show_summary, summarise
from aptos_fastai.recipe import Recipe, read_recipe
from aptos_fastai.run_folder import Run


def run_all(run: Run):
    "Everything, in order: prepares, trains, labels, predicts, submits, sums up; says so and does nothing where all is done"
    t0 = time.monotonic()
    if run.recipe.demo: say(SYNTHETIC, 'yellow')
    if world_size() > 1: say(f'{world_size()} processes share every batch, the preparing and the scoring')
    with start_run(run, run.recipe.stages) as (run, bars):
        if predictions_up_to_date(run):
            say(f'Everything is done already: nothing was run. The answer is {run.root / "submission.csv"}')
            return show_summary(run, read_record(run.root / 'summary.json'))
        train_nodes(run, run.recipe.stages, bars)
        oof = oof_table(run)                 # first: what is not what was written is told before an answer is
        scores = predict(run, bars)
        submit(run, scores)
        write_csv(run.root / 'oof.csv', oof)
        from aptos_fastai.reports.run_report import write_report
        answers = {f: file_hash(run.root / f) for f in ('submission.csv', 'scores.csv', 'oof.csv')}
        o = dict(summarise(run, oof), seconds=round(time.monotonic() - t0, 1), made_from=made_from(run), answers=answers)
        write_report(run, o, oof, scores, bars)
        write_record(run.root / 'summary.json', o)
    show_summary(run, o)
    say(f'{format_duration(time.monotonic() - t0)} in all')


def prepare_all(run: Run):
    "`prepare`"
    with start_run(run) as (done, _): pass
    rows = []
    for n, f in run.frames.items():
        rec = read_prepared(store_folder(f, run.store, run.prep))
        flags = rec['flags'].str.split().explode().value_counts()
        rows.append([n, len(rec), int((rec.error != '').sum()), ' '.join(f'{k} {v}' for k, v in rec.how.value_counts().items() if k),
                     ' '.join(f'{k} {v}' for k, v in flags.items()) or 'none'])
    table(f'images prepared at {run.prep.size} px',
          ['table', 'images', 'bad', 'retina found as', 'flags'], rows, right=('images', 'bad'), wrap=('flags',))
    for n, f in done.frames.items(): say(f'{n}: {Path(f.stored.iloc[0]).parent / "prepared.csv"}')


def _known(run: Run, name: str, among) -> str:
    if name not in among: raise AptosError(f'{name}: no such stage in {run.recipe.path}; there are {", ".join(among)}')
    return name


def train_stage(run: Run, stage: str):
    "`train STAGE`"
    needed = run.ancestors(_known(run, stage, run.recipe.stages))
    with start_run(run, needed) as (run, bars): n = train_nodes(run, needed, bars)
    say(f'{stage} -> {run.root / stage}' if n else f'{stage} is finished already: {run.root / stage}')


def label_table(run: Run, node: str, name: str):
    "`label STAGE [TABLE]`"
    name = name or run.recipe.submit.table
    if name not in run.frames or run.recipe.tables[name].graded:
        raise AptosError(f'{name}: no ungraded table of {run.recipe.path}; there are {", ".join(t.name for t in run.recipe.used_tables if not t.graded)}')
    needed = run.ancestors(_known(run, node, run.recipe.nodes))
    with start_run(run, needed) as (run, bars):
        train_nodes(run, needed, bars)
        say(f'labels of {name} by {node}: {label(run, node, name, bars)}')


@contextmanager
def _answering(run: Run) -> Iterator[tuple[Run, Bars]]:
    "`start_run`, where every stage that answers is finished"
    needed = set().union(*(run.ancestors(m) for m in [run.recipe.submit.final, *run.recipe.submit.also])) & set(run.recipe.stages)

    def refuse(lost):
        why = 'not trained yet, or trained with other settings, grades or images'
        if lost: raise AptosError(f'{run.root}: {", ".join(lost)} {why}; run `all`, or `train {lost[-1]}`')
    refuse([n for n in run.recipe.order if n in needed and not run.record(n, 0)])
    with start_run(run) as (run, bars):
        refuse([n for n in run.todo() if n in needed])
        yield run, bars


def write_scores(run: Run):
    "`predict`"
    with _answering(run) as (run, bars): df = predict(run, bars)
    say(f'{len(df)} images scored -> {run.root / "scores.csv"}')


def write_submissions(run: Run):
    "`submit`"
    with _answering(run) as (run, bars): submit(run, predict(run, bars))
    sub, o = run.recipe.submit, read_record(run.root / 'summary.json')
    thresholds = run.thresholds(sub.final, sub.thresholds).tolist()
    def text(thresholds): return ' '.join(f'{c:.3g}' for c in thresholds)
    say(f'{sub.final}, by thresholds {text(thresholds)} -> {run.root / "submission.csv"}; each submitted stage and ensemble -> {run.root / "submissions"}')
    if o and o['submission']['thresholds'] != thresholds:
        say('report.html, predict, export and kaggle keep to the thresholds of the last `all`: ' + text(o['submission']['thresholds'])
            + '; to change them, too, set [submit] thresholds in the recipe and run `all`', 'yellow')


def report_run(run: Run):
    "`report`: anew from what `all` has finished"
    with start_run(run) as (run, bars):
        if not predictions_up_to_date(run): raise AptosError(f'{run.root}: is not finished, or its recipe has changed; run `all` first, it ends with the report')
        oof, scores = (pd.read_csv(run.root / f, dtype=dict(id_code=str)) for f in ('oof.csv', 'scores.csv'))
        from aptos_fastai.reports.run_report import write_report
        write_report(run, read_record(run.root / 'summary.json'), oof, scores, bars)
    say(f'{run.recipe.name} -> {run.root / "report.html"}')


def suggest_rates(run: Run, stage: str):
    "`lr_find STAGE`"
    _known(run, stage, run.recipe.stages)
    check_run(run, [stage])
    plot = run.root / stage / 'lr_find.png'
    with start_run(run) as (run, _):
        from aptos_fastai.pipeline.stage import find_rates
        found = find_rates(run, stage, plot)
    table(f'learning rates for {stage}', ['suggestion', 'lr'], [[k, f'{v:.2g}'] for k, v in found.items()])
    say(f'curve -> {plot}; put the rate into [stage.{stage}] lr')


def suggest_batch(run: Run, stage: str):
    "`batch STAGE`"
    _known(run, stage, run.recipe.stages)
    from aptos_fastai.training.precision import fitting_batches
    rows = fitting_batches(run.recipe.stages[stage])
    if not rows: raise AptosError(f'[stage.{stage}] size = {run.recipe.stages[stage].size}: not two images fit this GPU; set size lower')
    table(f'training steps of {stage}', ['bs', 'images/s', 'GB'], [[n, f'{r:.0f}', f'{g:.1f}'] for n, r, g in rows], right=('bs', 'images/s', 'GB'))
    n, bs = rows[-1][0], run.recipe.stages[stage].bs
    say(f'{n} fits; [stage.{stage}] bs = {bs}' + (' does, too' if bs <= n else f' does not: bs = {n} and accumulate = {-(-bs // n)} take the same steps'))


def write_demo_folder(recipe: str, sets: Iterable[str], folder: str):
    "`demo [FOLDER]`"
    from aptos_fastai.data.demo import write_demo
    d: Recipe = read_recipe(recipe, demo=True, sets=list(sets))
    total = d.demo.pretrain + d.demo.train + d.demo.test
    try:
        with Bars() as bars, bars(f'painting into {folder}', total, 'images') as bar:
            write_demo(Path(folder), pretrain=d.demo.pretrain, train=d.demo.train, test=d.demo.test, seed=d.seed, progress=lambda n, _: bar.to(n))
    except FileExistsError as e: raise AptosError(f'{e}; give another folder') from None
    except OSError as e: raise AptosError(f'{folder}: cannot be written ({e.strerror})') from None
    say(f'{total} synthetic images -> {folder}')
