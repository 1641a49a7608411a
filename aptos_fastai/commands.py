"What each command does, with the functions of the other modules. `cli.py` parses its arguments."
import re
import shlex
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from aptos_fastai.api import PreparedRun, as_prepared
from aptos_fastai.common.console import Bars, format_duration, plural, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.distributed import world_size
from aptos_fastai.common.io import AptosError, digest, file_hash, read_record, write_csv, write_record
from aptos_fastai.common.privacy import LEAVE_OUT, patient_data
from aptos_fastai.common.program import COMMAND
from aptos_fastai.data.tables import describe
from aptos_fastai.data.understand import Ask
from aptos_fastai.pipeline.deadline import Deadline
from aptos_fastai.pipeline.fit import GRADED, understand_tables, write_fit_recipe
from aptos_fastai.pipeline.graph import (
    as_answered,
    check_run,
    inputs_digest,
    load_run,
    output_files,
    outputs_up_to_date,
    score_test_table,
    start_run,
    submitted_nodes,
    train_nodes,
    write_demo_tables,
    write_missing_labels,
    write_submissions,
)
from aptos_fastai.pipeline.refresh import refresh_folds
from aptos_fastai.pipeline.run_recipe import RECIPE, check_name, check_same_model
from aptos_fastai.pipeline.share import with_shared
from aptos_fastai.pipeline.summary import SYNTHETIC, oof_table, show_summary, stage_kappa_text, summarise
from aptos_fastai.recipe.check import require_name
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import NAMED_SECTIONS, SECTIONS, TUNE_HELP
from aptos_fastai.run_folder import Run

if TYPE_CHECKING:
    from aptos_fastai.inference.evaluate import Choices


def run_all(run: Run, deidentify: bool = False, deadline: Deadline | None = None, replaces: bool = False) -> None:
    """Prepare, train, label, score, submit and report; do nothing if every output is up to date.

    `deidentify` leaves ids and images out of the report, and writes one that is up to date again. With a `deadline`,
    stages that would end too late are left out. A finished run is trained again with other settings only if it
    `replaces`.
    """
    start = time.monotonic()
    if deadline: deadline.check(with_shared(run, run.recipe.stages))
    if run.synthetic: say(SYNTHETIC, 'yellow')
    if world_size() > 1: say(f'{world_size()} processes share preparing, training and scoring')
    with start_run(run, run.recipe.stages, replaces=replaces) as (run, bars):
        if outputs_up_to_date(run):
            say(f'Nothing to do: every stage is up to date in {run.root}')
            if deidentify: write_report_again(run, bars, deidentify)
            show_summary(run, of_present_recipe(run))
            return
        train_nodes(run, run.recipe.stages, bars, deadline)
        if deadline: run = deadline.without_rest(run)
        summary = write_outputs(run, bars, start, deidentify)
    show_summary(run, summary)
    say(f'{format_duration(time.monotonic() - start)} in all')


def of_present_recipe(run: Run) -> dict:
    "Return summary.json of a run that is up to date; its hash of recipe.ini becomes that of the present one"
    summary, recipe_sha256 = read_record(run.root / 'summary.json') or {}, file_hash(run.root / RECIPE)
    if summary.get('recipe_sha256') == recipe_sha256: return summary
    summary['recipe_sha256'] = recipe_sha256
    write_record(run.root / 'summary.json', summary)
    return summary


def fit(csv: str | Path, images: str | Path = '', unlabelled: str | Path = '', *, name: str = '',
        runs: str | Path = 'runs', sets: Iterable[str] = (), ask: Ask | None = None, deidentify: bool = False,
        hours: float | None = None, **keys: str) -> PreparedRun:
    """Train on a graded table without a recipe; return the run: `run.grader.predict(files)` grades new images.

    `csv` is a CSV or .xlsx with a row for each image in the folder `images`, or a folder with a sub-folder for each
    grade; `unlabelled` is a folder of ungraded images to predict and train on, too. Columns are understood by their
    names and contents and printed; `keys` (id, grade, patient, eye, group, ungradable, sheet, where, carry) override
    that. Writes the recipe <runs>/<name>/<name>.ini and everything that `all` writes; with `deidentify` the report has
    no ids and no images. With `hours` the settings are chosen for that time, and stages that would end later are left
    out. Raises `AptosError`, also where two columns would do and there is no `ask` to choose one.
    """
    deadline = Deadline(hours) if hours else None
    recipe, data = understand_and_write(csv, images, unlabelled, name, runs, sets, ask, keys, deadline)
    run_all(load_run(recipe, data, runs), deidentify, deadline)
    return as_prepared(load_run(recipe, data, runs))


