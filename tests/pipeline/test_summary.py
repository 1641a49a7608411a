"Out-of-fold scores, their summary, and two runs side by side."
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import STAGES, expect_error, open_toy_run, toy_args

from aptos_fastai.cli import main
from aptos_fastai.common.console import console
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.metrics import kappa_interval, quadratic_kappa
from aptos_fastai.pipeline import compare
from aptos_fastai.pipeline.compare import compared_groups
from aptos_fastai.pipeline.summary import (
    OUT_OF_FOLD,
    PATIENTS_UNKNOWN,
    SETS_CAUTION,
    all_warnings,
    by_value,
    difference_text,
    epoch_warnings,
    grade_warnings,
    interval_text,
    patient_warnings,
    show_summary,
    warnings,
)


def test_numbers_are_printed_as_the_field_prints_them():
    assert interval_text(.8333, (.804, .858), 'patients') == '0.833 (95 % CI over patients 0.80–0.86)'
    assert interval_text(.8333, (.804, .858)) == '0.833 (0.80–0.86)'
    assert interval_text(.1, (-.05, .25)) == '0.100 (-0.05 to 0.25)'
    assert interval_text(-.0001, (-.001, .0)) == '0.000 (0.00–0.00)'
    assert difference_text(.0124, -.003, .0271) == '+0.012 (-0.003 to +0.027)'


def test_a_model_that_gives_all_images_one_grade_is_named():
    valid = pd.DataFrame(dict(diagnosis=[0, 1, 2, 3, 4], grade=[2] * 5))
    line, = grade_warnings(valid)
    assert line.startswith('every validation image gets grade 2: the model has learned nothing')
    assert not grade_warnings(valid.assign(grade=[2, 2, 2, 2, 3]))
    assert 'no graded image has grade 1, 2, 3, 4' in grade_warnings(pd.DataFrame(dict(diagnosis=[0], grade=[0])))[0]


def test_a_warning_of_all_models_names_none_of_them():
    results = [dict(stage=name, warnings=['w', 'x'] if name == 'a' else ['w']) for name in 'abcd']
    assert all_warnings(results) == ['all stages and ensembles: w', 'a: x']
    assert all_warnings(results[:3]) == ['a, b, c: w', 'a: x']


def test_oof_has_a_row_for_each_validation_image(toy):
    oof = pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    assert not oof.duplicated(['source', 'id_code']).any() and set(oof.source) == {'eyepacs2015', 'aptos_train'}
    for result in json.loads((toy / 'summary.json').read_text())['stages']:
        name = result['stage']
        valid = oof[oof[name].notna()]
        assert len(valid) == result['validated']
        grades = valid[f'{name}_grade']
        assert quadratic_kappa(grades, valid.diagnosis) == pytest.approx(result['kappa'], nan_ok=True)
        interval = kappa_interval(grades, valid.diagnosis, valid.group)
        assert result['kappa_interval'] == pytest.approx(interval, nan_ok=True)


def test_oof_scores_are_those_of_the_stages(toy):
    oof = pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    preds = pd.read_csv(toy / 'retrain_512/fold0/preds.csv', dtype=dict(id_code=str)).set_index('id_code').score
    scores = oof[oof.retrain_512.notna()].set_index('id_code').retrain_512
    assert np.allclose(scores, preds[scores.index])
    ensemble = oof[oof.ensemble.notna()]
    members = ['finetune_dense', 'finetune_256', 'finetune_512']
    assert np.allclose(ensemble.ensemble, ensemble[members].mean(axis=1))


def test_the_table_of_results_fits_80_columns_and_breaks_no_name(toy, capsys, monkeypatch):
    summary = json.loads((toy / 'summary.json').read_text())
    for result in summary['stages']:
        if not result['size']: continue                   # an ensemble
        result |= dict(images=dict(train=28101, valid=7025), folds=5, seconds=2 * 86400 - 600, kappa=-.01,
                       kappa_interval=[-.05, .25])
    monkeypatch.setattr(console, 'width', 80)
    show_summary(open_toy_run(toy), summary)
    lines = capsys.readouterr().out.partition('images: training')[0].splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert {*STAGES, 'eyepacs2015', 'aptos_train', 'aptos_test', '28101', '+7025'} <= words
    assert any('by finetune_256' in line for line in lines)


@pytest.fixture
def few_images(monkeypatch):
    "The toy runs have fewer images than `compare` asks for"
    monkeypatch.setattr(compare, 'MIN_COMMON', 10)


def test_a_run_equals_itself(toy, few_images, capsys):
    main(['compare', str(toy), str(toy)])
    out = capsys.readouterr().out
    assert out.count('+0.000 (+0.000 to +0.000)') == 10     # seven stages, two ensembles, the submission
    assert 'submission by retrain_512' in out and 'SYNTHETIC DEMO' in out


def test_compare_shows_a_difference(toy, few_images, tmp_path, capsys):
    shutil.copytree(toy, tmp_path / 'other')
    file = tmp_path / 'other/oof.csv'
    oof = pd.read_csv(file)
    oof['retrain_512_grade'] = oof.diagnosis.where(oof.retrain_512.notna())
    oof.to_csv(file, index=False)
    main(['compare', str(toy), str(tmp_path / 'other')])
    line = next(o for o in capsys.readouterr().out.splitlines() if o.startswith('retrain_512'))
    assert '1.000' in line and '+0.000 (' not in line


