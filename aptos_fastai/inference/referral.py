"Fit what a model decides to out-of-fold scores, and measure it on other images than it was fitted on."
from dataclasses import replace

import numpy as np
import pandas as pd

from aptos_fastai.decisions import (
    LEVELS,
    DecisionSpec,
    OperatingPoint,
    Probabilities,
    choose_threshold,
    cross_fitted_probabilities,
    cross_fitted_thresholds,
)
from aptos_fastai.inference.measures import probability_results, proportion
from aptos_fastai.metrics import REFERABLE, SIGHT_THREATENING, PredictionSets
from aptos_fastai.recipe import Refer


def fit_decision(refer: Refer, df: pd.DataFrame, parts: np.ndarray, chosen_on: str) -> tuple[DecisionSpec, list[str]]:
    """Return what a model decides, fitted to all of `df`, and warnings; its figures are cross-fitted over `parts`.

    `df` has the columns score (out-of-fold), diagnosis and group (patient); `chosen_on` says in words what it holds.
    """
    points, warnings = fit_points(refer, df, parts, chosen_on)
    probabilities = Probabilities.fit(df.score, df.diagnosis)
    return DecisionSpec(points, probabilities, refer.uncertain, refer.prevalence or None), warnings


def fit_points(refer: Refer, df: pd.DataFrame, parts: np.ndarray,
               chosen_on: str) -> tuple[tuple[OperatingPoint, ...], list[str]]:
    """Return the operating points of [refer], and warnings of those that do not exist or keep no promise.

    Every image that is called sight-threatening is called referable, too: where the referable threshold is the higher
    one, the lower one counts for both.
    """
    points, warnings = [], []
    for target, level, value in refer.targets(LEVELS):
        point, warning = fit_point(df, parts, level, target, value, chosen_on)
        if point: points.append(point)
        if warning: warnings.append(warning)
    first = DecisionSpec(tuple(points))
    referable, sight = first.point(REFERABLE), first.point(SIGHT_THREATENING)
    if not referable or not sight or referable.threshold <= sight.threshold: return tuple(points), warnings
    note = f'lowered from {referable.threshold:.2f} to the threshold of sight-threatening retinopathy'
    called = cross_fitted_referred(first, df, parts)
    figures = detection(called, (df.diagnosis >= REFERABLE).to_numpy(), df.group)
    lowered = replace(referable, threshold=sight.threshold, note=note, sensitivity=figures['sensitivity'],
                      specificity=figures['specificity'])
    return tuple(lowered if o is referable else o for o in points), [*warnings, f'referable: the threshold is {note}']


def fit_point(df: pd.DataFrame, parts: np.ndarray, level: int, target: str, value: float,
              chosen_on: str) -> tuple[OperatingPoint | None, str]:
    "Return an operating point with its cross-fitted figures, and a warning; None if a class is missing"
    positive = (df.diagnosis >= level).to_numpy()
    name = LEVELS[level].replace('_', '-')
    threshold, note = choose_threshold(df.score, positive, target, value)
    if not np.isfinite(threshold):
        return None, f'no operating point for {name} retinopathy ({note}): grade {level} and above counts as {name}'
    called = df.score >= _others(df, parts, level, target, value)
    point = OperatingPoint(level, target, float(value), threshold, chosen_on, **detection(called, positive, df.group),
                           note=note)
    return point, f'operating point for {name} retinopathy: {note}' if note else ''


def _others(df: pd.DataFrame, parts: np.ndarray, level: int, target: str, value: float) -> np.ndarray:
    """Return for each image the threshold that the other parts choose.

    It is the lowest score where they lack a class, so that all is called positive, as a fitted model would not do.
    """
    thresholds = cross_fitted_thresholds(df.score, df.diagnosis >= level, parts, target, value)
    return np.where(np.isfinite(thresholds), thresholds, df.score.min())


def detection(called: pd.Series, positive: np.ndarray, groups: pd.Series) -> dict[str, dict]:
    "Return sensitivity and specificity of the images `called` positive, with intervals over groups"
    return {name: proportion(correct[rows], groups[rows])
            for name, rows, correct in (('sensitivity', positive, called), ('specificity', ~positive, ~called))}


def decision_results(spec: DecisionSpec, df: pd.DataFrame, parts: np.ndarray, coverage: float) -> dict:
    """Return the cross-fitted figures of a model's decisions on its validation images, for summary.json.

    `df` has the columns score, diagnosis, grade, group and ungradable. brier: of the probabilities of each level, with
    that of the same probability for everyone for comparison; programme: all rules together (operating point,
    uncertain, ungradable) for images, and for patients where some have several.
    """
    p = cross_fitted_probabilities(df.score, df.diagnosis, parts)
    return dict(brier={name: probability_results(df, p[:, level:].sum(1), level) for level, name in LEVELS.items()},
                programme=programme_results(_referred(spec, df, parts, coverage), df))


def _referred(spec: DecisionSpec, df: pd.DataFrame, parts: np.ndarray, coverage: float) -> pd.Series:
    "Return which images are referred by their score or, by [refer] uncertain = refer, as uncertain; cross-fitted"
    by_score = cross_fitted_referred(spec, df, parts)
    return by_score | cross_fitted_uncertain(df, parts, coverage) if spec.uncertain == 'refer' else by_score


def cross_fitted_referred(spec: DecisionSpec, df: pd.DataFrame, parts: np.ndarray) -> pd.Series:
    "Return which images are referred by their score, by thresholds that the other parts choose"
    points = [o for o in map(spec.point, LEVELS) if o]
    if not spec.point(REFERABLE): return df.grade >= REFERABLE
    return df.score >= np.min([_others(df, parts, o.lowest_grade, o.target, o.value) for o in points], axis=0)


def cross_fitted_uncertain(df: pd.DataFrame, parts: np.ndarray, coverage: float) -> pd.Series:
    "Return which images have a prediction set that reaches a referable grade, by sets of the other parts"
    high = pd.Series(0, df.index)
    for k in np.unique(parts):
        fit, test = df[parts != k], df[parts == k]
        if not len(fit): continue
        high[parts == k] = PredictionSets(coverage).fit(fit.score, fit.diagnosis).predict(test.score, test.grade)[1]
    return high >= REFERABLE


def programme_results(referred: pd.Series, df: pd.DataFrame) -> dict:
    "Return sensitivity, specificity and the share referred where ungradable images are referred, too; by patient, too"
    called = referred | (df.ungradable != '')
    by_image = _programme(called, df.diagnosis >= REFERABLE, df.group)
    if df.group.nunique() == len(df): return dict(images=by_image, patients=None)
    grouped = pd.DataFrame(dict(called=called, positive=df.diagnosis >= REFERABLE)).groupby(df.group.to_numpy()).any()
    names = pd.Series(grouped.index, grouped.index)
    return dict(images=by_image, patients=_programme(grouped.called, grouped.positive, names))


def _programme(called: pd.Series, positive: pd.Series, groups: pd.Series) -> dict:
    "Return sensitivity, specificity and share of the rows `called` positive"
    return detection(called, positive.to_numpy(), groups) | dict(referred=proportion(called, groups))
