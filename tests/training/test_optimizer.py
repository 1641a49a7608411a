"Optimizers, layers and their learning rates, weight decay, warm-up, clipping, drop path, and what a frozen body keeps."
import copy
import io
import pickle
from pathlib import Path

import fastai.callback.fp16
import fastai.optimizer
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import expect_error, stage_options
from expensive import quick_exports
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn

from aptos_fastai.common.io import AptosError
from aptos_fastai.pipeline.stage import fit_stage, optional_callbacks
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import ConfigError, Stage
from aptos_fastai.training.callbacks import AccumulateGradients, LossScaling
from aptos_fastai.training.model import check_optimization, get_learner
from aptos_fastai.training.networks import create_model
from aptos_fastai.training.optimizer import (
    Layer,
    TorchOptimizer,
    check_optimizer,
    create_optimizer,
    layer_rates,
    load_optimizer_state,
    model_layers,
    optimizer_class,
    optimizer_names,
    optimizer_state,
)
from aptos_fastai.training.weights import WeightsError

STAGE = dict(name='t', train=('a',), arch='test_resnet', weights='none', size=32, bs=4, epochs=1)
STEPS = [(3e-3, .95), (1e-2, .9), (5e-3, .85), (1e-3, .95), (1e-3, .9), (2e-3, .9)]        # learning rate, momentum


def new_model(arch='test_resnet', size=32, **keys):
    torch.manual_seed(0)
    return create_model(arch, size=size, **keys).to(memory_format=torch.channels_last)


def take_steps(model, opt, steps, first=0):
    "Take optimizer steps on random images, each with its learning rate and momentum"
    model.train()
    for i, (lr, mom) in enumerate(steps, first):
        torch.manual_seed(100 + i)
        opt.set_hypers(lr=lr, mom=mom, wd=.1)
        model(torch.randn(4, 3, 32, 32)).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()


def largest_difference(a, b):
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def image_dls(n=12, bs=4, size=32):
    "DataLoaders of random images and grades"
    rng = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, size, size, generator=rng), torch.tensor(float(i % 5))) for i in range(n)]
    return DataLoaders(TfmdDL(items, bs=bs, drop_last=True), TfmdDL(items[:bs], bs=bs))


# Optimizers

def test_adam_gives_the_weights_of_fastais_own():
    ours, theirs = new_model(), new_model()
    opt = fastai.optimizer.Adam([list(theirs.parameters())], lr=1e-3, sqr_mom=.98, eps=1e-4)
    for p in theirs.parameters():
        if p.ndim == 1: opt.state[p]['do_wd'] = False
    take_steps(theirs, opt, STEPS)
    take_steps(ours, create_optimizer(model_layers(ours), lr=1e-3, sqr_mom=.98, eps=1e-4), STEPS)
    assert largest_difference(ours, new_model()) > 1e-2
    assert largest_difference(ours, theirs) < 5e-5


def test_sgd_gives_the_weights_of_pytorch_with_timms_groups():
    ours, theirs = new_model(), new_model()
    groups = timm.optim.param_groups_weight_decay(theirs, .1)
    opt = torch.optim.SGD(groups, lr=1e-3, momentum=.9)
    for i, (lr, mom) in enumerate(STEPS):
        for group in opt.param_groups: group.update(lr=lr, momentum=mom)
        torch.manual_seed(100 + i)
        theirs.train()(torch.randn(4, 3, 32, 32)).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
    take_steps(ours, create_optimizer(model_layers(ours), lr=1e-3, name='sgd'), STEPS)
    assert largest_difference(ours, new_model()) > 1e-2
    assert largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize('name', ['adam', 'lamb'])
