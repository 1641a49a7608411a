"Run a stage's network once before anything is prepared, so that it cannot fail afterwards."
from functools import cache

import torch

from aptos_fastai.common.console import say
from aptos_fastai.inference.explain import heatmap_layer, hires_cam
from aptos_fastai.recipe import Stage
from aptos_fastai.training.networks import create_model, has_signed_maps
from aptos_fastai.training.weights import WeightsError


def check_network(stage: Stage) -> None:
    """Raise `WeightsError` if the network of a stage cannot be built, run, or explained by a heat map at its size.

    Warns if its pooling drops features. Leaves the random state as it was. A network is tried once in a process.
    """
    _check_network(stage.arch, stage.head, stage.size, stage.loss)


@cache
def _check_network(arch: str, head: str, size: int, loss: str) -> None:
    "Try a network with random weights on an image of noise"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = create_model(arch, head, size, loss=loss)
        if head == 'gem' and has_signed_maps(net[0], size):
            say(f'head = gem: the feature maps of {arch} are signed, and GeM counts values below 0 as 0, about half of '
                'them. head = auto takes avg.', 'yellow')
        try: maps = hires_cam(net.eval(), torch.randn(1, 3, size, size), heatmap_layer(net))
        except Exception as e:               # every family has its own errors
            raise WeightsError(f'arch = {arch}: no heat map can be drawn at size = {size} '
                               f'({type(e).__name__}: {e}). Choose another arch.') from e
    if not maps.isfinite().all():
        raise WeightsError(f'arch = {arch}: its heat map at size = {size} is not finite. Change size or arch.')
