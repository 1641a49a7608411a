"What is not a gradable fundus image gets no grade."
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import open_toy_run
from expensive import toy_bundle

from aptos_fastai.cli import main
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import read_record
from aptos_fastai.data.decode import decode
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.data.retina import (
    Circle,
    Prep,
    find_retina,
    has_multiple_retinas,
    measure_quality,
    prepare,
    quality_square,
)
from aptos_fastai.inference.gate import (
    FeatureDistance,
    GateSpec,
    fit_gate,
    gate_of_record,
    gate_rules,
    merge_rules,
)
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.metrics import GRADE_NAMES, upper_quantile
from aptos_fastai.recipe.read import read_recipe

GOOD = dict(how='circle', flags='', red_green=.7, green_blue=1.)


def png(im): return cv2.imencode('.png', im[..., ::-1])[1].tobytes()


def jpeg(im): return cv2.imencode('.jpg', im[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def scaled(im, side):
    "Return the image with its longest side at `side` pixels"
    k = side / max(im.shape[:2])
    return cv2.resize(im, None, fx=k, fy=k, interpolation=cv2.INTER_AREA if k < 1 else cv2.INTER_CUBIC)


def black_frame(rng): return rng.integers(0, 2, (300, 400, 3)).astype(np.uint8)


def noise(rng): return rng.integers(0, 256, (300, 400, 3)).astype(np.uint8)


def page_of_text(rng):
    im = np.full((300, 400, 3), 245, np.uint8)
    for y in range(20, 290, 18): cv2.putText(im, 'no diabetic retinopathy', (20, y), 0, .5, (20, 20, 20), 1)
    return im


# The distance

def test_the_distance_is_the_mahalanobis_distance_of_probabilistic_pca():
    from scipy.spatial.distance import mahalanobis
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    found = FeatureDistance.fit(x)
    assert found.components.shape == (11, 12)                 # all but one direction: k < C
    components, variances = found.components.astype(float), found.variances.astype(float)
    covariance = components.T @ np.diag(variances - found.residual) @ components + found.residual * np.eye(12)
    assert np.allclose(covariance, np.cov(x.T, bias=True), rtol=1e-3, atol=1e-3)
    new = rng.normal(size=(5, 12)) * 3
    expected = [mahalanobis(row, x.mean(0), np.linalg.inv(covariance)) for row in new]
    assert np.allclose(found.distances(new), expected, rtol=1e-3)


def test_the_distance_agrees_with_sklearn(monkeypatch):
    from sklearn.decomposition import PCA
    monkeypatch.setattr('aptos_fastai.inference.gate.COMPONENTS', 5)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 20)) * np.linspace(3, .2, 20)
    found, pca = FeatureDistance.fit(x), PCA(5).fit(x)
    n = len(x)
    assert np.allclose(found.variances, pca.explained_variance_ * (n - 1) / n, rtol=1e-4)
    assert np.isclose(found.residual, pca.noise_variance_ * (n - 1) / n, rtol=1e-4)
    log_likelihood = pca.score_samples(x)                     # a constant minus half the squared distance
    square = found.distances(x) ** 2
    assert np.corrcoef(log_likelihood, square)[0, 1] < -.999


@pytest.mark.parametrize('n, channels, components', [(3, 8, 0), (40, 100, 10), (400, 30, 29), (400, 100, 64)])
def test_few_images_get_few_components(n, channels, components):
    x = np.random.default_rng(0).normal(size=(n, channels)) + 5
    found = FeatureDistance.fit(x)
    assert len(found.components) == components
    assert np.isfinite(found.distances(x)).all()
    assert (found.distances(x * 0) > found.distances(x)).all()


def test_channels_that_never_change_do_not_divide_by_zero():
    found = FeatureDistance.fit(np.ones((30, 6)))
    assert np.allclose(found.distances(np.ones((2, 6))), 0)
    assert found.distances(np.full((1, 6), 2.))[0] > 100


def test_a_distance_is_the_same_after_writing_and_reading(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 16))
    found = FeatureDistance.fit(x)
    found.write(tmp_path / 'features.safetensors')
    again = FeatureDistance.from_bytes((tmp_path / 'features.safetensors').read_bytes())
    assert np.array_equal(found.distances(x), again.distances(x))


# The limit and the rules

