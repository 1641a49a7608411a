"Build DataLoaders from a table, and augment the training images."
import multiprocessing
import random
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.vision.all import (
    ColReader,
    ColSplitter,
    DataBlock,
    DataLoaders,
    IntToFloatTensor,
    Normalize,
    PILImage,
    RandTransform,
    RegressionBlock,
    TensorImage,
    ToTensor,
    Transform,
    TransformBlock,
    dispatch,
    get_grid,
)
from torch import Tensor

from aptos_fastai.common.distributed import cores, rank, world_size
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.store import read_square
from aptos_fastai.recipe import Augment, Stage


class ReadRetina(Transform):
    "Read the prepared square of an image at `size` pixels; prepare it first if the path is an original"
    def __init__(self, prep: Prep, size: int): self.prep, self.size = prep, size

    def encodes(self, path):
        im = PILImage.create(np.ascontiguousarray(read_square(path, self.prep, self.size)))
        im.key = zlib.crc32(image_id(Path(path), self.prep).encode())     # identifies the image for its random draws
        return im


def image_id(path: Path, prep: Prep) -> str:
    "Return the id of a prepared image (<id>.<hash><suffix>) or of an original (<id>.<extension>)"
    return path.name.removesuffix(prep.suffix).rpartition('.')[0] or path.name


@dataclass(frozen=True)
class AugmentParams:
    "The random augmentation of one training image, as `FundusAugment` and `BatchAugment` apply it"
    warp: np.ndarray                          # 2 x 3 affine matrix, source pixels to target pixels
    colour: np.ndarray                        # 3 x 3 matrix on RGB
    offset: float                               # times the image's mean grey: what is added to each channel
    sigma: float                              # of a 3 x 3 Gaussian blur, pixels; 0: no blur


def draw_params(aug: Augment, rng: np.random.Generator, side: int) -> AugmentParams:
    "Draw the augmentation of an image of `side` x `side` pixels from `rng`"
    warp = draw_warp(aug, rng, side)
    colour, offset = draw_colour(aug, rng)
    sigma = rng.uniform(*aug.blur_sigma) if rng.random() < aug.blur else 0.
    return AugmentParams(warp, colour, offset, sigma)


def draw_warp(aug: Augment, rng: np.random.Generator, side: int) -> np.ndarray:
    "Draw flips, shear, rotation, scale and shift: a 2 x 3 affine matrix about the centre of a square of `side` pixels"
    angle = np.deg2rad(rng.uniform(-aug.rotate, aug.rotate))
    shear = np.deg2rad(rng.uniform(-aug.shear, aug.shear))
    scale = rng.uniform(*aug.scale)
    flips = np.where(rng.random(2) < (aug.hflip, aug.vflip), -1., 1.)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * rotation @ np.array([[1, np.tan(shear)], [0, 1]]) @ np.diag(flips)
    centre = np.full(2, (side - 1) / 2)
    shift = rng.uniform(-aug.shift, aug.shift, 2) * side
    return np.c_[linear, centre - linear @ centre + shift]


_grey = np.array([.299, .587, .114])
_yiq = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])


