"Build DataLoaders from a table, and augment the training images."
import multiprocessing
import pickle
import random
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.data import WeightedDL
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
    TfmdDL,
    ToTensor,
    Transform,
    TransformBlock,
    default_device,
    dispatch,
    get_grid,
    noop,
    set_seed,
    to_device,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from aptos_fastai.common.distributed import cores, rank, world_size
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.retina import Prep
from aptos_fastai.data.store import column_of, read_square
from aptos_fastai.recipe.sections import Augment, Stage


class PreparedImage(PILImage):
    """The prepared square of an image.

    A type of its own, so that fastai refuses another image (`learn.predict(PILImage)`), which nobody has cropped.
    """


class ReadRetina(Transform):
    "Read the prepared square of an image at `size` pixels; prepare it first if the path is an original"
    input_types = str, Path                  # what `learn.predict` and `dls.test_dl` accept
    def __init__(self, prep: Prep, size: int): self.prep, self.size = prep, size

    def encodes(self, path):
        im = PreparedImage.create(np.ascontiguousarray(read_square(path, self.prep, self.size)))
        im.key = zlib.crc32(image_id(Path(path), self.prep).encode())     # identifies the image for its random draws
        return im


class StoredReader:
    "Return the path of the square of side `prep.size` from a row of a table: column `stored_SIZE`, or else `stored`"
    def __init__(self, prep: Prep): self.size = prep.size

    def __call__(self, row):
        return getattr(row, column_of(getattr(row, '_fields', None) or row.index, self.size))


def image_id(path: Path, prep: Prep) -> str:
    "Return the id of a prepared image (<id>.<hash><suffix>) or of an original (<id>.<extension>)"
    return path.name.removesuffix(prep.suffix).rpartition('.')[0] or path.name


@dataclass(frozen=True)
class AugmentParams:
    "The random augmentation of a training image, or of several along the arrays' first axis"
    warp: np.ndarray                          # (2, 3) affine matrix, source pixels to target pixels
    colour: np.ndarray                        # (3, 3) matrix on RGB
    offset: np.ndarray                        # times the image's mean grey: what is added to each channel
    sigma: np.ndarray                         # of a 3 x 3 Gaussian blur, pixels; 0: no blur


def draw_params(aug: Augment, rng: np.random.Generator, side: int, shape: tuple[int, ...] = ()) -> AugmentParams:
    "Draw the augmentation of an image of `side` x `side` pixels from `rng`, or of (n,) images, all at once"
    warp = draw_warp(aug, rng, side, shape)
    colour, offset = draw_colour(aug, rng, shape)
    blurred, (lowest, highest) = rng.random(shape) < aug.blur, aug.blur_sigma
    sigma = np.where(blurred, rng.uniform(lowest, highest, shape), 0.)
    return AugmentParams(warp, colour, offset, sigma)


