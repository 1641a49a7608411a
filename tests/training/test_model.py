"The network, its weights and its metric."
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fastai.data.core import Datasets
from fastai.imports import noop
from fastai.learner import Learner
from torch import nn

from aptos_fastai.metrics import MIDPOINTS, fit_thresholds, quadratic_kappa
from aptos_fastai.recipe.sections import Stage, parse_thresholds
from aptos_fastai.training import networks
from aptos_fastai.training.model import QuadraticKappa, get_learner
from aptos_fastai.training.networks import GeM, create_model
from aptos_fastai.training.optimizer import model_layers
from aptos_fastai.training.weights import WeightsError, bundled_weights, check_weights, load_body, load_exported

TINY = dict(name='t', train=('a',), arch='test_resnet', weights='none', size=32)


def test_gem_with_p_1_is_the_mean():
    x = torch.rand(2, 3, 5, 7) + .1
    assert torch.allclose(GeM(p=1.)(x), x.mean((-2, -1), keepdim=True), atol=1e-6)


def test_gem_grows_with_p_towards_the_maximum():
    x = torch.rand(2, 3, 5, 7) + .1
    p1, p3, p6 = (GeM(p=p)(x) for p in (1., 3., 6.))
    assert (p1 < p3).all() and (p3 < p6).all()
    assert (p6 <= x.amax((-2, -1), keepdim=True)).all()


def test_gem_by_naive_loop():
    x = torch.rand(1, 2, 3, 3)
    want = [(sum(v ** 3 for v in x[0, c].flatten().tolist()) / 9) ** (1 / 3) for c in range(2)]
    assert GeM(p=3.)(x).flatten().tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('p', [.2, 3., 60.])
def test_gem_of_a_dead_channel_has_finite_gradients(p):
    gem, x = GeM(p=p), torch.zeros(2, 3, 8, 8, requires_grad=True)
    gem(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(gem.p.grad).all()


def test_gem_lifts_half_precision_to_float32():
    x = torch.full((1, 1, 4, 4), 60., dtype=torch.float16)
    out = GeM(p=3.)(x)
    assert out.dtype == torch.float32 and out.item() == pytest.approx(60, rel=1e-3)


@pytest.mark.parametrize('bs', [1, 2])
@pytest.mark.parametrize('head', ['gem', 'avg'])
def test_every_parameter_gets_a_gradient(bs, head):
    model = create_model('test_resnet', head, size=32).eval()       # eval: batch norm cannot train on one image
    scores = model(torch.rand(bs, 3, 32, 32))
    assert scores.shape == (bs, 1)
    nn.SmoothL1Loss()(scores.flatten(), torch.ones(bs) * 3).backward()
    for name, p in model.named_parameters(): assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_dropout_is_in_the_head():
    model = create_model('test_resnet', size=32, dropout=.5)
    assert [m.p for m in model[1].modules() if isinstance(m, nn.Dropout)] == [.5]


def test_split_gives_body_and_head():
    model = create_model('test_resnet', size=32)
    body, head = (layer.parameters for layer in model_layers(model))
    assert len(body) + len(head) == len(list(model.parameters()))
    assert len(head) == 3                     # GeM's p, weight and bias


def test_the_metric_is_kappa_and_survives_an_export(tmp_path):
    dls = Datasets(range(4), [[noop]]).dataloaders(bs=2)
    learn = Learner(dls, nn.Linear(1, 1), loss_func=nn.MSELoss(), path=tmp_path,
                    metrics=[QuadraticKappa(), QuadraticKappa((.75, 1.5, 2.5, 3.5))])
    learn.export('learner.pkl')
    grades = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    scores = grades + torch.tensor([.6, .2, -.3, .1, -.6, -.2, 0.])
    for metric, first in zip(load_exported(tmp_path / 'learner.pkl').metrics, (.5, .75), strict=True):
        assert metric.name == 'kappa'
        want = quadratic_kappa(np.digitize(scores, (first, *MIDPOINTS[1:])), grades)
        assert metric(scores, grades) == pytest.approx(want)


@pytest.mark.parametrize('thresholds', ['optimal', 'regularised', '.7 1.5 2.5 3.5'])
def test_epochs_are_judged_by_thresholds_like_those_of_the_prediction(thresholds):
    dls = Datasets(range(4), [[noop]]).dataloaders(bs=2)
    stage = Stage('s', ('t',), arch='test_resnet', weights='none', size=32, thresholds=thresholds)
    metric = get_learner(stage, dls).metrics[0]
    grades = np.tile(np.arange(5), 20)
    scores = .6 * grades + .3 + .3 * np.random.default_rng(0).random(100)
    fitted = parse_thresholds(thresholds) or fit_thresholds(thresholds, scores, grades)
    want = quadratic_kappa(np.searchsorted(fitted, scores, side='right'), grades)
    assert metric(torch.tensor(scores), torch.tensor(grades)) == pytest.approx(want)
    assert want != pytest.approx(quadratic_kappa(np.searchsorted(MIDPOINTS, scores, side='right'), grades))


def test_bundled_weights_fit_timms_network():
    weights = bundled_weights('tf_efficientnet_lite0')
    net = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    net.load_state_dict(weights)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def test_load_body_names_tensors_that_do_not_fit(tmp_path):
    file = tmp_path / 'w.pth'
    torch.save(timm.create_model('test_vit', pretrained=False).state_dict(), file)
    with pytest.raises(WeightsError, match='tensors of test_resnet are missing, first'):
        load_body(create_model('test_resnet', size=32), 'test_resnet', str(file))


def test_load_body_names_unknown_tensors(tmp_path):
    file = tmp_path / 'w.pth'
    weights = timm.create_model('test_resnet', pretrained=False).state_dict()
    torch.save(weights | {'neck.weight': torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match='1 tensors are not in test_resnet, first neck.weight'):
        load_body(create_model('test_resnet', size=32), 'test_resnet', str(file))


@pytest.mark.parametrize('keys, words', [
    (dict(arch='seresnet5000'), 'no such network'),
    (dict(weights='bundled'), 'only for arch = tf_efficientnet_lite0'),
    (dict(weights='nowhere.pth'), 'no such file'),
    (dict(weights=str(Path(__file__))), 'not a safetensors or weights-only PyTorch file')])
def test_unavailable_weights_are_refused(keys, words):
    with pytest.raises(WeightsError, match=words): check_weights(Stage(**{**TINY, **keys}))


def test_hub_offline_says_what_to_set(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    stage = Stage(**{**TINY, 'arch': 'resnet50', 'weights': 'imagenet'})
    with pytest.raises(WeightsError, match='HF_HUB_OFFLINE.*weights = none'): check_weights(stage)


def test_a_network_without_feature_maps_is_refused(monkeypatch):
    vector = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    vector.pools_always = False
    monkeypatch.setattr(networks, 'build_timm', lambda arch, size, drop_path: vector)
    with pytest.raises(WeightsError, match=r'arch = test_resnet: gives features of shape \(1, 3\), .* no feature maps'):
        create_model('test_resnet', size=32)
