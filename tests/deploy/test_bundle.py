"Bundles: the same grades elsewhere, by every backend, and nothing that was changed."
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import expect_error

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record, write_record
from aptos_fastai.data.retina import Prep, square_of
from aptos_fastai.deploy import bundle as bundle_module
from aptos_fastai.inference import backends
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, PATIENTS_UNKNOWN, SETS_CONDITION

onnxruntime = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
    "The bundle of a copy of the toy run"
    runs = tmp_path_factory.mktemp('exported') / 'runs'
    shutil.copytree(toy.parent, runs)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bundle_module, 'has_bf16', lambda: True)     # toy networks are fast enough in emulated bf16
        main(['export', str(runs / toy.name)])
    return runs / toy.name / 'bundle'


@pytest.fixture
def bundle_copy(bundle, tmp_path):
    "A copy of the bundle that a test may spoil"
    shutil.copytree(bundle, tmp_path / 'copy')
    return tmp_path / 'copy'


def test_a_moved_bundle_gives_the_grades_of_its_run(bundle_copy, toy, image_paths):
    df, expected = load_grader(bundle_copy).predict(image_paths), load_grader(toy).predict(image_paths)
    assert np.allclose(df.score, expected.score, atol=1e-6)
    assert df.drop(columns='score').equals(expected.drop(columns='score'))


def test_onnx_takes_raw_squares(bundle, image_paths):
    member = read_record(bundle / 'bundle.json')['model']['members'][0]
    grader, side = load_grader(bundle), member['size']
    session = onnxruntime.InferenceSession(str(bundle / member['file']).replace('.safetensors', '.onnx'))
    squares = np.stack([grader.read(path)[0][side] for path in image_paths])
    one_view = session.run(None, {'squares': squares})[0]
    mean_of_views, _ = grader.scores({side: squares})
    assert abs(one_view - mean_of_views).max() < .3


def test_the_bundle_records_the_parity_of_backends(bundle):
    record = read_record(bundle / 'bundle.json')
    parity = {(o['backend'], o['precision']): o for o in record['parity']}
    assert record['parity_on'] == 'images of the run'
    assert parity['onnx', 'f32']['max_difference'] < 1e-3
    assert parity['onnx', 'f32']['grades_changed'] == 0 and parity['onnx', 'f32']['within_bounds']
    assert 0 < parity['torch', 'bf16']['max_difference'] < .1


@pytest.mark.parametrize('backend', ['onnx', 'openvino'])
def test_backends_give_the_same_grades(bundle, image_paths, tmp_path, capsys, backend):
    pytest.importorskip(bundle_module.PACKAGES[backend])
    expected, df = load_grader(bundle).predict(image_paths), load_grader(bundle, backend).predict(image_paths)
    assert np.allclose(df.score, expected.score, atol=1e-3)
    assert np.allclose(df.score_sd, expected.score_sd, atol=1e-3)
    assert df.grade.equals(expected.grade)
    main(['predict', str(bundle), *image_paths, '-o', str(tmp_path / 'o.csv'), '--backend', backend])


@pytest.mark.parametrize('backend', ['onnx', 'openvino'])
def test_a_changed_onnx_file_is_not_loaded(bundle_copy, image_paths, capsys, backend):
    pytest.importorskip(bundle_module.PACKAGES[backend])
    file = next(bundle_copy.glob('*.onnx'))
    file.write_bytes(file.read_bytes()[:-1])
    expect_error(capsys, ['predict', bundle_copy, image_paths[0], '--backend', backend], f'{file}: content changed')


def test_a_precision_that_changes_grades_is_refused(bundle_copy, image_paths, capsys):
    record = read_record(bundle_copy / 'bundle.json')
    for o in record['parity']: o['within_bounds'] = o['precision'] == 'f32'
    write_record(bundle_copy / 'bundle.json', record)
    expect_error(capsys, ['predict', bundle_copy, image_paths[0], '--precision', 'bf16'],
                 'torch bf16 changes scores by up to', 'Use f32')


@pytest.mark.parametrize('precision, max_difference, changed, expected', [
    ('f32', .009, 0, True), ('f32', .011, 0, False), ('f32', 0., 1, False),
    ('bf16', .09, 1, True), ('bf16', .11, 0, False), ('bf16', 0., 2, False),
])
def test_bounds_of_parity(precision, max_difference, changed, expected):
    assert bundle_module.within_bounds(precision, max_difference, changed, 24) is expected


def test_the_model_card_describes_the_bundle(bundle):
    card = (bundle / 'MODEL_CARD.md').read_text()
    for words in ('SYNTHETIC', 'not a medical device', 'kappa', 'retrain_512 fold 0', 'Limitations'):
        assert words in card, words
    for words in (OUT_OF_FOLD, PATIENTS_UNKNOWN, SETS_CONDITION, '95 % CI over images', 'were fitted on other images'):
        assert words in card, words
    assert '{{' not in card and '&#' not in card and '{%' not in card
    record = read_record(bundle / 'bundle.json')
    assert record['lineage'][0]['parents'] and record['metrics']['validated'] == 12
    files = ('weights.safetensors', 'weights.onnx', 'features.safetensors')
    assert set(record['files']) == {'training_images.csv', *(f'retrain_512-fold0-{name}' for name in files)}


def test_loading_a_bundle_loads_no_pickle(bundle, image_paths):
    code = ('import pickle, sys, torch\n'
            'def refuse(*args, **kwargs): raise SystemExit("a pickle was loaded")\n'
            'from aptos_fastai import load_grader\n'
            'import aptos_fastai.inference.grader\n'
            'pickle.load = pickle.loads = torch.load = refuse\n'
            'pickle.Unpickler = None\n'
            'print(len(load_grader(sys.argv[1]).predict(sys.argv[2])))')
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(bundle), image_paths[0]],
                         capture_output=True, text=True)
    assert out.stdout.strip() == '1', out.stderr


def test_weights_outside_the_bundle_are_not_loaded(bundle_copy, image_paths, capsys):
    record = read_record(bundle_copy / 'bundle.json')
    record['model']['members'][0]['file'] = '../../weights.safetensors'
    write_record(bundle_copy / 'bundle.json', record)
    expect_error(capsys, ['predict', bundle_copy, image_paths[0]], 'lies outside', 'Do not trust this bundle')


def test_a_bundle_is_not_exported_again(bundle, capsys):
    expect_error(capsys, ['export', bundle], 'a bundle already')


def test_an_export_with_other_scores_is_refused_and_leaves_nothing(toy_copy, monkeypatch, capsys):
    onnx_runner = backends.BACKENDS['onnx']

    def wrong_runner(*args):
        run = onnx_runner(*args)

        def with_wrong_scores(squares):
            scores, features = run(squares)
            return scores + .5, features
        return with_wrong_scores
    monkeypatch.setitem(backends.BACKENDS, 'onnx', wrong_runner)
    expect_error(capsys, ['export', toy_copy], 'onnx differs from PyTorch by 0.500')
    assert not (toy_copy / 'bundle').exists() and not (toy_copy / '.bundle.tmp').exists()


def test_parity_without_the_store_uses_synthetic_images(tmp_path):
    images = bundle_module.parity_images(tmp_path / 'run', Prep(size=64))
    assert images.origin == 'synthetic images' and len(images.jpegs) == bundle_module.PARITY_IMAGES
    assert square_of(images.jpegs[0], Prep(size=64), 32).shape == (32, 32, 3)