def draw_warp(aug: Augment, rng: np.random.Generator, side: int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Draw flips, shear, rotation, scale and shift about the centre of a square of `side` pixels.

    Returns an affine matrix (2, 3), or one for each of `shape` = (n,) images: (n, 2, 3).
    """
    angle = np.deg2rad(rng.uniform(-aug.rotate, aug.rotate, shape))
    shear = np.deg2rad(rng.uniform(-aug.shear, aug.shear, shape))
    lowest, highest = aug.scale
    scale = rng.uniform(lowest, highest, shape)
    flips = np.where(rng.random((*shape, 2)) < (aug.hflip, aug.vflip), -1., 1.)
    cos, sin, tan = scale * np.cos(angle), scale * np.sin(angle), np.tan(shear)
    linear = np.stack([cos, cos * tan - sin, sin, sin * tan + cos], -1).reshape(*shape, 2, 2) * flips[..., None, :]
    centre = (side - 1) / 2
    shift = rng.uniform(-aug.shift, aug.shift, (*shape, 2)) * side + centre - linear.sum(-1) * centre
    return np.concatenate([linear, shift[..., None]], -1)


_grey = np.array([.299, .587, .114])
_yiq = np.array([[.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]])
_rgb = np.linalg.inv(_yiq)
# Turning hue by an angle: the sum of these matrices on RGB times 1, the angle's cosine and its sine; then what the sum
# makes of the grey of a pixel
_hue = np.stack([_rgb[:, :1] @ _yiq[:1], _rgb[:, 1:] @ _yiq[1:], _rgb[:, 1:] @ [[0, -1], [1, 0]] @ _yiq[1:]])
_hue_and_grey = np.concatenate([_hue, _grey @ _hue[:, None]], 1).reshape(3, 12)


def draw_colour(aug: Augment, rng: np.random.Generator, shape: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Draw hue, saturation, contrast and brightness: a 3 x 3 matrix on RGB, and the fraction of the mean grey to add.

    Hue turns the colour about the grey axis (in YIQ); contrast scales about the image's mean grey. With `shape` = (n,)
    there is a matrix and a fraction for each of n images.
    """
    brightness, contrast, saturation = (
        1 + rng.uniform(-o, o, shape) for o in (aug.brightness, aug.contrast, aug.saturation))
    angle = 2 * np.pi * rng.uniform(-aug.hue, aug.hue, shape)
    turn = np.stack([np.ones(shape), np.cos(angle), np.sin(angle)], -1)
    hue = (turn @ _hue_and_grey).reshape(*shape, 4, 3)
    saturation = saturation[..., None, None]
    saturated = saturation * hue[..., :3, :] + (1 - saturation) * hue[..., 3:, :]
    return (brightness * contrast)[..., None, None] * saturated, brightness * (1 - contrast)


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
        self.aug, self.seed = aug, seed
        self.epoch: int | None = None

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
        return cv2.GaussianBlur(a, (3, 3), float(params.sigma)) if params.sigma else a


class BatchAugment(RandTransform):
    """Augment a batch on its device as `FundusAugment` does image by image: (n, 3, side, side) in 0-1, unnormalised.

    The draws depend on (`seed`, `epoch`, batch), and reach the device in one copy. It computes in float, where
    `FundusAugment` rounds to bytes.
    """
    order, split_idx = 11, 0                  # after IntToFloatTensor, before Normalize; training images only
    def __init__(self, aug: Augment, seed: int = 0):
        super().__init__()
        self.aug, self.seed, self.batch = aug, seed, 0
        self.epoch: int | None = None

    def encodes(self, x: TensorImage):
        which = [self.batch, rank()] if rank() > 0 else [self.batch]
        rng = np.random.default_rng(_draw_seed(self.seed, self.epoch, *which))
        self.batch += 1
        params = draw_params(self.aug, rng, x.shape[-1], (len(x),))
        drawn = torch.from_numpy(_packed(params, x.shape[-1])).to(x.device, non_blocking=True)
        theta, colour, offset, neighbour, grey = drawn.split([6, 9, 1, 1, 3], 1)
        a = _warp(x.as_subclass(Tensor), theta.view(-1, 2, 3))
        mean_grey = (a.mean((2, 3)) * grey).sum(1, keepdim=True)
        a = torch.einsum('nij,njhw->nihw', colour.view(-1, 3, 3), a) + (offset * mean_grey)[..., None, None]
        return TensorImage(_blur3(a.clamp(0, 1), neighbour[:, 0]))


def _packed(params: AugmentParams, side: int) -> np.ndarray:
    "Return a row for each of n images: theta (6), colour (9), offset, a neighbour's weight in the blur, grey (3)"
    with np.errstate(divide='ignore'): neighbour = np.exp(-.5 / params.sigma ** 2)      # 0 for a sigma of 0
    n = len(neighbour)
    theta, colour = _affine_theta(params.warp, side).reshape(n, 6), params.colour.reshape(n, 9)
    return np.concatenate([theta, colour, params.offset[:, None], neighbour[:, None], np.tile(_grey, (n, 1))], 1,
                          dtype=np.float32)


def _affine_theta(warp: np.ndarray, side: int) -> np.ndarray:
    """Convert `warp` (..., 2, 3), pixels, source to target, to `affine_grid`'s theta: target to source.

    Image edges are at -1 and 1 there.
    """
    to_unit = np.array([[2 / side, 0, 1 / side - 1], [0, 2 / side, 1 / side - 1], [0, 0, 1]])
    last_row = np.broadcast_to([0., 0., 1.], (*warp.shape[:-2], 1, 3))
    return (to_unit @ np.linalg.inv(np.concatenate([warp, last_row], -2)) @ np.linalg.inv(to_unit))[..., :2, :]


def _warp(x: Tensor, theta: Tensor) -> Tensor:
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _blur3(x: Tensor, neighbour: Tensor) -> Tensor:
    """Blur each image by its own 3 x 3 Gaussian: `neighbour` (n,) is a neighbour's weight relative to the middle.

    The border is reflected without its edge, as in OpenCV.
    """
    total = (1 + 2 * neighbour)[:, None, None, None]
    neighbour_weight, middle_weight = neighbour[:, None, None, None] / total, 1 / total
    p = F.pad(x, (1, 1, 1, 1), 'reflect')
    p = middle_weight * p[..., 1:-1] + neighbour_weight * (p[..., :-2] + p[..., 2:])
    return middle_weight * p[..., 1:-1, :] + neighbour_weight * (p[..., :-2, :] + p[..., 2:, :])


class ToDevice(Transform):
    """Copy a batch from pinned memory to the GPU without waiting for the GPU.

    The copy of fastai's DataLoader waits for every kernel in the queue, so that no step is launched ahead. A batch that
    is on a GPU already stays there: in distributed training fastai's own copy knows which one.
    """
    order = -1                                # first of the batch's transforms
    def __init__(self, device: torch.device): self.device = device

    def encodes(self, x: Tensor): return x if x.is_cuda else x.to(self.device, non_blocking=True)

    def to(self, device: torch.device) -> None:
        "Copy to another device from now on; fastai calls it when a DataLoader moves"
        self.device = device


def leave_copy_to_transform(dls: DataLoaders) -> None:
    "Let `ToDevice` copy the batches of `dls` instead of their own blocking copy; `dls.device` stays what it is"
    for dl in dls.loaders: dl._device = None


def loader_workers(stage: Stage) -> int:
    """Return how many processes load images: `stage.workers`, or for -1 a number that suits the device.

    With a GPU up to 8. On the CPU the network needs the cores: one process per 8 cores, none below 4 cores. None where
    processes do not start by fork (macOS, Windows). Raises `AptosError` if `stage.workers` asks for some there.
    """
    start_workers_by_fork()
    by_fork = multiprocessing.get_start_method() == 'fork'
    if not by_fork and stage.workers > 0:    # those of fasttransform cannot be pickled
        raise AptosError(f'[stage.{stage.name}] workers = {stage.workers}: fastai\'s transforms can be sent to loader '
                         'processes by fork only, which is not used here. Set workers = 0.')
    if not by_fork: return 0
    if stage.workers >= 0: return stage.workers
    if torch.cuda.is_available(): return min(8, cores())
    return -(-cores() // 8) if cores() >= 4 else 0


def start_workers_by_fork() -> None:
    """Start DataLoader workers by fork on Linux, unless the user has chosen another start method.

    Python 3.14 starts them by forkserver: each imports fastai again, which takes seconds.
    """
    if sys.platform == 'linux' and multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method('fork')


Task = tuple[int, int, int, tuple, list[int]]


class LoadBatch(Dataset):
    """Load a batch in a loader process: `loaders` are the DataLoaders as they were when the process started.

    A task: the number of the iteration, that of its DataLoader, its random seed and transforms, the images' indices.
    """
    def __init__(self, loaders: list[TfmdDL]): self.loaders, self.iteration = loaders, 0

    def __getitem__(self, task: Task) -> tuple:
        iteration, number, seed, transforms, idxs = task
        dl, worker = self.loaders[number], get_worker_info()
        assert worker                             # this runs in a loader process
        if iteration != self.iteration:           # its first batch in this process
            self.iteration = iteration
            dl.after_item, dl.before_batch = transforms
            set_seed(seed + worker.id)
        return dl.do_batch([dl.do_item(i) for i in idxs])


class LoaderProcesses(DataLoader):
    """Processes that load batches for `loaders`, one iteration at a time, and stay alive from one to the next.

    They start with the first iteration. One that does not run to its end (a break, an error, Ctrl-C) ends them, and
    the next one starts others.
    """
    def __init__(self, loaders: Sequence[TfmdDL]):
        first, self.loaders = loaders[0], list(loaders)
        self.tasks: list[Task] = []
        self.busy, self.iterations = False, 0
        super().__init__(LoadBatch(self.loaders), batch_size=None, sampler=self.tasks, collate_fn=noop,
                         num_workers=first.fake_l.num_workers, pin_memory=first.pin_memory, persistent_workers=True,
                         generator=torch.Generator())      # draws nothing from PyTorch's own one

    def check_worker_number_rationality(self) -> None:
        "No warning: more processes than cores are the user's choice"

    def load(self, dl: TfmdDL, batches: Iterator[list[int]]) -> Iterator:
        """Yield the batches of `dl`, one of `loaders`, with the indices that `batches` holds.

        The processes are given the transforms as they are now, with the epoch's number in them, and a random seed.
        """
        seed = int(torch.empty((), dtype=torch.int64).random_())        # as PyTorch draws one for every iteration
        transforms, number = (dl.after_item, dl.before_batch), self.loaders.index(dl)
        pickle.dumps(transforms)             # an error here: one in the thread that sends tasks would be lost
        self.iterations += 1
        self.tasks[:] = [(self.iterations, number, seed, transforms, idxs) for idxs in batches]
        self.busy = True
        try: yield from self
        except BaseException:
            self.close()
            raise
        finally: self.busy = False

    def close(self) -> None:
        "End the processes"
        iterator: Any = self._iterator
        if iterator is not None: iterator._shutdown_workers()
        self._iterator = None


_kept: list[LoaderProcesses] = []            # of each `keep_processes` that is entered


@contextmanager
def keep_processes(dls: DataLoaders) -> Iterator[None]:
    """Keep the loader processes of `dls` alive inside this block, for training and validation, and end them after it.

    Without it, fastai starts them again for every epoch, once for training and once for validation. The batches are
    the same. The datasets of `dls` must not change inside the block; transforms may.
    """
    if not dls.train.fake_l.num_workers:
        yield
        return
    processes = LoaderProcesses(dls.loaders)
    _kept.append(processes)
    try: yield
    finally:
        _kept.remove(processes)
        processes.close()


class ImageDL(TfmdDL):
    "A fastai DataLoader whose batches come from the processes of `keep_processes`, if they are free; else as fastai's"
    @property
    def source(self) -> TfmdDL:
        "The DataLoader that loads the images; a wrapper overrides this"
        return self

    def __iter__(self) -> Iterator:
        kept = next((p for p in _kept if self.source in p.loaders and not p.busy), None)
        if kept is None or not self.fake_l.num_workers:
            yield from super().__iter__()
            return
        self.randomize()                     # from here on as in fastai's DataLoader
        self.before_iter()
        for b in kept.load(self.source, self.chunkify(self.get_idxs())):
            if self.pin_memory and type(b) is list: b = tuple(b)
            if self.device is not None: b = to_device(b, self.device)
            yield self.after_batch(b)
        self.after_iter()


class WeightedImageDL(ImageDL, WeightedDL):
    "fastai's DataLoader that draws training images by their weights, for `keep_processes`"


def get_dls(frame: pd.DataFrame, stage: Stage, prep: Prep, aug: Augment, stats: tuple, *, seed: int = 42,
            path: str | Path = '.') -> DataLoaders:
    """Return DataLoaders of `frame` (columns stored, diagnosis, valid and, if `draws_by_weight`, weight).

    A column `stored_SIZE` for the size of `prep` is read in the place of `stored`.
    `stats` are the mean and std to normalise with: those of the body's pretraining. Training images are augmented
    one by one by the workers, or in batches on the device: [augment] mode. Raises `AptosError` if a column is missing.
    """
    needed = [column_of(frame.columns, prep.size), 'diagnosis', 'valid', *['weight'] * stage.draws_by_weight]
    missing = [column for column in needed if column not in frame]
    if missing: raise AptosError(f'get_dls: the frame has no column {", ".join(missing)}. It has: {", ".join(frame)}.')
    cuda = torch.cuda.is_available()
    on_batch = dict(auto=cuda, image=False, batch=True)[aug.mode]
    item_augment = [] if on_batch else [FundusAugment(aug, seed)]
    batch_augment = [BatchAugment(aug, seed)] if on_batch else []
    copies = [ToDevice(default_device())] if cuda else []
    block = DataBlock(
        blocks=(TransformBlock(type_tfms=ReadRetina(prep, stage.size)), RegressionBlock()),
        get_x=StoredReader(prep), get_y=ColReader('diagnosis'), splitter=ColSplitter('valid'),
        item_tfms=[*item_augment, ToTensor()],
        batch_tfms=[*copies, IntToFloatTensor(), *batch_augment, Normalize.from_stats(*stats, cuda=cuda)])
    kind: dict = dict(dl_type=ImageDL)
    if stage.draws_by_weight:
        weights = frame.weight.to_numpy()[~frame.valid.to_numpy(bool)]
        kind = dict(dl_type=WeightedImageDL, dl_kwargs=[dict(wgts=weights), {}])
    bs = stage.bs // world_size()                  # per process
    dls = block.dataloaders(frame, bs=bs, val_bs=2 * bs, num_workers=loader_workers(stage), path=path, pin_memory=cuda,
                            **kind)
    if cuda: leave_copy_to_transform(dls)
    return dls


def set_epoch(dl: TfmdDL, epoch: int | None) -> None:
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
        image.show(ctx=ax, title=_title(grade, out), **kwargs)
    return ctxs


@dispatch
def plot_top_losses(x: TensorImage, y: Tensor, samples, outs, raws, losses, nrows=None, ncols=None, figsize=None,
                    **kwargs):
    "Show images with their grade, score and loss, for `Interpretation`. fastai has no method for regression on images"
    ctxs = get_grid(len(samples), nrows=nrows, ncols=ncols, figsize=figsize)
    for ax, sample, out, loss in zip(ctxs, samples, outs, losses, strict=False):
        sample[0].show(ctx=ax, title=f'{_title(sample[1], out)}\nloss {float(loss):.2f}', **kwargs)


def _title(grade: float, out: Sequence) -> str:
    return f'grade {float(grade):.0f}, score {torch.as_tensor(out[0]).flatten()[0].item():.2f}'
