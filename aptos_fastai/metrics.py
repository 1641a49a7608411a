"Quadratic weighted kappa, grade thresholds, detection of referable retinopathy, prediction sets, and their intervals."
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from aptos_fastai.common.io import AptosError

GRADES = 5
GRADE_NAMES = ('no DR', 'mild', 'moderate', 'severe', 'proliferative')
REFERABLE = 2                                # lowest grade that is referred to an eye doctor (ICO 2017)
MIDPOINTS = (.5, 1.5, 2.5, 3.5)              # thresholds that round a score to the nearest grade
PUBLISHED_THRESHOLDS = (.75, 1.5, 2.5, 3.5)  # of the published code
PRIOR_IMAGES = 100                           # `regularised` thresholds: the midpoints weigh as much as this many images


def confusion(grades: ArrayLike, targs: ArrayLike) -> np.ndarray:
    "Return the 5 x 5 confusion matrix of counts: row = true grade, column = predicted grade"
    g = np.asarray(grades, int).ravel()
    y = np.asarray(targs, int).ravel()
    return np.bincount(y * GRADES + g, minlength=GRADES**2).reshape(GRADES, GRADES)


def kappa_from_confusion(cm: np.ndarray) -> np.ndarray:
    "Return the quadratic weighted kappa (Cohen 1968) of confusion matrices (..., 5, 5); nan if there is only one grade"
    penalty = (np.arange(GRADES)[:, None] - np.arange(GRADES)) ** 2
    observed = (cm * penalty).sum((-2, -1))
    true_counts, predicted_counts, n = cm.sum(-1), cm.sum(-2), cm.sum((-2, -1))
    outer = true_counts[..., :, None] * predicted_counts[..., None, :]
    expected = (outer * penalty).sum((-2, -1)) / np.maximum(n, 1)
    return 1 - np.divide(observed, expected, out=np.full(np.shape(expected), np.nan), where=expected > 0)


def quadratic_kappa(grades: ArrayLike, targs: ArrayLike) -> float:
    "Return the same as sklearn's `cohen_kappa_score(targs, grades, weights='quadratic', labels=range(5))`"
    return float(kappa_from_confusion(confusion(grades, targs)))


