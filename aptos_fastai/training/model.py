"The network: a timm body, GeM, one unit; and its fastai Learner."
import ctypes

import timm
from fastai.vision.all import *

from aptos_fastai.metrics import MIDPOINTS, ScoreKappa
from aptos_fastai.recipe import Stage, parse_thresholds
from aptos_fastai.training.weights import WeightsError, check_arch, load_body, load_parent


class GeM(Module):
    """Generalised mean pooling (Radenović et al. 2018, arXiv:1711.02512): (mean of x^p)^(1/p), p learned; p=1 is the mean, large p the maximum.

    (N, C, H, W) -> (N, C, 1, 1). `p` is a float32 tensor, which lifts half inputs to float32, and is held to 1-6: at p=8 a dead channel gives nan gradients.
    """
    def __init__(self, p: float = 3., eps: float = 1e-6): self.p, self.eps = nn.Parameter(torch.full((1,), float(p))), eps
    def forward(self, x):
        p = self.p.clamp(1., 6.)
        return x.clamp(min=self.eps).pow(p).mean((-2, -1), keepdim=True).pow(1 / p)


class TimmMaps(Module):
    "A timm network without its classifier: (N, 3, H, W) -> (N, C, h, w)"
    def __init__(self, arch: str): self.model = timm.create_model(arch, pretrained=False, num_classes=0, global_pool='')
    def forward(self, x): return self.model(x)


heads = dict(gem=GeM, avg=lambda: nn.AdaptiveAvgPool2d(1))      # to add a head: a line here, and its name in config.Stage.head


def body_stats(arch: str) -> tuple:
    "Mean and std of the images that timm's weights of `arch` were trained on"
    cfg = timm.get_pretrained_cfg(arch)
    return (cfg.mean, cfg.std) if cfg else imagenet_stats


def create_model(stage: Stage) -> nn.Module:
    "Sequential(body, head) with random weights: (N, 3, H, W) -> (N, 1)"
    check_arch(stage.arch)
    try:
        body = TimmMaps(stage.arch)
        maps = body.eval()(torch.zeros(1, 3, stage.size, stage.size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as e:
        raise WeightsError(f'arch = {stage.arch}: cannot be built for size = {stage.size} ({e})') from None
    if maps.ndim != 4: raise WeightsError(f'arch = {stage.arch}: gives no feature maps to pool; choose a convolutional network')
    body.train()
    head = nn.Sequential(heads[stage.head](), nn.Flatten(), nn.Dropout(stage.dropout), nn.Linear(body.model.num_features, 1))
    return nn.Sequential(body, head)


def keep_freed_memory():
    "Tells glibc to keep what a step frees: giving it back and faulting it in again cost 60 % more time a step on the CPU (lite0, 224 px)"
    try: ctypes.CDLL(None).mallopt(-3, 1 << 30), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)     # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError): pass      # not glibc


losses = dict(smooth_l1=nn.SmoothL1Loss, mse=nn.MSELoss)


def split_body_head(m: nn.Module) -> L:
    "The two parameter groups: body, head"
    return L(m[0], m[1]).map(params)


def get_learner(stage: Stage, dls: DataLoaders, *, weights: dict | None = None) -> Learner:
    "The Learner of `stage` on `dls`: its parent's `weights` (a state dict), else those that `stage.weights` names"
    keep_freed_memory()
    if torch.cuda.is_available(): torch.set_float32_matmul_precision('high')     # TF32
    model = create_model(stage).to(memory_format=torch.channels_last)      # 1.2-1.6 times as fast on the CPU
    if weights is None: load_body(model, stage)
    else: load_parent(model, weights, f'init = {stage.init}')
    metric = AccumMetric(ScoreKappa(parse_thresholds(stage.thresholds) or MIDPOINTS), name='kappa')
    loss = BaseLoss(losses[stage.loss], axis=-1, floatify=True, is_2d=False)      # flattens (N, 1): PyTorch's own would broadcast against (N,)
    return Learner(dls, model, loss_func=loss, opt_func=partial(Adam, sqr_mom=stage.sqr_mom, eps=stage.eps), metrics=metric,
                   splitter=split_body_head, lr=stage.lr, wd=stage.wd, path=dls.path)
