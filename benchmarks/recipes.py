"""Measure what each ingredient of recipes/one_table.ini adds: python benchmarks/recipes.py --data ~/idrid [VARIANT ...]

Every variant is a run under --runs (default runs/ablation) on the same folds. Finished variants are not trained again.
The table shows out-of-fold kappa by thresholds fitted on the other folds, its difference from the reference on the same
images (paired bootstrap), kappa at fixed thresholds, and the time to train.
"""
import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, table
from aptos_fastai.metrics import (
    MIDPOINTS,
    PUBLISHED_THRESHOLDS,
    apply_thresholds,
    cross_fitted_grades,
    kappa_interval,
    paired_interval,
    quadratic_kappa,
)
from aptos_fastai.pipeline.summary import difference_text, interval_text

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / 'recipes/one_table.ini'
REFERENCE = 'ours'

PUBLISHED_AUGMENT = [
    'augment.hue=.1', 'augment.blur=.5', 'augment.shift=.2', 'augment.scale=.8 1.2', 'augment.shear=.2',
]
PUBLISHED_IMAGE = ['images.crop=none', 'images.aspect=squash', 'images.size=0']
CONSTANT_RATE = ['stage.schedule=constant', 'stage.lr_div=1', 'stage.freeze_epochs=0']
NO_AUGMENT = [
    'augment.brightness=0', 'augment.contrast=0', 'augment.saturation=0', 'augment.hue=0', 'augment.rotate=0',
    'augment.shift=0', 'augment.hflip=0', 'augment.scale=1 1',
]


@dataclass
class Variant:
    "A change of the recipe: `sets` are its keys, `stage` is the stage that is measured"
    sets: list[str]
    stage: str = 'teacher'


VARIANTS = {
    'published recipe': Variant([
        *PUBLISHED_IMAGE, *PUBLISHED_AUGMENT, *CONSTANT_RATE, 'stage.lr=2e-4', 'stage.wd=0', 'stage.epochs=30',
        'stage.sqr_mom=.999', 'stage.eps=1e-8', 'stage.tta=hflip', 'stage.thresholds=.75 1.5 2.5 3.5']),
    'ours': Variant([]),
    'ours, retrained with soft labels': Variant([], 'retrain'),
    'squashed whole image': Variant(PUBLISHED_IMAGE),
    'constant rate': Variant([*CONSTANT_RATE, 'stage.lr=1e-3', 'stage.epochs=12']),
    'average pooling': Variant(['stage.head=avg']),
    'published augmentation': Variant(PUBLISHED_AUGMENT),
    'no augmentation': Variant(NO_AUGMENT),
    'cut-off left black': Variant(['images.cut_off=black']),
    'one rate and no frozen start': Variant(['stage.lr_div=1', 'stage.freeze_epochs=0', 'stage.epochs=12']),
    'progressive resizing': Variant([
        'stage.small.train=train', 'stage.small.size=160', 'stage.small.epochs=6', 'stage.teacher.init=small',
        'stage.teacher.epochs=6', 'stage.teacher.freeze_epochs=0', 'stage.teacher.lr=1.5e-3']),
    'mean squared error': Variant(['stage.loss=mse']),
    'moving average of weights': Variant(['stage.ema=.99']),
    'four epochs in all': Variant(['stage.epochs=3']),
    'six epochs in all': Variant(['stage.epochs=5']),
    'one view, not eight': Variant(['stage.tta=none']),
}


def runs_folder(name: str, runs: Path) -> Path:
    "Return the folder for the runs of a variant; variants of the same keys share it ('ours', 'ours, retrained ...')"
    return runs / name.partition(',')[0].replace(' ', '_')


def train(name: str, data: str, runs: Path) -> None:
    "Train the stage of a variant; exit if that fails"
    variant = VARIANTS[name]
    run_command('train', variant.stage, '--recipe', RECIPE, '--data', data, '--runs', runs_folder(name, runs),
                sets=variant.sets)


def run_command(*args: str | Path, sets: Iterable[str] = ()) -> None:
    "Run a command of the program with keys of --set; exit if it fails"
    options = [option for text in sets for option in ('--set', text)]
    if subprocess.run([sys.executable, ROOT / 'run.py', *args, *options], check=False).returncode: sys.exit(1)


def out_of_fold(folder: Path) -> pd.DataFrame:
    "Return the out-of-fold scores of a stage, by its folder, in the order of ids"
    files = sorted(folder.glob('fold*/preds.csv'))
    preds = pd.concat([pd.read_csv(file, dtype=dict(id_code=str)) for file in files])
    return preds.sort_values('id_code').reset_index(drop=True)


def training_seconds(name: str, runs: Path) -> float:
    "Return the seconds that a variant's stage and the stages that it builds on took to train"
    variant = VARIANTS[name]
    stages = {variant.stage, *(key.partition('=')[2] for key in variant.sets if '.init=' in key)}
    if variant.stage == 'retrain': stages.add('teacher')
    root = runs_folder(name, runs) / RECIPE.stem
    return sum(training_seconds_of(root / stage) for stage in stages)


def training_seconds_of(folder: Path) -> float:
    "Return the seconds that the folds of a stage took to train, by its folder"
    return sum(json.loads(file.read_text())['seconds'] for file in folder.glob('fold*/stage.json'))


def result_row(name: str, runs: Path, reference: np.ndarray | None) -> tuple[list, np.ndarray]:
    "Return the table row of a variant and its grades; `reference` are the grades of the reference"
    oof = out_of_fold(runs_folder(name, runs) / RECIPE.stem / VARIANTS[name].stage)
    grades = cross_fitted_grades(oof.score, oof.diagnosis, oof.fold)
    kappa = interval_text(quadratic_kappa(grades, oof.diagnosis), kappa_interval(grades, oof.diagnosis))
    difference = ''
    if reference is not None: difference = difference_text(*paired_interval(reference, grades, oof.diagnosis))
    fixed = [f'{quadratic_kappa(apply_thresholds(oof.score, thresholds), oof.diagnosis):.3f}'
             for thresholds in (MIDPOINTS, PUBLISHED_THRESHOLDS)]
    return [name, kappa, difference, *fixed, format_duration(training_seconds(name, runs))], grades


def main(data: str, runs: Path, names: list[str]) -> None:
    for name in names: train(name, data, runs)
    reference = result_row(REFERENCE, runs, None)[1] if REFERENCE in names else None
    rows = [result_row(name, runs, reference)[0] for name in names]
    columns = ['variant', 'kappa (95 % CI)', 'difference (95 % CI)', 'at midpoints', 'at .75 …', 'time']
    table(f'{RECIPE.name}, out-of-fold; difference from "{REFERENCE}" on the same images', columns, rows,
          right=('at midpoints', 'at .75 …'), wrap=('variant', 'time'))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(VARIANTS))
    p.add_argument('--data', required=True, help='folder of the tables')
    p.add_argument('--runs', type=Path, default=Path('runs/ablation'), help='folder for the runs')
    args = p.parse_args()
    main(args.data, args.runs, args.variants or list(VARIANTS))