def inspect(load: Callable[..., Run], table: str, count: int, images: str, runs: str, name: str, sets: Iterable[str],
            ask: Ask | None, keys: dict[str, str]) -> None:
    "Inspect a table of the recipe that `load` opens, or a CSV or folder as `fit` would train on it"
    from aptos_fastai.reports.table_report import inspect_table
    if not Path(table).exists():
        if Path(table).name != table or Path(table).suffix: raise AptosError(f'{table}: no such file or folder.')
        inspect_table(load(table=table), table, count)
        return
    name = name or f'{name_of(table)}_inspect'
    recipe, data = understand_and_write(table, images, '', name, runs, sets, ask, keys)
    inspect_table(load_run(recipe, data, runs), GRADED, count)


def understand_and_write(csv: str | Path, images: str | Path, unlabelled: str | Path, name: str, runs: str | Path,
                         sets: Iterable[str], ask: Ask | None, keys: dict[str, str],
                         deadline: Deadline | None = None) -> tuple[Path, Path]:
    "Print how the tables of `fit` are understood and write its recipe; return the recipe and the data folder"
    sets = list(sets)
    tables = understand_tables(csv, images, unlabelled, ask, keys, sets)
    name = name or name_of(csv)
    check_name(name)
    recipe = Path(runs) / name / f'{name}.ini'
    data = write_fit_recipe(tables, recipe, sets, deadline)
    for table_name, understood in tables.items():
        for reason in (*understood.reasons, describe(understood.table, understood.contents)):
            say(f'{table_name}: {reason}')
    places = ' '.join(f'{key} {shlex.quote(str(value))}'
                      for key, value in (('--recipe', recipe), ('--data', data), ('--runs', runs)))
    say(f'recipe -> {recipe}\nto run it: {COMMAND} all {places}')
    return recipe, data


def name_of(csv: str | Path) -> str:
    "Return the name of a run on a table: that of its file or folder"
    return re.sub(r'\W+', '_', Path(csv).resolve().stem)


def write_outputs(run: Run, bars: Bars, start: float, deidentify: bool = False) -> dict:
    """Write oof.csv, scores.csv, submissions, report.html and, last, summary.json, which is returned.

    Without a test table there are no scores and no submissions.
    """
    from aptos_fastai.pipeline.run_gate import gate_result
    from aptos_fastai.reports.run_report import write_report
    oof = oof_table(run)                     # first: it checks the validation scores before anything is written
    scores = score_test_table(run, bars) if run.recipe.submit.table else None
    if scores is None and (run.root / 'submission.csv').is_file():
        say(f'{run.root / "submission.csv"} is of an earlier run with a test table; this run predicts none', 'yellow')
    if scores is not None: write_submissions(run, scores)
    write_csv(run.root / 'oof.csv', oof)
    hashes = {name: file_hash(run.root / name) for name in output_files(run)}
    summary = dict(summarise(run, oof), gate=gate_result(run, scores), seconds=round(time.monotonic() - start, 1),
                   inputs_digest=inputs_digest(run), outputs=hashes, recipe_sha256=file_hash(run.root / RECIPE))
    write_report(run, summary, oof, scores, bars, deidentify)
    write_record(run.root / 'summary.json', summary)
    if not run.recipe.demo:
        say(patient_data(run.root, 'its CSV files name images and patients by their ids'), 'dim')
        say(patient_data(run.store, 'holds copies of the images and their ids'), 'dim')
    return summary


