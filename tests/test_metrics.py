import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from aptos_fastai.common.io import AptosError
from aptos_fastai.metrics import (
    MIDPOINTS,
    GradeThresholds,
    PredictionSets,
    ScoreKappa,
    apply_thresholds,
    auc,
    even_parts,
    fit_thresholds,
    kappa_interval,
    nested_grades,
    paired_interval,
    quadratic_kappa,
    sensitivity_at,
    share_interval,
)


def test_kappa_by_hand():
    # 4 images, grades 0 0 1 2 given 0 1 1 2: seen 1; chance = sum over pairs of (row n)(column n)(difference)^2 / 4 = 18 / 4
    rows, cols = np.bincount([0, 0, 1, 2], minlength=5), np.bincount([0, 1, 1, 2], minlength=5)
    chance = sum(rows[i] * cols[j] * (i - j) ** 2 for i in range(5) for j in range(5)) / 4
    assert quadratic_kappa([0, 1, 1, 2], [0, 0, 1, 2]) == pytest.approx(1 - 1 / chance)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=60))
def test_kappa_is_sklearns(pairs):
    g, y = np.array(pairs).T
    ours = quadratic_kappa(g, y)
    if len(set(g) | set(y)) == 1: assert np.isnan(ours)
    else: assert ours == pytest.approx(cohen_kappa_score(y, g, weights='quadratic', labels=range(5)), abs=1e-12)


def naive_best(s, y):
    "The best kappa over every placing of four thresholds between different scores"
    u = np.unique(s)
    places = np.r_[u[0] - 1, (u[1:] + u[:-1]) / 2, u[-1] + 1]
    return max(quadratic_kappa(apply_thresholds(s, c), y) for c in itertools.combinations_with_replacement(places, 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 12), st.integers(0, 4)), min_size=3, max_size=10))
def test_thresholds_are_the_global_optimum(pairs):
    s, y = np.array(pairs, float).T
    if s.min() == s.max() or y.min() == y.max(): return
    c = GradeThresholds().fit(s, y)
    assert c.kappa_ == pytest.approx(naive_best(s, y), abs=1e-9)
    assert quadratic_kappa(c.predict(s), y) == pytest.approx(c.kappa_, abs=1e-9)
    assert (np.diff(c.thresholds_) >= 0).all()


@pytest.mark.parametrize('scores, grades, words', [
    ([1, 1, 1], [0, 1, 2], 'all 3 scores are 1'), ([0, 1, 2], [2, 2, 2], 'all 3 grades are 2'),
    ([0, np.nan, 2], [0, 1, 2], '1 of 3 scores are not numbers'), ([], [], '0 scores'), ([1, 2], [1], '2 scores and 1 grades')])
def test_thresholds_refuse(scores, grades, words):
    with pytest.raises(AptosError, match=words): GradeThresholds().fit(scores, grades)


def test_a_score_at_a_cut_goes_up(): assert apply_thresholds([.69, .7, 1.5, 9], (.7, 1.5, 2.5, 3.5)).tolist() == [0, 1, 2, 4]


def test_nested_thresholds_never_saw_their_image():
    "Changing one image's grade may change the others' grades but never its own part's thresholds"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 100); s = y + rng.normal(0, .8, 100)
    optimist = GradeThresholds().fit(s, y).kappa_
    part = np.arange(100) % 4
    got = nested_grades(s, y, part)
    assert quadratic_kappa(got, y) <= optimist
    for k in range(4): assert (got[part == k] == apply_thresholds(s[part == k], GradeThresholds().fit(s[part != k], y[part != k]).thresholds_)).all()
    noise = rng.normal(size=200); random = rng.integers(0, 5, 200)
    assert abs(quadratic_kappa(nested_grades(noise, random, np.arange(200) % 5), random)) < .15 < GradeThresholds().fit(noise[:30], random[:30]).kappa_


def test_shrunken_thresholds_lie_between():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 50); s = .6 * y + rng.normal(0, .3, 50)
    assert fit_thresholds('regularised', s, y) == pytest.approx((fit_thresholds('optimal', s, y) + 2 * np.array(MIDPOINTS)) / 3)      # 50 images against 100


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=6, max_size=80), st.randoms())
def test_even_parts_keep_groups_whole_whatever_the_order(rows, rnd):
    y, g = map(np.array, zip(*rows, strict=True))
    part = even_parts(y, g)
    assert pd.Series(part).groupby(g).nunique().max() == 1
    o = list(range(len(y))); rnd.shuffle(o)
    assert (even_parts(y[o], g[o]) == part[o]).all()


