"Another operating point for a finished model: a new bundle that says so, with the same weights and grades."
import numpy as np
import pandas as pd
import pytest
from conftest import expect_error, write_table
from expensive import onnx_of, toy_bundle

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record
from aptos_fastai.decisions import OperatingPoint, choose_threshold
from aptos_fastai.deploy import parity as parity_module
from aptos_fastai.deploy.operating_point import useless
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.inference.validation_scores import validation_scores

pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module', autouse=True)
def few_parity_images():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(parity_module, 'PARITY_IMAGES', 4)
        m.setattr(parity_module, 'has_bf16', lambda: False)
        yield


@pytest.fixture(scope='module')
def changed(toy, tmp_path_factory):
    "A bundle of the toy run with another operating point"
    folder = tmp_path_factory.mktemp('points') / 'specific'
    with onnx_of(toy_bundle(toy, tmp_path_factory)):
        main(['operating-point', str(toy), '--specificity', '0.8', '-o', str(folder)])
    return folder


def test_the_point_is_chosen_on_the_out_of_fold_scores(changed, toy):
    df = validation_scores(toy)
    point = read_model(changed)[0].decision.point(2)
    assert (point.target, point.value) == ('specificity', .8)
    assert point.threshold == choose_threshold(df.score, df.diagnosis >= 2, 'specificity', .8)[0]
    assert f'{len(df)} validation images' in point.chosen_on


def test_only_the_decisions_change(changed, toy, image_paths):
    before, after = load_grader(toy).predict(image_paths), load_grader(changed).predict(image_paths)
    assert np.allclose(before.score, after.score, atol=1e-6) and before.grade.equals(after.grade)
    threshold = read_model(changed)[0].decision.point(2).threshold
    gradable = after[after.ungradable == '']
    assert len(gradable) > 10
    assert (gradable.referable == np.where(gradable.score >= threshold, 'yes', 'no')).all()
    own, other = (read_model(path)[0].digests for path in (toy, changed))
    assert {key for key in own if own[key] != other[key]} == {'model', 'operating_point'}


def test_the_bundle_says_so(changed, toy):
    record = read_record(changed / 'bundle.json')
    assert record['changed_from'] == read_model(toy)[0].digests
    card = (changed / 'MODEL_CARD.md').read_text()
    assert 'specificity 0.80' in card and record['changed_from']['model'] in card


def test_a_bundle_gets_another_point_without_its_run(changed, tmp_path):
    main(['operating_point', str(changed), '--threshold', '1.25', '-o', str(tmp_path / 'fixed')])
    model = read_model(tmp_path / 'fixed')[0]
    assert [o.threshold for o in model.decision.points] == [1.25, 1.25]
    df = validation_scores(changed)                      # a fixed threshold has no part that chose it
    assert model.decision.points[0].sensitivity['value'] == pytest.approx((df.score[df.diagnosis >= 2] >= 1.25).mean())


def test_a_table_of_ones_own_chooses(changed, toy, image_paths, tmp_path, capsys):
    write_table(tmp_path, n=24, seed=9, name='own')
    with open(tmp_path / 'own.csv', 'a') as f: f.write('lost,2\n')
    main(['operating-point', str(changed), '--sensitivity', '0.7', '--table', str(tmp_path / 'own.csv'),
          '--skip-missing', '-o', str(tmp_path / 'own_point')])
    found = load_grader(changed)
    point = read_model(tmp_path / 'own_point')[0].decision.point(2)
    assert '24 images of own' in point.chosen_on
    own = pd.read_csv(tmp_path / 'own.csv').query('id_code != "lost"')
    files = [next(tmp_path.rglob(f'{name}.*')) for name in own.iloc[:, 0]]
    scores = found.predict(files).score.to_numpy(float)
    expected = choose_threshold(scores, own.iloc[:, 1].to_numpy() >= 2, 'sensitivity', .7)[0]
    sight = choose_threshold(scores, own.iloc[:, 1].to_numpy() >= 3, 'sensitivity', .7)[0]
    assert point.threshold == pytest.approx(min(expected, sight), abs=1e-6)
    assert 'before' in capsys.readouterr().out


@pytest.mark.parametrize('args, words', [
    ([], ['name --sensitivity, --specificity or --threshold']),
    (['--sensitivity', '95'], ['sensitivity = 95', 'from 0.5 to 0.999']),
    (['--sensitivity', '.9', '--threshold', '1'], ['has no target']),
    (['--sensitivity', '.9', '-o', 'RUN'], ['already exists']),
    (['--sensitivity', '.9', '--skip-missing'], ['--skip-missing: name the graded images with --table']),
    (['--sensitivity', '.9', '-o', f'{__file__}/x'], ['cannot write to this folder (this is a file)']),
    (['--sensitivity', '.9', '--table', 'nowhere.csv'], ['nowhere.csv'])])
def test_mistakes_end_in_one_line(args, words, toy, capsys):
    args = [str(toy) if word == 'RUN' else word for word in args]
    expect_error(capsys, ['operating_point', toy, *args], *words)


def test_a_useless_point_is_warned_of():
    def point(specificity): return OperatingPoint(2, 'sensitivity', .95, .1, specificity=dict(value=specificity))
    assert useless([point(.5), point(None)]) == []
    assert 'specificity 0.00' in useless([point(0.)])[0] and len(useless([point(.07), point(.9)])) == 1
