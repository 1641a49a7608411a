"Optimizers by name, learning rates by layer, and which parameters decay."
import inspect
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import fastai.optimizer
import timm.optim
import torch
from fastai.optimizer import Optimizer, OptimWrapper
from fastai.torch_core import to_device
from fastcore.foundation import L
from timm.models import group_parameters
from torch import nn

from aptos_fastai.common.io import AptosError
from aptos_fastai.recipe.sections import Stage

FASTAI = {f.__name__.lower(): f for f in (fastai.optimizer.Lamb, fastai.optimizer.Larc, fastai.optimizer.QHAdam)}
RMSPROP = torch.optim.RMSprop, timm.optim.RMSpropTF          # their `alpha` is adam's second beta; another's is not
DECOUPLED = 'decoupled_weight_decay', 'decoupled_decay', 'decoupled'         # how options of optimizers are called
WITHOUT_DECAY = torch.optim.Rprop,
MOMENTUM = .9                                # until a schedule sets another one


@dataclass
class Layer:
    "Parameters that train at one rate, with and without weight decay; `depth`: how many layers lie above, the head's 0"
    depth: int
    decayed: list[nn.Parameter] = field(default_factory=list)
    undecayed: list[nn.Parameter] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        "All of them"
        return [*self.decayed, *self.undecayed]


# Layers

def model_layers(model: nn.Sequential, layer_decay: float = 1.) -> L:
    """Return the layers of `create_model`'s network, the head last (fastai's `splitter`).

    With `layer_decay` below 1 they are timm's, else body and head. Biases, the parameters of normalisations and others
    of one dimension, and those that timm names (position embeddings, class tokens) do not decay.
    """
    body, head = model
    net = getattr(body, 'model', body)
    number, last = layer_numbers(net) if layer_decay < 1 else ({}, 1)
    layers, head_layer = [Layer(depth) for depth in range(last, -1, -1)], Layer(0)
    spared = {p for name, p in net.named_parameters() if name in getattr(net, 'no_weight_decay', set)()}
    placed = [(layers[number.get(name, 0)], p) for name, p in net.named_parameters()]
    for layer, p in [*placed, *((head_layer, p) for p in head.parameters())]:
        (layer.undecayed if p.ndim <= 1 or p in spared else layer.decayed).append(p)
    return L([*(layer for layer in layers if layer.parameters), head_layer])


class _WithClassifier:
    "The parameters of a timm network and one of its classifier, which it is built without"
    def __init__(self, net: nn.Module):
        self.net, self.pretrained_cfg = net, getattr(net, 'pretrained_cfg', None) or {}
        prefix = self.pretrained_cfg.get('classifier') or 'classifier'
        self.name = f'{prefix if isinstance(prefix, str) else prefix[0]}.weight'

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        "Yield the names and parameters, None for the classifier"
        yield from self.net.named_parameters()
        yield self.name, None


def layer_numbers(net: nn.Module) -> tuple[dict[str, int], int]:
    """Return timm's number of the layer of each parameter of a network without classifier, and the classifier's.

    0 is the layer of the input, the classifier's is the highest; a few parameters, as a last normalisation, share it.
    Where timm has no `group_matcher`, 12 tensors each are a layer. Raises `AptosError` if timm knows no layers of it.
    """
    model: Any = _WithClassifier(net)        # as much of a network as timm reads here
    matcher: Any = getattr(net, 'group_matcher', None)
    if matcher: numbers = group_parameters(model, matcher(coarse=False), reverse=True)
    else: numbers = timm.optim.auto_group_layers(model)
    last = numbers.pop(model.name)
    if last > 0: return numbers, last
    name = model.pretrained_cfg.get('architecture', type(net).__name__)
    raise AptosError(f'layer_decay: timm knows no layers of {name}. Set layer_decay = 1; lr_div '
                     'lowers the rate of the whole body.')


def layer_rates(stage: Stage, layers: Iterable[Layer]) -> list[float]:
    "Return the maximum learning rate of each layer of a stage: `lr` for the head"
    if stage.layer_decay < 1: return [stage.lr * stage.layer_decay ** layer.depth for layer in layers]
    return [stage.lr / stage.lr_div if layer.depth else stage.lr for layer in layers]


# Optimizers

class TorchOptimizer(OptimWrapper):
    """An optimizer of PyTorch for fastai, whose parameter groups are `layers`.

    PyTorch gets two groups of each layer, with and without weight decay. Settings that the optimizer does not have, as
    a momentum to schedule, are left out.
    """
    def __init__(self, layers: Iterable[Layer], opt: Any):
        groups, self.layer_of, self.layers = [], [], list(layers)
        for i, layer in enumerate(self.layers):
            for params, decays in ((layer.decayed, True), (layer.undecayed, False)):
                if not params: continue
                groups.append(dict(params=params) if decays else dict(params=params, weight_decay=0.))
                self.layer_of.append((i, decays))
        super().__init__(groups, opt, convert_groups=False)

    @property
    def param_lists(self) -> L:
        "The parameters of each layer"
        return L(L(layer.parameters) for layer in self.layers)

    @property
    def hypers(self) -> L:
        "The settings of each layer, by fastai's names"
        of_groups = super().hypers
        found: list[dict] = [{} for _ in self.layers]
        for (i, decays), hyper in zip(self.layer_of, of_groups, strict=True):
            if decays or not found[i]: found[i] = hyper
        return L(found)

    def set_hyper(self, k: str, v: Any) -> None:
        "Set `k` to `v`: a number, one for each layer, or fastai's slice"
        if self.bwd_map.get(k, k).partition('__')[0] in self.opt.param_groups[0]: super().set_hyper(k, v)

    def _set_hyper(self, k: str, v: Sequence[float]) -> None:
        for (i, decays), group in zip(self.layer_of, self.opt.param_groups, strict=True):
            if k == 'wd' and not decays: continue
            fastai.optimizer.set_item_pg(group, self.bwd_map[k], float(v[i]))


