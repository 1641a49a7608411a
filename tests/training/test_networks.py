"Bodies of every kind as feature maps, the choice of the head, and the check before a run."
import numpy as np
import pytest
import timm
import torch
from torch import nn

from aptos_fastai.pipeline import network_check
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.training.networks import (
    TimmBody,
    as_maps,
    create_model,
    features_and_scores,
    has_signed_maps,
    prefix_tokens,
)
from aptos_fastai.training.weights import WeightsError


def images(size, n=2): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(size))


def timm_network(arch, size):
    "A network of timm built by hand, without head and pooling"
    options = dict(img_size=size) if 'vit' in arch or 'swin' in arch else {}
    return timm.create_model(arch, num_classes=0, global_pool='', **options)


# Feature maps

def tokens_by_loop(tokens, prefix, side):
    "Tokens (N, L, C) as maps (N, C, side, side), one place at a time"
    maps = np.zeros((tokens.shape[0], tokens.shape[2], side, side), np.float32)
    for y in range(side):
        for x in range(side): maps[:, :, y, x] = tokens[:, prefix + y * side + x]
    return maps


BODIES = [                                   # arch, size -> how its features become maps
    ('test_resnet', 64, lambda a: a),
    ('test_vit', 64, lambda a: tokens_by_loop(a, 1, 4)),
    ('vit_tiny_patch16_dinov3_qkvb', 64, lambda a: tokens_by_loop(a, 5, 4)),        # class token and 4 registers
    ('test_vit_relpos', 64, lambda a: tokens_by_loop(a, 0, 4)),                     # no prefix tokens
    ('test_mambaout', 64, lambda a: a.transpose(0, 3, 1, 2)),                       # channels last
    ('swin_tiny_patch4_window7_224', 64, lambda a: a.transpose(0, 3, 1, 2))]


@pytest.mark.parametrize('arch, size, maps_of', BODIES)
def test_body_gives_maps_of_timms_features(arch, size, maps_of):
    body = TimmBody(arch, size).eval()
    network = timm_network(arch, size).eval()
    network.load_state_dict(body.model.state_dict())
    with torch.no_grad(): maps, features = body(images(size)), network(images(size)).numpy()
    assert maps.numpy() == pytest.approx(maps_of(features), abs=1e-5)


@pytest.mark.parametrize('arch, size', [('coat_tiny', 64), ('crossvit_tiny_240', 240)])
def test_last_of_several_maps_is_taken_where_timm_cannot_leave_out_pooling(arch, size):
    body = TimmBody(arch, size).eval()
    assert body.model.pools_always
    with torch.no_grad():
        maps, features = body(images(size, 1)), body.model.forward_features(images(size, 1))[-1].numpy()
    side = maps.shape[-1]
    assert maps.numpy() == pytest.approx(tokens_by_loop(features, 1, side), abs=1e-5)


def test_the_head_is_as_wide_as_the_maps():
    model = create_model('mobilenetv3_small_050', size=32)
    assert model[0].model.num_features == 288                      # what timm names is not what it gives
    assert model[1][3].in_features == model[0](images(32)).shape[1] == 1024


@pytest.mark.parametrize('tokens, known, want', [(197, 1, 1), (196, 1, 0), (201, 5, 5), (198, None, 2), (50, 0, 1)])
def test_prefix_tokens_leave_a_square(tokens, known, want):
    model = nn.Module()
    if known is not None: model.num_prefix_tokens = known
    assert prefix_tokens(tokens, model) == want


def test_a_list_of_maps_gives_its_last():
    small, large = torch.rand(1, 4, 2, 2), torch.rand(1, 2, 8, 8)
    assert as_maps([large, small], nn.Module()) is small


# Sizes

@pytest.mark.parametrize('size', [96, 160, 192])
def test_every_multiple_of_the_patches_works(size):
    model = create_model('test_vit', 'auto', size).eval()
    assert model(images(size)).shape == (2, 1)
    assert model[0](images(size)).shape[-1] == size // 16


def test_another_size_is_refused_with_its_neighbours():
    with pytest.raises(WeightsError, match='size = 170 .* patches of 16 .* Set size = 160 or 176'):
        create_model('test_vit', size=170)


def test_a_size_that_the_network_cannot_run_is_named():
    with pytest.raises(WeightsError, match='arch = efficientformer_l1: .* size = 256.* Change size or arch'):
        create_model('efficientformer_l1', 'avg', 256)


# Heads

@pytest.mark.parametrize('arch, pooling', [
    ('test_resnet', 'gem'), ('tf_efficientnet_lite0', 'gem'), ('mobilenetv3_small_050', 'gem'),
    ('test_mambaout', 'gem'),                 # ends with GELU
    ('test_convnext', 'avg'), ('test_vit', 'avg'), ('swin_tiny_patch4_window7_224', 'avg')])
def test_auto_takes_the_mean_of_signed_maps(arch, pooling):
    assert create_model(arch, 'auto', 64)[1].pooling == pooling


