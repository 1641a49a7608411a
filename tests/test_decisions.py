import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from aptos_fastai.common.io import AptosError
from aptos_fastai.decisions import (
    DecisionSpec,
    OperatingPoint,
    Probabilities,
    brier_score,
    choose_threshold,
    cross_fitted_probabilities,
    cross_fitted_thresholds,
    decision_of_record,
    net_benefit,
    reliability,
    without_ungradable,
)
from aptos_fastai.inference.referral import decision_results, fit_decision, fit_points
from aptos_fastai.metrics import PredictionSets, bootstrap, stratified_group_parts, wilson_interval
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError, Refer


def scored(n: int, seed: int = 0, images_a_patient: int = 1) -> pd.DataFrame:
    "Scores of `n` images: the grade plus noise that the images of a patient share in part"
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // images_a_patient
    grade = rng.choice(5, patient.max() + 1, p=[.5, .1, .2, .1, .1])[patient]
    score = .8 * grade + .3 + .3 * rng.normal(size=patient.max() + 1)[patient] + .4 * rng.normal(size=n)
    df = pd.DataFrame(dict(diagnosis=grade, score=score, group=[f'p{k}' for k in patient], ungradable=''))
    return df.assign(grade=np.digitize(df.score, [.5, 1.5, 2.5, 3.5]))


# Operating points

@pytest.mark.parametrize('target, value', [('sensitivity', .9), ('sensitivity', .5), ('specificity', .95)])
def test_a_threshold_is_the_order_statistic_that_a_loop_finds(target, value):
    df = scored(300, seed=3)
    positive = df.diagnosis >= 2
    threshold, note = choose_threshold(df.score, positive, target, value)
    allowed = math.floor((1 - value) * ((positive if target == 'sensitivity' else ~positive).sum() + 1)) - 1

    def wrong(t):
        "Images of the class of the target, and of the other one, that are called wrongly"
        missed, false = (df.score[positive] < t).sum(), (df.score[~positive] >= t).sum()
        return (missed, false) if target == 'sensitivity' else (false, missed)
    found = [wrong(t) for t in [*df.score, df.score.max() + 1]]          # each way to part the images
    fewest = min((other, own) for own, other in found if own <= allowed)
    assert wrong(threshold) == fewest[::-1] and not note


@pytest.mark.parametrize('target', ['sensitivity', 'specificity'])
def test_a_target_holds_on_average_for_new_images(target):
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):                                    # 19 images of a class, then one new: exchangeable
        scores = rng.normal(size=20)
        classes = np.r_[np.full(19, target == 'sensitivity'), np.full(300, target != 'sensitivity')]
        threshold, _ = choose_threshold(np.r_[scores[:19], rng.normal(size=300)], classes, target, .9)
        found.append((scores[19] >= threshold) == (target == 'sensitivity'))
    assert np.mean(found) == pytest.approx(.9, abs=.015)     # j = 2 of 20; with j = 1, it would be 0.95


def test_too_few_images_for_a_target_are_all_on_the_safe_side_and_said():
    scores, positive = [.1, 2, 3, .5], [False, True, True, False]
    threshold, note = choose_threshold(scores, positive, 'sensitivity', .95)
    assert .5 < threshold <= 2
    assert note == 'too few images (2) for sensitivity 0.95: the threshold classifies all of them correctly'
    threshold, note = choose_threshold(scores, positive, 'specificity', .95)
    assert .5 < threshold <= 2 and note.startswith('too few images (2) for specificity 0.95')


def test_one_class_alone_has_no_threshold():
    threshold, note = choose_threshold([1, 2], [True, True], 'sensitivity', .9)
    assert np.isnan(threshold) and note == 'all 2 images are positive'
    assert choose_threshold([1, 2], [False, False], 'threshold', 1.3) == (1.3, '')


