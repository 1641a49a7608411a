"Results of a run: out-of-fold grades, summary.json, and the table on the terminal."
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, plural, say, table
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.decisions import DecisionSpec, decision_of_record
from aptos_fastai.inference.eyes import NO_INDEPENDENT_READING
from aptos_fastai.inference.measures import auc_of, confusion_results, recall_results, set_results
from aptos_fastai.inference.referral import cross_fitted_sets, decision_results, fit_decision
from aptos_fastai.inference.subgroups import subgroup_counts
from aptos_fastai.metrics import (
    GRADES,
    MIDPOINTS,
    REFERABLE,
    PredictionSets,
    apply_thresholds,
    cross_fitted_grades,
    kappa_interval,
    quadratic_kappa,
)
from aptos_fastai.pipeline.clusters import cluster_results, cluster_warnings
from aptos_fastai.pipeline.eyes import fit_run_eyes, fused_columns
from aptos_fastai.pipeline.lineage import weights_warnings
from aptos_fastai.recipe.sections import Stage, parse_thresholds
from aptos_fastai.run_folder import Run

SYNTHETIC = 'SYNTHETIC DEMO: generated images, no patient data; results have no clinical meaning'
OUT_OF_FOLD = ('All metrics are out-of-fold, on images of the same source. Evaluate on images of another source before '
               'you use them.')
PATIENTS_UNKNOWN = 'patients unknown: may be optimistic, intervals too narrow'
EPOCH_CHOSEN = 'with keep = kappa or loss the epoch is chosen on the validation images'
SETS_CONDITION = 'from the same source as the training images (cameras, clinics, graders); in others it is less often'
SETS_CAUTION = ('the submitted model was trained on pseudo-labels of these test images: their prediction sets can '
                'contain the true grade less often')
NEARLY_EQUAL = .1                            # thresholds closer than this leave a grade that is hardly ever predicted
SUMMARY_FORMAT = 12                          # of summary.json and scores.csv; `all` replaces older ones
LARGEST_ERRORS = 12                          # that summary.json and the model card name
KEYS = ['source', 'id_code', 'diagnosis', 'fold', 'group']


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


def graded_alone(run: Run, node: str) -> pd.DataFrame:
    "Return the out-of-fold scores of a stage or ensemble with the columns grade and group"
    oof = run.oof(node)
    return oof.assign(grade=out_of_fold_grades(run, oof, threshold_setting(run, node)), group=run.groups(oof))


def oof_table(run: Run) -> pd.DataFrame:
    """Return oof.csv, a row for each validation image.

    Columns: source, id_code, diagnosis, fold, group (patient, block of ids, or the image alone; with its duplicates);
    NAME and NAME_grade, score and grade by each stage and ensemble; with [submit] eyes = fused fused_score and
    fused_grade by both eyes; then the columns that the tables `carry`.
    """
    total: pd.DataFrame | None = None
    for name in run.recipe.order:
        oof = graded_alone(run, name).rename(columns=dict(score=name, grade=f'{name}_grade'))
        total = oof if total is None else total.merge(oof, on=KEYS, how='outer')
    assert total is not None
    if run.recipe.submit.eyes == 'fused':
        fused = fused_columns(run, run.oof(run.recipe.submit.final))
        total = total.merge(fused, on=['source', 'id_code'], how='left')
    return with_carried(run, total)


def with_carried(run: Run, oof: pd.DataFrame) -> pd.DataFrame:
    "Return `oof` (source, id_code, …) with the columns that the tables carry; empty where a table lacks one"
    if not run.recipe.carried: return oof
    columns = ['source', 'id_code', *run.recipe.carried]
    rows = pd.concat(run.frames.values(), ignore_index=True).reindex(columns=columns, fill_value='')
    return oof.merge(rows.fillna(''), on=['source', 'id_code'], how='left')


def validated(oof: pd.DataFrame, node: str) -> pd.DataFrame:
    "Return the rows of `oof_table` that `node` has validated: source, id_code, diagnosis, fold, group, score, grade"
    rows = oof[oof[node].notna()]
    grade = rows[f'{node}_grade'].astype(int)
    return rows[KEYS].assign(diagnosis=rows.diagnosis.astype(int), score=rows[node], grade=grade).reset_index(drop=True)


# summary.json