def test_cls_pools_the_class_token():
    model = create_model('test_vit', 'cls', 64).eval()
    network = timm_network('test_vit', 64).eval()
    network.load_state_dict(model[0].model.state_dict())
    with torch.no_grad():
        features, scores = features_and_scores(model, images(64))
        token = network(images(64))[:, 0]
    assert torch.allclose(features, token, atol=1e-5)
    weight, bias = model[1][3].weight[0].detach(), model[1][3].bias.detach()
    assert torch.allclose(scores, token @ weight + bias, atol=1e-5)


def test_cls_is_refused_without_a_class_token():
    with pytest.raises(WeightsError, match='head = cls: test_resnet has no class token. Set head = avg or auto'):
        create_model('test_resnet', 'cls', 64)


@pytest.mark.parametrize('arch', ['pit_ti_224', 'pit_ti_distilled_224'])
def test_a_network_of_class_tokens_alone_is_refused_but_for_cls(arch):
    for head in ('auto', 'gem', 'avg'):
        with pytest.raises(WeightsError, match=f'{arch}: gives its class token only, no feature maps.* Set head = cls'):
            create_model(arch, head, 224)
    if arch == 'pit_ti_224': assert create_model(arch, 'cls', 224)(images(224)).shape == (2, 1)


def test_one_patch_beside_the_class_token_is_a_map():
    assert create_model('test_vit', 'avg', 16)[0](images(16)).shape[-2:] == (1, 1)


def test_class_token_is_a_parameter_of_a_body():
    with torch.no_grad(): assert TimmBody('test_vit', 64, class_token=True).eval()(images(64)).shape == (2, 64, 1, 1)


def test_the_test_of_signed_maps_leaves_no_trace():
    body = TimmBody('test_resnet', 64).train()
    before, random_state = {k: v.clone() for k, v in body.state_dict().items()}, torch.random.get_rng_state()
    has_signed_maps(body, 64)
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_maps_are_signed_if_they_have_values_far_below_0():
    assert has_signed_maps(nn.Identity(), 8)                       # noise
    assert not has_signed_maps(nn.SiLU(), 8)
    assert not has_signed_maps(nn.Hardswish(), 8)


# Drop path

def test_drop_path_grows_with_depth_to_the_wanted_rate():
    body = TimmBody('test_vit', 64, drop_path=.3)
    rates = [block.drop_path1.drop_prob for block in body.model.blocks if hasattr(block.drop_path1, 'drop_prob')]
    assert rates == pytest.approx(np.linspace(0, .3, len(body.model.blocks))[1:])


@pytest.mark.parametrize('pooling', ['avg', 'cls'])
@pytest.mark.parametrize('loss, units', [('smooth_l1', 1), ('corn', 4), ('cross_entropy', 5)])
def test_every_parameter_of_a_transformer_gets_a_gradient(pooling, loss, units):
    model = create_model('test_vit', pooling, 64, loss=loss)
    outputs = model(images(64))
    assert outputs.shape == (2, units)
    outputs.square().sum().backward()
    for name, p in model.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), name


# The check before a run

def checked(**keys): network_check._check_network.__wrapped__(*[keys[k] for k in ('arch', 'head', 'size', 'loss')])


def test_check_warns_of_gem_on_signed_maps(capsys):
    def printed(arch, head):
        network_check.check_network(Stage('teacher', ('t',), arch=arch, head=head, size=64, loss='corn'))
        return capsys.readouterr().out
    warning = ' '.join(printed('test_convnext', 'gem').split())
    assert warning.startswith('[stage.teacher] head = gem: the feature maps of test_convnext are signed')
    assert warning.endswith('Set head = auto.')
    assert not printed('test_convnext', 'auto') and not printed('test_resnet', 'gem')


def test_patches_that_overlap_take_any_size(): assert create_model('pvt_v2_b0', 'avg', 100)[1][3].in_features == 256


def test_check_refuses_a_network_whose_heat_map_cannot_be_drawn(monkeypatch):
    monkeypatch.setattr(network_check, 'heatmap_layer', lambda net: nn.Identity())
    monkeypatch.setattr(network_check, 'hires_cam', lambda net, x, layer: x.no_such_method())
    with pytest.raises(WeightsError, match='test_resnet: no heat map .* size = 64 .*no_such_method'):
        checked(arch='test_resnet', head='gem', size=64, loss='mse')


def test_check_tries_a_network_once_and_leaves_the_random_state():
    stage = Stage('s', ('t',), arch='test_vit', head='cls', size=96)
    network_check.check_network(stage)
    tried, random_state = network_check._check_network.cache_info().misses, torch.random.get_rng_state()
    network_check.check_network(Stage('other', ('t',), arch='test_vit', head='cls', size=96, folds=5))
    assert network_check._check_network.cache_info().misses == tried
    network_check.check_network(Stage('s', ('t',), arch='test_vit', head='cls', size=112))
    assert torch.equal(torch.random.get_rng_state(), random_state)
