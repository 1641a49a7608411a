"Quadratic weighted kappa, grade thresholds, detection of referable retinopathy, prediction sets, and their intervals."
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from aptos_fastai.common.io import AptosError

GRADES = 5
GRADE_NAMES = ('no DR', 'mild', 'moderate', 'severe', 'proliferative')
REFERABLE = 2                                # lowest grade that is referred to an eye doctor (ICO 2017)
SIGHT_THREATENING = 3                        # lowest grade that threatens sight (without macular oedema)
MIDPOINTS = (.5, 1.5, 2.5, 3.5)              # thresholds that round a score to the nearest grade
PUBLISHED_THRESHOLDS = (.75, 1.5, 2.5, 3.5)  # of the published code
PRIOR_IMAGES = 100                           # `regularised` thresholds: the midpoints weigh as much as this many images
N_BOOTSTRAP = 10_000                         # bootstrap resamples of images
N_BOOTSTRAP_GROUPS = 2_000                          # bootstrap resamples of groups (patients), which take longer
CALIBRATION_IMAGES = 2_000                   # of each grade, at most, that the prediction sets are fitted on


def confusion(grades: ArrayLike, targs: ArrayLike) -> np.ndarray:
    "Return the 5 x 5 confusion matrix of counts: row = true grade, column = predicted grade"
    g, y = (check_grades(o) for o in (grades, targs))
    if len(g) != len(y): raise AptosError(f'{len(g)} grades and {len(y)} true grades. Give one of each for an image.')
    return np.bincount(y * GRADES + g, minlength=GRADES**2).reshape(GRADES, GRADES)


def check_grades(grades: ArrayLike) -> np.ndarray:
    "Return grades as integers (n,). Raises `AptosError` unless all of them are 0, 1, 2, 3 or 4"
    g = np.asarray(grades).ravel()
    wrong = g[~np.isin(g, np.arange(GRADES))]
    if len(wrong): raise AptosError(f'{wrong[0]} is no grade. Give whole numbers from 0 to {GRADES - 1}.')
    return g.astype(int)


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


def has_groups(groups: ArrayLike | None) -> bool:
    "Return whether any group (patient) has more than one image"
    return groups is not None and len(np.unique(np.asarray(groups))) < np.size(groups)


