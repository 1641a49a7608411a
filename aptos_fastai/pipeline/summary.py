"What came out: out-of-fold scores and grades, the summary of the stages, and two runs side by side."
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, say, table
from aptos_fastai.common.io import AptosError, read_record
from aptos_fastai.metrics import (
    MIDPOINTS,
    PredictionSets,
    apply_thresholds,
    kappa_interval,
    nested_grades,
    paired_interval,
    quadratic_kappa,
)
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.run_folder import WEIGHTS, Run

SYNTHETIC = 'SYNTHETIC: painted images, no medical data; nothing here says anything about eyes'
SUMMARY_FORMAT = 3                           # of summary.json; a run with an older one answers anew
KEYS = ['source', 'id_code', 'diagnosis', 'fold']


def thresholds_of(run: Run, node: str) -> str:
    "How a node's grades are made: as it is submitted, else as it labels"
    sub = run.recipe.submit
    return sub.thresholds if node in (sub.final, *sub.also) else run.label_thresholds(node)


def honest_grades(run: Run, oof: pd.DataFrame, how: str) -> np.ndarray:
    "Grades of out-of-fold scores by fixed thresholds, or by thresholds that saw neither the image nor its fold"
    fixed = parse_thresholds(how)
    return apply_thresholds(oof.score, fixed) if fixed else nested_grades(oof.score, oof.diagnosis, run.parts(oof), how)


def oof_table(run: Run) -> pd.DataFrame:
    "A row for each validated image: source, id_code, diagnosis, fold, and for each stage and ensemble its score and `<name>_grade`"
    out = None
    for n in run.recipe.order:
        o = run.oof(n)
        o = o.assign(**{n: o.score, f'{n}_grade': honest_grades(run, o, thresholds_of(run, n))}).drop(columns='score')
        out = o if out is None else out.merge(o, on=KEYS, how='outer')
    return out


def validated(oof: pd.DataFrame, node: str) -> pd.DataFrame:
    "The rows of `oof_table` that `node` has validated: source, id_code, diagnosis, fold, score, grade"
    o = oof[oof[node].notna()]
    return o[KEYS].assign(diagnosis=o.diagnosis.astype(int), score=o[node], grade=o[f'{node}_grade'].astype(int)).reset_index(drop=True)


def summarise(run: Run, oof: pd.DataFrame) -> dict:
    "What came out, stage by stage. Kappa is of validation images only, by thresholds fitted on other images than those they grade"
    rows = []
    for n in run.recipe.order:
        o, s = validated(oof, n), run.recipe.stages.get(n)
        recs = [run.record(m, k) for m in run.recipe.members(n) for k in run.folds_of(n)]
        rows.append(dict(
            stage=n, tables=list(s.train) if s else list(run.recipe.members(n)), arch=s.arch if s else 'ensemble', size=s.size if s else None,
            folds=len(run.folds_of(n)), images=recs[0]['images'] if s else dict(train=0, valid=len(o)), validated=len(o),
            epochs=s.freeze_epochs + s.epochs if s else None, kept_epochs=[q['kept_epoch'] + 1 for q in recs] if s else None,
            best_kappa=float(np.mean([q['kept_kappa'] for q in recs])) if s else None, kappa=quadratic_kappa(o.grade, o.diagnosis),
            kappa_interval=kappa_interval(o.grade, o.diagnosis), kappa_midpoints=quadratic_kappa(apply_thresholds(o.score, MIDPOINTS), o.diagnosis),
            thresholds=run.thresholds(n, thresholds_of(run, n)).tolist(), threshold_method=thresholds_of(run, n), seconds=sum(q['seconds'] for q in recs) if s else 0))
    sub = run.recipe.submit
    last = validated(oof, sub.final)
    radius = PredictionSets(sub.coverage).fit(last.score, last.diagnosis).radius_
    return dict(recipe=run.recipe.name, synthetic=bool(run.recipe.demo), note=SYNTHETIC if run.recipe.demo else '', stages=rows,
                submission=dict(
                    file='submission.csv', node=sub.final, members=run.recipe.members(sub.final), coverage=sub.coverage,
                    weights={f'{m}/fold{k}': run.record(m, k)['files'][WEIGHTS]['sha256'] for m in run.recipe.members(sub.final) for k in run.folds_of(m)},
                    radius=[float(r) if np.isfinite(r) else None for r in radius],
                    thresholds=run.thresholds(sub.final, sub.thresholds).tolist(), images=len(run.frames[sub.table])))


