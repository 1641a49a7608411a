"""Compare recipes/one_table.ini with what others write: python benchmarks/against.py --data ~/idrid --seeds 1,2,3

On the same network, weights and folds, for each seed of folds and training:

- 'published': the published 2020 recipe, 30 epochs, its own thresholds;
- 'student': the script of a fastai course: vision_learner, Resize, aug_transforms, fine_tune, squared error, rounding.
  It trains on as many images as teacher and retrain do;
- 'answer': the mean of teacher and retrain, by thresholds fitted on the other folds;
- 'teacher': half the time; it learns from no soft labels;
- 'half the epochs': the answer of teacher and retrain with half the epochs each;
- 'probe teaches': the answer with a linear probe as teacher, which trains in a minute, and 10 epochs of retrain: half
  the time.

Times are those of training and validation, all on one machine. What is there already is not trained again. Differences
are paired on the same images; the table takes the mean of kappa over the seeds, with a bootstrap that draws images and
keeps the seeds together.
"""
import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import format_duration, say, table
from aptos_fastai.common.io import write_csv
from aptos_fastai.metrics import (
    MIDPOINTS,
    PUBLISHED_THRESHOLDS,
    apply_thresholds,
    cross_fitted_grades,
    quadratic_kappa,
)
from aptos_fastai.pipeline.summary import difference_text
from recipes import RECIPE, VARIANTS, out_of_fold, run_command, training_seconds_of

BOOTSTRAPS = 2000
EPOCHS = 12                                  # of a stage of one_table.ini, one of them of the head alone
PROBE_TEACHES = ['stage.teacher.epochs=0', 'stage.teacher.freeze_epochs=30', 'stage.teacher.lr=1e-2',
                 'stage.teacher.lr_div=1', 'stage.teacher.loss=cross_entropy', 'stage.retrain.epochs=9']
Scores = tuple[pd.DataFrame, float]          # out of fold, and the seconds that they took


def train(stage: str, name: str, seed: int, args: argparse.Namespace, sets: Iterable[str] = ()) -> Scores:
    "Train a stage of one_table.ini on all folds; return its out-of-fold scores and the seconds that it took"
    runs = args.runs / f'seed{seed}' / name
    keys = [*sets, f'recipe.seed={seed}', f'recipe.splits={args.splits}', f'stage.folds={args.splits}',
            f'stage.size={args.size}']
    run_command('train', stage, '--recipe', RECIPE, '--data', args.data, '--runs', runs, sets=keys)
    folder = runs / RECIPE.stem / stage
    return out_of_fold(folder), training_seconds_of(folder)


# The script of a course student