def summarise(run: Run, oof: pd.DataFrame) -> dict:
    """Return the results of a finished run: a dict for each stage and ensemble, the submission, and its clusters.

    Each kappa is of out-of-fold grades: by fixed thresholds, or by thresholds fitted on the other folds.
    """
    final = run.recipe.submit.final
    synthetic = run.synthetic
    results = {name: stage_result if name in run.recipe.stages else ensemble_result for name in run.recipe.order}
    stages = [result_of(run, name, validated(oof, name)) for name, result_of in results.items()]
    valid = validated(oof, final)
    result = next(o for o in stages if o['stage'] == final)
    clusters = cluster_results(run, with_carried(run, valid), threshold_setting(run, final))
    result['warnings'] += cluster_warnings(clusters)
    return dict(recipe=run.recipe.name, date=time.strftime('%Y-%m-%d'), owner=run.recipe.owner,
                contact=run.recipe.contact, synthetic=synthetic, note=SYNTHETIC if synthetic else '',
                left_out=run.left_out, postponed=run.recipe.postponed, tables=table_results(run), stages=stages,
                submission=submission_result(run, valid, result), clusters=clusters,
                decision=validated_decisions(run, valid, result), prediction_sets=validated_sets(run, valid),
                largest_errors=error_results(valid))


def stage_result(run: Run, name: str, valid: pd.DataFrame) -> dict:
    "Return the results of a stage on its validation images `valid`"
    stage = run.recipe.stages[name]
    records = [run.finished_record(name, k) for k in run.folds_of(name)]
    return dict(
        stage=name, tables=list(stage.train), arch=stage.arch, size=stage.size, folds=len(records),
        images=records[0]['images'], epochs=stage.freeze_epochs + stage.epochs,
        kept_epochs=[o['kept_epoch'] + 1 for o in records],
        kept_kappa=float(np.mean([o['kept_kappa'] for o in records])),
        precision=sorted({o['precision'] for o in records}),
        seconds=sum(o['seconds'] for o in records), **kappa_result(run, name, valid))


def ensemble_result(run: Run, name: str, valid: pd.DataFrame) -> dict:
    "Return the results of an ensemble on its validation images `valid`"
    return dict(
        stage=name, tables=list(run.recipe.members(name)), arch='ensemble', size=None, folds=len(run.folds_of(name)),
        images=dict(train=0, valid=len(valid)), epochs=None, kept_epochs=None, kept_kappa=None, precision=[],
        seconds=0, **kappa_result(run, name, valid))


def kappa_result(run: Run, name: str, valid: pd.DataFrame) -> dict:
    "Return kappa with its interval and warnings, and the thresholds fitted on all validation images"
    setting = threshold_setting(run, name)
    thresholds, not_fitted = run.fitted_thresholds(name, setting)
    members = dict.fromkeys(run.recipe.members(name), 0.) | run.member_weights(name)
    result = dict(
        members=members, fitted=run.recipe.is_fitted(name),
        validated=len(valid), kappa=quadratic_kappa(valid.grade, valid.diagnosis),
        kappa_interval=kappa_interval(valid.grade, valid.diagnosis, valid.group), resampled=run.grouped_by(valid),
        kappa_midpoints=quadratic_kappa(apply_thresholds(valid.score, MIDPOINTS), valid.diagnosis),
        thresholds=thresholds.tolist(), threshold_method=setting, weights=run.weight_hashes(name),
        scores=run.score_hashes(name))
    decision, no_point = node_decision(run, name, valid)
    notes = [*grade_warnings(valid), *patient_warnings(run, valid), *epoch_warnings(run, name),
             *relabel_warnings(run, valid), *origin_warnings(run, name, valid), *warnings(result, not_fitted),
             *no_point]
    text = interval_text(result['kappa'], result['kappa_interval'], result['resampled'])
    return dict(result, kappa_text=text, warnings=notes, decision=asdict(decision), recall=recall_results(valid),
                auc=auc_of(valid, REFERABLE), confusion=confusion_results(valid))


def node_decision(run: Run, name: str, valid: pd.DataFrame) -> tuple[DecisionSpec, list[str]]:
    "Return what a stage or ensemble decides, with cross-fitted figures, and warnings"
    chosen_on = f'out-of-fold scores of {run.recipe.name}/{name}, {len(valid)} images'
    return fit_decision(run.recipe.refer, valid, run.parts(valid), chosen_on, run.recipe.submit.coverage)


