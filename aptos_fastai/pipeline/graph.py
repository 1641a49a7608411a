"Walk the graph of a recipe: tables, images, stages, pseudo-labels, submission. Skip what is finished."
import os
import shlex
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars, plural, say
from aptos_fastai.common.distributed import world_size
from aptos_fastai.common.io import (
    AptosError,
    digest,
    file_hash,
    read_record,
    remove_stale_temp_files,
    run_lock,
    write_bytes,
    write_csv,
    write_record,
)
from aptos_fastai.common.program import COMMAND
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.duplicates import duplicates_table, group_duplicates, resolve_conflicts
from aptos_fastai.data.folds import add_folds, write_folds
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.spreadsheet import first_few
from aptos_fastai.data.store import prepare_table, prepared_already, store_folder, stored_column
from aptos_fastai.data.tables import MISSING_IMAGES, TableContents, read_contents, read_order, with_present_tables
from aptos_fastai.decisions import without_ungradable
from aptos_fastai.inference.eyes import fused_text
from aptos_fastai.inference.training_images import write_run_images
from aptos_fastai.metrics import GRADES, PredictionSets, apply_thresholds, grade_scores
from aptos_fastai.pipeline.eyes import check_eyes, eyes_digest, fit_run_eyes, people_of, without_stages
from aptos_fastai.pipeline.lineage import check_lineage, report_held_out, report_weights
from aptos_fastai.pipeline.other_runs import check_other_runs, read_run_recipe
from aptos_fastai.pipeline.reasons import NEVER, training_reasons
from aptos_fastai.pipeline.refresh import move_renamed, refresh_folds
from aptos_fastai.pipeline.run_recipe import (
    RECIPE,
    check_weights_folder,
    is_stored,
    of_demo,
    relative_to_root,
    store_recipe,
)
from aptos_fastai.pipeline.share import take_shared, with_shared
from aptos_fastai.pipeline.summary import (
    SUMMARY_FORMAT,
    SYNTHETIC,
    epochs_text,
    graded_alone,
    node_decision,
    tables_text,
)
from aptos_fastai.recipe.check import require_name, require_table
from aptos_fastai.recipe.files import read_ini
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.sections import MLFLOW_SERVER, ConfigError, Stage
from aptos_fastai.run_folder import Run

if TYPE_CHECKING:
    from aptos_fastai.pipeline.deadline import Deadline

UNREADABLE = 'cannot be read'                              # in the column ungradable of scores.csv
OUTPUTS = ('submission.csv', 'scores.csv', 'oof.csv')     # their SHA-256 are in summary.json


# Load and prepare a run

def load_run(recipe: str | Path = 'settings.ini', data: str | Path = 'demo', runs: str | Path = 'runs',
             sets: Iterable[str] = (), node: str = '', name: str = '', table: str = '') -> Run:
    """Return the run of a recipe on a data folder, with its tables read and checked. `start_run` prepares the images.

    Writes nothing but the demo's images (`data` = 'demo'). `sets` are SECTION.KEY=VALUE; `node` is a stage or
    ensemble and `table` a table that the recipe must have; the run folder is <runs>/<name>, without `name` that of the
    recipe. Raises `AptosError` for a wrong recipe, table or folder.
    """
    demo = str(data) == 'demo'
    parsed = read_run_recipe(recipe, runs, name, demo=demo, sets=list(sets))
    if node: require_name(parsed, node, parsed.nodes)
    if table: require_table(parsed, table)
    runs_folder = Path(runs)
    if runs_folder.exists() and not runs_folder.is_dir():
        raise AptosError(f'{runs}: is a file. Choose a folder with --runs.')
    data_folder = demo_tables(parsed, runs_folder) if demo else Path(data)
    parsed, left_out = with_present_tables(parsed, data_folder)
    if left_out:
        say(left_out, 'yellow')
        if node: require_name(parsed, node, parsed.nodes)
    tables = read_contents(parsed, data_folder)
    if parsed.submit.table: read_order(parsed.tables[parsed.submit.table], data_folder)     # an error now, not later
    root = runs_folder / parsed.name
    check_same_data(root, data_folder, demo, may_have_moved=is_stored(parsed, root))
    frames = {name: contents.frame for name, contents in tables.items()}
    run = Run(parsed, data_folder, root, frames, left_out, count_ungradable(tables))
    run = with_folds(with_prepared(run))
    check_eyes(run)
    return run


