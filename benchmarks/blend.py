"""Compare fitted and equal weights of three simulated members: python benchmarks/blend.py

A score is the grade plus an error; the errors of the members correlate by `CORRELATION`. Prints the squared error of
the mean scores (without their offset), the fitted weights cross-fitted in five folds, mean over `REPEATS` simulations.
"""
import numpy as np

from aptos_fastai.common.console import table
from aptos_fastai.metrics import GRADES, cross_fitted_weights

CORRELATION = .6
REPEATS = 200
ERRORS = (.5, .6, .9), (.6, .6, .6)          # SD of the errors of each member
IMAGES = 100, 400, 3000


def squared_errors(images: int, errors: tuple[float, ...], rng: np.random.Generator) -> tuple[float, float]:
    "Return the squared error by fitted and by equal weights of one simulation"
    grades, shared = rng.integers(0, GRADES, images), rng.normal(0, 1, (images, 1))
    own = rng.normal(0, 1, (images, len(errors)))
    scores = grades[:, None] + np.array(errors) * (CORRELATION**.5 * shared + (1 - CORRELATION)**.5 * own)
    weights = cross_fitted_weights(scores, grades, np.arange(images) % 5)
    return ((scores * weights).sum(1) - grades).var(), (scores.mean(1) - grades).var()


def main() -> None:
    "Print the table"
    rng, rows = np.random.default_rng(0), []
    for errors in ERRORS:
        for images in IMAGES:
            fitted, equal = np.mean([squared_errors(images, errors, rng) for _ in range(REPEATS)], 0)
            rows.append([', '.join(map(str, errors)), images, f'{fitted:.3f}', f'{equal:.3f}'])
    table('squared error of the mean score', ['errors of the members (SD)', 'images', 'fitted', 'equal weights'], rows)


if __name__ == '__main__': main()