def student_fold(frame: pd.DataFrame, images: Path, epochs: int, size: int, seed: int) -> np.ndarray:
    "Train on the rows that are not `valid`, as a fastai course teaches it; return the scores of those that are"
    import torch
    from fastai.vision.all import (
        AccumMetric,
        ImageDataLoaders,
        MSELossFlat,
        RegressionBlock,
        Resize,
        aug_transforms,
        set_seed,
        vision_learner,
    )

    from aptos_fastai.training.weights import BUNDLED_ARCH, bundled_weights

    def kappa(preds, targets): return quadratic_kappa(preds.numpy().round().clip(0, 4), targets.numpy())
    set_seed(seed, reproducible=True)
    dls = ImageDataLoaders.from_df(frame, images, fn_col='file', label_col='diagnosis', valid_col='valid', bs=16,
                                   y_block=RegressionBlock, item_tfms=Resize(size), batch_tfms=aug_transforms(),
                                   num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'weights.pt'
        torch.save(bundled_weights(BUNDLED_ARCH), file)
        learn = vision_learner(dls, BUNDLED_ARCH, n_out=1, loss_func=MSELossFlat(), pretrained=True,
                               metrics=AccumMetric(kappa, flatten=True), pretrained_cfg_overlay=dict(file=str(file)))
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(epochs)
        return learn.get_preds(ds_idx=1)[0].squeeze(1).numpy()


def student(folds: pd.DataFrame, seed: int, epochs: int, args: argparse.Namespace) -> Scores:
    "Train the student's network on the folds of the others; return its out-of-fold scores and the seconds it took"
    parts = []
    for fold in range(args.splits):
        file = args.runs / f'seed{seed}' / 'student' / f'fold{fold}.csv'
        if not file.exists():
            say(f'student, seed {seed}, fold {fold}: {epochs} epochs …')
            frame = folds.assign(valid=folds.fold == fold, file=folds.id_code + args.suffix)
            start = time.monotonic()
            scores = student_fold(frame, Path(args.data) / args.images, epochs, args.size, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            found = frame[frame.valid].assign(score=scores, seconds=time.monotonic() - start)
            write_csv(file, found[['id_code', 'diagnosis', 'fold', 'score', 'seconds']])
        parts.append(pd.read_csv(file, dtype=dict(id_code=str)))
    return pd.concat(parts).sort_values('id_code').reset_index(drop=True), sum(o.seconds[0] for o in parts)


# Results

def results_of(seed: int, args: argparse.Namespace) -> dict[str, tuple[np.ndarray, float]]:
    "Train what is missing of a seed; return the grades of each with the seconds that it took, and the true grades"
    (teacher, t), (retrain, r) = (train(stage, 'ours', seed, args) for stage in ('teacher', 'retrain'))
    halves = [train(stage, 'half', seed, args, [f'stage.epochs={EPOCHS // 2 - 1}']) for stage in ('teacher', 'retrain')]
    probe = [train(stage, 'probe', seed, args, PROBE_TEACHES) for stage in ('teacher', 'retrain')]
    published, published_time = train('teacher', 'published', seed, args, VARIANTS['published recipe'].sets)
    if not published.fold.equals(teacher.fold): raise SystemExit('The folds of the two recipes differ.')
    n, soft = len(teacher) * (args.splits - 1), args.ungraded * args.splits
    epochs = round((2 * EPOCHS * n + EPOCHS * soft) / n) - 1               # and one epoch of the frozen body
    by_student, student_time = student(teacher, seed, epochs, args)
    found = {
        'answer': (teacher.assign(score=(teacher.score + retrain.score) / 2), t + r, None),
        'teacher': (teacher, t, None),
        'retrain': (retrain, t + r, None),
        'half the epochs': (teacher.assign(score=np.mean([o.score for o, _ in halves], axis=0)),
                            sum(seconds for _, seconds in halves), None),
        'probe teaches': (teacher.assign(score=np.mean([o.score for o, _ in probe], axis=0)),
                          sum(seconds for _, seconds in probe), None),
        'published': (published, published_time, PUBLISHED_THRESHOLDS),
        'published, fitted thresholds': (published, published_time, None),
        'student': (by_student, student_time, MIDPOINTS),
        'student, fitted thresholds': (by_student, student_time, None),
    }
    return {name: (grades_of(oof, thresholds), seconds) for name, (oof, seconds, thresholds) in found.items()} | {
        'truth': (teacher.diagnosis.to_numpy(), 0)}


def grades_of(oof: pd.DataFrame, thresholds: Sequence[float] | None) -> np.ndarray:
    "Return the grades of scores by thresholds, or by those fitted on the other folds"
    if thresholds is not None: return np.asarray(apply_thresholds(oof.score, thresholds))
    return cross_fitted_grades(oof.score, oof.diagnosis, oof.fold, how='regularised')


def mean_kappas(results: list[dict], name: str, rows: np.ndarray) -> float:
    return float(np.mean([quadratic_kappa(o[name][0][rows], o['truth'][0][rows]) for o in results]))


def show(results: list[dict], seeds: list[int], args: argparse.Namespace) -> None:
    "Print the kappa of each, by seed and as the mean, and the difference of the answer from it"
    n, rng = len(results[0]['truth'][0]), np.random.default_rng(0)
    draws = [rng.integers(0, n, n) for _ in range(BOOTSTRAPS)]
    everything, rows = np.arange(n), []
    for name in results[0]:
        if name == 'truth': continue
        kappas = [f'{mean_kappas([o], name, everything):.3f}' for o in results]
        gain = partial(lambda name, rows: mean_kappas(results, 'answer', rows) - mean_kappas(results, name, rows), name)
        text = ''
        if name != 'answer':
            text = difference_text(gain(everything), *np.quantile([gain(o) for o in draws], [.025, .975]))
        seconds = float(np.mean([o[name][1] for o in results]))
        rows.append([name, *kappas, f'{mean_kappas(results, name, everything):.3f}', text, format_duration(seconds)])
    table(f'{n} images, {args.splits} folds, {args.size} px, out-of-fold kappa',
          ['', *(f'seed {o}' for o in seeds), 'mean', 'the answer, minus it (95 % CI)', 'time'], rows)


def main(args: argparse.Namespace) -> None:
    results = []
    for i, seed in enumerate(args.seeds):
        results.append(results_of(seed, args))
        show(results, args.seeds[:i + 1], args)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--data', required=True, help='folder of train.csv and test.csv')
    p.add_argument('--images', default='train_images', help='folder of the graded images, in --data')
    p.add_argument('--suffix', default='.jpg', help='of the files of images')
    p.add_argument('--ungraded', type=int, default=103, help='how many images test.csv lists')
    p.add_argument('--seeds', type=lambda text: [int(o) for o in text.split(',')], default=[1], metavar='SEED,...')
    p.add_argument('--splits', type=int, default=5, help='folds')
    p.add_argument('--size', type=int, default=224, help='px')
    p.add_argument('--runs', type=Path, default=Path('runs/against'), help='folder for the runs')
    main(p.parse_args())