def count_ungradable(tables: dict[str, TableContents]) -> dict[str, int]:
    "Return how many images of each table readers called ungradable: they are in no frame"
    return {name: len(contents.ungradable) for name, contents in tables.items()}


def demo_tables(recipe: Recipe, runs: Path) -> Path:
    "Return the folder of the synthetic demo in `runs`; generate its images unless they are there"
    assert recipe.demo
    counts = f'{recipe.demo.pretrain}-{recipe.demo.train}-{recipe.demo.test}'
    return write_demo_tables(recipe, runs / f'demo-{counts}-seed{recipe.seed}', 'Choose another folder with --runs.')


def write_demo_tables(recipe: Recipe, folder: Path, what_to_do: str) -> Path:
    """Generate the synthetic demo's tables in `folder`, unless they are there; return `folder`.

    Raises `AptosError` if that fails; its message ends with `what_to_do`.
    """
    from aptos_fastai.data.demo import write_demo
    assert recipe.demo
    pretrain, train, test = recipe.demo.pretrain, recipe.demo.train, recipe.demo.test
    title = f'generating the synthetic demo in {folder}'
    try:
        with Bars() as bars, bars(title, pretrain + train + test, 'images') as bar:
            return write_demo(folder, pretrain=pretrain, train=train, test=test, seed=recipe.seed,
                              progress=lambda done, total: bar.to(done))
    except FileExistsError as e: raise AptosError(f'{e}. {what_to_do}') from None
    except OSError as e:
        raise AptosError(f'{folder}: cannot write to this folder ({e.strerror}). {what_to_do}') from None


def check_same_data(root: Path, data: Path, demo: bool, may_have_moved: bool = False) -> None:
    """Raise `AptosError` if the run folder `root` belongs to another data folder, whose results would be overwritten.

    With `demo` the folder may change, but run.json must still be what a run on the demo wrote. With `may_have_moved`
    the data may be elsewhere if its folder is no longer there.
    """
    record = read_record(root / 'run.json')
    if not record or demo and of_demo(record): return
    first = (root / record['data']).resolve()
    moved = may_have_moved and not of_demo(record) and not first.exists()
    if not demo and (moved or record['data'] == relative_to_root(root, data)): return
    now = 'the demo' if demo else data
    once = f' If the data was moved: {COMMAND} all {shlex.quote(str(root))} --data {shlex.quote(str(data))}, once.'
    raise AptosError(f'{root}: belongs to the data folder {first}, not to {now}. Choose another --name or --runs.'
                     f'{"" if demo or first.exists() else once}')


def check_replaced(run: Run, stages: Collection[str]) -> None:
    "Raise `AptosError` if a training of `stages` would replace finished folds of other settings or images"
    todo = run.todo([name for name in stages if name not in run.recipe.other_runs])
    lost = {name: [k for k in folds if run.has_changed(name, k)] for name, folds in todo.items()}
    reasons = training_reasons(run, {name: folds for name, folds in lost.items() if folds})
    if not reasons: return
    own = f' To go on with its own settings: {COMMAND} all {shlex.quote(str(run.root))}'
    raise AptosError(f'{run.root}: finished with other settings or images ({" | ".join(reasons)}). Add --name NAME to '
                     'train another run, which takes what has not changed, or --replace (of `all`, `train`, `label`) '
                     f'to train again here.{own if any(" -> " in reason for reason in reasons) else ""}')


def with_prepared(run: Run) -> Run:
    "Return the run with paths and hashes of the images prepared earlier; without them nothing counts as finished"
    skip, sizes = run.recipe.images.skip_unreadable == 'yes', run.recipe.prepared_sizes
    frames = {name: prepared_already(frame, run.store, run.prep, sizes=sizes, skip_unreadable=skip)
              for name, frame in run.frames.items()}
    frames = {name: frame if 'stored' in frame else prepared_as_other(run, frame) for name, frame in frames.items()}
    return replace(run, frames=frames)


