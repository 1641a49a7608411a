"""What a change of the training adds on IDRiD: python benchmarks/ablation.py --data ~/idrid [VARIANT ...]

The baseline is the teacher of recipes/one_table.ini at 160 px for 8 epochs; each variant differs from it in one thing,
and is trained and validated on the same folds. Scores are kept in a CSV, a row for each image and network, after every
network: what is there already is not trained again (delete its rows to train it again).

The table shows out-of-fold kappa by thresholds fitted on the other folds, AUC of referable grades, Spearman's
correlation, the SD of kappa between folds, and differences from the baseline on the same images (paired bootstrap).
'another seed' and 'a third seed' are the baseline again: their differences are what chance does. Ensembles are compared
with one of three baselines. A seed of --seeds is that of the folds, of the batches and of the augmentation.
"""
import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix, MixUp
from fastai.optimizer import Adam
from fastai.vision.all import Callback, Learner, set_seed

from aptos_fastai.common.console import format_duration, say, table
from aptos_fastai.common.io import AptosError, digest, write_csv
from aptos_fastai.metrics import (
    REFERABLE,
    auc,
    cross_fitted_grades,
    kappa_interval,
    paired_auc,
    paired_interval,
    quadratic_kappa,
)
from aptos_fastai.pipeline.graph import load_run, start_run
from aptos_fastai.pipeline.scores import predict_views
from aptos_fastai.pipeline.stage import fit_stage, optional_callbacks, training_frame
from aptos_fastai.pipeline.summary import difference_text, interval_text
from aptos_fastai.recipe.graph import Recipe
from aptos_fastai.recipe.read import read_recipe
from aptos_fastai.recipe.sections import Stage
from aptos_fastai.run_folder import Run
from aptos_fastai.training.callbacks import History, Reproducible
from aptos_fastai.training.loaders import get_dls
from aptos_fastai.training.model import body_stats, get_learner
from aptos_fastai.training.outputs import GradeLoss

RECIPE = Path(__file__).parents[1] / 'recipes/one_table.ini'
STAGE, BASELINE, BASELINES = 'teacher', 'baseline', 'three baselines'
SMALL = ['stage.size=160', 'stage.epochs=7', 'images.size=160', 'stage.precision=f32']       # and one frozen epoch
THRESHOLDS = 'regularised'
KEY = ['variant', 'seed', 'fold', 'settings']                 # of a network in the CSV


# Losses that are not in the package

class PerImageLoss(GradeLoss):
    "Smooth L1 that fastai's MixUp and CutMix interpolate between the grades of the two images that they mix"
    y_int = True                              # tells them to interpolate the loss, not the grades

    def forward(self, pred, target):
        grades = target.as_subclass(torch.Tensor).float().flatten()
        return F.smooth_l1_loss(pred.as_subclass(torch.Tensor).float()[:, 0], grades, reduction=self.reduction)


class SmoothedLoss(GradeLoss):
    "Cross-entropy with label smoothing 0.1"
    def forward(self, pred, target):
        grades = target.as_subclass(torch.Tensor).flatten().round().long()
        return F.cross_entropy(pred.as_subclass(torch.Tensor).float(), grades, label_smoothing=.1)


def fastai_adam(layers: Iterable, lr: float) -> Adam:
    "Return fastai's own Adam, with the weight decay of the package's"
    layers = list(layers)
    opt = Adam([o.parameters for o in layers], lr=lr, sqr_mom=.99, eps=1e-5)
    for p in (p for layer in layers for p in layer.undecayed): opt.state[p]['do_wd'] = False
    return opt


# Variants

@dataclass(frozen=True)
class Variant:
    """A change of the baseline.

    `sets` are keys of the recipe; `loss` and `opt_func` replace those of the Learner; `callbacks` makes further ones;
    images are drawn by the number of their grade to the power of -`balance`; `reseed` is added to the seed of training.
    """
    sets: Sequence[str] = ()
    loss: Callable[[str], GradeLoss] | None = None
    opt_func: Callable | None = None
    callbacks: Callable[[], list[Callback]] = list
    balance: float = 0.
    reseed: int = 0