def prepare_run(run: Run) -> None:
    "Prepare the images of every table; print how their retinas were found and which look bad"
    with start_run(run) as (prepared, _): pass
    rows = []
    for name in prepared.frames:
        record = prepared.prepared_record(name)
        flags = record['flags'].str.split().explode()
        rows.append([name, len(record), int((record.error != '').sum()), counts_text(record.how[record.how != '']),
                     counts_text(flags) or 'none'])
    columns = ['table', 'images', 'unreadable', 'retina found as', 'flags']
    table(f'images prepared at {sizes_text(run.recipe)}', columns, rows,
          right=('images', 'unreadable'), wrap=('flags',))
    for name, frame in prepared.frames.items():
        say(f'{name}: {Path(frame.stored.iloc[0]).parent / "prepared.csv"}')
    if not run.recipe.demo: say(patient_data(run.store, 'holds copies of the images and their ids'), 'dim')


def sizes_text(recipe: Recipe) -> str:
    "Return the sizes of prepared squares: '512, 256 px'"
    return f'{", ".join(map(str, recipe.prepared_sizes))} px'


def counts_text(values: pd.Series) -> str:
    "Return how often each value occurs, the most frequent first: 'circle 40 box 2'"
    return ' '.join(f'{value} {count}' for value, count in values.value_counts().items())


def train_stage(run: Run, stage: str, replaces: bool = False) -> None:
    "Train one stage, or the members of an ensemble, and the unfinished stages that they build on"
    needed = run.ancestors(require_name(run.recipe, stage, run.recipe.nodes))
    with start_run(run, needed, replaces=replaces) as (run, bars):
        changed = train_nodes(run, needed, bars)
        kappa = stage_kappa_text(run, stage)
    say(f'{stage} -> {run.root / stage}' if changed else f'Nothing to do: {stage} is up to date in {run.root / stage}')
    say(f'{stage}: {kappa}')


def label_table(run: Run, node: str, name: str, replaces: bool = False) -> None:
    "Write the pseudo-labels of an ungraded table (default: the submission's); train what they need first"
    if not name: require_test_table(run)
    name = name or run.recipe.submit.table
    if name not in run.frames or run.recipe.tables[name].graded:
        ungraded = [t.name for t in run.recipe.used_tables if not t.graded]
        raise AptosError(f'{name}: no such ungraded table in {run.recipe.path}. Choose from: {", ".join(ungraded)}.')
    needed = run.ancestors(require_name(run.recipe, node, run.recipe.nodes))
    with start_run(run, needed, replaces=replaces) as (run, bars):
        train_nodes(run, needed, bars)
        say(f'pseudo-labels of {name} by {node}: {write_missing_labels(run, node, name, bars)}')


@contextmanager
def start_trained_run(run: Run) -> Iterator[tuple[Run, Bars]]:
    "`start_run`. Raises `AptosError` if there is no test table, or a stage that the submission needs is not finished"
    require_test_table(run)
    check_same_model(run)
    run = as_answered(run)
    needed = set().union(*(run.ancestors(n) for n in submitted_nodes(run.recipe))) & set(run.recipe.stages)
    require_finished(run, [n for n in run.recipe.order if n in needed and not run.record(n, 0)])
    with start_run(run) as (run, bars):
        todo = run.todo()
        require_finished(run, [n for n in todo if n in needed])
        refresh_folds(run, run.to_refresh(todo, needed), bars)
        yield run, bars


def require_test_table(run: Run) -> None:
    "Raise `AptosError` if the recipe has no table to predict"
    if run.recipe.submit.table: return
    raise AptosError(run.left_out or f'{run.recipe.path} [submit] table: empty, so there is no table to predict. Grade '
                     f'images with `predict {run.root} IMAGES`.')


def require_finished(run: Run, unfinished: list[str]) -> None:
    "Raise `AptosError` if any stage is unfinished"
    if not unfinished: return
    raise AptosError(f'{run.root}: {", ".join(unfinished)} not trained yet, or trained with other settings, grades or '
                     f'images. Run `all`, or `train {unfinished[-1]}`.')


def score_run(run: Run) -> None:
    "Score the test table with the finished stages and write scores.csv"
    with start_trained_run(run) as (run, bars): scores = score_test_table(run, bars)
    say(f'{plural(len(scores), "image")} scored -> {run.root / "scores.csv"}')
    say(DISCLAIMER, 'dim')