def prepared_as_other(run: Run, frame: pd.DataFrame) -> pd.DataFrame:
    "Return a table as prepared earlier under another name, unchanged if it was not; its images are prepared again"
    skip, sizes = run.recipe.images.skip_unreadable == 'yes', run.recipe.prepared_sizes
    source = frame.source.iloc[0]
    folders = [store_folder(frame, run.store, replace(run.prep, size=size)) for size in sizes]
    names = {other.name.removesuffix(end) for folder in folders for end in [folder.name.removeprefix(source)]
             for other in folder.parent.glob(f'*{end}')}
    for name in sorted(names):
        try:
            found = prepared_already(frame.assign(source=name), run.store, run.prep, sizes=sizes, skip_unreadable=skip)
        except ImageError: continue          # a damaged prepared.csv that this run does not need
        if 'stored' in found: return found.assign(source=source)
    return frame


def as_answered(run: Run) -> Run:
    """Return the run without the unfinished stages that its last `all` left out for lack of time.

    They are `postponed` in summary.json. Raises `AptosError` if the recipe has another `final` since, which needs one.
    """
    summary = read_record(run.root / 'summary.json') or {}
    if not summary.get('postponed'): return run
    unfinished = [name for name in run.todo() if name in summary['postponed']]
    if not unfinished: return run
    final, missing = run.recipe.submit.final, run.ancestors(run.recipe.submit.final).intersection(unfinished)
    if missing and run.recipe.sections['submit']['final'] != read_ini(run.root / RECIPE)['submit']['final']:
        raise AptosError(f'[submit] final = {final}: {", ".join(sorted(missing))} not finished, because the last `all` '
                         f'left out stages for lack of time. Run `train {final}` first, or name another stage.')
    return replace(without_stages(run, unfinished), left_out=summary['left_out'])


def with_common_size(run: Run, frames: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], Prep | None]:
    "Return the tables with `stored` of the largest size that all of them are prepared at, and its `Prep`; None: none"
    for size in run.recipe.prepared_sizes:
        column = stored_column(size)
        if not all(column in frame for frame in frames.values()): continue
        return {name: f.assign(stored=f[column]) for name, f in frames.items()}, replace(run.prep, size=size)
    return frames, None


def is_prepared(run: Run) -> bool:
    "Return whether every image of the run's tables is prepared"
    return all('perceptual_hash' in f for f in run.frames.values())


def with_folds(run: Run) -> Run:
    "Return the run with a fold for each image; once all images are prepared, duplicate images share a fold"
    frames = run.frames
    if is_prepared(run):
        frames = resolve_conflicts(group_duplicates(*with_common_size(run, frames)), run.recipe.conflicts)
    return replace(run, frames=add_folds(run.recipe, frames, run.root / 'folds.csv'))


@contextmanager
def start_run(run: Run, nodes: Iterable[str] = (), trial: bool = False,
              replaces: bool = False) -> Iterator[tuple[Run, Bars]]:
    """Lock the run folder, prepare every image, write the folds; yield the prepared run and the progress bars.

    First checks whether the unfinished stages among `nodes` can train, and, unless it `replaces` them, that no
    finished fold would be trained again with other settings. With stages among them, the recipe becomes that
    of the run folder (recipe.ini), folders of renamed stages are renamed, and folds of these stages that another run
    has finished are taken; not for a `trial` of other values. No other process can work in the run folder until the
    block ends. Raises `AptosError`.
    """
    stages = {n: s for n, s in run.recipe.stages.items() if n in set(nodes)}
    known = run if trial else with_shared(run, stages)
    check_run(run, [n for n in run.recipe.order if n in stages and not known.record(n, stages[n].folds - 1)])
    with run_lock(run.root), Bars() as bars:
        remove_stale_temp_files(run.root, 0)
        run = prepare_images(run, bars)
        if not trial:
            if not replaces: check_replaced(run, stages)
            run = take_shared(move_renamed(run), stages)
            check_other_runs(run, stages)
        write_folds(run.recipe, run.frames, run.root / 'folds.csv')
        write_run_images(run.root, run.frames)
        report_duplicates(run)
        report_held_out(run)
        warn_missing_grades(run)
        if run.synthetic: write_bytes(run.root / 'SYNTHETIC.txt', f'{SYNTHETIC}.\n'.encode())
        write_record(run.root / 'run.json', dict(
            data=relative_to_root(run.root, run.data), **store_recipe(run, replace=bool(stages) and not trial),
            demo=bool(run.recipe.demo), synthetic=run.synthetic,
            relabels={name: dict(file=relative_to_root(run.root, o.file), **o.record())
                      for name, o in run.relabels.items()}))
        yield run, bars


