"""Grade an eye by the scores of both eyes of its patient: a linear fusion that is fitted to out-of-fold scores.

An image is fused with the mean score of the gradable images of the patient's other eye. Where there is none, or where
patient or eye are unknown, it is graded alone, exactly as by the model without fusion.
"""
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from aptos_fastai.decisions import DecisionSpec, decision_of_record
from aptos_fastai.inference.measures import auc_of, detection, kappa_of, measure, set_results
from aptos_fastai.inference.referral import cross_fitted_sets, fit_decision
from aptos_fastai.metrics import (
    GRADE_NAMES,
    REFERABLE,
    Calibration,
    PredictionSets,
    apply_thresholds,
    grade_scores,
    paired_auc,
    paired_interval,
    thresholds_or_midpoints,
)
from aptos_fastai.recipe.sections import Refer, parse_thresholds

OTHER_EYE = dict(left='right', right='left')
NO_INDEPENDENT_READING = 'a fused grade depends on the other eye, too: it is no independent reading of the eye'
GRADED_ALONE = 'the model grades by both eyes of a patient in predict; here every image is graded alone'
FUSES = (f'predict grades by both eyes of a patient where it knows patient and eye; {NO_INDEPENDENT_READING}. The web '
         'page, heat maps and DICOM reports grade every image alone')


@dataclass(frozen=True)
class Fusion:
    "The fused score of an eye: intercept + own * (its score) + fellow * (the score of the other eye)"
    intercept: float
    own: float
    fellow: float

    @classmethod
    def fit(cls, own: ArrayLike, fellow: ArrayLike, grades: ArrayLike) -> 'Fusion':
        "Fit to the grades (n,) of eyes by least squares; neither score may count negatively"
        from sklearn.linear_model import LinearRegression  # imported here because it takes a second
        fit = LinearRegression(positive=True).fit(np.c_[own, fellow], np.asarray(grades, float))
        return cls(float(fit.intercept_), float(fit.coef_[0]), float(fit.coef_[1]))

    def predict(self, own: ArrayLike, fellow: ArrayLike) -> np.ndarray:
        "Return the fused scores (n,)"
        return self.intercept + self.own * np.asarray(own, float) + self.fellow * np.asarray(fellow, float)


def fellow_scores(scores: ArrayLike, patients: Sequence[str], eyes: Sequence[str],
                  usable: ArrayLike | bool = True) -> np.ndarray:
    """Return for each image (n,) the mean score of the images of its patient's other eye; nan if there is none.

    `patients` and `eyes` (left, right) are empty where they are unknown. Images that are not `usable` have no fellow
    and are none.
    """
    df = pd.DataFrame(dict(score=np.asarray(scores, float), patient=list(patients), eye=list(eyes)))
    known = (df.patient != '') & df.eye.isin(list(OTHER_EYE)) & np.asarray(usable, bool)
    mean = df[known].groupby(['patient', 'eye']).score.mean().to_dict()
    other = zip(df.patient, df.eye.map(OTHER_EYE), strict=True)
    return np.array([mean.get(key, np.nan) if ok else np.nan for key, ok in zip(other, known, strict=True)], float)


@dataclass(frozen=True)
class EyesSpec:
    "What grades an image by the scores of both eyes: thresholds, prediction sets and decisions are of fused scores"
    fusion: Fusion
    thresholds: tuple[float, ...]
    coverage: float
    calibration: Calibration
    decision: DecisionSpec
    results: dict = field(default_factory=dict)            # cross-fitted: see `compare_readings`

    @property
    def predicts_by(self) -> list:
        "What its predictions depend on, for a digest"
        points = [[o.lowest_grade, o.threshold] for o in self.decision.points]
        return [asdict(self.fusion), self.thresholds, self.coverage, self.calibration,
                dict(asdict(self.decision), points=points)]

    def grade(self, own: ArrayLike, fellow: ArrayLike, prevalence: float | None = None) -> dict[str, np.ndarray]:
        """Return what is known of images (n,) by their own scores and those of the other eyes, a column each.

        The prediction sets use the one fused score for all folds.
        """
        score = self.fusion.predict(own, fellow)
        grade, low, high = grade_scores(score, self.thresholds, PredictionSets(self.coverage, self.calibration))
        names = np.array([GRADE_NAMES[g] for g in grade], object)
        return dict(score=score, grade=grade, grade_name=names, grade_low=low, grade_high=high,
                    **self.decision.decide(score, grade, high, prevalence))

    def fused_rows(self, scores: ArrayLike, people: pd.DataFrame, usable: ArrayLike,
                   prevalence: float | None = None) -> pd.DataFrame:
        """Return the columns of `grade` of the images that have a fellow; their index is the position of each.

        `people` has a row for each image with patient and eye; `usable` are the gradable images.
        """
        own, fellow = np.asarray(scores, float), fellow_scores(scores, people.patient, people.eye, usable)
        rows = np.flatnonzero(np.isfinite(fellow))
        return pd.DataFrame(self.grade(own[rows], fellow[rows], prevalence), index=rows)


def eyes_of_record(record: dict | None) -> EyesSpec | None:
    "Return the `EyesSpec` that a JSON record holds (`asdict` of one); None if there is none"
    if not record: return None
    calibration = tuple(tuple(tuple(fold) for fold in grade) for grade in record['calibration'])
    return EyesSpec(Fusion(**record['fusion']), tuple(record['thresholds']), record['coverage'], calibration,
                    decision_of_record(record['decision']), record['results'])


# Fitting

