"""What users get wrong, as tables of a mistake and words of its message.

Each message is one line, the exit status is 1, and nothing is written.
"""
import errno
import os
import shutil
import tempfile

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TOY, expect_error, toy_args, write_table

from aptos_fastai.cli import COMMANDS, uses_run
from aptos_fastai.common.io import AptosError, check_output_file


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_first(path, old, new):
    "Replace the first `old` in a text file, which must contain it"
    text = path.read_text()
    assert old in text, f'{path} does not contain {old}'
    write(path, text.replace(old, new, 1))


def flip_bit(path, at=100):
    "Change one bit of the byte at position `at`"
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    write(path, data)


# Tables

def change_train_csv(data, old, new):
    file = data / 'train.csv'
    write(file, file.read_text().replace(old, new))


def set_grade(data, *rows, grade):
    "Set the grade of some rows of train.csv to a text"
    df = pd.read_csv(data / 'train.csv', dtype=str)
    df.loc[list(rows), 'diagnosis'] = grade
    df.to_csv(data / 'train.csv', index=False)


def link_image(data, target):
    "Replace an image by a symbolic link to `target`"
    file = data / 'train_images/train001.png'
    file.unlink()
    file.symlink_to(target)


def replace_image_by_folder(data):
    file = data / 'train_images/train001.png'
    file.unlink()
    file.mkdir()


NO_IMAGE = '1 of 40 ids have no image'
BAD_TABLES = {
    'test without ids': (lambda data: write(data / 'test.csv', 'name\na\n'), ['test.csv: no column id_code']),
    'order with another id': (lambda data: write(data / 'sample_submission.csv', 'id_code\nzz\n'),
                              ['sample_submission.csv: 11 ids in only one']),
    'test missing': (lambda data: (data / 'test.csv').unlink(), ['test.csv not found']),
    'test images missing': (lambda data: shutil.rmtree(data / 'test_images'), ['test_images: image folder not found']),
    'binary': (lambda data: write(data / 'train.csv', bytes(range(256)) * 9), ['train.csv: not a readable CSV']),
    'grade nan': (lambda data: set_grade(data, 3, grade='nan'), ['train003 = nan']),
    'grade inf': (lambda data: set_grade(data, 3, grade='inf'), ['train003 = inf']),
    'grade -1': (lambda data: set_grade(data, 3, grade='-1'), ['train003 = -1']),
    'many bad grades': (lambda data: set_grade(data, *range(8), grade='9'), ['8 invalid values', '…']),
    'id goes up': (lambda data: change_train_csv(data, 'train001', '../train001'), [NO_IMAGE, '../train001']),
    'id is absolute': (lambda data: change_train_csv(data, 'train001', '/etc/passwd'), [NO_IMAGE, '/etc/passwd']),
    'link out of the folder': (lambda data: link_image(data, '/etc/passwd'), ['train001: links to a file outside']),
    'dead link': (lambda data: link_image(data, data / 'nothing.png'), [NO_IMAGE, 'train001']),
    'image is a folder': (replace_image_by_folder, [NO_IMAGE, 'train001']),
}


