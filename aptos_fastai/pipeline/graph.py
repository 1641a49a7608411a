"Walks the graph: tables -> images -> stages -> labels -> submission; skips what is finished."
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.distributed import world_size
from aptos_fastai.common.io import (
    AptosError,
    file_hash,
    read_record,
    remove_stale_temp_files,
    run_lock,
    write_bytes,
    write_csv,
    write_record,
)
from aptos_fastai.data.duplicates import duplicates_table, group_duplicates, resolve_conflicts
from aptos_fastai.data.folds import add_folds, write_folds
from aptos_fastai.data.store import prepare_table, prepared_already
from aptos_fastai.data.tables import read_order, read_tables
from aptos_fastai.metrics import GRADES, PredictionSets, apply_thresholds
from aptos_fastai.pipeline.summary import SUMMARY_FORMAT, SYNTHETIC, tables_text
from aptos_fastai.recipe import ConfigError, Recipe, Stage, read_recipe
from aptos_fastai.run_folder import Run


def open_run(recipe: str = 'settings.ini', data: str = 'demo', runs: str = 'runs', sets: Iterable[str] = (), node: str = '') -> Run:
    """The run of a recipe on a data folder, its tables read and checked. Writes nothing but the demo's images; `start_run` does.

    Raises `AptosError`: whatever is wrong with recipe, tables or folders; first, where the recipe has no stage or ensemble `node`.
    """
    demo = data == 'demo'
    r, runs = read_recipe(recipe, demo=demo, sets=list(sets)), Path(runs)
    if node and node not in r.nodes: raise AptosError(f'{node}: no such stage in {r.path}; there are {", ".join(r.nodes)}')
    if runs.exists() and not runs.is_dir(): raise AptosError(f'{runs}: is a file; give a folder with --runs')
    data = write_demo_tables(r, runs) if demo else Path(data)
    frames = read_tables(r, data)
    root = runs / r.name
    check_same_data(root, data, demo)
    return with_folds(with_prepared(Run(r, data, root, frames)))


def write_demo_tables(r: Recipe, runs: Path) -> Path:
    "Paints the demo's tables, once"
    from aptos_fastai.data.demo import write_demo
    folder = runs / f'demo-{r.demo.pretrain}-{r.demo.train}-{r.demo.test}-seed{r.seed}'
    try:
        with Bars() as bars, bars(f'painting the synthetic demo into {folder}', r.demo.pretrain + r.demo.train + r.demo.test, 'images') as bar:
            return write_demo(folder, pretrain=r.demo.pretrain, train=r.demo.train, test=r.demo.test, seed=r.seed,
                              progress=lambda done, total: bar.to(done))
    except FileExistsError as e: raise AptosError(f'{e}; move it away or give another --runs folder') from None
    except OSError as e: raise AptosError(f'{folder}: cannot be written ({e.strerror}); give another --runs folder') from None


def check_same_data(root: Path, data: Path, demo: bool):
    "A run folder belongs to one data folder: a second would overwrite what the first trained"
    was = read_record(root / 'run.json')
    if was and not demo and was['data'] != _from_root(root, data):
        raise AptosError(f'{root}: holds a run on {(root / was["data"]).resolve()}, not on {data}; give another folder with --runs, '
                         f'or, if that data was only moved, delete {root / "run.json"}')


def with_prepared(run: Run) -> Run:
    "The run with the pixel hashes of images that are prepared already, so that what is finished can be told without decoding"
    skip = run.recipe.images.skip_unreadable == 'yes'
    return replace(run, frames={n: prepared_already(f, run.store, run.prep, skip_unreadable=skip) for n, f in run.frames.items()})


def with_folds(run: Run) -> Run:
    "The run with a fold for each image; where every image is prepared, those that stand in the tables twice are known and share one"
    known = all('perceptual_hash' in f for f in run.frames.values())
    frames = resolve_conflicts(group_duplicates(run.frames), run.recipe.conflicts) if known else run.frames
    return replace(run, frames=add_folds(run.recipe, frames, run.root / 'folds.csv'))


