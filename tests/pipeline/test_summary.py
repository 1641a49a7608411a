"Out-of-fold scores, what is said of them, and two runs side by side."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import fails

from aptos_fastai.cli import main
from aptos_fastai.metrics import quadratic_kappa


def test_oof_holds_every_validated_image_once(toy):
    oof = pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    assert not oof.duplicated(['source', 'id_code']).any() and set(oof.source) == {'eyepacs2015', 'aptos_train'}
    for s in json.loads((toy / 'summary.json').read_text())['stages']:
        mine = oof[oof[s['stage']].notna()]
        assert len(mine) == s['validated'] and quadratic_kappa(mine[f'{s["stage"]}_grade'], mine.diagnosis) == pytest.approx(s['kappa'], nan_ok=True)
    preds = pd.read_csv(toy / 'retrain_512/fold0/preds.csv', dtype=dict(id_code=str)).set_index('id_code').score
    mine = oof[oof.retrain_512.notna()].set_index('id_code').retrain_512
    assert np.allclose(mine, preds[mine.index])
    members = ['finetune_dense', 'finetune_256', 'finetune_512']
    both = oof[oof.ensemble.notna()]
    assert np.allclose(both.ensemble, both[members].mean(axis=1))


def test_a_run_is_as_good_as_itself(toy, capsys):
    main(['compare', str(toy), str(toy)])
    out = capsys.readouterr().out
    assert out.count('+.000 [+.000 +.000]') == 9 and 'the answer ' in out and 'its answer retrain_512' in out and 'SYNTHETIC' in out


def test_compare_tells_runs_apart(toy, tmp_path, capsys):
    shutil.copytree(toy, tmp_path / 'other')
    file = tmp_path / 'other/oof.csv'
    oof = pd.read_csv(file)
    oof['retrain_512_grade'] = oof.diagnosis.where(oof.retrain_512.notna())
    oof.to_csv(file, index=False)
    main(['compare', str(toy), str(tmp_path / 'other')])
    line = next(o for o in capsys.readouterr().out.splitlines() if o.startswith('retrain_512'))
    assert '1.000' in line and '+.000' not in line


def test_compare_names_what_is_wrong(toy, tmp_path, capsys):
    fails(capsys, ['compare', toy, tmp_path], f'{tmp_path}: is no finished run')
    shutil.copytree(toy, tmp_path / 'other')
    file = tmp_path / 'other/oof.csv'
    oof = pd.read_csv(file)
    oof.assign(diagnosis=(oof.diagnosis + 1) % 5).to_csv(file, index=False)
    fails(capsys, ['compare', toy, tmp_path / 'other'], 'have other grades than in')
    oof.assign(id_code=[f'x{i}' for i in range(len(oof))]).to_csv(file, index=False)
    fails(capsys, ['compare', toy, tmp_path / 'other'], 'no image in common')
