"Compare runs and stages, or two evaluations on one table: paired differences on the same images."
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import format_duration, plural, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, read_record, verify_file
from aptos_fastai.inference.measures import EVALUATION, PREDICTIONS
from aptos_fastai.metrics import REFERABLE, auc, paired_auc, paired_interval, quadratic_kappa
from aptos_fastai.pipeline.summary import (
    OUT_OF_FOLD,
    SYNTHETIC,
    all_warnings,
    by_value,
    difference_text,
    validated,
    warning_lines,
)

MIN_COMMON = 50                              # images that what is compared must have in common
NOT_CORRECTED = ('The intervals are not corrected for several comparisons: the best of several differences is '
                 'optimistic.')


def compare_results(paths: Sequence[str]) -> None:
    """`compare PATH PATH ...`: compare finished runs, stages of them (RUN:STAGE), or two evaluations.

    Raises `AptosError`.
    """
    if len(paths) < 2: raise AptosError(f'{paths[0]}: nothing to compare it with. Give two or more.')
    evaluations = [path for path in paths if _is_evaluation(Path(path))]
    others = [path for path in paths if path not in evaluations]
    if evaluations and others:
        raise AptosError(f'{evaluations[0]}: is an evaluation, and {others[0]} is none. Give two runs, or two '
                         'evaluations.')
    if len(evaluations) > 2: raise AptosError(f'{evaluations[2]}: evaluations are compared in pairs. Give two.')
    if evaluations: compare_evaluations(*map(Path, evaluations))
    elif len(paths) == 2 and not any(split_stage(path)[1] for path in paths): compare_runs(*paths)
    else: compare_models(paths)


def _is_evaluation(path: Path) -> bool: return path.name == EVALUATION or (path / EVALUATION).is_file()


# Two runs

def compare_runs(first: str, second: str) -> None:
    "Print kappa of two runs for each common stage and the submission, on the images that both validated"
    (summary_a, oof_a), (summary_b, oof_b) = read_results(first), read_results(second)
    names_b = {result['stage'] for result in summary_b['stages']}
    common = [result['stage'] for result in summary_a['stages'] if result['stage'] in names_b]
    final_a, final_b = summary_a['submission']['node'], summary_b['submission']['node']
    rows, resampled, few = [], {}, {}
    for label, a, b in [*((name, name, name) for name in common), ('submission', final_a, final_b)]:
        both = validated(oof_a, a).merge(validated(oof_b, b), on=['source', 'id_code'], suffixes=('', '_b'))
        if not len(both): continue
        changed = (both.diagnosis != both.diagnosis_b).sum()
        if changed:
            raise AptosError(f'{second}: other grades than in {first} for {plural(changed, "image")}. '
                             'Compare runs on the same tables.')
        if len(both) < MIN_COMMON:
            few[label] = len(both)
            continue
        seconds = [_seconds(summary_a, a), _seconds(summary_b, b)]
        resampled[label], both['group'] = compared_groups(both, _result(summary_a, a), _result(summary_b, b))
        rows.append(comparison_row(label, both, seconds))
    if not rows:
        common_images = f'only {max(few.values())} validation images' if few else 'no validation image'
        raise AptosError(f'{first} and {second}: {common_images} in common; at least {MIN_COMMON} are needed. Compare '
                         'runs on the same tables that validate the same images: with folds = splits all of them.')
    table('kappa on the images that both runs validated',
          ['stage', 'n', 'first', 'second', 'difference (95 % CI)', 'time', 'folds'], rows,
          right=('n', 'first', 'second', 'folds'), wrap=('time',))
    say(f'first: {first}, submission by {final_a}. second: {second}, submission by {final_b}.')
    if few:
        left_out = ', '.join(f'{label} ({n})' for label, n in few.items())
        say(f'left out, fewer than {MIN_COMMON} images in common: {left_out}', 'yellow')
    say_conditions(resampled)
    if len({row[0] for row in rows} - {'submission'}) > 1: say(NOT_CORRECTED, 'yellow')
    say_precisions({folder: trained_in(summary, [*common, final])
                    for folder, summary, final in ((first, summary_a, final_a), (second, summary_b, final_b))})
    found = [(folder, all_warnings(o['stages'])) for folder, o in ((first, summary_a), (second, summary_b))]
    for line in warning_lines(found, 'both runs'): say(line, 'yellow')
    if summary_a['synthetic'] or summary_b['synthetic']: say(SYNTHETIC, 'yellow')


