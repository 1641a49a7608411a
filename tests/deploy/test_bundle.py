"Bundles: the same grades elsewhere, by every backend, and nothing that was changed."
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, expect_error
from expensive import onnx_of, toy_bundle

from aptos_fastai.cli import main
from aptos_fastai.common.console import Bars
from aptos_fastai.common.io import AptosError, read_record, write_bytes, write_record
from aptos_fastai.data.retina import Prep, prepare, square_of
from aptos_fastai.data.store import jpeg_hash, stored_path
from aptos_fastai.deploy import parity as parity_module
from aptos_fastai.inference import backends
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import MemberSpec, ModelSpec, read_model
from aptos_fastai.inference.validation_scores import validation_scores
from aptos_fastai.pipeline.summary import OUT_OF_FOLD, PATIENTS_UNKNOWN, SETS_CONDITION

onnxruntime = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
    "The bundle of a copy of the toy run"
    return toy_bundle(toy, tmp_path_factory)


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
    file = (bundle / member['file']).with_suffix('.onnx')
    assert str(ROOT).encode() not in file.read_bytes()                 # the exporter writes where it traced the source
    session = onnxruntime.InferenceSession(str(file))
    squares = np.stack([grader.read(path)[0][side] for path in image_paths])
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {'squares': squares}), strict=True))
    spec = grader.model.members[0]
    views, features = backends.torch_runner(spec, bundle, torch.device('cpu'), 'f32', lambda: grader.net(spec))(squares)
    assert np.allclose(found['score'], views[:, 0], atol=1e-3)          # of the first view, as the square is
    assert np.allclose(found['features'], features, atol=1e-3)


def test_the_bundle_records_the_parity_of_backends(bundle):
    record = read_record(bundle / 'bundle.json')
    parity = {(o['backend'], o['precision']): o for o in record['parity']}
    assert record['parity_on'] == '24 images of the run'
    assert parity['onnx', 'f32']['max_difference'] < 1e-3
    assert parity['onnx', 'f32']['grades_changed'] == 0 and parity['onnx', 'f32']['within_bounds']
    assert parity['torch', 'bf16']['mean_difference'] > parity['onnx', 'f32']['mean_difference']
    card = (bundle / 'MODEL_CARD.md').read_text()
    for o in parity.values():
        assert f'{o["grades_changed"]} of 24 grades (95 % CI ' in card
        assert f'{o["referrals_changed"]} of 24 referrals (95 % CI ' in card
    assert 0 < parity['torch', 'bf16']['max_difference'] < .1


@pytest.mark.parametrize('backend', ['onnx', 'openvino'])
def test_backends_give_the_same_grades(bundle, image_paths, tmp_path, capsys, backend):
    pytest.importorskip(parity_module.PACKAGES[backend])
    expected, df = load_grader(bundle).predict(image_paths), load_grader(bundle, backend).predict(image_paths)
    assert np.allclose(df.score, expected.score, atol=1e-3)
    assert np.allclose(df.score_sd, expected.score_sd, atol=1e-3)
    assert df.grade.equals(expected.grade)
    main(['predict', str(bundle), *image_paths, '-o', str(tmp_path / 'o.csv'), '--backend', backend])


@pytest.mark.parametrize('backend', ['onnx', 'openvino'])
def test_a_changed_onnx_file_is_not_loaded(bundle_copy, image_paths, capsys, backend):
    pytest.importorskip(parity_module.PACKAGES[backend])
    file = next(bundle_copy.glob('*.onnx'))
    file.write_bytes(file.read_bytes()[:-1])
    expect_error(capsys, ['predict', bundle_copy, image_paths[0], '--backend', backend], f'{file}: content changed')


def test_a_precision_that_changes_grades_is_refused(bundle_copy, image_paths, capsys):
    record = read_record(bundle_copy / 'bundle.json')
    refused = dict(images=200, grades_changed=8, grades_interval=[.0204, .0769], referrals_changed=3,
                   referrals_interval=[.0051, .0431], max_difference=.071, within_bounds=False)
    for o in record['parity']: o.update(refused if o['precision'] == 'bf16' else {})
    write_record(bundle_copy / 'bundle.json', record)
    expect_error(capsys, ['predict', bundle_copy, image_paths[0], '--precision', 'bf16'],
                 'torch bf16 changes 8 of 200 grades (95 % CI 2–8 %) and 3 of 200 referrals (95 % CI 1–4 %)',
                 'scores by up to 0.07: more than export allows. Use f32')


@pytest.mark.parametrize('precision, max_difference, grades, referrals, images, expected', [
    ('f32', .009, 0, 0, 24, True), ('f32', .011, 0, 0, 24, False), ('f32', 0., 1, 0, 24, False),
    ('f32', 0., 1, 1, 200, True), ('f32', 0., 2, 0, 200, False), ('f32', 0., 0, 2, 200, False),
    ('bf16', .09, 1, 1, 24, True), ('bf16', .11, 0, 0, 24, False), ('bf16', 0., 2, 0, 24, False),
    ('bf16', .09, 4, 2, 200, True), ('bf16', .09, 8, 0, 200, False), ('bf16', .09, 4, 3, 200, False),
])
def test_bounds_of_parity(precision, max_difference, grades, referrals, images, expected):
    assert parity_module.within_bounds(precision, max_difference, grades, referrals, images) is expected


