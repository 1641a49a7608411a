"[submit] eyes = fused: from a recipe to the test table, report, bundle and predictions of new images; and its errors."
import shutil
from contextlib import nullcontext

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, fundus
from expensive import quick_exports, quick_reports

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record
from aptos_fastai.inference.eyes import FUSES, GRADED_ALONE
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.metrics import quadratic_kappa
from aptos_fastai.pipeline.deadline import Deadline
from aptos_fastai.pipeline.eyes import people_of
from aptos_fastai.pipeline.graph import inputs_digest, load_run

RECIPE = r"""
[recipe]
splits = 2

[table.train]
csv = train.csv
images = images
grade = diagnosis
group = ^(p\d+)_
eye = _([lr])\d*$

[table.test]
csv = test.csv
images = images
group = ^(p\d+)_
eye = _([lr])\d*$

[stage.teacher]
train = train
arch = test_resnet
weights = none
size = 32
folds = 2
epochs = 2
bs = 8
lr = 3e-3
precision = f32

[submit]
final = teacher
table = test
eyes = fused
"""
PEOPLE = ['--patient', r'(p\d+)_', '--eye', r'_([lr])\d*\.png']


def write_eyes(data):
    "Write a graded table of 35 patients with both eyes and one with a single eye, and a test table; return the grades"
    rng = np.random.default_rng(0)
    (data / 'images').mkdir(parents=True)
    grades = {f'p{i}_{eye}': i % 5 for i in range(35) for eye in 'lr'} | dict(p35_l=2, p0_l2=0)
    tested = dict.fromkeys(['p100_l', 'p100_r', 'p101_l', 'p102_l', 'p102_l2', 'p102_r'], 1)
    for name, grade in (grades | tested).items():
        cv2.imwrite(str(data / f'images/{name}.png'), fundus(rng, 64, grade))
    pd.DataFrame(dict(id_code=list(grades), diagnosis=list(grades.values()))).to_csv(data / 'train.csv', index=False)
    pd.DataFrame(dict(id_code=list(tested))).to_csv(data / 'test.csv', index=False)
    return grades


def arguments(folder, *more):
    return ['--recipe', str(folder / 'eyes.ini'), '--data', str(folder / 'data'), '--runs', str(folder / 'runs'), *more]


@pytest.fixture(scope='module')
def fused(tmp_path_factory):
    "A folder with recipe, data and finished run; tests must not change it"
    folder = tmp_path_factory.mktemp('eyes')
    write_eyes(folder / 'data')
    (folder / 'eyes.ini').write_text(RECIPE)
    with quick_reports(): main(['all', *arguments(folder)])
    return folder


@pytest.fixture
def copy(fused, tmp_path):
    shutil.copytree(fused, tmp_path / 'copy')
    return tmp_path / 'copy'


def read_scores(folder): return pd.read_csv(folder / 'runs/eyes/scores.csv', dtype=dict(id_code=str))


# The run

def test_the_test_table_is_fused_where_the_other_eye_is_there(fused):
    model, _ = read_model(fused / 'runs/eyes')
    df = read_scores(fused).set_index('id_code')
    gradable = df.ungradable.isna()
    assert gradable.all() and df.fused.to_dict() == {name: 'no' if name == 'p101_l' else 'yes' for name in df.index}
    own, f = df.teacher, model.eyes.fusion
    np.testing.assert_allclose(df.score['p100_l'], f.predict(own['p100_l'], own['p100_r']), atol=1e-6)
    left = own[['p102_l', 'p102_l2']].mean()
    np.testing.assert_allclose(df.score['p102_r'], f.predict(own['p102_r'], left), atol=1e-6)
    np.testing.assert_allclose(df.score['p102_l2'], f.predict(own['p102_l2'], own['p102_r']), atol=1e-6)
    assert df.score['p101_l'] == own['p101_l']
    for name, file in (('submission.csv', fused / 'runs/eyes/submission.csv'),
                       ('submissions', fused / 'runs/eyes/submissions/teacher.csv')):
        submitted = pd.read_csv(file)
        assert submitted.diagnosis.tolist() == df.grade.tolist(), name


