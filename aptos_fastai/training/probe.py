"Train the head of a network alone on features that its frozen body gave once."
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.data import WeightedDL
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn

from aptos_fastai.common.distributed import world_size
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.training.model import model_learner


class FeatureRows:
    "Pooled features (n, views, C) of images and their grades (n,), as a dataset: an item is a view of an image"
    def __init__(self, features: np.ndarray, grades: np.ndarray):
        self.features, self.grades = torch.from_numpy(features), torch.tensor(grades, dtype=torch.float32)
        self.view = [0] * len(features)

    def __len__(self) -> int: return len(self.features)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[i, self.view[i]], self.grades[i]


class ViewsDL(TfmdDL):
    "A DataLoader of `FeatureRows` that draws a view of each image before each epoch, with its own generator"
    def before_iter(self) -> None:
        super().before_iter()
        n, views, _ = self.dataset.features.shape
        if views > 1: self.dataset.view = self.rng.choices(range(views), k=n)


class WeightedViewsDL(ViewsDL, WeightedDL):
    "The same with sampling weights `wgts` (n,)"


def feature_dls(stage: Stage, train: FeatureRows, valid: FeatureRows, device: torch.device, path: Path,
                weights: np.ndarray | None = None) -> DataLoaders:
    """Return DataLoaders of features; `weights` (n,) are the sampling weights of the training images.

    Validation is on the first view.
    """
    bs = stage.bs // world_size()
    train_class = ViewsDL if weights is None else partial(WeightedViewsDL, wgts=weights)
    train_dl = train_class(dataset=train, bs=bs, shuffle=True, drop_last=True, num_workers=0, device=device)
    valid_dl = TfmdDL(dataset=valid, bs=2 * bs, num_workers=0, device=device)
    return DataLoaders(train_dl, valid_dl, path=path, device=device)


def head_stage(stage: Stage) -> Stage:
    "Return the stage as the head alone trains: it is the whole network"
    return replace(stage, epochs=stage.freeze_epochs, freeze_epochs=0, layer_decay=1., lr_div=1., precision='f32')


def probe_learner(stage: Stage, dls: DataLoaders, head: nn.Sequential) -> Learner:
    """Return the Learner of features (N, C) that trains dropout and output of `head` (see `GradeHead`) in place.

    Its weights have the names that they have in the whole network.
    """
    _, _, dropout, linear = head
    outputs = nn.Sequential(nn.Identity(), nn.Identity(), dropout, linear)
    return model_learner(head_stage(stage), dls, nn.Sequential(nn.Identity(), outputs))
