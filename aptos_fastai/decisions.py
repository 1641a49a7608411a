"Decisions from scores: operating points, calibrated probabilities of grades, net benefit."
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from aptos_fastai.common.io import AptosError
from aptos_fastai.metrics import GRADES, REFERABLE, SIGHT_THREATENING, bootstrap, proportion_interval

LEVELS = {REFERABLE: 'referable', SIGHT_THREATENING: 'sight_threatening'}     # lowest grade -> name
REFER, DO_NOT_REFER, UNCERTAIN_REFER = 'refer', 'do not refer', 'uncertain: refer'
NOT_GRADABLE = 'not gradable'
UNGRADABLE = 'ungradable'                    # in the columns referable, sight_threatening
DECISION_COLUMNS = ('decision', 'referable', 'sight_threatening', 'referable_high_specificity')
P_GRADES = tuple(f'p_{grade}' for grade in range(GRADES))
P_COLUMNS = ('p_referable', 'p_sight_threatening', *P_GRADES)
NEVER = 1e6                                  # intercept of a question that no image answers with yes
PENALTY = 1e3                                # inverse strength of the ridge penalty: next to none, keeps the fit finite


def level_label(lowest_grade: int) -> str:
    "Return a level for people: referable or sight-threatening"
    return LEVELS[lowest_grade].replace('_', '-')


# Operating points

@dataclass(frozen=True)
class OperatingPoint:
    "The lowest score that is called positive for the grades from `lowest_grade` on, and what it was chosen for"
    lowest_grade: int                        # 2: referable, 3: sight-threatening
    target: str                              # sensitivity | specificity | threshold
    value: float                             # of the target
    threshold: float
    chosen_on: str = ''                      # the images whose scores chose it
    sensitivity: dict = field(default_factory=dict)       # cross-fitted: value, interval, images, reason
    specificity: dict = field(default_factory=dict)
    note: str = ''                           # what a reader must know of it

    @property
    def name(self) -> str:
        "What it detects: referable or sight_threatening"
        return LEVELS[self.lowest_grade]

    @property
    def label(self) -> str:
        "The same for people: referable or sight-threatening"
        return level_label(self.lowest_grade)

    @property
    def target_text(self) -> str:
        "What it was chosen for: 'sensitivity 0.90'"
        return f'{self.target} {self.value:.{2 if round(self.value, 2) == self.value else 3}f}'


def choose_threshold(scores: ArrayLike, positive: ArrayLike, target: str, value: float) -> tuple[float, str]:
    """Return the score threshold with a sensitivity or specificity of at least `value`, and a note.

    `scores` (n,) from the threshold on are called positive. For a sensitivity it is at most the j-th lowest score of
    the m positives, j = floor((1 - value) (m + 1)): a new one, exchangeable with these, is below that with probability
    j / (m + 1), at most 1 - value (an order statistic, as in conformal prediction: Vovk 2012). Of the thresholds with
    the highest specificity, which lie between two negatives, it is the one with the highest sensitivity. For a
    specificity the same holds with the classes exchanged. Where m is too small for the target, all m are called
    rightly, and the note says so. nan without a class.
    """
    if target == 'threshold': return float(value), ''
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    if not pos.any() or pos.all(): return np.nan, f'all {len(s)} images are {"positive" if pos.any() else "negative"}'
    of_class = np.sort(s[pos]) if target == 'sensitivity' else np.sort(s[~pos])[::-1]
    j = int(np.floor((1 - value) * (len(of_class) + 1) + 1e-9))
    few = f'too few images ({len(of_class)}) for {target} {value:g}: the threshold classifies all of them correctly'
    return _widest_gap(s[pos], s[~pos], of_class[max(j, 1) - 1], target), '' if j else few


def _widest_gap(positives: np.ndarray, negatives: np.ndarray, limit: float, target: str) -> float:
    """Return the threshold between the highest negative below and the lowest positive above it.

    The positive from `limit` down (sensitivity), or the negative from `limit` up (specificity), stays on its side.
    """
    if target == 'sensitivity':
        below = negatives[negatives < limit]
        if not len(below): return float(positives.min())
        return float((below.max() + positives[positives > below.max()].min()) / 2)
    above = positives[positives > limit]
    if not len(above): return float(np.nextafter(max(negatives.max(), limit), np.inf))
    return float((above.min() + negatives[negatives < above.min()].max()) / 2)


def cross_fitted_thresholds(scores: ArrayLike, positive: ArrayLike, parts: ArrayLike, target: str,
                            value: float) -> np.ndarray:
    "Return for each image (n,) the threshold that the other `parts` choose; nan where they lack a class"
    s, pos, part = np.asarray(scores, float), np.asarray(positive, bool), np.asarray(parts)
    thresholds = np.empty(len(s))
    for k in np.unique(part):
        others = part != k
        thresholds[part == k] = choose_threshold(s[others], pos[others], target, value)[0]
    return thresholds