def prepare_images(run: Run, bars: Bars) -> Run:
    "Return the run with every image of its tables prepared, and with folds"
    skip = run.recipe.images.skip_unreadable == 'yes'
    tables = read_contents(run.recipe, run.data)
    for name, contents in tables.items():
        for note in contents.notes: say(f'{name}: {note}', 'yellow')
    write_missing(run.root / MISSING_IMAGES, tables)
    sizes = run.recipe.prepared_sizes
    frames = {name: prepare_table(contents.frame, run.store, run.prep, bars, sizes=sizes, skip_unreadable=skip)
              for name, contents in tables.items()}
    prepared = with_folds(replace(run, frames=frames, ungradable=count_ungradable(tables)))
    check_eyes(prepared)                     # again: unreadable images are left out now
    return prepared


def write_missing(file: Path, tables: dict[str, TableContents]) -> None:
    "Write the ids that were left out because they have no image, if there are any, and say where"
    rows = [(name, missing) for name, contents in tables.items() for missing in contents.missing]
    if not rows:
        file.unlink(missing_ok=True)
        return
    write_csv(file, pd.DataFrame(rows, columns=['source', 'id_code']))
    say(f'{plural(len(rows), "id")} without an image -> {file}', 'yellow')


def report_duplicates(run: Run) -> None:
    "Write duplicates.csv and print how many images are in the tables more than once"
    file, rows = run.root / 'duplicates.csv', duplicates_table(run.frames)
    if not len(rows):
        file.unlink(missing_ok=True)
        return
    write_csv(file, rows)
    groups, conflicts = rows.duplicate_group.nunique(), rows.duplicate_group[rows.conflict].nunique()
    say(f'{len(rows)} duplicate images in {groups} {"group" if groups == 1 else "groups"}, '
        f'{conflicts} with conflicting grades. All copies share a fold. List: {file}')
    for name, table in run.recipe.tables.items():
        if name in run.frames and not table.graded: report_copies(run, name)


def report_copies(run: Run, name: str) -> None:
    "Print which images of an ungraded table are copies of graded images: their grades are known"
    graded = [frame for other, frame in run.frames.items() if run.recipe.tables[other].graded]
    known = pd.concat(graded).drop_duplicates('duplicate_group')       # every recipe has a graded table
    copies = run.frames[name].merge(known, on='duplicate_group', suffixes=('', '_graded'))
    if not len(copies): return
    pairs = zip(copies.id_code, copies.source_graded, copies.id_code_graded, strict=True)
    say(f'{name}: {len(copies)} of {len(run.frames[name])} images are copies of graded images: '
        f'{first_few([f"{a} = {table} {b}" for a, table, b in pairs])}. A score on them is no test.', 'yellow')


def warn_missing_grades(run: Run) -> None:
    "Warn of validation folds without images of some grade: their kappa does not cover that grade"
    folds = range(max(s.folds for s in run.recipe.stages.values()))
    for name, frame in run.frames.items():
        if not run.recipe.tables[name].graded: continue
        grades = set(frame.diagnosis.astype(int))
        missing = {k: sorted(grades - set(frame.diagnosis[frame.fold == k].astype(int))) for k in folds}
        gaps = [f'fold {k} has no image of grade {", ".join(map(str, lost))}' for k, lost in missing.items() if lost]
        advice = f'Lower [recipe] splits = {run.recipe.splits}, and folds with it, or add images of these grades.'
        if gaps: say(f'{name}: {"; ".join(gaps)}. {advice}', 'yellow')


# Checks before training