def test_biases_norms_and_one_dimensional_parameters_do_not_decay(name):
    model = new_model()
    before = copy.deepcopy(model)
    opt = create_optimizer(model_layers(model), lr=.1, name=name)
    opt.set_hypers(wd=.5, lr=.1, mom=.9)
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    for (key, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        if old.ndim == 1: assert torch.equal(old, new), key
        else: assert torch.allclose(new, old * (1 - .1 * .5), atol=1e-7) and not torch.equal(old, new), key


def test_position_embeddings_and_class_tokens_do_not_decay():
    model = new_model('test_vit', 160, head='cls')
    spared = {id(p) for layer in model_layers(model, .7) for p in layer.undecayed}
    names = {name for name, p in model[0].model.named_parameters() if id(p) in spared and p.ndim > 1}
    assert names == {'pos_embed', 'cls_token'}


@pytest.mark.parametrize('layer_decay', [1., .7])
@pytest.mark.parametrize('name', ['adam', 'sgd', 'lion', 'lamb', 'radam', 'nadam', 'larc', 'qhadam', 'rmsprop'])
def test_an_optimizer_resumes_bit_for_bit(name, layer_decay):
    whole, first = new_model(), new_model()
    take_steps(whole, create_optimizer(model_layers(whole, layer_decay), 1e-3, name=name), STEPS)
    opt = create_optimizer(model_layers(first, layer_decay), 1e-3, name=name)
    take_steps(first, opt, STEPS[:3])
    buffer = io.BytesIO()
    torch.save(dict(model=first.state_dict(), opt=optimizer_state(opt)), buffer)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    second = new_model()
    second.load_state_dict(saved['model'])
    opt = create_optimizer(model_layers(second, layer_decay), 1e-3, name=name)
    load_optimizer_state(opt, saved['opt'], torch.device('cpu'))
    take_steps(second, opt, STEPS[3:], first=3)
    assert largest_difference(whole, second) == 0


def test_a_momentum_schedule_leaves_an_optimizer_without_momentum_alone():
    opt = create_optimizer([Layer(0, [nn.Parameter(torch.ones(2, 2))], [])], .1, name='adagrad')
    opt.set_hypers(mom=.5, lr=.2)
    assert isinstance(opt, TorchOptimizer) and opt.hypers[0]['lr'] == .2 and 'mom' not in opt.hypers[0]


def test_many_optimizers_can_train():
    refused = []
    for name in optimizer_names():
        try: check_optimizer(Stage(**STAGE, optimizer=name))
        except AptosError as e: refused.append((name, str(e)))
    assert len(optimizer_names()) - len(refused) > 20
    assert {'lbfgs', 'sparseadam'} <= {name for name, _ in refused}
    assert all('optimizer = adam' in text for _, text in refused)


def test_the_second_beta_becomes_the_alpha_of_rmsprop_only():
    def alpha(name):
        opt = create_optimizer([Layer(0, [nn.Parameter(torch.ones(2, 2))], [])], .1, name=name, sqr_mom=.97)
        return opt.opt.param_groups[0]['alpha']
    assert [alpha('rmsprop'), alpha('rmsproptf'), alpha('asgd')] == [.97, .97, .75]


@pytest.mark.parametrize('name', ['adam', 'adamw', 'madgrad', 'radam', 'nadam', 'adabelief', 'rmsproptf', 'sgdw'])
def test_weight_decay_is_decoupled(name):
    p = nn.Parameter(torch.full((2, 2), 3.))
    opt = create_optimizer([Layer(0, [p], [])], .1, name=name)
    p.grad = torch.zeros_like(p)
    opt.set_hypers(lr=.1, wd=.5)
    opt.step()
    averaged = .9 if name == 'madgrad' else 1.                     # the other tenth is the first value of the parameter
    assert torch.allclose(p, torch.full((2, 2), 3. * (1 - .1 * .5 * averaged)), atol=1e-4)


def test_an_optimizer_without_weight_decay_is_refused_if_it_should_decay():
    with pytest.raises(AptosError, match='optimizer = rprop: has no weight decay. Set wd = 0'):
        check_optimizer(Stage(**STAGE, optimizer='rprop'))
    check_optimizer(Stage(**STAGE, optimizer='rprop', wd=0.))


def test_adamw_is_adam_and_a_misspelt_one_is_suggested():
    assert optimizer_class('adam') is optimizer_class('adamw')
    with pytest.raises(AptosError, match='adamm: .* mean: adam, .*adamw'): optimizer_class('adamm')


def test_an_unknown_optimizer_is_refused_before_images_are_prepared(tables, small_recipe, tmp_path, capsys):
    args = ['all', '--recipe', small_recipe, '--data', tables, '--runs', tmp_path / 'runs', '--set']
    expect_error(capsys, [*args, 'stage.optimizer=adann'], '[stage.teacher] optimizer = adann: no such optimizer',
                 'Did you mean:', 'adam')
    expect_error(capsys, [*args, 'stage.optimizer=lbfgs'], 'optimizer = lbfgs: cannot train a network')
    assert not (tmp_path / 'runs/prepared').exists()


# Layers

@pytest.mark.parametrize('arch', ['test_vit', 'test_convnext', 'test_resnet', 'test_efficientnet', 'poolformer_s12',
                                  'edgenext_xx_small', 'swin_tiny_patch4_window7_224'])
def test_rates_of_layers_are_timms(arch):
    whole = timm.create_model(arch, num_classes=5)
    names = {id(p): name for name, p in whole.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(whole, .05, whole.no_weight_decay(), layer_decay=.6) \
        if hasattr(whole, 'no_weight_decay') else timm.optim.param_groups_layer_decay(whole, .05, layer_decay=.6)
    want = {names[id(p)]: (group['lr_scale'], group['weight_decay'] > 0) for group in groups for p in group['params']}
    model = nn.Sequential(nn.Module(), nn.Linear(2, 1))
    model[0].model = timm.create_model(arch, num_classes=0)
    layers = model_layers(model, .6)
    rates = layer_rates(Stage(**STAGE, layer_decay=.6, lr=1.), layers)
    found = {id(p): (rate, decays) for layer, rate in zip(layers, rates, strict=True)
             for group, decays in ((layer.decayed, True), (layer.undecayed, False)) for p in group}
    assert len(found) == len(list(model.parameters()))
    for name, p in model[0].model.named_parameters():
        assert found[id(p)] == (pytest.approx(want[name][0]), want[name][1]), name
    assert found[id(model[1].weight)] == (1., True) and found[id(model[1].bias)] == (1., False)


def test_the_head_is_the_last_layer_also_where_a_last_norm_shares_its_rate():
    model = new_model('test_convnext', 64, head='avg')
    *_, norm, head = model_layers(model, .5)
    assert {id(p) for p in head.parameters} == {id(p) for p in model[1].parameters()}
    assert norm.depth == head.depth == 0 and norm.parameters


def test_a_network_without_layers_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
    body = nn.Module()
    body.model = Plain()
    with pytest.raises(AptosError, match='layer_decay: timm knows no layers of Plain. Set layer_decay = 1'):
        model_layers(nn.Sequential(body, nn.Linear(4, 1)), .5)


class NoteRates(Callback):
    "Note the learning rate of each layer at each step"
    order = 61
    def before_fit(self): self.rates = []
    def before_batch(self):
        if self.training: self.rates.append([h['lr'] for h in self.opt.hypers])


@pytest.mark.parametrize('schedule', ['one_cycle', 'constant'])
@pytest.mark.parametrize('keys', [dict(layer_decay=.5), dict(lr_div=4.), {}])
def test_a_stage_trains_its_layers_at_their_rates(schedule, keys):
    stage = Stage(**STAGE | dict(freeze_epochs=1, lr=.008, schedule=schedule) | keys)
    learn, note = get_learner(stage, image_dls(48)), NoteRates()
    fit_stage(learn, stage, [note])
    rates = np.array(note.rates)
    want = np.array(layer_rates(stage, model_layers(learn.model, stage.layer_decay)))
    assert rates.shape == (12, len(want)) and want[-1] == .008
    assert want[0] == pytest.approx(.008 * keys.get('layer_decay', 1) ** (len(want) - 1) / keys.get('lr_div', 1))
    assert np.allclose(rates / rates[:, -1:], want / want[-1])
    assert rates[:, -1].max() == pytest.approx(.008)


@pytest.mark.parametrize('warmup', [0., .25, .75])
def test_the_rate_rises_for_the_fraction_warmup(warmup):
    stage = Stage(**STAGE, warmup=warmup, lr=.01)
    note = NoteRates()
    fit_stage(get_learner(stage, image_dls(80)), stage, [note])
    assert len(note.rates) == 20 and int(np.argmax(note.rates, 0)[-1]) == 20 * warmup


@pytest.mark.parametrize('keys, words', [
    ('layer_decay = .5\nlr_div = 2', ['layer_decay = 0.5', 'lr_div = 2', 'Set lr_div = 1']),
    ('schedule = constant\nwarmup = .1', ['warmup = 0.1', 'no warm-up']),
    ('epochs = 0', ['epochs = 0', 'nothing is trained'])])
def test_keys_that_contradict_each_other_are_refused(keys, words, tmp_path):
    file = tmp_path / 'r.ini'
    file.write_text(f'[table.a]\ncsv = a.csv\ngrade = g\n[stage.s]\ntrain = a\n{keys}\n[submit]\nfinal = s\n')
    with pytest.raises(ConfigError) as e: read_recipe(file)
    assert all(word in str(e.value) for word in ['[stage.s]', *words])


# Drop path

def test_drop_path_rises_to_its_rate_and_changes_no_weight_names():
    model = create_model('test_vit', size=160, drop_path=.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert rates[-1] == pytest.approx(.3) and rates == sorted(rates)
    assert list(model.state_dict()) == list(create_model('test_vit', size=160).state_dict())


@pytest.mark.parametrize('arch', ['legacy_seresnet18', 'densenet121'])
def test_a_network_without_drop_path_is_refused(arch):
    with pytest.raises(WeightsError, match=f'drop_path = 0.2: {arch} has no drop path. Set drop_path = 0'):
        check_optimization(Stage(**STAGE | dict(arch=arch, drop_path=.2, size=64)))


# Clipping

class NoteNorm(Callback):
    "Note the norm of the gradients as the optimizer gets them"
    order = 50
    def before_fit(self): self.norms = []
    def before_step(self):
        self.norms.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm().item())


def gradient_norms(monkeypatch=None, *, accumulate=1, fp16=False, **keys):
    "The norms of the gradients of each step, of a plain Learner with the callbacks of a stage"
    if fp16: monkeypatch.setattr(fastai.callback.fp16, 'GradScaler', lambda _, **kw: torch.amp.GradScaler('cpu', **kw))
    torch.manual_seed(0)
    dls, note = image_dls(16), NoteNorm()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1), nn.Flatten(0))
    learn = Learner(dls, model, loss_func=nn.MSELoss(), opt_func=fastai.optimizer.SGD)
    cbs = optional_callbacks(Stage(**STAGE, accumulate=accumulate, **keys), 'f32')
    if fp16: cbs.append(LossScaling())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-9, cbs=[*cbs, note])
    return note.norms


