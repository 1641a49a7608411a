"Quadratic weighted kappa, the thresholds that turn scores into grades, what is told of referable retinopathy, prediction sets, and intervals."
import numpy as np

from aptos_fastai.common.io import AptosError

GRADES = 5
GRADE_NAMES = ('no DR', 'mild', 'moderate', 'severe', 'proliferative')
REFERABLE = 2                                # moderate and above is referred (ICO 2017)
MIDPOINTS = (.5, 1.5, 2.5, 3.5)
PUBLISHED_THRESHOLDS = (.75, 1.5, 2.5, 3.5)             # of the published code
PRIOR_IMAGES = 100                                  # images that the midpoints count for in `regularised` thresholds


def confusion(grades, targs) -> np.ndarray:
    "5 x 5 counts: row = true grade, column = given grade"
    g, y = np.asarray(grades, int).ravel(), np.asarray(targs, int).ravel()
    return np.bincount(y * GRADES + g, minlength=GRADES**2).reshape(GRADES, GRADES)


def kappa_of(cm: np.ndarray) -> np.ndarray:
    "Quadratic weighted kappa (Cohen 1968) of confusion matrices, shape (..., 5, 5); nan where only one grade stands"
    d = (np.arange(GRADES)[:, None] - np.arange(GRADES)) ** 2
    seen = (cm * d).sum((-2, -1))
    rows, cols, n = cm.sum(-1), cm.sum(-2), cm.sum((-2, -1))
    chance = (rows[..., :, None] * cols[..., None, :] * d).sum((-2, -1)) / np.maximum(n, 1)
    return 1 - np.divide(seen, chance, out=np.full(np.shape(chance), np.nan), where=chance > 0)


def quadratic_kappa(grades, targs) -> float:
    "sklearn's `cohen_kappa_score(targs, grades, weights='quadratic', labels=range(5))`"
    return float(kappa_of(confusion(grades, targs)))


