"""Compare ways to pool signed feature maps: python benchmarks/pooling.py RESULTS.csv FOLDER [--summary]

FOLDER holds a graded table (train.csv, train_images) as IDRiD's. The body is EfficientNet-Lite0 with its bundled
ImageNet weights, frozen: its maps are computed once and projected on their principal components, which are signed.
They are pooled as they are (`fixed`), or after a 1 x 1 convolution and a LayerNorm, as a ConvNeXt ends, which train
with the head (`trained`); for each of five folds.
RESULTS.csv gets a row for each kind of maps, number of epochs, pooling and seed; those that it holds are not repeated.
The first two seeds are for choosing, the others for reporting.
"""
import argparse
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptos_fastai.common.console import say, table
from aptos_fastai.common.io import write_csv
from aptos_fastai.data.retina import Prep, prepare
from aptos_fastai.metrics import cross_fitted_grades, quadratic_kappa
from aptos_fastai.training.networks import GeM, create_model
from aptos_fastai.training.outputs import GradeLoss
from aptos_fastai.training.weights import BUNDLED_ARCH, load_body

SEEDS, CHOOSING, FOLDS = range(8), range(2), 5
SIZE, COMPONENTS, CHANNELS = 224, 192, 96    # side of the images, pixels; maps of the body; signed maps
BATCH, RATE, DECAY = 32, 2e-3, .05
SETTINGS = ('trained', 15), ('trained', 45), ('fixed', 45)        # maps, epochs


class SoftplusGeM(GeM):
    "GeM of softplus(x), which keeps the order of values below 0"
    def forward(self, x): return super().forward(F.softplus(x))


class LogSumExp(nn.Module):
    "log(mean of exp(r x)) / r with r learned: near the mean for a small r, near the maximum for a large one"
    def __init__(self):
        super().__init__()
        self.r = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        r = self.r.clamp(.05, 10)
        places = x.shape[-1] * x.shape[-2]
        return ((r * x).logsumexp((-2, -1), keepdim=True) - np.log(places)) / r


POOLINGS: dict[str, Callable[[], nn.Module]] = dict(
    gem=GeM, avg=lambda: nn.AdaptiveAvgPool2d(1), softplus_gem=SoftplusGeM, logsumexp=LogSumExp)


@torch.no_grad()
def body_maps(folder: Path) -> tuple[Tensor, Tensor]:
    "Return the body's maps of the graded images (n, C, h, w) and the grades (n,)"
    df = pd.read_csv(folder / 'train.csv', dtype=dict(id_code=str))
    files = {file.stem: file for file in (folder / 'train_images').iterdir()}
    net = create_model(BUNDLED_ARCH, 'gem', SIZE).eval()
    load_body(net, BUNDLED_ARCH, 'bundled')
    maps = []
    for id_code in df.id_code:
        jpeg, _ = prepare(files[id_code].read_bytes(), Prep(size=SIZE))
        square = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        maps.append(net[0](torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1))
    return components(torch.cat(maps)), torch.tensor(df.diagnosis.tolist()).float()


def components(maps: Tensor) -> Tensor:
    "Return the projections (n, COMPONENTS, h, w) of maps on their principal components, of mean square 1"
    places = maps.permute(0, 2, 3, 1).flatten(0, 2)
    places = places - places.mean(0)
    values, vectors = torch.linalg.eigh(places.T @ places / len(places))
    say(f'{COMPONENTS} components hold {values[-COMPONENTS:].sum() / values.sum():.3f} of the variance')
    projected = maps.permute(0, 2, 3, 1) @ vectors[:, -COMPONENTS:] / values.sum().div(COMPONENTS).sqrt()
    return projected.permute(0, 3, 1, 2).contiguous()


class ChannelNorm(nn.LayerNorm):
    "LayerNorm over the channels of maps (N, C, h, w)"
    def forward(self, x): return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def new_head(kind: str, pooling: str) -> nn.Module:
    "Return what is trained on the body's maps"
    if kind == 'fixed': return nn.Sequential(POOLINGS[pooling](), nn.Flatten(), nn.Linear(COMPONENTS, 1))
    return nn.Sequential(nn.Conv2d(COMPONENTS, CHANNELS, 1), ChannelNorm(CHANNELS), POOLINGS[pooling](), nn.Flatten(),
                         nn.Linear(CHANNELS, 1))


