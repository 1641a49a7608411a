"Trained models for images of one's own."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import fails, toy_args

from aptos_fastai.cli import main
from aptos_fastai.common.io import AptosError, write_record
from aptos_fastai.inference.grade_files import find_images
from aptos_fastai.inference.grader import COLUMNS, load_grader


def test_a_grader_says_what_the_run_says(toy, photos):
    df, want = load_grader(toy).predict(photos), pd.read_csv(toy / 'scores.csv')
    assert list(df) == COLUMNS and df.file.tolist() == photos
    want = want.set_index('id_code').loc[[os.path.basename(p).split('.')[0] for p in photos]]
    assert np.allclose(df.score, want['mean'], atol=1e-4) and np.allclose(df.score_sd, want.score_sd, atol=1e-3)
    for c in ('grade', 'grade_low', 'grade_high'): assert df[c].tolist() == want[c].tolist()
    assert ((df.referable == 'yes') == (df.grade >= 2)).all() and (df.error == '').all()
    assert set(df.grade_name) <= {'no DR', 'mild', 'moderate', 'severe', 'proliferative'}


def test_a_stage_is_a_model_too_and_an_ensemble_its_weighted_mean(toy, photos, tmp_path):
    df = load_grader(toy / 'finetune_256').predict(photos[:5])
    want = pd.read_csv(toy / 'scores.csv').set_index('id_code').finetune_256
    assert np.allclose(df.score, want.loc[[os.path.basename(p).split('.')[0] for p in photos[:5]]], atol=1e-4)
    o = json.loads((toy / 'summary.json').read_text())
    o['submission']['members'] = dict(finetune_dense=.2, finetune_256=.3, finetune_512=.5)
    shutil.copytree(toy, tmp_path / 'mixed')
    o['submission']['weights'] = {f'{m}/fold0': json.loads((toy / m / 'fold0/stage.json').read_text())['files']['weights.safetensors']['sha256']
                                  for m in o['submission']['members']}
    write_record(tmp_path / 'mixed/summary.json', {k: v for k, v in o.items() if k != 'seal'})
    mixed = load_grader(tmp_path / 'mixed').predict(photos[:5]).score
    parts = [w * load_grader(toy / s).predict(photos[:5]).score for s, w in o['submission']['members'].items()]
    assert np.allclose(mixed, sum(parts), atol=1e-5)


def test_a_batch_does_not_change_a_score(toy, photos):
    g = load_grader(toy)
    one = pd.concat(g.stream(photos, batch=1)).score
    assert np.allclose(g.predict(photos).score, one, atol=1e-5)


def test_bad_images_are_rows_with_their_error(toy, photos, tmp_path, capsys):
    (tmp_path / 'a').mkdir()
    shutil.copy(photos[0], tmp_path / 'a/good.png')
    (tmp_path / 'a/bad.png').write_bytes(b'hello')
    (tmp_path / 'a/short.png').write_bytes(Path(photos[1]).read_bytes()[:-60])
    fails(capsys, ['predict', toy, tmp_path / 'a', '-o', tmp_path / 'out.csv'], '2 of 3 images could not be graded', 'bad.png cannot be decoded', 'out.csv')
    df = pd.read_csv(tmp_path / 'out.csv', keep_default_na=False).set_index('file')
    assert df.loc[str(tmp_path / 'a/bad.png'), 'score'] == '' and 'cut short' in df.loc[str(tmp_path / 'a/short.png'), 'error']
    assert df.loc[str(tmp_path / 'a/good.png'), 'grade_name'] and sorted(os.listdir(tmp_path)) == ['a', 'out.csv']


def test_an_interrupted_prediction_goes_on(toy, photos, tmp_path, monkeypatch, capsys):
    from aptos_fastai.inference.grader import Grader
    out, real = tmp_path / 'out.csv', Grader.stream
    def stops(self, files, batch=4):
        for i, df in enumerate(real(self, files, batch)):
            if i == 2: raise KeyboardInterrupt
            yield df
    monkeypatch.setattr(Grader, 'stream', stops)
    with pytest.raises(SystemExit): main(['predict', str(toy), *photos, '-o', str(out)])
    part = next(tmp_path.glob('.out.csv.*.part'))
    assert not out.exists() and len(part.read_text().splitlines()) == 9
    part.write_text(part.read_text()[:-7])                                              # as if the machine had died within a line
    seen = []
    monkeypatch.setattr(Grader, 'stream', lambda self, files, batch=16: (seen.extend(files), real(self, files, batch))[1])
    main(['predict', str(toy), *photos, '-o', str(out)])
    assert seen == photos[7:] and '7 of 20 images were graded before' in capsys.readouterr().out
    monkeypatch.undo()
    main(['predict', str(toy), *photos, '-o', str(tmp_path / 'whole.csv')])
    assert out.read_text() == (tmp_path / 'whole.csv').read_text() and not list(tmp_path.glob('.*'))


