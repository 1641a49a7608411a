"The audit trail: predictions name what made them, and `verify` says whether they came from a model."
import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import expect_error
from safetensors.torch import load_file, save_file

import aptos_fastai
from aptos_fastai.cli import main
from aptos_fastai.common.io import file_hash, read_record, write_record
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.spreadsheet import safe_cell, unsafe_cell
from aptos_fastai.decisions import DecisionSpec, OperatingPoint, Probabilities
from aptos_fastai.inference import audit as audit_module
from aptos_fastai.inference import grade_files as grade_files_module
from aptos_fastai.inference.grader import Grader
from aptos_fastai.inference.model_spec import ModelSpec, read_model
from aptos_fastai.inference.verify import contradictions, sampled


@pytest.fixture(scope='module')
def predicted(toy, image_paths, tmp_path_factory):
    "A CSV of predictions of copies of 8 images, in a folder; tests must not change it"
    folder = tmp_path_factory.mktemp('predicted')
    (folder / 'images').mkdir()
    for path in image_paths[:8]: shutil.copy(path, folder / 'images')
    main(['predict', str(toy), str(folder / 'images'), '-o', str(folder / 'grades.csv')])
    return folder / 'grades.csv'


@pytest.fixture
def grades(predicted, tmp_path):
    "A copy of that CSV and its audit file, which a test may change"
    for name in ('grades.csv', 'grades.csv.json'): shutil.copy(predicted.with_name(name), tmp_path)
    return tmp_path / 'grades.csv'


def edit(csv, row, **cells):
    "Change cells of a row of a CSV"
    df = pd.read_csv(csv, dtype=str, keep_default_na=False)
    for name, value in cells.items(): df.loc[row, name] = value
    df.to_csv(csv, index=False, lineterminator='\n')


def change_record(file, change):
    "Change a JSON record as a later version of the run would write it"
    record = read_record(file)
    change(record)
    write_record(file, record)


# What is recorded

def test_the_audit_file_says_what_made_the_csv(predicted, toy):
    record, model = read_record(predicted.with_name('grades.csv.json')), read_model(toy)[0]
    assert record['model'] == 'settings-demo/retrain_512' and record['digests'] == model.digests
    assert record['thresholds'] == list(model.thresholds)
    assert record['operating_points'][0]['threshold'] == model.decision.point(2).threshold
    assert (record['backend'], record['precision']) == ('torch', 'f32')
    assert (record['aptos_fastai'], record['torch']) == (aptos_fastai.__version__, torch.__version__)
    assert record['csv_sha256'] == file_hash(predicted) and record['csv'] == 'grades.csv'
    assert (record['images'], record['errors'], record['ungradable']) == (8, 0, 0)
    assert record['columns'] == predicted.read_text().splitlines()[0].split(',')
    started, finished = (datetime.fromisoformat(record[name]) for name in ('started', 'finished'))
    assert started <= finished and started.utcoffset().total_seconds() == 0 and record['resumed'] == []


def test_each_image_has_the_sha256_of_its_file(predicted):
    for row in pd.read_csv(predicted).itertuples(): assert row.image_sha256 == file_hash(row.file)


def test_a_resumed_call_keeps_its_first_start(toy, image_paths, tmp_path, monkeypatch):
    times, stream = iter(f'2026-01-0{day}T00:00:00+00:00' for day in range(1, 9)), Grader.stream
    monkeypatch.setattr(audit_module, 'now', lambda: next(times))

    def stop_after_a_batch(self, files, batch=4):
        for i, df in enumerate(stream(self, files, batch)):
            if i == 1: raise KeyboardInterrupt
            yield df
    command = ['predict', str(toy), *image_paths[:8], '-o', str(tmp_path / 'a.csv')]
    monkeypatch.setattr(Grader, 'stream', stop_after_a_batch)
    with pytest.raises(SystemExit): main(command)
    monkeypatch.setattr(Grader, 'stream', stream)
    main(command)
    record = read_record(tmp_path / 'a.csv.json')              # 1 and 3: the times of both audit records, not kept
    assert record['started'][:10] == '2026-01-02' and [o[:10] for o in record['resumed']] == ['2026-01-04']
    assert record['finished'][:10] == '2026-01-05' and not list(tmp_path.glob('.*'))