def validated_decisions(run: Run, valid: pd.DataFrame, result: dict) -> dict:
    "Return the cross-fitted figures of the submitted model's decisions; `result` is its entry of `stages`"
    from aptos_fastai.pipeline.run_gate import ungradable_validated  # imported here because it imports PyTorch
    df = valid.assign(ungradable=ungradable_validated(run))
    recipe, spec = run.recipe, decision_of_record(result['decision'])
    return decision_results(spec, df, run.parts(valid), recipe.submit.coverage, recipe.gate.ungradable)


def validated_sets(run: Run, valid: pd.DataFrame) -> dict:
    """Return coverage and size of the submitted model's prediction sets, with intervals.

    The sets of each part are fitted on the other parts, to the score of one fold.
    """
    coverage = run.recipe.submit.coverage
    return set_results(cross_fitted_sets(valid.assign(ungradable=''), run.parts(valid), coverage), coverage)


def largest_errors(valid: pd.DataFrame) -> pd.DataFrame:
    "Return the `LARGEST_ERRORS` wrongly graded images whose scores are farthest from the true grade, largest first"
    wrong = valid[valid.grade != valid.diagnosis]
    return wrong.assign(error=(wrong.score - wrong.diagnosis).abs()).nlargest(LARGEST_ERRORS, 'error')


def error_results(valid: pd.DataFrame) -> list[dict]:
    "Return table, id, true grade, grade and score of the largest errors"
    return [dict(table=o.source, id_code=o.id_code, diagnosis=int(o.diagnosis), grade=int(o.grade),
                 score=round(float(o.score), 3)) for o in largest_errors(valid).itertuples()]


def table_results(run: Run) -> list[dict]:
    """Return what each table holds and what it is used for.

    grades: images of each grade, None if ungraded; groups: number of what `grouped_by` names (patients, images …);
    carried: for each carried column how many images have each value, number range, or too many values.
    """
    return [_table_result(run, name, frame) for name, frame in run.frames.items()]


def _table_result(run: Run, name: str, frame: pd.DataFrame) -> dict:
    "Return the entry of one table"
    table = run.recipe.tables[name]
    grades = [int((frame.diagnosis == grade).sum()) for grade in range(GRADES)] if table.graded else None
    return dict(table=name, uses=table_uses(run, name), images=len(frame), grades=grades, grouped_by=table.grouped_by,
                groups=int(frame.group.nunique()), ungradable_by_graders=run.ungradable.get(name, 0),
                carried={column: subgroup_counts(frame[column]) for column in table.carried})


def table_uses(run: Run, name: str) -> list[str]:
    "Return what a run uses a table for: training, validation, pseudo-labels, test"
    stages = run.recipe.stages.values()
    uses = {'training': any(name in s.graded_tables for s in stages),
            'validation': any(name in s.validated_tables for s in stages),
            'pseudo-labels': any(teacher and table == name for s in stages for teacher, table in s.sources),
            'test': name == run.recipe.submit.table}
    return [use for use, used in uses.items() if used]


def grade_warnings(valid: pd.DataFrame) -> list[str]:
    "Return warnings of grades that no validation image has, and of a model that gives all images the same grade"
    missing, found = sorted(set(range(GRADES)) - set(valid.diagnosis)), []
    if missing:
        found.append(f'no graded image has grade {", ".join(map(str, missing))}: the model cannot predict it')
    if valid.grade.nunique() == 1 < valid.diagnosis.nunique():
        found.append(f'every validation image gets grade {valid.grade.iloc[0]}: the model has learned nothing. '
                     'Train more epochs, or with another lr')
    return found


def patient_warnings(run: Run, valid: pd.DataFrame) -> list[str]:
    "Return a warning if the patients of all or of some validation images are unknown"
    if run.grouped_by(valid) != 'patients': return [PATIENTS_UNKNOWN]
    own = valid.group == valid.source + ':' + valid.id_code            # no patient was found in these
    return [f'patients of {own.sum()} of {len(valid)} images unknown: may be optimistic'] if own.any() else []


def epoch_warnings(run: Run, node: str) -> list[str]:
    "Return warnings if the epoch of a stage, or of some members of an ensemble, was chosen on the validation images"
    kept = {run.recipe.stages[m].keep for m in run.recipe.members(node)}
    chosen = sorted(kept - {'last'})
    if not chosen: return []
    found = [f'the epoch was chosen on the validation images (keep = {" or ".join(chosen)}): slightly optimistic']
    if run.recipe.is_fitted(node) and len(kept) > 1:
        found.append(f'members keep epochs in different ways ({", ".join(sorted(kept))}): fitted weights prefer those '
                     'whose epoch was chosen on the validation images. Set keep of all members to last')
    return found