def test_out_of_fold_scores_are_fused_by_other_images(fused):
    oof = pd.read_csv(fused / 'runs/eyes/oof.csv')
    assert oof.fused_score.isna().sum() == 1 and oof.id_code[oof.fused_score.isna()].tolist() == ['p35_l']
    results = read_record(fused / 'runs/eyes/summary.json')['submission']['eyes']['results']
    assert results['images'] == 71 and results['patients'] == 35
    rows = oof[oof.fused_grade.notna()]
    assert results['fused']['value'] == pytest.approx(quadratic_kappa(rows.fused_grade.astype(int), rows.diagnosis))
    assert results['alone']['value'] == pytest.approx(quadratic_kappa(rows.teacher_grade, rows.diagnosis))


def test_report_and_summary_show_both_readings_and_the_caution(fused):
    html = (fused / 'runs/eyes/report.html').read_text()
    for text in ('Both eyes', 'fused minus alone', 'fused minus refitted', 'no independent reading of the eye'):
        assert text in html, text


def test_single_eyes_need_no_training_and_grade_as_the_fused_model_grades_an_image_alone(fused, copy, no_report,
                                                                                         capsys):
    main(['all', *arguments(copy)])
    assert 'Nothing to do' in capsys.readouterr().out
    weights = (copy / 'runs/eyes/teacher/fold0/weights.safetensors').stat().st_mtime_ns
    main(['submit', *arguments(copy, '--set', 'submit.eyes=single')])
    assert 'eyes = single is new since the last `all`' in ' '.join(capsys.readouterr().out.split())
    main(['all', *arguments(copy, '--set', 'submit.eyes=single')])
    assert (copy / 'runs/eyes/teacher/fold0/weights.safetensors').stat().st_mtime_ns == weights
    df = read_scores(copy)
    assert 'fused' not in df and (df.score == df.teacher).all()
    both, single = (read_model(o / 'runs/eyes')[0] for o in (fused, copy))
    for name in ('thresholds', 'calibration', 'decision', 'members', 'gate'):
        assert getattr(both, name) == getattr(single, name), name
    assert single.eyes is None and 'eyes' not in single.digests and FUSES in both.warnings
    assert {k for k in both.digests if both.digests.get(k) != single.digests.get(k)} == {'model', 'eyes'}


def test_with_hours_a_smaller_model_that_cannot_be_fused_grades_each_image_alone(copy, no_report, monkeypatch, capsys):
    "`first` validates one of two folds, in which too few patients are; it is the model where `teacher` is left out"
    file, root = copy / 'eyes.ini', copy / 'runs/eyes'
    file.write_text(RECIPE.replace('[submit]', '[stage.first]\ntrain = train\narch = test_resnet\nweights = none\n'
                                   'size = 32\nepochs = 1\nbs = 8\nprecision = f32\n[submit]\nalso = first'))
    shutil.rmtree(root / 'teacher')
    monkeypatch.setattr(Deadline, 'check', lambda self, run: None)
    monkeypatch.setattr(Deadline, 'allows', lambda self, run, stage: stage != 'teacher')
    monkeypatch.setattr(Deadline, 'timed', lambda *args: nullcontext())
    main(['all', *arguments(copy), '--hours', '1'])
    assert 'The model is first. A later `all` trains the rest. It grades each image alone, because fewer than 30' in (
        ' '.join(capsys.readouterr().out.split()))
    summary = read_record(root / 'summary.json')
    assert summary['submission']['node'] == 'first' and 'grades each image alone' in summary['left_out']
    assert 'fused' not in read_scores(copy) and read_model(root)[0].eyes is None
    before = read_scores(copy)
    for command in ('submit', 'report'): main([command, *arguments(copy)])
    pd.testing.assert_frame_equal(read_scores(copy), before)


def test_another_eye_in_the_table_makes_the_outputs_out_of_date(copy):
    run = load_run(copy / 'eyes.ini', copy / 'data', copy / 'runs')
    before = inputs_digest(run)
    run.frames['test'].loc[0, 'eye'] = 'right'
    assert inputs_digest(run) != before


def test_duplicates_join_groups_but_not_patients(copy):
    shutil.copy(copy / 'data/images/p3_l.png', copy / 'data/images/p8_l.png')     # of the same grade
    main(['prepare', *arguments(copy, '--name', 'other')])
    with_copies = load_run(copy / 'eyes.ini', copy / 'data', copy / 'runs', name='other')
    frame = with_copies.frames['train'].set_index('id_code')
    assert frame.group['p3_l'] == frame.group['p8_r']
    people = people_of(with_copies, with_copies.frames['train']).set_axis(frame.index)
    assert people.patient['p3_l'] == people.patient['p3_r'] != people.patient['p8_r']


