"Weights from files: wrappers, prefixes, names and sizes of others, what is refused, and mean and std of the images."
import argparse
import importlib.resources
import json
import os
import pickle
import re
import socket
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import expect_error, write_table
from expensive import quick_exports
from safetensors.torch import save_file
from timm.models import PretrainedCfg, load_checkpoint
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter

from aptos_fastai.cli import main
from aptos_fastai.common.io import file_hash, read_record, write_record
from aptos_fastai.inference.model_spec import read_model
from aptos_fastai.pipeline.graph import load_run
from aptos_fastai.pipeline.scores import read_exported
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError, Stage
from aptos_fastai.training.networks import create_model
from aptos_fastai.training.weight_files import check_modality, fit_tensors, read_checkpoint
from aptos_fastai.training.weights import (
    BUNDLED_ARCH,
    WeightsError,
    bundled_weights,
    check_weights,
    load_body,
    load_stage_weights,
)

VIT = dict(num_classes=0, global_pool='')


def network(arch='test_vit', seed=1, **options):
    "A timm network of random weights in which every tensor differs from its initial value"
    torch.manual_seed(seed)
    net = timm.create_model(arch, **options).eval()
    for p in net.parameters(): p.data.add_(torch.randn_like(p) * .1)
    return net


def features(net, size=160):
    torch.manual_seed(0)
    with torch.no_grad(): return net.eval().forward_features(torch.randn(2, 3, size, size))


def loaded_body(file, arch='test_vit', size=160):
    "The timm network of a body that `file` was loaded into, and what was loaded"
    model = create_model(arch, 'avg', size)
    loaded = load_body(model, arch, str(file))
    check_weights(stage(file, arch, size))                         # the check before a training agrees
    return model[0].model, loaded


def stage(file, arch='test_vit', size=160, **keys):
    return Stage('s', ('train',), weights=str(file), arch=arch, size=size, **keys)


def with_prefix(tensors, prefix): return {prefix + name: t for name, t in tensors.items()}


# Wrapped checkpoints

WRAPPERS = {
    'plain': lambda w: (w, ''),
    'model': lambda w: (dict(model=w, epoch=3), 'model'),
    'state_dict': lambda w: (dict(state_dict=w, arch='x', lr=torch.tensor(.1)), 'state_dict'),
    'nested': lambda w: (dict(checkpoint=dict(model=w)), 'checkpoint.model'),
    'ddp': lambda w: (with_prefix(w, 'module.'), 'module.*'),
    'compiled ddp': lambda w: (dict(model=with_prefix(w, 'module._orig_mod.')), 'model module._orig_mod.*'),
    'lightning': lambda w: (dict(state_dict=with_prefix(w, 'model.') | {'loss.weight': torch.ones(5)}),
                            'state_dict model.*'),
    'openclip': lambda w: (with_prefix(w, 'visual.trunk.') | {'text.positional_embedding': torch.ones(3)},
                           'visual.trunk.*'),
    'student and teacher': lambda w: (dict(student={k: t + 1 for k, t in w.items()}, teacher=w), 'teacher'),
    'average': lambda w: (dict(state_dict={k: t + 1 for k, t in w.items()}, state_dict_ema=w), 'state_dict_ema'),
    'dinov2 teacher': lambda w: (dict(teacher=with_prefix(w, 'backbone.') | {'dino_head.last.weight': torch.ones(3)}),
                                 'teacher backbone.*'),
    'flat teacher': lambda w: (with_prefix({k: t + 1 for k, t in w.items()}, 'student.') | with_prefix(w, 'teacher.'),
                               'teacher.*'),
    'flat average': lambda w: (dict(state_dict=with_prefix({k: t + 1 for k, t in w.items()}, 'model.')
                                    | with_prefix(w, 'model_ema.module.')), 'state_dict model_ema.module.*'),
    'nested teacher': lambda w: (dict(student=dict(net={k: t + 1 for k, t in w.items()}), teacher=dict(net=w)),
                                 'teacher.net'),
    'fsdp chunks': lambda w: ({re.sub(r'^blocks\.(\d+)', r'blocks.0.\1', k): t for k, t in w.items()}, ''),
}


