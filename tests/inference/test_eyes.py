"Fusing the scores of both eyes: fellows, the fit, its cross-fitting, and what is graded alone."
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

from aptos_fastai.inference.eyes import (
    EyesSpec,
    Fusion,
    cross_fitted,
    evaluate_eyes,
    eyes_of_record,
    fellow_scores,
    fit_eyes,
)
from aptos_fastai.metrics import GRADE_NAMES, apply_thresholds
from aptos_fastai.recipe.sections import Refer

FIXED = '0.5 1.5 2.5 3.5'


def eyes_table(patients=200, seed=0, noise=.7):
    "Two eyes of each patient with correlated grades, their scores, and grades by the midpoints"
    rng = np.random.default_rng(seed)
    left = rng.choice(5, patients, p=[.5, .1, .2, .1, .1])
    right = np.where(rng.random(patients) < .87, left, np.clip(left + rng.choice([-1, 1], patients), 0, 4))
    y = np.stack([left, right], 1).ravel()
    df = pd.DataFrame(dict(diagnosis=y, score=y + rng.normal(0, noise, len(y)), eye=['left', 'right'] * patients,
                           patient=[f'p{i // 2}' for i in range(len(y))]))
    fellow = fellow_scores(df.score, df.patient, df.eye)
    return df.assign(group=df.patient, fellow=fellow, grade=apply_thresholds(df.score, [.5, 1.5, 2.5, 3.5]))


def parts_of(df, n=5): return df.patient.str[1:].astype(int).to_numpy() % n


# Fellows

def test_the_fellow_is_the_mean_of_the_images_of_the_patients_other_eye():
    rows = [('a', 'left', 1.), ('a', 'left', 3.), ('a', 'right', 4.), ('b', 'left', 2.), ('', 'left', 1.),
            ('', 'right', 5.), ('c', '', 1.), ('c', 'right', 2.), ('d', 'right', 0.), ('d', 'left', 7.)]
    patients, eyes, scores = zip(*rows, strict=True)
    found = fellow_scores(scores, patients, eyes)
    np.testing.assert_array_equal(found, [4, 4, 2, *[np.nan] * 5, 7, 0])


def test_what_is_not_usable_has_no_fellow_and_is_none():
    patients, eyes, scores = ['a'] * 3, ['left', 'right', 'right'], [1., 2., 9.]
    np.testing.assert_array_equal(fellow_scores(scores, patients, eyes, [True, True, False]), [2, 1, np.nan])
    assert np.isnan(fellow_scores(scores, patients, eyes, [True, False, False])).all()
    assert fellow_scores([], [], []).shape == (0,)


def test_the_order_of_images_changes_no_fellow():
    df = eyes_table(30)
    shuffled = df.sample(frac=1, random_state=1)
    found = pd.Series(fellow_scores(shuffled.score, shuffled.patient, shuffled.eye), shuffled.index)
    np.testing.assert_allclose(found.sort_index(), df.fellow)


# The fit

def test_the_fit_is_least_squares_where_both_scores_count():
    df = eyes_table()
    x = df[['score', 'fellow']].to_numpy()
    expected = LinearRegression().fit(x, df.diagnosis)
    found = Fusion.fit(df.score, df.fellow, df.diagnosis)
    assert found.own > found.fellow > .1
    np.testing.assert_allclose([found.intercept, found.own, found.fellow], [expected.intercept_, *expected.coef_])
    np.testing.assert_allclose(found.predict(df.score, df.fellow), expected.predict(x))


def test_no_score_counts_negatively():
    df = eyes_table()
    found = Fusion.fit(df.score, -df.fellow, df.diagnosis)
    assert found.fellow == 0
    own = LinearRegression().fit(df[['score']], df.diagnosis)
    np.testing.assert_allclose([found.intercept, found.own], [own.intercept_, own.coef_[0]])


@pytest.mark.parametrize('how', ['optimal', 'regularised', FIXED])
def test_the_grades_of_a_part_change_nothing_of_its_fused_scores_and_grades(how):
    df = eyes_table(60)
    parts = parts_of(df)
    before = cross_fitted(df, parts, how)
    for k in range(5):
        inside = parts == k
        other = df.diagnosis.where(~inside, 4 - df.diagnosis)
        after = cross_fitted(df.assign(diagnosis=other), parts, how)
        for name in ('score', 'grade'):
            np.testing.assert_array_equal(before[name][inside], after[name][inside])
            assert not np.array_equal(before[name][~inside], after[name][~inside])


