"""Kappa against time: python benchmarks/budget.py --data ~/idrid --minutes 10,30,120

For each number of minutes, on the same folds and images:

- 'fit': `run.py fit --hours`, which chooses its settings for the time; the time counted is that of the whole command,
  with choosing, preparing and the report;
- 'published': the published 2020 recipe on the network, size and folds of `fit`, with as many epochs as train in the
  same time (more than its 30 where there is time), and its own thresholds; then by thresholds fitted on other folds.

The time of the published recipe is that of training and validation alone. What is there already is not trained again.

With --together the two run at the same time, each on half of the cores.
"""
import argparse
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from against import grades_of

from aptos_fastai.common.console import format_duration, say, table
from aptos_fastai.common.io import read_record, write_record
from aptos_fastai.metrics import PUBLISHED_THRESHOLDS, kappa_interval, paired_interval, quadratic_kappa
from aptos_fastai.pipeline.summary import difference_text, interval_text
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import read_recipe
from recipes import VARIANTS, out_of_fold, run_command, training_seconds_of

STAGE = 'teacher'
R = TypeVar('R')


def fit(minutes: float, args: argparse.Namespace) -> tuple[Path, float]:
    "Fit for some minutes; return the run folder and the seconds that the command took"
    root = args.runs / f'fit_{minutes:g}'
    file = root / 'benchmark.json'
    if not file.exists():
        start = time.monotonic()
        images = [args.data / 'train_images', args.data / 'test_images']
        run_command('fit', args.data / 'train.csv', *images, '--name', root.name, '--runs', args.runs,
                    '--hours', f'{minutes / 60:.3f}', sets=[f'recipe.seed={args.seed}'])
        write_record(file, dict(seconds=time.monotonic() - start))
    return root, read_record(file)['seconds']


def published(name: str, epochs: int, folds: int, recipe: Recipe, args: argparse.Namespace) -> Path:
    "Train the published recipe on the tables, network and first folds of a recipe; return the folder of its stage"
    keys = [*VARIANTS['published recipe'].sets, 'stage.loss=smooth_l1', 'stage.head=gem', f'stage.folds={folds}',
            f'stage.epochs={epochs}']
    run_command('train', STAGE, '--recipe', recipe.path, '--data', args.data, '--runs', args.runs, '--name', name,
                sets=keys)
    return args.runs / name / STAGE


def seconds_of_an_epoch(folder: Path) -> float:
    "Return the seconds that an epoch and its validation take, without those of the start: of the last of two epochs"
    return float(pd.read_csv(folder / 'fold0/history.csv').seconds.iloc[-1])


def published_for(seconds: float, minutes: float, root: Path, args: argparse.Namespace) -> tuple[Path, int]:
    "Train the published recipe for some seconds as `fit` in `root` chose; return its folder and epochs"
    recipe = read_recipe(root / 'recipe.ini')
    folds = recipe.folds_of(recipe.submit.final)
    timed = published(f'two_epochs_{minutes:g}', 2, 1, recipe, args)
    epochs = max(1, round(seconds / folds / seconds_of_an_epoch(timed)))
    return published(f'published_{minutes:g}', epochs, folds, recipe, args), epochs


def both(minutes: float, args: argparse.Namespace) -> tuple[tuple[Path, float], tuple[Path, int]]:
    "Return what `fit` and `published_for` return, run at the same time, each on half of the cores"
    cores = sorted(os.sched_getaffinity(0))
    with ThreadPoolExecutor() as pool:
        fitting = pool.submit(on_cores, cores[::2], fit, minutes, args)
        root = args.runs / f'fit_{minutes:g}'
        while not (root / STAGE / 'fold0').exists() and not fitting.done(): time.sleep(1)
        training = pool.submit(on_cores, cores[1::2], published_for, minutes * 60, minutes, root, args)
        return fitting.result(), training.result()


def on_cores(cores: Iterable[int], function: Callable[..., R], *args: object) -> R:
    "Call a function; the processes that it starts have these cores only"
    os.sched_setaffinity(0, cores)      # of this thread, and of what it starts
    return function(*args)


def results(minutes: float, args: argparse.Namespace) -> list[list[str]]:
    "Train what is missing for some minutes; return the rows of the table"
    if args.together:
        (root, seconds), (folder, epochs) = both(minutes, args)
    else:
        root, seconds = fit(minutes, args)
        folder, epochs = published_for(seconds, minutes, root, args)
    recipe = read_recipe(root / 'recipe.ini')
    answer = recipe.submit.final
    ours = pd.read_csv(root / 'oof.csv', dtype=dict(id_code=str)).dropna(subset=answer)
    folds = recipe.folds_of(answer)
    theirs = out_of_fold(folder).set_index('id_code').loc[ours.id_code].reset_index()
    if not np.array_equal(theirs.fold, ours.fold): raise SystemExit('The folds of the two recipes differ.')
    stage = recipe.stages[STAGE]
    what = f'{stage.size} px, {folds} folds, {stage.freeze_epochs + stage.epochs} epochs, answer: {answer}'
    own = ours[f'{answer}_grade'].to_numpy().astype(int)
    fixed, fitted = (grades_of(theirs, thresholds) for thresholds in (PUBLISHED_THRESHOLDS, None))
    spent = format_duration(training_seconds_of(folder))
    return [row(f'{minutes:g} min', 'fit', what, own, ours, own, format_duration(seconds)),
            row('', 'published', f'{epochs} epochs', fixed, ours, own, spent),
            row('', 'the same, fitted thresholds', '', fitted, ours, own, '')]


def row(budget: str, name: str, what: str, grades: np.ndarray, ours: pd.DataFrame, own: np.ndarray,
        spent: str) -> list[str]:
    "Return a row of the table: kappa with its interval, and the difference of our grades from `grades`"
    truth = ours.diagnosis.to_numpy()
    kappa = interval_text(quadratic_kappa(grades, truth), kappa_interval(grades, truth))
    gain = '' if grades is own else difference_text(*paired_interval(grades, own, truth))
    return [budget, name, what, f'{len(truth)}', kappa, gain, spent]


def main(args: argparse.Namespace) -> None:
    rows: list[list[str]] = []
    for minutes in args.minutes:
        say(f'{minutes:g} minutes …', 'bold')
        rows += results(minutes, args)
        table('Out-of-fold kappa by time', ['for', 'recipe', 'chosen', 'images', 'kappa (95 % CI)',
                                            'fit, minus it (95 % CI)', 'time'], rows)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', type=Path, required=True, help='folder of train.csv, train_images/ and test_images/')
    p.add_argument('--minutes', type=lambda text: [float(o) for o in text.split(',')], default=[10.], metavar='M,...')
    p.add_argument('--seed', type=int, default=1, help='of folds and training')
    p.add_argument('--together', action='store_true', help='run both at the same time, each on half of the cores')
    p.add_argument('--runs', type=Path, default=Path('runs/budget'), help='folder for the runs')
    main(p.parse_args())