def test_equal_scores_are_called_alike():
    threshold, _ = choose_threshold([1.] * 30 + [0.] * 30, [True] * 30 + [False] * 30, 'specificity', .9)
    assert threshold > 0
    threshold, _ = choose_threshold([1.] * 40, [True] * 30 + [False] * 10, 'specificity', .9)
    assert (np.ones(40) >= threshold).sum() == 0             # no score tells them apart: none is called positive


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(['sensitivity', 'specificity']), st.sampled_from([.6, .8, .9]))
def test_nested_figures_are_those_of_a_plain_loop(seed, target, value):
    df = scored(120, seed, images_a_patient=2)
    parts = stratified_group_parts(df.diagnosis, df.group)
    positive = (df.diagnosis >= 2).to_numpy()
    refer = Refer(**{target: (value,)})
    points, _ = fit_points(refer, df, parts, 'here')
    called = np.zeros(len(df), bool)
    for k in set(parts):                                     # fit on the others, call this part; both levels
        limits = []
        for level in (2, 3):
            fit = df[parts != k]
            limits.append(choose_threshold(fit.score, fit.diagnosis >= level, target, value)[0])
        called[parts == k] = df.score[parts == k] >= min(limits)
    assert points[0].sensitivity['value'] == pytest.approx(called[positive].mean())
    assert points[0].specificity['value'] == pytest.approx((~called[~positive]).mean())
    assert points[0].sensitivity['images'] == positive.sum()


def test_a_patient_is_never_on_both_sides_of_a_nested_fit():
    df = scored(400, images_a_patient=2)
    parts = stratified_group_parts(df.diagnosis, df.group)
    assert df.assign(part=parts).groupby('group').part.nunique().max() == 1
    thresholds = cross_fitted_thresholds(df.score, df.diagnosis >= 2, parts, 'sensitivity', .9)
    for k in range(5):
        fit = df[parts != k]
        expected = choose_threshold(fit.score, fit.diagnosis >= 2, 'sensitivity', .9)[0]
        assert (thresholds[parts == k] == expected).all()


def test_what_threatens_sight_is_referred():
    df = scored(500)
    parts = stratified_group_parts(df.diagnosis, df.group)
    points, warnings = fit_points(Refer(sensitivity=(.5, .99)), df, parts, 'here')
    assert points[0].threshold == points[1].threshold and 'lowered from' in points[0].note
    assert any('lowered' in text for text in warnings)
    called = np.zeros(500, bool)
    for k in range(5):                                       # the lower threshold, chosen on the other parts
        fit = df[parts != k]
        limit = choose_threshold(fit.score, fit.diagnosis >= 3, 'sensitivity', .99)[0]
        called[parts == k] = df.score[parts == k] >= limit
    assert points[0].sensitivity['value'] == pytest.approx(called[df.diagnosis >= 2].mean())


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([.5, .8, .9, .99]), st.sampled_from([.5, .9, .95, .99]))
def test_a_second_point_never_contradicts_the_decision(seed, sensitivity, specificity):
    df = scored(150, seed)
    refer = Refer(sensitivity=(sensitivity,), specificity=(specificity,))
    spec, warnings = fit_decision(refer, df, np.arange(150) % 5, 'here', .9)
    found = spec.decide(df.score, df.grade, df.grade)
    assert not ((found['referable'] == 'no') & (found['referable_high_specificity'] == 'yes')).any()
    assert not ((found['referable'] == 'no') & (found['sight_threatening'] == 'yes')).any()
    first, second = spec.point(2), spec.point(2, 1)
    assert second.specificity['value'] >= first.specificity['value']
    assert ('raised' in second.note) == any('raised' in text and 'referable' in text for text in warnings)