def say_conditions(resampled: dict[str, str]) -> None:
    "Print what the differences between runs are; `resampled` says of each what its interval resamples"
    say(DISCLAIMER, 'dim')
    say(f'Paired bootstrap over {by_value(resampled)}: a difference whose interval contains 0 may be chance.\n'
        'folds: fraction of the images that both validated in the same fold.', 'dim')
    say(OUT_OF_FOLD, 'yellow')


def compared_groups(both: pd.DataFrame, a: dict, b: dict) -> tuple[str, pd.Series]:
    "Return what a paired interval resamples: the groups of the first run, or of the second if only that knows patients"
    second = b['resampled'] != a['resampled'] and (b['resampled'] == 'patients' or a['resampled'] == 'images')
    return (b['resampled'], both.group_b) if second else (a['resampled'], both.group)


def comparison_row(label: str, both: pd.DataFrame, seconds: list[float]) -> list:
    "Return a row of `compare_runs`; `both` has grade and fold of the first run, grade_b and fold_b of the second"
    kappas = [f'{quadratic_kappa(grade, both.diagnosis):.3f}' for grade in (both.grade, both.grade_b)]
    difference = difference_text(*paired_interval(both.grade, both.grade_b, both.diagnosis, both.group))
    same_fold = (both.fold == both.fold_b).mean()
    return [label, len(both), *kappas, difference, ' / '.join(map(format_duration, seconds)), f'{same_fold:.0%}']


# Several runs and stages

@dataclass
class Model:
    "What is compared: the submission of a run, or one of its stages or ensembles"
    path: str                                # as it was named: RUN or RUN:STAGE
    stage: str
    result: dict                             # its entry of `stages` in summary.json
    synthetic: bool
    seconds: float                           # its trainings, or those of its members
    precision: str                           # of the same: `trained_in`
    valid: pd.DataFrame = field(repr=False)  # what it has validated: `validated`


def split_stage(path: str) -> tuple[str, str]:
    "Return the run folder and the stage of RUN:STAGE; the stage is empty if `path` is a folder"
    folder, colon, stage = path.rpartition(':')
    return (folder, stage) if colon and folder and not Path(path).exists() else (path, '')


def read_model(path: str) -> Model:
    "Return what RUN or RUN:STAGE names. Raises `AptosError`"
    folder, stage = split_stage(path)
    summary, oof = read_results(folder)
    stage = stage or summary['submission']['node']
    names = [result['stage'] for result in summary['stages']]
    if stage not in names:
        raise AptosError(f'{path}: {folder} has no results of {stage}. Choose from: {", ".join(names)}.')
    return Model(path, stage, _result(summary, stage), summary['synthetic'], _seconds(summary, stage),
                 trained_in(summary, [stage]), validated(oof, stage))


def compare_models(paths: Sequence[str]) -> None:
    "Print kappa of runs and stages on the images that all of them validated, and differences from the first one"
    models, names = [read_model(path) for path in paths], short_names(paths)
    common = common_images(models)
    valid = [common.merge(m.valid, on=list(common)).reset_index(drop=True) for m in models]
    for m, rows in zip(models, valid, strict=True):
        changed = (rows.diagnosis != valid[0].diagnosis).sum()
        if changed:
            raise AptosError(f'{m.path}: other grades than in {paths[0]} for {plural(changed, "image")}. Compare runs '
                             'on the same tables.')
    resampled, rows = {}, [model_row(names[0], models[0], valid[0])]
    for name, m, own in zip(names[1:], models[1:], valid[1:], strict=True):
        both = valid[0].join(own.add_suffix('_b'))
        resampled[name], both['group'] = compared_groups(both, models[0].result, m.result)
        difference = difference_text(*paired_interval(both.grade, both.grade_b, both.diagnosis, both.group))
        rows.append(model_row(name, m, own, difference, f'{(both.fold == both.fold_b).mean():.0%}'))
    table(f'kappa on the {len(common)} images that all validated',
          ['model', 'stage', 'validated', 'kappa', 'difference (95 % CI)', 'time', 'folds'], rows,
          right=('validated', 'kappa', 'folds'), wrap=('model', 'time'))
    for name, path in zip(names, paths, strict=True):
        if name != path: say(f'{name}: {path}', 'dim')
    counts = ', '.join(f'{len(common)} of {len(m.valid)}' for m in models)
    say(f'first row: the reference. Compared images of those that each validated: {counts}.')
    say_conditions(resampled)
    if len(rows) > 2: say(NOT_CORRECTED, 'yellow')
    say_precisions({name: m.precision for name, m in zip(names, models, strict=True)})
    found = [(name, m.result['warnings']) for name, m in zip(names, models, strict=True)]
    for line in warning_lines(found, 'all of them'): say(line, 'yellow')
    if any(m.synthetic for m in models): say(SYNTHETIC, 'yellow')


