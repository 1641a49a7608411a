"""What each ingredient of recipes/one_table.ini is worth, out of fold, on one graded table: python benchmarks/recipes.py --data ~/idrid [VARIANT ...]

Every variant is a run of its own under --runs (default runs/ablation), on the same folds and the same network; what is finished is not trained again.
The table gives kappa by thresholds fitted on the other folds, its difference to ours on the same images (paired bootstrap),
kappa at fixed thresholds, and the time to train.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, table
from aptos_fastai.metrics import (
    MIDPOINTS,
    PUBLISHED_THRESHOLDS,
    apply_thresholds,
    kappa_interval,
    cross_fitted_grades,
    paired_interval,
    quadratic_kappa,
)
from aptos_fastai.pipeline.summary import interval_text

REFERENCE = 'ours'
RECIPE = Path(__file__).parents[1] / 'recipes/one_table.ini'
PUBLISHED_AUGMENT = ['augment.hue=.1', 'augment.blur=.5', 'augment.shift=.2', 'augment.scale=.8 1.2', 'augment.shear=.2']
PUBLISHED_PICTURE = ['images.crop=none', 'images.aspect=squash', 'images.size=0']
CONSTANT = ['stage.schedule=constant', 'stage.lr_div=1', 'stage.freeze_epochs=0']
NO_AUGMENT = [f'augment.{k}=0' for k in ('brightness', 'contrast', 'saturation', 'hue', 'rotate', 'shift', 'hflip')] + ['augment.scale=1 1']
VARIANTS = {                                 # name -> (stage, keys)
    'published recipe': ('teacher', [*PUBLISHED_PICTURE, *PUBLISHED_AUGMENT, *CONSTANT, 'stage.lr=2e-4', 'stage.wd=0', 'stage.epochs=30', 'stage.sqr_mom=.999',
                                     'stage.eps=1e-8', 'stage.tta=hflip', 'stage.thresholds=.75 1.5 2.5 3.5']),
    'ours': ('teacher', []),
    'ours, retrained with soft labels': ('retrain', []),
    'squashed whole image': ('teacher', PUBLISHED_PICTURE),
    'constant rate': ('teacher', [*CONSTANT, 'stage.lr=1e-3', 'stage.epochs=12']),
    'average pooling': ('teacher', ['stage.head=avg']),
    'published augmentation': ('teacher', PUBLISHED_AUGMENT),
    'no augmentation': ('teacher', NO_AUGMENT),
    'cut-off left black': ('teacher', ['images.cut_off=black']),
    'one rate and no frozen start': ('teacher', ['stage.lr_div=1', 'stage.freeze_epochs=0', 'stage.epochs=12']),
    'progressive resizing': ('teacher', ['stage.small.train=train', 'stage.small.size=160', 'stage.small.epochs=6', 'stage.teacher.init=small',
                                         'stage.teacher.epochs=6', 'stage.teacher.freeze_epochs=0', 'stage.teacher.lr=1.5e-3']),
    'mean squared error': ('teacher', ['stage.loss=mse']),
    'moving average of weights': ('teacher', ['stage.ema=.99']),
    'four epochs in all': ('teacher', ['stage.epochs=3']),
    'six epochs in all': ('teacher', ['stage.epochs=5']),
    'one view, not eight': ('teacher', ['stage.tta=none']),
}


def folder(name: str, runs: Path) -> Path: return runs / name.partition(',')[0].replace(' ', '_')


def train(name: str, data: str, runs: Path):
    stage, sets = VARIANTS[name]
    args = ['--recipe', RECIPE, '--data', data, '--runs', folder(name, runs), *(o for s in sets for o in ('--set', s))]
    if subprocess.run([sys.executable, RECIPE.parents[1] / 'run.py', 'train', stage, *args], check=False).returncode: sys.exit(1)


def validated(name: str, runs: Path) -> tuple[pd.DataFrame, float]:
    "Out-of-fold scores of a variant in the order of ids, and the seconds that its stage and what it starts from took to train"
    stage, sets = VARIANTS[name]
    root = folder(name, runs) / RECIPE.stem
    stages = {stage, *(s.partition('=')[2] for s in sets if '.init=' in s), *(['teacher'] if stage == 'retrain' else [])}
    preds = pd.concat([pd.read_csv(f, dtype=dict(id_code=str)) for f in sorted((root / stage).glob('fold*/preds.csv'))])
    seconds = sum(json.loads(f.read_text())['seconds'] for s in stages for f in (root / s).glob('fold*/stage.json'))
    return preds.sort_values('id_code').reset_index(drop=True), seconds


def row(name: str, runs: Path, reference: np.ndarray | None) -> tuple[list, np.ndarray]:
    "A row of the table and the grades that it is about"
    o, seconds = validated(name, runs)
    grades = cross_fitted_grades(o.score, o.diagnosis, o.fold)
    d = '' if reference is None else '{:+.3f} [{:+.3f} {:+.3f}]'.format(*paired_interval(reference, grades, o.diagnosis))
    fixed = [f'{quadratic_kappa(apply_thresholds(o.score, c), o.diagnosis):.3f}' for c in (MIDPOINTS, PUBLISHED_THRESHOLDS)]
    return [name, interval_text(quadratic_kappa(grades, o.diagnosis), kappa_interval(grades, o.diagnosis)), d, *fixed, format_duration(seconds)], grades


def main(data: str, runs: Path, names: list[str]):
    for n in names: train(n, data, runs)
    reference = row(REFERENCE, runs, None)[1] if REFERENCE in names else None
    rows = [row(n, runs, reference)[0] for n in names]
    table(f'{RECIPE.name}, out of fold; the difference is to "{REFERENCE}" on the same images',
          ['variant', 'kappa, nested', 'difference', 'at .5', 'at .75', 'time'], rows, right=('at .5', 'at .75'), wrap=('variant', 'time'))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(VARIANTS))
    p.add_argument('--data', required=True)
    p.add_argument('--runs', type=Path, default=Path('runs/ablation'))
    a = p.parse_args()
    main(a.data, a.runs, a.variants or list(VARIANTS))