@contextmanager
def start_run(run: Run, nodes: Iterable[str] = ()) -> Iterator[tuple[Run, Bars]]:
    """The run, its folds written and every image prepared, once the stages in `nodes` are known to be able to start; and the bars.
    Until the block ends no other run may work in its folder. Raises `AptosError`"""
    check_run(run, [n for n in run.recipe.order if n in set(nodes) & set(run.recipe.stages) and not run.record(n, run.recipe.stages[n].folds - 1)])
    with run_lock(run.root), Bars() as bars:
        remove_stale_temp_files(run.root, 0)
        skip = run.recipe.images.skip_unreadable == 'yes'
        frames = {n: prepare_table(f, run.store, run.prep, bars, skip_unreadable=skip) for n, f in read_tables(run.recipe, run.data).items()}
        run = with_folds(replace(run, frames=frames))
        write_folds(run.recipe, run.frames, run.root / 'folds.csv')
        report_duplicates(run)
        warn_missing_grades(run)
        if run.recipe.demo: write_bytes(run.root / 'SYNTHETIC.txt', f'{SYNTHETIC}.\n'.encode())
        write_record(run.root / 'run.json', dict(data=_from_root(run.root, run.data), recipe=run.recipe.path.name, synthetic=bool(run.recipe.demo)))
        yield run, bars


def _from_root(root: Path, data: Path) -> str:
    "Where the data is, seen from the run folder: the same when both are moved together"
    try: return Path(os.path.relpath(data.resolve(), root.resolve())).as_posix()
    except ValueError: return data.resolve().as_posix()      # another drive


def report_duplicates(run: Run):
    "Images that stand in the tables more than once, as duplicates.csv and in a line"
    t = duplicates_table(run.frames)
    if len(t): write_csv(run.root / 'duplicates.csv', t)
    else: (run.root / 'duplicates.csv').unlink(missing_ok=True)
    if not len(t): return
    odd = t.duplicate[t.conflict].nunique()
    say(f'images that stand in the tables more than once: {t.duplicate.nunique()}' + (f', {odd} of them with unequal grades' if odd else '')
        + f'; all copies share a fold: {run.root / "duplicates.csv"}')


def warn_missing_grades(run: Run):
    "Validation parts that are trained on and lack a grade: their kappa tells nothing of it"
    ks = range(max(s.folds for s in run.recipe.stages.values()))
    for n, f in run.frames.items():
        if not run.recipe.tables[n].graded: continue
        seen = set(f.diagnosis.astype(int))
        lacks = [f'fold {k} of grade {", ".join(map(str, sorted(seen - set(f.diagnosis[f.fold == k].astype(int)))))}'
                 for k in ks if seen - set(f.diagnosis[f.fold == k].astype(int))]
        if lacks: say(f'{n}: no image in {"; ".join(lacks)}: too few of them for [recipe] splits = {run.recipe.splits}', 'yellow')


def check_run(run: Run, stages: Collection[str]):
    "What would stop a stage later is said now: weights out of reach, a batch larger than its table"
    if not stages: return
    from aptos_fastai.training.precision import precisions
    from aptos_fastai.training.weights import check_weights
    for n in stages:
        s = run.recipe.stages[n]
        if s.bs % world_size():
            raise ConfigError(f'{run.recipe.path} [stage.{n}] bs = {s.bs}: {world_size()} processes cannot share it evenly; '
                              f'set it to {max(1, s.bs // world_size()) * world_size()}')
        for k in range(s.folds):
            m = sum(int((run.frames[t].fold != k).sum()) for _, t in s.sources)
            if s.bs > m: raise ConfigError(f'{run.recipe.path} [stage.{n}] bs = {s.bs}: only {m} images train in fold {k}; set it to {m} or less')
            if s.bs * s.accumulate > m:
                raise ConfigError(f'{run.recipe.path} [stage.{n}] accumulate = {s.accumulate}: only {m} images train in fold {k}; '
                                  f'with bs = {s.bs} set it to {m // s.bs} or less')
        try: check_weights(s), precisions(s), check_extras(s)
        except AptosError as e: raise ConfigError(f'{run.recipe.path} [stage.{n}] {e}') from None


def check_extras(s: Stage):
    "Raises `AptosError` for what a stage asks for and is not installed here"
    if world_size() > 1 and find_spec('accelerate') is None: raise AptosError(f'in {world_size()} processes: needs the extra parallel: pip install accelerate')
    if s.track != 'no' and find_spec(s.track) is None: raise AptosError(f'track = {s.track}: pip install {s.track}, or set track = no')
    if s.compile == 'yes' and not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cl'))):
        raise AptosError('compile = yes: needs a C++ compiler (g++ or clang++); install one, or set compile = no')