@pytest.mark.parametrize('name', BAD_TABLES)
def test_bad_tables(tables, small_recipe, tmp_path, capsys, name):
    damage, words = BAD_TABLES[name]
    damage(tables)
    runs = tmp_path / 'runs'
    expect_error(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', runs], *words)
    assert not runs.exists()


# Networks

BAD_NETWORKS = {
    'size between patches': (['arch=test_vit', 'size=40'], ['[stage.teacher] arch = test_vit: size = 40', '32 or 48']),
    'no class token': (['head=cls'], ['[stage.teacher] head = cls: test_resnet has no class token']),
    'no such network': (['arch=seresnet5000'], ['[stage.teacher] arch = seresnet5000: no such network']),
}


@pytest.mark.parametrize('name', BAD_NETWORKS)
def test_bad_networks(tables, small_recipe, tmp_path, capsys, name):
    keys, words = BAD_NETWORKS[name]
    options = [o for key in keys for section in ('stage', 'stage.teacher') for o in ('--set', f'{section}.{key}')]
    runs = tmp_path / 'runs'
    expect_error(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', runs, *options], *words)
    assert not runs.exists()


# Images

def encode(extension, side):
    return cv2.imencode(extension, np.full((side, side, 3), 90, np.uint8))[1].tobytes()


PNG, JPEG = encode('.png', 8), encode('.jpg', 64)
UNKNOWN, TRUNCATED, DAMAGED = 'unknown image format', 'the file is truncated', 'cannot be decoded'
BAD_IMAGES = {
    'empty': (b'', 'empty file'),
    'text': (b'dear doctor', UNKNOWN),
    'html': (b'<html>404 Not Found</html>', UNKNOWN),
    'zip': (b'PK\x03\x04' + b'\0' * 40, UNKNOWN),
    'svg': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNKNOWN),
    'png truncated': (PNG[:-20], TRUNCATED),
    'png header alone': (PNG[:16], DAMAGED),
    'png with noise inside': (PNG[:45] + b'\x00' * 30 + PNG[-12:], DAMAGED),
    'jpeg truncated': (JPEG[:-30], TRUNCATED),
    'jpeg header alone': (b'\xff\xd8\xff\xe0\x00\x10JFIF\x00', DAMAGED),
    'gif header alone': (b'GIF89a\x01\x00', DAMAGED),
    'tiff header alone': (b'II*\x00\x08\x00\x00\x00', DAMAGED),
    'dicom header alone': (b'\0' * 128 + b'DICM', DAMAGED),
}


@pytest.fixture(scope='module')
def one_data_folder(tmp_path_factory):
    "Tables for all bad images, one after the other: only the bad image is prepared again"
    data = tmp_path_factory.mktemp('bad_images') / 'data'
    write_table(data, 40)
    write_table(data, 10, graded=False, seed=1, name='test')
    return data


@pytest.mark.parametrize('name', BAD_IMAGES)
def test_bad_images(one_data_folder, small_recipe, capsys, name):
    content, words = BAD_IMAGES[name]
    write(one_data_folder / 'train_images/train005.png', content)
    runs = one_data_folder.with_name('runs')
    expect_error(capsys, ['all', '--recipe', small_recipe, '--data', one_data_folder, '--runs', runs],
                 '1 of 40 images are unreadable: train005', words, 'skip_unreadable = yes')
    assert not list(runs.rglob('stage.json'))


# Command lines

BAD_COMMANDS = {
    'no such command': (['trian', 'finetune_256'], ['trian']),
    'no such option': (['all', '--epochs', '3'], ['--epochs']),
    'train: no such stage': (['train', 'nope'], ['nope: no such stage']),
    'label: no such stage': (['label', 'nope'], ['nope: no such stage']),
    'label: graded table': (['label', 'finetune_256', 'aptos_train'], ['aptos_train: no such ungraded table']),
    'lr_find: no such stage': (['lr_find', 'nope'], ['nope: no such stage']),
    'inspect: no such table': (['inspect', 'nope'], ['nope: no such table', 'aptos_train']),
    'inspect: a preset': (['inspect', 'messidor2'], ['messidor2: no such table', '[table.NAME] preset = messidor2']),
    'inspect: no such file': (['inspect', 'grades.csv', '--recipe', 'nowhere.ini'], ['grades.csv: no such file']),
    'export: run is a file': (['export', __file__], [f'{__file__}: no model here']),
    'inspect: not a number': (['inspect', 'aptos_train', 'many'], ['many']),
    'inspect: no images': (['inspect', 'aptos_train', '0'], ['0: choose at least 1 image']),
    'no recipe': (['all', '--recipe', 'nowhere.ini'], ['nowhere.ini: no such recipe']),
    'recipe is a folder': (['all', '--recipe', 'tests'], ['tests: no such recipe']),
    'no data': (['all', '--data', '/nowhere'], ['/nowhere: data folder not found']),
    'data is a file': (['all', '--data', __file__], ['data folder not found']),
    'runs is a file': (['all', '--runs', __file__], ['is a file. Choose a folder']),
    'set without a section': (['all', '--set', 'epochs=3'], ['SECTION.KEY=VALUE']),
    'set without a value': (['all', '--set', 'stage.epochs'], ['SECTION.KEY=VALUE']),
    'set an unknown section': (['all', '--set', 'nope.x=1'], ['no such section']),
    'trust a missing file': (['all', '--trust', 'nowhere.pkl'], ['--trust nowhere.pkl: no such file']),
    'predict: no model': (['predict', 'nowhere', __file__], ['nowhere: no model here']),
    'predict: no images': (['predict', 'nowhere'], ['IMAGES']),
    'explain: no such image': (['explain', 'nowhere', 'a.png'], ['a.png']),
    'export: no run': (['export', 'nowhere'], ['nowhere: no model here']),
    'serve: no model': (['serve', 'nowhere'], ['nowhere: no model here']),
    'serve: port is a word': (['serve', 'nowhere', '--port', 'http'], ['--port']),
    'serve: port too high': (['serve', 'nowhere', '--port', '70000'], ['choose a port from 1 to 65535']),
    'kaggle: no run': (['kaggle', 'nowhere'], ['nowhere: no model here']),
    'kaggle: bad user name': (['kaggle', 'nowhere', '--user', 'a b'], ['--user a b']),
    'compare: no runs': (['compare', 'nowhere', 'elsewhere'], ['nowhere: not a finished run']),
    'init: folder is a file': (['init', __file__], ['cannot write this file (File exists). Choose another folder']),
    'demo: folder in use': (['demo', str(ROOT / 'tests')], ['is not empty and contains no demo']),
}


@pytest.fixture
def runs_with_demo(toy, tmp_path):
    "A folder of runs that holds the demo's images and their prepared copies, and no run"
    for folder in toy.parent.iterdir():
        if folder != toy: shutil.copytree(folder, tmp_path / 'runs' / folder.name, copy_function=os.link)
    return tmp_path / 'runs'


@pytest.mark.parametrize('name', BAD_COMMANDS)
def test_bad_commands(runs_with_demo, monkeypatch, capsys, name):
    args, words = BAD_COMMANDS[name]
    monkeypatch.chdir(ROOT)
    if args[0] in COMMANDS and uses_run(COMMANDS[args[0]]):
        defaults = {'--runs': runs_with_demo, '--recipe': ROOT / 'settings.ini'}
        args = [*args, *TOY]
        for option, value in defaults.items():
            if option not in args: args += [option, value]
    before = set(os.listdir(ROOT))
    expect_error(capsys, args, *words)
    assert not (runs_with_demo / 'settings-demo').exists()
    assert set(os.listdir(ROOT)) == before


# Outputs

def test_outputs_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path, capsys):
    file = tmp_path / 'file'
    file.write_text('mine')
    for args, output in ((['predict', 'nowhere', __file__], 'a/b.csv'), (['explain', 'nowhere', __file__], 'a'),
                         (['configure', '--data', 'nowhere', '--hours', '1'], 'x.ini')):
        expect_error(capsys, [*args, '-o', file / output], f'{file}: cannot write to this folder (this is a file)')
    expect_error(capsys, ['predict', 'nowhere', __file__, '-o', tmp_path], f'{tmp_path}: is a folder. Name a file')
    assert [o.name for o in tmp_path.iterdir()] == ['file'] and file.read_text() == 'mine'