@pytest.mark.parametrize('n', [7, 99, 100, 101, 1000])
@pytest.mark.parametrize('share', [0., .01, .05])
def test_at_most_the_share_lies_beyond_the_limit(n, share):
    values = np.random.default_rng(n).normal(size=n)
    beyond = (values > upper_quantile(values, share)).sum()
    assert beyond <= share * n < beyond + 1 + 1e-9            # and no fewer than that allows


def training_images(n=1000, **shares):
    "A table of training images of which the given shares have another `how` or a flag"
    df = pd.DataFrame([GOOD] * n).assign(red_green=np.linspace(.5, .9, n), green_blue=np.linspace(.8, 1.2, n))
    for name, share in shares.items():
        rows = df.index[:round(share * n)]
        if name in ('box', 'whole'): df.loc[rows, 'how'] = name
        else: df.loc[rows, 'flags'] = name
    return df


def test_a_model_does_not_refuse_its_own_kind():
    strict = GateSpec(**gate_rules(training_images()))
    assert strict.how == ('circle',) and strict.flags == ()
    assert GateSpec(**gate_rules(training_images(whole=.009))).how == ('circle',)
    assert GateSpec(**gate_rules(training_images(whole=.01))).how == ('circle', 'whole')
    assert GateSpec(**gate_rules(training_images(dark=.049))).flags == ()
    assert GateSpec(**gate_rules(training_images(dark=.05))).flags == ('dark',)
    grey = training_images().assign(red_green=0., green_blue=0.)
    assert not GateSpec(**gate_rules(grey)).reasons(dict(GOOD, red_green=0., green_blue=0.), 0, 0)


@pytest.mark.parametrize('found, distance, expected', [
    (GOOD, 1, []),
    (dict(GOOD, how='box'), 1, ['no retina found']),
    (dict(GOOD, how='whole'), 1, ['no retina found']),
    (dict(GOOD, flags='dark blurred'), 1, ['too dark', 'blurred']),
    (dict(GOOD, flags='bright'), 1, ['too bright']),
    (dict(GOOD, flags='multiple'), 1, ['more than one retina']),
    (dict(GOOD, flags='cut-off'), 1, ['retina cut off']),
    (dict(GOOD, red_green=0., green_blue=0.), 1, ['not a colour fundus image']),
    (dict(GOOD, red_green=-.7), 1, ['not a colour fundus image']),
    (GOOD, 2.1, ['unlike the training images']),
    (GOOD, np.nan, ['unlike the training images']),
])
def test_reasons(found, distance, expected):
    gate = GateSpec(2., **gate_rules(training_images()))
    assert gate.reasons(found, distance, 2) == expected
    assert not GateSpec().reasons(found, distance, 2)            # the default accepts everything


@pytest.mark.parametrize('score, refused', [(-.6, True), (-.5, False), (1, False), (3.5, False), (3.6, True),
                                            (np.nan, True)])
def test_scores_far_from_all_validation_scores_are_refused(score, refused):
    scores = np.linspace(-.25, 3.25, 50)
    gate = fit_gate([gate_rules(training_images())], np.ones(50), scores, .01, 'refer')
    assert gate.reasons(GOOD, 1, score) == (['score outside the range of the validation images'] if refused else [])


def test_networks_of_different_tables_accept_what_any_accepts():
    a, b = gate_rules(training_images(whole=.5)), gate_rules(training_images(blurred=.5).assign(red_green=0.))
    merged = merge_rules([a, b])
    assert merged['how'] == ('circle', 'whole') and merged['flags'] == ('blurred',)
    assert merged['red_green'][0] == b['red_green'][0] and merged['red_green'][1] == a['red_green'][1]


def test_the_gate_is_the_same_after_json():
    distances = np.random.default_rng(0).gamma(2, size=200)
    gate = fit_gate([gate_rules(training_images())], distances, distances, .01, 'exclude')
    assert gate_of_record(json.loads(json.dumps(asdict(gate)))) == gate
    assert (distances > gate.limit).mean() <= .01
    no_limit = fit_gate([gate_rules(training_images())], distances, distances, 0, 'refer')
    assert no_limit.limit is None and no_limit.scores == ()