def test_two_operating_points_stand_side_by_side():
    df = scored(500)
    spec, _ = fit_decision(Refer(sensitivity=(.95,), specificity=(.97,)), df, np.arange(500) % 5, 'here', .9)
    first, second = spec.point(2), spec.point(2, 1)
    assert (first.target, second.target) == ('sensitivity', 'specificity') and first.threshold < second.threshold
    found = spec.decide([first.threshold - .01, first.threshold, second.threshold], [1, 1, 3], [1, 1, 3])
    assert found['referable'].tolist() == ['no', 'yes', 'yes']
    assert found['referable_high_specificity'].tolist() == ['no', 'no', 'yes']


def test_a_decision_is_apart_from_the_grade():
    spec = DecisionSpec((OperatingPoint(2, 'threshold', 1.2, 1.2), OperatingPoint(3, 'threshold', 3, 3.)))
    found = spec.decide([1.1, 1.2, 3.2], [1, 1, 4], [1, 2, 4])
    assert found['decision'].tolist() == ['do not refer', 'refer', 'refer']
    assert found['sight_threatening'].tolist() == ['no', 'no', 'yes']
    assert np.isnan(found['p_referable']).all() and set(found['referable_high_specificity']) == {''}


def test_uncertain_images_are_referred_if_the_recipe_says_so():
    points = (OperatingPoint(2, 'threshold', 2, 2.),)
    refer = DecisionSpec(points, uncertain='refer').decide([1, 1, 3], [1, 1, 3], [1, 2, 3])
    assert refer['decision'].tolist() == ['do not refer', 'uncertain: refer', 'refer']
    assert refer['referable'].tolist() == ['no', 'yes', 'yes']
    assert DecisionSpec(points).decide([1], [1], [2])['decision'].tolist() == ['do not refer']


def test_without_a_point_the_grade_decides():
    assert DecisionSpec().decide([0, 0], [1, 2], [1, 2])['decision'].tolist() == ['do not refer', 'refer']
    df = scored(60)
    spec, warnings = fit_decision(Refer(), df[df.diagnosis < 2].reset_index(drop=True), np.arange(60)[:sum(
        df.diagnosis < 2)] % 5, 'here', .9)
    assert spec.points == () and len(warnings) == 2
    assert warnings[0].startswith('no operating point for referable retinopathy (all ')
    assert warnings[0].endswith('grade 2 and above counts as referable')


def test_all_rules_together_by_image_and_by_patient():
    df = scored(400, images_a_patient=2)
    df.loc[df.index[:7], 'ungradable'] = 'blurred'
    parts = stratified_group_parts(df.diagnosis, df.group)
    spec, _ = fit_decision(Refer(threshold=(1.4, 2.5)), df, parts, 'here', .9)
    found = decision_results(spec, df, parts, .9, 'refer')['programme']
    called = (df.score >= 1.4) | (df.index < 7)
    positive = df.diagnosis >= 2
    assert found['images']['sensitivity']['value'] == pytest.approx(called[positive].mean())
    assert found['images']['referred']['value'] == pytest.approx(called.mean())
    worst = [(called[df.group == name].any(), positive[df.group == name].any()) for name in df.group.unique()]
    caught = [a for a, b in worst if b]
    assert found['patients']['sensitivity']['value'] == pytest.approx(np.mean(caught))
    assert found['patients']['sensitivity']['images'] == len(caught)
    without = decision_results(spec, df, parts, .9, 'exclude')['programme']['images']
    assert without['referred']['value'] == pytest.approx((df.score[7:] >= 1.4).mean())


def test_uncertain_images_of_a_programme_are_judged_by_sets_of_the_other_parts():
    df = scored(600)
    parts = stratified_group_parts(df.diagnosis, df.group)
    spec, warnings = fit_decision(Refer(threshold=(1.8,), uncertain='refer'), df, parts, 'here', .9)
    found = decision_results(spec, df, parts, .9, 'refer')['programme']['images']['referred']['value']
    called = np.zeros(600, bool)
    for k in range(5):
        inside = parts == k
        sets = PredictionSets(.9).fit(df.score[~inside], df.diagnosis[~inside])
        high = sets.predict(df.score[inside], df.grade[inside])[1]
        called[inside] = (df.score[inside] >= 1.8) | (high >= 2)
    assert found == pytest.approx(called.mean()) and called.mean() > (df.score >= 1.8).mean() and not warnings


