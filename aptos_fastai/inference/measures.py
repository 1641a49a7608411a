"""Metrics of graded images as JSON holds them: value, interval, number of images, and why there is none.

`df` has the columns diagnosis, score, grade, ungradable and group: the images of one table, graded by one model.
"""
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from aptos_fastai.common.io import AptosError
from aptos_fastai.decisions import brier_score
from aptos_fastai.metrics import (
    GRADES,
    MIDPOINTS,
    REFERABLE,
    GradeThresholds,
    apply_thresholds,
    auc,
    confusion,
    kappa_interval,
    predictive_values,
    proportion_interval,
    quadratic_kappa,
)

if TYPE_CHECKING:
    from aptos_fastai.inference.model_spec import ModelSpec

EVALUATION, PREDICTIONS, HTML = 'evaluation.json', 'predictions.csv', 'evaluation.html'      # that `evaluate` writes
EVALUATIONS = 'evaluations'                  # the folder of a model's evaluations, in its own folder


def measure(value: float, interval: Sequence[float] | None, images: int, reason: str = '') -> dict:
    "Return a metric with its interval; without a value, the `reason`"
    if not np.isfinite(value): return dict(value=None, interval=None, images=int(images), reason=reason)
    known = interval is not None and np.isfinite(interval).all()
    return dict(value=float(value), interval=[float(o) for o in interval or ()] if known else None, images=int(images),
                reason='')


def undefined(images: int, reason: str) -> dict:
    "Return a metric that has no value"
    return measure(np.nan, None, images, reason)


def _single_grade(df: pd.DataFrame) -> str:
    "Return why nothing can be told apart, or an empty text"
    if not len(df): return 'no images'
    return f'all images have grade {df.diagnosis.iloc[0]}' if df.diagnosis.nunique() == 1 else ''


def _missing_class(df: pd.DataFrame, lowest: int) -> str:
    "Return which of the images of grade `lowest` or higher, and of the others, are missing, or an empty text"
    if not (df.diagnosis >= lowest).any(): return f'no image has grade {lowest} or higher'
    return '' if (df.diagnosis < lowest).any() else f'every image has grade {lowest} or higher'


def proportion(correct: pd.Series, groups: pd.Series, reason: str = 'no images') -> dict:
    "Return the proportion of True values with its Wilson interval over groups"
    if not len(correct): return undefined(0, reason)
    return measure(correct.mean(), proportion_interval(correct, groups), len(correct))


# Grades

def kappa_of(df: pd.DataFrame, grades: ArrayLike) -> dict:
    "Return the kappa of `grades` with its bootstrap interval over groups; undefined for a single true grade"
    reason = _single_grade(df)
    if reason: return undefined(len(df), reason)
    return measure(quadratic_kappa(grades, df.diagnosis), kappa_interval(grades, df.diagnosis, df.group), len(df))


def kappa_results(df: pd.DataFrame) -> dict:
    """Return kappa of all images, of those that the gate accepts, by midpoints, and by the best thresholds.

    The best thresholds are fitted to these very images (in-sample): a bound that no thresholds exceed here.
    """
    accepted = df[df.ungradable == '']
    try: fit = GradeThresholds().fit(df.score, df.diagnosis)
    except AptosError as e: bound = dict(undefined(len(df), str(e)), thresholds=None)
    else: bound = dict(measure(fit.kappa_, None, len(df)), thresholds=fit.thresholds_.tolist())
    return dict(deployed=kappa_of(df, df.grade), accepted=kappa_of(accepted, accepted.grade),
                midpoints=kappa_of(df, apply_thresholds(df.score, MIDPOINTS)), best_thresholds=bound)


def recall_results(df: pd.DataFrame) -> list[dict]:
    "Return the recall of each true grade"
    of_grade = [df[df.diagnosis == grade] for grade in range(GRADES)]
    return [dict(grade=grade, **proportion(o.grade == grade, o.group, f'no image has grade {grade}'))
            for grade, o in enumerate(of_grade)]


def confusion_results(df: pd.DataFrame) -> list[list[int]]:
    "Return the confusion matrix of counts: row = true grade, column = grade by the model"
    return confusion(df.grade, df.diagnosis).tolist()


# Detection

def auc_of(df: pd.DataFrame, lowest: int) -> dict:
    "Return the AUC of the grades from `lowest` on, with its interval over groups"
    area, *interval = auc(df.score, df.diagnosis >= lowest, df.group)
    return measure(area, interval, len(df), _missing_class(df, lowest))


def detected(df: pd.DataFrame, predicted: pd.Series, lowest: int) -> dict:
    "Return sensitivity and specificity of `predicted` for the grades from `lowest` on"
    return detection(predicted, df.diagnosis >= lowest, df.group, _missing_class(df, lowest) or 'no images')


