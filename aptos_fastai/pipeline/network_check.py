"Run a stage's network once before anything is prepared, so that it cannot fail afterwards."
import warnings
from functools import cache

import torch
from torch import nn

from aptos_fastai.common.console import say
from aptos_fastai.inference.explain import heatmap_layer, hires_cam
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.training.networks import build_without_values, create_model, has_signed_maps
from aptos_fastai.training.weights import STAGE_BODY, WeightsError, load_stage_weights


def check_network(stage: Stage) -> None:
    """Raise `WeightsError` if the network of a stage cannot be built, run, or explained by a heat map at its size.

    Warns if its pooling drops features. Leaves the random state as it was. A network is tried once in a process.
    """
    drops_features = _check_network(stage.arch, stage.head, stage.size, stage.loss)
    if drops_features:
        say(f'[stage.{stage.name}] head = gem: the feature maps of {stage.arch} are signed, and GeM counts values '
            'below 0 as 0, about half of them. Set head = auto.', 'yellow')


@cache
def _check_network(arch: str, head: str, size: int, loss: str) -> bool:
    "Try a network with random weights on an image of noise; return whether its pooling drops features"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = create_model(arch, head, size, loss=loss)
        drops_features = head == 'gem' and has_signed_maps(net[0], size)
        try: maps = hires_cam(net.eval(), torch.randn(1, 3, size, size), heatmap_layer(net))
        except Exception as e:               # every family has its own errors
            raise WeightsError(f'arch = {arch}: no heat map can be drawn at size = {size} '
                               f'({type(e).__name__}: {e}). Choose another arch.') from e
    if not maps.isfinite().all():
        raise WeightsError(f'arch = {arch}: its heat map at size = {size} is not finite. Change size or arch.')
    return drops_features


def check_init(stage: Stage, parent: Stage) -> None:
    "Raise `WeightsError` if the weights of a parent of another size cannot be resampled to the size of a stage"
    if stage.size == parent.size: return
    reason = _resampling_problem(stage.arch, parent.size, stage.size)
    if reason:
        raise WeightsError(f'init = {parent.name}: weights of {stage.arch} trained at size = {parent.size} do not fit '
                           f'size = {stage.size} ({reason}). Set one size for both stages, or choose another arch.')


@cache
def _resampling_problem(arch: str, old: int, new: int) -> str:
    """Return why weights of one size do not load into a network of another size; an empty string if they do.

    Neither network has values: that is quick and takes no memory.
    """
    body = nn.Module()
    before, body.model = build_without_values(arch, old), build_without_values(arch, new)
    tensors = {f'{STAGE_BODY}{name}': torch.zeros(()).expand(t.shape) for name, t in before.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                            # of PyTorch: nothing is copied
        try: load_stage_weights(nn.Sequential(body), tensors, 'init')
        except WeightsError as e: return str(e).partition('(')[2].partition(': ')[2].partition('. Set')[0]
    return ''
