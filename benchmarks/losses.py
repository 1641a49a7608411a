"""Compare losses by linear probes on a graded table: python benchmarks/losses.py FOLDER RUNS [SEED ...]

FOLDER holds train.csv and train_images as recipes/one_table.ini expects. Each variant is the teacher of that recipe as
a linear probe (`epochs = 0`, 30 epochs of the head, 224 px, five folds): the features are computed once, kept in RUNS,
and shared by all. A seed makes new folds and a new training. Prints kappa (thresholds cross-fitted by folds), AUC of
referable and rank correlation, out of fold, and the paired bootstrap interval of the difference from smooth_l1. `mixed`
is the mean of the scores of smooth_l1, corn and cross_entropy. Choose on the first seed, report the others.
"""
import shutil
import sys
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import table
from aptos_fastai.metrics import auc, cross_fitted_grades, paired_interval, quadratic_kappa
from aptos_fastai.pipeline.graph import load_run, start_run, train_nodes

RECIPE = Path(__file__).parents[1] / 'recipes/one_table.ini'
PROBE = ['images.size=224', 'stage.epochs=0', 'stage.lr_div=1', 'stage.freeze_epochs=30', 'stage.lr=1e-2']
VARIANTS = dict(smooth_l1=[], corn=['stage.loss=corn'], cross_entropy=['stage.loss=cross_entropy'],
                mse=['stage.loss=mse'], clip=['stage.clip=1'], warmup=['stage.warmup=.1'], avg=['stage.head=avg'])


def probe_scores(data: str, runs: Path, variant: str, seed: int) -> pd.DataFrame:
    "Return the out-of-fold scores of a variant, trained if it is not finished"
    recipe = runs / f'{variant}_{seed}.ini'
    shutil.copy(RECIPE, recipe)
    run = load_run(recipe, data, runs, [*PROBE, f'recipe.seed={seed}', *VARIANTS[variant]])
    with start_run(run, ['teacher']) as (run, bars): train_nodes(run, ['teacher'], bars)
    oof = run.oof('teacher')
    return oof.assign(group=run.groups(oof))


def compare(seed: int, found: dict[str, pd.DataFrame]) -> None:
    "Print the figures of the variants of a seed"
    base = found['smooth_l1']
    mixed = sum(found[name].score for name in ('smooth_l1', 'corn', 'cross_entropy')) / 3
    found = found | dict(mixed=base.assign(score=mixed))
    y, parts = base.diagnosis, base.fold.to_numpy()
    grades = {name: cross_fitted_grades(df.score, y, parts, 'regularised') for name, df in found.items()}
    rows = []
    for name, df in found.items():
        value, low, high = paired_interval(grades['smooth_l1'], grades[name], y, base.group)
        rows.append([name, f'{quadratic_kappa(grades[name], y):.3f}', f'{value:+.3f} ({low:+.3f} to {high:+.3f})',
                     f'{auc(df.score, y >= 2)[0]:.3f}', f'{df.score.corr(y, method="spearman"):.3f}'])
    table(f'seed {seed}, {len(base)} images', ['variant', 'kappa', 'difference (95 % CI)', 'AUC', 'rank'], rows)


def main(data: str, runs: str, *seeds: str) -> None:
    "Train and compare all variants"
    Path(runs).mkdir(parents=True, exist_ok=True)
    for seed in map(int, seeds or ('42', '43', '44')):
        compare(seed, {variant: probe_scores(data, Path(runs), variant, seed) for variant in VARIANTS})


if __name__ == '__main__': main(*sys.argv[1:])