def test_gradients_are_clipped(monkeypatch):
    plain, clipped = gradient_norms(), gradient_norms(clip=2.5)
    assert len(plain) == 4 and min(plain) > 5
    assert clipped == pytest.approx([2.5] * 4, rel=1e-4)
    assert gradient_norms(clip=1e3) == plain


def test_gradients_are_clipped_once_they_are_accumulated():
    assert any(isinstance(cb, AccumulateGradients) for cb in optional_callbacks(Stage(**STAGE, accumulate=2), 'f32'))
    assert gradient_norms(accumulate=2, clip=2.5) == pytest.approx([2.5] * 2, rel=1e-4)
    mean_of_two = gradient_norms(accumulate=2)
    assert len(mean_of_two) == 2 and max(mean_of_two) < 1e3
    assert gradient_norms(accumulate=2, clip=max(mean_of_two) * 1.01) == mean_of_two


@pytest.mark.filterwarnings('ignore:CUDA is not available')
def test_gradients_are_clipped_without_the_scale_of_the_loss(monkeypatch):
    plain, scaled = gradient_norms(), gradient_norms(monkeypatch, fp16=True)
    assert scaled == pytest.approx(plain, rel=1e-4)
    assert gradient_norms(monkeypatch, fp16=True, clip=2.5) == pytest.approx([2.5] * 4, rel=1e-4)


