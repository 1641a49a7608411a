"Results of a run: out-of-fold grades, summary.json, the table on the terminal, and the comparison of two runs."
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, say, table
from aptos_fastai.common.io import AptosError, read_record
from aptos_fastai.metrics import (
    MIDPOINTS,
    PredictionSets,
    apply_thresholds,
    cross_fitted_grades,
    kappa_interval,
    paired_interval,
    quadratic_kappa,
)
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.run_folder import WEIGHTS, RecordError, Run

SYNTHETIC = 'SYNTHETIC DEMO: generated images, no patient data; results have no clinical meaning'
SUMMARY_FORMAT = 4                           # of summary.json and scores.csv; `all` replaces older ones
KEYS = ['source', 'id_code', 'diagnosis', 'fold']


# Out-of-fold scores and grades

def threshold_setting(run: Run, node: str) -> str:
    "Return the recipe's `thresholds` for a node's grades: of [submit] if it is submitted, else of its own section"
    submit = run.recipe.submit
    return submit.thresholds if node in (submit.final, *submit.also) else run.label_thresholds(node)


def out_of_fold_grades(run: Run, oof: pd.DataFrame, setting: str) -> np.ndarray:
    "Return grades of out-of-fold scores by fixed thresholds, or by thresholds fitted on the other folds"
    fixed = parse_thresholds(setting)
    if fixed: return apply_thresholds(oof.score, fixed)
    return cross_fitted_grades(oof.score, oof.diagnosis, run.parts(oof), setting)


def oof_table(run: Run) -> pd.DataFrame:
    """Return oof.csv, a row for each validation image.

    Columns: source, id_code, diagnosis, fold; NAME and NAME_grade, score and grade by each stage and ensemble.
    """
    total: pd.DataFrame | None = None
    for name in run.recipe.order:
        oof = run.oof(name)
        grades = out_of_fold_grades(run, oof, threshold_setting(run, name))
        oof = oof.assign(**{name: oof.score, f'{name}_grade': grades}).drop(columns='score')
        total = oof if total is None else total.merge(oof, on=KEYS, how='outer')
    assert total is not None
    return total


def validated(oof: pd.DataFrame, node: str) -> pd.DataFrame:
    "Return the rows of `oof_table` that `node` has validated: source, id_code, diagnosis, fold, score, grade"
    rows = oof[oof[node].notna()]
    grade = rows[f'{node}_grade'].astype(int)
    return rows[KEYS].assign(diagnosis=rows.diagnosis.astype(int), score=rows[node], grade=grade).reset_index(drop=True)


# summary.json

def finished_record(run: Run, stage: str, fold: int) -> dict:
    "Return the record of a finished fold. Raises `RecordError` if there is none"
    record = run.record(stage, fold)
    if not record: raise RecordError(f'{run.fold_dir(stage, fold)}: not finished. Run `train {stage}` first.')
    return record


def summarise(run: Run, oof: pd.DataFrame) -> dict:
    """Return the results of a finished run: a dict for each stage and ensemble, and the submission.

    Each kappa is of out-of-fold grades: by fixed thresholds, or by thresholds fitted on the other folds.
    """
    synthetic = bool(run.recipe.demo)
    stages = [(stage_result if name in run.recipe.stages else ensemble_result)(run, name, validated(oof, name))
              for name in run.recipe.order]
    return dict(recipe=run.recipe.name, synthetic=synthetic, note=SYNTHETIC if synthetic else '', stages=stages,
                submission=submission_result(run, validated(oof, run.recipe.submit.final)))


def stage_result(run: Run, name: str, valid: pd.DataFrame) -> dict:
    "Return the results of a stage on its validation images `valid`"
    stage = run.recipe.stages[name]
    records = [finished_record(run, name, k) for k in run.folds_of(name)]
    return dict(
        stage=name, tables=list(stage.train), arch=stage.arch, size=stage.size, folds=len(records),
        images=records[0]['images'], epochs=stage.freeze_epochs + stage.epochs,
        kept_epochs=[o['kept_epoch'] + 1 for o in records],
        best_kappa=float(np.mean([o['kept_kappa'] for o in records])),
        seconds=sum(o['seconds'] for o in records), **kappa_result(run, name, valid))