# Predictions

@pytest.fixture(scope='module')
def predicted(fused, tmp_path_factory):
    "grades.csv of the test images with patients; tests must not change it"
    folder = tmp_path_factory.mktemp('predicted')
    (folder / 'new').mkdir()
    for name in read_scores(fused).id_code: shutil.copy(fused / f'data/images/{name}.png', folder / 'new')
    main(['predict', str(fused / 'runs/eyes'), str(folder / 'new'), '-o', str(folder / 'grades.csv'), *PEOPLE])
    return folder


def rows_by_id(csv):
    df = pd.read_csv(csv, dtype=dict(patient=str))
    return df.set_index(df.file.str.extract(r'(p\d+_\w+)\.png')[0])


def test_predict_fuses_as_the_run_did(fused, predicted):
    new, old = rows_by_id(predicted / 'grades.csv'), read_scores(fused).set_index('id_code')
    for name in ('fused', 'grade', 'grade_low', 'grade_high', 'decision', 'referable'):
        assert new[name].to_dict() == old[name].loc[new.index].to_dict(), name
    fusion = read_model(fused / 'runs/eyes')[0].eyes.fusion            # of scores with four decimals
    tolerance = 1e-4 * (1 + fusion.own + fusion.fellow)
    np.testing.assert_allclose(new.score, old.score.loc[new.index], atol=tolerance)
    np.testing.assert_allclose(new.own_score, old.teacher.loc[new.index], atol=1e-4)
    np.testing.assert_allclose(new.p_referable, old.p_referable.loc[new.index], atol=5 * tolerance)
    patients = pd.read_csv(predicted / 'patients.csv').set_index('patient')
    assert patients.grade['p100'] == new.grade[['p100_l', 'p100_r']].max()


def test_predict_without_patients_grades_alone_and_says_so(fused, predicted, tmp_path, capsys):
    main(['predict', str(fused / 'runs/eyes'), str(predicted / 'new'), '-o', str(tmp_path / 'grades.csv')])
    out = capsys.readouterr().out
    assert 'patients are unknown here' in out and '0 of 6 images graded by both eyes' in out.replace('\n', ' ')
    df = rows_by_id(tmp_path / 'grades.csv')
    assert (df.fused == 'no').all() and (df.score == df.own_score).all()
    np.testing.assert_allclose(df.score, rows_by_id(predicted / 'grades.csv').own_score.loc[df.index])


def test_predict_leaves_out_a_fellow_that_is_not_gradable(fused, predicted, tmp_path):
    shutil.copytree(predicted / 'new', tmp_path / 'new')
    cv2.imwrite(str(tmp_path / 'new/p100_r.png'), np.zeros((64, 64, 3), np.uint8))
    main(['predict', str(fused / 'runs/eyes'), str(tmp_path / 'new'), '-o', str(tmp_path / 'grades.csv'), *PEOPLE])
    df = rows_by_id(tmp_path / 'grades.csv')
    assert df.ungradable.notna()['p100_r']
    assert df.fused.to_dict() == dict(p100_l='no', p100_r='no', p101_l='no', p102_l='yes', p102_l2='yes', p102_r='yes')
    assert df.score['p100_l'] == df.own_score['p100_l']


def test_a_bundle_fuses_as_the_run_does(copy, predicted, tmp_path):
    with quick_exports(): main(['export', str(copy / 'runs/eyes')])
    bundle = copy / 'runs/eyes/bundle'
    assert read_model(bundle)[0].digests == read_model(copy / 'runs/eyes')[0].digests
    main(['predict', str(bundle), str(predicted / 'new'), '-o', str(tmp_path / 'grades.csv'), *PEOPLE])
    pd.testing.assert_frame_equal(rows_by_id(tmp_path / 'grades.csv'), rows_by_id(predicted / 'grades.csv'))
    card = (bundle / 'MODEL_CARD.md').read_text()
    assert 'by both eyes (fused): kappa' in card and 'no independent reading' in card