# Probabilities

@dataclass(frozen=True)
class Probabilities:
    """Probabilities of the grades given a score: an ordinal logistic model with one slope (McCullagh 1980).

    It is fitted as pooled logistic regressions, which needs no solver of its own: consistent, not maximum likelihood.
    P(grade >= k) = 1 / (1 + exp(`intercepts`[k - 1] - `slope` * score)), for k = 1 … 4. `shares` (5,) are the grades
    that it was fitted on.
    """
    slope: float
    intercepts: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def fit(cls, scores: ArrayLike, grades: ArrayLike) -> 'Probabilities':
        """Fit to scores (n,) and true grades (n,): one logistic regression of all four cumulative questions at once.

        It has one slope, so that the four never cross. A grade above all of `grades`, or below them, gets
        probability 0.
        """
        from sklearn.linear_model import LogisticRegression  # imported here because it takes a second
        s, y = np.asarray(scores, float), np.asarray(grades, int)
        above = y[:, None] >= np.arange(1, GRADES)                     # (n, 4)
        shares = tuple((np.bincount(y, minlength=GRADES) / len(y)).tolist())
        intercepts, slope = np.where(above.all(0), -NEVER, NEVER), 0.
        asked = above.any(0) & ~above.all(0)
        k = int(asked.sum())
        if k:
            x = np.c_[np.repeat(s - s.mean(), k), -np.tile(np.eye(k), (len(s), 1))]
            fit = LogisticRegression(C=PENALTY, fit_intercept=False, max_iter=2000, tol=1e-8)
            slope, *centred = fit.fit(x, above[:, asked].ravel()).coef_[0].tolist()
            intercepts[asked] = np.maximum.accumulate(np.array(centred) + slope * s.mean())
        return cls(float(slope), tuple(intercepts.tolist()), shares)

    def predict(self, scores: ArrayLike, prevalence: float | None = None) -> np.ndarray:
        """Return the probability of each grade (n, 5).

        With `prevalence`, the odds of referable grades are those of a population in which they have this share, if the
        scores of referable and of other eyes are distributed there as here (Bayes' rule; Saerens et al. 2002).
        """
        from scipy.special import expit  # imported here because it takes a second
        s = np.asarray(scores, float)[:, None]
        at_least = expit(self.slope * s - np.array(self.intercepts))
        ends = np.ones((len(s), 1)), np.zeros((len(s), 1))
        p = -np.diff(np.hstack([ends[0], at_least, ends[1]]), axis=1)
        own = sum(self.shares[REFERABLE:])
        if prevalence is None or not 0 < own < 1: return p
        weights = np.full(GRADES, (1 - prevalence) / (1 - own))
        weights[REFERABLE:] = prevalence / own
        return p * weights / (p * weights).sum(1, keepdims=True)


def cross_fitted_probabilities(scores: ArrayLike, grades: ArrayLike, parts: ArrayLike,
                               fit: Callable = Probabilities.fit) -> np.ndarray:
    "Return the probabilities (n, 5) of each part's images by a calibration that was fitted on the other parts"
    s, y, part = np.asarray(scores, float), np.asarray(grades, int), np.asarray(parts)
    p = np.empty((len(s), GRADES))
    for k in np.unique(part):
        inside = part == k
        p[inside] = np.nan if inside.all() else fit(s[~inside], y[~inside]).predict(s[inside])
    return p


def brier_score(p: ArrayLike, positive: ArrayLike, groups: ArrayLike | None = None,
                level: float = .95) -> tuple[float, float, float]:
    "Return the Brier score (1950), the mean of (p - positive)², and its bootstrap interval over images or `groups`"
    squares = (np.asarray(p, float) - np.asarray(positive, float)) ** 2
    draws = bootstrap(lambda weights: (weights @ squares) / weights.sum(1), len(squares), groups)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(squares.mean()), float(low), float(high)


def reliability(p: ArrayLike, positive: ArrayLike, groups: ArrayLike | None = None, bins: int = 10) -> list[dict]:
    """Return, for `bins` bins of equally many images by probability, the mean of p and the share of positives.

    Each bin is a dict: predicted, observed, interval (Wilson, over images or `groups`), images.
    """
    p, pos = np.asarray(p, float), np.asarray(positive, bool)
    group = np.arange(len(p)) if groups is None else np.asarray(groups)
    order = np.argsort(p, kind='stable')
    return [dict(predicted=float(p[rows].mean()), observed=float(pos[rows].mean()),
                 interval=list(proportion_interval(pos[rows], group[rows])), images=len(rows))
            for rows in np.array_split(order, min(bins, len(p)))]


