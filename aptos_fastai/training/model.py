"The fastai Learner of a stage, with the network, loss and metric that its keys name."
import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch
from fastai.torch_core import flatten_check, to_detach
from fastai.vision.all import AccumMetric, DataLoaders, Learner, imagenet_stats
from torch import Tensor, nn

from aptos_fastai.metrics import MIDPOINTS, ScoreKappa
from aptos_fastai.recipe.sections import Stage, parse_thresholds
from aptos_fastai.recipe.values import check_choice
from aptos_fastai.training.networks import create_model
from aptos_fastai.training.optimizer import check_optimizer, create_optimizer, model_layers
from aptos_fastai.training.outputs import GradeLoss, outputs
from aptos_fastai.training.weights import load_body, load_stage_weights


def body_stats(arch: str, mean: Sequence[float] = (), std: Sequence[float] = ()) -> tuple[Sequence, Sequence]:
    """Return the mean and std of red, green and blue (0-1) that images are normalised by.

    They are the keys `mean` and `std` of a stage; where these are empty, those of timm's weights of `arch`.
    """
    cfg = timm.get_pretrained_cfg(arch)
    timms = (cfg.mean, cfg.std) if cfg else imagenet_stats
    return tuple(mean or timms[0]), tuple(std or timms[1])


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system.

    Faulting it in again cost 60 % more time a step on the CPU (tf_efficientnet_lite0, 224 px). Elsewhere: no effect.
    """
    mmap_threshold, trim_threshold = -3, -1          # mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (AttributeError, OSError, TypeError): pass      # not glibc


class QuadraticKappa(AccumMetric):
    """Quadratic weighted kappa of a network's scores, graded by `thresholds`, as a fastai metric.

    `thresholds` are four numbers, or optimal or regularised: fitted to the same scores, so that kappa is in-sample.
    `loss` says what the network puts out (see `training.outputs`): by default one unit, the score.
    """
    def __init__(self, thresholds: Sequence[float] | str = MIDPOINTS, loss: str = 'smooth_l1'):
        if isinstance(thresholds, str):
            check_choice(thresholds, ['optimal', 'regularised'], f'thresholds = {thresholds}: no such method')
        check_choice(loss, outputs, f'loss = {loss}: no such loss')
        super().__init__(ScoreKappa(thresholds), name='kappa')
        self.loss = loss

    def accum_values(self, preds: Tensor, targs: Tensor, learn: Learner | None = None) -> None:
        "Add the scores of outputs (N, units) and their grades; they stay on the device until the epoch ends"
        scores = outputs[self.loss].score(preds.reshape(len(preds), -1))
        gathered = [(learn.to_detach if learn else to_detach)(o, cpu=False) for o in (scores, targs)]
        for values, new in zip((self.preds, self.targs), flatten_check(*gathered), strict=True): values.append(new)


def stage_model(stage: Stage) -> nn.Sequential:
    "Return the network of a stage with random weights (see `create_model`). Raises `WeightsError`"
    return create_model(stage.arch, stage.head, stage.size, stage.dropout, stage.loss, stage.drop_path)


def check_optimization(stage: Stage) -> None:
    "Raise `AptosError` now if the network of `stage` cannot train with its optimizer, layers or drop path"
    check_optimizer(stage)
    if stage.layer_decay < 1 or stage.drop_path: model_layers(stage_model(stage), stage.layer_decay)


def get_learner(stage: Stage, dls: DataLoaders, weights: dict | None = None) -> Learner:
    "Return the Learner of `stage`; it starts from `weights` (a state dict, its parent's), else from `stage.weights`"
    keep_freed_memory()
    if torch.cuda.is_available(): torch.set_float32_matmul_precision('high')     # TF32
    model = stage_model(stage)
    model = model.to(memory_format=torch.channels_last)      # 1.2-1.6 x faster on the CPU
    loaded = None
    if weights is None: loaded = load_body(model, stage.arch, stage.weights)
    else: load_stage_weights(model, weights, f'init = {stage.init}')
    body: Any = model[0]
    body.loaded = loaded.record() if loaded else None        # for the record of the stage
    return model_learner(stage, dls, model)


def model_learner(stage: Stage, dls: DataLoaders, model: nn.Sequential) -> Learner:
    "Return a Learner of body and head `model`, with the loss, optimizer, layers and metric of a stage"
    return Learner(dls, model, loss_func=GradeLoss(stage.loss),
                   opt_func=partial(create_optimizer, name=stage.optimizer, sqr_mom=stage.sqr_mom, eps=stage.eps),
                   metrics=QuadraticKappa(parse_thresholds(stage.thresholds) or stage.thresholds, stage.loss),
                   splitter=partial(model_layers, layer_decay=stage.layer_decay), lr=stage.lr, wd=stage.wd,
                   wd_bn_bias=True, train_bn=False, path=dls.path)       # `Layer` says what decays