def kappa_interval(grades: ArrayLike, targs: ArrayLike, *, n: int = 10_000, level: float = .95,
                   seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of kappa from `n` resamples.

    Resampling images is the same as drawing the confusion matrix from a multinomial distribution, which is faster.
    """
    cm = confusion(grades, targs)
    draws = np.random.default_rng(seed).multinomial(cm.sum(), cm.ravel() / cm.sum(), n).reshape(n, GRADES, GRADES)
    low, high = np.nanquantile(kappa_from_confusion(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(a: ArrayLike, b: ArrayLike, targs: ArrayLike, *, n: int = 10_000, level: float = .95,
                    seed: int = 0) -> tuple[float, float, float]:
    """Return kappa of grades `b` minus kappa of grades `a` on the same images, and its bootstrap interval.

    The 5 x 5 x 5 table of counts (true, a, b) is drawn from a multinomial distribution `n` times.
    """
    y, a, b = (np.asarray(o, int).ravel() for o in (targs, a, b))
    counts = np.bincount((y * GRADES + a) * GRADES + b, minlength=GRADES**3)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), n)
    tables = np.vstack([counts, draws]).reshape(-1, GRADES, GRADES, GRADES)
    difference = kappa_from_confusion(tables.sum(2)) - kappa_from_confusion(tables.sum(3))
    low, high = np.nanquantile(difference[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(difference[0]), float(low), float(high)


def apply_thresholds(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    "Return the grades 0-4 of scores; a score equal to a threshold gets the grade above it"
    return np.searchsorted(np.asarray(thresholds), np.asarray(scores), side='right')


class GradeThresholds:
    """Find the four thresholds that maximise quadratic weighted kappa: the global optimum, not a local one.

    1 - kappa = sum (y-g)^2 / sum (E[y^2] - 2 E[y] g + g^2), both sums over images. For a given ratio a dynamic
    programme over the sorted scores finds the best thresholds; Dinkelbach's iteration (1967) finds the smallest ratio.
    Fitted attributes: `thresholds_` (4,) and `kappa_`, which is in-sample and therefore too high.
    """
    thresholds_: np.ndarray
    kappa_: float

    def fit(self, scores: ArrayLike, grades: ArrayLike) -> 'GradeThresholds':
        "Fit to scores (n,) and true grades (n,). Raises `AptosError` if they cannot be separated"
        s, y = np.asarray(scores, float).ravel(), np.asarray(grades, float).ravel()
        _check_fittable(s, y)
        order = np.argsort(s, kind='stable')
        s, y = s[order], y[order]
        g = np.arange(GRADES)
        observed = (y[:, None] - g) ** 2
        expected = (y ** 2).mean() - 2 * y.mean() * g + g ** 2
        places = np.r_[0, np.flatnonzero(np.diff(s)) + 1, len(s)]      # a threshold lies between different scores
        sums = np.vstack([np.zeros(GRADES), np.cumsum(observed, 0)])[places]
        ratio, smallest = 1., np.inf
        while True:
            at = _cheapest_thresholds(sums - ratio * places[:, None] * expected)
            bounds = np.r_[0, at, len(places) - 1]
            total_observed = sum(sums[bounds[k + 1], k] - sums[bounds[k], k] for k in g)
            ratio = total_observed / (np.diff(places[bounds]) * expected).sum()
            if ratio >= smallest - 1e-12: break
            smallest, best = ratio, places[at]
        padded = np.r_[s[0] - 1, s, s[-1] + 1]                         # a grade without images gets a threshold outside
        self.thresholds_ = (padded[best] + padded[best + 1]) / 2
        self.kappa_ = float(1 - smallest)
        return self

    def predict(self, scores: ArrayLike) -> np.ndarray:
        "Return the grades 0-4 of scores"
        return apply_thresholds(scores, self.thresholds_)


def _check_fittable(s: np.ndarray, y: np.ndarray) -> None:
    "Raise `AptosError` if no thresholds can be fitted to scores `s` and grades `y`"
    problem = ''
    if not len(s) or len(s) != len(y): problem = f'{len(s)} scores and {len(y)} grades'
    elif not np.isfinite(s).all(): problem = f'{(~np.isfinite(s)).sum()} of {len(s)} scores are not finite numbers'
    elif s.min() == s.max(): problem = f'all {len(s)} scores are {s[0]:g}'
    elif y.min() == y.max(): problem = f'all {len(y)} grades are {y[0]:g}'
    if problem: raise AptosError(f'cannot fit thresholds: {problem}')


def _cheapest_thresholds(sums: np.ndarray) -> np.ndarray:
    """Return the indices of the four thresholds with the least total cost, by dynamic programming.

    `sums` (places, 5) holds, for each grade, the running sum of its cost over the sorted images.
    """
    total, choices = sums[:, 0], []
    for k in range(1, GRADES):
        switched = total - sums[:, k]                                  # cost if grade k starts at this place
        least = np.minimum.accumulate(switched)
        choices.append(np.maximum.accumulate(np.where(switched <= least, np.arange(len(switched)), 0)))
        total = least + sums[:, k]
    at = [len(sums) - 1]
    for choice in reversed(choices): at.append(choice[at[-1]])
    return np.array(at[:0:-1])


def fit_thresholds(how: str, scores: ArrayLike, grades: ArrayLike) -> np.ndarray:
    """Return the thresholds of the kind `how`, fitted to scores (n,) and true grades (n,).

    optimal: the thresholds of the highest kappa. regularised: their weighted mean with the midpoints 0.5 1.5 2.5 3.5,
    which weigh as much as `PRIOR_IMAGES` images; with few images they stay near the midpoints.
    """
    best = GradeThresholds().fit(scores, grades).thresholds_
    if how == 'optimal': return best
    n = np.size(scores)
    return (n * best + PRIOR_IMAGES * np.array(MIDPOINTS)) / (n + PRIOR_IMAGES)


def cross_fitted_grades(scores: ArrayLike, targs: ArrayLike, parts: ArrayLike, how: str = 'optimal') -> np.ndarray:
    "Return grades by cross-fitted thresholds: those of each part (`parts`: a label per image) are fitted on the others"
    s, y, part = np.asarray(scores, float), np.asarray(targs, int), np.asarray(parts)
    grades = np.empty(len(y), int)
    for k in np.unique(part):
        inside = part == k
        grades[inside] = apply_thresholds(s[inside], fit_thresholds(how, s[~inside], y[~inside]))
    return grades


def stratified_group_parts(targs: ArrayLike, groups: ArrayLike, n: int = 5) -> np.ndarray:
    """Return a part 0 … `n`-1 for each image: grades spread evenly, a group never split.

    Groups are sorted by their highest grade and name and dealt out in turn, so the order of rows does not matter.
    """
    names, group = np.unique(np.asarray(groups, str), return_inverse=True)
    highest = np.full(len(names), -np.inf)
    np.maximum.at(highest, group, np.asarray(targs))
    part = np.empty(len(names), int)
    part[np.lexsort((names, highest))] = np.arange(len(names)) % n
    return part[group]


def auc(scores: ArrayLike, positive: ArrayLike, *, level: float = .95) -> tuple[float, float, float]:
    "Return the area under the ROC curve and its DeLong interval (1988); nan if one class is missing"
    from scipy.stats import norm, rankdata  # imported here because it takes a second
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    n_pos, n_neg = pos.sum(), (~pos).sum()
    if not n_pos or not n_neg: return np.nan, np.nan, np.nan
    rank = rankdata(s)
    of_positives = (rank[pos] - rankdata(s[pos])) / n_neg              # share of negatives below each positive
    of_negatives = 1 - (rank[~pos] - rankdata(s[~pos])) / n_pos        # share of positives above each negative
    area = of_positives.mean()
    sd = np.sqrt(sum(o.var(ddof=1) / len(o) for o in (of_positives, of_negatives) if len(o) > 1))
    z = norm.ppf((1 + level) / 2)
    return float(area), float(max(0, area - z * sd)), float(min(1, area + z * sd))


def sensitivity_at(scores: ArrayLike, positive: ArrayLike, specificity: float) -> tuple[float, float]:
    "Return (sensitivity, threshold) at the lowest score threshold whose specificity is at least `specificity`"
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    negatives = np.sort(s[~pos])
    needed = int(np.ceil(specificity * len(negatives)))                # negatives below the threshold
    last = min(len(negatives), needed) - 1
    threshold = np.nextafter(negatives[last], np.inf)
    return float((s[pos] >= threshold).mean()), float(threshold)


def wilson_interval(k: int, n: int, level: float = .95) -> tuple[float, float]:
    "Return the Wilson interval (1927) of the proportion `k` / `n`; (0, 1) if `n` is 0"
    if not n: return 0., 1.
    from scipy.stats import binomtest  # imported here because it takes a second
    interval = binomtest(k, n).proportion_ci(level, method='wilson')
    return float(interval.low), float(interval.high)


class PredictionSets:
    """Return sets of neighbouring grades that contain the true grade with probability `coverage`, for every true grade.

    Label-conditional split conformal prediction (Vovk 2012; Sadinle, Lei and Wasserman 2019) with the distance
    |score - grade|. Fit on out-of-fold scores. A grade with too few images for the coverage is in every set.
    Fitted attribute: `radius_` (5,), the largest distance at which each grade is in the set.
    """
    radius_: np.ndarray

    def __init__(self, coverage: float = .9):
        self.coverage = coverage

    def fit(self, scores: ArrayLike, grades: ArrayLike) -> 'PredictionSets':
        "Fit the radius of each grade to out-of-fold scores (n,) and true grades (n,)"
        s, y = np.asarray(scores, float), np.asarray(grades, int)
        self.radius_ = np.full(GRADES, np.inf)
        for g in range(GRADES):
            distances = np.sort(np.abs(s[y == g] - g))
            k = int(np.ceil((len(distances) + 1) * self.coverage))
            if k <= len(distances): self.radius_[g] = distances[k - 1]
        return self

    def predict(self, scores: ArrayLike, grades: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the (lowest, highest) grade of each set.

        The predicted `grades` are added and gaps are filled; both can only raise the coverage.
        """
        distances = np.abs(np.asarray(scores, float)[:, None] - np.arange(GRADES))
        inside = distances <= self.radius_
        inside[np.arange(len(inside)), np.asarray(grades, int)] = True
        return inside.argmax(1), GRADES - 1 - inside[:, ::-1].argmax(1)


def grade_scores(scores: ArrayLike, thresholds: ArrayLike,
                 prediction_sets: PredictionSets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Return (grade, grade_low, grade_high) of scores: the grade and the ends of its prediction set"
    grade = apply_thresholds(scores, thresholds)
    low, high = prediction_sets.predict(scores, grade)
    return grade, low, high


class ScoreKappa:
    "Compute kappa of score tensors at fixed `thresholds`, for fastai's `AccumMetric`; 0 where kappa is undefined"
    __name__ = 'kappa'

    def __init__(self, thresholds: ArrayLike = MIDPOINTS):
        self.thresholds = thresholds

    def __call__(self, preds: Any, targs: Any) -> float:
        "Return kappa of scores (n,) or (n, 1) against grades as floats"
        grades = apply_thresholds(preds.float().cpu().numpy(), self.thresholds)
        kappa = quadratic_kappa(grades, targs.cpu().numpy().round())
        return kappa if np.isfinite(kappa) else 0.
