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
    _random_parts,
    _sd_of_draws,
    apply_thresholds,
    auc,
    bootstrap,
    bootstrap_counts,
    cross_fitted_grades,
    cross_fitted_weights,
    fit_thresholds,
    fit_weights,
    grade_scores,
    kappa_from_confusion,
    kappa_interval,
    paired_auc,
    paired_interval,
    predictive_values,
    proportion_interval,
    quadratic_kappa,
    sensitivity_at,
    stratified_group_parts,
    subgroup_differences,
    thresholds_or_midpoints,
    upper_quantile,
    weighted_auc,
    weighted_kappa,
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


def test_kappa_of_one_image_and_of_none():
    assert quadratic_kappa([4], [0]) == 0                    # as far off as chance
    assert np.isnan(quadratic_kappa([], [])) and np.isnan(quadratic_kappa([2], [2]))


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


def test_group_intervals_are_those_of_resampled_patients():
    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(150), rng.integers(1, 4, 150))
    y = rng.integers(0, 5, 150)[patient]
    a, b = (np.clip(y + rng.integers(-k, k + 1, 150)[patient], 0, 4) for k in (2, 1))
    rows_of = [np.flatnonzero(patient == p) for p in range(150)]
    kappas, differences = [], []
    for _ in range(1500):
        rows = np.concatenate([rows_of[p] for p in rng.integers(0, 150, 150)])
        kappas.append(quadratic_kappa(b[rows], y[rows]))
        differences.append(kappas[-1] - quadratic_kappa(a[rows], y[rows]))
    assert kappa_interval(b, y, patient) == pytest.approx(tuple(np.quantile(kappas, [.025, .975])), abs=.012)
    low, high = paired_interval(a, b, y, patient)[1:]
    assert (low, high) == pytest.approx(tuple(np.quantile(differences, [.025, .975])), abs=.02)


def test_groups_of_one_image_are_resampled_as_images():
    y, g = np.arange(50) % 5, np.arange(50) % 3
    assert kappa_interval(g, y, np.arange(50)) == kappa_interval(g, y)
    assert auc(g, y > 1, np.arange(50)) == pytest.approx(auc(g, y > 1))
    assert proportion_interval(g == y, np.arange(50)) == proportion_interval(g == y)
    assert bootstrap_counts(y, 5, np.zeros(50), n=10).tolist() == [[10] * 5] * 10      # a single patient


def two_eyes(rng, patients=80, correlation=.8):
    "Return scores, true grades and patients of pairs of eyes whose errors correlate"
    shared, own = rng.normal(size=(patients, 1)), rng.normal(size=(patients, 2))
    error = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    y = np.repeat(rng.integers(0, 5, patients)[:, None], 2, 1)
    return (y + 1.3 * error).ravel(), y.ravel(), np.repeat(np.arange(patients), 2)


def test_intervals_over_images_cover_less_than_they_say_where_eyes_correlate():
    rng = np.random.default_rng(4)
    s, y, _ = two_eyes(rng, 200_000)
    true_kappa, true_auc = quadratic_kappa(apply_thresholds(s, MIDPOINTS), y), auc(s, y >= 2)[0]
    true_share = (apply_thresholds(s, MIDPOINTS) == y).mean()
    covered = np.zeros((3, 2))
    repetitions = 300
    for _ in range(repetitions):
        s, y, patient = two_eyes(rng)
        g = apply_thresholds(s, MIDPOINTS)
        for column, groups in enumerate([None, patient]):
            intervals = [kappa_interval(g, y, groups, n=1000), auc(s, y >= 2, groups)[1:],
                         proportion_interval(g == y, groups)]
            for row, (truth, (low, high)) in enumerate(zip((true_kappa, true_auc, true_share), intervals, strict=True)):
                covered[row, column] += low <= truth <= high
    over_images, over_patients = covered.T / repetitions
    assert (over_patients > .905).all(), over_patients
    assert over_images[0] < .89                         # kappa
    assert (over_images < over_patients - .03).all(), (over_images, over_patients)


def test_proportion_interval_of_equal_values_counts_patients():
    patient = np.repeat(np.arange(10), 2)
    assert proportion_interval(np.ones(20, bool), patient) == wilson_interval(10, 10)
    same_in_both_eyes = np.repeat(np.arange(10) < 6, 2)
    low, high = proportion_interval(same_in_both_eyes, patient)
    assert (low, high) == pytest.approx(wilson_interval(6, 10), abs=.02)
    assert proportion_interval([]) == (0, 1)


