"Trained models on new images."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import dicom, expect_error, toy_args

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record, write_record
from aptos_fastai.deploy.bundle import run_metrics
from aptos_fastai.inference.grader import COLUMNS, Grader, load_grader
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.inference.views import mean_and_sd
from aptos_fastai.metrics import GRADE_NAMES


def ids_of(paths): return [Path(p).stem for p in paths]


def run_scores(run, paths):
    "The rows of a run's scores.csv for image files"
    return pd.read_csv(run / 'scores.csv').set_index('id_code').loc[ids_of(paths)]


def test_mean_and_sd_are_those_of_all_values():
    rng = np.random.default_rng(0)
    views = rng.normal(size=(3, 5, 8))                        # members, images, views
    mean, sd = mean_and_sd([(2., v.mean(1), v.std(1)) for v in views])
    together = views.transpose(1, 0, 2).reshape(5, -1)
    assert np.allclose(mean, together.mean(1)) and np.allclose(sd, together.std(1))
    weighted, _ = mean_and_sd([(3., np.ones(2), np.zeros(2)), (1., np.zeros(2), np.zeros(2))])
    assert np.allclose(weighted, .75)


def test_a_grader_gives_the_grades_of_its_run(toy, image_paths):
    df, expected = load_grader(toy).predict(image_paths), run_scores(toy, image_paths)
    assert list(df) == COLUMNS and df.file.tolist() == image_paths
    assert np.allclose(df.score, expected.score, atol=1e-4)
    assert np.allclose(df.score_sd, expected.score_sd, atol=1e-3)
    assert df.ungradable.tolist() == expected.ungradable.fillna('').tolist() and (df.error == '').all()
    expected = expected[(df.ungradable == '').to_numpy()]
    df = df[df.ungradable == '']              # scores.csv has a grade for those that the gate refuses, too
    assert len(df) > 10
    for column in ('grade', 'grade_low', 'grade_high'): assert df[column].tolist() == expected[column].tolist()
    threshold = read_model(toy)[0].decision.point(2).threshold
    assert ((df.referable == 'yes') == (df.score >= threshold)).all()
    assert df.grade_name.tolist() == [GRADE_NAMES[g] for g in df.grade]


def test_scores_of_each_fold_are_means_over_its_members(toy):
    spec, _ = read_model(toy)
    two = replace(spec, members=(replace(spec.members[0], weight=.5), replace(spec.members[0], weight=.5, fold=1)))
    scores = [np.array([0., 1.]), np.array([1., 3.])]
    assert two.fold_scores(scores).tolist() == [[0., 1.], [1., 3.]]
    mixed = replace(spec, members=tuple(replace(spec.members[0], weight=w, fold=k)
                                        for w, k in [(.1, 0), (.3, 0), (.15, 1), (.45, 1)]))
    scores = [np.array([float(o)]) for o in (4, 0, 4, 0)]
    assert np.allclose(mixed.fold_scores(scores), [[1., 1.]])          # the mean over members, fold by fold


def test_a_stage_is_a_model(toy, image_paths):
    df = load_grader(toy / 'finetune_256').predict(image_paths[:5])
    assert np.allclose(df.score, run_scores(toy, image_paths[:5]).finetune_256, atol=1e-4)


def test_an_ensemble_is_the_weighted_mean_of_its_members(toy, image_paths, tmp_path):
    weights = dict(finetune_dense=.2, finetune_256=.3, finetune_512=.5)
    mixed = tmp_path / 'mixed'
    shutil.copytree(toy, mixed)
    summary = read_record(toy / 'summary.json')
    summary['submission']['members'] = weights
    for key, file in dict(weights='weights.safetensors', scores='preds.csv').items():
        summary['submission'][key] = {
            f'{stage}/fold0': read_record(toy / stage / 'fold0/stage.json')['files'][file]['sha256']
            for stage in weights}
    summary['submission']['distance_units'] = dict.fromkeys(weights, 1.)
    write_record(mixed / 'summary.json', summary)
    score = load_grader(mixed).predict(image_paths[:5]).score
    parts = [w * load_grader(toy / stage).predict(image_paths[:5]).score for stage, w in weights.items()]
    assert np.allclose(score, sum(parts), atol=1e-5)


def test_the_batch_size_does_not_change_a_score(toy, image_paths):
    grader = load_grader(toy)
    one_by_one = pd.concat(grader.stream(image_paths, batch=1)).score
    assert np.allclose(grader.predict(image_paths).score, one_by_one, atol=1e-5)