def check_run(run: Run, stages: Collection[str]) -> None:
    "Raise `ConfigError` now for what would stop a stage later: a batch size too large, weights or packages missing"
    if not stages: return
    check_settings(run, stages)
    for problem in weight_problems(run, stages): raise ConfigError(problem)
    check_training(run, stages)


def check_settings(run: Run, stages: Collection[str]) -> None:
    "Raise `ConfigError` for what of `check_run` needs no network: members, batches, packages"
    for name in run.recipe.ensembles: check_members(run, name)
    for name in stages: check_pseudo_labelled(run, run.recipe.stages[name])
    for name in stages:
        check_batch(run, run.recipe.stages[name])
        check_balance(run, run.recipe.stages[name])
        with stage_errors(run, name): check_installed(run.recipe.stages[name])


def weight_problems(run: Run, stages: Iterable[str]) -> Iterator[str]:
    "Yield why a stage cannot start from its weights, and what to do; print warnings of the others"
    from aptos_fastai.training.weights import check_weights
    for name in stages:
        try:
            with stage_errors(run, name):
                check_weights_folder(run, run.recipe.stages[name])
                check_weights(run.recipe.stages[name])
        except ConfigError as e: yield str(e)


@contextmanager
def stage_errors(run: Run, stage: str) -> Iterator[None]:
    "Say in an error which recipe and stage it is about"
    try: yield
    except AptosError as e: raise ConfigError(f'{run.recipe.path} [stage.{stage}] {e}') from None


def check_training(run: Run, stages: Iterable[str]) -> None:
    "Raise `ConfigError` if the network of a stage cannot be built, run, started from its parent's or trained"
    from aptos_fastai.pipeline.network_check import check_init, check_network
    from aptos_fastai.training.model import check_optimization
    from aptos_fastai.training.precision import candidate_precisions
    for name in stages:
        stage = run.recipe.stages[name]
        with stage_errors(run, name):
            check_network(stage)
            if stage.init: check_init(stage, run.recipe.stages[stage.init])
            check_optimization(stage)
            candidate_precisions(stage)


def check_members(run: Run, ensemble: str) -> None:
    "Raise `ConfigError` if the members of an ensemble are not validated by the same images"
    first, *others = run.recipe.members(ensemble)
    for k in run.folds_of(ensemble):
        images = validated_by(run, first, k)
        for m in others:
            different = sorted(images ^ validated_by(run, m, k))
            if not different: continue
            names = first_few([f'{id_code} of {table}' for table, id_code in different])
            raise ConfigError(f'{run.recipe.path}: {ensemble} averages {first} and {m}, but only one of them is '
                              f'validated by {len(different)} images of fold {k}: {names}. The other one leaves them '
                              'out, as copies or patients of images that validate stages that build on it. Let the '
                              'same stages build on both, or average other stages.')


def validated_by(run: Run, stage: str, fold: int) -> set[tuple[str, str]]:
    "Return table and id of the images that validate a fold of a stage"
    images = run.validation_images(stage, fold)
    return set(zip(images.source, images.id_code, strict=True))


def check_pseudo_labelled(run: Run, stage: Stage) -> None:
    "Raise `ConfigError` if no image of a pseudo-labelled table can train a fold: each is a copy of a validation image"
    for teacher, table in stage.sources:
        for k in range(stage.folds) if teacher else ():
            images = run.frames[table]
            if run.training_part(stage, table, k).any() or 'duplicate_group' not in images: continue
            graded = pd.concat([run.frames[name] for name in stage.validated_tables])
            copies = images.merge(graded[graded.fold == k], on='duplicate_group', suffixes=('', '_graded'))
            pairs = first_few([f'{a} = {b}' for a, b in zip(copies.id_code, copies.id_code_graded, strict=True)])
            what = f'copies of validation images ({pairs})' if pairs else 'of patients of validation images'
            raise ConfigError(f'{run.recipe.path} [stage.{stage.name}] train = {teacher}:{table}: all {len(images)} '
                              f'images are {what}, so none is left to train fold {k}. Remove it from `train`.')