def test_the_scores_of_a_part_change_nothing_of_the_other_ones_fusion():
    df = eyes_table(60)
    inside = parts_of(df) == 2
    by_hand = Fusion.fit(df.score[~inside], df.fellow[~inside], df.diagnosis[~inside])
    found = cross_fitted(df, parts_of(df), 'regularised').score[inside]
    np.testing.assert_array_equal(found, by_hand.predict(df.score[inside], df.fellow[inside]))


def test_the_figures_are_cross_fitted_and_the_other_eye_gains_kappa():
    df = eyes_table(400)
    spec, notes = fit_eyes(df, parts_of(df), 'regularised', Refer(), .9, 'here')
    r = spec.results
    assert r['images'] == 800 and r['patients'] == 400 and not notes
    assert r['gain']['value'] == pytest.approx(r['fused']['value'] - r['alone']['value'])
    assert r['gain_over_own_score']['value'] == pytest.approx(r['fused']['value'] - r['own_score']['value'])
    assert r['gain_over_own_score']['interval'][0] > 0 and r['auc_gain']['interval'][0] > 0
    assert r['coverage']['value'] == pytest.approx(.9, abs=.04)
    assert spec.decision.points[0].chosen_on == 'here' and spec.decision.points[0].sensitivity['value'] > .85


def test_a_fellow_that_says_nothing_is_warned_of():
    df = eyes_table(100)
    random = np.random.default_rng(3).permutation(df.fellow)
    _, notes = fit_eyes(df.assign(fellow=random), parts_of(df), FIXED, Refer(), .9, 'here')
    assert notes == ['fusion of the eyes: it does not raise kappa out-of-fold: [submit] eyes = single may be better']


def test_scores_that_do_not_count_are_warned_of():
    df = eyes_table()
    spec, notes = fit_eyes(df.assign(score=-df.score, fellow=-df.fellow), parts_of(df), FIXED, Refer(), .9, 'here')
    assert spec.fusion.own == spec.fusion.fellow == 0 and any('gets the same score' in note for note in notes)


# What it predicts

def spec_of(df=None):
    df = eyes_table() if df is None else df
    return fit_eyes(df, parts_of(df), 'regularised', Refer(), .9, 'here')[0]


def test_a_record_gives_the_same_spec_back():
    spec = spec_of()
    assert eyes_of_record(json.loads(json.dumps(asdict(spec)))) == spec
    assert eyes_of_record(None) is None


def test_only_images_with_a_fellow_are_fused():
    spec = spec_of()
    eyes = ['left', 'right', 'left', 'left', 'right', 'left']
    people = pd.DataFrame(dict(patient=['a', 'a', 'b', 'c', 'c', ''], eye=eyes))
    scores = [.2, 3.1, 2., 1., 4., 2.]
    found = spec.fused_rows(scores, people, [True, True, True, True, False, True])
    assert found.index.tolist() == [0, 1]
    np.testing.assert_allclose(found.score, spec.fusion.predict([.2, 3.1], [3.1, .2]))
    assert found.grade.tolist() == apply_thresholds(found.score, spec.thresholds).tolist()
    assert found.grade_name.tolist() == [GRADE_NAMES[g] for g in found.grade]
    assert (found.grade_low <= found.grade).all() and (found.grade <= found.grade_high).all()
    none = spec.fused_rows(scores, people.assign(patient=''), True)
    assert not len(none) and list(none) == list(found)


def test_predictions_depend_on_all_that_the_digest_names():
    spec = spec_of()
    assert isinstance(spec, EyesSpec) and spec.predicts_by == spec_of().predicts_by
    assert spec.predicts_by != spec_of(eyes_table(seed=1)).predicts_by


def test_an_evaluation_compares_the_same_images_alone_and_fused():
    spec, df = spec_of(), eyes_table(seed=5).assign(ungradable='')
    df.loc[0, 'ungradable'] = 'blurred'                          # so the other eye of p0 is graded alone, too
    found = evaluate_eyes(spec, df)
    assert found['images'] == len(df) - 2 and found['patients'] == 199
    assert found['gain']['value'] == pytest.approx(found['fused']['value'] - found['alone']['value'])
    assert found['gain']['value'] > 0
    assert evaluate_eyes(spec, df.assign(patient='')) is None
