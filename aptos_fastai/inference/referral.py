"Fit what a model decides to out-of-fold scores, and measure it on other images than it was fitted on."
from dataclasses import dataclass

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
    level_label,
)
from aptos_fastai.inference.measures import detection, probability_results, proportion
from aptos_fastai.metrics import GRADES, REFERABLE, SIGHT_THREATENING, PredictionSets
from aptos_fastai.recipe.sections import Refer


def fit_decision(refer: Refer, df: pd.DataFrame, parts: np.ndarray, chosen_on: str,
                 coverage: float) -> tuple[DecisionSpec, list[str]]:
    """Return what a model decides, fitted to all of `df`, and warnings; its figures are cross-fitted over `parts`.

    `df` has the columns score (out-of-fold), diagnosis and group (patient); `chosen_on` says in words what it holds,
    `coverage` is that of the prediction sets, which say what is uncertain.
    """
    points, warnings = fit_points(refer, df, parts, chosen_on)
    if refer.uncertain == 'refer': warnings += uncertain_warnings(df, parts, coverage)
    probabilities = Probabilities.fit(df.score, df.diagnosis)
    return DecisionSpec(points, probabilities, refer.uncertain, refer.prevalence or None), warnings


def uncertain_warnings(df: pd.DataFrame, parts: np.ndarray, coverage: float) -> list[str]:
    "Return a warning of referable grades with so few images that they are in every prediction set"
    fits = [df, *(df[parts != k] for k in np.unique(parts))]
    radius = [PredictionSets(coverage).fit(o.score, o.diagnosis).radius_[REFERABLE:] for o in fits if len(o)]
    always = [str(REFERABLE + i) for i in np.flatnonzero(np.isinf(radius).any(0))]
    if not always: return []
    return [f'[refer] uncertain = refer: too few images of grade {", ".join(always)} for a prediction set of '
            f'{100 * coverage:.0f} %, so that every image can count as uncertain and is referred']


@dataclass
class Candidate:
    "An operating point that is being chosen: `others` (n,) are the thresholds that the other parts choose"
    level: int
    target: str
    value: float
    threshold: float
    others: np.ndarray
    note: str

    def move_to(self, other: 'Candidate', pick: np.ufunc, text: str) -> None:
        "Replace the thresholds by the lower or higher (`pick`) ones of both, and say so if that changes anything"
        moved = float(pick(self.threshold, other.threshold))
        if moved != self.threshold:
            self.note = '; '.join(filter(None, [self.note, text.format(self.threshold)]))
        self.threshold, self.others = moved, pick(self.others, other.others)


ONE_PART = 'all images of a class share a part'
LOWERED = 'lowered from {:.2f} to the threshold of sight-threatening retinopathy'
RAISED = 'raised from {:.2f} to the first operating point, which has this specificity already'


def fit_points(refer: Refer, df: pd.DataFrame, parts: np.ndarray,
               chosen_on: str) -> tuple[tuple[OperatingPoint, ...], list[str]]:
    """Return the operating points of [refer], and warnings of those that do not exist or keep no promise.

    Every image that is called sight-threatening is called referable, too: the referable threshold is at most the
    sight-threatening one. A second point calls no image that the first one does not: it is at least as high.
    """
    found, warnings = candidates(refer, df, parts)
    points = []
    for o in found:
        if o.note:
            warnings.append(f'operating point for {level_label(o.level)} retinopathy, {o.target} {o.value:g}: {o.note}')
        known = np.isfinite(o.others)        # the others are called by no threshold
        figures = detection((df.score >= o.others)[known], df.diagnosis[known] >= o.level, df.group[known], ONE_PART)
        points.append(OperatingPoint(o.level, o.target, o.value, o.threshold, chosen_on, **figures, note=o.note))
    return tuple(points), warnings