def test_a_folder_that_is_not_writable_is_refused_and_a_new_one_is_not_made_yet(tmp_path, monkeypatch):
    check_output_file(tmp_path / 'new/folder/grades.csv')
    assert not list(tmp_path.iterdir())
    def refuse(dir): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))
    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
    with pytest.raises(AptosError, match=f'^{tmp_path}: cannot write to this folder .Permission denied'):
        check_output_file(tmp_path / 'new/folder/grades.csv')


# A finished run

def damage_prepared_csv(run):
    for file in run.parent.glob('prepared/*/aptos_train*/prepared.csv'):
        write(file, b'\xff\xfe\x00' + file.read_bytes())


PARENT = ['--set', 'stage.finetune_256.wd=.2', '--replace']         # reruns finetune_256
LAST = ['--set', 'stage.retrain_512.wd=.2', '--replace']            # reruns retrain_512 alone
STAGE_JSON = 'finetune_256/fold0/stage.json'
LABELS_RECORD = 'labels/finetune_256/aptos_test/provenance.json'
SCORES_RECORD = 'finetune_256/fold0/scores_aptos_test_hflip.json'
FOLDS_HEADER = 'source,id_code,fold,digest'
BAD_FILES = {                                # name: damage, options of `all`, words
    'stage.json edited': (lambda run: replace_first(run / STAGE_JSON, '"fold": 0', '"fold": 1'), PARENT,
                          [f'{STAGE_JSON}: content changed', 'Restore it, or delete it']),
    'stage.json truncated': (lambda run: write(run / STAGE_JSON, '{"stage": '), PARENT,
                             [f'{STAGE_JSON}: damaged JSON', 'Delete it and run again.']),
    'stage.json a list': (lambda run: write(run / STAGE_JSON, '[]'), PARENT, [f'{STAGE_JSON}: content changed']),
    'stage.json binary': (lambda run: write(run / STAGE_JSON, b'\xff\xfe\x00'), PARENT,
                          [f'{STAGE_JSON}: damaged JSON']),
    'stage.json of an older version': (lambda run: write(run / STAGE_JSON, '{"stage": "a", "seal": "b"}'), PARENT,
                                       [f'{STAGE_JSON}: written by an older version', 'new --runs folder']),
    'summary.json edited': (lambda run: replace_first(run / 'summary.json', '"synthetic": true', '"synthetic": false'),
                            PARENT, ['summary.json: content changed']),
    'run.json edited': (lambda run: write(run / 'run.json', '{"data": "elsewhere"}'), PARENT,
                        ['run.json: content changed']),
    'folds.csv edited': (lambda run: replace_first(run / 'folds.csv', ',0,', ',1,'), PARENT,
                         ['folds.csv: content changed']),
    'folds.csv of another program': (lambda run: write(run / 'folds.csv', 'a,b\n1,2\n'), PARENT,
                                     ['folds.csv: its columns are a, b']),
    'folds.csv without numbers': (lambda run: write(run / 'folds.csv', f'{FOLDS_HEADER}\na,b,c,d\n'), PARENT,
                                  ['folds.csv: damaged CSV']),
    'parent learner changed': (lambda run: flip_bit(run / 'pretrain_256/fold0/learner.pkl'), PARENT,
                               ['learner.pkl: content changed', '--trust']),
    'prepared.csv damaged': (damage_prepared_csv, PARENT, ['prepared.csv: damaged CSV', 'Delete it']),
    'label record edited': (lambda run: write(run / LABELS_RECORD, '{}'), LAST, ['provenance.json: content changed']),
    'score record edited': (lambda run: write(run / SCORES_RECORD, '{}'), LAST,
                            ['scores_aptos_test_hflip.json: content changed']),
    'validation scores changed': (lambda run: flip_bit(run / 'finetune_dense/fold0/preds.csv'), LAST,
                                  ['preds.csv: content changed']),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_changed_files_of_a_run_are_not_used(toy_copy, capsys, name):
    damage, options, words = BAD_FILES[name]
    damage(toy_copy)
    outputs = [toy_copy / 'submission.csv', toy_copy / 'scores.csv']
    before = [f.stat().st_mtime_ns for f in outputs]
    expect_error(capsys, ['all', *toy_args(toy_copy, *options)], *words)
    assert [f.stat().st_mtime_ns for f in outputs] == before


def test_changed_prepared_images_are_not_trained_on(toy_copy, capsys):
    for file in toy_copy.parent.glob('prepared/*/aptos_train*/*.jpg'): flip_bit(file, -9)
    args = toy_args(toy_copy, '--set', 'stage.finetune_512.wd=.2', '--replace')
    expect_error(capsys, ['all', *args], '.jpg: content changed', 'Delete it and run again')
