"Frame -> DataBlock -> DataLoaders; what is drawn for a training picture."
import os
import zlib

import cv2
import numpy as np
import pandas as pd
from fastai.vision.all import *

from aptos_fastai.config import Augment, Stage
from aptos_fastai.images import Prep, read_square


class ReadRetina(Transform):
    "A path -> the retina's square of `size` pixels: read from the store, or prepared on the way from an original"
    def __init__(self, prep: Prep, size: int): self.prep, self.size = prep, size
    def encodes(self, o):
        im = PILImage.create(np.ascontiguousarray(read_square(o, self.prep, self.size)))
        im.key = zlib.crc32(Path(o).name.split('.')[0].encode())
        return im


class FundusAugment(RandTransform):
    """One affine warp, one colour matrix and at times a blur, drawn from (`seed`, `epoch`, picture): the same whatever the number of workers.

    Only for training pictures. Brightness, contrast, saturation and hue are linear in RGB, so that they are one 3 x 4 matrix.
    """
    order, split_idx = 2, 0
    def __init__(self, aug: Augment, seed: int = 0):
        super().__init__()
        self.aug, self.seed, self.epoch = aug, seed, 0

    def encodes(self, im: PILImage):
        rng = np.random.default_rng([self.seed, self.epoch, im.key])
        a = np.asarray(im)
        h, w = a.shape[:2]
        a = cv2.warpAffine(a, draw_warp(self.aug, rng, w), (w, h), flags=cv2.INTER_LINEAR)   # black where nothing was
        a = cv2.transform(a, draw_colour(self.aug, rng, a))
        if rng.random() < self.aug.blur: a = cv2.GaussianBlur(a, (3, 3), rng.uniform(*self.aug.blur_sigma))
        out = PILImage.create(a)
        out.key = im.key
        return out


def draw_warp(aug: Augment, rng: np.random.Generator, side: int) -> np.ndarray:
    "2 x 3 affine matrix about the centre of a square of `side` pixels: flips, shear, rotation, scale, shift"
    t, sh, k = np.deg2rad(rng.uniform(-aug.rotate, aug.rotate)), np.deg2rad(rng.uniform(-aug.shear, aug.shear)), rng.uniform(*aug.scale)
    flip = np.where(rng.random(2) < (aug.hflip, aug.vflip), -1., 1.)
    m = k * np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) @ np.array([[1, np.tan(sh)], [0, 1]]) @ np.diag(flip)
    c = np.full(2, (side - 1) / 2)
    return np.c_[m, c - m @ c + rng.uniform(-aug.shift, aug.shift, 2) * side]


_grey = np.array([.299, .587, .114])
_yiq = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])


def draw_colour(aug: Augment, rng: np.random.Generator, im: np.ndarray) -> np.ndarray:
    "3 x 4 matrix on RGB bytes: hue (turn about the grey axis), saturation, contrast about the picture's mean grey, brightness"
    b, c, s = (1 + rng.uniform(-o, o) for o in (aug.brightness, aug.contrast, aug.saturation))
    t = 2 * np.pi * rng.uniform(-aug.hue, aug.hue)
    turn = np.eye(3); turn[1:, 1:] = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
    m = (s * np.eye(3) + (1 - s) * _grey) @ np.linalg.inv(_yiq) @ turn @ _yiq
    mean = cv2.mean(im)[:3] @ _grey
    return b * np.c_[c * m, np.full(3, (1 - c) * mean)]


def loader_workers(stage: Stage) -> int:
    "`workers`, or where that is -1: none on the CPU, whose cores the network has; up to 8 beside a GPU"
    if stage.workers >= 0: return stage.workers
    return min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0


def get_dls(frame: pd.DataFrame, stage: Stage, prep: Prep, aug: Augment, stats: tuple, *, seed: int = 42, path='.') -> DataLoaders:
    "DataLoaders of `frame` (columns stored, diagnosis, valid); `stats` are the mean and std that the body was trained with"
    block = DataBlock(blocks=(TransformBlock(type_tfms=ReadRetina(prep, stage.size)), RegressionBlock()),
                      get_x=ColReader('stored'), get_y=ColReader('diagnosis'), splitter=ColSplitter('valid'),
                      item_tfms=[FundusAugment(aug, seed), ToTensor()],
                      batch_tfms=[IntToFloatTensor(), Normalize.from_stats(*stats, cuda=torch.cuda.is_available())])
    return block.dataloaders(frame, bs=stage.bs, val_bs=2 * stage.bs, num_workers=loader_workers(stage), path=path)


def augment_of(dl) -> FundusAugment:
    "The augmentation of a DataLoader"
    return next(t for t in dl.after_item.fs if isinstance(t, FundusAugment))