def relabel_warnings(run: Run, valid: pd.DataFrame) -> list[str]:
    "Return a warning if grades were changed where a model contradicted them: models then agree with them more"
    counts = [o.counts() for name, o in run.relabels.items() if name in set(valid.source)]
    regraded, lost = (sum(o[key] for o in counts) for key in ('regraded', 'ungradable'))
    if not regraded + lost: return []
    return [f'{plural(regraded, "image")} regraded and {lost} left out after a review of labels that a model '
            'contradicted: optimistic']


def origin_warnings(run: Run, node: str, valid: pd.DataFrame) -> list[str]:
    "Return warnings of files of initial weights that were, or may have been, trained on validation images"
    networks = {name: None for m in run.recipe.members(node) for name in run.finished_record(m, 0)['trained_on']}
    records = [run.finished_record(stage, int(k)) for stage, _, k in (name.partition('/fold') for name in networks)]
    found = [o for r in records if r['origin']
             for o in weights_warnings(r['loaded']['file'], r['origin'], set(valid.source))]
    return list(dict.fromkeys(found))


def warnings(result: dict, not_fitted: str = '') -> list[str]:
    """Return what a reader must know of a kappa and its thresholds; it is shown wherever the kappa is.

    `result` is an entry of `stages` in summary.json, `not_fitted` why no thresholds could be fitted.
    """
    found = []
    low, high = result['kappa_interval']
    if low <= 0 <= high: found.append("kappa's interval contains 0: the model may grade no better than chance")
    if not_fitted:
        found.append(f'no thresholds could be fitted ({not_fitted}): the midpoints 0.5 1.5 2.5 3.5 are used')
    thresholds = result['thresholds']
    for grade, (below, above) in enumerate(pairwise(thresholds), 1):
        if above - below >= NEARLY_EQUAL: continue
        found.append(f'thresholds {below:.2f} and {above:.2f} nearly coincide: grade {grade} is hardly ever predicted')
    kappa, at_midpoints = result['kappa'], result['kappa_midpoints']
    if not parse_thresholds(result['threshold_method']) and kappa < at_midpoints:
        found.append(f'fitted thresholds are worse than the midpoints, out-of-fold (kappa {kappa:.3f} against '
                     f'{at_midpoints:.3f}): thresholds = 0.5 1.5 2.5 3.5 may be better')
    return found


def trained_on(run: Run, node: str, name: str) -> bool:
    "Return whether a stage, a member of an ensemble or one that it starts from was trained on images of a table"
    for m in run.recipe.members(node):
        stage = run.recipe.stages[m]
        if any(table_name == name for _, table_name in stage.sources): return True
        if stage.init and trained_on(run, stage.init, name): return True
    return False


def submission_result(run: Run, valid: pd.DataFrame, result: dict) -> dict:
    """Return what turns test images into the submission: members, weights, thresholds, prediction sets; and cautions.

    `eyes` is what grades by both eyes, if they are fused; all else grades an image alone.
    `calibration` holds the distances that the prediction sets are fitted on, for each grade and fold; `radius` says
    the same in one number for each grade. `result` is the submitted stage's or ensemble's.
    """
    from aptos_fastai.pipeline.run_gate import run_gate  # imported here because it imports PyTorch
    submit = run.recipe.submit
    members = run.member_weights(submit.final)
    weights, scores = ({name: sha256 for name, sha256 in result[key].items() if name.partition('/')[0] in members}
                       for key in ('weights', 'scores'))
    sets = PredictionSets(submit.coverage).fit(valid.score, valid.diagnosis, valid.fold)
    eyes, notes = fit_run_eyes(run, valid)
    cautions = [SETS_CAUTION] if trained_on(run, submit.final, submit.table) else []
    if eyes: cautions += [NO_INDEPENDENT_READING, *notes]
    return dict(file='submission.csv' if submit.table else '', node=submit.final, members=members,
                coverage=submit.coverage, weights=weights, scores=scores,
                radius=[float(r) if np.isfinite(r) else None for r in sets.radius_], calibration=sets.calibration_,
                thresholds=result['thresholds'], images=len(run.frames[submit.table]) if submit.table else 0,
                kappa_text=result['kappa_text'],
                gate=asdict(run_gate(run, submit.final)), decision=result['decision'],
                refer=asdict(run.recipe.refer),
                distance_units={m: run.distance_unit(m) for m in members},
                warnings=result['warnings'], eyes=eyes and asdict(eyes), cautions=cautions)