def submit_run(run: Run) -> None:
    "Score the test table and write submission.csv and submissions/"
    with start_trained_run(run) as (run, bars): write_submissions(run, score_test_table(run, bars))
    submit, summary = run.recipe.submit, read_record(run.root / 'summary.json')
    thresholds = run.thresholds(submit.final, submit.thresholds)
    say(f'{submit.final}, thresholds {thresholds_text(thresholds)} -> {run.root / "submission.csv"}\n'
        f'each submitted stage and ensemble -> {run.root / "submissions"}')
    say(DISCLAIMER, 'dim')
    if summary and digest(summary['submission'].get('refer')) != digest(asdict(run.recipe.refer)):
        say('[refer] has changed since the last `all`: report and predict still use its operating points. Run `all`, '
            'which trains nothing.', 'yellow')
    if summary and bool(summary['submission'].get('eyes')) != (submit.eyes == 'fused'):
        say(f'[submit] eyes = {submit.eyes} is new since the last `all`: report and predict still grade as before. Run '
            '`all`, which trains nothing.', 'yellow')
    if not summary or summary['submission']['thresholds'] == thresholds.tolist(): return
    say('report.html and the commands predict, export, serve and kaggle still use the thresholds of the last `all`:\n'
        f'{thresholds_text(summary["submission"]["thresholds"])}. '
        'To change these too, set [submit] thresholds in the recipe and run `all`.', 'yellow')


def thresholds_text(thresholds: Iterable[float] | np.ndarray) -> str:
    "Return thresholds for people: '0.52 1.48 2.5 3.41'"
    return ' '.join(f'{t:.3g}' for t in thresholds)


def report_run(run: Run, deidentify: bool = False) -> None:
    "Write report.html again from the results of `all`; `deidentify` leaves out ids and images"
    with start_run(as_answered(run)) as (run, bars):
        if not (run.root / 'summary.json').is_file() or not outputs_up_to_date(run):
            raise AptosError(f'{run.root}: not finished, or the recipe has changed. Run `all`; it writes the report.')
        write_report_again(run, bars, deidentify)
    say(f'{run.recipe.name} -> {run.root / "report.html"}')


def write_report_again(run: Run, bars: Bars, deidentify: bool) -> None:
    "Write report.html from the files of a finished run"
    from aptos_fastai.reports.run_report import write_report
    files = {name: pd.read_csv(run.root / name, dtype=dict(id_code=str)) for name in output_files(run)}
    summary = read_record(run.root / 'summary.json') or {}
    write_report(run, summary, files['oof.csv'], files.get('scores.csv'), bars, deidentify)


def find_learning_rate(run: Run, stage: str) -> None:
    "Print learning rates that fastai's LR finder suggests for a stage, and save its curve"
    require_name(run.recipe, stage, run.recipe.stages)
    if world_size() > 1: raise AptosError('lr_find runs in one process. Start it without torchrun or accelerate.')
    check_run(run, [stage])
    plot = run.root / stage / 'lr_find.png'
    with start_run(run) as (run, bars):
        from aptos_fastai.pipeline.stage import find_rates
        found = find_rates(run, stage, plot, bars)
    table(f'learning rates for {stage}', ['suggestion', 'lr'], [[name, f'{lr:.2g}'] for name, lr in found.items()])
    say(f'curve -> {plot}. Set the rate you choose as [stage.{stage}] lr.')