def test_a_grade_of_few_images_makes_all_uncertain_and_is_said():
    df = scored(300)
    few = df[(df.diagnosis < 4) | (df.groupby('diagnosis').cumcount() < 5)].reset_index(drop=True)
    _, warnings = fit_decision(Refer(uncertain='refer'), few, np.arange(len(few)) % 5, 'here', .9)
    assert len(warnings) == 1 and 'too few images of grade 4' in warnings[0]
    assert fit_decision(Refer(), few, np.arange(len(few)) % 5, 'here', .9)[1] == []


def test_intervals_are_of_patients():
    df = scored(400, images_a_patient=4)
    parts = stratified_group_parts(df.diagnosis, df.group)
    alone = df.assign(group=np.arange(400))
    def width(rows): 
        low, high = fit_points(Refer(), rows, parts, 'here')[0][0].specificity['interval']
        return high - low
    assert width(df) > 1.05 * width(alone)
    p, positive = 1 / (1 + np.exp(1.5 - df.score)), df.diagnosis >= 2
    by_patient, by_image = (brier_score(p, positive, o.group)[1:] for o in (df, alone))
    assert by_patient[1] - by_patient[0] > 1.1 * (by_image[1] - by_image[0])
    bins = [reliability(p, positive, o.group, 4)[1]['interval'] for o in (df, alone)]
    assert bins[0][1] - bins[0][0] > bins[1][1] - bins[1][0]


def test_a_class_that_shares_one_part_has_no_figure_and_a_reason():
    df, first = scored(100), np.arange(100) < 6
    df = df.assign(diagnosis=np.where(first, 4, 0), group=np.where(first, 'p', df.group))
    parts = np.r_[np.zeros(6, int), np.arange(94) % 5]
    point = fit_points(Refer(), df, parts, 'here')[0][0]
    assert point.sensitivity['value'] is None and point.sensitivity['reason'] == 'all images of a class share a part'
    assert point.specificity['images'] == (parts != 0).sum()


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(AptosError, match='1 scores are not finite'): DecisionSpec().decide([np.nan, 1], [0, 1], [0, 1])


# Probabilities

def test_the_ordinal_model_finds_the_parameters_of_its_own_data():
    rng = np.random.default_rng(0)
    s = rng.uniform(-.5, 4.5, 40_000)
    true = Probabilities(2.5, (1.5, 3.5, 6., 8.5), (.2,) * 5)
    p = true.predict(s)
    y = (rng.uniform(size=len(s))[:, None] > p.cumsum(1)).sum(1)
    found = Probabilities.fit(s, y)
    assert found.slope == pytest.approx(2.5, rel=.03)
    assert found.intercepts == pytest.approx(true.intercepts, rel=.04)


def test_each_question_agrees_with_its_share_and_the_four_never_cross():
    df = scored(500, seed=5)
    p = Probabilities.fit(df.score, df.diagnosis).predict(df.score)
    assert p.sum(1) == pytest.approx(1) and (p >= 0).all()
    for k in range(1, 5): assert p[:, k:].sum(1).mean() == pytest.approx((df.diagnosis >= k).mean(), abs=2e-3)


def test_two_grades_give_the_logistic_regression_of_scikit_learn():
    rng = np.random.default_rng(1)
    s = rng.normal(size=800)
    y = np.where(rng.uniform(size=800) < 1 / (1 + np.exp(-2 * s)), 4, 0)          # all four questions are the same one
    reference = LogisticRegression(C=1e3).fit(s[:, None], y == 4).predict_proba(s[:, None])[:, 1]
    assert Probabilities.fit(s, y).predict(s)[:, 4] == pytest.approx(reference, abs=2e-3)


