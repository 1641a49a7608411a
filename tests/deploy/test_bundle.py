"Bundles that answer elsewhere."
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import fails

from aptos_fastai.cli import main
from aptos_fastai.common.io import write_record
from aptos_fastai.data.retina import Prep, square_of
from aptos_fastai.deploy import bundle as deploy_bundle
from aptos_fastai.inference import backends
from aptos_fastai.inference.grader import load_grader

onnxruntime = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
    shutil.copytree(toy.parent, tmp_path_factory.mktemp('exported') / 'runs')
    root = tmp_path_factory.getbasetemp() / 'exported0/runs' / toy.name
    with pytest.MonkeyPatch.context() as m:
        m.setattr(deploy_bundle, 'has_bf16', lambda: True)      # the toy's networks are small enough to compare on a machine without
        main(['export', str(root)])
    return root / 'bundle'


def test_a_bundle_answers_as_its_run_does(bundle, toy, photos, tmp_path):
    shutil.copytree(bundle, tmp_path / 'moved')                                          # and needs nothing beside it
    a, b = load_grader(tmp_path / 'moved').predict(photos), load_grader(toy).predict(photos)
    assert np.allclose(a.score, b.score, atol=1e-6) and a.drop(columns='score').equals(b.drop(columns='score'))


def test_onnx_gives_the_scores_of_raw_squares(bundle, photos):
    o = json.loads((bundle / 'bundle.json').read_text())
    m, g = o['model']['members'][0], load_grader(bundle)
    session = onnxruntime.InferenceSession(str(bundle / m['file']).replace('.safetensors', '.onnx'))
    got = [g.read(p)[0][m['size']] for p in photos]
    score = session.run(None, {'squares': np.stack(got)})[0]
    assert abs(score - g.scores({m['size']: np.stack(got)})[0]).max() < .3              # `g` takes the mean over two views
    ways = {(p['backend'], p['precision']): p for p in o['parity']}
    assert ways['onnx', 'f32']['max_difference'] < 1e-3 and ways['onnx', 'f32']['grades_changed'] == 0 and o['parity_on'] == 'images of the run'
    assert 0 < ways['torch', 'bf16']['max_difference'] < .1


@pytest.mark.parametrize('backend', ['onnx', 'openvino'])
def test_backends_answer_alike(bundle, photos, tmp_path, capsys, backend):
    pytest.importorskip(dict(onnx='onnxruntime').get(backend, backend))
    a, b = load_grader(bundle).predict(photos), load_grader(bundle, backend).predict(photos)
    assert np.allclose(a.score, b.score, atol=1e-3) and np.allclose(a.score_sd, b.score_sd, atol=1e-3) and a.grade.equals(b.grade)
    main(['predict', str(bundle), *photos, '-o', str(tmp_path / 'o.csv'), '--backend', backend])
    file = next(bundle.glob('*.onnx'))
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1])
        fails(capsys, ['predict', bundle, photos[0], '--backend', backend], 'is not what was written')
    finally: file.write_bytes(data)


def test_a_precision_that_changes_grades_is_refused(bundle, photos, tmp_path, capsys):
    shutil.copytree(bundle, tmp_path / 'b')
    o = json.loads((tmp_path / 'b/bundle.json').read_text())
    for p in o['parity']: p['fine'] = p['precision'] == 'f32'
    write_record(tmp_path / 'b/bundle.json', {k: v for k, v in o.items() if k != 'seal'})
    fails(capsys, ['predict', tmp_path / 'b', photos[0], '--precision', 'bf16'], 'torch bf16 changes scores by up to', 'use f32')


def test_the_card_says_what_it_is(bundle):
    card = (bundle / 'MODEL_CARD.md').read_text()
    for words in ('SYNTHETIC', 'no medical device', 'kappa', 'retrain_512 fold 0', 'Limits'): assert words in card, words
    assert '{{' not in card and '&#' not in card
    o = json.loads((bundle / 'bundle.json').read_text())
    assert o['lineage'][0]['parents'] and o['metrics']['validated'] == 12 and set(o['files']) == {
        'retrain_512-fold0-weights.safetensors', 'retrain_512-fold0-weights.onnx', 'MODEL_CARD.md'} - {'MODEL_CARD.md'}


def test_loading_a_bundle_runs_no_pickle(bundle, photos):
    code = ('import pickle, sys, torch\n'
            'def no(*a, **k): raise SystemExit("a pickle was loaded")\n'
            'from aptos_fastai import load_grader\nimport aptos_fastai.inference.grader\n'
            'pickle.load = pickle.loads = torch.load = no\npickle.Unpickler = None\n'
            'print(len(load_grader(sys.argv[1]).predict(sys.argv[2])))')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(bundle), photos[0]], capture_output=True, text=True)
    assert out.stdout.strip() == '1', out.stderr


def test_a_bundle_that_was_changed_is_refused(bundle, photos, tmp_path, capsys):
    shutil.copytree(bundle, tmp_path / 'b')
    o = json.loads((tmp_path / 'b/bundle.json').read_text())
    o['model']['members'][0]['file'] = '../../weights.safetensors'
    write_record(tmp_path / 'b/bundle.json', {k: v for k, v in o.items() if k != 'seal'})
    fails(capsys, ['predict', tmp_path / 'b', photos[0]], 'lies outside', 'not to be trusted')
    fails(capsys, ['export', tmp_path / 'b'], 'is a bundle already')


def test_an_export_that_differs_is_refused_and_leaves_nothing(copied, monkeypatch, capsys):
    real = backends.BACKENDS['onnx']
    def off(*a):
        run = real(*a)
        return lambda x: run(x) + .5
    monkeypatch.setitem(backends.BACKENDS, 'onnx', off)
    fails(capsys, ['export', copied], 'onnx differs from PyTorch by 0.500')
    assert not (copied / 'bundle').exists() and not (copied / '.bundle.tmp').exists()


def test_parity_without_the_store_is_of_painted_images(tmp_path):
    jpegs, what = deploy_bundle.parity_squares(tmp_path / 'run', Prep(size=64))
    assert what == 'painted images' and square_of(jpegs[0], Prep(size=64), 32).shape == (32, 32, 3)