def common_images(models: Sequence[Model]) -> pd.DataFrame:
    "Return source and id_code of the images that all models validated. Raises `AptosError` if they are too few"
    keys = ['source', 'id_code']
    common = reduce(lambda a, b: a.merge(b, on=keys), [m.valid[keys] for m in models])
    if len(common) >= MIN_COMMON: return common
    counts = ', '.join(f'{m.path} {len(m.valid)}' for m in models)
    raise AptosError(f'{len(common)} images in common that all validated; at least {MIN_COMMON} are needed. Validated: '
                     f'{counts}. Leave out the one that validated others, or compare runs on the same tables.')


def short_names(paths: Sequence[str]) -> Sequence[str]:
    "Return paths without their folders, where that leaves different names"
    names = [Path(path).name for path in paths]
    return names if all(names) and len(set(names)) == len(names) else paths


def model_row(name: str, model: Model, valid: pd.DataFrame, difference: str = 'reference', same_fold: str = '') -> list:
    "Return a row of `compare_models`; `valid` has the model's grades of the images that all validated"
    kappa = f'{quadratic_kappa(valid.grade, valid.diagnosis):.3f}'
    return [name, model.stage, len(model.valid), kappa, difference, format_duration(model.seconds), same_fold]


# The results of a run

def read_results(folder: str | Path) -> tuple[dict, pd.DataFrame]:
    "Return summary.json and oof.csv of a run folder. Raises `AptosError` if the run is not finished"
    root = Path(folder)
    summary, oof = read_record(root / 'summary.json'), root / 'oof.csv'
    if summary and 'clusters' not in summary:
        raise AptosError(f'{root / "summary.json"}: written by an older version. Run `all` again.')
    if not summary or not oof.is_file():
        raise AptosError(f'{root}: not a finished run (no summary.json and oof.csv). '
                         'Give <runs>/<name>, or run `all` first.')
    return summary, pd.read_csv(oof, dtype=dict(id_code=str))


def _result(summary: dict, node: str) -> dict: return next(o for o in summary['stages'] if o['stage'] == node)


def _seconds(summary: dict, node: str) -> float:
    "Return how long a stage, or the members of an ensemble, took to train"
    return sum(_result(summary, m)['seconds'] for m in _members(summary, node))


def _members(summary: dict, node: str) -> Collection[str]:
    "Return the members of an ensemble, or the stage itself"
    return _result(summary, node).get('members') or [node]


def trained_in(summary: dict, nodes: Collection[str]) -> str:
    "Return the precisions that stages, and the members of ensembles, were trained in: 'bf16', 'bf16 and f32'"
    stages = {name for node in nodes for name in _members(summary, node)}
    return ' and '.join(sorted({o for name in stages for o in _result(summary, name).get('precision', ())}))


def say_precisions(precisions: dict[str, str]) -> None:
    "Print what models were trained in, by their names, if they differ"
    if len(set(precisions.values())) < 2: return
    text = '; '.join(f'{name}: {precision or "unknown (older version)"}' for name, precision in precisions.items())
    say(f'Trained in different precisions ([stage] precision), which change results, too. {text}', 'yellow')


# Two evaluations