def train_nodes(run: Run, nodes: Iterable[str], bars: Bars) -> int:
    "Trains what is not finished of the stages in `nodes`, parents first, with the labels they need; returns how many folds were trained"
    todo = run.todo(set(nodes))
    if not todo: return 0
    check_run(run, todo)
    from aptos_fastai.pipeline.stage import train_fold
    with bars('stages', len(todo)) as overall:
        for i, (n, ks) in enumerate(todo.items(), 1):
            s = run.recipe.stages[n]
            say(f'stage {i} of {len(todo)}: {n}  ({s.arch}, {s.size} px, {tables_text(s)}) -> {run.root / n}', 'bold')
            for teacher, t in s.sources:
                if teacher: label(run, teacher, t, bars)
            for k in ks: train_fold(run, n, k, bars)
            overall.to(i)
    return sum(map(len, todo.values()))


def label(run: Run, node: str, name: str, bars: Bars) -> Path:
    "Writes the pseudo-labels of a table by a trained stage or ensemble, unless they stand; returns their folder"
    from aptos_fastai.pipeline.pseudo_labels import FILES, labels_finished, write_labels
    out = run.label_dir(node, name)
    if not labels_finished(run, node, name):
        write_labels(run, node, name, bars)
        say(f'  labels of {name} by {node} -> {out / FILES["soft"]}, {FILES["hard"]}')
    return out


def predict(run: Run, bars: Bars) -> pd.DataFrame:
    """scores.csv: id_code, a column of scores for each submitted stage and ensemble, mean (of the final one's folds and members), its grade,
    grade_low and grade_high (the run of grades that holds the true one at the stated coverage), spread (standard deviation over views, folds and members)"""
    from aptos_fastai.pipeline.scores import node_scores
    sub = run.recipe.submit
    found = {n: node_scores(run, n, sub.table, bars) for n in dict.fromkeys([*sub.also, sub.final])}
    last = found[sub.final]
    df = pd.DataFrame(dict(id_code=last.id_code, **{n: o.score for n, o in found.items()}, mean=last.score))
    df['grade'] = apply_thresholds(last.score, run.thresholds(sub.final, sub.thresholds))
    o = run.oof(sub.final)
    df['grade_low'], df['grade_high'] = PredictionSets(sub.coverage).fit(o.score, o.diagnosis).predict(last.score, df.grade)
    df['score_sd'] = last.score_sd
    order = read_order(run.recipe.tables[sub.table], run.data)
    lost = len(order) - len(df)
    if lost: say(f'{lost} images of {sub.table} have no score (skip_unreadable = yes): they are answered with the commonest grade, of the set 0-4', 'yellow')
    df = df.set_index('id_code').reindex(order).reset_index().fillna(dict(grade=df.grade.mode()[0], grade_low=0, grade_high=GRADES - 1))
    df = df.astype(dict(grade=int, grade_low=int, grade_high=int))
    write_csv(run.root / 'scores.csv', df)
    return df


def submit(run: Run, scores: pd.DataFrame):
    "submissions/<name>.csv for each submitted stage and ensemble, and the final one's as submission.csv: id_code, diagnosis"
    sub = run.recipe.submit
    for n in dict.fromkeys([*sub.also, sub.final]):
        grades = pd.Series(apply_thresholds(scores[n], run.thresholds(n, sub.thresholds))).where(scores[n].notna())
        df = pd.DataFrame(dict(id_code=scores.id_code, diagnosis=grades.fillna(grades.mode()[0]).astype(int)))
        write_csv(run.root / 'submissions' / f'{n}.csv', df)
    write_csv(run.root / 'submission.csv', df if n == sub.final else pd.read_csv(run.root / 'submissions' / f'{sub.final}.csv', dtype=dict(id_code=str)))


def predictions_up_to_date(run: Run) -> bool:
    "True where nothing is to train and the answers were made from the weights that stand"
    o = read_record(run.root / 'summary.json')
    return not run.todo() and bool(o) and o.get('made_from') == made_from(run) and (run.root / 'report.html').is_file() and all(
        (run.root / f).is_file() and file_hash(run.root / f) == h for f, h in o['answers'].items())


def made_from(run: Run) -> list:
    "What the answers depend on: the test images, the recipe, every fold's files"
    r = run.recipe
    return [SUMMARY_FORMAT, run.digests[r.submit.table], repr([r.submit, r.ensembles, r.stages]),
            [[run.record(n, k) and run.record(n, k)['files'] for k in range(s.folds)] for n, s in r.stages.items()]]