@pytest.mark.parametrize('way', WRAPPERS)
def test_wrapped_weights_give_the_features_of_plain_ones_bit_for_bit(tmp_path, way):
    net = network(num_classes=7)
    content, part = WRAPPERS[way](net.state_dict())
    torch.save(content, tmp_path / 'w.pth')
    body, loaded = loaded_body(tmp_path / 'w.pth')
    assert torch.equal(features(body), features(net))
    assert loaded.part == part and loaded.tensors == len(body.state_dict())
    assert loaded.left_over['head'] == 2 if not part.endswith('*') else sum(loaded.left_over.values()) >= 2
    assert loaded.file == 'w.pth' and loaded.sha256 == file_hash(tmp_path / 'w.pth')


@pytest.mark.parametrize('arch', ['test_resnet', 'test_convnext', 'test_vit3', 'test_mambaout'])
def test_safetensors_and_old_torch_files_of_any_network(tmp_path, arch):
    net = network(arch, num_classes=3)
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    torch.save(net.state_dict(), tmp_path / 'w.pth', _use_new_zipfile_serialization=False)
    want = network(arch, seed=2, **VIT)
    want.load_state_dict({k: v for k, v in net.state_dict().items() if k in want.state_dict()})
    for file in ('w.safetensors', 'w.pth'):
        body, _ = loaded_body(tmp_path / file, arch)
        assert torch.equal(features(body), features(want)), file


def test_a_later_change_of_the_file_does_not_reach_the_network(tmp_path):
    file = tmp_path / 'w.pth'
    torch.save(network().state_dict(), file)
    body, _ = loaded_body(file)
    before = features(body)
    with open(file, 'r+b') as f: f.write(b'\0' * file.stat().st_size)
    assert torch.equal(features(body), before)


# Names, layouts and sizes

def mae_checkpoint(net, data_path='/data/CFP/train'):
    "A checkpoint as a masked autoencoder's training writes it, RETFound's among them"
    decoder = {'mask_token': torch.zeros(1, 1, 32), 'decoder_pos_embed': torch.zeros(1, 101, 32),
               'decoder_embed.weight': torch.zeros(32, 64), 'decoder_blocks.0.norm1.weight': torch.ones(32),
               'decoder_blocks.1.norm1.weight': torch.ones(32), 'decoder_pred.bias': torch.zeros(768)}
    args = argparse.Namespace(data_path=data_path, lr=np.float64(1e-3), output_dir=Path('/out'), epochs=800)
    optimizer = dict(state={0: dict(exp_avg=torch.ones(3))}, param_groups=[])
    return dict(model=net.state_dict() | decoder, optimizer=optimizer, epoch=np.int64(799), scaler=dict(scale=65536.),
                args=args)


def test_a_masked_autoencoder_with_arguments_at_another_size(tmp_path):
    net = network(num_classes=0)
    torch.save(mae_checkpoint(net), tmp_path / 'RETFound_cfp_weights.pth')
    body, loaded = loaded_body(tmp_path / 'RETFound_cfp_weights.pth', size=224)
    assert loaded.left_over == dict(mask_token=1, decoder_pos_embed=1, decoder_embed=1, decoder_blocks=2,
                                    decoder_pred=1)
    assert loaded.resampled == {'pos_embed': [[1, 101, 64], [1, 197, 64]]} and loaded.part == 'model'
    assert '; 6 left over: ' in loaded.text and 'pos_embed resampled from 1x101x64 to 1x197x64' in loaded.text
    pos = net.state_dict()['pos_embed']
    grid = pos[:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(14, 14), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(body.pos_embed[:, 1:], grid, atol=1e-6) and torch.equal(body.pos_embed[:, :1], pos[:, :1])
    for name, tensor in net.state_dict().items():
        if name != 'pos_embed': assert torch.equal(body.state_dict()[name], tensor), name


@pytest.mark.parametrize('arch, size', [('test_vit', 96), ('test_vit4', 192), ('test_vit_relpos', 160)])
def test_other_sizes_give_the_outputs_of_timm_that_loads_the_file_itself(tmp_path, arch, size):
    native = timm.get_pretrained_cfg(arch).input_size[-1]
    net = network(arch, **VIT)
    save_file(net.state_dict(), tmp_path / 'w.safetensors')
    options = VIT | (dict(img_size=size) if size != native else {})
    source = dict(file=str(tmp_path / 'w.safetensors'), num_classes=0)
    want = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=source, **options)
    body, loaded = loaded_body(tmp_path / 'w.safetensors', arch, size)
    assert torch.equal(features(body, size), features(want, size))
    assert bool(loaded.resampled) == (size != native)


