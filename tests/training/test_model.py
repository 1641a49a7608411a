import pytest
import timm
import torch
from torch import nn

from aptos_fastai.recipe import Stage
from aptos_fastai.training.model import GeM, create_model, split_body_head
from aptos_fastai.training.weights import WeightsError, _bundled, check_weights, load_body

tiny = dict(name='t', train=('a',), arch='test_resnet', weights='none', size=32)


def test_gem_with_p_1_is_the_mean():
    x = torch.rand(2, 3, 5, 7) + .1
    assert torch.allclose(GeM(p=1.)(x), x.mean((-2, -1), keepdim=True), atol=1e-6)

def test_gem_grows_with_p_towards_the_maximum():
    x = torch.rand(2, 3, 5, 7) + .1
    out = [GeM(p=p)(x) for p in (1., 3., 6.)]
    assert (out[0] < out[1]).all() and (out[1] < out[2]).all() and (out[2] <= x.amax((-2, -1), keepdim=True)).all()

def test_gem_by_naive_loop():
    x = torch.rand(1, 2, 3, 3)
    want = [(sum(v ** 3 for v in x[0, c].flatten().tolist()) / 9) ** (1 / 3) for c in range(2)]
    assert GeM(p=3.)(x).flatten().tolist() == pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize('p', [.2, 3., 60.])
def test_gem_of_a_dead_channel_has_finite_gradients(p):
    gem, x = GeM(p=p), torch.zeros(2, 3, 8, 8, requires_grad=True)
    gem(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(gem.p.grad).all()

def test_gem_lifts_half_inputs():
    x = torch.full((1, 1, 4, 4), 60., dtype=torch.float16)
    assert GeM(p=3.)(x).dtype == torch.float32 and GeM(p=3.)(x).item() == pytest.approx(60, rel=1e-3)


@pytest.mark.parametrize('bs', [1, 2])
@pytest.mark.parametrize('head', ['gem', 'avg'])
def test_every_parameter_gets_a_gradient(bs, head):
    m = create_model(Stage(**tiny, head=head)).eval()       # eval: batch norm takes no statistics from one image
    y = m(torch.rand(bs, 3, 32, 32))
    assert y.shape == (bs, 1)
    nn.SmoothL1Loss()(y.flatten(), torch.ones(bs) * 3).backward()
    for n, p in m.named_parameters(): assert p.grad is not None and torch.isfinite(p.grad).all(), n

def test_split_gives_body_and_head():
    m = create_model(Stage(**tiny))
    body, head = split_body_head(m)
    assert len(body) + len(head) == len(list(m.parameters())) and len(head) == 3       # GeM's p, weight and bias

def test_bundled_weights_are_timms_graph():
    "Every tensor of timm's network gets a value of its shape, and features differ from random ones"
    sd = _bundled('tf_efficientnet_lite0')
    net = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    net.load_state_dict(sd)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in sd.items()}

def test_load_body_names_weights_that_do_not_fit(tmp_path):
    file = tmp_path / 'w.pth'
    torch.save(timm.create_model('test_vit', pretrained=False).state_dict(), file)
    s = Stage(**{**tiny, 'weights': str(file)})
    with pytest.raises(WeightsError, match='lacks .* tensors of test_resnet'): load_body(create_model(s), s)

@pytest.mark.parametrize('keys, words', [
    (dict(arch='seresnet5000'), 'no such network'), (dict(weights='bundled'), 'is for arch = tf_efficientnet_lite0'),
    (dict(weights='nowhere.pth'), 'no such file'), (dict(weights=__file__), 'no safetensors or weights-only file')])
def test_weights_out_of_reach(keys, words):
    with pytest.raises(WeightsError, match=words): check_weights(Stage(**{**tiny, **keys}))

def test_hub_offline_says_what_to_set(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(WeightsError, match='HF_HUB_OFFLINE.*weights = none'): check_weights(Stage(**{**tiny, 'arch': 'resnet50', 'weights': 'imagenet'}))

def test_no_feature_maps():
    with pytest.raises(WeightsError, match='gives no feature maps'): create_model(Stage(**{**tiny, 'arch': 'test_vit', 'size': 160}))