def detection(called: pd.Series, positive: pd.Series, groups: pd.Series, reason: str = 'no images') -> dict[str, dict]:
    "Return sensitivity and specificity of the images `called` positive, with intervals over groups"
    return dict(sensitivity=proportion(called[positive], groups[positive], reason),
                specificity=proportion(~called[~positive], groups[~positive], reason))


def detection_results(df: pd.DataFrame, predicted: pd.Series, lowest: int) -> dict:
    "Return AUC of the grades from `lowest` on, and sensitivity and specificity of the images `predicted`"
    return dict(lowest_grade=lowest, positives=int((df.diagnosis >= lowest).sum()), auc=auc_of(df, lowest),
                **detected(df, predicted, lowest))


def probability_results(df: pd.DataFrame, p: np.ndarray, lowest: int) -> dict:
    "Return the Brier score of the probabilities `p` of the grades from `lowest` on, their mean, and the share observed"
    positive = df.diagnosis >= lowest
    value, *interval = brier_score(p, positive, df.group)
    return measure(value, interval, len(df)) | dict(
        mean_predicted=float(p.mean()), observed=float(positive.mean()),
        of_prevalence=float(positive.mean() * (1 - positive.mean())))


def referral_results(df: pd.DataFrame, predicted: pd.Series, prevalence: float) -> dict:
    "Return what a programme gets that refers the images `predicted`, at a prevalence of referable retinopathy"
    found = detected(df, predicted, REFERABLE)
    return found | _predictive(found, prevalence) | dict(referred=proportion(predicted, df.group))


def _predictive(found: dict, prevalence: float) -> dict:
    "Return PPV and NPV; their intervals have the ends of the intervals of both, so they are wide rather than narrow"
    parts = found['sensitivity'], found['specificity']
    images = sum(o['images'] for o in parts)
    reason = next((o['reason'] for o in parts if o['value'] is None), '')
    if reason: return dict(ppv=undefined(images, reason), npv=undefined(images, reason))
    value = predictive_values(parts[0]['value'], parts[1]['value'], prevalence)
    ends = [predictive_values(parts[0]['interval'][i], parts[1]['interval'][i], prevalence) for i in (0, 1)]
    return {name: measure(value[i], (ends[0][i], ends[1][i]), images, f'the model calls no image {what}')
            for i, (name, what) in enumerate((('ppv', 'referable'), ('npv', 'not referable')))}


# Scores, prediction sets, gate

def calibration_results(df: pd.DataFrame) -> dict:
    "Return the mean error (score minus true grade) and the mean absolute error"
    error = df.score - df.diagnosis
    return dict(mean_error=float(error.mean()), mean_absolute_error=float(error.abs().mean()))


def set_results(df: pd.DataFrame, target: float) -> dict:
    "Return the coverage of the prediction sets of the images that get a grade, also by true grade, and their mean size"
    df = df[df.ungradable == ''].astype(dict(grade_low=int, grade_high=int))
    covered = (df.grade_low <= df.diagnosis) & (df.diagnosis <= df.grade_high)
    size, of_grade = df.grade_high - df.grade_low + 1, [df.diagnosis == grade for grade in range(GRADES)]
    by_grade = [dict(grade=grade, **proportion(covered[rows], df.group[rows]),
                     mean_size=float(size[rows].mean()) if rows.any() else None)
                for grade, rows in enumerate(of_grade)]
    return dict(target=target, coverage=proportion(covered, df.group), by_grade=by_grade,
                mean_size=measure(size.mean(), None, len(df), 'no images'))


def gate_results(df: pd.DataFrame, by_graders: pd.Series) -> dict:
    """Return the share of images that the gate rejects, how often for each reason, and of the graders' ungradable ones.

    `by_graders` holds the gate's reasons for the images that the graders called ungradable.
    """
    reasons = df.ungradable[df.ungradable != ''].str.split('; ').explode().value_counts()
    own = pd.Series(np.arange(len(by_graders)), index=by_graders.index)
    return dict(rejected=proportion(df.ungradable != '', df.group), reasons={k: int(n) for k, n in reasons.items()},
                rejected_of_ungradable=proportion(by_graders != '', own, 'the graders called no image ungradable'))


# The model

def model_record(model: 'ModelSpec') -> dict:
    "Return what tells one model from another, and what it says of itself"
    return dict(name=model.name, key=model.key, weights=[m.sha256 for m in model.members],
                thresholds=list(model.thresholds), coverage=model.coverage, kappa=model.kappa,
                ungradable=model.gate.ungradable, warnings=list(model.warnings), digests=model.digests,
                operating_points=[asdict(o) for o in model.decision.points])


def is_of_model(record: dict, model: 'ModelSpec') -> bool:
    "Return whether an evaluation is of a model: the same weights, thresholds, gate and rules, in whichever folder"
    return record['model'].get('digests') == model.digests
