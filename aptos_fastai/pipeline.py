"Walks the graph: tables -> pictures -> stages -> labels -> submission; skips what is finished."
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from aptos_fastai.config import ConfigError, Recipe, Stage, read_recipe
from aptos_fastai.console import Bars, ago, say, table
from aptos_fastai.files import AptosError, alone, file_hash, read_record, sweep, write_bytes, write_csv, write_record
from aptos_fastai.images import prepare_table, prepared_already, read_prepared, store_folder
from aptos_fastai.metrics import GRADES, GradeSets, apply_cuts
from aptos_fastai.ranks import size
from aptos_fastai.record import Run
from aptos_fastai.summary import SUMMARY_FORMAT, SYNTHETIC, oof_table, show_summary, summarise, tables_text
from aptos_fastai.tables import add_folds, read_order, read_tables, write_folds
from aptos_fastai.twins import add_groups, settle_conflicts, twins_frame


def open_run(recipe: str = 'settings.ini', data: str = 'demo', runs: str = 'runs', sets: Iterable[str] = (), node: str = '') -> Run:
    """The run of a recipe on a data folder, its tables read and checked. Writes nothing but the demo's pictures; `begin` does.

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
    from aptos_fastai.demo import write_demo
    folder = runs / f'demo-{r.demo.pretrain}-{r.demo.train}-{r.demo.test}-seed{r.seed}'
    try:
        with Bars() as bars, bars(f'painting the synthetic demo into {folder}', r.demo.pretrain + r.demo.train + r.demo.test, 'pictures') as bar:
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
    "The run with the pixel hashes of pictures that are prepared already, so that what is finished can be told without decoding"
    skip = run.recipe.images.skip_bad == 'yes'
    return replace(run, frames={n: prepared_already(f, run.store, run.prep, skip_bad=skip) for n, f in run.frames.items()})


def with_folds(run: Run) -> Run:
    "The run with a fold for each picture; where every picture is prepared, those that stand in the tables twice are known and share one"
    known = all('look' in f for f in run.frames.values())
    frames = settle_conflicts(add_groups(run.frames), run.recipe.conflicts) if known else run.frames
    return replace(run, frames=add_folds(run.recipe, frames, run.root / 'folds.csv'))


@contextmanager
def begin(run: Run, nodes: Iterable[str] = ()) -> Iterator[tuple[Run, Bars]]:
    """The run, its folds written and every picture prepared, once the stages in `nodes` are known to be able to start; and the bars.
    Until the block ends no other run may work in its folder. Raises `AptosError`"""
    check_run(run, [n for n in run.recipe.order if n in set(nodes) & set(run.recipe.stages) and not run.record(n, run.recipe.stages[n].folds - 1)])
    with alone(run.root), Bars() as bars:
        sweep(run.root, 0)
        skip = run.recipe.images.skip_bad == 'yes'
        frames = {n: prepare_table(f, run.store, run.prep, bars, skip_bad=skip) for n, f in read_tables(run.recipe, run.data).items()}
        run = with_folds(replace(run, frames=frames))
        write_folds(run.recipe, run.frames, run.root / 'folds.csv')
        say_twins(run)
        say_folds(run)
        if run.recipe.demo: write_bytes(run.root / 'SYNTHETIC.txt', f'{SYNTHETIC}.\n'.encode())
        write_record(run.root / 'run.json', dict(data=_from_root(run.root, run.data), recipe=run.recipe.path.name, synthetic=bool(run.recipe.demo)))
        yield run, bars


def _from_root(root: Path, data: Path) -> str:
    "Where the data is, seen from the run folder: the same when both are moved together"
    try: return Path(os.path.relpath(data.resolve(), root.resolve())).as_posix()
    except ValueError: return data.resolve().as_posix()      # another drive


def say_twins(run: Run):
    "Pictures that stand in the tables more than once, as twins.csv and in a line"
    t = twins_frame(run.frames)
    if len(t): write_csv(run.root / 'twins.csv', t)
    else: (run.root / 'twins.csv').unlink(missing_ok=True)
    if not len(t): return
    odd = t.twin[t.conflict].nunique()
    say(f'pictures that stand in the tables more than once: {t.twin.nunique()}' + (f', {odd} of them with unequal grades' if odd else '')
        + f'; all copies share a fold: {run.root / "twins.csv"}')


def say_folds(run: Run):
    "Validation parts that are trained on and lack a grade: their kappa tells nothing of it"
    ks = range(max(s.folds for s in run.recipe.stages.values()))
    for n, f in run.frames.items():
        if not run.recipe.tables[n].graded: continue
        seen = set(f.diagnosis.astype(int))
        lacks = [f'fold {k} of grade {", ".join(map(str, sorted(seen - set(f.diagnosis[f.fold == k].astype(int)))))}'
                 for k in ks if seen - set(f.diagnosis[f.fold == k].astype(int))]
        if lacks: say(f'{n}: no picture in {"; ".join(lacks)}: too few of them for [recipe] splits = {run.recipe.splits}', 'yellow')


def check_run(run: Run, stages: Collection[str]):
    "What would stop a stage later is said now: weights out of reach, a batch larger than its table"
    if not stages: return
    from aptos_fastai.model import check_weights
    from aptos_fastai.precision import precisions
    for n in stages:
        s = run.recipe.stages[n]
        if s.bs % size():
            raise ConfigError(f'{run.recipe.path} [stage.{n}] bs = {s.bs}: {size()} processes cannot share it evenly; '
                              f'set it to {max(1, s.bs // size()) * size()}')
        for k in range(s.folds):
            m = sum(int((run.frames[t].fold != k).sum()) for _, t in s.sources)
            if s.bs > m: raise ConfigError(f'{run.recipe.path} [stage.{n}] bs = {s.bs}: only {m} pictures train in fold {k}; set it to {m} or less')
            if s.bs * s.accumulate > m:
                raise ConfigError(f'{run.recipe.path} [stage.{n}] accumulate = {s.accumulate}: only {m} pictures train in fold {k}; '
                                  f'with bs = {s.bs} set it to {m // s.bs} or less')
        try: check_weights(s), precisions(s), check_extras(s)
        except AptosError as e: raise ConfigError(f'{run.recipe.path} [stage.{n}] {e}') from None


def check_extras(s: Stage):
    "Raises `AptosError` for what a stage asks for and is not installed here"
    if size() > 1 and find_spec('accelerate') is None: raise AptosError(f'in {size()} processes: needs the extra parallel: pip install accelerate')
    if s.track != 'no' and find_spec(s.track) is None: raise AptosError(f'track = {s.track}: pip install {s.track}, or set track = no')
    if s.compile == 'yes' and not any(map(shutil.which, ('c++', 'g++', 'clang++', 'cl'))):
        raise AptosError('compile = yes: needs a C++ compiler (g++ or clang++); install one, or set compile = no')


def train_nodes(run: Run, nodes: Iterable[str], bars: Bars) -> int:
    "Trains what is not finished of the stages in `nodes`, parents first, with the labels they need; returns how many folds were trained"
    todo = run.todo(set(nodes))
    if not todo: return 0
    check_run(run, todo)
    from aptos_fastai.stage import train_fold
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
    from aptos_fastai.pseudo import FILES, labels_finished, write_labels
    out = run.label_dir(node, name)
    if not labels_finished(run, node, name):
        write_labels(run, node, name, bars)
        say(f'  labels of {name} by {node} -> {out / FILES["soft"]}, {FILES["hard"]}')
    return out


def predict(run: Run, bars: Bars) -> pd.DataFrame:
    """scores.csv: id_code, a column of scores for each submitted stage and ensemble, mean (of the final one's folds and members), its grade,
    grade_low and grade_high (the run of grades that holds the true one at the stated coverage), spread (standard deviation over views, folds and members)"""
    from aptos_fastai.predict import node_scores
    sub = run.recipe.submit
    found = {n: node_scores(run, n, sub.table, bars) for n in dict.fromkeys([*sub.also, sub.final])}
    last = found[sub.final]
    df = pd.DataFrame(dict(id_code=last.id_code, **{n: o.score for n, o in found.items()}, mean=last.score))
    df['grade'] = apply_cuts(last.score, run.cuts(sub.final, sub.cuts))
    o = run.oof(sub.final)
    df['grade_low'], df['grade_high'] = GradeSets(sub.coverage).fit(o.score, o.diagnosis).predict(last.score, df.grade)
    df['spread'] = last.spread
    order = read_order(run.recipe.tables[sub.table], run.data)
    lost = len(order) - len(df)
    if lost: say(f'{lost} pictures of {sub.table} have no score (skip_bad = yes): they are answered with the commonest grade, of the set 0-4', 'yellow')
    df = df.set_index('id_code').reindex(order).reset_index().fillna(dict(grade=df.grade.mode()[0], grade_low=0, grade_high=GRADES - 1))
    df = df.astype(dict(grade=int, grade_low=int, grade_high=int))
    write_csv(run.root / 'scores.csv', df)
    return df


def submit(run: Run, scores: pd.DataFrame):
    "submissions/<name>.csv for each submitted stage and ensemble, and the final one's as submission.csv: id_code, diagnosis"
    sub = run.recipe.submit
    for n in dict.fromkeys([*sub.also, sub.final]):
        grades = pd.Series(apply_cuts(scores[n], run.cuts(n, sub.cuts))).where(scores[n].notna())
        df = pd.DataFrame(dict(id_code=scores.id_code, diagnosis=grades.fillna(grades.mode()[0]).astype(int)))
        write_csv(run.root / 'submissions' / f'{n}.csv', df)
    write_csv(run.root / 'submission.csv', df if n == sub.final else pd.read_csv(run.root / 'submissions' / f'{sub.final}.csv', dtype=dict(id_code=str)))


def answers_finished(run: Run) -> bool:
    "True where nothing is to train and the answers were made from the weights that stand"
    o = read_record(run.root / 'summary.json')
    return not run.todo() and bool(o) and o.get('made_from') == made_from(run) and (run.root / 'report.html').is_file() and all(
        (run.root / f).is_file() and file_hash(run.root / f) == h for f, h in o['answers'].items())


def made_from(run: Run) -> list:
    "What the answers depend on: the test pictures, the recipe, every fold's files"
    r = run.recipe
    return [SUMMARY_FORMAT, run.digests[r.submit.table], repr([r.submit, r.ensembles, r.stages]),
            [[run.record(n, k) and run.record(n, k)['files'] for k in range(s.folds)] for n, s in r.stages.items()]]


def run_all(run: Run):
    "Everything, in order: prepares, trains, labels, predicts, submits, sums up; says so and does nothing where all is done"
    t0 = time.monotonic()
    if run.recipe.demo: say(SYNTHETIC, 'yellow')
    if size() > 1: say(f'{size()} processes share every batch, the preparing and the scoring')
    with begin(run, run.recipe.stages) as (run, bars):
        if answers_finished(run):
            say(f'Everything is done already: nothing was run. The answer is {run.root / "submission.csv"}')
            return show_summary(run, read_record(run.root / 'summary.json'))
        train_nodes(run, run.recipe.stages, bars)
        oof = oof_table(run)                 # first: what is not what was written is told before an answer is
        scores = predict(run, bars)
        submit(run, scores)
        write_csv(run.root / 'oof.csv', oof)
        from aptos_fastai.report import write_report
        answers = {f: file_hash(run.root / f) for f in ('submission.csv', 'scores.csv', 'oof.csv')}
        o = dict(summarise(run, oof), seconds=round(time.monotonic() - t0, 1), made_from=made_from(run), answers=answers)
        write_report(run, o, oof, scores, bars)
        write_record(run.root / 'summary.json', o)
    show_summary(run, o)
    say(f'{ago(time.monotonic() - t0)} in all')


def prepare_all(run: Run):
    "`prepare`"
    with begin(run) as (done, _): pass
    rows = []
    for n, f in run.frames.items():
        rec = read_prepared(store_folder(f, run.store, run.prep))
        flags = rec['flags'].str.split().explode().value_counts()
        rows.append([n, len(rec), int((rec.error != '').sum()), ' '.join(f'{k} {v}' for k, v in rec.how.value_counts().items() if k),
                     ' '.join(f'{k} {v}' for k, v in flags.items()) or 'none'])
    table(f'pictures prepared at {run.prep.size} px',
          ['table', 'pictures', 'bad', 'retina found as', 'flags'], rows, right=('pictures', 'bad'), wrap=('flags',))
    for n, f in done.frames.items(): say(f'{n}: {Path(f.stored.iloc[0]).parent / "prepared.csv"}')


def _known(run: Run, name: str, among) -> str:
    if name not in among: raise AptosError(f'{name}: no such stage in {run.recipe.path}; there are {", ".join(among)}')
    return name


def train_stage(run: Run, stage: str):
    "`train STAGE`"
    needed = run.ancestors(_known(run, stage, run.recipe.stages))
    with begin(run, needed) as (run, bars): n = train_nodes(run, needed, bars)
    say(f'{stage} -> {run.root / stage}' if n else f'{stage} is finished already: {run.root / stage}')


def label_table(run: Run, node: str, name: str):
    "`label STAGE [TABLE]`"
    name = name or run.recipe.submit.table
    if name not in run.frames or run.recipe.tables[name].graded:
        raise AptosError(f'{name}: no ungraded table of {run.recipe.path}; there are {", ".join(t.name for t in run.recipe.used_tables if not t.graded)}')
    needed = run.ancestors(_known(run, node, run.recipe.nodes))
    with begin(run, needed) as (run, bars):
        train_nodes(run, needed, bars)
        say(f'labels of {name} by {node}: {label(run, node, name, bars)}')


@contextmanager
def _answering(run: Run) -> Iterator[tuple[Run, Bars]]:
    "`begin`, where every stage that answers is finished"
    needed = set().union(*(run.ancestors(m) for m in [run.recipe.submit.final, *run.recipe.submit.also])) & set(run.recipe.stages)

    def refuse(lost):
        why = 'not trained yet, or trained with other settings, grades or pictures'
        if lost: raise AptosError(f'{run.root}: {", ".join(lost)} {why}; run `all`, or `train {lost[-1]}`')
    refuse([n for n in run.recipe.order if n in needed and not run.record(n, 0)])
    with begin(run) as (run, bars):
        refuse([n for n in run.todo() if n in needed])
        yield run, bars


def write_scores(run: Run):
    "`predict`"
    with _answering(run) as (run, bars): df = predict(run, bars)
    say(f'{len(df)} pictures scored -> {run.root / "scores.csv"}')


def write_submissions(run: Run):
    "`submit`"
    with _answering(run) as (run, bars): submit(run, predict(run, bars))
    sub, o = run.recipe.submit, read_record(run.root / 'summary.json')
    cuts = run.cuts(sub.final, sub.cuts).tolist()
    def text(cuts): return ' '.join(f'{c:.3g}' for c in cuts)
    say(f'{sub.final}, by cuts {text(cuts)} -> {run.root / "submission.csv"}; each submitted stage and ensemble -> {run.root / "submissions"}')
    if o and o['submission']['cuts'] != cuts:
        say('report.html, predict, export and kaggle keep to the cuts of the last `all`: ' + text(o['submission']['cuts'])
            + '; to change them, too, set [submit] cuts in the recipe and run `all`', 'yellow')


def report_run(run: Run):
    "`report`: anew from what `all` has finished"
    with begin(run) as (run, bars):
        if not answers_finished(run): raise AptosError(f'{run.root}: is not finished, or its recipe has changed; run `all` first, it ends with the report')
        oof, scores = (pd.read_csv(run.root / f, dtype=dict(id_code=str)) for f in ('oof.csv', 'scores.csv'))
        from aptos_fastai.report import write_report
        write_report(run, read_record(run.root / 'summary.json'), oof, scores, bars)
    say(f'{run.recipe.name} -> {run.root / "report.html"}')


def suggest_rates(run: Run, stage: str):
    "`lr_find STAGE`"
    _known(run, stage, run.recipe.stages)
    check_run(run, [stage])
    plot = run.root / stage / 'lr_find.png'
    with begin(run) as (run, _):
        from aptos_fastai.stage import find_rates
        found = find_rates(run, stage, plot)
    table(f'learning rates for {stage}', ['suggestion', 'lr'], [[k, f'{v:.2g}'] for k, v in found.items()])
    say(f'curve -> {plot}; put the rate into [stage.{stage}] lr')


def suggest_batch(run: Run, stage: str):
    "`batch STAGE`"
    _known(run, stage, run.recipe.stages)
    from aptos_fastai.precision import fitting_batches
    rows = fitting_batches(run.recipe.stages[stage])
    if not rows: raise AptosError(f'[stage.{stage}] size = {run.recipe.stages[stage].size}: not two pictures fit this GPU; set size lower')
    table(f'training steps of {stage}', ['bs', 'pictures/s', 'GB'], [[n, f'{r:.0f}', f'{g:.1f}'] for n, r, g in rows], right=('bs', 'pictures/s', 'GB'))
    n, bs = rows[-1][0], run.recipe.stages[stage].bs
    say(f'{n} fits; [stage.{stage}] bs = {bs}' + (' does, too' if bs <= n else f' does not: bs = {n} and accumulate = {-(-bs // n)} take the same steps'))


def write_demo_folder(recipe: str, sets: Iterable[str], folder: str):
    "`demo [FOLDER]`"
    from aptos_fastai.demo import write_demo
    d: Recipe = read_recipe(recipe, demo=True, sets=list(sets))
    total = d.demo.pretrain + d.demo.train + d.demo.test
    try:
        with Bars() as bars, bars(f'painting into {folder}', total, 'pictures') as bar:
            write_demo(Path(folder), pretrain=d.demo.pretrain, train=d.demo.train, test=d.demo.test, seed=d.seed, progress=lambda n, _: bar.to(n))
    except FileExistsError as e: raise AptosError(f'{e}; give another folder') from None
    except OSError as e: raise AptosError(f'{folder}: cannot be written ({e.strerror})') from None
    say(f'{total} synthetic pictures -> {folder}')