def net_benefit(referred: ArrayLike, positive: ArrayLike, p: ArrayLike) -> np.ndarray:
    """Return the net benefit (k,) of referring the images `referred` (k, n), for each threshold probability `p` (k,).

    Net benefit (Vickers and Elkin 2006): true positives minus false positives times p / (1 - p), as a share of all
    images. p is the probability from which a referral is worth more than it costs.
    """
    referred, pos = np.atleast_2d(np.asarray(referred, bool)), np.asarray(positive, bool)
    odds = np.asarray(p, float) / (1 - np.asarray(p, float))
    return (referred & pos).mean(1) - (referred & ~pos).mean(1) * odds


# What a model decides

@dataclass(frozen=True)
class DecisionSpec:
    """All that turns scores into decisions. The default has no operating point: grade 2 and above are referable.

    The first of the `points` of a level decides; a second one of the referable level stands beside it.
    """
    points: tuple[OperatingPoint, ...] = ()
    probabilities: Probabilities | None = None
    uncertain: str = 'decide'                # decide | refer: an image whose prediction set reaches a referable grade
    prevalence: float | None = None          # of referable images where the model is used; None: as validated

    def point(self, lowest_grade: int, which: int = 0) -> OperatingPoint | None:
        "Return the first or a further operating point of a level; None if there is none"
        of_level = [o for o in self.points if o.lowest_grade == lowest_grade]
        return of_level[which] if which < len(of_level) else None

    def positive(self, scores: ArrayLike, grades: ArrayLike, lowest_grade: int) -> np.ndarray:
        "Return which images (n,) are called positive for the grades from `lowest_grade` on"
        point = self.point(lowest_grade)
        return np.asarray(grades) >= lowest_grade if point is None else np.asarray(scores, float) >= point.threshold

    def decide(self, scores: ArrayLike, grades: ArrayLike, grade_high: ArrayLike,
               prevalence: float | None = None) -> dict[str, np.ndarray]:
        """Return `DECISION_COLUMNS` and `P_COLUMNS` of graded images (n,): texts and probabilities.

        `grade_high` is the highest grade of each prediction set. Without calibration the probabilities are nan.
        """
        s = np.asarray(scores, float)
        if not np.isfinite(s).all(): raise AptosError(f'{(~np.isfinite(s)).sum()} scores are not finite numbers')
        by_score, sight = (self.positive(s, grades, level) for level in LEVELS)
        uncertain = ~by_score & (np.asarray(grade_high) >= REFERABLE) & (self.uncertain == 'refer')
        second = self.point(REFERABLE, 1)
        beside = np.full(len(s), '', object) if second is None else _yes_or_no(s >= second.threshold)
        decision = np.where(by_score, REFER, np.where(uncertain, UNCERTAIN_REFER, DO_NOT_REFER)).astype(object)
        texts = (decision, _yes_or_no(by_score | uncertain), _yes_or_no(sight), beside)
        p = np.full((len(s), GRADES), np.nan)
        if self.probabilities: p = self.probabilities.predict(s, prevalence or self.prevalence)
        numbers = (p[:, REFERABLE:].sum(1), p[:, SIGHT_THREATENING:].sum(1), *p.T)
        return dict(zip((*DECISION_COLUMNS, *P_COLUMNS), (*texts, *numbers), strict=True))


def _yes_or_no(condition: np.ndarray) -> np.ndarray: return np.where(condition, 'yes', 'no').astype(object)


def without_ungradable(df: pd.DataFrame, ungradable: pd.Series) -> pd.DataFrame:
    "Return graded images whose `ungradable` rows have no decision but that, and no probabilities"
    df = df.copy()
    df.loc[ungradable, list(P_COLUMNS)] = np.nan
    df.loc[ungradable, ['referable', 'sight_threatening']] = UNGRADABLE
    df.loc[ungradable & (df.referable_high_specificity != ''), 'referable_high_specificity'] = UNGRADABLE
    df.loc[ungradable, 'decision'] = NOT_GRADABLE
    return df


def decision_of_record(record: dict) -> DecisionSpec:
    "Return the `DecisionSpec` that a JSON record holds (`asdict` of one)"
    p = record['probabilities']
    points = tuple(OperatingPoint(**point) for point in record['points'])
    probabilities = p and Probabilities(p['slope'], tuple(p['intercepts']), tuple(p['shares']))
    return DecisionSpec(points, probabilities, record['uncertain'], record['prevalence'])
