"""What training that doubts grades adds where some are wrong: python benchmarks/label_noise.py FOLDER RUNS [SEED ...]

FOLDER holds train.csv and train_images (recipes/one_table.ini). 10 % of its grades are made wrong, as in
label_errors.py, or none. Linear probes (224 px, two views, five folds, 30 epochs) train on them, and thresholds are
fitted to them on the other folds, as a user would; kappa is against the grades of FOLDER. A seed is that of the wrong
grades, the folds and the training. The features are computed once and kept in RUNS. The heads of all folds and variants
train at once, with the settings of the package's probes: the package itself trains one head at a time.

From 30 % of the epochs on, an image trains towards its grade g and its running score s, a moving average of what this
training says of it. No variant sees a grade of the fold that it is judged on, except to fit thresholds on other folds.

- doubt = D: the mean of both, g with the weight 1 / (1 + (|s - g| / D)^2). 0.5 was chosen on IDRiD with the seeds 0, 1
  and 2 among 0.5, 1 and 2
- soft: soft bootstrapping, (g + s) / 2 (Reed et al. 2015, arXiv:1412.6596)
- trimmed: s instead of g for the tenth of the images with the most surprising grades (`label_surprise`)
- nested: no running score, but the mean of g and the score of a network that has seen neither the image's fold nor the
  validation fold; ten more networks
- half the epochs: how much of it is only fitting less

Intervals are of paired bootstrap resamples of images (with their copies), each over all seeds.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from label_errors import KINDS
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn

from aptos_fastai.common.console import table
from aptos_fastai.metrics import auc, bootstrap, cross_fitted_grades, quadratic_kappa, weighted_kappa
from aptos_fastai.pipeline.features import frozen_features
from aptos_fastai.pipeline.graph import load_run, start_run
from aptos_fastai.pipeline.review import label_surprise
from aptos_fastai.pipeline.stage import stage_learner

RECIPE = Path(__file__).parents[1] / 'recipes/one_table.ini'
PROBE = ['images.size=224', 'stage.size=224', 'stage.epochs=0', 'stage.lr_div=1', 'stage.freeze_epochs=30',
         'stage.tta=hflip']
FOLDS, EPOCHS, BATCH, RATE, WARMUP = 5, 30, 16, 1e-2, .25
WRONG = .1                                   # of the grades
DOUBT_FROM = .3                              # fraction of the epochs after which running scores count
SCORE_DECAY = .7                             # of a running score, per epoch
SEEDS = 3, 4, 5, 6, 7
OFF, DOUBT, NESTED, HALF = 'off', 'doubt = 0.5', 'nested', 'half the epochs'


def doubted(grades: Tensor, scores: Tensor, doubt: float) -> Tensor:
    "Return the means of grades and scores in which a grade counts the less the farther its score lies"
    distance = scores - grades
    return scores - distance / (1 + (distance / doubt) ** 2)


def trimmed(grades: Tensor, scores: Tensor) -> Tensor:
    "Return the grades, the most surprising tenth of them replaced by the scores"
    surprise = label_surprise(scores, grades, np.zeros(len(grades)))
    worst = np.argsort(-surprise, kind='stable')[:round(WRONG * len(grades))]
    targets = grades.clone()
    targets[worst] = scores[worst]
    return targets


RULES = {OFF: None, DOUBT: lambda g, s: doubted(g, s, .5), 'doubt = 1': lambda g, s: doubted(g, s, 1.),
         'soft': lambda g, s: (g + s) / 2, 'trimmed': trimmed}


def read_features(data: str, runs: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
    "Return the features (n, views, C) of the images, their grades and groups"
    run = load_run(RECIPE, data, runs, PROBE)
    with start_run(run, ['teacher']) as (run, bars):
        stage, learn = run.recipe.stages['teacher'], stage_learner(run, 'teacher')
        ids, features = frozen_features(run, stage, learn, 'f32', bars).tables['train']
        rows = run.frames['train'].set_index('id_code').loc[ids]
    return torch.from_numpy(features), rows.diagnosis.to_numpy(int), rows.group.to_numpy()


def plant(grades: np.ndarray, kind: str, seed: int) -> np.ndarray:
    "Return grades, some of them wrong"
    if kind not in KINDS: return grades
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    rows, wrong = rng.choice(len(grades), round(WRONG * len(grades)), replace=False), grades.copy()
    wrong[rows] = [KINDS[kind](rng, g) for g in grades[rows]]
    return wrong


def one_cycle(done: float) -> tuple[float, float]:
    "Return learning rate and momentum of fastai's one-cycle schedule after the fraction `done` of it"
    def between(a: float, b: float, part: float) -> float: return b + (a - b) / 2 * (1 + math.cos(math.pi * part))
    if done < WARMUP: return between(RATE / 25, RATE, done / WARMUP), between(.95, .85, done / WARMUP)
    part = (done - WARMUP) / (1 - WARMUP)
    return between(RATE, RATE / 1e5, part), between(.85, .95, part)


def train_heads(x: Tensor, parts: list[np.ndarray], targets: list[np.ndarray], rules: list, seed: int,
                epochs: int = EPOCHS) -> np.ndarray:
    "Train a head on each of `parts` (rows of features `x`) by its rule; return the scores (heads, n) of all images"
    generator, (n, views, width), heads = torch.Generator().manual_seed(seed), x.shape, len(parts)
    start = (torch.rand(1, width, 1, generator=generator) * 2 - 1) / math.sqrt(width)
    w, b = nn.Parameter(start.repeat(heads, 1, 1)), nn.Parameter(torch.zeros(heads, 1, 1))
    opt = torch.optim.AdamW([dict(params=[w], weight_decay=.01), dict(params=[b], weight_decay=0.)], eps=1e-5)
    rows, grades = [torch.tensor(o) for o in parts], [torch.tensor(o, dtype=torch.float32) for o in targets]
    running = [torch.full((len(o),), math.nan) for o in rows]
    steps = min(map(len, rows)) // BATCH
    for epoch in range(epochs):
        def target(g: Tensor, s: Tensor, rule, epoch: int = epoch) -> Tensor:
            return g if rule is None or epoch < round(DOUBT_FROM * epochs) else rule(g, torch.where(s.isnan(), g, s))
        towards = [target(*o) for o in zip(grades, running, rules, strict=True)]
        orders: dict[bytes, Tensor] = {}                 # heads on the same images see them in the same order
        drawn = [orders.setdefault(o.tobytes(), torch.randperm(len(o), generator=generator)) for o in parts]
        view = torch.randint(0, views, (n,), generator=generator)
        for step in range(steps):
            rate, momentum = one_cycle((epoch * steps + step) / (epochs * steps))
            for group in opt.param_groups: group.update(lr=rate, betas=(momentum, .99))
            batch = [o[step * BATCH:(step + 1) * BATCH] for o in drawn]
            images = torch.stack([r[i] for r, i in zip(rows, batch, strict=True)])
            out = (torch.bmm(x[images, view[images]], w) + b)[..., 0]
            loss = F.smooth_l1_loss(out, torch.stack([t[i] for t, i in zip(towards, batch, strict=True)]),
                                    reduction='sum') / BATCH
            opt.zero_grad()
            loss.backward()
            opt.step()
            for s, i, now in zip(running, batch, out.detach(), strict=True):
                s[i] = torch.where(s[i].isnan(), now, torch.lerp(now, s[i], SCORE_DECAY))
    return torch.einsum('nvc,mcu->mn', x, w.detach()).div(views).add(b.detach()[:, :, 0]).numpy()


def out_of_fold(x: Tensor, y: np.ndarray, folds: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    "Return the out-of-fold scores of each variant, trained on the grades `y`"
    numbers = range(FOLDS)
    parts = [np.flatnonzero(folds != k) for k in numbers]
    inner = [(j, k) for k in numbers for j in range(k)]
    without = [np.flatnonzero(~np.isin(folds, o)) for o in inner]
    scores = dict(zip(inner, train_heads(x, without, [y[o] for o in without], [None] * len(inner), seed), strict=True))
    nested = [np.array([(y[i] + scores[min(folds[i], k), max(folds[i], k)][i]) / 2 for i in parts[k]]) for k in numbers]
    rules = [rule for rule in RULES.values() for _ in numbers] + [None] * FOLDS
    found = train_heads(x, parts * (len(RULES) + 1), [y[o] for o in parts] * len(RULES) + nested, rules, seed)
    rules = [None] * FOLDS + [RULES[DOUBT]] * FOLDS
    half = train_heads(x, parts * 2, [y[o] for o in parts] * 2, rules, seed, EPOCHS // 2)
    names = [*RULES, NESTED, HALF, f'{HALF}, {DOUBT}']
    return {name: np.concatenate([found, half])[i * FOLDS + folds, np.arange(len(y))] for i, name in enumerate(names)}


def difference(off: list[np.ndarray], on: list[np.ndarray], true: np.ndarray, groups: np.ndarray) -> str:
    "Return the mean difference of the kappa of grades over the seeds, with its interval"
    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.mean([weighted_kappa(weights, b, true) - weighted_kappa(weights, a, true)
                        for a, b in zip(off, on, strict=True)], 0)
    low, high = np.quantile(bootstrap(statistic, len(true), groups), [.025, .975])
    return f'{statistic(np.ones((1, len(true))))[0]:+.3f} ({low:+.3f} to {high:+.3f})'


def compare(x: Tensor, true: np.ndarray, groups: np.ndarray, kind: str, seeds: list[int]) -> None:
    "Print the table of a kind of wrong grades"
    graded: dict[str, list[np.ndarray]] = {}
    areas: dict[str, list[float]] = {}
    for seed in seeds:
        y, folds = plant(true, kind, seed), np.empty(len(true), int)
        split = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(x, y, groups)
        for k, (_, valid) in enumerate(split): folds[valid] = k
        for name, scores in out_of_fold(x, y, folds, seed).items():
            graded.setdefault(name, []).append(cross_fitted_grades(scores, y, folds, 'regularised'))
            areas.setdefault(name, []).append(auc(scores, true >= 2)[0])
    rows = [[name, f'{np.mean([quadratic_kappa(g, true) for g in parts]):.3f}', f'{np.mean(areas[name]):.3f}',
             '' if name == OFF else difference(graded[OFF], parts, true, groups)] for name, parts in graded.items()]
    table(f'{kind} wrong grades, {len(true)} images, seeds {" ".join(map(str, seeds))}',
          ['training', 'kappa', 'AUC, referable', 'difference of kappa (95 % CI)'], rows)


def main(data: str, runs: str, *seeds: str) -> None:
    "Train and compare"
    torch.set_num_threads(1)
    x, true, groups = read_features(data, runs)
    for kind in (*KINDS, 'no'): compare(x, true, groups, kind, [int(o) for o in seeds] or list(SEEDS))


if __name__ == '__main__': main(*sys.argv[1:])