def draw_colour(aug: Augment, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw hue, saturation, contrast and brightness: a 3 x 3 matrix on RGB, and the fraction of the mean grey to add.

    Hue turns the colour about the grey axis (in YIQ); contrast scales about the image's mean grey.
    """
    brightness, contrast, saturation = (1 + rng.uniform(-o, o) for o in (aug.brightness, aug.contrast, aug.saturation))
    angle = 2 * np.pi * rng.uniform(-aug.hue, aug.hue)
    hue = np.eye(3)
    hue[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    towards_grey = saturation * np.eye(3) + (1 - saturation) * _grey
    matrix = brightness * contrast * towards_grey @ np.linalg.inv(_yiq) @ hue @ _yiq
    return matrix, brightness * (1 - contrast)


def _draw_seed(seed: int, epoch: int | None, *which: int) -> list[int] | int:
    "Return the seed of a draw: (`seed`, `epoch`, `which`), or a random one where no epoch is set (see `set_epoch`)"
    return random.getrandbits(63) if epoch is None else [seed, epoch, *which]


class FundusAugment(RandTransform):
    """Augment a training image: one affine warp, one colour matrix and sometimes a blur.

    The draw depends on (`seed`, `epoch`, image) only, not on the number of workers. Brightness, contrast, saturation
    and hue are linear in RGB, so one matrix does them all.
    """
    order, split_idx = 2, 0                   # training images only
    def __init__(self, aug: Augment, seed: int = 0):
        super().__init__()
        self.aug, self.seed, self.epoch = aug, seed, None

    def encodes(self, im: PILImage):
        out = PILImage.create(self.apply(np.asarray(im), _draw_seed(self.seed, self.epoch, im.key)))
        out.key = im.key
        return out

    def apply(self, a: np.ndarray, seed: list[int] | int) -> np.ndarray:
        "Augment a uint8 array (side, side, 3) with the draw of `seed`"
        height, width = a.shape[:2]
        params = draw_params(self.aug, np.random.default_rng(seed), width)
        a = cv2.warpAffine(a, params.warp, (width, height), flags=cv2.INTER_LINEAR)      # fills with black
        mean_grey = cv2.mean(a)[:3] @ _grey
        a = cv2.transform(a, np.c_[params.colour, np.full(3, params.offset * mean_grey)])
        return cv2.GaussianBlur(a, (3, 3), params.sigma) if params.sigma else a


class BatchAugment(RandTransform):
    """Augment a batch on its device as `FundusAugment` does image by image: (n, 3, side, side) in 0-1, unnormalised.

    The draws depend on (`seed`, `epoch`, batch). It computes in float, where `FundusAugment` rounds to bytes.
    """
    order, split_idx = 11, 0                  # after IntToFloatTensor, before Normalize; training images only
    def __init__(self, aug: Augment, seed: int = 0):
        super().__init__()
        self.aug, self.seed, self.epoch, self.batch = aug, seed, None, 0

    def encodes(self, x: TensorImage):
        which = [self.batch, rank()] if rank() > 0 else [self.batch]
        rng = np.random.default_rng(_draw_seed(self.seed, self.epoch, *which))
        self.batch += 1
        side = x.shape[-1]
        params = [draw_params(self.aug, rng, side) for _ in x]

        def on_device(o): return torch.tensor(np.array(o), dtype=torch.float32).to(x.device, non_blocking=True)
        a = _warp(x.as_subclass(Tensor), on_device([_affine_theta(p.warp, side) for p in params]))
        mean_grey = torch.einsum('nchw,c->n', a, on_device(_grey)) / a[0, 0].numel()
        offset = on_device([p.offset for p in params]) * mean_grey
        a = torch.einsum('nij,njhw->nihw', on_device([p.colour for p in params]), a) + offset[:, None, None, None]
        neighbour = [np.exp(-.5 / p.sigma ** 2) if p.sigma else 0. for p in params]
        return TensorImage(_blur3(a.clamp(0, 1), on_device(neighbour)))


def _affine_theta(warp: np.ndarray, side: int) -> np.ndarray:
    "Convert `warp` (pixels, source to target) to `affine_grid`'s theta: target to source, image edges at -1 and 1"
    to_unit = np.array([[2 / side, 0, 1 / side - 1], [0, 2 / side, 1 / side - 1], [0, 0, 1]])
    return (to_unit @ np.linalg.inv(np.r_[warp, [[0, 0, 1]]]) @ np.linalg.inv(to_unit))[:2]


def _warp(x: Tensor, theta: Tensor) -> Tensor:
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def _blur3(x: Tensor, neighbour: Tensor) -> Tensor:
    """Blur each image by its own 3 x 3 Gaussian: `neighbour` (n,) is a neighbour's weight relative to the middle.

    The border is reflected without its edge, as in OpenCV.
    """
    total = (1 + 2 * neighbour)[:, None, None, None]
    neighbour_weight, middle_weight = neighbour[:, None, None, None] / total, 1 / total
    p = F.pad(x, (1, 1, 1, 1), 'reflect')
    p = middle_weight * p[..., 1:-1] + neighbour_weight * (p[..., :-2] + p[..., 2:])
    return middle_weight * p[..., 1:-1, :] + neighbour_weight * (p[..., :-2, :] + p[..., 2:, :])


def loader_workers(stage: Stage) -> int:
    """Return how many processes load images: `stage.workers`, or for -1 a number that suits the device.

    With a GPU up to 8. On the CPU the network needs the cores: one process per 8 cores, none below 4 cores.
    """
    if stage.workers >= 0: return stage.workers
    if torch.cuda.is_available(): return min(8, cores())
    return -(-cores() // 8) if cores() >= 4 else 0


def start_workers_by_fork() -> None:
    """Start DataLoader workers by fork on Linux, unless the user has chosen another start method.

    Python 3.14 starts them by forkserver: each imports fastai again for each epoch, which takes seconds.
    """
    if sys.platform == 'linux' and multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method('fork')


def get_dls(frame: pd.DataFrame, stage: Stage, prep: Prep, aug: Augment, stats: tuple, *, seed: int = 42,
            path='.') -> DataLoaders:
    """Return DataLoaders of `frame` (columns stored, diagnosis, valid and, with `source_weights`, weight).

    `stats` are the mean and std to normalise with: those of the body's pretraining. Training images are augmented
    one by one by the workers, or in batches on the device: [augment] mode.
    """
    start_workers_by_fork()
    cuda = torch.cuda.is_available()
    on_batch = dict(auto=cuda, image=False, batch=True)[aug.mode]
    item_augment = [] if on_batch else [FundusAugment(aug, seed)]
    batch_augment = [BatchAugment(aug, seed)] if on_batch else []
    block = DataBlock(
        blocks=(TransformBlock(type_tfms=ReadRetina(prep, stage.size)), RegressionBlock()),
        get_x=ColReader('stored'), get_y=ColReader('diagnosis'), splitter=ColSplitter('valid'),
        item_tfms=[*item_augment, ToTensor()],
        batch_tfms=[IntToFloatTensor(), *batch_augment, Normalize.from_stats(*stats, cuda=cuda)])
    dataloaders = block.dataloaders
    if stage.source_weights: dataloaders = partial(block.weighted_dataloaders, wgts=frame.weight.to_numpy())
    bs = stage.bs // world_size()                  # per process
    return dataloaders(frame, bs=bs, val_bs=2 * bs, num_workers=loader_workers(stage), path=path, pin_memory=cuda)


def set_epoch(dl, epoch: int | None):
    "Seed the augmentation of a DataLoader by the number of the epoch; None: draw at random, as fastai's transforms do"
    for t in [*dl.after_item.fs, *dl.after_batch.fs]:
        if isinstance(t, (FundusAugment, BatchAugment)): t.epoch, t.batch = epoch, 0


@dispatch
def show_results(x: TensorImage, y: Tensor, samples, outs, ctxs=None, max_n=6, nrows=None, ncols=None, figsize=None,
                 **kwargs):
    """Show images with their grade and score, for `learn.show_results()`.

    fastai's own method for regression on images fails with its present dispatch (plum).
    """
    n = min(len(samples), max_n)
    if ctxs is None: ctxs = get_grid(n, nrows=nrows, ncols=ncols, figsize=figsize)
    for ax, sample, out in zip(ctxs, samples[:n], outs[:n], strict=False):
        image, grade = sample[:2]
        image.show(ctx=ax, title=f'grade {float(grade):.0f}, score {np.ravel(out[0])[0]:.2f}', **kwargs)
    return ctxs