def test_changed_grades_are_counted_with_their_interval():
    "8 of 200: Wilson's interval by hand, z = 1.96"
    k, n, z = 8, 200, 1.959964
    centre, half = (k / n + z * z / 2 / n), z * (k / n * (1 - k / n) / n + z * z / 4 / n / n) ** .5
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    entry = dict(images=n, grades_changed=k, grades_interval=list(parity_module.wilson_interval(k, n)))
    assert entry['grades_interval'] == pytest.approx([low, high], abs=1e-6)
    assert backends.changed_text(entry, 'grades') == '8 of 200 grades (95 % CI 2–8 %)'


def test_parity_counts_what_predict_says(bundle, image_paths, monkeypatch):
    "Of scores that are moved by 0.2: as many changed grades and referrals as the rows of predict have"
    before = load_grader(bundle).predict(image_paths)
    prep = read_model(bundle)[0].prep
    jpegs = [{prep.size: prepare(Path(path).read_bytes(), prep)[0]} for path in image_paths]
    with Bars() as bars: expected = parity_module.predict_jpegs(load_grader(bundle), jpegs, bars)
    assert np.allclose(expected.scores, before.score, atol=1e-5)
    runner = backends.torch_runner

    def moved_runner(*args):
        run = runner(*args)

        def with_moved_scores(squares):
            scores, features = run(squares)
            return scores + .2, features
        return with_moved_scores
    monkeypatch.setitem(backends.BACKENDS, 'torch', moved_runner)
    after = load_grader(bundle).predict(image_paths)
    with Bars() as bars: o = parity_module.comparison('torch', 'f32', expected, bundle, jpegs, bars)
    assert o['grades_changed'] == sum(before.grade_name != after.grade_name)
    assert o['referrals_changed'] == sum(before.referable != after.referable) > 0
    assert o['max_difference'] == pytest.approx(.2, abs=1e-3) and not o['within_bounds']


def test_parity_images_are_spread_over_tables(tmp_path):
    tables = [[tmp_path / f'{name}{i}' for i in range(n)] for name, n in (('a', 100), ('b', 3), ('c', 50))]
    chosen = parity_module.spread_over_tables(tables, 23)
    assert [sum(f.name[0] == name for f in chosen) for name in 'abc'] == [10, 3, 10] and len(set(chosen)) == 23
    assert chosen[-1].name == 'a90'                       # evenly spaced: a0, a10, …, a90
    everything = parity_module.spread_over_tables(tables, 500)
    assert sorted(everything) == sorted(f for files in tables for f in files)


def test_a_store_with_few_images_is_filled_up_with_synthetic_ones(toy):
    images = parity_module.parity_images(toy, read_model(toy)[0], 143)
    assert images.origin == '140 images of the run and 3 synthetic images' and len(images.jpegs) == 143


def test_the_model_card_describes_the_bundle(bundle):
    card = (bundle / 'MODEL_CARD.md').read_text()
    for words in ('SYNTHETIC', 'not a medical device', 'kappa', 'retrain_512 fold 0', 'Caveats',
                  '| aptos_train | training, validation | 60 |', '### Operating points', 'All rules together',
                  'Failure modes', read_record(bundle / 'bundle.json')['metrics']['largest_errors'][0]['id_code']):
        assert words in card, words
    for words in (OUT_OF_FOLD, PATIENTS_UNKNOWN, SETS_CONDITION, '95 % CI over images', 'were fitted on other images'):
        assert words in card, words
    assert '{{' not in card and '&#' not in card and '{%' not in card
    record = read_record(bundle / 'bundle.json')
    assert record['lineage'][0]['parents'] and record['metrics']['validated'] == 12
    files = ('weights.safetensors', 'weights.onnx', 'features.safetensors')
    tables = 'training_images.csv', 'validation_scores.csv'
    assert set(record['files']) == {*tables, *(f'retrain_512-fold0-{name}' for name in files)}


def test_loading_a_bundle_loads_no_pickle(bundle, image_paths, monkeypatch):
    def refuse(*args, **kwargs): pytest.fail('a pickle was loaded')
    for owner, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'), (torch, 'load')):
        monkeypatch.setattr(owner, name, refuse)
    assert len(load_grader(bundle).predict(image_paths[0])) == 1


def test_weights_outside_the_bundle_are_not_loaded(bundle_copy, image_paths, capsys):
    record = read_record(bundle_copy / 'bundle.json')
    record['model']['members'][0]['file'] = '../../weights.safetensors'
    write_record(bundle_copy / 'bundle.json', record)
    expect_error(capsys, ['predict', bundle_copy, image_paths[0]], 'lies outside', 'Do not trust this bundle')