def test_unreadable_images_are_rows_with_their_error(toy, image_paths, tmp_path, capsys):
    folder, out = tmp_path / 'a', tmp_path / 'out.csv'
    folder.mkdir()
    good, bad, short = (folder / f'{name}.png' for name in ('good', 'bad', 'short'))
    shutil.copy(image_paths[0], good)
    bad.write_bytes(b'hello')
    short.write_bytes(Path(image_paths[1]).read_bytes()[:-60])
    expect_error(capsys, ['predict', toy, folder, '-o', out],
                 '2 of 3 images could not be found or read', 'bad.png: cannot be decoded', 'out.csv')
    df = pd.read_csv(out, keep_default_na=False).set_index('file')
    assert df.loc[str(bad), 'score'] == '' and df.loc[str(bad), 'grade_name'] == ''
    assert 'the file is truncated' in df.loc[str(short), 'error']
    assert df.loc[str(good), 'grade_name']
    assert sorted(os.listdir(tmp_path)) == ['a', 'out.csv', 'out.csv.json']


def test_an_interrupted_prediction_resumes(toy, image_paths, tmp_path, monkeypatch, capsys):
    out, stream = tmp_path / 'out.csv', Grader.stream

    def stop_after_two_batches(self, files, batch=4):
        for i, df in enumerate(stream(self, files, batch)):
            if i == 2: raise KeyboardInterrupt
            yield df
    monkeypatch.setattr(Grader, 'stream', stop_after_two_batches)
    with pytest.raises(SystemExit): main(['predict', str(toy), *image_paths, '-o', str(out)])
    part = next(tmp_path.glob('.out.csv.*.part'))
    assert not out.exists() and len(part.read_text().splitlines()) == 1 + 8
    part.write_text(part.read_text()[:-7])                       # as if the machine had failed within a line
    graded = []

    def record_files(self, files, batch=16):
        graded.extend(files)
        return stream(self, files, batch)
    monkeypatch.setattr(Grader, 'stream', record_files)
    main(['predict', str(toy), *image_paths, '-o', str(out)])
    assert [str(entry) for entry in graded] == image_paths[7:]
    assert '7 of 20 images are graded already' in capsys.readouterr().out
    monkeypatch.undo()
    whole = tmp_path / 'whole.csv'
    main(['predict', str(toy), *image_paths, '-o', str(whole)])
    assert out.read_text() == whole.read_text() and not list(tmp_path.glob('.*'))


def test_an_unknown_backend_or_precision_is_an_error(toy, image_paths, capsys):
    predict = ['predict', toy, image_paths[0]]
    expect_error(capsys, [*predict, '--backend', 'tf'], 'backend tf: choose one of torch, onnx, openvino')
    expect_error(capsys, [*predict, '--precision', 'int8'], 'precision int8: choose one of f32, bf16, fp16')
    expect_error(capsys, [*predict, '--backend', 'onnx'], 'only a bundle has ONNX')