def test_counts_say_how_ungradable_images_count():
    referable = ['yes', 'no', 'no', 'ungradable', '']
    assert GateSpec().count_text(referable) == (
        '1 referable, 2 not referable, 1 ungradable (counted as referable, 2 in all: [gate] ungradable = refer), '
        '1 unreadable')
    assert GateSpec(ungradable='exclude').count_text(referable).endswith(
        '1 ungradable (not counted as referable: [gate] ungradable = exclude), 1 unreadable')
    assert GateSpec().count_text(['yes', '', '']) == '1 referable, 0 not referable, 0 ungradable, 2 unreadable'
    assert GateSpec().count_text(['no']) == '0 referable, 1 not referable, 0 ungradable'


def test_keys_of_the_recipe():
    gate = read_recipe('settings.ini', sets=['gate.reject=0.02', 'gate.ungradable=exclude']).gate
    assert (gate.reject, gate.ungradable) == (.02, 'exclude')
    assert read_recipe('settings.ini').gate.reject == .01


# The photograph: number of retinas, colour, the same verdict at every size

def disc(im, x, r, colour=(170, 80, 40)): return cv2.circle(im, (x, 200), r, colour, -1)


def two_discs(distance, r=150, side=900):
    im = np.zeros((400, side, 3), np.uint8)
    return disc(disc(im, 160, r), 160 + distance, r)


@pytest.mark.parametrize('distance', [320, 300, 290, 270])        # apart, touching, overlapping
def test_two_retinas_are_multiple(distance):
    assert has_multiple_retinas(two_discs(distance))
    assert has_multiple_retinas(two_discs(distance).transpose(1, 0, 2))


def test_cropped_retinas_side_by_side_are_multiple():
    one = disc(np.zeros((400, 400, 3), np.uint8), 200, 230)       # cut off on all sides: no black between the two
    assert has_multiple_retinas(np.hstack([one, one]))