def tables_text(stage: Stage) -> str:
    "What a stage trains on, for people"
    return ', '.join(f'{name} by {teacher}' if teacher else name for teacher, name in stage.sources)


def interval_text(value: float, interval) -> str:
    "0.833, (.80, .86) -> '.833 [.80 .86]'"
    return '{:.3f} [{:.2f} {:.2f}]'.format(value, *interval).replace('0.', '.')


def show_summary(run: Run, o: dict):
    "The summary on the terminal"
    columns, rows = ['stage', 'tables', 'images', 'px', 'epochs', 'kappa [95 %]', 'time'], []
    for s in o['stages']:
        stage, kappa = run.recipe.stages.get(s['stage']), interval_text(s['kappa'], s['kappa_interval'])
        if stage is None: rows.append([s['stage'], f'mean of {len(s["tables"])}', s['validated'], '', '', kappa, '']); continue
        rows.append([s['stage'], tables_text(stage), f'{s["images"]["train"]}+{s["images"]["valid"]}', s['size'],
                     (f'{s["folds"]}x' if s['folds'] > 1 else '') + str(s['epochs']), kappa, format_duration(s['seconds'])])
    table(run.recipe.name + (' (SYNTHETIC demo)' if run.recipe.demo else ''), columns, rows,
          right=('images', 'px', 'epochs'), wrap=('tables',))
    say('images: training + validation (one fold). kappa: all validation images, each\ngraded by thresholds fitted on others, or by fixed ones; bootstrap '
        'interval. With keep =\nkappa or loss the epoch was chosen on these images.', 'dim')
    say(f'{o["submission"]["node"]} -> {run.root / "submission.csv"} ({o["submission"]["images"]} images);\n'
        'also report.html, submissions/, scores.csv, oof.csv, summary.json')
    if run.recipe.demo: say(SYNTHETIC, 'yellow')


def _finished_run(folder: str) -> tuple[dict, pd.DataFrame]:
    "summary.json and oof.csv of a run folder"
    root = Path(folder)
    summary, oof = read_record(root / 'summary.json'), root / 'oof.csv'
    if not summary or not oof.is_file():
        raise AptosError(f'{root}: is no finished run (it holds no summary.json and oof.csv); name <runs>/<recipe>, or run `all`')
    return summary, pd.read_csv(oof, dtype=dict(id_code=str))


def compare_runs(first: str, second: str):
    "`compare RUN RUN`: their common stages and their final answers on the images that both validated, by a paired bootstrap"
    (a, oa), (b, ob) = _finished_run(first), _finished_run(second)
    names = [s['stage'] for s in a['stages'] if s['stage'] in {t['stage'] for t in b['stages']}]
    pairs = [(n, n) for n in names] + [(a['submission']['node'], b['submission']['node'])]
    rows = []
    for n, m in pairs:
        both = validated(oa, n).merge(validated(ob, m), on=['source', 'id_code'], suffixes=('', '_b'))
        if not len(both): continue
        other = (both.diagnosis != both.diagnosis_b).sum()
        if other: raise AptosError(f'{second}: {other} images have other grades than in {first}; only runs on the same tables compare')
        d, lo, hi = paired_interval(both.grade, both.grade_b, both.diagnosis)
        times = [next(s['seconds'] for s in o['stages'] if s['stage'] == k) for o, k in ((a, n), (b, m))]
        rows.append([n, len(both), *(f'{quadratic_kappa(g, both.diagnosis):.3f}' for g in (both.grade, both.grade_b)),
                     f'{d:+.3f} [{lo:+.3f} {hi:+.3f}]'.replace('0.', '.'), ' / '.join(map(format_duration, times)), f'{(both.fold == both.fold_b).mean():.0%}'])
    if not rows: raise AptosError(f'{first} and {second}: have validated no image in common; only runs on the same tables compare')
    rows[-1][0] = 'the answer'
    table('kappa of each run on the images that both validated', ['stage', 'n', 'first', 'second', 'difference [95 %]', 'time', 'folds'], rows,
          right=('n', 'first', 'second', 'folds'), wrap=('time',))
    say(f'first: {first}, its answer {pairs[-1][0]}; second: {second}, its answer {pairs[-1][1]}')
    say('Paired bootstrap over images; a difference whose interval holds 0 may be chance. folds: images that were validated in the same one.', 'dim')
    if a['synthetic'] or b['synthetic']: say(SYNTHETIC, 'yellow')