CORN, CLASSES = ['stage.loss=corn'], ['stage.loss=cross_entropy']
VARIANTS = {
    BASELINE: Variant(),
    'corn': Variant(CORN),
    'cross-entropy': Variant(CLASSES),
    'another seed': Variant(reseed=1000),
    'label smoothing': Variant(CLASSES, loss=SmoothedLoss),
    'mixup': Variant(loss=PerImageLoss, callbacks=lambda: [MixUp()]),
    'mixup of grades': Variant(callbacks=lambda: [MixUp()]),
    'cutmix': Variant(loss=PerImageLoss, callbacks=lambda: [CutMix()]),
    'balanced': Variant(balance=1.),
    'half balanced': Variant(balance=.5),
    'average pooling': Variant(['stage.head=avg']),
    "fastai's Adam": Variant(opt_func=fastai_adam),
    'clip': Variant(['stage.clip=1']),
    'drop path': Variant(['stage.drop_path=.1']),
    'layer decay': Variant(['stage.layer_decay=.8', 'stage.lr_div=1']),
    'a third seed': Variant(reseed=2000),
    'longer warm-up': Variant(['stage.warmup=.4']),
    'mean squared error': Variant(['stage.loss=mse']),
}
ENSEMBLES = {
    BASELINES: [BASELINE, 'another seed', 'a third seed'],
    'baseline + corn + cross-entropy': [BASELINE, 'corn', 'cross-entropy'],
}


def recipe_of(name: str, seed: int) -> Recipe:
    return read_recipe(RECIPE, sets=[*SMALL, f'recipe.seed={seed}', *VARIANTS[name].sets])


def settings_of(name: str) -> str:
    "Return a short hash of the settings of a variant: a change of them is another network"
    variant = VARIANTS[name]
    what = [SMALL, variant.sets, variant.balance, variant.reseed, getattr(variant.loss, '__name__', ''),
            getattr(variant.opt_func, '__name__', ''), [type(o).__name__ for o in variant.callbacks()]]
    return digest(what)[:8]


# Training

@contextmanager
def prepared_run(data: str, runs: Path, seed: int):
    "Prepare the images, with the folds of a seed; yield the run and its progress bars"
    run = load_run(RECIPE, data, runs / f'seed{seed}', sets=[*SMALL, f'recipe.seed={seed}'])
    with start_run(run, [STAGE]) as prepared: yield prepared


def learner(run: Run, stage: Stage, variant: Variant, fold: int, seed: int) -> Learner:
    "Return the Learner of a variant as its training starts"
    frame = training_frame(run, stage, fold, {})
    if variant.balance:
        frame['weight'] = frame.diagnosis.map(frame[~frame.valid].diagnosis.value_counts()) ** -variant.balance
        stage = replace(stage, source_weights=(1.,))          # get_dls draws by the column
    dls = get_dls(frame, stage, run.prep_of(stage), run.recipe.augment, body_stats(stage.arch), seed=seed)
    learn = get_learner(stage, dls)
    if variant.loss: learn.loss_func = variant.loss(stage.loss)
    if variant.opt_func: learn.opt_func = variant.opt_func
    return learn


def train(run: Run, name: str, seed: int, fold: int) -> pd.DataFrame:
    "Train and validate one network; return its rows of the CSV"
    variant, start = VARIANTS[name], time.monotonic()
    stage, trained_by = recipe_of(name, seed).stages[STAGE], seed + variant.reseed
    set_seed(trained_by)
    learn = learner(run, stage, variant, fold, trained_by)
    hist = History(stage.keep)
    cbs = [Reproducible(trained_by, hist), *optional_callbacks(stage, stage.precision), *variant.callbacks(), hist]
    fit_stage(learn, stage, cbs)
    learn.model.load_state_dict(hist.weights)
    valid = learn.dls.valid.items
    scores = predict_views(learn, valid, stage.tta)[0].mean(1)
    return pd.DataFrame(dict(variant=name, seed=seed, fold=fold, settings=settings_of(name), id_code=valid.id_code,
                             diagnosis=valid.diagnosis, score=scores, seconds=round(time.monotonic() - start, 1)))


def read_results(file: Path) -> pd.DataFrame:
    "Return the rows of the CSV"
    return pd.read_csv(file, dtype=dict(id_code=str, settings=str)) if file.exists() else pd.DataFrame(columns=KEY)