def test_an_audit_file_is_replaced_only_if_predict_wrote_it(toy, grades, image_paths, capsys):
    audit = grades.with_name('grades.csv.json')
    command = ['predict', toy, image_paths[0], '-o', grades]
    grades.unlink()
    expect_error(capsys, command, 'grades.csv.json: already exists', '--overwrite')
    main([*map(str, command), '--overwrite'])
    assert read_record(audit)['images'] == 1
    audit.write_text('{"notes": 1}')
    expect_error(capsys, [*command, '--overwrite'], 'grades.csv.json: is not a file that predict wrote')
    assert json.loads(audit.read_text()) == dict(notes=1)


def test_a_call_stopped_between_csv_and_audit_file_leaves_no_wrong_one(toy, grades, image_paths, monkeypatch, capsys):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(grade_files_module, 'write_audit', stop)
    with pytest.raises(SystemExit): main(['predict', str(toy), *image_paths[:3], '-o', str(grades), '--overwrite'])
    assert len(pd.read_csv(grades)) == 3 and not grades.with_name('grades.csv.json').exists()
    capsys.readouterr()
    main(['verify', str(toy), str(grades)])                    # all three are predicted again
    assert 'note: no ' in (out := capsys.readouterr().out) and '`predict` was stopped' in out and 'verified' in out


# The same model

def test_predictions_of_a_model_are_verified(toy, predicted, capsys):
    main(['verify', str(toy), str(predicted)])
    out = capsys.readouterr().out
    assert 'ok: 8 of 8 predictions repeated: equal (torch f32; scores differ by up to 0.000' in out
    assert 'allowed is 0.001)' in out
    key = read_model(toy)[0].key
    assert out.strip().endswith(f'verified: its predictions came from settings-demo/retrain_512 ({key})')
    main(['verify', str(toy), str(predicted), '--sample', '3'])
    assert 'ok: 3 of 8 predictions repeated' in capsys.readouterr().out


def test_a_sample_larger_than_a_batch_is_compared_row_by_row(toy, image_paths, tmp_path, capsys):
    out = tmp_path / 'all.csv'
    main(['predict', str(toy), *image_paths, '-o', str(out)])
    assert len(image_paths) > 16                               # the grader's batch
    main(['verify', str(toy), str(out), '--all'])
    assert '20 of 20 predictions repeated' in capsys.readouterr().out
    score = pd.read_csv(out).score[19]
    edit(out, 19, score=f'{score + 2:.4f}')
    expect_error(capsys, ['verify', toy, out, '--all'], '1 of 20 repeated predictions differ (row 20')


def test_bf16_names_itself_and_is_repeated_in_bf16(toy, predicted, tmp_path, capsys):
    out = tmp_path / 'bf16.csv'
    main(['predict', str(toy), str(predicted.parent / 'images'), '-o', str(out), '--precision', 'bf16'])
    assert '8 images processed by settings-demo/retrain_512 (torch bf16) -> ' in capsys.readouterr().out
    assert read_record(tmp_path / 'bf16.csv.json')['precision'] == 'bf16'
    main(['verify', str(toy), str(out)])
    assert 'predictions repeated: equal (torch bf16; ' in (text := capsys.readouterr().out)
    assert 'allowed is 0.1)' in text


def test_a_backend_that_is_not_there_is_repeated_in_torch(toy, grades, capsys):
    "The run has no ONNX; its scores may then differ by the bound of a bundle"
    change_record(grades.with_name('grades.csv.json'), lambda o: o.update(backend='onnx'))
    main(['verify', str(toy), str(grades)])
    out = capsys.readouterr().out
    assert 'note: torch f32 repeats what onnx f32 predicted' in out and 'allowed is 0.01)' in out


def test_other_versions_are_notes(toy, grades, capsys):
    change_record(grades.with_name('grades.csv.json'), lambda o: o.update(torch='1.0', aptos_fastai='0.0.1'))
    main(['verify', str(toy), str(grades)])
    out = capsys.readouterr().out
    assert 'note: made with torch 1.0' in out and 'note: made with aptos_fastai 0.0.1' in out


