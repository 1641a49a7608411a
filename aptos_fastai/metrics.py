"Quadratic weighted kappa, the cuts that turn scores into grades, and intervals."
import numpy as np

from aptos_fastai.files import AptosError

GRADES = 5
HALF = (.5, 1.5, 2.5, 3.5)


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
    "Bootstrap interval (percentile) of kappa: resampling pictures is drawing the confusion matrix from a multinomial"
    cm = confusion(grades, targs)
    draws = np.random.default_rng(seed).multinomial(cm.sum(), cm.ravel() / cm.sum(), n).reshape(n, GRADES, GRADES)
    lo, hi = np.nanquantile(kappa_of(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def apply_cuts(scores, cuts) -> np.ndarray:
    "Grades 0-4 of scores: a score at a cut belongs to the grade above it"
    return np.searchsorted(np.asarray(cuts), np.asarray(scores), side='right')


class GradeCuts:
    """The four cuts that maximise quadratic weighted kappa: the global optimum, not a local one.

    1 - kappa = sum (y-g)^2 / sum (E[y^2] - 2 E[y] g + g^2), both sums over pictures, so for a given ratio the best monotone grades follow
    from a dynamic programme over the sorted scores, and Dinkelbach's iteration (1967) finds the smallest ratio.
    Fitted state: `cuts_` (4,), `kappa_` (in-sample: report it only as such).
    """
    def fit(self, scores, grades) -> 'GradeCuts':
        s, y = np.asarray(scores, float).ravel(), np.asarray(grades, float).ravel()
        if not len(s) or len(s) != len(y): raise AptosError(f'cuts cannot be fitted: {len(s)} scores and {len(y)} grades')
        if not np.isfinite(s).all(): raise AptosError(f'cuts cannot be fitted: {(~np.isfinite(s)).sum()} of {len(s)} scores are not numbers')
        if s.min() == s.max(): raise AptosError(f'cuts cannot be fitted: all {len(s)} scores are {s[0]:g}')
        if y.min() == y.max(): raise AptosError(f'cuts cannot be fitted: all {len(y)} grades are {y[0]:g}')
        o = np.argsort(s, kind='stable')
        s, y = s[o], y[o]
        g = np.arange(GRADES)
        seen, chance = (y[:, None] - g) ** 2, (y ** 2).mean() - 2 * y.mean() * g + g ** 2
        places = np.r_[0, np.flatnonzero(np.diff(s)) + 1, len(s)]      # cuts fall only between different scores
        sums = np.vstack([np.zeros(GRADES), np.cumsum(seen, 0)])[places]
        ratio, cut = np.inf, self._best(sums - places[:, None] * chance)
        while True:
            b = np.r_[0, cut, len(places) - 1]
            new = sum(sums[b[k + 1], k] - sums[b[k], k] for k in g) / (np.diff(places[b]) * chance).sum()
            if new >= ratio - 1e-12: break
            ratio, at = new, places[cut]
            cut = self._best(sums - ratio * places[:, None] * chance)
        ends = np.r_[s[0] - 1, s, s[-1] + 1]                             # a grade that nothing gets lies beyond the scores
        self.cuts_, self.kappa_ = (ends[at] + ends[at + 1]) / 2, float(1 - ratio)
        return self

    @staticmethod
    def _best(cost: np.ndarray) -> np.ndarray:
        "Indices into the places of the four cuts of least total cost; `cost` (places, 5) are running sums"
        v, back = cost[:, 0], []
        for k in range(1, GRADES):
            gain = v - cost[:, k]
            low = np.minimum.accumulate(gain)
            back.append(np.maximum.accumulate(np.where(gain <= low, np.arange(len(gain)), 0)))
            v = low + cost[:, k]
        cut = [len(cost) - 1]
        for b in reversed(back): cut.append(b[cut[-1]])
        return np.array(cut[:0:-1])

    def predict(self, scores) -> np.ndarray: return apply_cuts(scores, self.cuts_)


def nested_grades(scores, targs, *, splits: int = 5, seed: int = 0) -> np.ndarray:
    "Grades by cuts that never saw the picture they grade: fitted on the other parts of a stratified split"
    s, y = np.asarray(scores, float), np.asarray(targs, int)
    part = np.empty(len(y), int)
    rng = np.random.default_rng(seed)
    for g in np.unique(y):
        rows = np.flatnonzero(y == g)
        part[rows] = (rng.permutation(len(rows)) + g) % splits
    out = np.empty(len(y), int)
    for k in range(splits):
        rest = part != k
        fine = np.ptp(s[rest]) > 0 and np.ptp(y[rest]) > 0
        out[~rest] = apply_cuts(s[~rest], GradeCuts().fit(s[rest], y[rest]).cuts_ if fine else HALF)
    return out


class ScoreKappa:
    "Kappa of score tensors at fixed `cuts`, for fastai's `AccumMetric`; 0 instead of nan, so that epochs can be compared"
    __name__ = 'kappa'
    def __init__(self, cuts=HALF): self.cuts = cuts
    def __call__(self, preds, targs) -> float:
        k = quadratic_kappa(apply_cuts(preds.float().cpu().numpy(), self.cuts), targs.cpu().numpy().round())
        return k if np.isfinite(k) else 0.