def kappa_interval(grades, targs, *, n: int = 10_000, level: float = .95, seed: int = 0) -> tuple[float, float]:
    "Bootstrap interval (percentile) of kappa: resampling images is drawing the confusion matrix from a multinomial"
    cm = confusion(grades, targs)
    draws = np.random.default_rng(seed).multinomial(cm.sum(), cm.ravel() / cm.sum(), n).reshape(n, GRADES, GRADES)
    lo, hi = np.nanquantile(kappa_of(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def paired_interval(a, b, targs, *, n: int = 10_000, level: float = .95, seed: int = 0) -> tuple[float, float, float]:
    "Kappa of grades `b` minus kappa of grades `a` of the same images, and its bootstrap interval: the table (true, a, b) drawn from a multinomial"
    y, a, b = (np.asarray(o, int).ravel() for o in (targs, a, b))
    cells = np.bincount((y * GRADES + a) * GRADES + b, minlength=GRADES**3)
    draws = np.vstack([cells, np.random.default_rng(seed).multinomial(cells.sum(), cells / cells.sum(), n)]).reshape(-1, GRADES, GRADES, GRADES)
    d = kappa_of(draws.sum(2)) - kappa_of(draws.sum(3))
    lo, hi = np.nanquantile(d[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(d[0]), float(lo), float(hi)


def apply_thresholds(scores, thresholds) -> np.ndarray:
    "Grades 0-4 of scores: a score at a cut belongs to the grade above it"
    return np.searchsorted(np.asarray(thresholds), np.asarray(scores), side='right')


class GradeThresholds:
    """The four thresholds that maximise quadratic weighted kappa: the global optimum, not a local one.

    1 - kappa = sum (y-g)^2 / sum (E[y^2] - 2 E[y] g + g^2), both sums over images, so for a given ratio the best monotone grades follow
    from a dynamic programme over the sorted scores, and Dinkelbach's iteration (1967) finds the smallest ratio.
    Fitted state: `thresholds_` (4,), `kappa_` (in-sample: report it only as such).
    """
    def fit(self, scores, grades) -> 'GradeThresholds':
        s, y = np.asarray(scores, float).ravel(), np.asarray(grades, float).ravel()
        if not len(s) or len(s) != len(y): raise AptosError(f'thresholds cannot be fitted: {len(s)} scores and {len(y)} grades')
        if not np.isfinite(s).all(): raise AptosError(f'thresholds cannot be fitted: {(~np.isfinite(s)).sum()} of {len(s)} scores are not numbers')
        if s.min() == s.max(): raise AptosError(f'thresholds cannot be fitted: all {len(s)} scores are {s[0]:g}')
        if y.min() == y.max(): raise AptosError(f'thresholds cannot be fitted: all {len(y)} grades are {y[0]:g}')
        o = np.argsort(s, kind='stable')
        s, y = s[o], y[o]
        g = np.arange(GRADES)
        seen, chance = (y[:, None] - g) ** 2, (y ** 2).mean() - 2 * y.mean() * g + g ** 2
        places = np.r_[0, np.flatnonzero(np.diff(s)) + 1, len(s)]      # thresholds fall only between different scores
        sums = np.vstack([np.zeros(GRADES), np.cumsum(seen, 0)])[places]
        ratio, cut = np.inf, self._best(sums - places[:, None] * chance)
        while True:
            b = np.r_[0, cut, len(places) - 1]
            new = sum(sums[b[k + 1], k] - sums[b[k], k] for k in g) / (np.diff(places[b]) * chance).sum()
            if new >= ratio - 1e-12: break
            ratio, at = new, places[cut]
            cut = self._best(sums - ratio * places[:, None] * chance)
        ends = np.r_[s[0] - 1, s, s[-1] + 1]                             # a grade that nothing gets lies beyond the scores
        self.thresholds_, self.kappa_ = (ends[at] + ends[at + 1]) / 2, float(1 - ratio)
        return self

    @staticmethod
    def _best(cost: np.ndarray) -> np.ndarray:
        "Indices into the places of the four thresholds of least total cost; `cost` (places, 5) are running sums"
        v, back = cost[:, 0], []
        for k in range(1, GRADES):
            gain = v - cost[:, k]
            low = np.minimum.accumulate(gain)
            back.append(np.maximum.accumulate(np.where(gain <= low, np.arange(len(gain)), 0)))
            v = low + cost[:, k]
        cut = [len(cost) - 1]
        for b in reversed(back): cut.append(b[cut[-1]])
        return np.array(cut[:0:-1])

    def predict(self, scores) -> np.ndarray: return apply_thresholds(scores, self.thresholds_)


def fit_thresholds(how: str, scores, grades) -> np.ndarray:
    """The thresholds that `how` names: optimal, or regularised, their mean with the midpoints (.5 1.5 2.5 3.5), which count for `PRIOR_IMAGES` images:
    few images stay near the midpoints, many reach the optimum."""
    best = GradeThresholds().fit(scores, grades).thresholds_
    n = np.size(scores)
    return best if how == 'optimal' else (n * best + PRIOR_IMAGES * np.array(MIDPOINTS)) / (n + PRIOR_IMAGES)


def nested_grades(scores, targs, parts, how: str = 'optimal') -> np.ndarray:
    "Grades by thresholds that never saw the image they grade, nor its part (`parts`, a label for each): fitted on all other parts"
    s, y, parts = np.asarray(scores, float), np.asarray(targs, int), np.asarray(parts)
    out = np.empty(len(y), int)
    for k in np.unique(parts):
        mine = parts == k
        out[mine] = apply_thresholds(s[mine], fit_thresholds(how, s[~mine], y[~mine]))
    return out


def even_parts(targs, groups, n: int = 5) -> np.ndarray:
    "`n` parts that hold like shares of each grade and never divide a group; the same whatever the order of the rows"
    y, g = np.asarray(targs), np.asarray(groups, str)
    names, at = np.unique(g, return_inverse=True)
    top = np.full(len(names), -np.inf)
    np.maximum.at(top, at, y)
    part = np.empty(len(names), int)
    part[np.lexsort((names, top))] = np.arange(len(names)) % n
    return part[at]


def auc(scores, positive, *, level: float = .95) -> tuple[float, float, float]:
    "Area under the ROC curve and its interval by DeLong's variance (1988); nan where one of the two kinds is missing"
    from scipy.stats import norm, rankdata
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    m, n = pos.sum(), (~pos).sum()
    if not m or not n: return np.nan, np.nan, np.nan
    rank = rankdata(s)
    above = (rank[pos] - rankdata(s[pos])) / n                           # share of negatives below each positive
    below = 1 - (rank[~pos] - rankdata(s[~pos])) / m
    a = above.mean()
    sd = np.sqrt(sum(o.var(ddof=1) / len(o) for o in (above, below) if len(o) > 1))
    z = norm.ppf((1 + level) / 2)
    return float(a), float(max(0, a - z * sd)), float(min(1, a + z * sd))


def sensitivity_at(scores, positive, specificity: float) -> tuple[float, float]:
    "(sensitivity, threshold) at the lowest score threshold whose specificity is at least `specificity`"
    s, pos = np.asarray(scores, float), np.asarray(positive, bool)
    neg = np.sort(s[~pos])
    t = np.nextafter(neg[min(len(neg) - 1, int(np.ceil(specificity * len(neg))) - 1)], np.inf)
    return float((s[pos] >= t).mean()), float(t)


def share_interval(k, n, z: float = 1.96) -> tuple[float, float]:
    "Wilson's interval (1927) of a share of `k` in `n`"
    if not n: return 0., 1.
    p, c = k / n, z * z / n
    half = z * np.sqrt(p * (1 - p) / n + c / n / 4)
    return float((p + c / 2 - half) / (1 + c)), float((p + c / 2 + half) / (1 + c))


class PredictionSets:
    """Runs of grades that hold the true one with probability `coverage`, whichever grade is the true one.

    Label-conditional split conformal prediction (Vovk 2012; Sadinle, Lei and Wasserman 2019) with distance |score - grade|: `fit` on out-of-fold scores;
    a grade with too few images to promise anything is in every set. `predict` fills gaps and adds the given grade, which only raises coverage.
    Fitted state: `radius_` (5,), the distance up to which each grade is in the set.
    """
    def __init__(self, coverage: float = .9): self.coverage = coverage

    def fit(self, scores, grades) -> 'PredictionSets':
        s, y = np.asarray(scores, float), np.asarray(grades, int)
        self.radius_ = np.full(GRADES, np.inf)
        for g in range(GRADES):
            d = np.sort(np.abs(s[y == g] - g))
            k = int(np.ceil((len(d) + 1) * self.coverage))
            if k <= len(d): self.radius_[g] = d[k - 1]
        return self

    def predict(self, scores, given) -> tuple[np.ndarray, np.ndarray]:
        "(lowest, highest) grade of each set; `given` are the grades answered"
        inside = np.abs(np.asarray(scores, float)[:, None] - np.arange(GRADES)) <= self.radius_
        inside[np.arange(len(inside)), np.asarray(given, int)] = True
        return inside.argmax(1), GRADES - 1 - inside[:, ::-1].argmax(1)


class ScoreKappa:
    "Kappa of score tensors at fixed `thresholds`, for fastai's `AccumMetric`; 0 instead of nan, so that epochs can be compared"
    __name__ = 'kappa'
    def __init__(self, thresholds=MIDPOINTS): self.thresholds = thresholds
    def __call__(self, preds, targs) -> float:
        k = quadratic_kappa(apply_thresholds(preds.float().cpu().numpy(), self.thresholds), targs.cpu().numpy().round())
        return k if np.isfinite(k) else 0.