def find_batch_size(run: Run, name: str) -> None:
    "Print speed and memory of a stage's training steps for growing batches, and the largest batch that fits the GPU"
    stage = run.recipe.stages[require_name(run.recipe, name, run.recipe.stages)]
    from aptos_fastai.training.precision import fitting_batches
    found = fitting_batches(stage)
    if not found:
        raise AptosError(f'[stage.{name}] size = {stage.size}: a batch of 2 images does not fit this GPU. Lower size.')
    rows = [[bs, f'{speed:.0f}', f'{memory:.1f}'] for bs, speed, memory in found]
    table(f'training steps of {name}', ['bs', 'images/s', 'GB'], rows, right=('bs', 'images/s', 'GB'))
    largest = found[-1][0]
    advice = f'bs = {stage.bs} fits too'
    if stage.bs > largest:
        steps = -(-stage.bs // largest)
        advice = f'bs = {stage.bs} does not fit: bs = {largest} and accumulate = {steps} take the same steps'
    say(f'[stage.{name}] largest bs that fits: {largest}; {advice}')


def tune_stage(run: Run, stage: str, trials: int) -> None:
    "Try values of a stage's keys, compare the best with the recipe's, and draw which keys mattered"
    if find_spec('optuna') is None: raise AptosError('tune: needs the package optuna. Run pip install optuna.')
    from aptos_fastai.pipeline import tune
    from aptos_fastai.reports.plots import importance_bars, write_png
    found = tune.tune_stage(run, stage, trials)
    plot = found.folder / 'importance.png'
    if not found.importance:
        plot.unlink(missing_ok=True)         # of an earlier study
        return
    demo = ' (synthetic demo)' if run.synthetic else ''
    label = f'{stage}: share of the differences of kappa between trials{demo}'
    write_png(importance_bars(found.importance, label), plot)
    say(f'how much each key mattered -> {plot}')


def write_demo_folder(recipe: str, sets: Iterable[str], folder: str) -> None:
    "Write the synthetic demo's tables to a folder"
    demo = read_recipe(recipe, demo=True, sets=list(sets))
    write_demo_tables(demo, Path(folder), 'Choose another folder.')
    say(f'synthetic images -> {folder}')


def evaluate_model(model: str, table: str, choices: 'Choices', deidentify: bool = False, **where: Any) -> None:
    """Evaluate a model on a graded table; write and show the evaluation, and put it into the bundle's model card.

    `where` are the arguments of `evaluate_table` that say what the table is. `deidentify` leaves out who is on its
    images.
    """
    from aptos_fastai.deploy.bundle import update_card
    from aptos_fastai.inference.deidentify import NOTE, without_people
    from aptos_fastai.inference.evaluate import evaluate_table
    from aptos_fastai.reports.evaluation_report import show_evaluation, write_evaluation
    evaluation = evaluate_table(model, table, choices=choices, **where)
    if deidentify: evaluation = without_people(evaluation)
    write_evaluation(evaluation)
    update_card(Path(model))
    show_evaluation(evaluation)
    holds = 'predictions.csv and evaluation.html name images by their ids, predictions.csv also patients and hashes'
    say(f'{evaluation.folder}: {NOTE}' if deidentify else patient_data(evaluation.folder, holds, LEAVE_OUT), 'dim')


def show_keys() -> None:
    "Print every section and key of a recipe with default, meaning and accepted values, in lines of 80 characters"
    for name, section in SECTIONS.items():
        say(f'\n[{name}.NAME]' if name in NAMED_SECTIONS else f'\n[{name}]', 'bold')
        for key in fields(section):
            if key.name == 'name': continue
            head = f'  {key.name:<14} {default_text(key) or "empty":<18} '
            text = key.metadata['help'] + accepted_text(key)
            say(textwrap.fill(text, 80, initial_indent=head, subsequent_indent=' ' * 36))
    say('\n[tune.STAGE]', 'bold')
    say(textwrap.fill(TUNE_HELP, 80, initial_indent='  ', subsequent_indent='  '))


def default_text(key: Field) -> str:
    "Return the default of a key as it is written in a recipe"
    if key.default is MISSING: return 'required'
    return ' '.join(map(str, key.default)) if isinstance(key.default, tuple) else str(key.default)


def accepted_text(key: Field) -> str:
    "Return the accepted values of a key, ' (smooth_l1, mse)' or ' (0 to 1)'; '' if its help explains each of them"
    limits = key.metadata
    if limits['choices']:
        explained = all(re.search(rf'\b{choice}\b', limits['help']) for choice in limits['choices'])
        return '' if explained else f' ({", ".join(limits["choices"])})'
    return f' ({limits["low"]} to {limits["high"]})' if limits['low'] is not None else ''