def test_a_bundle_is_not_exported_again(bundle, capsys):
    expect_error(capsys, ['export', bundle], 'a bundle already')


def test_an_export_with_other_scores_is_refused_and_leaves_nothing(toy_copy, bundle, monkeypatch, capsys):
    onnx_runner = backends.BACKENDS['onnx']

    def wrong_runner(*args):
        run = onnx_runner(*args)

        def with_wrong_scores(squares):
            scores, features = run(squares)
            return scores + .5, features
        return with_wrong_scores
    monkeypatch.setitem(backends.BACKENDS, 'onnx', wrong_runner)
    with onnx_of(bundle):
        expect_error(capsys, ['export', toy_copy, '--parity', '4'], 'onnx differs from PyTorch by 0.500')
    assert not (toy_copy / 'bundle').exists() and not (toy_copy / '.bundle.tmp').exists()


def test_parity_without_the_store_uses_synthetic_images(tmp_path):
    model = SimpleNamespace(prep=Prep(size=64), prepared={32: 48, 64: 64})
    images = parity_module.parity_images(tmp_path / 'run', model, 6)
    assert images.origin == '6 synthetic images' and len(images.jpegs) == 6
    for side in (48, 64): assert square_of(images.jpegs[0][side], Prep(size=side), side).shape == (side, side, 3)


def test_parity_gives_each_member_the_squares_that_it_was_trained_on(tmp_path):
    "Stored squares of two sides; an image that is stored at one side only is not compared"
    rng, model = np.random.default_rng(0), SimpleNamespace(prep=Prep(size=64), prepared={32: 32, 64: 64})
    written = {}
    for side, names in ((32, 'ab'), (64, 'abc')):
        prep = Prep(size=side)
        for name in names:
            png = cv2.imencode('.png', rng.integers(0, 255, (80, 80, 3), np.uint8))[1].tobytes()
            written[name, side] = prepare(png, prep)[0]
            sha = jpeg_hash(written[name, side])
            write_bytes(stored_path(tmp_path / 'prepared' / prep.name / 't-1', name, sha, prep), written[name, side])
    images = parity_module.parity_images(tmp_path / 'run', model, 2)
    assert images.jpegs == [{side: written[name, side] for side in (32, 64)} for name in 'ab']
    origin = parity_module.parity_images(tmp_path / 'run', model, 3).origin
    assert origin == '2 images of the run and 1 synthetic images'
    seen = []

    class Grader:
        backend, precision = 'torch', 'f32'

        def scores_and_distances(self, squares): seen.append(squares)
    grader = Grader()
    grader.model = ModelSpec('m', model.prep, tuple(
        MemberSpec('', '', 'a', 'avg', side, 'none', (), (), .5, prepared=side) for side in (32, 64)), (), .9, False)
    with pytest.raises(TypeError), Bars() as bars: parity_module.predict_jpegs(grader, images.jpegs, bars)
    for i, name in enumerate('ab'):
        for side in (32, 64):
            expected = cv2.imdecode(np.frombuffer(written[name, side], np.uint8), cv2.IMREAD_COLOR_RGB)
            assert np.abs(seen[0][side][i].astype(int) - expected).max() <= 4


def test_a_bundle_carries_the_validation_scores_of_its_run(bundle, toy, bundle_copy, capsys):
    "Those of oof.csv, without ids: sorted by score, groups as running numbers"
    scores, oof = validation_scores(bundle), pd.read_csv(toy / 'oof.csv', dtype=dict(id_code=str))
    rows = oof[oof.retrain_512.notna()].sort_values('retrain_512')
    assert np.allclose(scores.score, rows.retrain_512) and list(scores) == ['score', 'diagnosis', 'part', 'group']
    assert sorted(zip(scores.score.round(6), scores.diagnosis, strict=True)) == sorted(
        zip(rows.retrain_512.round(6), rows.diagnosis, strict=True))
    assert scores.equals(validation_scores(toy)) and scores.equals(validation_scores(toy / 'retrain_512'))
    assert scores.group.nunique() == rows.group.nunique()
    assert scores.groupby('group').part.nunique().max() == 1 and scores.part.nunique() == 5
    file = bundle_copy / 'validation_scores.csv'
    file.write_text(file.read_text().replace('0.', '1.'))
    with pytest.raises(AptosError, match='validation_scores.csv: content changed'): validation_scores(bundle_copy)


def test_a_de_identified_bundle_names_no_image(toy_copy, bundle):
    with onnx_of(bundle): main(['export', str(toy_copy), '--deidentify', '--parity', '4'])
    ids = {o['id_code'] for o in read_record(toy_copy / 'summary.json')['largest_errors']}
    texts = [(toy_copy / 'bundle' / name).read_text() for name in ('bundle.json', 'MODEL_CARD.md')]
    assert ids and not [i for i in ids for text in texts if i in text]