def test_the_probability_agrees_with_isotonic_regression_on_many_images():
    df = scored(20_000, seed=2)
    p = Probabilities.fit(df.score, df.diagnosis).predict(df.score)[:, 2:].sum(1)
    isotonic = IsotonicRegression(out_of_bounds='clip').fit(df.score, df.diagnosis >= 2).predict(df.score)
    assert np.abs(p - isotonic).mean() < .02


def test_a_stated_prevalence_is_bayes_rule():
    df = scored(1000)
    fitted = Probabilities.fit(df.score, df.diagnosis)
    own = (df.diagnosis >= 2).mean()
    p, at = fitted.predict(df.score)[:, 2:].sum(1), fitted.predict(df.score, .05)[:, 2:].sum(1)
    odds = p / (1 - p) * (.05 / .95) / (own / (1 - own))
    assert at == pytest.approx(odds / (1 + odds))
    assert fitted.predict(df.score, float(own)) == pytest.approx(fitted.predict(df.score))
    assert fitted.predict([1.], .05).sum() == pytest.approx(1)


def test_grades_without_images_and_a_single_grade_stay_finite():
    df = scored(200)
    some = df[df.diagnosis < 3]
    p = Probabilities.fit(some.score, some.diagnosis).predict([0, 2, 9])
    assert np.isfinite(p).all() and p[:, 3:].max() == 0
    p = Probabilities.fit([1, 2, 3], [2, 2, 2]).predict([0, 5])
    assert p.argmax(1).tolist() == [2, 2]
    separate = Probabilities.fit(np.arange(20.), np.repeat([0, 4], 10)).predict([0, 19])
    assert separate[0, 0] > .99 and separate[1, 4] > .99 and np.isfinite(separate).all()


def test_cross_fitted_probabilities_come_from_the_other_parts():
    df = scored(100)
    parts = np.arange(100) % 4
    p = cross_fitted_probabilities(df.score, df.diagnosis, parts)
    fit = df[parts != 2]
    expected = Probabilities.fit(fit.score, fit.diagnosis).predict(df.score[parts == 2])
    assert p[parts == 2] == pytest.approx(expected)


def test_brier_reliability_and_net_benefit_by_hand():
    p, y = np.array([.1, .2, .8, .9]), np.array([False, True, True, True])
    value, low, high = brier_score(p, y)
    assert value == pytest.approx(brier_score_loss(y, p)) and low < value < high
    first, second = reliability(p, y, bins=2)
    assert (first['predicted'], first['observed'], first['images']) == (pytest.approx(.15), .5, 2)
    assert second['interval'] == pytest.approx(wilson_interval(2, 2))
    benefit = net_benefit([p >= .5, np.ones(4, bool), np.zeros(4, bool)], y, [.5, .5, .5])
    assert benefit == pytest.approx([2 / 4, 3 / 4 - 1 / 4, 0])
    assert net_benefit(np.ones(4, bool), y, [.2]) == pytest.approx([3 / 4 - 1 / 4 * .25])


def test_the_interval_of_the_brier_score_is_that_of_its_draws():
    df = scored(60, images_a_patient=2)
    p, positive = 1 / (1 + np.exp(1.5 - df.score)), df.diagnosis >= 2
    squares = ((p - positive) ** 2).to_numpy()
    draws = bootstrap(lambda w: (w * squares).sum(1) / w.sum(1), 60, df.group)
    value, *interval = brier_score(p, positive, df.group, .6)
    assert value == pytest.approx(squares.mean()) and interval == pytest.approx(np.quantile(draws, [.2, .8]))


def test_reliability_has_ten_bins_of_images_by_probability():
    p = np.arange(20)[::-1] / 20
    found = reliability(p, p >= .5)
    assert [o['images'] for o in found] == [2] * 10 and [o['observed'] for o in found] == [0] * 5 + [1] * 5
    assert [o['predicted'] for o in found] == pytest.approx(np.arange(10) / 10 + .025)
    assert [o['images'] for o in reliability(p[:3], p[:3] > .9)] == [1, 1, 1]