# A frozen body

class NoteModes(Callback):
    "Note the modules of the body that are in training mode, at each training batch"
    def __init__(self): self.in_training = []
    def before_batch(self):
        if self.training: self.in_training.append(sum(m.training for m in self.model[0].modules()))


@pytest.mark.parametrize('keys', [{}, dict(layer_decay=.5), dict(optimizer='lamb')])
@pytest.mark.parametrize('arch, size', [('test_resnet', 32), ('test_convnext', 64)])
def test_a_frozen_body_stays_as_it_is(arch, size, keys):
    stage = Stage(**STAGE | dict(arch=arch, size=size, epochs=0, freeze_epochs=2, head='avg', lr=.1) | keys)
    learn, modes = get_learner(stage, image_dls(size=size)), NoteModes()
    before = copy.deepcopy(learn.model)
    fit_stage(learn, stage, [modes, *optional_callbacks(stage, 'f32')])
    for (name, old), new in zip(before[0].state_dict().items(), learn.model[0].state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    assert largest_difference(before[1], learn.model[1]) > 1e-3
    assert modes.in_training == [0] * 6


def test_a_body_that_is_no_longer_frozen_trains():
    stage = Stage(**STAGE | dict(freeze_epochs=1))
    learn, modes = get_learner(stage, image_dls()), NoteModes()
    before = copy.deepcopy(learn.model[0])
    fit_stage(learn, stage, [modes, *optional_callbacks(stage, 'f32')])
    assert not torch.equal(before.model.bn1.running_mean, learn.model[0].model.bn1.running_mean)
    assert not torch.equal(before.model.bn1.weight, learn.model[0].model.bn1.weight)
    assert modes.in_training[:3] == [0] * 3 and min(modes.in_training[3:]) > 10


# A small transformer, from its training to its predictions

def test_a_transformer_trains_resumes_exports_and_predicts(tables, small_recipe, no_report, tmp_path, monkeypatch,
                                                           capsys):
    from aptos_fastai.cli import main
    from aptos_fastai.common.io import read_record
    from aptos_fastai.training import checkpoint
    args = ['--recipe', str(small_recipe), '--data', str(tables), '--runs', str(tmp_path / 'runs')]
    args += stage_options('arch=test_vit', 'size=64', 'head=cls', 'layer_decay=.7', 'lr_div=1', 'drop_path=.2',
                          'clip=1', 'folds=1', 'freeze_epochs=1', 'epochs=2', 'optimizer=adamw')
    args += ['--set', 'submit.final=teacher', '--set', 'submit.also=']
    real = checkpoint.Checkpoint.after_epoch

    def stop_after(self):
        real(self)
        if self.saved_epochs == 2: raise KeyboardInterrupt
    undisturbed = [*args[:5], str(tmp_path / 'undisturbed'), *args[6:]]
    main(['train', 'teacher', *undisturbed])
    monkeypatch.setattr(checkpoint.Checkpoint, 'after_epoch', stop_after)
    with pytest.raises(SystemExit): main(['train', 'teacher', *args])
    monkeypatch.undo()
    main(['all', *args])
    assert 'teacher: resumes after epoch 2 of 3' in capsys.readouterr().out
    run = tmp_path / 'runs/small'
    weights = [read_record(root / 'small/teacher/fold0/stage.json')['files']['weights.safetensors']['sha256']
               for root in (tmp_path / 'runs', tmp_path / 'undisturbed')]
    assert weights[0] == weights[1]
    with quick_exports(): main(['export', str(run)])
    main(['predict', str(run / 'bundle'), str(tables / 'test_images'), '-o', str(tmp_path / 'grades.csv')])
    predicted, scored = pd.read_csv(tmp_path / 'grades.csv'), pd.read_csv(run / 'scores.csv')
    scores = predicted.set_index(predicted.file.map(lambda file: Path(file).stem)).score[scored.id_code]
    assert np.allclose(scores, scored.score, atol=.02) and scored.score.std() > 0


def test_optimizer_and_layers_survive_a_pickle():
    learn = get_learner(Stage(**STAGE, layer_decay=.5, optimizer='lion'), image_dls())
    opt_func, splitter = pickle.loads(pickle.dumps((learn.opt_func, learn.splitter)))
    layers = splitter(learn.model)
    assert len(layers) == len(model_layers(learn.model, .5)) > 3
    assert type(opt_func(layers, lr=.1).opt).__name__ == 'Lion'