@pytest.mark.parametrize('correct, effective', [
    ([1, 1, 0, 0], 1),                                       # over patients 2/1 * (1 + 1) / 16, over images 1/4
    ([1, 0, 1, 0], 4),                                       # patients are alike: every image counts, and no more
    ([1, 1, 1, 0], 3),                                       # 2/1 * (1/4 + 1/4) / 16 = 1/16, over images 3/16
    ([1, 1, 1, 1], 2), ([0, 0, 0, 0], 2)])
def test_the_design_effect_by_hand(correct, effective):
    interval = proportion_interval(correct, list('aabb'), .9)
    assert interval == pytest.approx(wilson_interval(np.mean(correct) * effective, effective, .9))


def test_a_single_patient_counts_as_one():
    assert proportion_interval([1, 0], ['a', 'a']) == wilson_interval(.5, 1)


def test_an_image_twice_is_no_further_patient():
    y, s = np.array([0, 0, 1, 0, 1, 1, 0, 1]), np.array([.1, .2, .3, .4, .4, .6, .7, .9])
    twice = auc(np.repeat(s, 2), np.repeat(y, 2), np.repeat(np.arange(8), 2), level=.8)
    assert twice == pytest.approx(auc(s, y, level=.8))
    assert auc(np.repeat(s, 2), np.repeat(y, 2), level=.8)[1] > twice[1]


@pytest.mark.parametrize('patients, variance', [('aabb', 1 / 8 - 1 / 8), ('abba', 1 / 8 + 1 / 8), ('abcd', 1 / 8)])
def test_the_variance_of_the_auc_by_hand(patients, variance):
    """Negatives 1 and 3, positives 2 and 4: each positive is above 1/2 and 1 of the negatives.

    The influences of the images are 1/8, -1/8, -1/8 and 1/8: each class alone gives 2/1 * 2/64, and both patients of
    a negative and a positive 2 * 2/1 * (their products) in addition.
    """
    area, low, high = auc([1, 2, 3, 4], [0, 1, 0, 1], list(patients), level=.3)
    half = .3853204664 * np.sqrt(variance)
    assert (area, low, high) == pytest.approx((.75, .75 - half, .75 + half))
    assert auc([1, 2, 3, 4], [0, 1, 0, 1], list(patients), level=.9)[2] == (.75 if patients == 'aabb' else 1)


def test_resamples_in_several_parts():
    "As many as are asked for, each of as many images or groups as there are"
    counts = bootstrap_counts([0, 1, 1, 0], 2, list('aabb'), n=2)
    many = bootstrap_counts([0, 0, 1], 2, list('aab'), n=1_000_003)           # a million at once
    assert counts.tolist() == [[2, 2]] * 2 and len(many) == 1_000_003
    assert np.unique(many, axis=0).tolist() == [[0, 2], [2, 1], [4, 0]]
    assert bootstrap(lambda weights: weights.sum(1), 2_000_000, list('abc'), n=5).tolist() == [3] * 5      # two at once
    assert bootstrap_counts([0, 1], 2, n=7).shape == (7, 2)


def test_intervals_are_quantiles_of_their_draws():
    s, g, y, groups = drawn_scores(60)
    draws = kappa_from_confusion(bootstrap_counts(y * 5 + g, 25, groups, n=200, seed=3).reshape(-1, 5, 5))
    assert kappa_interval(g, y, groups, n=200, level=.6, seed=3) == pytest.approx(np.quantile(draws, [.2, .8]))
    other = s[::-1]
    draws = bootstrap(lambda w: weighted_auc(w, other, y > 1) - weighted_auc(w, s, y > 1), 60, groups, seed=3)
    value, *interval = paired_auc(s, other, y > 1, groups, level=.6, seed=3)
    assert value == pytest.approx(auc(other, y > 1)[0] - auc(s, y > 1)[0])
    assert interval == pytest.approx(np.quantile(draws, [.2, .8]))
    assert paired_auc(s, s, y > 1) == (0, 0, 0)


def test_score_kappa_fits_thresholds_as_the_prediction_does():
    y = np.repeat(range(5), 40).astype(float)
    s = torch.tensor(.5 * y + .2)                       # separable, but not at the midpoints
    assert ScoreKappa()(s, torch.tensor(y)) < .8
    assert ScoreKappa('optimal')(s, torch.tensor(y)) == 1
    assert ScoreKappa('regularised')(s, torch.tensor(y)) > ScoreKappa()(s, torch.tensor(y))
    assert ScoreKappa('optimal')(torch.full((200,), torch.nan), torch.tensor(y)) <= 0
    assert ScoreKappa('optimal')(torch.zeros(200), torch.tensor(y)) == 0


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