def ensemble_result(run: Run, name: str, valid: pd.DataFrame) -> dict:
    "Return the results of an ensemble on its validation images `valid`"
    return dict(
        stage=name, tables=list(run.recipe.members(name)), arch='ensemble', size=None, folds=len(run.folds_of(name)),
        images=dict(train=0, valid=len(valid)), epochs=None, kept_epochs=None, best_kappa=None, seconds=0,
        **kappa_result(run, name, valid))


def kappa_result(run: Run, name: str, valid: pd.DataFrame) -> dict:
    "Return kappa with its interval, kappa at the midpoints, and the thresholds fitted on all validation images"
    setting = threshold_setting(run, name)
    return dict(
        validated=len(valid), kappa=quadratic_kappa(valid.grade, valid.diagnosis),
        kappa_interval=kappa_interval(valid.grade, valid.diagnosis),
        kappa_midpoints=quadratic_kappa(apply_thresholds(valid.score, MIDPOINTS), valid.diagnosis),
        thresholds=run.thresholds(name, setting).tolist(), threshold_method=setting)


def submission_result(run: Run, valid: pd.DataFrame) -> dict:
    "Return what turns test images into the submission: members, weights, thresholds, radius of the prediction sets"
    submit = run.recipe.submit
    members = run.recipe.members(submit.final)
    weights = {f'{m}/fold{k}': finished_record(run, m, k)['files'][WEIGHTS]['sha256']
               for m in members for k in run.folds_of(m)}
    radius = PredictionSets(submit.coverage).fit(valid.score, valid.diagnosis).radius_
    return dict(file='submission.csv', node=submit.final, members=members, coverage=submit.coverage, weights=weights,
                radius=[float(r) if np.isfinite(r) else None for r in radius],
                thresholds=run.thresholds(submit.final, submit.thresholds).tolist(),
                images=len(run.frames[submit.table]))


# On the terminal

def tables_text(stage: Stage) -> str:
    "Return what a stage trains on: 'aptos_train, aptos_test by finetune_256'"
    return ', '.join(f'{name} by {teacher}' if teacher else name for teacher, name in stage.sources)


def interval_text(value: float, interval: Sequence[float], label: str = '95 % CI ') -> str:
    "Return a value with its interval: '0.833 (95 % CI 0.80–0.86)'"
    low, high = interval
    separator = ' to ' if low < 0 else '–'
    return f'{value:.3f} ({label}{low:.2f}{separator}{high:.2f})'


def difference_text(value: float, low: float, high: float) -> str:
    "Return a difference with its interval: '+0.012 (-0.003 to +0.027)'"
    return f'{value:+.3f} ({low:+.3f} to {high:+.3f})'


def show_summary(run: Run, summary: dict) -> None:
    "Print the summary as a table, with what its columns mean"
    demo = ' (SYNTHETIC demo)' if run.recipe.demo else ''
    columns = ['stage', 'tables', 'images', 'px', 'epochs', 'kappa (95 % CI)', 'time']
    rows = [summary_row(run, result) for result in summary['stages']]
    table(run.recipe.name + demo, columns, rows, right=('images', 'px', 'epochs'), wrap=('tables',))
    say('images: training + validation of one fold. kappa: out-of-fold, bootstrap interval.\n'
        'Fitted thresholds are fitted on the other folds. With keep = kappa or loss the epoch\n'
        'is chosen on the validation images.', 'dim')
    submission = summary['submission']
    say(f'submission by {submission["node"]} -> {run.root / "submission.csv"} ({submission["images"]} images)\n'
        'also written: report.html, submissions/, scores.csv, oof.csv, summary.json')
    if run.recipe.demo: say(SYNTHETIC, 'yellow')


