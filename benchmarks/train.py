"""Images per second of training from original images: python benchmarks/train.py FOLDER-OF-ORIGINALS [ARCH SIZE BATCH]

Compares four ways on the same images, with the same network of random weights:
- published: the published loop, restated here. PyTorch's DataLoader with a process per core; every epoch decodes whole
  images, resizes them to squares and augments them in Pillow; float32, Adam
- ours: the Learner, callbacks and store that `run.py train` uses
- bare loop: a PyTorch loop over our DataLoader with our settings
- in memory: the bare loop on one batch in memory, the upper limit

Each original is used under four ids. Each way runs in its own process; the ways take turns for two rounds.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

COPIES, EPOCHS, ROUNDS = 4, 3, 2


def files_and_grades(folder: Path) -> list[tuple[str, float]]:
    return [(str(p), float(i % 5)) for i, p in enumerate(sorted(folder.glob('*.jpg')))]


def gpu_memory() -> float:
    "Peak GPU memory of this process in GB; 0 without a GPU"
    import torch
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0


def timed_epochs(train_epoch: Callable[[], None]) -> list[float]:
    "Seconds of each of `EPOCHS` epochs"
    import torch
    seconds = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        train_epoch()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def train_published(folder: Path, stage) -> dict:
    import torch
    from images import published_augment, published_read
    from torch import nn

    from aptos_fastai.training.networks import create_model

    class Images(torch.utils.data.Dataset):
        rows = files_and_grades(folder)
        def __len__(self): return len(self.rows)
        def __getitem__(self, i):
            file, grade = self.rows[i]
            return published_augment(published_read(file, stage.size)), grade
    cuda = torch.cuda.is_available()
    device = torch.device('cuda' if cuda else 'cpu')
    loader = torch.utils.data.DataLoader(Images(), stage.bs, shuffle=True, drop_last=True, num_workers=os.cpu_count(),
                                         pin_memory=cuda)
    net, loss = create_model(stage.arch, stage.head, stage.size).to(device), nn.SmoothL1Loss()
    opt = torch.optim.Adam(net.parameters(), 1e-4)

    def train_epoch():
        for x, y in loader:
            loss(net(x.to(device)).flatten(), y.float().to(device)).backward()
            opt.step()
            opt.zero_grad()
    first, *others = timed_epochs(train_epoch)
    return dict(first=first, steady=min(others), memory=gpu_memory())


@contextmanager
def our_learner(folder: Path, stage):
    "Prepare the images and yield a stage's Learner, the seconds that took, the precision, and the seconds to choose it"
    import pandas as pd

    from aptos_fastai.common.console import Bars
    from aptos_fastai.data.retina import Prep
    from aptos_fastai.data.store import prepare_table
    from aptos_fastai.recipe.sections import Augment
    from aptos_fastai.training.loaders import get_dls
    from aptos_fastai.training.model import body_stats, get_learner
    from aptos_fastai.training.precision import precision_of
    start, prep = time.perf_counter(), Prep(size=stage.size)
    rows = [(Path(file).stem, file, grade, 'originals') for file, grade in files_and_grades(folder)]
    frame = pd.DataFrame(rows, columns=['id_code', 'path', 'diagnosis', 'source'])
    with tempfile.TemporaryDirectory(dir=folder) as store, Bars() as bars:
        frame = prepare_table(frame, Path(store), prep, bars)
        prepared = time.perf_counter()
        precision = precision_of(stage, Path(store))
        measured = time.perf_counter()
        frame = pd.concat([frame.assign(valid=False), frame[:1].assign(valid=True)])
        dls = get_dls(frame, stage, prep, Augment(hue=.05, blur=.25), body_stats(stage.arch))
        yield get_learner(stage, dls), prepared - start, precision, measured - prepared


def train_ours(folder: Path, stage) -> dict:
    import torch
    from fastai.callback.core import Callback

    from aptos_fastai.pipeline.stage import fit_stage, optional_callbacks
    from aptos_fastai.training.callbacks import History, Reproducible

    class Clock(Callback):
        "Seconds of each training epoch, and how many of them it waited for batches"
        order = 1000
        def __init__(self): self.seconds, self.waits = [], []
        def before_train(self):
            self.start = self.batch_end = time.perf_counter()
            self.waits.append(0.)
        def before_batch(self):
            if self.training: self.waits[-1] += time.perf_counter() - self.batch_end
        def after_batch(self): self.batch_end = time.perf_counter()
        def after_train(self):
            if torch.cuda.is_available(): torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)
    with our_learner(folder, stage) as (learn, preparing, precision, measuring):
        clock, hist = Clock(), History('last')
        fit_stage(learn, stage, [Reproducible(0, hist), *optional_callbacks(stage, precision), hist, clock])
        steady = min(range(1, EPOCHS), key=lambda i: clock.seconds[i])
        return dict(first=preparing + clock.seconds[0], steady=clock.seconds[steady],
                    waiting=clock.waits[steady] / clock.seconds[steady], precision=precision, preparing=preparing,
                    measuring=measuring, memory=gpu_memory())


def train_bare_loop(folder: Path, stage, in_memory: bool = False) -> dict:
    "Our DataLoader, network, precision and schedule without fastai's Learner; `in_memory`: the same batch every step"
    import torch

    from aptos_fastai.training.precision import DTYPES

    def plain(o): return o.as_subclass(torch.Tensor)      # as the Learner does: autocast is slower on fastai's tensors
    with our_learner(folder, stage) as (learn, _, precision, _):
        dls, net, loss, device = learn.dls, learn.model, torch.nn.SmoothL1Loss(), learn.dls.device.type
        steps = len(dls.train)
        opt = torch.optim.AdamW(net.parameters(), stage.lr, weight_decay=stage.wd)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, stage.lr, total_steps=EPOCHS * steps)
        net.train()
        batches = [dls.train.one_batch()] * steps if in_memory else dls.train

        def train_epoch():
            for x, y in batches:
                with torch.autocast(device, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES):
                    maps = net[0](plain(x))
                loss(net[1](maps.float()).flatten(), plain(y).float()).backward()
                opt.step()
                opt.zero_grad()
                schedule.step()
        return dict(steady=min(timed_epochs(train_epoch)[1:]))


WAYS = {'published': train_published, 'ours': train_ours, 'bare loop': train_bare_loop,
        'in memory': lambda folder, stage: train_bare_loop(folder, stage, in_memory=True)}


def run_way(way: str, folder: str, arch: str, size: str, bs: str) -> dict:
    from aptos_fastai.common.console import console
    from aptos_fastai.recipe.sections import Stage
    console.quiet = True
    stage = Stage('benchmark', ('t',), arch=arch, size=int(size), bs=int(bs), weights='none', epochs=EPOCHS,
                  keep='last')
    return WAYS[way](Path(folder), stage)


def run_in_own_process(way: str, *args: str) -> dict:
    command = [sys.executable, '-W', 'ignore', __file__, '--way', way, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def decoded_per_second(files: list[Path]) -> float:
    "Originals per second that one core decodes, without any other work"
    import cv2
    import numpy as np
    cv2.setNumThreads(1)
    data = [np.frombuffer(p.read_bytes(), np.uint8) for p in files[:12]]
    start = time.perf_counter()
    for d in data: cv2.imdecode(d, cv2.IMREAD_COLOR)
    return len(data) / (time.perf_counter() - start)


def main(folder: str, arch: str = 'legacy_seresnet50', size: str = '256', bs: str = '16'):
    from aptos_fastai.common.console import say, table
    from aptos_fastai.training.precision import machine
    originals = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in ('.jpg', '.jpeg'))
    if not originals: sys.exit(f'error: {folder}: no JPEG files in this folder')
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as tmp:
        for p in originals:
            for i in range(COPIES): shutil.copy(p, Path(tmp) / f'{p.stem}-{i}.jpg')
        for _ in range(ROUNDS):
            for way in WAYS: found[way].append(run_in_own_process(way, tmp, arch, size, bs))
    n = len(originals) * COPIES // int(bs) * int(bs)     # images per epoch: the last incomplete batch is dropped
    steady = {way: n / min(o['steady'] for o in results) for way, results in found.items()}
    first = {way: n / min(o['first'] for o in found[way]) for way in ('published', 'ours')}
    ours = min(found['ours'], key=lambda o: o['steady'])
    def compared(way: str) -> str: return f'ours reaches {steady["ours"] / steady[way]:.0%}'
    rows = [
        ['published loop, every epoch', f'{steady["published"]:.1f}', ''],
        [f'ours, steady epoch ({ours["precision"]}, channels last)', f'{steady["ours"]:.1f}',
         f'{steady["ours"] / steady["published"]:.2f} x published'],
        ['ours, first epoch with preparing', f'{first["ours"]:.1f}',
         f'{first["ours"] / first["published"]:.2f} x published'],
        ['bare PyTorch loop, our settings', f'{steady["bare loop"]:.1f}', compared('bare loop')],
        ['limit: images in memory', f'{steady["in memory"]:.1f}', compared('in memory')],
        ['limit: whole decode alone, one core', f'{decoded_per_second(originals):.1f}', '']]
    table(f'{arch} at {size} px, batch {bs}, {n} images from {len(originals)} originals; '
          f'{machine()}, {platform.machine()}', ['training', 'images/s', 'compared'], rows,
          right=('images/s',), wrap=('training',))
    say(f'waiting for data: {ours["waiting"]:.1%} of a steady epoch; '
        f'preparing {len(originals) * COPIES} originals: {ours["preparing"]:.1f} s; '
        f'choosing the precision, once per network and size, not in an epoch here: {ours["measuring"]:.1f} s')
    memory = {way: min(o['memory'] for o in found[way]) for way in ('published', 'ours')}
    if memory['ours']: say(f'peak GPU memory: published {memory["published"]:.1f} GB, ours {memory["ours"]:.1f} GB')
    else: say('peak GPU memory: not measured, no GPU found')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--way']: print(json.dumps(run_way(*sys.argv[2:])))
    else: main(*sys.argv[1:])
