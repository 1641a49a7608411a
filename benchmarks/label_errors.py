"""Whether the list of `review` begins with wrong labels: python benchmarks/label_errors.py [SEED ...] --runs FOLDER

For each seed, the synthetic demo's 2019 table is generated and 5 % of its labels are made wrong in two ways: uniformly
(one of the four other grades, each as likely) and adjacent (one grade up or down, which two graders may well
disagree on). A small network is trained on each table in four folds, so that every image has a score by a network
that has not seen its label. The tables show the share of the wrong labels in the first tenth of the list, for the list
of `review` and for two other rankings, which were compared on the seeds 0 and 1. Finished runs are not trained again.
"""
import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import say, table
from aptos_fastai.data.demo import FOLDERS, write_demo
from aptos_fastai.decisions import cross_fitted_probabilities
from aptos_fastai.metrics import GRADES, quadratic_kappa
from aptos_fastai.pipeline.review import label_surprise

ROOT = Path(__file__).parents[1]
IMAGES = 480
WRONG = .05                                  # of the labels
SHARE = .1                                   # of the list
STAGE = 'small'
RECIPE = """\
[recipe]
seed = {seed}
splits = 4

[images]
size = 128

[table.train]
csv = {name}.csv
images = train_images
grade = diagnosis

[stage.small]
train = train
arch = test_resnet
weights = none
size = 128
folds = 4
epochs = 10
lr = 3e-3
keep = last
tta = d4

[submit]
final = small
"""


def uniform(rng: np.random.Generator, grade: int) -> int:
    "Return one of the four other grades"
    return int(rng.choice([g for g in range(GRADES) if g != grade]))


def adjacent(rng: np.random.Generator, grade: int) -> int:
    "Return a grade beside this one"
    return int(rng.choice([g for g in (grade - 1, grade + 1) if 0 <= g < GRADES]))


KINDS: dict[str, Callable] = dict(uniform=uniform, adjacent=adjacent)


def score_deviation(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    "Return how far each score is from the label"
    return np.abs(scores - labels)


def ordinal_surprise(scores: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    "Return -log p(label | score) by ordinal logistic regression, fitted on the other folds"
    p = cross_fitted_probabilities(scores, labels, folds)
    return -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-12))


RANKINGS: dict[str, Callable] = {
    'list of `review`': label_surprise,
    'ordinal logistic regression': ordinal_surprise,
    '|score - label|': score_deviation,
}


def plant(folder: Path, kind: str, seed: int) -> np.ndarray:
    "Write <kind>.csv beside train.csv with wrong labels; return which rows are wrong"
    df = pd.read_csv(folder / 'train.csv')
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    rows = rng.choice(len(df), round(WRONG * len(df)), replace=False)
    df.loc[rows, 'diagnosis'] = [KINDS[kind](rng, df.diagnosis[i]) for i in rows]
    df.to_csv(folder / f'{kind}.csv', index=False)
    return df.id_code.isin(df.id_code[rows]).to_numpy()


def out_of_fold(runs: Path, kind: str, seed: int) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    "Return oof.csv of a run on wrong labels, the true grades of its rows, and which labels are wrong"
    demo = write_demo(runs / f'demo{seed}', pretrain=20, train=IMAGES, test=5, seed=seed)
    folder = demo / FOLDERS[1].partition('/')[0]
    wrong, original = plant(folder, kind, seed), pd.read_csv(folder / 'train.csv')
    recipe = runs / f'seed{seed}' / f'{kind}.ini'
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(RECIPE.format(seed=seed, name=kind))
    command = [sys.executable, ROOT / 'run.py', 'all', '--recipe', recipe, '--data', folder, '--runs', recipe.parent]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode: sys.exit(1)
    oof = pd.read_csv(recipe.parent / kind / 'oof.csv', dtype=dict(id_code=str))
    order = original.reset_index().set_index('id_code').loc[oof.id_code, 'index'].to_numpy()
    return oof, original.diagnosis.to_numpy()[order], wrong[order]


def share_found(order: np.ndarray, wrong: np.ndarray) -> float:
    "Return the share of the wrong labels in the first part of the list"
    first = order[:round(SHARE * len(order))]
    return float(wrong[first].sum() / wrong.sum())


def measure(runs: Path, kind: str, seed: int) -> list:
    "Return the row of a seed: kappa against the true grades, and the share found by each ranking"
    oof, true, wrong = out_of_fold(runs, kind, seed)
    scores, labels, folds = oof[STAGE].to_numpy(), oof.diagnosis.to_numpy().astype(int), oof.fold.to_numpy()
    kappa = quadratic_kappa(oof[f'{STAGE}_grade'], true)
    found = [share_found(np.argsort(-rank(scores, labels, folds), kind='stable'), wrong) for rank in RANKINGS.values()]
    return [seed, int(wrong.sum()), kappa, *found]


def main(runs: Path, seeds: list[int]) -> None:
    "Print a table for each kind of wrong label"
    columns = ['seed', 'wrong labels', 'kappa against the true grades', *RANKINGS]
    for kind in KINDS:
        rows = [measure(runs, kind, seed) for seed in seeds]
        rows.append(['mean', '', *np.mean([row[2:] for row in rows], 0)])
        texts = [[seed, n, f'{kappa:.3f}', *(f'{100 * o:.0f} %' for o in found)] for seed, n, kappa, *found in rows]
        table(f'{kind} wrong labels in the first {100 * SHARE:.0f} % of the list', columns, texts, wrap=columns[2:])
    say('SYNTHETIC: generated images; labels are wrong at random, not where real graders disagree', 'yellow')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('seeds', nargs='*', type=int, metavar='SEED', help='default: 2 3 4')
    p.add_argument('--runs', type=Path, default=Path('runs/label_errors'), help='folder for tables and runs')
    args = p.parse_args()
    main(args.runs, args.seeds or [2, 3, 4])