def summary_row(run: Run, result: dict) -> list:
    "Return a stage's or ensemble's row of `show_summary`"
    name, stage = result['stage'], run.recipe.stages.get(result['stage'])
    kappa = interval_text(result['kappa'], result['kappa_interval'], label='')
    if stage is None: return [name, f'mean of {len(result["tables"])}', result['validated'], '', '', kappa, '']
    images = f'{result["images"]["train"]}+{result["images"]["valid"]}'
    epochs = f'{result["folds"]}x{result["epochs"]}' if result['folds'] > 1 else str(result['epochs'])
    return [name, tables_text(stage), images, result['size'], epochs, kappa, format_duration(result['seconds'])]


# Two runs side by side

def compare_runs(first: str, second: str) -> None:
    "Print kappa of two runs for each common stage and the submission, on the images that both validated"
    (summary_a, oof_a), (summary_b, oof_b) = _read_results(first), _read_results(second)
    names_b = {result['stage'] for result in summary_b['stages']}
    common = [result['stage'] for result in summary_a['stages'] if result['stage'] in names_b]
    final_a, final_b = summary_a['submission']['node'], summary_b['submission']['node']
    rows = []
    for label, a, b in [*((name, name, name) for name in common), ('submission', final_a, final_b)]:
        both = validated(oof_a, a).merge(validated(oof_b, b), on=['source', 'id_code'], suffixes=('', '_b'))
        if not len(both): continue
        changed = (both.diagnosis != both.diagnosis_b).sum()
        if changed:
            raise AptosError(f'{second}: {changed} images have other grades than in {first}. '
                             'Compare runs on the same tables.')
        seconds = [_seconds(summary_a, a), _seconds(summary_b, b)]
        rows.append(comparison_row(label, both, seconds))
    if not rows:
        raise AptosError(f'{first} and {second}: no validation image in common. Compare runs on the same tables.')
    table('kappa on the images that both runs validated',
          ['stage', 'n', 'first', 'second', 'difference (95 % CI)', 'time', 'same fold'], rows,
          right=('n', 'first', 'second', 'same fold'), wrap=('time',))
    say(f'first: {first}, submission by {final_a}. second: {second}, submission by {final_b}.')
    say('Paired bootstrap over images: a difference whose interval contains 0 may be chance.\n'
        'same fold: share of images that both runs validated in the same fold.', 'dim')
    if summary_a['synthetic'] or summary_b['synthetic']: say(SYNTHETIC, 'yellow')


def comparison_row(label: str, both: pd.DataFrame, seconds: list[float]) -> list:
    "Return a row of `compare_runs`; `both` has grade and fold of the first run, grade_b and fold_b of the second"
    kappas = [f'{quadratic_kappa(grade, both.diagnosis):.3f}' for grade in (both.grade, both.grade_b)]
    difference = difference_text(*paired_interval(both.grade, both.grade_b, both.diagnosis))
    same_fold = (both.fold == both.fold_b).mean()
    return [label, len(both), *kappas, difference, ' / '.join(map(format_duration, seconds)), f'{same_fold:.0%}']


def _read_results(folder: str) -> tuple[dict, pd.DataFrame]:
    "Return summary.json and oof.csv of a run folder. Raises `AptosError` if the run is not finished"
    root = Path(folder)
    summary, oof = read_record(root / 'summary.json'), root / 'oof.csv'
    if not summary or not oof.is_file():
        raise AptosError(f'{root}: not a finished run (no summary.json and oof.csv). '
                         'Give <runs>/<recipe>, or run `all` first.')
    return summary, pd.read_csv(oof, dtype=dict(id_code=str))


def _seconds(summary: dict, node: str) -> float:
    return next(result['seconds'] for result in summary['stages'] if result['stage'] == node)