def test_compare_needs_finished_runs_on_the_same_tables(toy, tmp_path, capsys):
    expect_error(capsys, ['compare', toy, tmp_path], f'{tmp_path}: not a finished run')
    shutil.copytree(toy, tmp_path / 'other')
    file = tmp_path / 'other/oof.csv'
    oof = pd.read_csv(file)
    oof.assign(diagnosis=(oof.diagnosis + 1) % 5).to_csv(file, index=False)
    expect_error(capsys, ['compare', toy, tmp_path / 'other'], 'other grades than in')
    oof.assign(id_code=[f'x{i}' for i in range(len(oof))]).to_csv(file, index=False)
    expect_error(capsys, ['compare', toy, tmp_path / 'other'], 'no validation image in common')


# What a kappa does not say

RESULT = dict(stage='s', kappa=.8, kappa_interval=[.7, .9], resampled='patients', kappa_midpoints=.7,
              thresholds=[.5, 1.5, 2.5, 3.5], threshold_method='optimal')


@pytest.mark.parametrize('change, words', [
    ({}, []),
    (dict(kappa_interval=[-.1, .3]), ["kappa's interval contains 0"]),
    (dict(thresholds=[.5, 1.5, 1.55, 3.5]), ['thresholds 1.50 and 1.55 nearly coincide: grade 2 is hardly ever']),
    (dict(thresholds=[.5, .5, .5, 3.5]), ['grade 1 is hardly', 'grade 2 is hardly']),
    (dict(kappa_midpoints=.85), ['worse than the midpoints, out-of-fold (kappa 0.800 against 0.850)']),
    (dict(kappa_midpoints=.85, threshold_method='.7 1.5 2.5 3.5'), [])])
def test_warnings(change, words):
    found = warnings(RESULT | change)
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True): assert word in text


def test_summary_records_warnings_and_what_intervals_resample(toy):
    summary = json.loads((toy / 'summary.json').read_text())
    results = {result['stage']: result for result in summary['stages']}
    assert results['pretrain_256']['resampled'] == 'patients'
    assert PATIENTS_UNKNOWN not in results['pretrain_256']['warnings']
    assert results['finetune_256']['resampled'] == 'images'
    assert PATIENTS_UNKNOWN in results['finetune_256']['warnings']
    assert summary['submission']['warnings'] == results['retrain_512']['warnings']
    assert summary['submission']['cautions'] == [SETS_CAUTION]
    assert '95 % CI over images' in summary['submission']['kappa_text']


def test_oof_has_the_patient_of_each_image(toy):
    oof = pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    eyes = oof[oof.source == 'eyepacs2015']
    assert eyes.group.nunique() < len(eyes)
    assert (eyes.groupby('group').fold.nunique() == 1).all()


def test_terminal_and_compare_say_what_the_figures_are(toy, few_images, capsys):
    main(['all', *toy_args(toy)])
    out = ' '.join(capsys.readouterr().out.split())
    for text in (OUT_OF_FOLD, PATIENTS_UNKNOWN, 'the epoch was chosen on', SETS_CAUTION, 'bootstrap over patients ('):
        assert text in out, text
    main(['compare', str(toy), str(toy)])
    out = ' '.join(capsys.readouterr().out.split())
    for text in (OUT_OF_FOLD, PATIENTS_UNKNOWN, 'Paired bootstrap over patients ('): assert text in out, text


def test_compare_resamples_patients_if_either_run_knows_them():
    both = pd.DataFrame(dict(group=['a', 'b'], group_b=['p', 'p']))
    images, patients, blocks = (dict(resampled=o) for o in ('images', 'patients', 'blocks of 10 ids'))
    assert compared_groups(both, images, patients)[1].tolist() == ['p', 'p']
    assert compared_groups(both, images, blocks)[0] == 'blocks of 10 ids'
    assert compared_groups(both, patients, images)[1].tolist() == ['a', 'b']
    assert compared_groups(both, patients, blocks)[0] == 'patients'
    assert compared_groups(both, images, images)[1].tolist() == ['a', 'b']


def test_names_by_value():
    assert by_value(dict(a='images', b='images')) == 'images'
    assert by_value(dict(a='patients', b='images', c='patients')) == 'patients (a, c), images (b)'


def test_images_without_a_patient_stay_a_warning():
    run = SimpleNamespace(grouped_by=lambda valid: 'patients')
    valid = pd.DataFrame(dict(source='t', id_code=['1_left', '1_right', 'x', 'y'], group=['t:1', 't:1', 't:x', 't:y']))
    assert patient_warnings(run, valid) == ['patients of 2 of 4 images unknown: may be optimistic']
    assert patient_warnings(run, valid[:2]) == []
    for unknown in ('images', 'blocks of 10 ids', 'patients and images'):
        run.grouped_by = lambda valid, over=unknown: over
        assert patient_warnings(run, valid) == [PATIENTS_UNKNOWN]


def test_an_epoch_chosen_on_its_validation_images_is_a_warning(toy):
    run = open_toy_run(toy)
    keeps = {name: stage.keep for name, stage in run.recipe.stages.items()}
    for name, keep in keeps.items(): assert bool(epoch_warnings(run, name)) == (keep != 'last')
    assert any('epoch was chosen' in text for text in read_model(toy)[0].warnings)