def bootstrap_counts(cells: ArrayLike, n_cells: int, groups: ArrayLike | None = None, *, n: int | None = None,
                     seed: int = 0) -> np.ndarray:
    """Return the counts (n, `n_cells`) of `n` bootstrap resamples of images that lie in `cells` (a number per image).

    With `groups` (a label per image) whole groups are resampled: images of a patient are not independent (Field and
    Welsh 2007). Groups with the same counts are drawn together, from one multinomial distribution; without groups
    that is the multinomial distribution of the cells.
    """
    rng = np.random.default_rng(seed)
    cell = np.asarray(cells, int).ravel()
    counts = np.bincount(cell, minlength=n_cells)
    if not has_groups(groups):
        return rng.multinomial(len(cell), counts / len(cell), n or N_BOOTSTRAP)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    per_group = np.zeros((group.max() + 1, n_cells), np.int64)
    np.add.at(per_group, (group, cell), 1)
    kinds, frequency = np.unique(per_group, axis=0, return_counts=True)
    draws = n or N_BOOTSTRAP_GROUPS
    chunk = max(1, 2_000_000 // len(kinds))              # resamples at once: 16 MB
    parts = []
    for i in range(0, draws, chunk):
        resampled = rng.multinomial(len(per_group), frequency / len(per_group), min(chunk, draws - i))
        parts.append(resampled @ kinds)
    return np.concatenate(parts)


def kappa_interval(grades: ArrayLike, targs: ArrayLike, groups: ArrayLike | None = None, *, n: int | None = None,
                   level: float = .95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of kappa.

    `groups` (a patient per image) are resampled whole: the interval over images is too narrow where the errors of a
    patient's images are alike.
    """
    g, y = (np.asarray(o, int).ravel() for o in (grades, targs))
    draws = bootstrap_counts(y * GRADES + g, GRADES**2, groups, n=n, seed=seed).reshape(-1, GRADES, GRADES)
    return _percentiles(kappa_from_confusion(draws), level)


def paired_interval(a: ArrayLike, b: ArrayLike, targs: ArrayLike, groups: ArrayLike | None = None, *,
                    n: int | None = None, level: float = .95, seed: int = 0) -> tuple[float, float, float]:
    """Return kappa of grades `b` minus kappa of grades `a` on the same images, and its bootstrap interval.

    Resamples the 5 x 5 x 5 table of counts (true, a, b): images, or whole `groups` (a patient per image).
    """
    y, a, b = (np.asarray(o, int).ravel() for o in (targs, a, b))
    cell = (y * GRADES + a) * GRADES + b

    def difference(counts: np.ndarray) -> np.ndarray:
        tables = counts.reshape(-1, GRADES, GRADES, GRADES)
        return kappa_from_confusion(tables.sum(2)) - kappa_from_confusion(tables.sum(3))
    value = difference(np.bincount(cell, minlength=GRADES**3))[0]
    draws = difference(bootstrap_counts(cell, GRADES**3, groups, n=n, seed=seed))
    return float(value), *_percentiles(draws, level)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], images: int, groups: ArrayLike | None = None, *,
              n: int = N_BOOTSTRAP_GROUPS, seed: int = 0) -> np.ndarray:
    """Return `statistic` (n, ...) of `n` bootstrap resamples of images, or of whole `groups` (a patient per image).

    `statistic` takes how often each image was drawn, (resamples, images), and returns a row for each resample.
    """
    group = np.arange(images) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    rng, n_groups = np.random.default_rng(seed), group.max() + 1
    chunk = max(1, 4_000_000 // images)                  # resamples at once: 32 MB
    drawn = (rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), min(chunk, n - i)) for i in range(0, n, chunk))
    return np.concatenate([statistic(counts[:, group].astype(float)) for counts in drawn])


def weighted_kappa(weights: np.ndarray, grades: ArrayLike, targs: ArrayLike) -> np.ndarray:
    "Return kappa (n,) of images that count `weights` (n, images) times"
    cell = np.asarray(targs, int) * GRADES + np.asarray(grades, int)
    return kappa_from_confusion((weights @ np.eye(GRADES ** 2)[cell]).reshape(-1, GRADES, GRADES))


def weighted_auc(weights: np.ndarray, scores: ArrayLike, positive: ArrayLike) -> np.ndarray:
    "Return the area under the ROC curve (n,) of images that count `weights` (n, images) times; nan without a class"
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    negatives = np.flatnonzero(~pos)[np.argsort(s[~pos])]
    below = np.zeros((len(weights), len(negatives) + 1))               # weight of the lowest 0, 1, 2 … negatives
    np.cumsum(weights[:, negatives], 1, out=below[:, 1:])
    lower, not_higher = (np.searchsorted(s[negatives], s[pos], side) for side in ('left', 'right'))
    wins = (weights[:, pos] * (below[:, lower] + below[:, not_higher])).sum(1) / 2       # a tie is half a win
    pairs = weights[:, pos].sum(1) * below[:, -1]
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def paired_auc(a: ArrayLike, b: ArrayLike, positive: ArrayLike, groups: ArrayLike | None = None, *,
               level: float = .95, seed: int = 0) -> tuple[float, float, float]:
    "Return the AUC of scores `b` minus that of scores `a` on the same images, and its bootstrap interval over `groups`"
    def difference(weights: np.ndarray) -> np.ndarray:
        return weighted_auc(weights, b, positive) - weighted_auc(weights, a, positive)
    images = np.size(a)
    return float(difference(np.ones((1, images)))[0]), *_percentiles(
        bootstrap(difference, images, groups, seed=seed), level)


DIFFERENCES = 'kappa', 'auc', 'mean_error'   # that `subgroup_differences` returns


def subgroup_differences(scores: ArrayLike, grades: ArrayLike, targs: ArrayLike, inside: ArrayLike,
                         groups: ArrayLike | None = None, *, level: float = .95,
                         seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Return the `DIFFERENCES` between a subgroup (`inside`) and the other images.

    They are kappa, the AUC of referable grades, and the mean error: the score minus the mean score of its true grade,
    so that another mix of grades is no difference. Each comes with its interval: the difference ± z SDs. The SD is the
    larger one of two: over bootstrap resamples of images, or of whole `groups`, which may have images on both sides;
    and over random subgroups of the same size, since resamples of few images that are graded well hardly differ.
    """
    from scipy.stats import norm  # imported here because it takes a second
    s, g, y = np.asarray(scores, float), np.asarray(grades, int), np.asarray(targs, int)
    mean_score = np.bincount(y, s, GRADES) / np.maximum(np.bincount(y, minlength=GRADES), 1)
    residual, inside = s - mean_score[y], np.asarray(inside, bool)

    def of_rows(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
        w = weights[:, rows]
        error = w @ residual[rows] / np.maximum(w.sum(1), 1)
        area = weighted_auc(w, s[rows], y[rows] >= REFERABLE)
        return np.stack([weighted_kappa(w, g[rows], y[rows]), area, error], 1)

    def difference(weights: np.ndarray, part: np.ndarray = inside) -> np.ndarray:
        return of_rows(weights, np.flatnonzero(part)) - of_rows(weights, np.flatnonzero(~part))
    once = np.ones((1, len(s)))
    value = difference(once)[0]
    random = [difference(once, part)[0] for part in _random_parts(inside, groups, seed)]
    sd = np.fmax(_sd_of_draws(bootstrap(difference, len(s), groups, seed=seed)), _sd_of_draws(np.array(random)))
    half = norm.ppf((1 + level) / 2) * sd
    return {name: (float(v), float(v - h), float(v + h)) for name, v, h in zip(DIFFERENCES, value, half, strict=True)}


def _random_parts(inside: np.ndarray, groups: ArrayLike | None, seed: int, n: int = 500) -> Iterator[np.ndarray]:
    "Yield `n` random masks with as many images as `inside`; whole groups are drawn where `inside` splits none"
    rng = np.random.default_rng(seed)
    group = np.arange(len(inside)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    share = np.bincount(group, inside) / np.bincount(group)
    if ((share > 0) & (share < 1)).any(): group, share = np.arange(len(inside)), inside.astype(float)
    for _ in range(n): yield rng.permutation(share > 0)[group]


def _sd_of_draws(draws: np.ndarray) -> np.ndarray:
    "Return the SD of each column of `draws` without its nan; nan if all are nan"
    finite = np.isfinite(draws)
    return np.array([o[ok].std() if ok.any() else np.nan for o, ok in zip(draws.T, finite.T, strict=True)])


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    "Return the ends of the interval that holds the fraction `level` of `draws`; nan if all are nan"
    if np.isnan(draws).all(): return np.nan, np.nan
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
        if not hasattr(self, 'thresholds_'): raise AptosError('GradeThresholds: not fitted. Call fit(scores, grades).')
        return apply_thresholds(scores, self.thresholds_)


def _check_fittable(s: np.ndarray, y: np.ndarray) -> None:
    "Raise `AptosError` if no thresholds can be fitted to scores `s` and grades `y`"
    problem = ''
    if not len(s) or len(s) != len(y): problem = f'{len(s)} scores and {len(y)} grades'
    elif not np.isfinite(s).all(): problem = f'{(~np.isfinite(s)).sum()} of {len(s)} scores are not finite numbers'
    else: problem = _nothing_to_separate(s, y)
    if problem: raise AptosError(f'cannot fit thresholds: {problem}')


def _nothing_to_separate(s: np.ndarray, y: np.ndarray) -> str:
    "Return which of scores `s` and grades `y` are all equal, or an empty text"
    if s.min() == s.max(): return f'all {len(s)} scores are {s[0]:g}'
    return f'all {len(y)} grades are {y[0]:g}' if y.min() == y.max() else ''


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
    return best if how == 'optimal' else _regularise(best, np.size(scores))


def _regularise(best: np.ndarray, n: int) -> np.ndarray:
    "Return the weighted mean of thresholds fitted to `n` images with the midpoints"
    return (n * best + PRIOR_IMAGES * np.array(MIDPOINTS)) / (n + PRIOR_IMAGES)


def thresholds_or_midpoints(how: str, scores: ArrayLike, grades: ArrayLike) -> tuple[np.ndarray, str]:
    """Return the thresholds of `fit_thresholds` and an empty text; the midpoints and the reason if none can be fitted.

    None can be fitted to equal scores, to a single grade, or where the best thresholds are one number, which gives
    only the grades 0 and 4. Raises `AptosError` for scores that are not finite.
    """
    s, y = np.asarray(scores, float).ravel(), np.asarray(grades, float).ravel()
    problem = _nothing_to_separate(s, y) if len(s) and np.isfinite(s).all() else ''
    if problem: return np.array(MIDPOINTS), problem
    best = GradeThresholds().fit(s, y).thresholds_
    if best[0] == best[-1]: return np.array(MIDPOINTS), f'the optimal thresholds are all {best[0]:.3g}'
    return best if how == 'optimal' else _regularise(best, len(s)), ''


def cross_fitted_grades(scores: ArrayLike, targs: ArrayLike, parts: ArrayLike, how: str = 'optimal') -> np.ndarray:
    """Return grades by cross-fitted thresholds: those of each part (`parts`: a label per image) are fitted on others.

    A part gets the midpoints where the others allow no fit (`thresholds_or_midpoints`).
    """
    s, y, part = np.asarray(scores, float), np.asarray(targs, int), np.asarray(parts)
    grades = np.empty(len(y), int)
    for k in np.unique(part):
        inside = part == k
        grades[inside] = apply_thresholds(s[inside], thresholds_or_midpoints(how, s[~inside], y[~inside])[0])
    return grades


def fit_weights(scores: ArrayLike, targs: ArrayLike) -> np.ndarray:
    """Return the weights (m,) of the columns of `scores` (n, m) whose weighted mean has the least squared error.

    None is negative and they add up to 1 (Breiman 1996, "Stacked regressions"). For weights of any sum t > 0 the errors
    of the members add up to t times those of a mean, so non-negative least squares with the further equation "the sum
    is 1" finds the weights of the best mean, times a t that is divided out.
    """
    from scipy.optimize import nnls  # imported here because it takes a second
    s, y = np.asarray(scores, float), np.asarray(targs, float)
    errors = (s - y[:, None]) / np.sqrt(len(y))
    weights, _ = nnls(np.vstack([errors, np.ones(s.shape[1])]), np.append(np.zeros(len(y)), 1.))
    return weights / weights.sum()


def cross_fitted_weights(scores: ArrayLike, targs: ArrayLike, parts: ArrayLike) -> np.ndarray:
    "Return weights (n, m): for each row of `scores` those by `fit_weights` on the other parts (a label per row)"
    s, y, part = np.asarray(scores, float), np.asarray(targs, float), np.asarray(parts)
    weights = np.empty(s.shape)
    for k in np.unique(part): weights[part == k] = fit_weights(s[part != k], y[part != k])
    return weights


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


def auc(scores: ArrayLike, positive: ArrayLike, groups: ArrayLike | None = None, *,
        level: float = .95) -> tuple[float, float, float]:
    """Return the area under the ROC curve and its interval; nan if one class is missing.

    The interval is DeLong's (1988); with `groups` (a patient per image) its extension to groups (Obuchowski 1997).
    """
    from scipy.stats import norm, rankdata  # imported here because it takes a second
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    n_pos, n_neg = pos.sum(), (~pos).sum()
    if not n_pos or not n_neg: return np.nan, np.nan, np.nan
    rank = rankdata(s)
    of_positives = (rank[pos] - rankdata(s[pos])) / n_neg              # fraction of negatives below each positive
    of_negatives = 1 - (rank[~pos] - rankdata(s[~pos])) / n_pos        # fraction of positives above each negative
    area = of_positives.mean()
    influence = np.empty(len(s))                                       # of each image on the area
    influence[pos] = (of_positives - area) / n_pos
    influence[~pos] = (of_negatives - area) / n_neg
    sd = np.sqrt(_auc_variance(influence, pos, np.arange(len(s)) if groups is None else np.asarray(groups)))
    z = norm.ppf((1 + level) / 2)
    return float(area), float(max(0, area - z * sd)), float(min(1, area + z * sd))


def _auc_variance(influence: np.ndarray, positive: np.ndarray, groups: np.ndarray) -> float:
    "Return the variance of the area: sums of the images' influence over groups, of each class and across classes"
    _, group = np.unique(groups, return_inverse=True)
    sums = [np.bincount(group, influence * of_class) for of_class in (positive, ~positive)]
    members = [len(np.unique(group[of_class])) for of_class in (positive, ~positive)]
    n_groups = len(sums[0])
    variance = sum((o ** 2).sum() * n / (n - 1) for o, n in zip(sums, members, strict=True) if n > 1)
    if n_groups > 1: variance += 2 * (sums[0] * sums[1]).sum() * n_groups / (n_groups - 1)
    return max(float(variance), 0.)


def sensitivity_at(scores: ArrayLike, positive: ArrayLike, specificity: float) -> tuple[float, float]:
    "Return (sensitivity, threshold) at the lowest score threshold whose specificity is at least `specificity`"
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    negatives = np.sort(s[~pos])
    needed = int(np.ceil(specificity * len(negatives)))                # negatives below the threshold
    last = min(len(negatives), needed) - 1
    threshold = np.nextafter(negatives[last], np.inf)
    return float((s[pos] >= threshold).mean()), float(threshold)


def upper_quantile(values: ArrayLike, fraction: float) -> float:
    "Return the quantile 1 - `fraction`, rounded up to one of `values`, so that at most that fraction exceeds it"
    return float(np.quantile(np.asarray(values, float), 1 - fraction, method='higher'))


def wilson_interval(k: float, n: float, level: float = .95) -> tuple[float, float]:
    "Return the Wilson interval (1927) of the proportion `k` / `n`; (0, 1) if `n` is 0"
    if not n: return 0., 1.
    from scipy.stats import norm  # imported here because it takes a second
    z2, p = norm.ppf((1 + level) / 2) ** 2, k / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return float(max(0, centre - half)), float(min(1, centre + half))


def proportion_interval(correct: ArrayLike, groups: ArrayLike | None = None, level: float = .95) -> tuple[float, float]:
    """Return the Wilson interval of the proportion of True values; (0, 1) if there is none.

    With `groups` (a patient per image) the number of images is divided by the design effect (Rao and Scott 1992):
    the variance over groups divided by that over images, at least 1. Where all values are equal, the groups count.
    """
    c = np.asarray(correct, bool)
    if not has_groups(groups): return wilson_interval(int(c.sum()), len(c), level)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n_groups, p = group.max() + 1, c.mean()
    effective = float(n_groups)
    if 0 < p < 1 and n_groups > 1:
        residuals = np.bincount(group, c - p)
        variance = n_groups / (n_groups - 1) * (residuals ** 2).sum() / len(c) ** 2
        effective = min(len(c), p * (1 - p) / variance) if variance else float(len(c))
    return wilson_interval(p * effective, effective, level)


def predictive_values(sensitivity: float, specificity: float, prevalence: float) -> tuple[float, float]:
    "Return the positive and the negative predictive value by Bayes' rule; nan if the test has no such result"
    true_positive, false_negative = sensitivity * prevalence, (1 - sensitivity) * prevalence
    true_negative, false_positive = specificity * (1 - prevalence), (1 - specificity) * (1 - prevalence)
    positive, negative = true_positive + false_positive, true_negative + false_negative
    return (true_positive / positive if positive else np.nan), (true_negative / negative if negative else np.nan)


Calibration = tuple[tuple[tuple[float, ...], ...], ...]       # grade -> fold -> sorted distances


class PredictionSets:
    """Predict sets of neighbouring grades that aim to contain the true grade with probability `coverage`.

    CV+ (Barber, Candès, Ramdas and Tibshirani 2021), for each true grade on its own (label-conditional: Vovk 2012;
    Sadinle, Lei and Wasserman 2019).
    Calibration: the n images of true grade g, each with its out-of-fold score and d_i = |score_i - g|.
    New image: D_k = |score_k - g|, where score_k is its score by the network of fold k.
    Grade g is in the set if d_i < D_(fold of i) for fewer than coverage * (n + 1) calibration images i.
    With one fold this is split conformal prediction. A grade with coverage * (n + 1) > n is in every set.
    Guaranteed is 2 * `coverage` - 1, for images that are exchangeable with the calibration images (the same cameras,
    clinics and graders, one image a patient) if these chose no epoch; it is usually near `coverage`.
    Fitted attributes: `calibration_`, the sorted d_i of each grade and fold, and `radius_` (5,), the largest distance
    at which each grade is in the set if the networks of all folds give the same score.
    """
    calibration_: Calibration

    def __init__(self, coverage: float = .9, calibration: Calibration = ()):
        if not 0 < coverage < 1: raise AptosError(f'coverage {coverage}: choose a number between 0 and 1, such as 0.9.')
        self.coverage, self.calibration_ = coverage, calibration or ((),) * GRADES

    def fit(self, scores: ArrayLike, grades: ArrayLike, folds: ArrayLike | None = None) -> 'PredictionSets':
        """Fit to out-of-fold scores (n,) and true grades (n,); `folds` (n,) says whose network gave each score.

        Keeps at most `CALIBRATION_IMAGES` distances of a grade, drawn with a fixed seed, to four decimals.
        """
        s, y = np.asarray(scores, float), check_grades(grades)
        if len(s) != len(y): raise AptosError(f'{len(s)} scores and {len(y)} grades. Give one of each for an image.')
        fold = np.zeros(len(y), int) if folds is None else np.unique(np.asarray(folds), return_inverse=True)[1]
        rng = np.random.default_rng(0)
        n_folds = fold.max() + 1
        calibration = []
        for g in range(GRADES):
            rows = np.flatnonzero(y == g)
            rows = rows[np.lexsort((fold[rows], s[rows]))]             # the draw does not depend on their order
            if len(rows) > CALIBRATION_IMAGES: rows = rng.choice(rows, CALIBRATION_IMAGES, replace=False)
            distance = np.abs(s[rows] - g).round(4)
            calibration.append(tuple(tuple(np.sort(distance[fold[rows] == k]).tolist()) for k in range(n_folds)))
        self.calibration_ = tuple(calibration)
        return self

    @property
    def radius_(self) -> np.ndarray:
        "The largest distance at which each grade is in the set where all folds agree; infinite: always"
        radius = np.full(GRADES, np.inf)
        for g, by_fold in enumerate(self.calibration_):
            distances = np.sort(np.concatenate([[], *by_fold]))
            k = int(np.ceil((len(distances) + 1) * self.coverage - 1e-9))
            if k <= len(distances): radius[g] = distances[k - 1]
        return radius

    def predict(self, scores: ArrayLike, grades: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return the (lowest, highest) grade of each set.

        `scores` are those of each fold (n, folds), or one for all folds (n,). The predicted `grades` (n,) are added
        and gaps are filled; both can only raise the coverage.
        """
        s = np.asarray(scores, float)
        s = s[:, None] if s.ndim == 1 else s
        inside = np.empty((len(s), GRADES), bool)
        for g, by_fold in enumerate(self.calibration_):
            smaller, n = np.zeros(len(s)), 0
            for k, distances in enumerate(by_fold):
                distance = np.abs(s[:, k if s.shape[1] > 1 else 0] - g).round(4)
                smaller += np.searchsorted(distances, distance)        # calibration images that are nearer
                n += len(distances)
            inside[:, g] = smaller < self.coverage * (n + 1) - 1e-9
        inside[np.arange(len(inside)), np.asarray(grades, int)] = True
        return inside.argmax(1), GRADES - 1 - inside[:, ::-1].argmax(1)


def grade_scores(scores: ArrayLike, thresholds: ArrayLike, prediction_sets: PredictionSets,
                 fold_scores: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (grade, grade_low, grade_high) of scores (n,): the grade and the ends of its prediction set.

    `fold_scores` (n, folds) are the scores of each fold's networks, whose mean the scores are.
    """
    grade = apply_thresholds(scores, thresholds)
    low, high = prediction_sets.predict(scores if fold_scores is None else fold_scores, grade)
    return grade, low, high


class ScoreKappa:
    """Compute kappa of score tensors, for fastai's `AccumMetric`; 0 where kappa is undefined.

    `thresholds` are four numbers, or a method (optimal, regularised): then they are fitted to the same scores, as the
    thresholds of a prediction are, and kappa is in-sample.
    """
    __name__ = 'kappa'

    def __init__(self, thresholds: ArrayLike | str = MIDPOINTS):
        self.thresholds = thresholds

    def __call__(self, preds: Any, targs: Any) -> float:
        "Return kappa of scores (n,) or (n, 1) against grades as floats"
        scores, grades = preds.float().cpu().numpy().ravel(), targs.cpu().numpy().round().ravel()
        thresholds = self.thresholds
        if isinstance(thresholds, str):
            finite = np.isfinite(scores).all()
            thresholds = thresholds_or_midpoints(thresholds, scores, grades)[0] if finite else MIDPOINTS
        kappa = quadratic_kappa(apply_thresholds(scores, thresholds), grades)
        return kappa if np.isfinite(kappa) else 0.
