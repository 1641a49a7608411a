"The network (timm body, GeM pooling, one output) and its fastai Learner."
import ctypes
from functools import partial

import timm
import torch
from fastai.vision.all import (
    AccumMetric,
    Adam,
    BaseLoss,
    DataLoaders,
    L,
    Learner,
    Module,
    imagenet_stats,
    params,
)
from torch import nn

from aptos_fastai.metrics import MIDPOINTS, ScoreKappa
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.training.weights import WeightsError, check_arch, load_body, load_stage_weights


class GeM(Module):
    """Generalised mean pooling (Radenović et al. 2018, arXiv:1711.02512): (mean of x^p)^(1/p) with p learned.

    (N, C, H, W) -> (N, C, 1, 1). p=1 is the mean, large p the maximum. `p` is held to 1-6: at p=8 a dead channel has
    NaN gradients. It is a float32 tensor, which lifts half-precision inputs to float32.
    """
    def __init__(self, p: float = 3., eps: float = 1e-6):
        self.p, self.eps = nn.Parameter(torch.full((1,), float(p))), eps

    def forward(self, x):
        p = self.p.clamp(1., 6.)
        return x.clamp(min=self.eps).pow(p).mean((-2, -1), keepdim=True).pow(1 / p)


class TimmBody(Module):
    "A timm network without its classifier: images (N, 3, H, W) -> feature maps (N, C, h, w)"
    def __init__(self, arch: str):
        self.model = timm.create_model(arch, pretrained=False, num_classes=0, global_pool='')

    def forward(self, x): return self.model(x)


heads = dict(gem=GeM, avg=lambda: nn.AdaptiveAvgPool2d(1))      # to add one: a line here, its name in recipe.Stage.head
losses = dict(smooth_l1=nn.SmoothL1Loss, mse=nn.MSELoss)        # to add one: a line here, its name in recipe.Stage.loss


def body_stats(arch: str) -> tuple:
    "Return mean and std of the images that timm's weights of `arch` were trained on"
    cfg = timm.get_pretrained_cfg(arch)
    return (cfg.mean, cfg.std) if cfg else imagenet_stats


def create_model(arch: str, head: str = 'gem', size: int = 256, dropout: float = 0.) -> nn.Module:
    """Create Sequential(body, head) with random weights: images (N, 3, `size`, `size`) -> scores (N, 1).

    `arch` is a timm network with feature maps, `head` one of `heads`. Raises `WeightsError`.
    """
    check_arch(arch)
    try:
        body = TimmBody(arch)
        maps = body.eval()(torch.zeros(1, 3, size, size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as e:
        raise WeightsError(f'arch = {arch}: timm cannot build it for size = {size} ({e}). Change size or arch.') from e
    if maps.ndim != 4:
        raise WeightsError(f'arch = {arch}: has no feature maps to pool. Set arch to a convolutional network.')
    body.train()
    return nn.Sequential(body, nn.Sequential(heads[head](), nn.Flatten(), nn.Dropout(dropout),
                                             nn.Linear(body.model.num_features, 1)))


def features_and_scores(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Return the pooled features (N, C) and the scores (N,) of images (N, 3, H, W), from one pass of `create_model`'s"
    body, (pool, flatten, dropout, linear) = model[0], model[1]
    features = flatten(pool(body(x)))
    return features, linear(dropout(features)).flatten()


def keep_freed_memory():
    """Let glibc keep freed memory instead of returning it to the system.

    Faulting it in again cost 60 % more time a step on the CPU (tf_efficientnet_lite0, 224 px). Elsewhere: no effect.
    """
    mmap_threshold, trim_threshold = -3, -1          # mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (AttributeError, OSError, TypeError): pass      # not glibc


def split_body_head(m: nn.Module) -> L:
    "Return the two parameter groups of a model: body, head (fastai's `splitter`)"
    return L(m[0], m[1]).map(params)


def QuadraticKappa(thresholds=MIDPOINTS) -> AccumMetric:
    """Quadratic weighted kappa of scores, graded by `thresholds`, as a fastai metric.

    `thresholds` are four numbers, or optimal or regularised: fitted to the same scores, so that kappa is in-sample.
    """
    return AccumMetric(ScoreKappa(thresholds), name='kappa')


def get_learner(stage: Stage, dls: DataLoaders, weights: dict | None = None) -> Learner:
    "Return the Learner of `stage`; it starts from `weights` (a state dict, its parent's), else from `stage.weights`"
    keep_freed_memory()
    if torch.cuda.is_available(): torch.set_float32_matmul_precision('high')     # TF32
    model = create_model(stage.arch, stage.head, stage.size, stage.dropout)
    model = model.to(memory_format=torch.channels_last)      # 1.2-1.6 x faster on the CPU
    if weights is None: load_body(model, stage.arch, stage.weights)
    else: load_stage_weights(model, weights, f'init = {stage.init}')
    # BaseLoss flattens (N, 1); PyTorch's own losses would broadcast it against (N,)
    loss = BaseLoss(losses[stage.loss], axis=-1, floatify=True, is_2d=False)
    return Learner(dls, model, loss_func=loss, opt_func=partial(Adam, sqr_mom=stage.sqr_mom, eps=stage.eps),
                   metrics=QuadraticKappa(parse_thresholds(stage.thresholds) or stage.thresholds),
                   splitter=split_body_head, lr=stage.lr, wd=stage.wd, path=dls.path)