@pytest.mark.parametrize('more', [[], ['--deidentify']])
def test_verify_accepts_fused_predictions(fused, predicted, tmp_path, more, capsys):
    csv = tmp_path / 'grades.csv'
    main(['predict', str(fused / 'runs/eyes'), str(predicted / 'new'), '-o', str(csv), *PEOPLE, *more])
    main(['verify', str(fused / 'runs/eyes'), str(csv), '--all', '--images', str(predicted / 'new')])
    assert 'verified' in capsys.readouterr().out


@pytest.mark.parametrize('cells', [
    dict(grade='4', grade_name='proliferative'), dict(score='3.9'), dict(own_score='3.9'), dict(fused='no'),
    dict(grade_high='4', grade_low='0'), dict(eye='right')])
def test_verify_refutes_an_edited_fused_row(fused, predicted, tmp_path, cells, capsys):
    df = pd.read_csv(predicted / 'grades.csv', dtype=str, keep_default_na=False)
    row = df.index[df.file.str.endswith('p100_l.png')][0]
    for name, value in cells.items():
        assert df.loc[row, name] != value
        df.loc[row, name] = value
    df.to_csv(tmp_path / 'grades.csv', index=False)
    expect_error(capsys, ['verify', fused / 'runs/eyes', tmp_path / 'grades.csv', '--all'], 'not verified',
                 'do not follow from their scores')


def test_evaluate_measures_alone_and_fused(copy, predicted, capsys):
    model = copy / 'runs/eyes'
    main(['evaluate', str(model), 'train', *arguments(copy)[:4], '--include-seen'])
    record = read_record(model / 'evaluations/train/evaluation.json')
    assert record['eyes']['images'] == 71 and record['kappa']['deployed']['images'] == 72
    assert 'Both eyes' in (model / 'evaluations/train/evaluation.html').read_text()
    assert any('graded alone' in text for text in record['warnings'])


def test_heat_maps_say_that_they_grade_alone(fused, predicted, tmp_path, capsys):
    main(['explain', str(fused / 'runs/eyes'), str(predicted / 'new/p100_l.png'), '-o', str(tmp_path / 'maps')])
    assert GRADED_ALONE in capsys.readouterr().out.replace('\n', ' ')


@pytest.mark.parametrize('command', [['kaggle', '--user', 'someone'], ['operating-point', '--sensitivity', '0.95']])
def test_what_cannot_fuse_refuses_a_fused_model(copy, command, capsys):
    name, *options = command
    expect_error(capsys, [name, copy / 'runs/eyes', *options], 'grades by both eyes of a patient', 'run `all`')


# Errors before anything trains

@pytest.mark.parametrize('old, new, words', [
    ('eye = _([lr])\\d*$\n\n[table.test]', '\n[table.test]', ['no table that validates teacher (train)', 'eye']),
    ('group = ^(p\\d+)_\neye = _([lr])\\d*$\n\n[table.test]', 'block = 2\neye = _([lr])\\d*$\n\n[table.test]',
     ['no table that validates teacher (train)', 'patient']),
    ('group = ^(p\\d+)_\neye = _([lr])\\d*$\n\n[stage', '\n[stage', ['the table test', 'eyes = single']),
    ('folds = 2\n', 'folds = 1\n', ['[submit] eyes = fused', 'patients have validation images of both eyes', '30']),
    ('eyes = fused', 'eyes = both', ['eyes = both', 'single, fused']),
    ('stage.teacher', 'stage.fused_score', ['fused_score is a column']),
])
def test_what_cannot_be_fused_is_refused_before_anything_is_written(fused, tmp_path, capsys, old, new, words):
    assert old in RECIPE
    text = RECIPE.replace(old, new)
    if 'fused_score' in new: text = text.replace('final = teacher', 'final = fused_score')
    (tmp_path / 'eyes.ini').write_text(text)
    args = ['--recipe', tmp_path / 'eyes.ini', '--data', fused / 'data', '--runs', tmp_path / 'runs']
    expect_error(capsys, ['all', *args], *words)
    assert not (tmp_path / 'runs').exists()


def test_a_stage_may_be_called_fused_without_fusion(fused, tmp_path):
    text = RECIPE.replace('stage.teacher', 'stage.fused').replace('final = teacher', 'final = fused')
    (tmp_path / 'eyes.ini').write_text(text.replace('eyes = fused', 'eyes = single'))
    assert load_run(tmp_path / 'eyes.ini', fused / 'data', tmp_path / 'runs').recipe.order == ('fused',)