# On the terminal

def tables_text(stage: Stage) -> str:
    "Return what a stage trains on: 'aptos_train, aptos_test by finetune_256'"
    return ', '.join(f'{name} by {teacher}' if teacher else name for teacher, name in stage.sources)


def epochs_text(stage: Stage) -> str:
    "Return the epochs of a stage: '7 epochs', '1 + 7 epochs (1 of the head alone)'"
    if not stage.freeze_epochs: return plural(stage.epochs, 'epoch')
    both = f'{stage.freeze_epochs} + {stage.epochs}' if stage.epochs else f'{stage.freeze_epochs}'
    return f'{both} epochs ({stage.freeze_epochs} of the head alone)'


def mean_text(result: dict) -> str:
    "Return what an ensemble averages, from its entry of `stages`: 'mean of a (0.62), b (0.38), weights fitted'"
    members = ', '.join(f'{m} ({weight:.2f})' for m, weight in result['members'].items())
    return f'mean of {members}{", weights fitted" if result["fitted"] else ""}'


def interval_text(value: float, interval: Sequence[float], over: str = '') -> str:
    """Return a value with its interval and what that resamples: '0.833 (95 % CI over patients 0.80–0.86)'.

    Without `over` only the numbers: '0.833 (0.80–0.86)'.
    """
    low, high = (round(float(o), 2) + 0. for o in interval)      # no -0.00
    value = round(float(value), 3) + 0.
    separator = ' to ' if low < 0 else '–'
    label = f'95 % CI over {over} ' if over else ''
    return f'{value:.3f} ({label}{low:.2f}{separator}{high:.2f})'


def by_value(values: dict[str, str]) -> str:
    "Return the names of each value, 'patients (a, b), images (c)'; the value alone if all have the same"
    names: dict[str, list[str]] = {}
    for name, value in values.items(): names.setdefault(value, []).append(name)
    if len(names) == 1: return next(iter(names))
    return ', '.join(f'{value} ({", ".join(of_value)})' for value, of_value in names.items())


def all_warnings(results: Sequence[dict]) -> list[str]:
    "Return each warning of stages and ensembles once, with the names of those that it is about"
    every = 'all stages and ensembles' if len(results) > 3 else ''
    return warning_lines([(result['stage'], result['warnings']) for result in results], every)


def warning_lines(warnings: Sequence[tuple[str, Sequence[str]]], every: str) -> list[str]:
    "Return each of the `warnings` (name, texts) once, with the names that it is about: `every`, if given, for all"
    names: dict[str, list[str]] = {}
    for name, texts in warnings:
        for text in dict.fromkeys(texts): names.setdefault(text, []).append(name)
    return [f'{every if every and len(of_text) == len(warnings) else ", ".join(of_text)}: {text}'
            for text, of_text in names.items()]


def clusters_text(clusters: Sequence[dict]) -> str:
    "Return the drop of kappa between the clusters of each kind: 'camera 0.12 (by chance up to 0.05)'"
    drops = [f'{o["kind"]} {o["drop"]:.2f} (by chance up to {o["drop_by_chance"]:.2f})'
             for o in clusters if o['drop'] is not None]
    return ', '.join(drops) or 'fewer than two clusters of 30 images and two grades'


def points_text(record: dict) -> str:
    "Return the operating points of a decision's record in lines: from which score on, and its cross-fitted figures"
    lines = []
    for point in decision_of_record(record).points:
        figures = [f'{key} {interval_text(o["value"], o["interval"])}' for key in ('sensitivity', 'specificity')
                   if (o := getattr(point, key))['value'] is not None]
        lines.append(f'{point.label} (grade ≥ {point.lowest_grade}): score ≥ {point.threshold:.2f}, '
                     f'chosen for {point.target_text}; cross-fitted {", ".join(figures)}.')
    return '\n'.join(lines) or 'No operating point: grade 2 and above counts as referable.'


def difference_text(value: float, low: float, high: float) -> str:
    "Return a difference with its interval: '+0.012 (-0.003 to +0.027)'"
    return f'{value:+.3f} ({low:+.3f} to {high:+.3f})'


