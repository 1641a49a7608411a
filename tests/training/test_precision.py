"What a training computes in, and how large its first epochs see."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TOY, fails
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import nn

from aptos_fastai.cli import main
from aptos_fastai.data.retina import Prep
from aptos_fastai.recipe import Augment, Stage
from aptos_fastai.training import precision
from aptos_fastai.training.callbacks import History
from aptos_fastai.training.loaders import get_dls
from aptos_fastai.training.model import get_learner

KEYS = dict(name='t', train=('a',), arch='test_resnet', weights='none', size=64, bs=4, epochs=2)


@pytest.fixture
def learn(tables, tmp_path):
    files = sorted((tables / 'train_images').iterdir())
    i = np.arange(len(files))
    frame = pd.DataFrame(dict(stored=[str(f) for f in files], diagnosis=i % 5 * 1., valid=i % 4 == 0))
    s = Stage(**KEYS)
    return lambda: get_learner(s, get_dls(frame, s, Prep(size=64), Augment(), ((.5,) * 3, (.25,) * 3)))


def fit(learn, *cbs, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=list(cbs))


def trained(tables, recipe, tmp_path, how) -> dict:
    main(['train', 'teacher', '--recipe', str(recipe), '--data', str(tables), '--runs', str(tmp_path / 'r'), '--set', f'stage.precision={how}',
          '--set', 'stage.folds=1'])
    return json.loads((tmp_path / 'r/small/teacher/fold0/stage.json').read_text())


def test_the_body_computes_in_bf16_and_the_rest_in_float32(learn):
    o, seen = learn(), {}
    conv = next(m for m in o.model[0].modules() if isinstance(m, nn.Conv2d))
    def note_conv(m, x, y): seen['conv'] = y.dtype
    def note_head(m, x, y): seen['head'] = x[0].dtype, y.dtype
    hooks = conv.register_forward_hook(note_conv), o.model[1].register_forward_hook(note_head)
    fit(o, precision.Autocast('bf16'))
    for h in hooks: h.remove()
    assert seen == dict(conv=torch.bfloat16, head=(torch.float32, torch.float32))
    assert all(p.dtype == torch.float32 for p in o.model.parameters())
    assert not o.model[0]._forward_hooks and not o.model[0]._forward_pre_hooks      # what is exported computes in float32
    assert not torch.is_autocast_enabled('cpu')

def test_bf16_learns_what_f32_learns(learn):
    "The first steps' gradients are nearly those of float32, and nearer than another batch's"
    out = []
    class Keep(Callback):
        order = 100
        def before_step(self): out[-1].append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))
    for cbs in ([], [precision.Autocast('bf16')]):
        set_seed(1)
        o = learn()
        out.append([])
        fit(o, *cbs, Keep())
    (a, second, *_), (b, *_) = out
    def alike(x, y): return float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert alike(a, second) < .9 < .98 < alike(a, b) < 1


def test_what_is_faster_is_taken_and_recorded(tmp_path, monkeypatch):
    s, calls = Stage(**KEYS), []
    for found, want in [((1., .5), 'bf16'), ((1., .95), 'f32'), ((1., 2.), 'f32')]:
        monkeypatch.setattr(precision, 'step_seconds', lambda stage, which, n, found=found: (calls.append(n), (dict(zip(which, found, strict=True)), 1., 1))[1])
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setattr(precision, 'cpu_has_bf16', lambda: True)
        folder = tmp_path / f'{found}'
        folder.mkdir()
        assert precision.precision_of(s, folder) == want == precision.precision_of(s, folder)
    assert calls == [4, 4, 4]                 # the second time it is read


def test_where_the_processor_has_no_bf16_none_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(precision, 'cpu_has_bf16', lambda: False)
    monkeypatch.setattr(precision, 'step_seconds', lambda *_, **__: pytest.fail('a step in bf16 may take a minute there'))
    assert precision.precision_of(Stage(**KEYS), tmp_path) == 'f32' and not list(tmp_path.iterdir())
    assert precision.precision_of(Stage(**KEYS, precision='bf16'), tmp_path) == 'bf16' and 'this machine has none' in capsys.readouterr().out

def test_a_measurement_is_of_this_machine(monkeypatch):
    steps, look, params = precision.step_seconds(Stage(**KEYS), ('f32', 'bf16'), n=2, rounds=1)
    assert set(steps) == {'f32', 'bf16'} and 0 < look < 10 and all(0 < o < 10 for o in steps.values()) and params > 1e5

def test_a_measurement_draws_nothing(monkeypatch):
    torch.manual_seed(3)
    a = torch.random.get_rng_state()
    precision.step_seconds(Stage(**KEYS), n=1, rounds=1)
    assert torch.equal(a, torch.random.get_rng_state())