def test_an_ungradable_image_has_no_decision_and_no_probability():
    points = OperatingPoint(2, 'threshold', 1, 1.), OperatingPoint(2, 'specificity', .9, 2.)
    spec = DecisionSpec(points, Probabilities(2., (1., 2., 3., 4.), (.2,) * 5))
    df = pd.DataFrame(spec.decide([0., 3.] * 2, [0, 3] * 2, [0, 3] * 2))
    found = without_ungradable(df, pd.Series([True, True, False, False]))
    texts = ['decision', 'referable', 'sight_threatening', 'referable_high_specificity']
    assert found[texts][:2].to_numpy().tolist() == [['not gradable', *['ungradable'] * 3]] * 2
    assert found[texts][2:].equals(df[texts][2:])
    assert found.filter(like='p_').isna().all(axis=1).tolist() == [True, True, False, False]
    assert df[texts].iloc[1].tolist() == ['refer', 'yes', 'yes', 'yes']            # the table itself stays
    single = pd.DataFrame(DecisionSpec(points[:1]).decide([0.], [0], [0]))
    assert without_ungradable(single, pd.Series([True])).referable_high_specificity.tolist() == ['']


def test_probabilities_of_a_score_by_hand():
    "exp(-2 * 1.5) = 1 / 20.09: P(grade >= 1) = 1 / (1 + e^(1 - 3)) and so on"
    model = Probabilities(2., (1., 2., 3., 4.), (.4, .1, .3, .1, .1))
    at_least = [1 / (1 + math.exp(o - 3)) for o in (1, 2, 3, 4)]
    expected = -np.diff([1, *at_least, 0])
    assert model.predict([1.5])[0] == pytest.approx(expected)
    odds = expected * np.where(np.arange(5) >= 2, .2 / .5, .8 / .5)            # half of its own images are referable
    assert model.predict([1.5], .2)[0] == pytest.approx(odds / odds.sum())
    found = DecisionSpec(probabilities=model, prevalence=.2).decide([1.5], [1], [1])
    assert found['p_referable'] == pytest.approx((odds / odds.sum())[2:].sum())
    assert found['p_sight_threatening'] == pytest.approx((odds / odds.sum())[3:].sum())
    assert [found[f'p_{g}'][0] for g in range(5)] == pytest.approx(odds / odds.sum())


@pytest.mark.parametrize('shares', [(.5, .5, 0., 0., 0.), (0., 0., .5, .25, .25)])
def test_a_prevalence_means_nothing_where_all_images_are_alike(shares):
    model = Probabilities(2., (1., 2., 3., 4.), shares)
    assert model.predict([1.5], .2).tolist() == model.predict([1.5]).tolist()


def test_a_fit_knows_the_shares_of_all_grades_and_takes_grades_as_read():
    found = Probabilities.fit([0., .5, 1., 1.5], np.array([0., 1., 0., 1.], np.float32))
    assert found.shares == (.5, .5, 0, 0, 0) and found == Probabilities.fit([0, .5, 1, 1.5], [0, 1, 0, 1])
    assert found.intercepts[1:] == (1e6,) * 3 and found.slope > 0
    assert Probabilities.fit([1, 2], [2, 2]) == Probabilities(0., (-1e6, -1e6, 1e6, 1e6), (0, 0, 1, 0, 0))


@pytest.mark.parametrize('point, text', [
    (OperatingPoint(2, 'sensitivity', .9, 1.), 'sensitivity 0.90'),
    (OperatingPoint(3, 'specificity', .975, 1.), 'specificity 0.975')])
def test_an_operating_point_in_words(point, text):
    names = {2: ('referable', 'referable'), 3: ('sight_threatening', 'sight-threatening')}
    assert (point.name, point.label) == names[point.lowest_grade] and point.target_text == text


