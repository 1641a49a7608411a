import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from aptos_fastai.common.io import AptosError
from aptos_fastai.metrics import (
    MIDPOINTS,
    GradeThresholds,
    PredictionSets,
    ScoreKappa,
    apply_thresholds,
    auc,
    cross_fitted_grades,
    fit_thresholds,
    grade_scores,
    kappa_interval,
    paired_interval,
    quadratic_kappa,
    sensitivity_at,
    stratified_group_parts,
    wilson_interval,
)

GRADE = st.integers(0, 4)


# Kappa

def test_kappa_by_hand():
    # True grades 0 0 1 2, predicted 0 1 1 2: the squared errors add up to 1
    true_counts = np.bincount([0, 0, 1, 2], minlength=5)
    predicted_counts = np.bincount([0, 1, 1, 2], minlength=5)
    pairs = itertools.product(range(5), range(5))
    expected = sum(true_counts[i] * predicted_counts[j] * (i - j) ** 2 for i, j in pairs) / 4
    assert quadratic_kappa([0, 1, 1, 2], [0, 0, 1, 2]) == pytest.approx(1 - 1 / expected)


@given(st.lists(st.tuples(GRADE, GRADE), min_size=2, max_size=60))
def test_kappa_equals_sklearns(pairs):
    predicted, true = np.array(pairs).T
    kappa = quadratic_kappa(predicted, true)
    if len({*predicted, *true}) == 1:
        assert np.isnan(kappa)
    else:
        sklearns = cohen_kappa_score(true, predicted, weights='quadratic', labels=range(5))
        assert kappa == pytest.approx(sklearns, abs=1e-12)


def test_kappa_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 300)
    g = np.clip(y + rng.integers(-1, 2, 300), 0, 4)
    resamples = rng.integers(0, 300, (2000, 300))
    naive = np.quantile([quadratic_kappa(g[rows], y[rows]) for rows in resamples], [.025, .975])
    assert kappa_interval(g, y) == pytest.approx(tuple(naive), abs=.006)


def test_paired_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 300)
    a, b = (np.clip(y + rng.integers(-k, k + 1, 300), 0, 4) for k in (2, 1))
    resamples = rng.integers(0, 300, (2000, 300))
    differences = [quadratic_kappa(b[rows], y[rows]) - quadratic_kappa(a[rows], y[rows]) for rows in resamples]
    difference, low, high = paired_interval(a, b, y)
    assert difference == pytest.approx(quadratic_kappa(b, y) - quadratic_kappa(a, y))
    assert (low, high) == pytest.approx(tuple(np.quantile(differences, [.025, .975])), abs=.012)
    assert paired_interval(a, a, y) == (0, 0, 0)


def test_score_kappa_takes_columns_and_is_never_nan():
    kappa = ScoreKappa()
    assert kappa(torch.tensor([[0.], [1.2], [3.6]]), torch.tensor([0., 1., 4.])) == 1
    assert kappa(torch.zeros(3, 1), torch.zeros(3)) == 0


# Thresholds

def best_kappa_by_brute_force(s, y):
    "Return the highest kappa over all placings of four thresholds between different scores"
    unique = np.unique(s)
    places = np.r_[unique[0] - 1, (unique[1:] + unique[:-1]) / 2, unique[-1] + 1]
    placings = itertools.combinations_with_replacement(places, 4)
    return max(quadratic_kappa(apply_thresholds(s, thresholds), y) for thresholds in placings)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 12), GRADE), min_size=3, max_size=10))
def test_thresholds_are_the_global_optimum(pairs):
    s, y = np.array(pairs, float).T
    if s.min() == s.max() or y.min() == y.max(): return
    fitted = GradeThresholds().fit(s, y)
    assert fitted.kappa_ == pytest.approx(best_kappa_by_brute_force(s, y), abs=1e-9)
    assert quadratic_kappa(fitted.predict(s), y) == pytest.approx(fitted.kappa_, abs=1e-9)
    assert (np.diff(fitted.thresholds_) >= 0).all()


@pytest.mark.parametrize('scores, grades, words', [
    ([1, 1, 1], [0, 1, 2], 'all 3 scores are 1'),
    ([0, 1, 2], [2, 2, 2], 'all 3 grades are 2'),
    ([0, np.nan, 2], [0, 1, 2], '1 of 3 scores are not finite numbers'),
    ([], [], '0 scores'),
    ([1, 2], [1], '2 scores and 1 grades')])
def test_thresholds_that_cannot_be_fitted(scores, grades, words):
    with pytest.raises(AptosError, match=words): GradeThresholds().fit(scores, grades)


def test_a_score_at_a_threshold_gets_the_grade_above():
    assert apply_thresholds([.69, .7, 1.5, 9], (.7, 1.5, 2.5, 3.5)).tolist() == [0, 1, 2, 4]