@pytest.mark.parametrize('height, r', [(400, 190), (400, 200), (300, 230)])
def test_one_retina_is_not_multiple(height, r):
    im = np.zeros((400, 500, 3), np.uint8)
    im = disc(im, 250, r)
    cv2.putText(im, 'OD 2019', (5, 390), 0, .6, (255, 255, 255), 1)
    cv2.circle(im, (300, 200), 60, (0, 0, 0), -1)                  # a dark place in it
    assert not has_multiple_retinas(im[(400 - height) // 2:(400 + height) // 2])


def test_no_generated_fundus_is_multiple_or_without_a_retina():
    rng = np.random.default_rng(0)
    for camera in CAMERAS:
        im, _ = generate_fundus(rng, 2, camera, True)
        found = prepare(png(im), Prep(size=256))[1]
        assert 'multiple' not in found['flags'] and found['how'] == 'circle', camera


def quality(im, c=None):
    c = c or find_retina(im)
    return measure_quality(im, c, quality_square(im, c, Prep()))


def test_colours_of_the_retina():
    im = disc(np.zeros((400, 400, 3), np.uint8), 200, 190, (160, 80, 40))
    found = quality(im)
    assert np.allclose([found['red_green'], found['green_blue']], np.log([165 / 85, 85 / 45]), atol=.02)
    found = quality(np.repeat(im[..., :1], 3, 2))
    assert (found['red_green'], found['green_blue']) == (0, 0)
    assert quality(im * 0, Circle(200, 200, 190))['flags'] == 'dark'


def jpegs_of(im):
    "One photograph at 448, 1000 and 3000 pixels"
    return [jpeg(scaled(im, side)) for side in (448, 1000, 3000)]


def verdicts(jpegs, prep):
    "The verdicts on the files of one photograph"
    found = [prepare(o, prep)[1] for o in jpegs]
    return {(o['how'], o['flags']) for o in found}, [(o['red_green'], o['green_blue']) for o in found]


def test_a_photograph_has_one_verdict_at_every_size(idrid):
    originals = sorted((idrid / 'originals').glob('*.jp*'))
    if not originals: pytest.skip('no full-size IDRiD images')
    for file in originals[::3]:
        jpegs = jpegs_of(decode(file.read_bytes())[0])
        for size in (224, 512):
            found, colours = verdicts(jpegs, Prep(size=size))
            assert len(found) == 1, (file.name, size, found)
            assert np.ptp(colours, 0).max() < .05, (file.name, size, colours)


def test_a_defocused_or_dark_photograph_has_one_verdict_at_every_size(idrid):
    originals = sorted((idrid / 'originals').glob('*.jp*'))
    if not originals: pytest.skip('no full-size IDRiD images')
    for file in originals[::6]:
        im = scaled(decode(file.read_bytes())[0], 3000)
        defocused = cv2.GaussianBlur(im, (0, 0), .01 * min(im.shape[:2]))
        assert verdicts(jpegs_of(defocused), Prep(size=320))[0] == {('circle', 'blurred')}
        dark = jpegs_of((im * .25).astype(np.uint8))
        assert all('dark' in flags for _, flags in verdicts(dark, Prep(size=320))[0])


@pytest.mark.parametrize('camera', list(CAMERAS))
def test_a_generated_image_has_one_verdict_at_every_size(camera):
    im, _ = generate_fundus(np.random.default_rng(3), 1, camera, True)
    assert len(verdicts(jpegs_of(scaled(im, 3000)), Prep(size=224))[0]) == 1


# A trained model

@pytest.fixture
def mixed_images(image_paths, tmp_path):
    "Paths: three test images of the toy run, then a black frame, noise and a page of text"
    rng = np.random.default_rng(0)
    folder = tmp_path / 'mixed'
    folder.mkdir()
    for i, path in enumerate(image_paths[:3]): shutil.copy(path, folder / f'a{i}{Path(path).suffix}')
    for make in (black_frame, noise, page_of_text): (folder / f'z_{make.__name__}.png').write_bytes(png(make(rng)))
    return sorted(map(str, folder.iterdir()))


def test_columns_are_three_valued(toy, mixed_images):
    df = load_grader(toy).predict(mixed_images)
    refused = df.ungradable != ''
    assert refused[3:].all()
    assert df.score.notna().all() and df.score_sd.notna().all()          # stay for the record
    assert df[refused][['grade', 'grade_low', 'grade_high']].isna().all(axis=None)
    assert df[~refused][['grade', 'grade_low', 'grade_high']].notna().all(axis=None)
    assert set(df[refused].referable) == set(df[refused].grade_name) == {'ungradable'}
    assert set(df[~refused].referable) <= {'yes', 'no'} and set(df[~refused].grade_name) <= set(GRADE_NAMES)
    assert not df.error.any()


def test_an_unreadable_file_is_not_ungradable(toy, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'hello')
    row = load_grader(toy).predict(bad).iloc[0]
    assert row.error and (row.referable, row.ungradable, row.grade_name) == ('', '', '')


def test_the_distance_has_its_limit_out_of_fold(toy):
    run, model = open_toy_run(toy), read_model(toy)[0]
    node = run.recipe.submit.final
    distances = run.out_of_fold_distances(node)
    assert len(distances) == len(run.oof(node)) and (distances > 0).all()
    assert (distances > model.gate.limit).mean() <= run.recipe.gate.reject
    assert model.gate.limit == pytest.approx(distances.max(), rel=2e-3)   # few images: none may be refused


def test_the_out_of_fold_distances_are_those_of_the_grader(toy):
    from aptos_fastai.data.store import read_square, stored_column
    run = open_toy_run(toy)
    grader = load_grader(toy / 'finetune_256')
    member = grader.model.members[0]
    preds = pd.read_csv(toy / 'finetune_256/fold0/preds.csv', dtype=dict(id_code=str))
    prep = run.prep_of(run.recipe.stages['finetune_256'])
    assert prep.size < run.prep.size          # the stage reads squares of its own size
    stored = run.frames['aptos_train'].set_index('id_code')[stored_column(prep.size)][preds.id_code]
    squares = {member.size: np.stack([read_square(path, prep, member.size) for path in stored])}
    _, distances = grader.scores_and_distances(squares)
    assert np.allclose(distances * member.distance_unit, preds.feature_distance, rtol=1e-3)


def test_what_is_far_from_the_training_images_is_refused(toy, image_paths):
    from dataclasses import replace
    grader = load_grader(toy)
    grader.model = replace(grader.model, gate=replace(grader.model.gate, limit=1e-6))
    assert grader.predict(image_paths[:2]).ungradable.str.contains('unlike the training images').all()


def test_predict_counts_and_the_disclaimer(toy, mixed_images, tmp_path, capsys):
    out = tmp_path / 'grades.csv'
    main(['predict', str(toy), *mixed_images, '-o', str(out)])
    printed = capsys.readouterr().out
    df = pd.read_csv(out, keep_default_na=False)
    n = (df.referable == 'ungradable').sum()
    assert n >= 3 and (df.ungradable != '').sum() == n
    assert f'{n} ungradable (counted as referable, ' in printed.splitlines()[-1]
    assert DISCLAIMER in printed


def test_explain_gives_no_grade_to_what_is_not_gradable(toy, mixed_images, tmp_path, capsys):
    from aptos_fastai.inference.explain import explain_image, grade_text
    main(['explain', str(toy), mixed_images[-1], '-o', str(tmp_path / 'explained')])
    assert DISCLAIMER in capsys.readouterr().out
    _, _, row = explain_image(load_grader(toy), Path(mixed_images[-1]).read_bytes())
    assert grade_text(row).startswith('not gradable: ')


def test_scores_csv_summary_and_report_say_what_is_ungradable(toy):
    scores = pd.read_csv(toy / 'scores.csv', keep_default_na=False)
    counts = read_record(toy / 'summary.json')['gate']
    assert counts['test']['ungradable'] == (scores.ungradable != '').sum()
    assert counts['test']['images'] == len(scores)
    assert counts['validation']['images'] == len(open_toy_run(toy).oof('retrain_512'))
    assert scores.grade.isin(range(5)).all()                             # the submission needs a grade for every id
    report = (toy / 'report.html').read_text()
    assert 'Ungradable images' in report and DISCLAIMER in report


def test_scores_csv_agrees_with_predict(toy, image_paths):
    df = load_grader(toy).predict(image_paths)
    scores = pd.read_csv(toy / 'scores.csv', keep_default_na=False).set_index('id_code')
    expected = scores.ungradable[[Path(p).stem for p in image_paths]]
    assert df.ungradable.tolist() == expected.tolist()


def test_the_endpoint_and_the_page_give_no_grade(server_url, mixed_images):
    httpx = pytest.importorskip('httpx')
    files = [('files', (Path(p).name, Path(p).read_bytes())) for p in mixed_images]
    reply = httpx.post(server_url + '/api/predict', files=files, data=dict(heatmap='1'), timeout=60).json()
    assert reply['disclaimer'] == DISCLAIMER
    for row in reply['rows'][3:]:
        assert (row['grade'], row['grade_low'], row['referable']) == (None, None, 'ungradable')
        assert row['ungradable'] and row['image']
    page = httpx.get(server_url).text
    assert DISCLAIMER in page and 'Not gradable' in page


@pytest.fixture(scope='module')
def bundle(toy, tmp_path_factory):
    "The bundle of the toy run"
    return toy_bundle(toy, tmp_path_factory)


@pytest.mark.parametrize('backend, package', [('torch', 'torch'), ('onnx', 'onnxruntime'), ('openvino', 'openvino')])
def test_the_gate_travels_and_backends_agree(bundle, toy, mixed_images, image_paths, backend, package):
    pytest.importorskip(package)
    expected = load_grader(toy).predict([*mixed_images, *image_paths])
    df = load_grader(bundle, backend).predict([*mixed_images, *image_paths])
    assert df.ungradable.tolist() == expected.ungradable.tolist()
    assert df.referable.tolist() == expected.referable.tolist()
    assert read_model(bundle)[0].gate == read_model(toy)[0].gate


def test_the_card_names_the_gate(bundle):
    card = (bundle / 'MODEL_CARD.md').read_text()
    for words in (DISCLAIMER, 'ungradable', '% of the validation images'): assert words in card


def test_a_changed_feature_file_is_refused(bundle, tmp_path):
    from aptos_fastai.common.io import AptosError
    changed = tmp_path / 'bundle'
    shutil.copytree(bundle, changed)
    file = next(changed.glob('*features.safetensors'))
    file.write_bytes(file.read_bytes()[:-1] + b'x')
    with pytest.raises(AptosError, match='features'): load_grader(changed)


# Training

def test_the_gate_does_not_change_the_weights(small_recipe, tables, tmp_path, monkeypatch):
    from aptos_fastai.pipeline import stage
    hashes = []
    for name in ('with', 'without'):
        args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / name)]
        main(['train', 'teacher', *args, '--set', 'stage.folds=1'])
        record = read_record(tmp_path / name / 'small/teacher/fold0/stage.json')
        hashes.append(record['files']['weights.safetensors'])
        monkeypatch.setattr(stage, 'fit_distance', lambda *_: FeatureDistance.fit(np.eye(96)))      # of test_resnet
    assert hashes[0] == hashes[1]