@settings(max_examples=60)
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


@pytest.mark.parametrize('scores, grades, words', [
    ([1, 1, 1], [0, 1, 2], 'all 3 scores are 1'),
    ([0, 1, 2], [2, 2, 2], 'all 3 grades are 2'),
    ([0, .1, .2, .3], [0, 4, 0, 4], '')])
def test_midpoints_where_no_thresholds_can_be_fitted(scores, grades, words):
    thresholds, reason = thresholds_or_midpoints('optimal', scores, grades)
    assert words in reason
    assert (tuple(thresholds) == MIDPOINTS) == bool(reason)


def test_thresholds_that_coincide_become_the_midpoints():
    s, y = np.r_[np.zeros(20), np.ones(20)], np.r_[np.zeros(20), np.full(20, 4)]
    assert len(set(GradeThresholds().fit(s, y).thresholds_)) == 1
    for how in ('optimal', 'regularised'):
        thresholds, reason = thresholds_or_midpoints(how, s, y)
        assert tuple(thresholds) == MIDPOINTS and 'the optimal thresholds are all 0.5' in reason
    with pytest.raises(AptosError, match='not finite'): thresholds_or_midpoints('optimal', [0, np.nan], [1, 1])
    with pytest.raises(AptosError, match='0 scores and 0 grades'): thresholds_or_midpoints('optimal', [], [])


def test_thresholds_of_grades_without_images():
    "They lie half a point outside, or at the threshold between the grades beside them"
    assert GradeThresholds().fit([0, 1], [1, 2]).thresholds_.tolist() == [-.5, .5, 1.5, 1.5]
    thresholds, reason = thresholds_or_midpoints('optimal', [0, 1, 2], [0, 3, 4])
    assert (thresholds.tolist(), reason) == ([.5, .5, .5, 1.5], '')


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
    assert grades.dtype == int
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


def test_weights_by_hand():
    "Errors that do not correlate weigh by 1 / their variance, 1 to 4; a member that only adds to another's gets none"
    y = np.array([0, 1, 2, 4])
    e, f = np.array([1, -1, 1, -1]), np.array([2, 2, -2, -2])
    assert fit_weights(np.c_[y + e, y + f], y) == pytest.approx([.8, .2])
    assert fit_weights(np.c_[y + e, y + 2 * e], y) == pytest.approx([1, 0])
    assert fit_weights(np.c_[y + e, y - e, y + 3 * f], y) == pytest.approx([.5, .5, 0])


def test_cross_fitted_weights_use_the_other_parts():
    rng = np.random.default_rng(0)
    y, part = rng.integers(0, 5, 60), np.arange(60) % 3
    s = y[:, None] + rng.normal(0, [.5, .7, .9], (60, 3))
    weights = cross_fitted_weights(s, y, part)
    for k in range(3): assert (weights[part == k] == fit_weights(s[part != k], y[part != k])).all()


def test_parts_are_dealt_out_by_highest_grade_and_name():
    assert stratified_group_parts([0, 0, 3, 1, 0], list('bacda'), 2).tolist() == [1, 0, 1, 0, 0]
    assert stratified_group_parts([0, 0, 0], [2, 10, 1], 3).tolist() == [2, 1, 0]        # as texts: 1, 10, 2


def test_parts_hold_equal_shares_of_each_grade():
    y = np.repeat(range(5), 20)
    assert (pd.crosstab(y, stratified_group_parts(y, np.arange(100))) == 4).all().all()


# Referable retinopathy

def naive_auc(positive, s):
    "The share of pairs of a positive and a negative in which the positive has the higher score; ties count half"
    difference = s[positive][:, None] - s[~positive]
    return (difference > 0).mean() + .5 * (difference == 0).mean()


def test_auc_equals_sklearns_and_its_interval_the_bootstraps():
    rng = np.random.default_rng(2)
    positive = rng.random(400) < .4
    s = (positive + rng.normal(0, 1.2, 400)).round(1)                  # with ties
    area, low, high = auc(s, positive)
    assert area == pytest.approx(roc_auc_score(positive, s))
    resamples = rng.integers(0, 400, (1000, 400))
    naive = np.quantile([naive_auc(positive[rows], s[rows]) for rows in resamples], [.025, .975])
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