def test_an_explicit_precision_is_trained_in_and_recorded(tables, small_recipe, tmp_path):
    assert trained(tables, small_recipe, tmp_path, 'bf16')['precision'] == 'bf16'

def test_fp16_without_a_gpu_is_refused(tables, small_recipe, tmp_path, capsys):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    fails(capsys, ['train', 'teacher', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'r', '--set', 'stage.precision=fp16'],
          '[stage.teacher] precision = fp16: needs a GPU; set auto, bf16 or f32')


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='torch.compile needs a C++ compiler')
def test_a_compiled_stage_trains_and_exports(tables, small_recipe, tmp_path):
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--set', 'stage.folds=1']
    for name in ('no', 'yes'): main(['train', 'teacher', *args, '--runs', str(tmp_path / name), '--set', f'stage.compile={name}'])
    a, b = (pd.read_csv(tmp_path / n / 'small/teacher/fold0/preds.csv').score for n in ('no', 'yes'))
    assert np.abs(a - b).max() < .05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('how', ['auto', 'bf16', 'fp16', 'f32'])
def test_a_stage_trains_on_the_gpu(tables, small_recipe, tmp_path, how):
    o = trained(tables, small_recipe, tmp_path, how)
    assert o['precision'] in ((how,) if how != 'auto' else ('bf16', 'fp16')) and 'cuda' in o['versions']['device']


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_stage_goes_on_inside_a_phase_on_the_gpu(tables, small_recipe, tmp_path, monkeypatch):
    real = History.after_epoch
    def stops(self):
        real(self)
        if len(self.rows) == 3: raise KeyboardInterrupt
    args = ['train', 'teacher', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'r'), '--set', 'stage.folds=1',
            '--set', 'stage.epochs=4']
    monkeypatch.setattr(History, 'after_epoch', stops)
    with pytest.raises(SystemExit): main(args)
    monkeypatch.setattr(History, 'after_epoch', real)
    main(args)
    assert json.loads((tmp_path / 'r/small/teacher/fold0/stage.json').read_text())['resumed_after_epochs']


def test_the_largest_batch_is_looked_for_until_memory_is_out(toy, monkeypatch, capsys):
    def steps(stage, which, n, rounds):
        if n > 8: raise torch.OutOfMemoryError('no more')
        return {which[0]: 1 / n}, 1., 1
    for name, f in dict(is_available=lambda: True, is_bf16_supported=lambda **_: True, reset_peak_memory_stats=lambda: None, empty_cache=lambda: None,
                        max_memory_allocated=lambda: 5e9).items(): monkeypatch.setattr(torch.cuda, name, f)
    monkeypatch.setattr(precision, 'step_seconds', steps)
    main(['batch', 'pretrain_256', '--recipe', str(ROOT / 'settings.ini'), '--runs', str(toy.parent), *TOY])
    assert '8 fits; [stage.pretrain_256] bs = 16 does not: bs = 8 and accumulate = 2 take the same steps' in capsys.readouterr().out

def test_without_a_gpu_no_batch_is_looked_for(toy, capsys):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    args = ['batch', 'pretrain_256', '--recipe', ROOT / 'settings.ini', '--runs', toy.parent, *TOY]
    fails(capsys, args, 'batch: looks for the largest batch that fits a GPU')


@pytest.mark.parametrize('key, words', [('track=wandb', 'pip install wandb, or set track = no'), ('compile=yes', 'needs a C++ compiler')])
def test_what_is_not_installed_is_told_before_anything_trains(tables, small_recipe, tmp_path, capsys, monkeypatch, key, words):
    monkeypatch.setattr('aptos_fastai.pipeline.graph.find_spec', lambda name: None)
    monkeypatch.setattr('aptos_fastai.pipeline.graph.shutil.which', lambda name: None)
    fails(capsys, ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'r', '--set', f'stage.{key}'], '[stage.teacher]', words)
    assert not (tmp_path / 'r').exists()


def test_a_stage_is_tracked_where_asked(tables, small_recipe, tmp_path):
    pytest.importorskip('tensorboard')
    args = ['train', 'teacher', '--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'r'), '--set', 'stage.folds=1']
    main([*args, '--set', 'stage.track=tensorboard'])
    assert [f.stat().st_size > 200 for f in (tmp_path / 'r/small/tensorboard/teacher/fold0').iterdir()] == [True]
    stamp = (tmp_path / 'r/small/teacher/fold0/stage.json').stat().st_mtime_ns
    main(args)                                # how it is watched is no part of what it is
    assert (tmp_path / 'r/small/teacher/fold0/stage.json').stat().st_mtime_ns == stamp