def test_moved_images_are_found_below_a_folder(toy, predicted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(predicted.parent)
    main(['predict', str(toy), 'images', '-o', str(tmp_path / 'g.csv')])
    moved = tmp_path / 'archive/images'
    shutil.copytree('images', moved)
    monkeypatch.chdir(tmp_path)
    expect_error(capsys, ['verify', toy, 'g.csv'], '8 of 8 repeated predictions differ', 'image not found', '--images')
    main(['verify', str(toy), 'g.csv', '--images', 'archive'])
    assert 'verified' in capsys.readouterr().out


def test_de_identified_predictions_are_verified_with_the_same_images(toy, predicted, tmp_path, capsys):
    images, out = predicted.parent / 'images', tmp_path / 'd.csv'
    main(['predict', str(toy), str(images), '-o', str(out), '--deidentify'])
    record = (tmp_path / 'd.csv.json').read_text()
    assert str(images) not in record and not any(path.stem in record for path in images.iterdir())
    expect_error(capsys, ['verify', toy, out], 'image not found')
    main(['verify', str(toy), str(out), '--images', str(images)])
    assert 'verified' in capsys.readouterr().out
    one = next(images.iterdir())
    expect_error(capsys, ['verify', toy, out, '--images', one], '1 images, but the de-identified CSV')


def test_file_names_that_were_made_safe_are_read_back(toy, image_paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('=1.png', 'c.png'): shutil.copy(image_paths[0], name)
    main(['predict', str(toy), '=1.png', 'c.png', '-o', 'g.csv'])
    assert "'=1.png" in Path('g.csv').read_text()
    main(['verify', str(toy), 'g.csv'])
    assert '2 of 2 predictions repeated' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['a.png', '=a', '-1', '@x', '+1', '\tx', "'a", '', "it's"])
def test_unsafe_cell_undoes_safe_cell(text): assert unsafe_cell(safe_cell(text)) == text


def test_unreadable_images_do_not_matter(toy, image_paths, tmp_path, capsys):
    shutil.copy(image_paths[0], tmp_path / 'good.png')
    (tmp_path / 'bad.png').write_bytes(b'hello')
    expect_error(capsys, ['predict', toy, tmp_path, '-o', tmp_path / 'g.csv'], '1 of 2 images')
    assert read_record(tmp_path / 'g.csv.json')['errors'] == 1
    main(['verify', str(toy), str(tmp_path / 'g.csv')])
    assert '1 of 1 predictions repeated' in capsys.readouterr().out
    shutil.copy(image_paths[1], tmp_path / 'bad.png')
    expect_error(capsys, ['verify', toy, tmp_path / 'g.csv'], '1 of 1 unreadable images differ (row 1 (bad.png)',
                 'SHA-256 differs')
    (tmp_path / 'bad.png').unlink()
    expect_error(capsys, ['verify', toy, tmp_path / 'g.csv'], 'row 1 (bad.png): image not found')
    edit(tmp_path / 'g.csv', 0, score='1.2', grade='1')
    expect_error(capsys, ['verify', toy, tmp_path / 'g.csv'], '1 of 2 rows do not follow', 'has a score and an error')


def test_an_image_that_is_missing_still_is_no_contradiction(toy, image_paths, tmp_path, capsys):
    shutil.copy(image_paths[0], tmp_path / 'good.png')
    (tmp_path / 'list.csv').write_text('file\ngood.png\ngone.png\n')
    expect_error(capsys, ['predict', toy, tmp_path / 'list.csv', '-o', tmp_path / 'g.csv'], '1 of 2 images')
    command = ['verify', toy, tmp_path / 'g.csv', '--images', tmp_path / 'list.csv']
    main([*map(str, command)])
    assert 'ok: 1 unreadable images cannot be read now, either' in capsys.readouterr().out
    shutil.copy(image_paths[1], tmp_path / 'gone.png')
    expect_error(capsys, command, 'row 2 (gone.png): has no prediction, but its image can be read')


def test_a_prediction_hidden_as_an_error_is_caught(toy, grades, capsys):
    "Without the audit file only the image itself tells; with --sample 1 too, since every error is read again"
    header = grades.read_text().splitlines()[0].split(',')
    keep = 'file', 'image_sha256'
    edit(grades, 3, **{name: '' for name in header if name not in keep} | dict(error='cannot be decoded'))
    message = '(row 4 ', 'has no prediction, but its image can be read'
    expect_error(capsys, ['verify', toy, grades, '--sample', '1'], 'changed since', *message)
    grades.with_name('grades.csv.json').unlink()
    expect_error(capsys, ['verify', toy, grades, '--all'], '1 of 1 unreadable images differ', *message)


@pytest.fixture
def people(toy, predicted, tmp_path):
    "A CSV of predictions with its audit file and patients.csv"
    main(['predict', str(toy), str(predicted.parent / 'images'), '-o', str(tmp_path / 'g.csv'), '--patient', '(.+)[.]'])
    return tmp_path / 'g.csv'


def test_patients_are_verified_and_an_edited_or_missing_file_is_caught(toy, people, capsys):
    patients = people.with_name('patients.csv')
    assert read_record(people.with_name('g.csv.json'))['patients_sha256'] == file_hash(patients)
    command = ['verify', str(toy), str(people), '--sample', '1']
    main(command)
    assert 'ok: patients.csv is as predict wrote it' in capsys.readouterr().out
    written = patients.read_text()
    patients.write_text(written.replace('refer', 'do not refer', 1))
    expect_error(capsys, command, 'not verified', 'patients.csv was changed or replaced')
    patients.unlink()
    expect_error(capsys, command, 'not verified', 'patients.csv, which predict wrote beside it, is missing')


def test_patients_of_another_call_are_not_called_verified(toy, grades, people, capsys):
    assert 'patients_sha256' not in read_record(grades.with_name('grades.csv.json'))
    main(['verify', str(toy), str(grades), '--sample', '1'])
    assert 'patients.csv is of another call and is not verified' in ' '.join(capsys.readouterr().out.split())


# Another model, another file

def test_another_stage_is_not_the_model(toy, predicted, capsys):
    expect_error(capsys, ['verify', toy / 'finetune_256', predicted],
                 'not verified', 'made by a model with other weights', 'of 8 repeated predictions differ')


def test_other_thresholds_are_named(toy_copy, predicted, capsys):
    def move(o): o['submission']['thresholds'] = [.05, .1, .15, .2]
    change_record(toy_copy / 'summary.json', move)
    err = expect_error(capsys, ['verify', toy_copy, predicted], 'made by a model with other thresholds (',
                       'of 8 rows do not follow from their scores')
    assert 'weights' not in err and 'operating_point' not in err and 'repeated' not in err


def test_another_operating_point_is_named(toy_copy, predicted, capsys):
    def move(o): o['submission']['decision']['points'][0]['threshold'] = 3.9
    change_record(toy_copy / 'summary.json', move)
    expect_error(capsys, ['verify', toy_copy, predicted], 'made by a model with other operating_point (')


def test_another_gate_is_named(toy_copy, predicted, capsys):
    def move(o): o['submission']['gate']['scores'] = [-9., 9.]
    change_record(toy_copy / 'summary.json', move)
    expect_error(capsys, ['verify', toy_copy, predicted], 'made by a model with other gate (')


def test_a_retrained_model_of_the_same_name_is_told_apart(toy_copy, grades, predicted, capsys):
    fold = toy_copy / 'retrain_512/fold0'
    weights = load_file(fold / 'weights.safetensors')
    rng = torch.Generator().manual_seed(0)
    noisy = {name: value + .05 * torch.randn(value.shape, generator=rng) if value.is_floating_point() else value
             for name, value in weights.items()}
    save_file(noisy, fold / 'weights.safetensors')
    sha256 = file_hash(fold / 'weights.safetensors')
    change_record(fold / 'stage.json', lambda o: o['files']['weights.safetensors'].update(sha256=sha256))
    change_record(toy_copy / 'summary.json', lambda o: o['submission']['weights'].update({'retrain_512/fold0': sha256}))
    assert read_model(toy_copy)[0].name == 'settings-demo/retrain_512'
    expect_error(capsys, ['verify', toy_copy, predicted], 'made by a model with other weights (',
                 '8 of 8 repeated predictions differ (row 1')
    grades.with_name('grades.csv.json').unlink()               # without its audit file: by its scores
    expect_error(capsys, ['verify', toy_copy, grades], '8 of 8 repeated predictions differ')


def test_an_edited_grade_is_caught_in_any_row(toy, grades, capsys):
    grade = pd.read_csv(grades).grade[6]
    edit(grades, 6, grade=str((grade + 1) % 5))
    command = ['verify', toy, grades, '--sample', '1']
    expect_error(capsys, command, 'the CSV was changed since predict wrote it', '1 of 8 rows do not follow',
                 f'row 7 ({Path(pd.read_csv(grades).file[6]).name}): grade {(grade + 1) % 5}, expected {grade}')
    grades.with_name('grades.csv.json').unlink()
    expect_error(capsys, command, '1 of 8 rows do not follow from their scores')


def test_an_edited_score_is_caught_where_it_is_repeated(toy, grades, capsys):
    "Its grade and its decision follow, so that only the hash or a repetition tells"
    score = pd.read_csv(grades).score[2]
    edit(grades, 2, score=f'{score + .0021:.4f}')
    grades.with_name('grades.csv.json').unlink()
    expect_error(capsys, ['verify', toy, grades, '--sample', '2'], 'without its audit file', 'add --all')
    edit(grades, 2, score=f'{score + 2:.4f}')
    expect_error(capsys, ['verify', toy, grades, '--all'], '1 of 8 repeated predictions differ', 'row 3', 'now')


def test_a_csv_without_its_audit_file_is_verified_only_as_a_whole(toy, grades, capsys):
    grades.with_name('grades.csv.json').unlink()
    expect_error(capsys, ['verify', toy, grades, '--sample', '7'], 'not verified', 'add --all')
    main(['verify', str(toy), str(grades), '--all'])
    out = capsys.readouterr().out
    assert 'version, backend and time are not known' in out and 'allowed is 0.01)' in out
    assert 'verified: the 8 rows that are there came from' in out and 'its predictions' not in out


def test_without_its_audit_file_rows_and_columns_must_be_complete(toy, grades, predicted, capsys):
    grades.with_name('grades.csv.json').unlink()
    command, images = ['verify', toy, grades, '--all'], predicted.parent / 'images'
    main([*map(str, command), '--images', str(images)])
    assert 'ok: as many rows as images: 8' in capsys.readouterr().out
    df = pd.read_csv(grades, dtype=str, keep_default_na=False)

    def write(df): df.to_csv(grades, index=False)
    write(df.iloc[:-1])
    expect_error(capsys, [*command, '--images', images], '7 rows, but --images names 8 images')
    write(pd.concat([df, df.iloc[[2]]]))
    expect_error(capsys, command, '1 of 9 rows are duplicates (row 9')
    write(pd.concat([df, df.iloc[[2]].assign(file=f'{images}/../images/{Path(df.file[2]).name}')]))
    expect_error(capsys, command, '1 of 9 rows are duplicates (row 9')
    write(df.drop(columns=['decision', 'grade_high']))
    expect_error(capsys, command, 'every column is needed; missing: decision, grade_high')
    write(df)
    edit(grades, 1, score_sd=f'{float(df.score_sd[1]) + .02:.4f}')
    expect_error(capsys, command, '1 of 8 repeated predictions differ (row 2', 'score_sd')


def test_an_edited_audit_file_is_caught(toy, grades, capsys):
    audit = grades.with_name('grades.csv.json')
    audit.write_text(audit.read_text().replace('"precision": "f32"', '"precision": "bf16"'))
    expect_error(capsys, ['verify', toy, grades], 'grades.csv.json: content changed')
    write_record(audit, dict(format=2))
    expect_error(capsys, ['verify', toy, grades], 'grades.csv.json: another version')


def test_a_replaced_image_is_caught(toy, image_paths, tmp_path, capsys):
    for path in image_paths[:2]: shutil.copy(path, tmp_path)
    main(['predict', str(toy), str(tmp_path), '-o', str(tmp_path / 'g.csv')])
    replaced = tmp_path / Path(image_paths[0]).name
    shutil.copy(image_paths[5], replaced)
    expect_error(capsys, ['verify', toy, tmp_path / 'g.csv'], '1 of 2 repeated predictions differ', replaced.name,
                 'changed or replaced (SHA-256 differs)')
    replaced.unlink()
    expect_error(capsys, ['verify', toy, tmp_path / 'g.csv'], '1 of 2 repeated predictions differ', 'image not found')


def test_a_file_that_holds_no_predictions_is_an_error(toy, tmp_path, capsys):
    file = tmp_path / 'g.csv'
    expect_error(capsys, ['verify', toy, file], 'g.csv: no such file')
    for text, message in [('a,b\n1,2\n', 'no column file, score, grade'), ('file,score,grade\n', 'no rows'),
                          ('', 'no CSV of predictions'), ('file,score,grade\na,x,1\n', 'row 1: score is x, no number'),
                          ('file,score,grade,error\na,,,broken\n', 'no row has a score')]:
        file.write_text(text)
        expect_error(capsys, ['verify', toy, file], message)
    expect_error(capsys, ['verify', toy, file, '--sample', '0'], '--sample 0: choose a number from 1')


# Rules

def spec_by_hand(**keys):
    "Midpoints as thresholds; referable from score 1.2 on, sight-threatening from 3.1 on"
    points = OperatingPoint(2, 'threshold', 1.2, 1.2), OperatingPoint(3, 'threshold', 3.1, 3.1)
    spec = ModelSpec('by hand', Prep(size=32), (), (.5, 1.5, 2.5, 3.5), .9, False, decision=DecisionSpec(points))
    return replace(spec, **keys)


GOOD = [                                     # score, grade, grade_name, decision, referable, sight_threatening
    (.3, 0, 'no DR', 'do not refer', 'no', 'no'), (1.3, 1, 'mild', 'refer', 'yes', 'no'),
    (3.2, 3, 'severe', 'refer', 'yes', 'yes'), (1.19996, 1, 'mild', 'do not refer', 'no', 'no'),
    (1.19996, 1, 'mild', 'refer', 'yes', 'no'),                # by rounding to four decimals it may have been 1.2
    (2., np.nan, 'ungradable', 'not gradable', 'ungradable', 'ungradable'), (np.nan, np.nan, '', '', '', ''),
]
COLUMNS = ['score', 'grade', 'grade_name', 'decision', 'referable', 'sight_threatening']


def rows_by_hand():
    df = pd.DataFrame(GOOD, columns=COLUMNS).assign(referable_high_specificity='', ungradable='', error='')
    df.loc[5, 'ungradable'], df.loc[6, 'error'] = 'blurred', 'cannot be decoded'
    return df


def test_rows_that_follow_from_their_scores_contradict_nothing():
    assert contradictions(rows_by_hand(), spec_by_hand(), None) == {}


def test_probabilities_follow_from_the_score_and_the_recorded_prevalence():
    "Ordinal logistic regression by hand; its odds of referable grades are multiplied where the prevalence is another"
    slope, intercepts, shares = 2., (1., 3., 5., 7.), (.5, .1, .2, .1, .1)
    spec = spec_by_hand()
    spec = replace(spec, decision=replace(spec.decision, probabilities=Probabilities(slope, intercepts, shares)))
    df = rows_by_hand().iloc[:3].copy()
    df['p_referable'] = [1 / (1 + np.exp(intercepts[1] - slope * score)) for score in df.score]
    validated, screened = dict(prevalence=None), dict(prevalence=.1)
    assert contradictions(df.round(4), spec, validated) == {}
    assert list(contradictions(df.round(4), spec, screened)) == [0, 1, 2]
    odds = df.p_referable / (1 - df.p_referable) * (.1 / .4) / (.9 / .6)
    assert contradictions(df.assign(p_referable=odds / (1 + odds)).round(4), spec, screened) == {}
    assert contradictions(df.assign(p_referable=.5), spec, None) == {}             # not compared: prevalence unknown


def test_a_prediction_set_must_hold_its_grade():
    low, high = [0., 1., 2., 1., 1., np.nan, np.nan], [1., 1., 4., 1., 2., np.nan, np.nan]
    df = rows_by_hand().assign(grade_low=low, grade_high=high)
    assert contradictions(df, spec_by_hand(), None) == {}
    df.loc[2, 'grade_low'] = 4.
    assert contradictions(df, spec_by_hand(), None) == {2: 'its grade is not in its prediction set'}


@pytest.mark.parametrize('row, cells', [
    (0, dict(grade=1)), (0, dict(grade_name='mild')), (1, dict(decision='do not refer')), (2, dict(referable='no')),
    (2, dict(sight_threatening='no')), (3, dict(score=1.3)), (0, dict(referable_high_specificity='yes')),
    (5, dict(grade=2)), (5, dict(decision='do not refer')), (5, dict(ungradable='')), (6, dict(error='')),
    (6, dict(grade=0)), (6, dict(decision='do not refer')), (6, dict(referable='no')),
    (0, dict(score=np.nan)), (1, dict(error='broken')),
])
def test_a_changed_cell_contradicts(row, cells):
    df = rows_by_hand()
    for name, value in cells.items(): df.loc[row, name] = value
    assert list(contradictions(df, spec_by_hand(), None)) == [row]


def test_a_sample_is_spread_over_the_rows():
    df = pd.DataFrame(dict(score=[np.nan, *range(99)]))
    chosen = sampled(df, 10, 'a' * 64)
    assert [(i - 1) // 10 for i in chosen] == [*range(10)]             # one of each stretch of ten rows
    assert chosen.tolist() == sampled(df, 10, 'a' * 64).tolist() != sampled(df, 10, 'b' * 64).tolist()
    assert sampled(df, None, 'a' * 64).tolist() == sampled(df, 99, 'a' * 64).tolist() == [*range(1, 100)]
