"The catalogue of what users get wrong: each a row of what is wrong -> words of the message; always one line, exit status 1, nothing written."
import os
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TOY, fails, stamps, toy_args

from aptos_fastai.cli import _on_a_recipe


def rewrite(path, text): path.write_bytes(text if isinstance(text, bytes) else text.encode())
def csv(t, text, name='train.csv'): rewrite(t / name, text)
def grades(t, **rows):
    df = pd.read_csv(t / 'train.csv', dtype=str)
    for i, g in rows.items(): df.loc[int(i[1:]), 'diagnosis'] = g
    df.to_csv(t / 'train.csv', index=False)


def link(t, target):
    f = t / 'train_images/train001.png'
    f.unlink(); f.symlink_to(target)


MORE_TABLES = {
    'test without ids': (lambda t: csv(t, 'name\na\n', 'test.csv'), ['test.csv: no column id_code']),
    'test lost': (lambda t: (t / 'test.csv').unlink(), ['no test.csv']),
    'test images lost': (lambda t: shutil.rmtree(t / 'test_images'), ['test_images: no such folder']),
    'utf-16': (lambda t: csv(t, (t / 'train.csv').read_text().encode('utf-16')), ['train.csv']),
    'binary': (lambda t: csv(t, bytes(range(256)) * 9), ['train.csv']),
    'semicolons': (lambda t: csv(t, (t / 'train.csv').read_text().replace(',', ';')), ['no column id_code', 'id_code;diagnosis']),
    'nan grade': (lambda t: grades(t, r3='nan'), ['train003 = nan']),
    'inf grade': (lambda t: grades(t, r3='inf'), ['train003 = inf']),
    'minus one': (lambda t: grades(t, r3='-1'), ['train003 = -1']),
    'many bad grades': (lambda t: grades(t, **{f'r{i}': '9' for i in range(8)}), ['8 diagnosis', '…']),
    'id goes up': (lambda t: csv(t, (t / 'train.csv').read_text().replace('train001', '../train001')), ['1 of 40 ids have no image', '../train001']),
    'id is absolute': (lambda t: csv(t, (t / 'train.csv').read_text().replace('train001', '/etc/passwd')), ['1 of 40 ids have no image', '/etc/passwd']),
    'link out': (lambda t: link(t, '/etc/passwd'), ['train001.png: is a link out of']),
    'dead link': (lambda t: link(t, t / 'nothing.png'), ['1 of 40 ids have no image', 'train001']),
    'folder for an image': (lambda t: ((t / 'train_images/train001.png').unlink(), (t / 'train_images/train001.png').mkdir()), ['1 of 40 ids', 'train001']),
}


@pytest.mark.parametrize('name', MORE_TABLES)
def test_tables(tables, small_recipe, tmp_path, capsys, name):
    spoil, words = MORE_TABLES[name]
    spoil(tables)
    fails(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs'], *words)
    assert not (tmp_path / 'runs').exists()


def png(**kw): return cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8), **kw)[1].tobytes()

IMAGES = {
    'empty': (b'', 'no image of a known kind'), 'a letter': (b'dear doctor', 'no image of a known kind'),
    'html': (b'<html>404 Not Found</html>', 'no image of a known kind'),
    'png cut short': (png()[:-20], 'is cut short'), 'png header alone': (png()[:16], 'cannot be decoded'),
    'png with noise inside': (png()[:45] + b'\x00' * 30 + png()[-12:], 'cannot be decoded'),
    'jpeg cut short': (cv2.imencode('.jpg', np.full((64, 64, 3), 90, np.uint8))[1].tobytes()[:-30], 'is cut short'),
    'jpeg header alone': (b'\xff\xd8\xff\xe0\x00\x10JFIF\x00', 'cannot be decoded'),
    'gif header alone': (b'GIF89a\x01\x00', 'cannot be decoded'), 'tiff header alone': (b'II*\x00\x08\x00\x00\x00', 'cannot be decoded'),
    'dicom of nothing': (b'\0' * 128 + b'DICM', 'cannot be decoded'),
    'zip': (b'PK\x03\x04' + b'\0' * 40, 'no image of a known kind'),
    'svg': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'no image of a known kind'),
}