def check_batch(run: Run, stage: Stage) -> None:
    "Raise `ConfigError` if a stage's batches cannot be shared by the processes or are larger than its training part"
    section = f'{run.recipe.path} [stage.{stage.name}]'
    n = world_size()
    if stage.bs % n:
        shared = max(1, stage.bs // n) * n
        raise ConfigError(f'{section} bs = {stage.bs}: {n} processes cannot share it evenly. Set it to {shared}.')
    for k in range(stage.folds):
        images = sum(int(run.training_part(stage, table, k).sum()) for _, table in stage.sources)
        few = f'fold {k} has only {images} training images'
        if stage.bs > images: raise ConfigError(f'{section} bs = {stage.bs}: {few}. Set it to {images} or less.')
        if stage.bs * stage.accumulate > images:
            raise ConfigError(f'{section} accumulate = {stage.accumulate}: {few}. '
                              f'With bs = {stage.bs} set it to {images // stage.bs} or less.')


def check_balance(run: Run, stage: Stage) -> None:
    "Raise `ConfigError` if the column that balances a stage's training images is empty for some, or has one value"
    if not stage.balance: return
    key = f'{run.recipe.path} [stage.{stage.name}] balance = {stage.balance}'
    images = pd.concat([run.frames[table] for _, table in stage.sources], ignore_index=True)
    empty = images.id_code[images[stage.balance] == '']
    if len(empty):
        raise ConfigError(f'{key}: the column is empty for {len(empty)} of {len(images)} images ({first_few(empty)}). '
                          'Fill it, or remove the key.')
    if images[stage.balance].nunique() < 2:
        raise ConfigError(f'{key}: all images have the value {images[stage.balance].iloc[0]}, so there is nothing to '
                          'balance. Remove the key.')


def check_installed(stage: Stage) -> None:
    "Raise `AptosError` if a stage needs a package or compiler that is not installed"
    if world_size() > 1 and find_spec('accelerate') is None:
        raise AptosError(f'{world_size()} processes need the package accelerate. Run pip install accelerate.')
    if any(find_spec(package) is None for package in tracker_packages(stage.track)):
        raise AptosError(f'track = {stage.track}: not installed. Run pip install {stage.track}, or set track = no.')
    if stage.track == 'mlflow' and os.environ.get(MLFLOW_SERVER): check_mlflow(os.environ[MLFLOW_SERVER])
    if stage.compile == 'yes' and not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cl'))):
        raise AptosError('compile = yes: needs a C++ compiler. Install g++ or clang++, or set compile = no.')


@cache
def check_mlflow(uri: str) -> None:
    "Raise `AptosError` if the server or database `uri` of MLflow cannot be used; once it can, it is not asked again"
    from aptos_fastai.training.callbacks import mlflow_client, mlflow_reason
    try: mlflow_client(uri).search_experiments(max_results=1)
    except Exception as e:                   # of MLflow, a database or a package that the database needs
        raise AptosError(f'track = mlflow: cannot use the server or database of {MLFLOW_SERVER} ({mlflow_reason(e)}). '
                         f'Start it, correct {MLFLOW_SERVER}, or set track = no.') from None


def tracker_packages(track: str) -> list[str]:
    "Return the packages that a tracker needs; MLflow in the run folder is a database"
    if track == 'no': return []
    return [track, 'sqlalchemy', 'alembic'] if track == 'mlflow' and not os.environ.get(MLFLOW_SERVER) else [track]


# Train, label, score, submit

def train_nodes(run: Run, nodes: Iterable[str], bars: Bars, deadline: 'Deadline | None' = None) -> int:
    """Train the unfinished stages among `nodes`, parents first, and write labels they need.

    Finished ones whose names, views or other keys changed are brought up to date without a training. With a `deadline`,
    which allows each fold before it starts, stages may stay unfinished. Returns how many folds were trained or brought
    up to date.
    """
    nodes = set(nodes)
    todo = run.todo(nodes)
    if deadline: todo = deadline.in_order(run, todo)
    outdated = run.to_refresh(todo, nodes)
    refresh_folds(run, outdated, bars)       # first: pseudo-labels depend on validation scores
    if not todo: return sum(map(len, outdated.values()))
    check_run(run, todo)
    for name, folds in todo.items():
        for k in folds: check_lineage(run, name, k)
    from aptos_fastai.pipeline.stage import train_fold
    for line in training_reasons(run, todo):
        if not line.endswith(NEVER): say(f'to train: {line}')
    trained = 0
    with bars('stages', len(todo)) as overall:
        for i, (name, folds) in enumerate(todo.items(), 1):
            if deadline and not deadline.allows(run, name): continue
            stage = run.recipe.stages[name]
            details = f'{stage.arch}, {stage.size} px, {epochs_text(stage)}, {tables_text(stage)}'
            say(f'stage {i} of {len(todo)}: {name}  ({details}) -> {run.root / name}', 'bold')
            report_weights(run, stage)
            for teacher, table in stage.sources:
                if teacher: write_missing_labels(run, teacher, table, bars)
            for k in folds:
                if deadline and not deadline.allows(run, name): break
                with deadline.timed(run, name, k) if deadline else nullcontext(): train_fold(run, name, k, bars)
                trained += 1
            overall.to(i)
    return trained + sum(map(len, outdated.values()))


def write_missing_labels(run: Run, node: str, table: str, bars: Bars) -> Path:
    "Write the pseudo-labels of a table by a trained stage or ensemble, unless they are up to date; return their folder"
    from aptos_fastai.pipeline.pseudo_labels import FILES, labels_up_to_date, write_labels
    folder = run.label_dir(node, table)
    if not labels_up_to_date(run, node, table):
        write_labels(run, node, table, bars)
        say(f'  pseudo-labels of {table} by {node} -> {folder / FILES["soft"]}, {FILES["hard"]}')
    return folder


def submitted_nodes(recipe: Recipe) -> list[str]:
    "Return the stages and ensembles that [submit] names, each once"
    return list(dict.fromkeys([*recipe.submit.also, recipe.submit.final]))


def score_test_table(run: Run, bars: Bars) -> pd.DataFrame:
    """Score the submission's table with each submitted stage and ensemble; write and return scores.csv.

    Columns: id_code; a score for each stage and ensemble; then of the final one score, grade, grade_low and grade_high
    (the prediction set at [submit] coverage), score_sd (standard deviation over views, folds and members), why the gate
    finds the image ungradable, and the columns of `DecisionSpec.decide`. With [submit] eyes = fused also `fused`,
    yes where these are of both eyes' scores; the column of the final one and score_sd are of the image alone.
    """
    from aptos_fastai.pipeline.run_gate import ungradable_test
    from aptos_fastai.pipeline.scores import fold_scores, node_scores
    submit = run.recipe.submit
    found = {n: node_scores(run, n, submit.table, bars) for n in submitted_nodes(run.recipe)}
    final = found[submit.final]
    df = pd.DataFrame(dict(id_code=final.id_code, **{n: o.score for n, o in found.items()}, score=final.score))
    oof = run.oof(submit.final)
    sets = PredictionSets(submit.coverage).fit(oof.score, oof.diagnosis, oof.fold)
    thresholds = run.thresholds(submit.final, submit.thresholds)
    members = run.member_weights(submit.final)
    by_fold = [fold_scores(run, members, submit.table, k, bars).score for k in run.folds_of(submit.final)]
    df['grade'], df['grade_low'], df['grade_high'] = grade_scores(
        final.score, thresholds, sets, np.stack(by_fold, axis=1))
    df['score_sd'] = final.score_sd
    df['ungradable'] = ungradable_test(run, final.score, bars)
    decision, _ = node_decision(run, submit.final, oof.assign(group=run.groups(oof)))
    df = with_fused(run, df.assign(**decision.decide(df.score, df.grade, df.grade_high)))
    df = in_submission_order(run, df)
    df = without_ungradable(df, df.ungradable != '')
    write_csv(run.root / 'scores.csv', df)
    return df


def with_fused(run: Run, scores: pd.DataFrame) -> pd.DataFrame:
    "Return `scores` with the column fused and by both eyes the images that have a fellow; unchanged without fusion"
    submit = run.recipe.submit
    if submit.eyes != 'fused': return scores
    spec, _ = fit_run_eyes(run, graded_alone(run, submit.final))
    assert spec
    people = people_of(run, run.frames[submit.table])
    new = spec.fused_rows(scores.score, people, scores.ungradable == '')
    say(f'{submit.table}: {fused_text(scores.index.isin(new.index))}')
    scores = scores.assign(fused=np.where(scores.index.isin(new.index), 'yes', 'no'))
    for name in new.columns.intersection(scores.columns): scores.loc[new.index, name] = new[name]
    return scores


def in_submission_order(run: Run, scores: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each id of the submission, in its order.

    An image without a score gets the most frequent grade and the prediction set 0-4.
    """
    table = run.recipe.submit.table
    ids = read_order(run.recipe.tables[table], run.data)
    lost = len(ids) - len(scores)
    if lost:
        say(f'{table}: {plural(lost, "image")} without a score (skip_unreadable = yes): the most frequent grade and '
            'the prediction set 0-4', 'yellow')
    rows = scores.set_index('id_code').reindex(ids).reset_index()
    rows = rows.fillna(dict(grade=scores.grade.mode()[0], grade_low=0, grade_high=GRADES - 1, ungradable=UNREADABLE,
                            fused='no'))
    return rows.astype(dict(grade=int, grade_low=int, grade_high=int))


def write_submissions(run: Run, scores: pd.DataFrame) -> None:
    "Write submissions/NAME.csv (id_code, diagnosis) for each submitted stage and ensemble, and submission.csv"
    submit = run.recipe.submit
    ungradable = scores.id_code[scores.ungradable != '']
    if len(ungradable):
        say(f'{submit.table}: {len(ungradable)} of {len(scores)} images are ungradable ({", ".join(ungradable[:5])}); '
            'the submission grades them all the same, because it needs a grade for every id. '
            'Reasons: column ungradable of scores.csv.', 'yellow')
    for n in submitted_nodes(run.recipe):
        grades = pd.Series(apply_thresholds(scores[n], run.thresholds(n, submit.thresholds))).where(scores[n].notna())
        if n == submit.final: grades = scores.grade        # by both eyes, where they are fused
        diagnosis = grades.fillna(grades.mode()[0]).astype(int)
        rows = pd.DataFrame(dict(id_code=scores.id_code, diagnosis=diagnosis))
        write_csv(run.root / 'submissions' / f'{n}.csv', rows)
        if n == submit.final: write_csv(run.root / 'submission.csv', rows)
    remove_old_submissions(run)


def remove_old_submissions(run: Run) -> None:
    "Remove the files in submissions/ that are of no submitted stage or ensemble, which is printed"
    submitted = submitted_nodes(run.recipe)
    old = [file for file in sorted((run.root / 'submissions').glob('*.csv')) if file.stem not in submitted]
    for file in old: file.unlink()
    if old: say(f'submissions: removed {first_few([o.name for o in old])}, of an earlier run, no longer submitted')


# What is up to date

def output_files(run: Run) -> tuple[str, ...]:
    "Return the files whose SHA-256 are in summary.json; without a test table there is only oof.csv"
    return OUTPUTS if run.recipe.submit.table else ('oof.csv',)


def outputs_up_to_date(run: Run) -> bool:
    "Return whether every stage is finished and the outputs belong to the present weights and settings"
    summary = read_record(run.root / 'summary.json')
    todo = run.todo()
    if todo or run.to_refresh(todo) or not summary: return False
    if summary.get('inputs_digest') != inputs_digest(run): return False
    if not (run.root / 'report.html').is_file(): return False
    outputs = {run.root / name: sha256 for name, sha256 in summary['outputs'].items()}
    return all(file.is_file() and file_hash(file) == sha256 for file, sha256 in outputs.items())


def inputs_digest(run: Run) -> str:
    "Return the SHA-256 of what the outputs depend on: the test images, the recipe, the files of every fold"
    r = run.recipe
    records = [[run.record(name, k) for k in range(s.folds)] for name, s in r.stages.items()]
    files = [[o and o['files'] for o in folds] for folds in records]
    recipe = repr([r.submit, r.ensembles, r.stages, r.tables, r.gate, r.refer, r.owner, r.contact])
    return digest([SUMMARY_FORMAT, run.table_hashes.get(r.submit.table, ''), recipe, files, eyes_digest(run)])
