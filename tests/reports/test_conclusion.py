"The top of the report: sentences and figures that follow from summary.json."
import pytest

from aptos_fastai.reports.conclusion import cards, conclusion


def measured(value, low, high, images):
    "A measure as summary.json holds it"
    return dict(value=value, interval=[low, high], images=images, reason='')


def point(**changes):
    "An operating point as summary.json holds it"
    return dict(lowest_grade=2, target='sensitivity', value=.9, threshold=1.374, chosen_on='', note='',
                sensitivity=measured(.912, .88, .94, 301), specificity=measured(.873, .85, .89, 899)) | changes


def summary(points=(), patients=None, **changes):
    "A summary.json with all that the conclusion is made of"
    stage = dict(
        stage='teacher', weights={'teacher/fold0': 'a', 'teacher/fold1': 'b'}, kappa=.8523, validated=1200,
        kappa_interval=[.82, .88], resampled='patients', auc=measured(.957, .94, .97, 1200),
        recall=[dict(grade=grade, images=240) for grade in range(5)],
        decision=dict(points=list(points), probabilities=None, uncertain='decide', prevalence=None))
    images = dict(sensitivity=measured(.93, .9, .95, 301), specificity=measured(.86, .84, .88, 899),
                  referred=measured(.337, .31, .36, 1200))
    clusters = [dict(kind='camera', drop=.3, drop_by_chance=.12), dict(kind='id range', drop=.05, drop_by_chance=.1),
                dict(kind='site', drop=None, drop_by_chance=None)]
    return dict(synthetic=False, stages=[dict(stage='other'), stage | changes.pop('stage', {})], clusters=clusters,
                submission=dict(node='teacher'),
                decision=dict(programme=dict(images=images, patients=patients))) | changes


@pytest.mark.parametrize('members, words', [
    (dict(a=0., b=1.), 'mean of 2 networks'), (dict(a=.4, b=.6), 'weighted mean of 3 networks'),
    (dict(a=1., b=0.), 'one network')])
def test_networks_of_weight_0_are_not_counted(members, words):
    stage = dict(members=members, weights={'a/fold0': '', 'b/fold0': '', 'b/fold1': ''})
    assert conclusion(summary([point()], stage=stage))[0].startswith(f'teacher ({words}) grades')


def test_three_sentences_hold_the_figures():
    patients = dict(sensitivity=measured(.95, .92, .97, 160), specificity=measured(.8, .77, .83, 440),
                    referred=measured(.4, .36, .44, 600))
    assert conclusion(summary([point()], patients)) == [
        'teacher (mean of 2 networks) grades diabetic retinopathy (DR) from 0 to 4 in fundus images: quadratic '
        'weighted kappa 0.852 (95 % CI over patients 0.82–0.88) against the labels of 1200 out-of-fold images.',
        'At its operating point (score ≥ 1.37, chosen for sensitivity 0.90) it has a sensitivity of 0.912 (95 % CI '
        'over patients 0.88–0.94) and a specificity of 0.873 (95 % CI over patients 0.85–0.89) for referable DR '
        '(grade ≥ 2); it refers 34 % of the images, ungradable ones included, and 40 % of 600 patients (sensitivity '
        '0.950 (0.92–0.97), specificity 0.800 (0.77–0.83)).',
        'Limits: all images are of the source that the model was trained on; kappa drops by 0.30 between images that '
        'differ in camera (by chance up to 0.12).']


def test_limits_name_what_is_unknown():
    stage = dict(resampled='images', recall=[dict(grade=grade, images=0 if grade == 3 else 9) for grade in range(5)])
    limits = conclusion(summary([point()], synthetic=True, clusters=[], stage=stage))[2]
    for text in ('the images are generated', 'the patients are unknown', 'no image has grade 3'): assert text in limits
    assert 'drops' not in limits


@pytest.mark.parametrize('points, text', [
    ([], 'no operating point and refers grade 2 and above: sensitivity 0.930 (0.90–0.95) and specificity 0.860'),
    ([point(target='threshold', value=1.3, threshold=1.3)], '(score ≥ 1.30, fixed in the recipe)'),
    ([point(), point(target='specificity', value=.95, threshold=2.)], '(score ≥ 1.37, chosen for sensitivity 0.90)'),
])
def test_referral_sentence_of_each_kind_of_operating_point(points, text):
    assert text in conclusion(summary(points))[1]


def test_cards_are_kappa_auc_sensitivity_and_specificity():
    found = cards(summary([point()]))
    assert [value for value, _ in found] == ['0.852', '0.957', '0.912', '0.873']
    assert [label.rpartition('n = ')[2] for _, label in found] == ['1200', '1200', '301', '899']
    assert found[0][1] == 'quadratic weighted kappa (95 % CI over patients 0.82–0.88), n = 1200'
    assert 'at the operating point' in found[2][1]
    assert [value for value, _ in cards(summary())][2:] == ['0.930', '0.860']             # of all rules, by grade
    one_class = dict(auc=dict(value=None, interval=None, images=9, reason='no image has grade 2 or higher'))
    assert cards(summary([point()], stage=one_class))[1] == (
        'none', 'AUC, referable DR (grade ≥ 2): no image has grade 2 or higher')