def train_all(data: str, file: Path, names: list[str], folds: int, seed: int) -> None:
    "Train what the CSV lacks: every variant on a fold before the next fold"
    known = set(read_results(file)[KEY].itertuples(index=False, name=None))
    todo = [(fold, name) for fold in range(folds) for name in names
            if (name, seed, fold, settings_of(name)) not in known]
    if not todo: return
    with prepared_run(data, file.with_suffix(''), seed) as (run, _):
        for i, (fold, name) in enumerate(todo):
            rows = train(run, name, seed, fold)
            write_csv(file, pd.concat([read_results(file), rows]))
            say(f'{i + 1}/{len(todo)}  seed {seed} fold {fold}  {name}: kappa at midpoints '
                f'{quadratic_kappa(rows.score.round().clip(0, 4), rows.diagnosis):.3f}, '
                f'{format_duration(rows.seconds.iloc[0])}')


# Results

def scores_of(results: pd.DataFrame, name: str, seed: int, folds: int) -> pd.DataFrame | None:
    "Return the scores of a variant, or the mean scores of an ensemble, by id; None if some are missing"
    members = ENSEMBLES.get(name, [name])
    parts = []
    for member in members:
        rows = results[(results.variant == member) & (results.seed == seed) & (results.fold < folds)
                       & (results.settings == settings_of(member))]
        if rows.fold.nunique() < folds: return None
        parts.append(rows.set_index('id_code').sort_index())
    return parts[0].assign(score=np.mean([o.score for o in parts], 0), seconds=sum(o.seconds for o in parts))


def graded(scores: pd.DataFrame) -> pd.DataFrame:
    "Return scores with grades by thresholds fitted on the other folds"
    return scores.assign(grade=cross_fitted_grades(scores.score, scores.diagnosis, scores.fold, THRESHOLDS))


def result_row(name: str, scores: pd.DataFrame, reference: pd.DataFrame | None) -> list:
    "Return the row of a variant in the table, with its differences from the `reference`"
    y, positive = scores.diagnosis, scores.diagnosis >= REFERABLE
    by_fold = [quadratic_kappa(part.grade, part.diagnosis) for _, part in scores.groupby('fold')]
    kappa = interval_text(quadratic_kappa(scores.grade, y), kappa_interval(scores.grade, y))
    row = [name, kappa, f'{np.std(by_fold, ddof=1):.3f}', f'{auc(scores.score, positive)[0]:.3f}',
           f'{scores.score.corr(y, method="spearman"):.3f}']
    seconds = scores.groupby('fold').seconds.first().mean()
    if reference is None: return [*row, '', '', format_duration(seconds)]
    return [*row, difference_text(*paired_interval(reference.grade, scores.grade, y)),
            difference_text(*paired_auc(reference.score, scores.score, positive)), format_duration(seconds)]


def show(file: Path, names: list[str], folds: int, seed: int) -> None:
    "Print the table of one seed"
    found = {name: scores_of(read_results(file), name, seed, folds) for name in [*names, *ENSEMBLES]}
    found = {name: graded(scores) for name, scores in found.items() if scores is not None}
    if not found: return
    rows = []
    for name, scores in found.items():
        against = BASELINES if name in ENSEMBLES else BASELINE
        rows.append(result_row(name, scores, found.get(against) if name != against else None))
    columns = ['variant', 'kappa (95 % CI)', 'SD of folds', 'AUC', 'Spearman', 'difference of kappa (95 % CI)',
               'difference of AUC (95 % CI)', 'a network']
    table(f'IDRiD, seed {seed}, {len(next(iter(found.values())))} images of {folds} folds, out-of-fold', columns, rows,
          right=columns[2:5], wrap=('variant', 'a network'))


def main(data: str, file: Path, names: list[str], folds: int, seeds: list[int]) -> None:
    unknown = [name for name in names if name not in VARIANTS]
    if unknown: raise AptosError(f'{unknown[0]}: no such variant. Choose from: {", ".join(VARIANTS)}.')
    for seed in seeds:
        train_all(data, file, names, folds, seed)
        show(file, names, folds, seed)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('variants', nargs='*', metavar='VARIANT', help=', '.join(VARIANTS))
    p.add_argument('--data', required=True, help='folder of the tables')
    p.add_argument('--results', type=Path, default=Path('runs/ablation.csv'), help='CSV of scores; runs lie beside it')
    p.add_argument('--folds', type=int, choices=range(2, 6), default=3, help='how many of five folds: 2 to 5')
    p.add_argument('--seeds', type=lambda text: [int(o) for o in text.split(',')], default=[42], metavar='SEED,...',
                   help='of folds and training')
    args = p.parse_args()
    try: main(args.data, args.results, args.variants or list(VARIANTS), args.folds, args.seeds)
    except AptosError as e: raise SystemExit(str(e)) from None
