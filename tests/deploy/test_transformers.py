"A vision transformer with every head and a loss of several units: from a recipe to a bundle."
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_table
from expensive import quick_reports
from safetensors.torch import load_file

from aptos_fastai.cli import main
from aptos_fastai.common.io import read_record
from aptos_fastai.inference.backends import to_tensor
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.training.networks import create_model

RECIPE = """\
[recipe]
splits = 2

[images]
size = 64

[table.train]
csv = train.csv
images = train_images
grade = diagnosis

[table.test]
csv = test.csv
images = test_images

[stage]
train = train
arch = test_vit
weights = none
size = 64
epochs = 1
folds = 1
bs = 8
tta = hflip
precision = f32
mean = .4 .3 .2
std = .3 .2 .1

[stage.ordinal]
head = auto
loss = corn

[stage.classes]
head = cls
loss = cross_entropy

[ensemble.both]
members = ordinal classes

[submit]
table = test
final = both
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The folder of a finished run of two stages and their mean, with its bundle"
    folder = tmp_path_factory.mktemp('transformers')
    write_table(folder / 'data', 40)
    write_table(folder / 'data', 10, graded=False, seed=1, name='test')
    (folder / 'vit.ini').write_text(RECIPE)
    options = ['--recipe', str(folder / 'vit.ini'), '--data', str(folder / 'data'), '--runs', str(folder / 'runs')]
    with quick_reports(): main(['all', *options])
    return folder / 'runs' / 'vit'


def test_the_records_say_which_pooling_auto_chose(run):
    stages = {name: read_record(run / name / 'fold0' / 'stage.json') for name in ('ordinal', 'classes')}
    assert {name: o['pooling'] for name, o in stages.items()} == dict(ordinal='avg', classes='cls')
    members, _ = read_model(run)
    assert [(m.head, m.loss) for m in members.members] == [('avg', 'corn'), ('cls', 'cross_entropy')]


def expected_grade(outputs, loss):
    "The expected grade of outputs (n, units), in numpy"
    if loss == 'cross_entropy':
        p = np.exp(outputs - outputs.max(1, keepdims=True))
        return (p / p.sum(1, keepdims=True) * np.arange(5)).sum(1)
    return np.cumprod(1 / (1 + np.exp(-outputs)), axis=1).sum(1)


def test_an_ensemble_averages_the_scores_of_stages_with_different_losses(run):
    grader = load_grader(run)
    paths = sorted(map(str, (run.parents[1] / 'data' / 'test_images').iterdir()))
    squares = np.stack([grader.read(path)[0][64] for path in paths])
    scores = []
    for member in grader.model.members:
        net = create_model('test_vit', member.head, 64, loss=member.loss).eval()
        net.load_state_dict(load_file(run / member.file))
        x = to_tensor(member, squares, torch.device('cpu'))
        with torch.no_grad():
            scores.append(np.mean([expected_grade(net(v).numpy(), member.loss) for v in (x, x.flip(3))], 0))
    df = grader.predict(paths)
    assert df.score.to_numpy() == pytest.approx(np.mean(scores, 0), abs=1e-4)
    assert df.score.between(0, 4).all()


def test_validation_scores_are_expected_grades(run):
    for name in ('ordinal', 'classes'):
        preds = pd.read_csv(run / name / 'fold0' / 'preds.csv')
        assert preds.score.between(0, 4).all() and preds.score.std() > 0


@pytest.mark.parametrize('backend', ['torch', 'onnx', 'openvino'])
def test_a_bundle_gives_the_scores_of_its_run(run, backend):
    if backend != 'torch': pytest.importorskip(dict(onnx='onnxruntime').get(backend, backend))
    if not (run / 'bundle').exists(): main(['export', str(run), '--parity', '8'])
    paths = sorted(map(str, (run.parents[1] / 'data' / 'test_images').iterdir()))
    expected, df = load_grader(run).predict(paths), load_grader(run / 'bundle', backend).predict(paths)
    assert np.allclose(df.score, expected.score, atol=1e-4)
    assert df.grade.equals(expected.grade)


def test_explain_draws_every_image(run, tmp_path):
    main(['explain', str(run), str(run.parents[1] / 'data' / 'test_images'), '-o', str(tmp_path)])
    assert len(list(tmp_path.glob('*.png'))) == 10
