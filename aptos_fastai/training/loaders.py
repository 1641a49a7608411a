"Frame -> DataBlock -> DataLoaders; what is drawn for a training image."
import zlib
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd
from fastai.vision.all import *

from aptos_fastai.common.distributed import cores, rank, world_size
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.store import read_square
from aptos_fastai.recipe import Augment, Stage


class ReadRetina(Transform):
    "A path -> the retina's square of `size` pixels: read from the store, or prepared on the way from an original"
    def __init__(self, prep: Prep, size: int): self.prep, self.size = prep, size
    def encodes(self, o):
        im = PILImage.create(np.ascontiguousarray(read_square(o, self.prep, self.size)))
        im.key = zlib.crc32(Path(o).name.split('.')[0].encode())
        return im


@dataclass(frozen=True)
class Draw:
    "What is done to one training image: both paths draw it here, `FundusAugment` one by one, `BatchAugment` a batch at a time"
    warp: np.ndarray                          # 2 x 3, pixels to pixels
    colour: np.ndarray                        # 3 x 3 on RGB
    lift: float                               # times the image's mean grey, added to each channel
    sigma: float                              # of a 3 x 3 Gaussian blur, pixels; 0: none


def draw(aug: Augment, rng: np.random.Generator, side: int) -> Draw:
    "What is done to the next training image of `side` pixels, drawn from `rng`"
    return Draw(draw_warp(aug, rng, side), *draw_colour(aug, rng), rng.uniform(*aug.blur_sigma) if rng.random() < aug.blur else 0.)


def draw_warp(aug: Augment, rng: np.random.Generator, side: int) -> np.ndarray:
    "2 x 3 affine matrix about the centre of a square of `side` pixels: flips, shear, rotation, scale, shift"
    t, sh, k = np.deg2rad(rng.uniform(-aug.rotate, aug.rotate)), np.deg2rad(rng.uniform(-aug.shear, aug.shear)), rng.uniform(*aug.scale)
    flip = np.where(rng.random(2) < (aug.hflip, aug.vflip), -1., 1.)
    m = k * np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) @ np.array([[1, np.tan(sh)], [0, 1]]) @ np.diag(flip)
    c = np.full(2, (side - 1) / 2)
    return np.c_[m, c - m @ c + rng.uniform(-aug.shift, aug.shift, 2) * side]


_grey = np.array([.299, .587, .114])
_yiq = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])