@pytest.mark.parametrize('target, value, threshold', [
    ('sensitivity', .75, 4.5),               # j = floor(.25 * 6) = 1: the lowest of 5 positives, 5, stays on its side
    ('sensitivity', .6, 6.5),                # j = 2: the second lowest, 7, stays on its side
    ('specificity', .75, 6.5),
    ('specificity', .6, 4.5)])
def test_a_threshold_by_hand(target, value, threshold):
    scores, positive = [1, 2, 3, 4, 6, 5, 7, 8, 9, 10], [False] * 5 + [True] * 5
    assert choose_threshold(scores, positive, target, value)[0] == threshold


@pytest.mark.parametrize('n', [8, 9])
def test_nine_images_are_enough_for_a_target_of_90_percent(n):
    "j = floor(0.1 * (9 + 1)) = 1"
    _, note = choose_threshold(np.arange(2 * n), np.arange(2 * n) >= n, 'sensitivity', .9)
    assert note.partition(':')[0] == ('too few images (8) for sensitivity 0.9' if n == 8 else '')


def test_a_threshold_without_an_image_of_the_other_class_beyond_it():
    "All negatives lie above the positives 1 and 2"
    scores, positive = [1, 2, 3, 4], [True, True, False, False]
    assert choose_threshold(scores, positive, 'sensitivity', .5)[0] == 1
    assert choose_threshold(scores, positive, 'specificity', .5)[0] == np.nextafter(4, 5)


def test_thresholds_of_parts_that_lack_a_class():
    found = cross_fitted_thresholds([1, 2, 3, 4], [False, True, True, True], [0, 1, 1, 1], 'sensitivity', .5)
    assert np.isnan(found[0]) and np.isnan(found[1:]).all()
    assert np.isnan(cross_fitted_thresholds([1, 2], [False, True], [0, 0], 'sensitivity', .5)).all()
    assert cross_fitted_thresholds([1, 2], [False, True], [0, 0], 'threshold', 1.5).tolist() == [1.5, 1.5]
    assert np.isnan(cross_fitted_probabilities([1, 2], [0, 1], [0, 0])).all()


def test_a_specification_survives_json():
    df = scored(200)
    spec, _ = fit_decision(Refer(sensitivity=(.9, .8), specificity=(.95,), prevalence=.1), df, np.arange(200) % 5, 'x',
                           .9)
    assert decision_of_record(asdict(spec)) == spec and spec.prevalence == .1


# The recipe

def test_a_recipe_says_which_points(tmp_path):
    def refer(*lines):
        file = tmp_path / 'r.ini'
        file.write_text('[table.a]\ncsv = a.csv\ngrade = g\n[stage.s]\ntrain = a\n[submit]\nfinal = s\n[refer]\n'
                        + '\n'.join(lines))
        return read_recipe(file).refer
    assert refer().targets((2, 3)) == [('sensitivity', 2, .9), ('sensitivity', 3, .9)]
    assert refer('sensitivity = 0.95 0.9').targets((2, 3)) == [('sensitivity', 2, .95), ('sensitivity', 3, .9)]
    assert refer('specificity = 0.95').targets((2, 3)) == [('specificity', 2, .95), ('specificity', 3, .95)]
    both = refer('sensitivity = 0.9', 'specificity = 0.95').targets((2, 3))
    assert [o[0] for o in both] == ['sensitivity'] * 2 + ['specificity'] * 2
    assert refer('threshold = 1.2').targets((2, 3)) == [('threshold', 2, 1.2), ('threshold', 3, 1.2)]
    with pytest.raises(ConfigError, match='one number, or two'): refer('sensitivity = 0.9 0.9 0.9')
    with pytest.raises(ConfigError, match='no target'): refer('threshold = 1.2', 'specificity = 0.9')
    with pytest.raises(AptosError, match='a number from 0.5 to 0.999'): refer('sensitivity = 90')
