import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from aptos_fastai.files import AptosError
from aptos_fastai.metrics import GradeCuts, ScoreKappa, apply_cuts, kappa_interval, nested_grades, quadratic_kappa


def test_kappa_by_hand():
    # 4 pictures, grades 0 0 1 2 given 0 1 1 2: seen 1; chance = sum over pairs of (row n)(column n)(difference)^2 / 4 = 18 / 4
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
    "The best kappa over every placing of four cuts between different scores"
    u = np.unique(s)
    places = np.r_[u[0] - 1, (u[1:] + u[:-1]) / 2, u[-1] + 1]
    return max(quadratic_kappa(apply_cuts(s, c), y) for c in itertools.combinations_with_replacement(places, 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 12), st.integers(0, 4)), min_size=3, max_size=10))
def test_cuts_are_the_global_optimum(pairs):
    s, y = np.array(pairs, float).T
    if s.min() == s.max() or y.min() == y.max(): return
    c = GradeCuts().fit(s, y)
    assert c.kappa_ == pytest.approx(naive_best(s, y), abs=1e-9)
    assert quadratic_kappa(c.predict(s), y) == pytest.approx(c.kappa_, abs=1e-9)
    assert (np.diff(c.cuts_) >= 0).all()


@pytest.mark.parametrize('scores, grades, words', [
    ([1, 1, 1], [0, 1, 2], 'all 3 scores are 1'), ([0, 1, 2], [2, 2, 2], 'all 3 grades are 2'),
    ([0, np.nan, 2], [0, 1, 2], '1 of 3 scores are not numbers'), ([], [], '0 scores'), ([1, 2], [1], '2 scores and 1 grades')])
def test_cuts_refuse(scores, grades, words):
    with pytest.raises(AptosError, match=words): GradeCuts().fit(scores, grades)


def test_a_score_at_a_cut_goes_up(): assert apply_cuts([.69, .7, 1.5, 9], (.7, 1.5, 2.5, 3.5)).tolist() == [0, 1, 2, 4]


def test_nested_cuts_never_saw_their_picture():
    "Changing one picture's grade may change the others' grades but never its own part's cuts"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 100); s = y + rng.normal(0, .8, 100)
    optimist = GradeCuts().fit(s, y).kappa_
    assert quadratic_kappa(nested_grades(s, y), y) <= optimist
    noise = rng.normal(size=200); random = rng.integers(0, 5, 200)
    assert abs(quadratic_kappa(nested_grades(noise, random), random)) < .15 < GradeCuts().fit(noise[:30], random[:30]).kappa_


def test_interval_is_that_of_resampled_pictures():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 300); g = np.clip(y + rng.integers(-1, 2, 300), 0, 4)
    rows = rng.integers(0, 300, (2000, 300))
    naive = np.quantile([quadratic_kappa(g[r], y[r]) for r in rows], [.025, .975])
    assert kappa_interval(g, y) == pytest.approx(tuple(naive), abs=.006)


def test_score_kappa_takes_columns_and_never_nan():
    k = ScoreKappa()
    assert k(torch.tensor([[0.], [1.2], [3.6]]), torch.tensor([0., 1., 4.])) == 1
    assert k(torch.zeros(3, 1), torch.zeros(3)) == 0