def test_even_parts_share_the_grades_out():
    y = np.repeat(range(5), 20)
    assert (pd.crosstab(y, even_parts(y, np.arange(100))) == 4).all().all()


def test_paired_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 300); a, b = (np.clip(y + rng.integers(-k, k + 1, 300), 0, 4) for k in (2, 1))
    rows = rng.integers(0, 300, (2000, 300))
    naive = np.quantile([quadratic_kappa(b[r], y[r]) - quadratic_kappa(a[r], y[r]) for r in rows], [.025, .975])
    d, lo, hi = paired_interval(a, b, y)
    assert d == pytest.approx(quadratic_kappa(b, y) - quadratic_kappa(a, y)) and (lo, hi) == pytest.approx(tuple(naive), abs=.012)
    assert paired_interval(a, a, y) == (0, 0, 0)


def test_auc_is_sklearns_and_its_interval_the_bootstraps():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(2)
    pos = rng.random(400) < .4; s = (pos + rng.normal(0, 1.2, 400)).round(1)             # with ties
    a, lo, hi = auc(s, pos)
    assert a == pytest.approx(roc_auc_score(pos, s))
    naive = np.quantile([roc_auc_score(pos[r], s[r]) for r in rng.integers(0, 400, (1000, 400))], [.025, .975])
    assert (lo, hi) == pytest.approx(tuple(naive), abs=.012)
    assert np.isnan(auc(s, np.ones(400, bool))).all()


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=2, max_size=60), st.sampled_from([.5, .9, .95]))
def test_sensitivity_is_the_best_at_its_specificity(rows, spec):
    s, pos = np.array([float(a) for a, _ in rows]), np.array([b for _, b in rows])
    if not pos.any() or pos.all(): return
    sens, t = sensitivity_at(s, pos, spec)
    best = max((s[pos] >= c).mean() for c in [*np.unique(s), 99.] if (s[~pos] < c).mean() >= spec)
    assert sens == best and (s[~pos] < t).mean() >= spec and (s[pos] >= t).mean() == sens


def test_wilson_by_hand():
    assert share_interval(10, 10) == pytest.approx((.7225, 1), abs=1e-3) and share_interval(0, 0) == (0, 1)


def test_grade_sets_hold_each_grade_as_often_as_promised():
    rng = np.random.default_rng(3)
    def draw(n):
        y = rng.choice(5, n, p=(.5, .1, .2, .1, .1))
        return .7 * y + .3 + rng.normal(0, .5, n) * (1 + .3 * y), y
    s, y = draw(4000)
    low, high = PredictionSets(.9).fit(s, y).predict(*(o := draw(20000))[:1], np.clip(o[0].round(), 0, 4).astype(int))
    held = (low <= o[1]) & (o[1] <= high)
    for g in range(5): assert held[o[1] == g].mean() > .88                              # filled gaps and the given grade only add
    assert (high - low + 1).mean() < 3.5


def test_grade_sets_promise_nothing_of_a_grade_they_hardly_saw():
    y = np.array([0] * 50 + [3] * 5); s = y + .01
    low, high = PredictionSets(.9).fit(s, y).predict([0., 0.], [0, 1])
    assert (low == 0).all() and (high == 4).all()                                        # grades 1, 2 and 4 were never seen


def test_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 300); g = np.clip(y + rng.integers(-1, 2, 300), 0, 4)
    rows = rng.integers(0, 300, (2000, 300))
    naive = np.quantile([quadratic_kappa(g[r], y[r]) for r in rows], [.025, .975])
    assert kappa_interval(g, y) == pytest.approx(tuple(naive), abs=.006)


def test_score_kappa_takes_columns_and_never_nan():
    k = ScoreKappa()
    assert k(torch.tensor([[0.], [1.2], [3.6]]), torch.tensor([0., 1., 4.])) == 1
    assert k(torch.zeros(3, 1), torch.zeros(3)) == 0