def candidates(refer: Refer, df: pd.DataFrame, parts: np.ndarray) -> tuple[list[Candidate], list[str]]:
    "Return the thresholds of each operating point, and why there is none; `fit_points` says which are moved"
    found: list[Candidate] = []
    missing = []
    first: dict[int, Candidate] = {}
    for target, level, value in refer.targets(LEVELS):
        positive = (df.diagnosis >= level).to_numpy()
        threshold, note = choose_threshold(df.score, positive, target, value)
        if not np.isfinite(threshold):
            name = level_label(level)
            missing.append(f'no operating point for {name} retinopathy ({note}): grade {level} and above counts as '
                           f'{name}')
            continue
        others = cross_fitted_thresholds(df.score, positive, parts, target, value)
        found.append(Candidate(level, target, float(value), threshold, others, note))
        first.setdefault(level, found[-1])
    if len(first) == 2: first[REFERABLE].move_to(first[SIGHT_THREATENING], np.minimum, LOWERED)
    for o in found:
        if o is not first[o.level]: o.move_to(first[o.level], np.maximum, RAISED)
    return found, missing


def decision_results(spec: DecisionSpec, df: pd.DataFrame, parts: np.ndarray, coverage: float, ungradable: str) -> dict:
    """Return the cross-fitted figures of a model's decisions on its validation images, for summary.json.

    `df` has the columns score, diagnosis, grade, group and ungradable. brier: of the probabilities of each level, with
    that of the same probability for everyone for comparison; programme: all rules together (operating point,
    uncertain, and `ungradable` of [gate]: refer or exclude) for images, and for patients where some have several.
    """
    p = cross_fitted_probabilities(df.score, df.diagnosis, parts)
    called, known = cross_fitted_referred(spec, df, parts)
    if spec.uncertain == 'refer': called |= cross_fitted_sets(df, parts, coverage).grade_high >= REFERABLE
    return dict(brier={name: probability_results(df, p[:, level:].sum(1), level) for level, name in LEVELS.items()},
                programme=programme_results(called[known], df[known], ungradable))


def cross_fitted_referred(spec: DecisionSpec, df: pd.DataFrame, parts: np.ndarray) -> tuple[pd.Series, np.ndarray]:
    "Return which images are referred by their score, by thresholds that the other parts choose, and which are known"
    points = [o for o in map(spec.point, LEVELS) if o]
    if not spec.point(REFERABLE): return df.grade >= REFERABLE, np.ones(len(df), bool)
    others = np.min([cross_fitted_thresholds(df.score, df.diagnosis >= o.lowest_grade, parts, o.target, o.value)
                     for o in points], axis=0)
    return df.score >= others, np.isfinite(others)


def cross_fitted_sets(df: pd.DataFrame, parts: np.ndarray, coverage: float) -> pd.DataFrame:
    "Return `df` with grade_low and grade_high: the prediction set of each image by sets fitted on the other parts"
    df = df.assign(grade_low=0, grade_high=GRADES - 1)                 # of an image that has no other part
    for k in np.unique(parts):
        fit, test = df[parts != k], df[parts == k]
        if not len(fit): continue
        low, high = PredictionSets(coverage).fit(fit.score, fit.diagnosis).predict(test.score, test.grade)
        df.loc[test.index, ['grade_low', 'grade_high']] = np.c_[low, high]
    return df


def programme_results(referred: pd.Series, df: pd.DataFrame, ungradable: str) -> dict:
    """Return sensitivity, specificity and the share referred by all rules, by image and by patient.

    Ungradable images are referred, or do not count (`ungradable` = exclude). A patient is referred if any image is:
    eyes are not paired here, unlike in patients.csv.
    """
    if ungradable == 'exclude': referred, df = referred[df.ungradable == ''], df[df.ungradable == '']
    called = referred | (df.ungradable != '')
    by_image = _programme(called, df.diagnosis >= REFERABLE, df.group)
    if df.group.nunique() == len(df): return dict(images=by_image, patients=None)
    grouped = pd.DataFrame(dict(called=called, positive=df.diagnosis >= REFERABLE)).groupby(df.group.to_numpy()).any()
    names = pd.Series(grouped.index, grouped.index)
    return dict(images=by_image, patients=_programme(grouped.called, grouped.positive, names))


def _programme(called: pd.Series, positive: pd.Series, groups: pd.Series) -> dict:
    "Return sensitivity, specificity and share of the rows `called` positive"
    return detection(called, positive, groups, ONE_PART) | dict(referred=proportion(called, groups))