def test_swin_in_the_layout_of_its_authors_with_other_windows(tmp_path):
    def swin(size, window):
        options = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=0)
        return SwinTransformer(img_size=size, window_size=window, **options)
    torch.manual_seed(0)
    small, file = swin(64, 4), tmp_path / 'swin.pth'
    official = {k.replace('layers.1.downsample', 'layers.0.downsample'): v for k, v in small.state_dict().items()}
    official['layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(16, 16)
    torch.save(dict(model=official), file)
    large, want = swin(96, 6), swin(96, 6)
    tensors, loaded = fit_tensors(read_checkpoint(str(file)), large, str(file), 'swin')
    large.load_state_dict(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                            # of PyTorch, in timm
        load_checkpoint(want, str(file), filter_fn=swin_filter)
    assert torch.equal(features(large, 96), features(want, 96))
    assert len(loaded.resampled) == 2 and not loaded.left_over
    assert loaded.renamed == {'layers.0.downsample': 'layers.1.downsample'}


def test_registers_of_dinov2_in_the_layout_of_its_authors(tmp_path):
    net = network('vit_small_patch14_reg4_dinov2', img_size=56, depth=2, **VIT)
    w = net.state_dict()
    class_position = torch.randn(1, 1, 384)                        # part of their pos_embed; timm adds it to the token
    official = {k.replace('reg_token', 'register_tokens'): t for k, t in w.items()}
    official |= dict(cls_token=w['cls_token'] - class_position, mask_token=torch.zeros(1, 384),
                     pos_embed=torch.cat([class_position, w['pos_embed']], 1))
    torch.save(official, tmp_path / 'dinov2.pth')
    tensors, loaded = fit_tensors(read_checkpoint(str(tmp_path / 'dinov2.pth')), net, 'dinov2.pth', 'vit')
    assert tensors.keys() == w.keys()
    assert all(torch.allclose(tensors[k], w[k], atol=1e-6) for k in w)
    assert loaded.renamed == dict(register_tokens='reg_token') and loaded.left_over == dict(mask_token=1)


def test_eva_02_in_the_layout_of_its_authors(tmp_path):
    net = network('eva02_tiny_patch14_224', img_size=56, depth=2, **VIT)
    theirs = {'mlp.fc1_g': 'mlp.w1', 'mlp.fc1_x': 'mlp.w2', 'mlp.fc2': 'mlp.w3'}
    official = {}
    for name, tensor in net.state_dict().items():
        for new, old in theirs.items(): name = name.replace(new, old)
        official[name] = tensor
    official |= {'mask_token': torch.zeros(1), 'lm_head.weight': torch.zeros(2), 'rope.freqs_cos': torch.zeros(2)}
    torch.save(dict(model=official), tmp_path / 'eva.pt')
    tensors, loaded = fit_tensors(read_checkpoint(str(tmp_path / 'eva.pt')), net, 'eva.pt', 'eva02')
    assert all(torch.equal(tensors[k], t) for k, t in net.state_dict().items())
    assert loaded.left_over == dict(mask_token=1, lm_head=1, rope=1)
    assert loaded.renamed['blocks.*.mlp.w3'] == 'blocks.*.mlp.fc2'


def test_registers_and_layer_scale_of_dinov3_in_the_layout_of_its_authors(tmp_path):
    net = network('vit_small_patch16_dinov3', img_size=64, depth=2, **VIT)
    theirs, official = dict(gamma_1='ls1.gamma', gamma_2='ls2.gamma', reg_token='storage_tokens'), {}
    for name, tensor in net.state_dict().items():
        for new, old in theirs.items(): name = name.replace(new, old)
        official[name] = tensor
    official |= {'mask_token': torch.zeros(1, 384), 'rope_embed.periods': torch.zeros(16)}
    official |= {f'blocks.{i}.attn.qkv.bias{end}': torch.zeros(3 * 384) for i in range(2) for end in ('', '_mask')}
    torch.save(official, tmp_path / 'dinov3.pth')
    tensors, loaded = fit_tensors(read_checkpoint(str(tmp_path / 'dinov3.pth')), net, 'dinov3.pth', 'dinov3')
    assert all(torch.equal(tensors[k], t) for k, t in net.state_dict().items())
    assert loaded.renamed['storage_tokens'] == 'reg_token' and loaded.left_over == dict(mask_token=1, rope_embed=1)


def test_the_norm_after_pooling_becomes_the_norm_of_every_token(tmp_path):
    net = network(global_pool='avg', fc_norm=True, num_classes=5)
    assert {'fc_norm.weight', 'fc_norm.bias'} < net.state_dict().keys() and 'norm.weight' not in net.state_dict()
    torch.save(dict(model=net.state_dict()), tmp_path / 'finetuned.pth')
    body, loaded = loaded_body(tmp_path / 'finetuned.pth')
    assert torch.equal(body.norm.weight, net.fc_norm.weight) and torch.equal(body.norm.bias, net.fc_norm.bias)
    assert loaded.renamed == dict(fc_norm='norm') and 'fc_norm renamed norm' in loaded.text


@pytest.mark.parametrize('size', [96, 224])
def test_a_stage_starts_from_a_vit_of_another_size(size):
    parent, child = create_model('test_vit', 'avg', 160), create_model('test_vit', 'avg', size)
    for p in parent.parameters(): p.data.add_(torch.randn_like(p) * .1)
    load_stage_weights(child, parent.state_dict(), 'init = parent')
    side = size // 16
    grid = parent[0].model.pos_embed[:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode='bicubic', antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(child[0].model.pos_embed[:, 1:], grid, atol=1e-6)
    different = [k for k, t in child.state_dict().items() if not torch.equal(t, parent.state_dict()[k])] \
        if size == 160 else [k for k, t in child.state_dict().items() if t.shape != parent.state_dict()[k].shape]
    assert different == ['0.model.pos_embed']
    assert torch.equal(child[1][3].weight, parent[1][3].weight)


def test_weights_of_a_stage_fill_body_and_head(tmp_path):
    parent, child = (create_model('test_resnet', 'gem', 64) for _ in range(2))
    save_file(parent.state_dict(), tmp_path / 'weights.safetensors')
    loaded = load_body(child, 'test_resnet', str(tmp_path / 'weights.safetensors'))
    assert all(torch.equal(t, parent.state_dict()[name]) for name, t in child.state_dict().items())
    assert not loaded.left_over and loaded.part == '0.model.*'


@pytest.mark.parametrize('keys', [dict(loss='corn'), dict(head='avg')])
def test_weights_of_a_stage_with_another_head_fill_the_body(tmp_path, keys):
    file, parent = tmp_path / 'weights.safetensors', create_model('test_resnet', 'gem', 64)
    child = create_model('test_resnet', size=64, **keys)
    head = {name: t.clone() for name, t in child[1].state_dict().items()}
    save_file(parent.state_dict(), file)
    check_weights(stage(file, 'test_resnet', 64, **keys))
    loaded = load_body(child, 'test_resnet', str(file))
    assert all(torch.equal(t, parent[0].state_dict()[name]) for name, t in child[0].state_dict().items())
    assert all(torch.equal(t, head[name]) for name, t in child[1].state_dict().items())
    assert loaded.left_over == {'head of another pooling or loss': 3}
    assert '3 left over: head of another pooling or loss (3)' in loaded.text


def test_the_record_beside_weights_of_a_stage_tells_its_pooling_and_means(tmp_path, capsys):
    file, parent = tmp_path / 'weights.safetensors', create_model('test_vit', 'cls', 160)
    save_file(parent.state_dict(), file)
    write_record(tmp_path / 'stage.json', dict(pooling='cls', mean=[.4, .3, .2], std=[.3, .2, .1]))
    same, other = create_model('test_vit', 'cls', 160), create_model('test_vit', 'avg', 160)
    assert not load_body(same, 'test_vit', str(file)).left_over
    assert load_body(other, 'test_vit', str(file)).left_over
    assert not torch.equal(other[1][3].weight, parent[1][3].weight)
    check_weights(stage(file, mean=(.4, .3, .2), std=(.3, .2, .1)))
    assert not capsys.readouterr().out
    check_weights(stage(file))
    assert 'mean 0.4 0.3 0.2, std 0.3 0.2 0.1, this one by mean 0.5 0.5 0.5' in capsys.readouterr().out


# What is refused

def deeper(tmp_path):
    torch.save(timm.create_model('test_vit', depth=8).state_dict(), tmp_path / 'w.pth')


def wider(tmp_path):
    torch.save(timm.create_model('test_vit', embed_dim=128, num_heads=4).state_dict(), tmp_path / 'w.pth')


def of_another_family(tmp_path):
    torch.save(dict(model=timm.create_model('test_resnet').state_dict()), tmp_path / 'w.pth')


def incomplete(tmp_path):
    weights = timm.create_model('test_vit').state_dict()
    torch.save({k: v for k, v in weights.items() if not k.startswith('blocks.3.')}, tmp_path / 'w.pth')


def with_a_neck(tmp_path):
    torch.save(timm.create_model('test_vit').state_dict() | {'neck.weight': torch.ones(2)}, tmp_path / 'w.pth')


def without_tensors(tmp_path): torch.save(dict(epoch=3, args=argparse.Namespace(lr=1.)), tmp_path / 'w.pth')


def a_list(tmp_path): torch.save([torch.ones(3)], tmp_path / 'w.pth')


def no_file(tmp_path): (tmp_path / 'w.pth').write_bytes(b'not a checkpoint')


def web_page(tmp_path): (tmp_path / 'w.pth').write_text('\n<!DOCTYPE html><html><body>Sign in</body></html>')


def lfs_pointer(tmp_path): (tmp_path / 'w.pth').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:1\n')


def empty(tmp_path): (tmp_path / 'w.pth').touch()


def cut_off(tmp_path):
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'w.pth')
    os.truncate(tmp_path / 'w.pth', (tmp_path / 'w.pth').stat().st_size // 2)


def not_finite(tmp_path):
    weights = timm.create_model('test_vit').state_dict()
    weights['blocks.1.mlp.fc1.bias'][3] = torch.nan
    weights['norm.weight'][0] = torch.inf
    torch.save(weights, tmp_path / 'w.pth')


def a_folder(tmp_path): (tmp_path / 'w.pth').mkdir()


def whole_network(tmp_path): torch.save(timm.create_model('test_vit'), tmp_path / 'w.pth')


def of_oct(tmp_path):
    torch.save(mae_checkpoint(network(num_classes=0), data_path='/data/OCT2017/train'), tmp_path / 'w.pth')


def other_size_without_resampling(tmp_path):
    weights = timm.create_model('test_vit').state_dict()
    torch.save(weights | {'cls_token': torch.ones(1, 1, 32)}, tmp_path / 'w.pth')


@pytest.mark.parametrize('make, words', [
    (deeper, '24 tensors are not in test_vit, first blocks.6.norm1.weight.*Set arch'),
    (wider, 'tensors have other shapes than in test_vit, first cls_token: 1x1x128, not 1x1x64.*arch'),
    (of_another_family, r'78 of 78 tensors of test_vit are missing, first .*The file begins with conv1.0.weight.*arch'),
    (incomplete, r'12 of 78 tensors of test_vit are missing, first blocks.3.norm1.weight.*incomplete, or of a smaller'),
    (web_page, 'is a web page, not the file itself. Download it again'),
    (lfs_pointer, 'is a Git LFS pointer, not the file itself. Download it again'),
    (empty, 'is empty. Download it again'),
    (cut_off, 'is cut off: its end is missing. Download it again'),
    (not_finite, 'not finite numbers: 2 tensors, first blocks.1.mlp.fc1.bias'),
    (with_a_neck, '1 tensors are not in test_vit, first neck.weight'),
    (without_tensors, 'holds no tensors. Save a state dict'),
    (a_list, 'holds no tensors'),
    (no_file, 'not a safetensors or weights-only PyTorch file'),
    (a_folder, 'no such file'),
    (whole_network, r'needs code: timm.models.vision_transformer.VisionTransformer.*save its state dict'),
    (of_oct, r'OCT scans, not on fundus images \(data_path = /data/OCT2017/train\).*CFP'),
    (other_size_without_resampling, 'first cls_token: 1x1x32, not 1x1x64'),
])
def test_files_that_do_not_fit_are_refused_before_and_at_the_training(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(WeightsError, match=words): check_weights(stage(tmp_path / 'w.pth'))
    with pytest.raises(WeightsError, match=words) as e:
        load_body(create_model('test_vit', 'avg', 160), 'test_vit', str(tmp_path / 'w.pth'))
    assert '\n' not in str(e.value) and 'w.pth' in str(e.value)


def test_a_registered_network_with_its_weights_in_a_file_needs_no_connection(tmp_path, monkeypatch):
    file = tmp_path / 'own.safetensors'
    def refuse(*_, **__): raise OSError
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(timm, 'get_pretrained_cfg', lambda arch: PretrainedCfg(file=str(file)))
    stage = Stage(name='s', train=('a',), arch='resnet18', weights='imagenet')
    with pytest.raises(WeightsError, match=f'{file} is not there'): check_weights(stage)
    file.touch()
    check_weights(stage)


def test_bundled_weights_of_a_package_in_a_zip(tmp_path, monkeypatch):
    file = tmp_path / 'package.zip'
    with zipfile.ZipFile(file, 'w') as z, z.open('models/w.pth', 'w') as f:
        torch.save({'_conv_stem.weight': torch.ones(2)}, f)
    monkeypatch.setattr(importlib.resources, 'files', lambda name: zipfile.Path(file))
    assert bundled_weights(BUNDLED_ARCH)['conv_stem.weight'].tolist() == [1, 1]


class Code:
    "Runs a command when it is unpickled"
    def __init__(self, command): self.command = command

    def __reduce__(self): return os.system, (self.command,)


@pytest.mark.parametrize('save', [lambda o, f: torch.save(o, f), lambda o, f: f.write_bytes(pickle.dumps(o, 2))])
def test_code_in_a_file_does_not_run(tmp_path, save):
    weights = timm.create_model('test_vit').state_dict()
    save(dict(model=weights, args=argparse.Namespace(hook=Code(f'touch {tmp_path}/ran'))), tmp_path / 'w.pth')
    words = 'not a safetensors or weights-only'
    with pytest.raises(WeightsError, match=words): check_weights(stage(tmp_path / 'w.pth'))
    assert not (tmp_path / 'ran').exists()


def test_loading_leaves_torch_s_list_of_safe_classes_as_it_was(tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.save(mae_checkpoint(network(num_classes=0)), tmp_path / 'w.pth')
    loaded_body(tmp_path / 'w.pth')
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path / 'w.pth', weights_only=True)


@pytest.mark.parametrize('name, warned', [
    ('RETFound_oct_weights.pth', True), ('RETFound_mae_natureOCT.pth', True), ('RETFound_mae_natureCFP.pth', False),
    ('doctor_october.pth', False), ('mae_2024-Oct-05.pth', False), ('oct_12_cls.pth', False)])
def test_weights_of_oct_by_their_name_are_warned_of(tmp_path, capsys, name, warned):
    torch.save(dict(model=network(num_classes=0).state_dict()), tmp_path / name)
    check_weights(stage(tmp_path / name, mean=(.5, .5, .5), std=(.5, .5, .5)))
    assert ('OCT' in capsys.readouterr().out.replace(name, '')) == warned


@pytest.mark.parametrize('size', [0, 4, 500])
def test_a_safetensors_file_that_is_cut_off(tmp_path, size):
    file = tmp_path / 'w.safetensors'
    save_file(network(num_classes=0).state_dict(), file)
    os.truncate(file, file.stat().st_size // 2 if size == 500 else size)
    with pytest.raises(WeightsError, match='is empty' if not size else 'is cut off: its end is missing'):
        check_weights(stage(file))


@pytest.mark.parametrize('arguments, found', [
    (dict(data_path='/data/images', output_dir='/out/2024-Oct-05'), ''),
    (dict(data_path='/data/images', output_dir='/out/oct_scans'), ''),
    (dict(data_path='/data/run_oct_12/train', resume='oct_3/last.pth'), ''),
    (dict(data_path='/data/CFP/train', finetune='/data/oct/weights.pth'), ''),
    (dict(task='finetune_OCT'), 'warned'),
    (dict(finetune='RETFound_oct_weights.pth'), 'refused'), (dict(data_dir='/data/OCT2017'), 'refused'),
    (dict(modality='OCT', output_dir='/out'), 'refused')])
def test_arguments_that_name_oct(arguments, found):
    content = dict(model={}, args=arguments)
    if found == 'refused':
        with pytest.raises(WeightsError, match='trained on OCT scans'): check_modality('w.pth', content)
    else: assert ('perhaps trained on OCT scans' in check_modality('w.pth', content)) == (found == 'warned')


@pytest.mark.parametrize('keys, warned', [({}, True), (dict(mean=(.485, .456, .406), std=(.229, .224, .225)), False)])
def test_the_means_of_a_masked_autoencoder_are_asked_for(tmp_path, capsys, keys, warned):
    assert timm.get_pretrained_cfg('test_vit').mean == (.5, .5, .5)
    torch.save(mae_checkpoint(network(num_classes=0)), tmp_path / 'w.pth')
    check_weights(stage(tmp_path / 'w.pth', **keys))
    assert ('Set mean = 0.485 0.456 0.406 and std = 0.229 0.224 0.225' in capsys.readouterr().out) == warned


# mean and std, from the recipe to the prediction

RECIPE = '''
[recipe]
splits = 2

[table.train]
csv = train.csv
images = train_images
grade = diagnosis

[stage]
arch = test_vit
size = 64
epochs = 1
bs = 8
precision = f32

[stage.first]
train = train
weights = {weights}
mean = .4 .3 .2
std = .3 .2 .1

[stage.second]
train = train
init = first
size = 96

[stage.third]
train = train
weights = none
arch = test_resnet

[submit]
final = second
'''


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / 'r.ini').write_text(RECIPE.format(weights=tmp_path / 'w.pth'))
    return tmp_path / 'r.ini'


def test_a_stage_inherits_mean_and_std_of_the_stage_that_it_starts_from(recipe):
    def stats(*sets):
        return {n: (s.mean, s.std) for n, s in read_recipe(recipe, sets=sets).stages.items()}
    own = (.4, .3, .2), (.3, .2, .1)
    assert stats() == dict(first=own, second=own, third=((), ()))
    assert stats('stage.second.mean=.1 .1 .1')['second'] == ((.1, .1, .1), own[1])
    assert stats('stage.second.mean=.485, .456, .406')['second'][0] == (.485, .456, .406)
    assert stats('stage.second.init=', 'stage.second.weights=none')['second'] == ((), ())


@pytest.mark.parametrize('key, words', [
    ('mean=.5 .5', 'mean = .5 .5: enter three numbers'), ('std=.2 .2 0', 'std = .2 .2 0: enter a number from 0.001'),
    ('mean=123 117 104', 'enter a number from 0 to 1. Divide values for pixels from 0 to 255 by 255')])
def test_wrong_means_are_refused(recipe, key, words):
    with pytest.raises(ConfigError, match=re.escape(words)): read_recipe(recipe, sets=[f'stage.first.{key}'])


def test_what_was_loaded_and_mean_and_std_reach_record_and_prediction(recipe, no_report, tmp_path, capsys):
    write_table(tmp_path / 'data', 30)
    net = network(num_classes=0)
    torch.save(mae_checkpoint(net), tmp_path / 'w.pth')
    options = ['--recipe', str(recipe), '--data', str(tmp_path / 'data'), '--runs', str(tmp_path / 'runs')]
    main(['all', *options])
    out = capsys.readouterr().out
    assert 'first fold 0: weights = w.pth: 78 tensors from model; pos_embed resampled from 1x101x64 to 1x17x64' in out
    assert 'normalised by mean 0.4 0.3 0.2, std 0.3 0.2 0.1' in out and 'those of timm' not in out
    run = load_run(recipe, tmp_path / 'data', tmp_path / 'runs')
    first, second, third = (run.finished_record(name, 0) for name in ('first', 'second', 'third'))
    assert first['loaded']['sha256'] == file_hash(tmp_path / 'w.pth') and first['loaded']['tensors'] == 78
    assert second['loaded'] == first['loaded'] and third['loaded'] is None
    for name, record in dict(first=first, second=second, third=third).items():
        member = read_model(tmp_path / f'runs/r/{name}')[0].members[0]
        learn = read_exported(run, name, 0)
        normalize = next(t for t in learn.dls.after_batch.fs if type(t).__name__ == 'Normalize')
        for key in ('mean', 'std'):
            used = getattr(normalize, key).flatten().tolist()
            assert used == pytest.approx(record[key])
            assert list(getattr(member, key)) == record[key]
    assert third['mean'] == list(timm.get_pretrained_cfg('test_resnet').mean)
    with quick_exports(): main(['export', str(tmp_path / 'runs/r/first')])
    bundle = read_record(tmp_path / 'runs/r/first/bundle/bundle.json')
    assert bundle['lineage'][0]['loaded'] == json.loads(json.dumps(first['loaded']))
    assert bundle['model']['members'][0]['mean'] == [.4, .3, .2]


def test_doctor_says_what_of_a_file_fits_and_counts_its_problem_once(recipe, tmp_path, capsys):
    write_table(tmp_path / 'data', 20)
    args = ['doctor', '--recipe', str(recipe), '--data', str(tmp_path / 'data'), '--runs', str(tmp_path / 'runs')]
    torch.save(mae_checkpoint(network(num_classes=0)), tmp_path / 'w.pth')
    main([*args, '--set', 'stage.first.mean='])
    out = ' '.join(capsys.readouterr().out.split())
    assert 'fits test_vit: 78 tensors, 6 left over (decoder_pos_embed, ' in out
    assert out.count('masked autoencoder') == 1
    assert f'WARN weights {tmp_path}/w.pth of test_vit: weights of a masked' in out
    deeper(tmp_path)
    expect_error(capsys, args, '1 problem would stop `all`')


def test_a_wrong_file_stops_a_run_before_images_are_prepared(recipe, tmp_path, capsys):
    write_table(tmp_path / 'data', 20)
    deeper(tmp_path)
    args = ['all', '--recipe', recipe, '--data', tmp_path / 'data', '--runs', tmp_path / 'runs']
    expect_error(capsys, args, '[stage.first] weights = ', 'w.pth: 24 tensors are not in test_vit')
    assert not (tmp_path / 'runs/prepared').exists()
