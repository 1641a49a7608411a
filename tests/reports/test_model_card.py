"The model card: its tables agree with counts made by hand, and what is unknown is called so."
import re
from dataclasses import replace

import pytest

from aptos_fastai.data.retina import Prep
from aptos_fastai.decisions import DecisionSpec, OperatingPoint
from aptos_fastai.inference.model_spec import NOT_REPORTED, MemberSpec, ModelSpec
from aptos_fastai.reports.model_card import card_text, error_kinds, markdown_table, table_rows

SECTIONS = ['Model details', 'Intended use', 'Factors', 'Metrics', 'Evaluation data', 'Training data',
            'Quantitative analyses', 'Failure modes', 'Ethical considerations', 'Caveats and recommendations', 'Files']


def measured(value, low, high, images):
    "A measure as summary.json holds it"
    return dict(value=value, interval=[low, high], images=images, reason='')


@pytest.fixture
def model():
    "A model of one network with an operating point"
    member = MemberSpec('w.safetensors', 'a', 'test_resnet', 'gem', 64, 'none', (0., 0., 0.), (1., 1., 1.), 1.)
    point = OperatingPoint(2, 'sensitivity', .9, 1.4, 'out-of-fold scores of run/stage, 100 images',
                           measured(.91, .85, .95, 40), measured(.88, .8, .93, 60))
    return ModelSpec('run/stage', Prep(size=64), (member,), (.5, 1.5, 2.5, 3.5), .9, False, kappa='0.85',
                     decision=DecisionSpec((point,)))


@pytest.fixture
def bundle():
    "The record of its bundle, with what the run measured"
    table = dict(table='clinic', uses=['training', 'validation'], images=100, grades=[50, 10, 20, 10, 10],
                 grouped_by='patients', groups=60, ungradable_by_graders=3, carried=dict(device={'A|1': 70, 'B': 30}))
    metrics = dict(
        kappa=.85, kappa_interval=[.8, .9], resampled='patients', threshold_method='regularised', validated=100,
        recall=[dict(grade=grade, **measured(.8, .7, .9, 20)) for grade in range(5)], auc=measured(.95, .9, .98, 100),
        confusion=[[45, 4, 1, 0, 0], [2, 6, 2, 0, 0], [0, 3, 15, 2, 0], [1, 0, 2, 6, 1], [0, 0, 1, 2, 7]],
        recipe='mine', date='2026-01-02', owner='Eye Clinic', contact='', left_out='', tables=[table],
        decision=dict(brier=dict(referable=measured(.08, .06, .1, 100) | dict(
                          mean_predicted=.4, observed=.41, of_prevalence=.24)),
                      programme=dict(images={key: measured(.9, .8, .95, 100) for key in
                                             ('sensitivity', 'specificity', 'referred')}, patients=None)),
        prediction_sets=dict(target=.9, coverage=measured(.91, .84, .95, 100), by_grade=[],
                             mean_size=measured(1.7, 0, 0, 100)),
        clusters=[dict(kind='camera', meaning='size', drop=.3, drop_by_chance=.1, clusters=[
            dict(name='big', images=60, kappa=.9, kappa_interval=[.8, .95], mean_error=.2),
            dict(name='small', images=40, kappa=None, kappa_interval=None, mean_error=.4)])],
        gate=dict(validation=dict(images=100, ungradable=2, reasons={'too dark': 2})), points=[1.4], node='stage',
        largest_errors=[dict(table='clinic', id_code='eye|7', diagnosis=3, grade=0, score=.2)])
    lineage = dict(stage='stage', fold=0, images=dict(train=80, valid=20), settings=dict(train=['clinic']),
                   versions=dict(aptos_fastai='1.0', git=''))
    return dict(metrics=metrics, lineage=[lineage], parity_on='', training_images='', aptos_fastai='1.1',
                licence='as the tables', changed_from=None)


def test_card_has_the_sections_and_figures(model, bundle):
    card = card_text(model, bundle, [], [])
    assert re.findall(r'^## (.*)$', card, re.MULTILINE) == SECTIONS
    for text in (
            'owner: Eye Clinic', 'contact: not stated', '2026-01-02', model.key,
            '| clinic | training, validation | 100 | 60 | 50 / 10 / 20 / 10 / 10 | 3 |', 'clinic, device: A|1 70, B 30',
            'AUC of referable DR 0.950 (95 % CI over patients 0.90–0.98)',
            '| referable (grade ≥ 2) | score ≥ 1.400 | chosen for sensitivity 0.90 | 0.910 (0.85–0.95) |',
            '| images | 100 | 0.900 (0.80–0.95) |', '| 0.080 (0.06–0.10) | 0.240 | 40 % | 41 % |',
            'kappa drops by 0.30 (by chance up to 0.10)', '| small | 40 | one grade | 0.40 |',
            'validation images: 2 of 100 rejected', 'too dark 2', '| eye 7 | clinic | 3 | 0 | 0.20 |',
            'None: how well the model grades images of another source is unknown'):
        assert text in card, text
    for left in ('{{', '{%', '&#', 'None,', 'nan', '\n\n\n'): assert left not in card, left


def test_every_table_of_the_card_has_as_many_cells_as_its_head(model, bundle):
    cells = 0
    for block in re.findall(r'(?:^\|.*\n)+', card_text(model, bundle, [], []), re.MULTILINE):
        assert len({line.count('|') for line in block.splitlines()}) == 1, block
        cells += block.count('|')
    assert cells > 100


def test_kinds_of_errors_are_counted(bundle):
    found = {row[0]: row[1:] for row in error_kinds(bundle['metrics'])}
    assert found == {
        'one grade too low or too high': [18, 100, '18 %'], 'two or more grades too low': [2, 100, '2 %'],
        'two or more grades too high': [1, 100, '1 %'], 'grade 2 to 4, graded below 2': [4, 40, '10 %'],
        'grade 3 or 4, graded below 2': [1, 20, '5 %'], 'grade 0, graded 2 or higher': [1, 50, '2 %']}


def test_figures_of_a_former_operating_point_are_left_out(model, bundle):
    bundle['metrics']['points'] = [1.2]
    card = card_text(model, bundle | dict(changed_from=dict(model='former')), [], [])
    assert 'All rules together' not in card and '0.910 (0.85–0.95)' in card
    assert 'do not apply to these operating points' in card and 'those of model former' in card


def test_card_of_a_stage_without_a_summary_says_what_is_unknown(model, bundle):
    unreported = replace(model, kappa='', warnings=(NOT_REPORTED,), decision=DecisionSpec())
    card = card_text(unreported, bundle | dict(metrics={}), [], [])
    for text in (NOT_REPORTED, 'owner: not stated', 'date of the training run: unknown', 'Unknown: no kappa',
                 'patients are unknown here', 'None: grade 2 and above counts as referable', 'Coverage not measured',
                 'The model gives no probabilities', 'Not recorded for this model'):
        assert text in card, text
    assert '\n\n\n' not in card


def test_unknown_patients_and_ungraded_tables(bundle):
    table = bundle['metrics']['tables'][0] | dict(grouped_by='images', grades=None)
    assert table_rows(dict(tables=[table])) == [['clinic', 'training, validation', 100, 'unknown', 'ungraded', 3]]


def test_markdown_table_keeps_its_columns():
    assert markdown_table(['a', 'b'], [['x|y', 'two\nlines']]) == '| a | b |\n|---|---|\n| x y | two lines |'