def cross_fitted(df: pd.DataFrame, parts: np.ndarray, how: str) -> pd.DataFrame:
    """Return `df` with score and grade by fusions and thresholds that are fitted on the other parts.

    `df` has the columns score, fellow and diagnosis. The grades of a part have no influence on what grades it: the
    thresholds for it are fitted to scores of the others by the fusion that they give.
    """
    score, grade = np.empty(len(df)), np.empty(len(df), int)
    y = df.diagnosis.to_numpy()
    for k in np.unique(parts):
        inside = parts == k
        fusion = Fusion.fit(df.score[~inside], df.fellow[~inside], y[~inside])
        found = fusion.predict(df.score, df.fellow)
        thresholds = fit_or_fixed(how, found[~inside], y[~inside])[0]
        score[inside], grade[inside] = found[inside], apply_thresholds(found[inside], thresholds)
    return df.assign(score=score, grade=grade)


def fit_or_fixed(how: str, scores: ArrayLike, grades: ArrayLike) -> tuple[np.ndarray, str]:
    "Return the thresholds of a setting and, if it asks for fitted ones and none can be fitted, the reason"
    fixed = parse_thresholds(how)
    return (np.array(fixed), '') if fixed else thresholds_or_midpoints(how, scores, grades)


def fit_eyes(df: pd.DataFrame, parts: np.ndarray, how: str, refer: Refer, coverage: float,
             chosen_on: str) -> tuple[EyesSpec, list[str]]:
    """Return what grades by both eyes, fitted to all of `df`, and warnings; its figures are cross-fitted over `parts`.

    `df` has, for images with a fellow, the columns score and grade (out-of-fold, graded alone), fellow, diagnosis and
    group. Thresholds, prediction sets and decision are fitted to the cross-fitted fused scores.
    """
    fused = cross_fitted(df, parts, how)
    thresholds, not_fitted = fit_or_fixed(how, fused.score, fused.diagnosis)
    sets = PredictionSets(coverage).fit(fused.score, fused.diagnosis)
    decision, notes = fit_decision(refer, fused, parts, chosen_on, coverage)
    own = cross_fitted(df.assign(fellow=0.), parts, how)
    results = compare_readings(df, fused) | dict(
        own_score=kappa_of(own, own.grade), gain_over_own_score=kappa_gain(own, fused),
        coverage=set_results(cross_fitted_sets(fused.assign(ungradable=''), parts, coverage), coverage)['coverage'])
    spec = EyesSpec(Fusion.fit(df.score, df.fellow, df.diagnosis), tuple(map(float, thresholds)), coverage,
                    sets.calibration_, decision, results)
    if not_fitted: notes.append(f'no thresholds could be fitted ({not_fitted}): the midpoints 0.5 1.5 2.5 3.5 are used')
    if spec.fusion.own == spec.fusion.fellow == 0:
        notes.append('neither score counts, so every fused image gets the same score: set [submit] eyes = single')
    if results['gain']['value'] is not None and results['gain']['value'] <= 0:
        notes.append('it does not raise kappa out-of-fold: [submit] eyes = single may be better')
    return spec, [f'fusion of the eyes: {note}' for note in notes]


# Figures

def kappa_gain(alone: pd.DataFrame, fused: pd.DataFrame) -> dict:
    "Return kappa of the fused grades minus kappa of the others of the same images, with its paired interval"
    value, *interval = paired_interval(alone.grade, fused.grade, fused.diagnosis, fused.group)
    return measure(value, interval, len(fused), 'all images have one grade')


def compare_readings(alone: pd.DataFrame, fused: pd.DataFrame) -> dict:
    """Return images, patients, kappa and AUC of grades and scores of the same images, alone and fused, and the gains.

    Both have the columns score, grade, diagnosis and group; intervals are over groups (patients).
    """
    referable = fused.diagnosis >= REFERABLE
    value, *interval = paired_auc(alone.score, fused.score, referable, fused.group)
    auc_gain = measure(value, interval, len(fused), 'all images are referable, or none is')
    return dict(images=len(fused), patients=int(fused.group.nunique()),
                alone=kappa_of(alone, alone.grade), fused=kappa_of(fused, fused.grade), gain=kappa_gain(alone, fused),
                auc_alone=auc_of(alone, REFERABLE), auc_fused=auc_of(fused, REFERABLE), auc_gain=auc_gain)


def evaluate_eyes(spec: EyesSpec, df: pd.DataFrame) -> dict | None:
    """Return how well images are graded alone and by both eyes, for evaluation.json; None if none has a fellow.

    `df` has score, grade, diagnosis, group, ungradable, patient and eye of graded images.
    """
    new = spec.fused_rows(df.score, df, df.ungradable == '')
    if not len(new): return None
    alone = df.iloc[new.index].reset_index(drop=True)
    fused = alone.assign(**{name: new[name].to_numpy() for name in new}).assign(ungradable='')
    called = pd.Series(spec.decision.positive(fused.score, fused.grade, REFERABLE))
    return compare_readings(alone, fused) | dict(
        coverage=set_results(fused, spec.coverage)['coverage'],
        **detection(called, fused.diagnosis >= REFERABLE, fused.group, 'no such image'))


def fused_text(fused: Iterable[bool]) -> str:
    "Return how many images were graded by both eyes: '12 of 20 images graded by both eyes, 8 alone'"
    fused = list(fused)
    n = sum(map(bool, fused))
    return f'{n} of {len(fused)} images graded by both eyes of the patient (fused), {len(fused) - n} alone'