def test_regularised_thresholds_are_the_weighted_mean_with_the_midpoints():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 50)
    s = .6 * y + rng.normal(0, .3, 50)
    optimal = fit_thresholds('optimal', s, y)
    mean = (50 * optimal + 100 * np.array(MIDPOINTS)) / 150
    assert fit_thresholds('regularised', s, y) == pytest.approx(mean)


def test_cross_fitted_grades_use_thresholds_of_the_other_parts():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 100)
    s = y + rng.normal(0, .8, 100)
    part = np.arange(100) % 4
    grades = cross_fitted_grades(s, y, part)
    for k in range(4):
        inside = part == k
        thresholds = GradeThresholds().fit(s[~inside], y[~inside]).thresholds_
        assert (grades[inside] == apply_thresholds(s[inside], thresholds)).all()
    assert quadratic_kappa(grades, y) <= GradeThresholds().fit(s, y).kappa_


def test_cross_fitted_kappa_of_noise_is_near_zero():
    rng = np.random.default_rng(0)
    s, y = rng.normal(size=200), rng.integers(0, 5, 200)
    in_sample = GradeThresholds().fit(s[:30], y[:30]).kappa_
    assert abs(quadratic_kappa(cross_fitted_grades(s, y, np.arange(200) % 5), y)) < .15 < in_sample


@given(st.lists(st.tuples(GRADE, st.integers(0, 30)), min_size=6, max_size=80), st.randoms())
def test_parts_keep_groups_together_in_any_order(rows, random):
    y, groups = map(np.array, zip(*rows, strict=True))
    part = stratified_group_parts(y, groups)
    assert pd.Series(part).groupby(groups).nunique().max() == 1
    order = list(range(len(y)))
    random.shuffle(order)
    assert (stratified_group_parts(y[order], groups[order]) == part[order]).all()


def test_parts_hold_equal_shares_of_each_grade():
    y = np.repeat(range(5), 20)
    assert (pd.crosstab(y, stratified_group_parts(y, np.arange(100))) == 4).all().all()


# Referable retinopathy

def test_auc_equals_sklearns_and_its_interval_the_bootstraps():
    rng = np.random.default_rng(2)
    positive = rng.random(400) < .4
    s = (positive + rng.normal(0, 1.2, 400)).round(1)                  # with ties
    area, low, high = auc(s, positive)
    assert area == pytest.approx(roc_auc_score(positive, s))
    resamples = rng.integers(0, 400, (1000, 400))
    naive = np.quantile([roc_auc_score(positive[rows], s[rows]) for rows in resamples], [.025, .975])
    assert (low, high) == pytest.approx(tuple(naive), abs=.012)
    assert np.isnan(auc(s, np.ones(400, bool))).all()


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=2, max_size=60), st.sampled_from([.5, .9, .95]))
def test_sensitivity_is_the_highest_at_its_specificity(rows, specificity):
    s = np.array([float(score) for score, _ in rows])
    positive = np.array([is_positive for _, is_positive in rows])
    if not positive.any() or positive.all(): return
    sensitivity, threshold = sensitivity_at(s, positive, specificity)
    candidates = [t for t in [*np.unique(s), 99.] if (s[~positive] < t).mean() >= specificity]
    assert sensitivity == max((s[positive] >= t).mean() for t in candidates)
    assert sensitivity == (s[positive] >= threshold).mean()
    assert (s[~positive] < threshold).mean() >= specificity


def test_wilson_interval_by_hand():
    z = 1.959964
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z**2), 1), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0, z**2 / (10 + z**2)), abs=1e-6)
    assert wilson_interval(0, 0) == (0, 1)


# Prediction sets

def test_prediction_sets_reach_their_coverage_for_every_grade():
    rng = np.random.default_rng(3)

    def draw(n):
        y = rng.choice(5, n, p=(.5, .1, .2, .1, .1))
        return .7 * y + .3 + rng.normal(0, .5, n) * (1 + .3 * y), y

    s, y = draw(4000)
    new_s, new_y = draw(20000)
    low, high = PredictionSets(.9).fit(s, y).predict(new_s, np.clip(new_s.round(), 0, 4).astype(int))
    covered = (low <= new_y) & (new_y <= high)
    for g in range(5): assert covered[new_y == g].mean() > .88
    assert (high - low + 1).mean() < 3.5


def test_a_grade_with_few_images_is_in_every_prediction_set():
    y = np.array([0] * 50 + [3] * 5)                                   # no images of grades 1, 2 and 4
    low, high = PredictionSets(.9).fit(y + .01, y).predict([0., 0.], [0, 1])
    assert (low == 0).all()
    assert (high == 4).all()


def test_grade_scores_puts_the_grade_into_its_set():
    y = np.repeat(range(5), 100)
    sets = PredictionSets(.9).fit(y + .01, y)
    grade, low, high = grade_scores([.2, 1.4, 1.6], (.5, 1.5, 2.5, 3.5), sets)
    assert grade.tolist() == [0, 1, 2]
    assert (low <= grade).all()
    assert (grade <= high).all()
