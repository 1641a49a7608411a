"""Compare fitted and equal weights of three simulated members: python benchmarks/blend.py

A score is the grade plus an error, times the member's scale; the errors of the members correlate by `CORRELATION`.
Prints the part of the grades' variance that the mean score leaves unexplained, the fitted weights cross-fitted in five
folds, mean over `REPEATS` simulations.
"""
import numpy as np

from aptos_fastai.common.console import table
from aptos_fastai.metrics import GRADES, cross_fitted_weights

CORRELATION = .6
REPEATS = 200
MEMBERS = (                                  # SD of the errors of each member, and its scale
    ((.5, .6, .9), (1, 1, 1)),
    ((.6, .6, .6), (1, 1, 1)),
    ((.5, .6, .9), (.5, .8, 1)),             # the best one shrinks its scores most
)
IMAGES = 100, 400, 3000


def unexplained(images: int, errors: tuple[float, ...], scales: tuple[float, ...],
                rng: np.random.Generator) -> tuple[float, float]:
    "Return 1 - r² of the mean score and the grades by fitted and by equal weights, in one simulation"
    grades, shared = rng.integers(0, GRADES, images), rng.normal(0, 1, (images, 1))
    own = rng.normal(0, 1, (images, len(errors)))
    scores = grades[:, None] + np.array(errors) * (CORRELATION**.5 * shared + (1 - CORRELATION)**.5 * own)
    scores = np.array(scales) * scores
    weights = cross_fitted_weights(scores, grades, np.arange(images) % 5)
    return tuple(1 - np.corrcoef(mean, grades)[0, 1] ** 2 for mean in ((scores * weights).sum(1), scores.mean(1)))


def main() -> None:
    "Print the table"
    rng, rows = np.random.default_rng(0), []
    for errors, scales in MEMBERS:
        for images in IMAGES:
            fitted, equal = np.mean([unexplained(images, errors, scales, rng) for _ in range(REPEATS)], 0)
            rows.append([', '.join(map(str, errors)), ', '.join(map(str, scales)), images, f'{fitted:.4f}',
                         f'{equal:.4f}'])
    table('variance of the grades that the mean leaves unexplained',
          ['errors of the members (SD)', 'scales', 'images', 'fitted', 'equal weights'], rows)


if __name__ == '__main__': main()