@pytest.mark.parametrize('name', IMAGES)
def test_images(tables, small_recipe, tmp_path, capsys, name):
    data, words = IMAGES[name]
    rewrite(tables / 'train_images/train005.png', data)
    err = fails(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs'], '1 of 40 images of train cannot be used: train005')
    assert words in err and 'skip_unreadable = yes' in err and not list((tmp_path / 'runs').rglob('stage.json'))


COMMANDS = {
    'no such stage': (['train', 'nope'], ['nope: no such stage']), 'label by nobody': (['label', 'nope'], ['nope: no such stage']),
    'label a graded table': (['label', 'finetune_256', 'aptos_train'], ['no ungraded table']),
    'no such table': (['inspect', 'nope'], ['nope: no such table', 'aptos_train']), 'no number': (['inspect', 'aptos_train', 'many'], ['many: a number']),
    'none of them': (['inspect', 'aptos_train', '0'], ['at least one']), 'rates of nothing': (['lr_find', 'nope'], ['no such stage']),
    'no recipe': (['all', '--recipe', 'nowhere.ini'], ['nowhere.ini: no such recipe']),
    'recipe is a folder': (['all', '--recipe', 'tests'], ['tests: no such recipe']),
    'no data': (['all', '--data', '/nowhere'], ['/nowhere: no such data folder']), 'data is a file': (['all', '--data', __file__], ['no such data folder']),
    'runs is a file': (['all', '--runs', __file__], ['is a file; give a folder']), 'set without a key': (['all', '--set', 'epochs=3'], ['SECTION.KEY=VALUE']),
    'set without a value': (['all', '--set', 'stage.epochs'], ['SECTION.KEY=VALUE']),
    'set an unknown section': (['all', '--set', 'nope.x=1'], ['no such section']),
    'trust nothing': (['all', '--trust', 'nowhere.pkl'], ['--trust nowhere.pkl: no such file']),
    'no model': (['predict', 'nowhere', __file__], ['nowhere: is no model']), 'no images': (['predict', 'nowhere'], ['name the images', 'too']),
    'explain without a model': (['explain', 'nowhere', 'a.png'], ['a.png']), 'export nothing': (['export', 'nowhere'], ['nowhere: is no model']),
    'serve nothing': (['serve', 'nowhere'], ['nowhere: is no model']), 'port of words': (['serve', 'nowhere', '--port', 'http'], ['--port http']),
    'port too high': (['serve', 'nowhere', '--port', '70000'], ['from 1 to 65535']), 'kaggle of nothing': (['kaggle', 'nowhere'], ['nowhere: is no model']),
    'bad user name': (['kaggle', 'nowhere', '--user', 'a b'], ['--user a b']), 'compare nothing': (['compare', 'nowhere', 'elsewhere'], ['nowhere']),
    'demo over a folder': (['demo', str(ROOT / 'tests')], ['is not empty and holds no demo']),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_command_lines(tmp_path, monkeypatch, capsys, name):
    args, words = COMMANDS[name]
    monkeypatch.chdir(ROOT)
    given = {'--runs': tmp_path / 'runs', '--recipe': ROOT / 'settings.ini'} if _on_a_recipe(args[0]) else {}
    more = [o for k, v in given.items() if k not in args for o in (k, v)] + TOY * bool(given)
    before = set(os.listdir(ROOT))
    fails(capsys, [*args, *more], *words)
    assert not (tmp_path / 'runs/settings-demo').exists() and set(os.listdir(ROOT)) == before


def edit(path, old, new): rewrite(path, path.read_text().replace(old, new, 1))
def flip(path, at=100):
    data = bytearray(path.read_bytes()); data[at % len(data)] ^= 1; path.write_bytes(data)


ARTEFACTS = {                                # of a finished run -> what `all` says of it once something is to be done
    'stage.json edited': (lambda r: edit(r / 'finetune_256/fold0/stage.json', '"fold": 0', '"fold": 1'),
                          ['finetune_256/fold0/stage.json: is not what a run wrote']),
    'stage.json cut short': (lambda r: rewrite(r / 'finetune_256/fold0/stage.json', '{"stage": '), ['stage.json: is damaged', 'delete it']),
    'stage.json a list': (lambda r: rewrite(r / 'finetune_256/fold0/stage.json', '[]'), ['stage.json: is not what a run wrote']),
    'stage.json binary': (lambda r: rewrite(r / 'finetune_256/fold0/stage.json', b'\xff\xfe\x00'), ['stage.json: is damaged']),
    'summary edited': (lambda r: edit(r / 'summary.json', '"synthetic": true', '"synthetic": false'), ['summary.json: is not what a run wrote']),
    'run.json edited': (lambda r: rewrite(r / 'run.json', '{"data": "elsewhere"}'), ['run.json: is not what a run wrote']),
    'folds.csv edited': (lambda r: edit(r / 'folds.csv', ',0,', ',1,'), ['folds.csv', 'hash differs']),
    'folds.csv another': (lambda r: rewrite(r / 'folds.csv', 'a,b\n1,2\n'), ['folds.csv']),
    'folds.csv no numbers': (lambda r: rewrite(r / 'folds.csv', 'source,id_code,fold,digest\na,b,c,d\n'), ['folds.csv: is damaged']),
    'parent learner changed': (lambda r: flip(r / 'pretrain_256/fold0/learner.pkl'), ['learner.pkl: is not what this run wrote', '--trust']),
    'prepared.csv damaged': (lambda r: [rewrite(f, b'\xff\xfe\x00' + f.read_bytes()) for f in r.parent.glob('prepared/*/aptos_train*/prepared.csv')],
                               ['prepared.csv: is damaged', 'delete it']),
    'labels note edited': (lambda r: rewrite(r / 'labels/finetune_256/aptos_test/provenance.json', '{}'), ['provenance.json: is not what a run wrote']),
    'scores note edited': (lambda r: rewrite(r / 'finetune_256/fold0/scores_aptos_test.json', '{}'), ['scores_aptos_test.json: is not what a run wrote']),
    'validation scores changed': (lambda r: flip(r / 'finetune_dense/fold0/preds.csv'), ['preds.csv: is not what this run wrote']),
}


@pytest.mark.parametrize('name', ARTEFACTS)
def test_artefacts(copied, capsys, name):
    spoil, words = ARTEFACTS[name]
    spoil(copied)
    args = ['--set', 'stage.retrain_512.wd=.2', '--set', 'stage.finetune_256.wd=.2']
    before = {p: t for p, t in stamps(copied).items() if p.name in ('submission.csv', 'scores.csv')}
    # what is asked for again where only the labels or the answers are wrong
    keys = args[:2] if name in ('labels note edited', 'scores note edited', 'validation scores changed') else args[2:]
    fails(capsys, ['all', *toy_args(copied, *keys)], *words)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_a_changed_image_of_the_store_is_not_trained_on(copied, capsys):
    for f in copied.parent.glob('prepared/*/aptos_train*/*.jpg'): flip(f, -9)
    fails(capsys, ['all', *toy_args(copied, '--set', 'stage.finetune_512.wd=.2')], '.jpg: is not what was stored', 'delete it')