def compare_evaluations(first: Path, second: Path) -> None:
    "Print kappa and AUC of two models on the images of one table that neither has seen, with a paired bootstrap"
    (a, rows_a), (b, rows_b) = _read_evaluation(first), _read_evaluation(second)
    both = matched(rows_a, rows_b)
    if len(both) < MIN_COMMON:
        raise AptosError(f'{first} and {second}: {len(both)} images in common that neither model has seen; at least '
                         f'{MIN_COMMON} are needed. Evaluate both models on one table.')
    changed = (both.diagnosis != both.diagnosis_b).sum()
    if changed:
        raise AptosError(f'{second}: other grades than in {first} for {changed} of {plural(len(both), "image")}. '
                         'Evaluate both models on one table.')
    over, groups = compared_groups(both, *(dict(resampled=o['table']['grouped_by']) for o in (a, b)))
    both['group'] = groups
    table('both models on the same images', ['metric', 'n', 'first', 'second', 'difference (95 % CI)'],
          evaluation_rows(both), right=('n', 'first', 'second'))
    say(f'first: {a["model"]["name"]} on {a["table"]["name"]}, {first}.\n'
        f'second: {b["model"]["name"]} on {b["table"]["name"]}, {second}.')
    say(DISCLAIMER, 'dim')
    say(f'Paired bootstrap over {over}: a difference whose interval contains 0 may be chance. Thresholds as deployed, '
        'without the gate. Images that either model was trained or tuned on are left out.', 'dim')
    found = [(str(path), record['warnings']) for path, record in ((first, a), (second, b))]
    for line in warning_lines(found, 'both evaluations'): say(line, 'yellow')
    if a['synthetic'] or b['synthetic']: say(SYNTHETIC, 'yellow')


def evaluation_rows(both: pd.DataFrame) -> list[list]:
    "Return the rows of `compare_evaluations`; `both` is what `matched` returns"
    referable = both.diagnosis >= REFERABLE
    kappas = [f'{quadratic_kappa(grade, both.diagnosis):.3f}' for grade in (both.grade, both.grade_b)]
    rows = [['kappa', len(both), *kappas,
             difference_text(*paired_interval(both.grade, both.grade_b, both.diagnosis, both.group))]]
    if referable.nunique() < 2: return rows
    areas = [f'{auc(score, referable)[0]:.3f}' for score in (both.score, both.score_b)]
    difference = difference_text(*paired_auc(both.score, both.score_b, referable, both.group))
    return [*rows, [f'AUC, grade ≥ {REFERABLE}', len(both), *areas, difference]]


def matched(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return the images of two predictions.csv that neither model has seen; columns of `b` end in _b.

    Images match by equal pixels, where these occur once in each, and the others by their id.
    """
    a, b = (o[o.error.eq('') & o.diagnosis.notna() & o.seen.eq('')] for o in (a, b))
    single_a, single_b = (o.drop_duplicates('pixel_sha256', keep=False) for o in (a, b))
    by_pixels = _merged(single_a, single_b, 'pixel_sha256')
    rest_a, rest_b = a[~a.id_code.isin(by_pixels.id_code)], b[~b.id_code.isin(by_pixels.id_code_b)]
    return pd.concat([by_pixels, _merged(rest_a, rest_b, 'id_code')], ignore_index=True)


def _merged(a: pd.DataFrame, b: pd.DataFrame, key: str) -> pd.DataFrame:
    "Return the rows of `a` and `b` with equal `key`; every column of `b` ends in _b"
    return a.merge(b.add_suffix('_b'), left_on=key, right_on=f'{key}_b')


def _read_evaluation(path: Path) -> tuple[dict, pd.DataFrame]:
    "Return evaluation.json and predictions.csv of an evaluation. Raises `AptosError` if they are missing or changed"
    folder = path.parent if path.name == EVALUATION else path
    record = read_record(folder / EVALUATION)
    if not record: raise AptosError(f'{folder / EVALUATION}: no such file. Give the folder of an evaluation.')
    file = verify_file(folder / PREDICTIONS, record['predictions_sha256'], 'Run evaluate again.')
    text = dict.fromkeys(['id_code', 'group', 'seen', 'error', 'pixel_sha256'], str)
    df = pd.read_csv(file, dtype=text, keep_default_na=False,
                     na_values=dict.fromkeys(['diagnosis', 'score', 'grade', 'grade_low', 'grade_high'], ['']))
    return record, df
