"""What `keep = kappa` adds to the reported kappa: python benchmarks/kept_epoch.py

Simulates ten epochs of equal quality. The epoch with the best kappa by its own fitted thresholds is kept; its kappa by
cross-fitted thresholds, as a run reports it, is compared with the mean over all epochs.
"""
import numpy as np

from aptos_fastai.common.console import table
from aptos_fastai.metrics import apply_thresholds, cross_fitted_grades, quadratic_kappa, thresholds_or_midpoints

EPOCHS = 10
GRADE_FREQUENCIES = .5, .1, .27, .05, .08    # as in APTOS 2019
ERROR_SD = .75                               # of a score, grades
CORRELATIONS = .8, .9                        # of the errors of two epochs
IMAGES = {80: 200, 400: 200, 3500: 60}       # validation images -> simulations
CHOICE = 'regularised'                       # of the thresholds


def epochs_of_equal_quality(rng, n: int, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    "Return scores (EPOCHS, n) and grades (n,)"
    grades = rng.choice(5, n, p=GRADE_FREQUENCIES)
    shared, own = rng.normal(size=n), rng.normal(size=(EPOCHS, n))
    return grades + ERROR_SD * (np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own), grades


def added_kappa(rng, n: int, correlation: float) -> float:
    "Return how much higher the kept epoch's kappa is than the mean of the epochs"
    epochs, grades = epochs_of_equal_quality(rng, n, correlation)
    folds = np.arange(n) % 5
    fitted = [quadratic_kappa(apply_thresholds(scores, thresholds_or_midpoints(CHOICE, scores, grades)[0]), grades)
              for scores in epochs]
    reported = [quadratic_kappa(cross_fitted_grades(scores, grades, folds, CHOICE), grades) for scores in epochs]
    return reported[int(np.argmax(fitted))] - float(np.mean(reported))


def main() -> None:
    "Print the table"
    rng = np.random.default_rng(0)
    rows = [[n, correlation, round(float(np.mean([added_kappa(rng, n, correlation) for _ in range(times)])), 4)]
            for n, times in IMAGES.items() for correlation in CORRELATIONS]
    table('Added to kappa by keeping the best of ten equal epochs', ['images', 'correlation', 'added kappa'], rows)


if __name__ == '__main__': main()