@pytest.mark.parametrize('fraction, expected', [(0, 10), (.1, 10), (.2, 9), (.5, 6), (1, 1)])
def test_the_upper_quantile_is_a_value_that_no_more_exceed(fraction, expected):
    values = np.arange(1, 11)[::-1]
    assert upper_quantile(values, fraction) == expected and (values > expected).mean() <= fraction


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


def test_the_set_is_of_the_scores_of_each_fold_and_the_grade_of_their_mean():
    y, fold = np.repeat(range(5), 40), np.tile([0, 1], 100)
    sets = PredictionSets(.9).fit(y + np.where(fold == 0, .01, .6), y, fold)
    assert [o.tolist() for o in grade_scores([2.35], MIDPOINTS, sets, [[2., 2.7]])] == [[2], [2], [3]]
    assert [o.tolist() for o in grade_scores([2.35], MIDPOINTS, sets)] == [[2], [2], [2]]


def test_one_fold_is_split_conformal_prediction():
    rng = np.random.default_rng(5)
    y = rng.integers(0, 5, 300)
    s = y + rng.normal(0, .7, 300)
    sets = PredictionSets(.9).fit(s, y)
    new = rng.uniform(0, 4, 200)
    low, high = sets.predict(new, np.clip(new.round(), 0, 4).astype(int))
    inside = np.abs(new[:, None] - np.arange(5)) <= sets.radius_ + 1e-4
    assert (low <= inside.argmax(1)).all() and (high >= 4 - inside[:, ::-1].argmax(1)).all()
    for g in range(5): assert sets.radius_[g] in np.abs(s[y == g] - g).round(4)


def fold_models(rng, n_train, n_new, folds=5, features=12):
    "Fit a linear model without each fold; return out-of-fold scores, grades and folds, and fold scores of new images"
    weights = rng.normal(size=features)
    x = rng.normal(size=(n_train + n_new, features))
    latent = x @ weights / np.linalg.norm(weights) + rng.normal(0, .5, len(x))
    y = np.digitize(latent, [-.5, .3, .9, 1.5])
    train, fold = np.arange(n_train), np.arange(n_train) % folds
    columns = []
    for k in range(folds):
        rows = train[fold != k]
        design = np.c_[np.ones(len(rows)), x[rows]]
        fitted = np.linalg.solve(design.T @ design + .1 * np.eye(features + 1), design.T @ y[rows])
        columns.append(np.c_[np.ones(len(x)), x] @ fitted)
    scores = np.stack(columns, 1)
    return scores[train, fold], y[:n_train], fold, scores[n_train:], y[n_train:]


def test_sets_of_the_mean_over_folds_reach_their_coverage():
    rng = np.random.default_rng(6)
    covered, size = [], []
    for _ in range(60):                                 # few images: the folds' models differ
        s, y, fold, new, truth = fold_models(rng, 100, 400)
        sets = PredictionSets(.8).fit(s, y, fold)
        low, high = sets.predict(new, apply_thresholds(new.mean(1), MIDPOINTS))
        covered.append((low <= truth) & (truth <= high))
        size.append(high - low + 1)
    assert .8 < np.mean(covered) < .93
    assert np.mean(size) < 4


def test_each_fold_is_compared_with_its_own_networks_scores():
    y = np.repeat(range(5), 40)
    fold = np.tile([0, 1], 100)
    s = y + np.where(fold == 0, .01, .6)                # the second network is worse
    sets = PredictionSets(.9).fit(s, y, fold)
    assert [len(o) for o in sets.calibration_[0]] == [20, 20]
    low, high = sets.predict([[2., 2.]], [2])
    assert (low[0], high[0]) == (2, 2)
    low, high = sets.predict([[2., 2.7]], [2])
    assert high[0] == 3                                 # only the second network's score is near grade 3


@pytest.mark.parametrize('coverage, n, radius', [
    (.9, 9, .09), (.9, 8, np.inf), (.8, 9, .08), (.5, 4, .03), (.5, 3, .02)])
def test_radius_by_hand(coverage, n, radius):
    "The ceil(coverage * (n + 1))-th smallest of n distances; a score at that distance is inside, one further is not"
    sets = PredictionSets(coverage).fit(4 + np.arange(1, n + 1) / 100, np.full(n, 4))
    assert sets.radius_.tolist() == [np.inf] * 4 + [radius]
    if radius == np.inf: return
    low, high = PredictionSets(coverage, (((),),) * 4 + sets.calibration_[4:]).predict(
        [4 - radius, 4 - radius - .0001], [3, 3])
    assert high.tolist() == [4, 3] and low.tolist() == [0, 0]