def draw_colour(aug: Augment, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    "3 x 3 matrix on RGB and how much of the mean grey is added: hue (turn about the grey axis), saturation, contrast about the mean grey, brightness"
    b, c, s = (1 + rng.uniform(-o, o) for o in (aug.brightness, aug.contrast, aug.saturation))
    t = 2 * np.pi * rng.uniform(-aug.hue, aug.hue)
    turn = np.eye(3); turn[1:, 1:] = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
    return b * c * (s * np.eye(3) + (1 - s) * _grey) @ np.linalg.inv(_yiq) @ turn @ _yiq, b * (1 - c)


def _seed(seed: int, epoch: int | None, *what: int) -> list[int] | int:
    "What a draw depends on; outside a stage's training, where no epoch is counted (`start_epoch`), on chance, as fastai's own transforms"
    return random.getrandbits(63) if epoch is None else [seed, epoch, *what]


class FundusAugment(RandTransform):
    """One affine warp, one colour matrix and at times a blur, drawn from (`seed`, `epoch`, image): the same whatever the number of workers.

    Only for training images. Brightness, contrast, saturation and hue are linear in RGB, so that they are one matrix.
    """
    order, split_idx = 2, 0
    def __init__(self, aug: Augment, seed: int = 0):
        super().__init__()
        self.aug, self.seed, self.epoch = aug, seed, None

    def encodes(self, im: PILImage):
        out = PILImage.create(self.apply(np.asarray(im), _seed(self.seed, self.epoch, im.key)))
        out.key = im.key
        return out

    def apply(self, a: np.ndarray, seed: list[int] | int) -> np.ndarray:
        "uint8 (side, side, 3) -> the same, as drawn from `seed`"
        h, w = a.shape[:2]
        d = draw(self.aug, np.random.default_rng(seed), w)
        a = cv2.warpAffine(a, d.warp, (w, h), flags=cv2.INTER_LINEAR)      # black where nothing was
        a = cv2.transform(a, np.c_[d.colour, np.full(3, d.lift * (cv2.mean(a)[:3] @ _grey))])
        return cv2.GaussianBlur(a, (3, 3), d.sigma) if d.sigma else a


class BatchAugment(RandTransform):
    """`FundusAugment` for a batch on its device, (n, 3, side, side) in 0-1 before `Normalize`: the same draws, from (`seed`, `epoch`, batch).

    Float throughout, where the image path rounds to bytes.
    """
    order, split_idx = 11, 0                  # after IntToFloatTensor
    def __init__(self, aug: Augment, seed: int = 0):
        super().__init__()
        self.aug, self.seed, self.epoch, self.batch = aug, seed, None, 0

    def encodes(self, x: TensorImage):
        rng = np.random.default_rng(_seed(self.seed, self.epoch, self.batch, *([rank()] if rank() else [])))
        self.batch += 1
        ds = [draw(self.aug, rng, x.shape[-1]) for _ in x]
        def put(o): return torch.tensor(np.array(o), dtype=torch.float32).to(x.device, non_blocking=True)
        a = _warp(x.as_subclass(torch.Tensor), put([_theta(d.warp, x.shape[-1]) for d in ds]))
        grey = torch.einsum('nchw,c->n', a, put(_grey)) / a[0, 0].numel()
        a = torch.einsum('nij,njhw->nihw', put([d.colour for d in ds]), a) + (put([d.lift for d in ds]) * grey)[:, None, None, None]
        return TensorImage(_blur3(a.clamp(0, 1), put([np.exp(-.5 / d.sigma ** 2) if d.sigma else 0. for d in ds])))


def _theta(warp: np.ndarray, side: int) -> np.ndarray:
    "`warp` (pixels, source to target) as `affine_grid` wants it: target to source, pixel edges at -1 and 1"
    unit = np.array([[2 / side, 0, 1 / side - 1], [0, 2 / side, 1 / side - 1], [0, 0, 1]])
    return (unit @ np.linalg.inv(np.r_[warp, [[0, 0, 1]]]) @ np.linalg.inv(unit))[:2]


def _warp(x: Tensor, theta: Tensor) -> Tensor:
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


def _blur3(x: Tensor, g: Tensor) -> Tensor:
    "3 x 3 Gaussian of each image, `g` the weight of a neighbour against the middle; OpenCV's border (reflected without its edge)"
    side, mid = (o[:, None, None, None] for o in (g / (1 + 2 * g), 1 / (1 + 2 * g)))
    p = F.pad(x, (1, 1, 1, 1), 'reflect')
    p = mid * p[..., 1:-1] + side * (p[..., :-2] + p[..., 2:])
    return mid * p[..., 1:-1, :] + side * (p[..., :-2, :] + p[..., 2:, :])


def loader_workers(stage: Stage) -> int:
    "`workers`, or where that is -1: up to 8 beside a GPU; on the CPU, whose cores the network has, one for 8 of them, none below 4"
    if stage.workers >= 0: return stage.workers
    return min(8, cores()) if torch.cuda.is_available() else -(-cores() // 8) if cores() >= 4 else 0


def get_dls(frame: pd.DataFrame, stage: Stage, prep: Prep, aug: Augment, stats: tuple, *, seed: int = 42, path='.') -> DataLoaders:
    """DataLoaders of `frame` (columns stored, diagnosis, valid); `stats` are the mean and std that the body was trained with.

    Training images are augmented one by one by the loader's processes, or where [augment] on = batch (auto: where there is a GPU) on the device.
    """
    cuda = torch.cuda.is_available()
    on_batch = dict(auto=cuda, image=False, batch=True)[aug.on]
    block = DataBlock(blocks=(TransformBlock(type_tfms=ReadRetina(prep, stage.size)), RegressionBlock()),
                      get_x=ColReader('stored'), get_y=ColReader('diagnosis'), splitter=ColSplitter('valid'),
                      item_tfms=[*([] if on_batch else [FundusAugment(aug, seed)]), ToTensor()],
                      batch_tfms=[IntToFloatTensor(), *([BatchAugment(aug, seed)] if on_batch else []), Normalize.from_stats(*stats, cuda=cuda)])
    get = partial(block.weighted_dataloaders, wgts=frame.weight.to_numpy()) if stage.source_weights else block.dataloaders
    bs = stage.bs // world_size()                  # the processes' parts of a batch make up the whole
    return get(frame, bs=bs, val_bs=2 * bs, num_workers=loader_workers(stage), path=path, pin_memory=cuda)


def start_epoch(dl, n: int | None):
    "The DataLoader's augmentation draws as in epoch `n`; None: at random"
    for t in [*dl.after_item.fs, *dl.after_batch.fs]:
        if isinstance(t, (FundusAugment, BatchAugment)): t.epoch, t.batch = n, 0


@dispatch
def show_results(x: TensorImage, y: Tensor, samples, outs, ctxs=None, max_n=6, nrows=None, ncols=None, figsize=None, **kwargs):
    "Images with their grade and score, for `learn.show_results()`: fastai's own for regression on images does not run on its present dispatch"
    n = min(len(samples), max_n)
    if ctxs is None: ctxs = get_grid(n, nrows=nrows, ncols=ncols, figsize=figsize)
    for ax, s, o in zip(ctxs, samples[:n], outs[:n], strict=False): s[0].show(ctx=ax, title=f'grade {float(s[1]):.0f}, score {np.ravel(o[0])[0]:.2f}', **kwargs)
    return ctxs
