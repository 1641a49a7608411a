"Out-of-fold scores, their summary, and two runs side by side."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import expect_error

from aptos_fastai.cli import main
from aptos_fastai.metrics import quadratic_kappa
from aptos_fastai.pipeline.summary import difference_text, interval_text


def test_numbers_are_printed_as_the_field_prints_them():
    assert interval_text(.8333, (.804, .858)) == '0.833 (95 % CI 0.80–0.86)'
    assert interval_text(.8333, (.804, .858), label='') == '0.833 (0.80–0.86)'
    assert interval_text(.1, (-.05, .25), label='') == '0.100 (-0.05 to 0.25)'
    assert difference_text(.0124, -.003, .0271) == '+0.012 (-0.003 to +0.027)'


def test_oof_has_a_row_for_each_validation_image(toy):
    oof = pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    assert not oof.duplicated(['source', 'id_code']).any() and set(oof.source) == {'eyepacs2015', 'aptos_train'}
    for result in json.loads((toy / 'summary.json').read_text())['stages']:
        name = result['stage']
        valid = oof[oof[name].notna()]
        assert len(valid) == result['validated']
        assert quadratic_kappa(valid[f'{name}_grade'], valid.diagnosis) == pytest.approx(result['kappa'], nan_ok=True)


def test_oof_scores_are_those_of_the_stages(toy):
    oof = pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    preds = pd.read_csv(toy / 'retrain_512/fold0/preds.csv', dtype=dict(id_code=str)).set_index('id_code').score
    scores = oof[oof.retrain_512.notna()].set_index('id_code').retrain_512
    assert np.allclose(scores, preds[scores.index])
    ensemble = oof[oof.ensemble.notna()]
    members = ['finetune_dense', 'finetune_256', 'finetune_512']
    assert np.allclose(ensemble.ensemble, ensemble[members].mean(axis=1))


def test_a_run_equals_itself(toy, capsys):
    main(['compare', str(toy), str(toy)])
    out = capsys.readouterr().out
    assert out.count('+0.000 (+0.000 to +0.000)') == 9      # seven stages, the ensemble, the submission
    assert 'submission by retrain_512' in out and 'SYNTHETIC DEMO' in out


def test_compare_shows_a_difference(toy, tmp_path, capsys):
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
    expect_error(capsys, ['compare', toy, tmp_path / 'other'], 'have other grades than in')
    oof.assign(id_code=[f'x{i}' for i in range(len(oof))]).to_csv(file, index=False)
    expect_error(capsys, ['compare', toy, tmp_path / 'other'], 'no validation image in common')