def test_one_score_for_all_folds_is_compared_with_each_of_them():
    y, fold = np.repeat(range(5), 40), np.tile([0, 1], 100)
    sets = PredictionSets(.9).fit(y + np.where(fold == 0, .01, .6), y, fold)
    one, both = sets.predict([2., 2.7], [2, 3]), sets.predict([[2., 2.], [2.7, 2.7]], [2, 3])
    assert [o.tolist() for o in one] == [o.tolist() for o in both]


def test_calibration_distances_are_drawn_without_replacement():
    sets = PredictionSets(.9).fit(np.arange(2500) / 1000, np.zeros(2500))
    assert len(set(sets.calibration_[0][0])) == 2000
    sets = PredictionSets(.9).fit(np.arange(2000) / 1000, np.zeros(2000))
    assert sets.calibration_[0][0] == tuple(np.arange(2000) / 1000)


def test_calibration_distances_are_sampled_and_rounded():
    rng = np.random.default_rng(7)
    y = np.repeat([0, 1], 5000)
    s = y + rng.normal(size=len(y))
    sets = PredictionSets(.9).fit(s, y, np.arange(len(y)) % 5)
    assert sum(map(len, sets.calibration_[0])) == 2000
    assert sets.calibration_ == PredictionSets(.9).fit(s, y, np.arange(len(y)) % 5).calibration_
    assert all(round(o, 4) == o for by_fold in sets.calibration_ for fold in by_fold for o in fold)
    assert PredictionSets(.9, sets.calibration_).radius_[0] == pytest.approx(np.quantile(np.abs(s[y == 0]), .9), abs=.1)


def test_prediction_sets_do_not_depend_on_the_order_of_images():
    "More images of a grade than are kept: a fixed draw of them"
    rng = np.random.default_rng(0)
    y, folds = np.zeros(5000, int), rng.integers(0, 5, 5000)
    s, order = rng.normal(0, .5, 5000), rng.permutation(5000)
    sets, again = PredictionSets().fit(s, y, folds), PredictionSets().fit(s[order], y[order], folds[order])
    assert sets.calibration_ == again.calibration_


# Resamples of images with weights

def drawn_scores(n=120, seed=0):
    "Scores with ties, grades, true grades and two images of each patient"
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    s = (y + rng.normal(0, 1, n)).round(1)
    return s, apply_thresholds(s, MIDPOINTS), y, np.arange(n) // 2


def test_weights_count_an_image_several_times():
    s, g, y, _ = drawn_scores()
    weights = np.random.default_rng(1).integers(0, 4, (3, len(s)))
    kappas, areas = weighted_kappa(weights, g, y), weighted_auc(weights, s, y >= 2)
    for w, kappa, area in zip(weights, kappas, areas, strict=True):
        rows = np.repeat(np.arange(len(s)), w)
        assert kappa == pytest.approx(quadratic_kappa(g[rows], y[rows]))
        assert area == pytest.approx(roc_auc_score(y[rows] >= 2, s[rows]))
    assert np.isnan(weighted_auc(np.ones((1, 4)), [1, 2, 3, 4], [True] * 4)).all()


def test_bootstrap_draws_whole_groups():
    counts = bootstrap(lambda weights: weights, 6, ['a', 'a', 'b', 'b', 'b', 'c'], n=50)
    assert counts.shape == (50, 6) and len(np.unique(counts, axis=0)) > 1
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 2] == counts[:, 4]).all()
    assert (counts[:, [0, 2, 5]].sum(1) == 3).all()
    assert (bootstrap(lambda weights: weights.sum(1), 6, n=20) == 6).all()


def naive_draws(groups, n, seed):
    "Yield the rows of `n` resamples of whole groups, one by one"
    rng, names = np.random.default_rng(seed), np.unique(groups)
    rows = {name: np.flatnonzero(groups == name) for name in names}
    for _ in range(n): yield np.concatenate([rows[name] for name in rng.choice(names, len(names))])