def optimizer_class(name: str) -> Any:
    """Return the class or function that the key `optimizer` names: of torch.optim, of fastai, or of timm.optim.

    Raises `AptosError`, which names similar ones.
    """
    if name == 'adam': return torch.optim.AdamW          # decoupled weight decay, as fastai's own
    known = optimizer_names()
    if name in known: return known[name]
    text = name.lower()
    similar = get_close_matches(text, known, 5, .5) or ['adam', 'sgd', 'lion']
    similar.sort(key=lambda o: not (o.startswith(text) or text.startswith(o)))
    raise AptosError(f'optimizer = {name}: no such optimizer. Did you mean: {", ".join(similar)}?')


def optimizer_names() -> dict[str, Any]:
    "Return the optimizers by their names in lower case"
    def of(module: ModuleType) -> dict[str, Any]:
        classes = {n.lower(): o for n, o in vars(module).items() if isinstance(o, type)}
        return {n: o for n, o in classes.items() if issubclass(o, torch.optim.Optimizer) and n != 'optimizer'}
    return {**of(timm.optim), **FASTAI, **of(torch.optim)}


def create_optimizer(layers: Sequence[Layer], lr: float, *, name: str = 'adam', sqr_mom: float = .99,
                     eps: float = 1e-5) -> Optimizer | TorchOptimizer:
    """Return the optimizer `name` for `layers` (fastai's `opt_func`); `wd` comes with the fit. Raises `AptosError`.

    `sqr_mom` and `eps` are set where it has them. Weight decay is decoupled where it can be. PyTorch's own run fused
    where they can: one operation for all tensors.
    """
    found = optimizer_class(name)
    has = inspect.signature(found).parameters
    if found in FASTAI.values():
        opt = found([o.parameters for o in layers], lr=lr, **_known(has, mom=MOMENTUM, sqr_mom=sqr_mom, eps=eps))
        for p in (p for layer in layers for p in layer.undecayed): opt.state[p]['do_wd'] = False
        return opt
    settings = _known(has, momentum=MOMENTUM, fused=True, **dict.fromkeys(DECOUPLED, True))
    if found in RMSPROP: settings['alpha'] = sqr_mom
    if 'betas' in has and len(has['betas'].default) == 2: settings['betas'] = (MOMENTUM, sqr_mom)
    if 'eps' in has and isinstance(has['eps'].default, float): settings['eps'] = eps
    return TorchOptimizer(layers, partial(found, lr=lr, **settings))


def _known(has: Collection[str], **settings: Any) -> dict:
    "Return those of `settings` that a signature has"
    return {k: v for k, v in settings.items() if k in has}


def check_optimizer(stage: Stage) -> None:
    "Raise `AptosError` now if the optimizer of a stage cannot train networks: it takes two steps of a small one"
    if stage.wd and optimizer_class(stage.optimizer) in WITHOUT_DECAY:
        raise AptosError(f'optimizer = {stage.optimizer}: has no weight decay. Set wd = 0, or optimizer = adam.')
    weight, bias = nn.Parameter(torch.ones(2, 2, 1, 1)), nn.Parameter(torch.zeros(2))
    try:
        opt = create_optimizer([Layer(0, [weight], [bias])], lr=.01, name=stage.optimizer)
        for _ in range(2):
            ((weight.sum() + bias).pow(2)).sum().backward()
            opt.set_hypers(lr=.01, wd=.01, mom=.9)
            opt.step()
            opt.zero_grad()
        buffer = io.BytesIO()
        torch.save(optimizer_state(opt), buffer)
        load_optimizer_state(opt, torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), torch.device('cpu'))
    except Exception as e:                   # each optimizer has its own errors
        reason = (str(e).splitlines() or [type(e).__name__])[0].rstrip('.')
        raise AptosError(f'optimizer = {stage.optimizer}: cannot train a network ({reason}). Set optimizer = adam or '
                         'another one.') from None


# Checkpoints

def optimizer_state(opt: Any) -> dict:
    "Return the state of an optimizer in plain types and tensors, which `torch.load(weights_only=True)` accepts"
    state = opt.state_dict()
    if isinstance(opt, TorchOptimizer): return state
    return dict(state=[dict(s) for s in state['state']],
                hypers=[{k: float(v) for k, v in group.items()} for group in state['hypers']])


def load_optimizer_state(opt: Any, state: dict, device: torch.device) -> None:
    "Restore what `optimizer_state` returned; the parameters are on `device`"
    if isinstance(opt, TorchOptimizer): opt.load_state_dict(state)
    else: opt.load_state_dict(dict(state=to_device(state['state'], device), hypers=L(state['hypers'])))