def test_images_are_found_by_file_folder_glob_and_csv(tmp_path):
    (tmp_path / 'x/y').mkdir(parents=True)
    for n in ('x/a.png', 'x/y/b.JPG', 'x/notes.txt'): (tmp_path / n).write_bytes(b'')
    a, b = str(tmp_path / 'x/a.png'), str(tmp_path / 'x/y/b.JPG')
    assert find_images([str(tmp_path / 'x')]) == [a, b] == find_images([a, b, a]) and find_images([str(tmp_path / 'x/*.png')]) == [a]
    for col, rows in (('id_code', 'b\na\n'), ('image', 'y/b.JPG\na.png\n')):
        (tmp_path / 'x/t.csv').write_text(f'{col}\n{rows}')
        assert find_images([str(tmp_path / 'x/t.csv')]) == [b, a]
    for text, words in (('id_code\nzzz\n', '1 of 1 have no image beside it or in a folder below: zzz'),
                        ('who\na\n', 'has no column file, path, image or id_code')):
        (tmp_path / 'x/t.csv').write_text(text)
        with pytest.raises(AptosError, match=words): find_images([str(tmp_path / 'x/t.csv')])
    with pytest.raises(AptosError, match='names no image'): find_images([str(tmp_path / 'nowhere.png')])


def test_what_is_no_backend_is_named(toy, photos, capsys):
    fails(capsys, ['predict', toy, photos[0], '--backend', 'tf'], 'backend tf: there is no such', 'torch, onnx, openvino')
    fails(capsys, ['predict', toy, photos[0], '--precision', 'int8'], 'accepted: f32, bf16')
    fails(capsys, ['predict', toy, photos[0], '--backend', 'onnx'], 'only a bundle has ONNX')


def test_bf16_is_near(toy, photos):
    a, b = (load_grader(toy, precision=p).predict(photos).score for p in ('f32', 'bf16'))
    assert 0 < abs(a - b).max() < .1


def test_what_is_no_model_is_named(toy, photos, tmp_path, capsys):
    fails(capsys, ['predict', tmp_path, photos[0]], f'{tmp_path}: is no model', 'bundle.json')
    fails(capsys, ['predict', toy], 'name the images, too')
    fails(capsys, ['predict', toy, photos[0], '-o', tmp_path / 'no/out.csv'], 'no: no such folder')


def test_weights_that_were_changed_are_not_loaded(copied, photos, capsys):
    w = copied / 'retrain_512/fold0/weights.safetensors'
    data = bytearray(w.read_bytes()); data[-1] ^= 1
    w.write_bytes(data)
    fails(capsys, ['predict', copied, photos[0]], f'{w}: is not what was written')
    w.unlink()
    fails(capsys, ['predict', copied, photos[0]], f'{w}: is gone')


def test_thresholds_of_changed_scores_are_not_used(copied, photos, capsys):
    f = copied / 'finetune_256/fold0/preds.csv'
    f.write_text(f.read_text().replace('0.', '1.'))
    fails(capsys, ['predict', copied / 'finetune_256', photos[0]], 'preds.csv: is not what was written')


def test_a_run_that_was_trained_anew_since_is_told(copied, photos, capsys):
    main(['train', 'retrain_512', *toy_args(copied, '--set', 'stage.retrain_512.wd=.3')])
    fails(capsys, ['predict', copied, photos[0]], 'trained anew since its answers were made', 'run `all` again')


def test_a_dicom_image_is_graded_as_its_pixels(toy, photos, tmp_path):
    pytest.importorskip('pydicom')
    from test_images import dicom
    im = cv2.imread(photos[0])[..., ::-1]
    (tmp_path / 'eye.dcm').write_bytes(dicom(np.ascontiguousarray(im), 'RGB', 8))
    cv2.imwrite(str(tmp_path / 'eye.png'), im[..., ::-1])
    s = load_grader(toy).predict([tmp_path / 'eye.dcm', tmp_path / 'eye.png']).score
    assert s[0] == pytest.approx(s[1], abs=.01)                # a large PNG is read smaller than it is


def test_three_lines_of_python_in_a_fresh_process(toy, photos):
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'import sys; from aptos_fastai import load_grader\n'
                          'print(load_grader(sys.argv[1]).predict(sys.argv[2:]).score.round(4).tolist())', str(toy), *photos[:3]],
                         capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == pytest.approx(load_grader(toy).predict(photos[:3]).score.tolist(), abs=2e-4)