def test_subgroup_differences_are_those_of_a_naive_loop():
    s, g, y, groups = drawn_scores(200)
    inside = np.random.default_rng(3).random(200) < .4                 # patients can have an image on each side
    s, g = np.where(inside, y, s), np.where(inside, y, g)              # perfect inside
    found = subgroup_differences(s, g, y, inside, groups, level=.9)
    assert found['kappa'][0] == pytest.approx(1 - quadratic_kappa(g[~inside], y[~inside]))
    assert found['auc'][0] == pytest.approx(1 - roc_auc_score(y[~inside] >= 2, s[~inside]))
    residual = s - np.array([s[y == grade].mean() for grade in range(5)])[y]
    assert found['mean_error'][0] == pytest.approx(residual[inside].mean() - residual[~inside].mean())

    def differences(rows, part):
        a, b = rows[part[rows]], rows[~part[rows]]
        return [quadratic_kappa(g[a], y[a]) - quadratic_kappa(g[b], y[b]),
                naive_auc(y[a] >= 2, s[a]) - naive_auc(y[b] >= 2, s[b]),
                residual[a].mean() - residual[b].mean()]
    resampled = np.std([differences(rows, inside) for rows in naive_draws(groups, 2000, 5)], 0)
    rng = np.random.default_rng(6)
    random = np.std([differences(np.arange(200), rng.permutation(inside)) for _ in range(500)], 0)
    assert (random > resampled).any()
    for sd, (value, low, high) in zip(np.maximum(resampled, random), found.values(), strict=True):
        assert (high - low) / 2 == pytest.approx(1.645 * sd, rel=.12)
        assert (high + low) / 2 == pytest.approx(value)


def test_the_mean_error_of_a_subgroup_by_hand():
    "Mean scores of the grades 0 and 1 are 2 and 3, of grade 3 its only score: the errors are -1, 1, -1, 1 and 0"
    found = subgroup_differences([1, 3, 2, 4, 7], [1, 3, 2, 4, 4], [0, 0, 1, 1, 3], [True] + [False] * 4)
    assert found['mean_error'][0] == pytest.approx(-1 - 1 / 4)
    assert np.isnan(found['auc']).all()                       # no referable image inside
    assert np.isnan(_sd_of_draws(np.full((3, 2), np.nan))).all()
    assert _sd_of_draws(np.array([[1., np.nan], [3., 5.], [np.nan, np.nan]])).tolist() == [1, 0]


def test_random_subgroups_hold_whole_patients_where_the_subgroup_does():
    groups = np.repeat(np.arange(50), 2)
    inside = groups % 5 == 0
    for part in _random_parts(inside, groups, 0, 20):
        assert part.sum() == inside.sum() and (part[::2] == part[1::2]).all()
    straddling = np.arange(100) % 2 == 0                                  # the left eyes
    assert all(part.sum() == 50 for part in _random_parts(straddling, groups, 0, 20))


def test_subgroup_differences_cover_no_difference_and_find_a_large_one():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 1200)
    inside = np.arange(1200) % 3 == 0
    s = y + rng.normal(0, .8, 1200)
    same = subgroup_differences(s, apply_thresholds(s, MIDPOINTS), y, inside)
    assert all(low < 0 < high for _, low, high in same.values())
    s = s - inside                                      # scores that are 1 too low in the subgroup
    found = subgroup_differences(s, apply_thresholds(s, MIDPOINTS), y, inside)
    assert found['mean_error'][2] < -.8 and found['kappa'][2] < 0 and found['auc'][1] < 0 < found['auc'][2]


def test_paired_auc_is_that_of_a_naive_loop():
    s, _, y, groups = drawn_scores(150)
    other = s + np.random.default_rng(8).normal(0, 1, 150)
    value, low, high = paired_auc(s, other, y >= 2, groups)
    assert value == pytest.approx(roc_auc_score(y >= 2, other) - roc_auc_score(y >= 2, s))
    draws = [naive_auc(y[rows] >= 2, other[rows]) - naive_auc(y[rows] >= 2, s[rows])
             for rows in naive_draws(groups, 2000, 9)]
    assert (low, high) == pytest.approx(np.quantile(draws, [.025, .975]), abs=.012)


def test_predictive_values_by_hand():
    # 1,000 people, 100 of them ill: 90 found, 10 missed; of 900 well ones 180 are referred
    ppv, npv = predictive_values(.9, .8, .1)
    assert ppv == pytest.approx(90 / (90 + 180)) and npv == pytest.approx(720 / (720 + 10))
    assert np.isnan(predictive_values(0, 1, .1)[0]) and predictive_values(0, 1, .1)[1] == pytest.approx(.9)
