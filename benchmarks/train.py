"""Images a second of training, from original images: python benchmarks/train.py FOLDER-OF-ORIGINALS [ARCH SIZE BATCH]

The published loop (PyTorch's DataLoader, a process a core; whole decode, square resize and augmentation in Pillow every epoch; float32, Adam), restated here;
ours (the Learner, callbacks and store that `run.py train` uses); a bare PyTorch loop over our DataLoader with our settings; and that on images in memory, the
limit. Same network of random weights, size, batch and originals (each under four ids). Every way runs in a process of its own, in turns, two rounds.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

WAYS = 'published', 'ours', 'bare loop', 'resident'
COPIES, EPOCHS, ROUNDS = 4, 3, 2


def rows_of(folder: Path) -> list[tuple[str, float]]: return [(str(p), float(i % 5)) for i, p in enumerate(sorted(folder.glob('*.jpg')))]


def published(folder: Path, stage) -> dict:
    import torch
    from images import published_augment, published_read
    from torch import nn

    from aptos_fastai.training.model import create_model

    class Images(torch.utils.data.Dataset):
        rows = rows_of(folder)
        def __len__(self): return len(self.rows)
        def __getitem__(self, i): return published_augment(published_read(self.rows[i][0], stage.size)), self.rows[i][1]
    cuda = torch.cuda.is_available()
    device = torch.device('cuda' if cuda else 'cpu')
    loader = torch.utils.data.DataLoader(Images(), stage.bs, shuffle=True, drop_last=True, num_workers=os.cpu_count(), pin_memory=cuda)
    net, loss = create_model(stage).to(device), nn.SmoothL1Loss()
    opt, seconds = torch.optim.Adam(net.parameters(), 1e-4), []
    for _ in range(EPOCHS):
        t = time.perf_counter()
        for x, y in loader:
            loss(net(x.to(device)).flatten(), y.float().to(device)).backward()
            opt.step(); opt.zero_grad()
        if cuda: torch.cuda.synchronize()
        seconds.append(time.perf_counter() - t)
    return dict(first=seconds[0], steady=min(seconds[1:]), memory=torch.cuda.max_memory_allocated() / 1e9 if cuda else 0)


@contextmanager
def our_learner(folder: Path, stage):
    "The Learner as a stage makes it, with its images prepared now; how long preparing took, the precision, and how long choosing that took"
    import pandas as pd

    from aptos_fastai.common.console import Bars
    from aptos_fastai.data.retina import Prep
    from aptos_fastai.data.store import prepare_table
    from aptos_fastai.recipe import Augment
    from aptos_fastai.training.loaders import get_dls
    from aptos_fastai.training.model import body_stats, get_learner
    from aptos_fastai.training.precision import precision_of
    t = time.perf_counter()
    files, prep = rows_of(folder), Prep(size=stage.size)
    frame = pd.DataFrame([(Path(f).stem, f, g, 'originals') for f, g in files], columns=['id_code', 'path', 'diagnosis', 'source'])
    with tempfile.TemporaryDirectory(dir=folder) as store, Bars() as bars:
        frame = prepare_table(frame, Path(store), prep, bars)
        took = time.perf_counter() - t
        precision = precision_of(stage, Path(store))
        measuring = time.perf_counter() - t - took
        dls = get_dls(pd.concat([frame.assign(valid=False), frame[:1].assign(valid=True)]), stage, prep, Augment(hue=.05, blur=.25), body_stats(stage.arch))
        yield get_learner(stage, dls), took, precision, measuring


def ours(folder: Path, stage) -> dict:
    import torch
    from fastai.callback.core import Callback

    from aptos_fastai.pipeline.stage import fit_stage, optional_callbacks
    from aptos_fastai.training.callbacks import History, Reproducible

    class Clock(Callback):
        order = 1000
        def before_train(self): self.t0 = self.t = time.perf_counter(); self.waits.append(0.)
        def before_batch(self):
            if self.training: self.waits[-1] += time.perf_counter() - self.t
        def after_batch(self): self.t = time.perf_counter()
        def after_train(self):
            if torch.cuda.is_available(): torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.t0)
    with our_learner(folder, stage) as (learn, took, precision, measuring):
        clock, hist = Clock(), History('last')
        clock.waits, clock.seconds = [], []
        fit_stage(learn, stage, [Reproducible(0, hist), *optional_callbacks(stage, precision, hist), hist, clock])
        i = min(range(1, EPOCHS), key=lambda i: clock.seconds[i])
        return dict(first=took + clock.seconds[0], steady=clock.seconds[i], waiting=clock.waits[i] / clock.seconds[i], precision=precision,
                    preparing=took, measuring=measuring, memory=torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0)


def loop(folder: Path, stage, resident: bool) -> dict:
    "Our DataLoader, network, precision and schedule without fastai's Learner; `resident`: on one batch in memory"
    import torch

    from aptos_fastai.training.precision import DTYPES
    with our_learner(folder, stage) as (learn, _, precision, _):
        dls, net, loss, device = learn.dls, learn.model, torch.nn.SmoothL1Loss(), learn.dls.device
        opt, steps, seconds = torch.optim.AdamW(net.parameters(), stage.lr, weight_decay=stage.wd), len(dls.train), []
        course = torch.optim.lr_scheduler.OneCycleLR(opt, stage.lr, total_steps=EPOCHS * steps)
        net.train()
        batch = dls.train.one_batch()
        def plain(o): return o.as_subclass(torch.Tensor)      # as the Learner does: autocast is a third slower on fastai's tensors
        for _ in range(EPOCHS):
            t = time.perf_counter()
            for x, y in [batch] * steps if resident else dls.train:
                with torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES): maps = net[0](plain(x))
                loss(net[1](maps.float()).flatten(), plain(y).float()).backward()
                opt.step(); opt.zero_grad(); course.step()
            if device.type == 'cuda': torch.cuda.synchronize()
            seconds.append(time.perf_counter() - t)
        return dict(steady=min(seconds[1:]))


def one(way: str, folder: str, arch: str, size: str, bs: str) -> dict:
    from aptos_fastai.common.console import console
    from aptos_fastai.recipe import Stage
    console.quiet = True
    stage = Stage('benchmark', ('t',), arch=arch, size=int(size), bs=int(bs), weights='none', epochs=EPOCHS, keep='last')
    folder = Path(folder)
    return dict(published=published, ours=ours).get(way, lambda f, s: loop(f, s, way == 'resident'))(folder, stage)


def libjpeg(files: list[Path]) -> float:
    "Originals a second that one core decodes whole, nothing else"
    import cv2
    import numpy as np
    cv2.setNumThreads(1)
    data = [np.frombuffer(p.read_bytes(), np.uint8) for p in files[:12]]
    t = time.perf_counter()
    for d in data: cv2.imdecode(d, cv2.IMREAD_COLOR)
    return len(data) / (time.perf_counter() - t)


def main(folder: str, arch: str = 'legacy_seresnet50', size: str = '256', bs: str = '16'):
    from aptos_fastai.common.console import say, table
    from aptos_fastai.training.precision import machine
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in ('.jpg', '.jpeg'))
    if not files: sys.exit(f'error: {folder}: holds no JPEG originals')
    found: dict[str, list[dict]] = {w: [] for w in WAYS}
    with tempfile.TemporaryDirectory() as tmp:
        for p in files:
            for i in range(COPIES): shutil.copy(p, Path(tmp) / f'{p.stem}-{i}.jpg')
        n = len(files) * COPIES // int(bs) * int(bs)
        for _ in range(ROUNDS):
            for w in WAYS:
                out = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', w, tmp, arch, size, bs], capture_output=True, text=True, check=False)
                if out.returncode: sys.exit(out.stderr)
                found[w].append(json.loads(out.stdout.splitlines()[-1]))
    def best(way: str, what: str) -> float: return min(o[what] for o in found[way])
    rate, base = {w: n / best(w, 'steady') for w in WAYS}, n / best('published', 'steady')
    first = {w: n / best(w, 'first') for w in ('published', 'ours')}
    o = min(found['ours'], key=lambda o: o['steady'])
    rows = [['published loop, every epoch', f'{base:.1f}', ''],
            [f'ours, steady epoch ({o["precision"]}, channels last)', f'{rate["ours"]:.1f}', f'x {rate["ours"] / base:.2f}'],
            ['ours, first epoch with preparing', f'{first["ours"]:.1f}', f'x {first["ours"] / first["published"]:.2f}'],
            ['bare PyTorch loop, our settings', f'{rate["bare loop"]:.1f}', f'ours is {rate["bare loop"] / rate["ours"] - 1:+.1%} slower'],
            ['limit: images in memory', f'{rate["resident"]:.1f}', f'ours has {rate["ours"] / rate["resident"]:.0%}'],
            ['limit: libjpeg alone, whole, one core', f'{libjpeg(files):.1f}', '']]
    table(f'{arch} {size} px, batch {bs}, {n} images from {len(files)} originals; {machine()}, {platform.machine()}',
          ['training', 'images/s', 'ratio'], rows, right=('images/s',), wrap=('training',))
    say(f'waiting for data: {o["waiting"]:.1%} of a steady epoch; preparing {n} originals: {o["preparing"]:.1f} s; '
        f'choosing the precision, once a network and size, in no epoch here: {o["measuring"]:.1f} s')
    if best('ours', 'memory'): say(f'peak memory: published {best("published", "memory"):.1f} GB, ours {best("ours", "memory"):.1f} GB')
    else: say('GPU rows (512 px, peak memory): no GPU here')


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']: print(json.dumps(one(*sys.argv[2:])))
    else: main(*sys.argv[1:])