def test_fp16_needs_pytorch_and_a_gpu(toy, image_paths, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    needs = 'precision fp16: needs the backend torch and a GPU. Choose f32 or bf16.'
    for backend in ('torch', 'onnx', 'openvino'):
        expect_error(capsys, ['predict', toy, image_paths[0], '--backend', backend, '--precision', 'fp16'], needs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_fp16_scores_are_near_f32(toy, image_paths):
    f32, fp16 = (load_grader(toy, precision=p).predict(image_paths).score for p in ('f32', 'fp16'))
    assert 0 < abs(f32 - fp16).max() < .05


def test_bf16_scores_are_near_f32(toy, image_paths):
    f32, bf16 = (load_grader(toy, precision=p).predict(image_paths).score for p in ('f32', 'bf16'))
    assert 0 < abs(f32 - bf16).max() < .1


def test_predict_without_a_model_or_images_is_an_error_and_a_folder_is_made(toy, image_paths, tmp_path, capsys):
    expect_error(capsys, ['predict', tmp_path, image_paths[0]], f'{tmp_path}: no model here', 'bundle.json')
    expect_error(capsys, ['predict', toy], 'IMAGES')
    main(['predict', str(toy), str(image_paths[0]), '-o', str(tmp_path / 'new/folder/out.csv')])
    assert (tmp_path / 'new/folder/out.csv').is_file()


def test_changed_or_missing_weights_are_not_loaded(toy_copy, image_paths, capsys):
    weights = toy_copy / 'retrain_512/fold0/weights.safetensors'
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    expect_error(capsys, ['predict', toy_copy, image_paths[0]], f'{weights}: content changed', 'train again')
    weights.unlink()
    expect_error(capsys, ['predict', toy_copy, image_paths[0]], f'{weights}: no such file', 'train again')


def test_thresholds_are_not_fitted_on_changed_scores(toy_copy, image_paths, capsys):
    preds = toy_copy / 'finetune_256/fold0/preds.csv'
    preds.write_text(preds.read_text().replace('0.', '1.'))
    expect_error(capsys, ['predict', toy_copy / 'finetune_256', image_paths[0]], 'preds.csv: content changed')


def test_a_run_trained_again_since_its_submission_is_an_error(toy_copy, image_paths, capsys):
    main(['train', 'retrain_512', *toy_args(toy_copy, '--set', 'stage.retrain_512.wd=.3'), '--replace'])
    expect_error(capsys, ['predict', toy_copy, image_paths[0]],
                 'trained again after the submission was made', 'Run `all` again')


def test_a_dicom_file_gets_the_score_of_its_pixels(toy, image_paths, tmp_path):
    pytest.importorskip('pydicom')
    bgr = cv2.imread(image_paths[0])
    (tmp_path / 'eye.dcm').write_bytes(dicom(np.ascontiguousarray(bgr[..., ::-1]), 'RGB', 8))
    cv2.imwrite(str(tmp_path / 'eye.png'), bgr)
    score = load_grader(toy).predict([tmp_path / 'eye.dcm', tmp_path / 'eye.png']).score
    assert score[0] == pytest.approx(score[1], abs=.01)        # a large PNG is decoded at a reduced size


def test_the_python_api_in_a_new_process(toy, image_paths):
    code = ('import sys\n'
            'from aptos_fastai import load_grader\n'
            'print(load_grader(sys.argv[1]).predict(sys.argv[2:]).score.round(4).tolist())')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(toy), *image_paths[:3]],
                         capture_output=True, text=True, check=True)
    expected = load_grader(toy).predict(image_paths[:3]).score.tolist()
    assert json.loads(out.stdout) == pytest.approx(expected, abs=2e-4)


def test_a_finished_run_predicts_with_the_folds_of_its_submission(toy_copy, toy, image_paths):
    "Other finished folds in its folders, as after `folds` was lowered, change nothing"
    shutil.copytree(toy_copy / 'retrain_512/fold0', toy_copy / 'retrain_512/fold1')
    expected = load_grader(toy).predict(image_paths[:4])
    grader = load_grader(toy_copy)
    assert [m.file for m in grader.model.members] == ['retrain_512/fold0/weights.safetensors']
    assert grader.predict(image_paths[:4]).score.tolist() == expected.score.tolist()


def test_a_stage_answers_as_its_run_reports_it(toy):
    summary = json.loads((toy / 'summary.json').read_text())
    for result in summary['stages']:
        if result['arch'] == 'ensemble': continue
        model, root = read_model(toy / result['stage'])
        assert list(model.thresholds) == result['thresholds'] and list(model.warnings) == result['warnings']
        assert model.kappa == result['kappa_text'] and model.coverage == summary['submission']['coverage']
        assert run_metrics(root, model)['node'] == result['stage']


def test_folds_that_were_trained_otherwise_are_no_model(toy_copy, capsys, image_paths):
    stage = toy_copy / 'finetune_256'
    shutil.copytree(toy_copy / 'finetune_512/fold0', stage / 'fold1')       # not reported: left out
    assert len(read_model(stage)[0].members) == 1
    (toy_copy / 'summary.json').unlink()
    expect_error(capsys, ['predict', stage, image_paths[0], '-o', toy_copy / 'g.csv'], 'fold1: was trained as')
    (stage / 'fold1/stage.json').unlink()                                  # an unfinished fold
    model, root = read_model(stage)
    assert len(model.members) == 1 and 'no kappa' in model.warnings[0] and run_metrics(root, model) == {}


def test_the_gate_says_what_it_may_refuse(toy):
    assert read_model(toy)[0].gate.reject == read_model(toy / 'finetune_256')[0].gate.reject == .01
