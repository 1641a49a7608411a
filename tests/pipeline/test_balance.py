"[stage] balance: images of each value of a column (camera, site …) are drawn equally often."

import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, write_table

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.reasons import training_reasons
from aptos_fastai.pipeline.stage import balanced_weights, stage_learner, training_frame
from aptos_fastai.run_folder import training_keys

RECIPE = """
[recipe]
splits = 2

[table.train]
csv = train.csv
images = train_images
grade = diagnosis
carry = camera

[stage.teacher]
train = train
arch = test_resnet
weights = none
size = 32
epochs = 1
bs = 8
precision = f32
balance = camera

[submit]
final = teacher
"""


@pytest.fixture
def data(tmp_path):
    "40 graded images, 8 of them of the camera B; a second table of 10 more"
    df = write_table(tmp_path / 'data', 40)
    df.assign(camera=np.where(np.arange(40) % 5 == 0, 'B', 'A')).to_csv(tmp_path / 'data/train.csv', index=False)
    df = write_table(tmp_path / 'data', 10, seed=1, name='more')
    df.assign(camera='C').to_csv(tmp_path / 'data/more.csv', index=False)
    return tmp_path / 'data'


def arguments(tmp_path, text=RECIPE, *more):
    (tmp_path / 'r.ini').write_text(text)
    places = dict(recipe='r.ini', data='data', runs='runs')
    return [*(o for key, name in places.items() for o in (f'--{key}', str(tmp_path / name))), *more]


def opened(tmp_path, *sets): return load_run(tmp_path / 'r.ini', tmp_path / 'data', tmp_path / 'runs', list(sets))


def drawn(frame, column='camera'):
    "The share of draws of each value among the training images"
    train = frame[~frame.valid]
    return (train.weight.groupby(train[column]).sum() / train.weight.sum()).to_dict()


def test_weights_by_hand():
    frame = pd.DataFrame(dict(camera=list('AAABAC'), valid=[False] * 4 + [True] * 2, weight=1.))
    found = balanced_weights(frame, 'camera')
    assert found[:4].tolist() == pytest.approx([1 / 3] * 3 + [1]) and np.isfinite(found).all()
    weighted = balanced_weights(frame.assign(weight=[1, 2, 1, 5, 1, 1]), 'camera')
    assert weighted[:4].tolist() == pytest.approx([1 / 4, 1 / 2, 1 / 4, 1])      # the weights within a camera stay


def test_each_camera_is_drawn_equally_often_and_every_image_can_be(data, tmp_path):
    main(['prepare', *arguments(tmp_path)])
    run = opened(tmp_path)
    frame = training_frame(run, run.recipe.stages['teacher'], 0, {})
    assert drawn(frame) == pytest.approx(dict(A=.5, B=.5))
    dl = stage_learner(run, 'teacher').dls.train
    counts = pd.Series(np.concatenate([dl.get_idxs() for _ in range(60)])).value_counts()
    train = dl.items.reset_index(drop=True)
    assert len(counts) == len(train)
    share = counts.groupby(train.camera).sum() / counts.sum()
    assert share['A'] == pytest.approx(.5, abs=.05)


def test_with_weights_of_tables_and_several_tables(data, tmp_path):
    text = RECIPE.replace('train = train', 'train = train more\nsource_weights = 3 1')
    text += '\n[table.more]\ncsv = more.csv\nimages = more_images\ngrade = diagnosis\ncarry = camera\n'
    main(['prepare', *arguments(tmp_path, text)])
    run = opened(tmp_path)
    frame = training_frame(run, run.recipe.stages['teacher'], 0, {})
    assert drawn(frame) == pytest.approx(dict.fromkeys('ABC', 1 / 3))


def test_the_column_is_part_of_the_fingerprint_only_where_it_balances(data, tmp_path, capsys):
    args = arguments(tmp_path)
    main(['train', 'teacher', *args])
    record = read_record(tmp_path / 'runs/r/teacher/fold0/stage.json')
    assert record['settings']['balance'] == 'camera'
    main(['train', 'teacher', *args])
    assert 'Nothing to do' in capsys.readouterr().out
    csv = pd.read_csv(data / 'train.csv')
    csv.assign(camera=csv.camera.iloc[::-1].to_numpy()).to_csv(data / 'train.csv', index=False)
    run = opened(tmp_path)
    assert 'the column of balance changed' in training_reasons(run, run.todo())[0]
    run = opened(tmp_path, 'stage.teacher.balance=')
    assert 'balance: camera -> (empty)' in training_reasons(run, run.todo())[0]
    without = run.fingerprint('teacher', 0)
    csv.to_csv(data / 'train.csv', index=False)
    assert opened(tmp_path, 'stage.teacher.balance=').fingerprint('teacher', 0) == without


def test_records_without_the_key_are_as_with_an_empty_one():
    settings = dict(keep='loss', epochs=1, lr=.1)
    assert training_keys(settings) == training_keys(settings | dict(balance='')) == dict(keep='loss', epochs=1, lr=.1)
    assert training_keys(settings | dict(balance='camera'))['balance'] == 'camera'


def test_a_linear_probe_is_balanced_too(data, tmp_path):
    main(['train', 'teacher', *arguments(tmp_path, RECIPE.replace('epochs = 1', 'epochs = 0\nfreeze_epochs = 1'))])
    assert read_record(tmp_path / 'runs/r/teacher/fold0/stage.json')['settings']['balance'] == 'camera'


@pytest.mark.parametrize('text, words', [
    (RECIPE.replace('carry = camera\n', ''), ['balance = camera', 'the table train does not carry', '[table.train]']),
    (RECIPE.replace('= camera', '= site'), ['site', 'train.csv']),
    (RECIPE.replace('= camera', '= empty'), ['balance = empty', 'empty for 3 of 40 images', 'train001']),
    (RECIPE.replace('= camera', '= one'), ['balance = one', 'all images have the value X']),
])
def test_a_column_that_cannot_balance_is_refused_before_training(data, tmp_path, capsys, text, words):
    csv = pd.read_csv(data / 'train.csv')
    csv['empty'] = np.where(csv.index.isin([1, 2, 3]), '', 'x' + csv.camera)
    csv.assign(one='X').to_csv(data / 'train.csv', index=False)
    expect_error(capsys, ['train', 'teacher', *arguments(tmp_path, text)], *words)
    assert not (tmp_path / 'runs').exists()