def trained(kind: str, pooling: str, epochs: int, maps: Tensor, grades: Tensor) -> nn.Module:
    "Return a head trained on maps with one cycle of AdamW"
    head = new_head(kind, pooling)
    opt = torch.optim.AdamW(head.parameters(), RATE, weight_decay=DECAY)
    batches = len(maps) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, RATE, total_steps=batches * epochs)
    loss_func = GradeLoss('smooth_l1')
    for _ in range(epochs):
        for rows in torch.randperm(len(maps))[:batches * BATCH].split(BATCH):
            loss_func(head(maps[rows]), grades[rows]).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
    return head


def measured(kind: str, pooling: str, epochs: int, seed: int, maps: Tensor, grades: Tensor) -> dict:
    "Return the out-of-fold loss, and kappa at cross-fitted thresholds. All poolings of a seed have the same folds"
    torch.manual_seed(seed)
    fold = torch.randperm(len(maps)) % FOLDS
    outputs = torch.zeros(len(maps), 1)
    for k in range(FOLDS):
        torch.manual_seed(100 * seed + k)
        head = trained(kind, pooling, epochs, maps[fold != k], grades[fold != k])
        with torch.no_grad(): outputs[fold == k] = head(maps[fold == k])
    true = grades.numpy().astype(int)
    predicted = cross_fitted_grades(outputs[:, 0].numpy().astype(float), true, fold.numpy(), 'regularised')
    return dict(loss=float(GradeLoss('smooth_l1')(outputs, grades)), kappa=quadratic_kappa(predicted, true))


def run_all(file: Path, folder: Path) -> pd.DataFrame:
    "Train what the file does not hold; return all rows"
    done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['maps', 'epochs', 'pooling', 'seed'])
    maps, grades = body_maps(folder)
    for (kind, epochs), seed, pooling in product(SETTINGS, SEEDS, POOLINGS):
        key = dict(maps=kind, epochs=epochs, pooling=pooling, seed=seed)
        if (done[list(key)] == list(key.values())).all(axis=1).any(): continue
        start = time.monotonic()
        row = key | measured(kind, pooling, epochs, seed, maps, grades)
        done = pd.concat([done, pd.DataFrame([row])])
        write_csv(file, done)
        say(f'{kind} maps, {pooling}, {epochs} epochs, seed {seed}: kappa {row["kappa"]:.3f}, loss {row["loss"]:.3f} '
            f'({time.monotonic() - start:.0f} s)')
    return done


def summary(df: pd.DataFrame, seeds: str) -> None:
    "Print mean and SD over seeds, also of the differences from `avg` with the same seed"
    def text(values: pd.Series, sign: str = '') -> str: return f'{values.mean():{sign}.3f} ± {values.std():.3f}'
    settings, rows = ['maps', 'epochs', 'seed'], []
    of_mean = df[df.pooling == 'avg'].set_index(settings)
    for (kind, epochs, pooling), part in df.groupby(['maps', 'epochs', 'pooling'], sort=False):
        part = part.set_index(settings)
        rows.append([kind, epochs, pooling, len(part), text(part.kappa), text(part.loss),
                     text(part.kappa - of_mean.kappa, '+'), text(part.loss - of_mean.loss, '+')])
    columns = ['maps', 'epochs', 'pooling', 'seeds', 'kappa', 'loss', 'kappa - avg', 'loss - avg']
    table(f'Pooling of signed maps, {seeds}', columns, rows)


def main() -> None:
    "Train and print the tables"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, metavar='RESULTS.csv')
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    parser.add_argument('--summary', action='store_true', help='print the rows that there are; train nothing')
    args = parser.parse_args()
    df = pd.read_csv(args.results) if args.summary else run_all(args.results, args.folder)
    choosing = df.seed.isin(CHOOSING)
    summary(df[choosing], 'seeds to choose on')
    summary(df[~choosing], 'other seeds')


if __name__ == '__main__': main()