def eyes_rows(results: dict) -> list[list[str]]:
    "Return how images with a fellow are graded, with kappa and AUC of referable grades; and what the fusion gains"
    def text(name: str) -> str:
        o = results.get(name)
        if not o: return ''
        if o['value'] is None: return f'undefined: {o["reason"]}'
        if 'gain' in name: return difference_text(o['value'], *o['interval'])
        return interval_text(o['value'], o['interval'])
    rows = [['alone', text('alone'), text('auc_alone')], ['alone, score refitted', text('own_score'), ''],
            ['by both eyes (fused)', text('fused'), text('auc_fused')],
            ['fused minus alone', text('gain'), text('auc_gain')],
            ['fused minus refitted', text('gain_over_own_score'), '']]
    return [row for row in rows if row[1]]


def eyes_text(results: dict) -> str:
    "Return the figures of a fusion in lines"
    rows = [f'{name}: kappa {kappa}' + (f', AUC {area}' if area else '') for name, kappa, area in eyes_rows(results)]
    over = f'{results["images"]} images of {results["patients"]} patients with both eyes'
    return '\n'.join([f'{over}, cross-fitted (95 % CI over patients):', *rows])


def show_summary(run: Run, summary: dict) -> None:
    "Print the summary as a table, with what its columns mean"
    demo = ' (SYNTHETIC demo)' if run.synthetic else ''
    columns = ['stage', 'tables', 'images', 'px', 'epochs', 'kappa (95 % CI)', 'time']
    rows = [summary_row(run, result) for result in summary['stages']]
    table(run.recipe.name + demo, columns, rows, right=('images', 'px', 'epochs'),
          wrap=('tables', 'kappa (95 % CI)', 'time'))
    submission = summary['submission']
    resampled = by_value({result['stage']: result['resampled'] for result in summary['stages']})
    say('images: training + validation of one fold. Thresholds are fixed, or fitted on other images.\n'
        f'Intervals: bootstrap over {resampled}.\n'
        f'Drop of kappa between clusters of images: {clusters_text(summary["clusters"])}.\n'
        f'Operating points of {submission["node"]}:\n{points_text(submission["decision"])}', 'dim')
    if submission.get('eyes'): say(eyes_text(submission['eyes']['results']))
    say(OUT_OF_FOLD, 'yellow')
    for text in [*all_warnings(summary['stages']), *submission['cautions']]: say(text, 'yellow')
    if summary['left_out']: say(summary['left_out'], 'yellow')
    if submission['file']:
        say(f'submission by {submission["node"]} -> {run.root / "submission.csv"} '
            f'({plural(submission["images"], "image")})\n'
            'also written: report.html, submissions/, scores.csv, oof.csv, summary.json')
    else: say(f'model: {submission["node"]} -> {run.root}: report.html, oof.csv, summary.json. To grade images: '
              f'predict {run.root} IMAGES')
    for name, part in summary['gate'].items():
        if part['ungradable']: say(f'ungradable {name} images: {part["ungradable"]} of {part["images"]}', 'yellow')
    say(DISCLAIMER, 'dim')
    if run.synthetic: say(SYNTHETIC, 'yellow')


def stage_kappa_text(run: Run, name: str) -> str:
    "Return the kappa of a trained stage: 'out-of-fold kappa 0.833 (95 % CI over patients 0.80–0.86), 413 images'"
    oof, setting = run.oof(name), threshold_setting(run, name)
    grades = out_of_fold_grades(run, oof, setting)
    interval = kappa_interval(grades, oof.diagnosis, run.groups(oof))
    kappa = interval_text(quadratic_kappa(grades, oof.diagnosis), interval, run.grouped_by(oof))
    how = f'thresholds {setting}' if parse_thresholds(setting) else 'thresholds fitted on other images'
    return f'out-of-fold kappa {kappa}, {len(oof)} images, {how}'


def summary_row(run: Run, result: dict) -> list:
    "Return a stage's or ensemble's row of `show_summary`"
    name, stage = result['stage'], run.recipe.stages.get(result['stage'])
    kappa = interval_text(result['kappa'], result['kappa_interval'])
    if stage is None:
        members = '\n'.join(f'{weight:.2f} {m}' for m, weight in result['members'].items() if result['fitted'])
        return [name, members or f'mean of {len(result["tables"])}', result['validated'], '', '', kappa, '']
    tables = '\n'.join(f'{name}\nby {teacher}' if teacher else name for teacher, name in stage.sources)
    images = f'{result["images"]["train"]}\n+{result["images"]["valid"]}'
    epochs = f'{result["folds"]}x{result["epochs"]}' if result['folds'] > 1 else str(result['epochs'])
    return [name, tables, images, result['size'], epochs, kappa, format_duration(result['seconds'])]
