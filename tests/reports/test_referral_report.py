"Sections on decisions: their figures agree with counts made by hand, and grades have ordered, visible colours."
import numpy as np
import pandas as pd
import pytest

from aptos_fastai.decisions import DecisionSpec
from aptos_fastai.inference.referral import fit_points
from aptos_fastai.metrics import GRADES
from aptos_fastai.recipe.sections import Refer
from aptos_fastai.reports import colours, plots
from aptos_fastai.reports.referral_report import (
    THRESHOLDS,
    brier_table,
    cross_fitted_rules,
    decision_curve_section,
    probability_section,
    referral_section,
    reliability_figures,
    roc,
)


@pytest.fixture(scope='module')
def valid():
    "Out-of-fold scores of 300 images, and the fold of each"
    rng = np.random.default_rng(0)
    grade = rng.choice(GRADES, 300, p=[.5, .1, .2, .1, .1])
    score = grade + rng.normal(0, .6, 300)
    return pd.DataFrame(dict(diagnosis=grade, score=score, grade=np.clip(score.round(), 0, 4).astype(int),
                             group=np.arange(300).astype(str), fold=np.arange(300) % 5))


@pytest.fixture(scope='module')
def spec(valid):
    "Two operating points of referable DR, one of sight-threatening DR"
    refer = Refer(sensitivity=(.9,), specificity=(.98, .98))
    return DecisionSpec(fit_points(refer, valid, valid.fold.to_numpy(), 'these')[0])


def test_net_benefit_is_that_of_counts(valid, spec):
    referred = cross_fitted_rules(valid, valid.fold.to_numpy(), spec)
    assert list(referred) == ['by probability', 'operating point', 'refer all', 'refer none']
    _, _, table = decision_curve_section(referred, valid.diagnosis, '')
    found = {row[0]: row[1:] for row in table.rows}
    positives = int((valid.diagnosis >= 2).sum())
    for column, p in enumerate((.05, .1, .2, .3, .5)):
        expected = 1000 * (positives - (300 - positives) * p / (1 - p)) / 300
        assert float(found['refer all'][column]) == pytest.approx(expected, abs=.51)
        assert found['refer none'][column] == 0
    called = referred['operating point'][0]
    true, false = ((called & (valid.diagnosis >= 2 if wanted else valid.diagnosis < 2)).sum() for wanted in (1, 0))
    assert float(found['operating point'][1]) == pytest.approx(1000 * (true - false / 9) / 300, abs=.51)
    assert all(float(a) >= float(b) - 1 for a, b in zip(found['by probability'], found['refer none'], strict=True))


def test_rule_by_probability_refers_fewer_images_the_higher_the_threshold(valid, spec):
    called = cross_fitted_rules(valid, valid.fold.to_numpy(), spec)['by probability']
    assert called.shape == (len(THRESHOLDS), 300)
    assert (np.diff(called.sum(1)) <= 0).all() and called[0].sum() > called[-1].sum()


def test_without_an_operating_point_the_grade_refers(valid):
    referred = cross_fitted_rules(valid, valid.fold.to_numpy(), DecisionSpec())
    assert (referred['grade ≥ 2'] == (valid.grade >= 2).to_numpy()).all()


def test_operating_points_stand_beside_the_grade(valid, spec):
    programme = dict(images={key: dict(value=.5, interval=[.4, .6], images=300, reason='')
                             for key in ('sensitivity', 'specificity', 'referred')}, patients=None)
    points, counted, curve, by_threshold = referral_section(valid, spec, programme, 'images')
    assert [row[1] for row in points.rows] == ['chosen for sensitivity 0.90', 'chosen for sensitivity 0.90',
                                               'chosen for specificity 0.98', 'chosen for specificity 0.98',
                                               'for comparison']
    by_grade = valid[valid.diagnosis >= 2].grade >= 2
    assert points.rows[-1][3].startswith(f'{by_grade.mean():.3f} (')
    assert counted.rows == [['images', 300, '0.500 (0.40–0.60)', '0.500 (0.40–0.60)', '0.500 (0.40–0.60)']]
    labels = 'chosen for sensitivity 0.90', 'chosen for specificity 0.98', 'grade ≥ 2'
    for label in labels: assert label in curve.svg
    assert 'share referred' in by_threshold.svg and 'in-sample' in by_threshold.caption


def test_roc_without_a_class_says_so(valid):
    assert roc(valid.assign(diagnosis=0), DecisionSpec(), 'images') == [
        'No ROC curve: all validation images are non-referable.']


def test_brier_table_compares_observed_with_expected(valid):
    one = dict(value=.1, interval=[.08, .12], images=200, reason='', mean_predicted=.25, observed=.3, of_prevalence=.21)
    table = brier_table(dict(referable=one, sight_threatening=one | dict(mean_predicted=0.)), 'patients')
    assert table.rows[0] == ['referable (grade ≥ 2)', 200, '0.100 (0.08–0.12)', '0.210', '50.0', 60, '1.20']
    assert table.rows[1][-1] == 'undefined'


def test_few_images_get_few_bins(valid):
    p = dict(referable=np.linspace(0, 1, 300), sight_threatening=np.linspace(0, 1, 300))
    assert all('10 bins' in o.caption for o in reliability_figures(valid, p, 'images'))
    few = {name: values[:50] for name, values in p.items()}
    assert all('2 bins' in o.caption for o in reliability_figures(valid[:50], few, 'images'))
    sections = probability_section(valid, valid.fold.to_numpy(), dict.fromkeys(p, dict(
        value=.1, interval=None, images=300, mean_predicted=.4, observed=.4, of_prevalence=.24)), 'images')
    assert [type(o).__name__ for o in sections] == ['Table', 'Figure', 'Figure']


def luminance(colour):
    "WCAG 2.2 relative luminance of #rrggbb"
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)
    return float(linear @ [.2126, .7152, .0722])


@pytest.mark.parametrize('page, grades', [(colours.LIGHT_PAGE, colours.GRADES_LIGHT),
                                          (colours.DARK_PAGE, colours.GRADES_DARK)])
def test_colours_of_grades_are_ordered_and_visible(page, grades):
    light = [luminance(o) for o in (page, *grades)]
    contrasts = [(max(o, light[0]) + .05) / (min(o, light[0]) + .05) for o in light[1:]]
    assert min(contrasts) >= 3                                         # WCAG 2.2, 1.4.11
    assert all(later > 1.3 * earlier for earlier, later in zip(contrasts, contrasts[1:], strict=False))


def test_figures_take_the_colours_of_the_page():
    svg = plots.to_svg(plots.recall_bars([.5] * GRADES, [(.4, .6)] * GRADES, [9] * GRADES), 'recall')
    for grade, colour in enumerate(colours.GRADES_LIGHT): assert f'var(--grade-{grade}, {colour})' in svg
    for ink in (plots.INK, plots.PAGE_INK, *plots.GRADE_INKS): assert ink not in svg
