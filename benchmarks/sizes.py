"""Compare sizes of the square in recipes/one_table.ini: python benchmarks/sizes.py --data ~/idrid --sizes 224,288

For each seed of folds and training, and each size: the teacher alone, the retrained network, and the answer (the mean
of both), by thresholds fitted on the other folds. Differences are from the answer of the first size, paired on the same
images, of the mean over the seeds, with a bootstrap that draws images. `--teacher` trains the teachers alone.
What is there already is not trained again.
"""
import argparse
from functools import partial
from pathlib import Path

import numpy as np
from against import BOOTSTRAPS, Scores, grades_of, mean_kappas, train

from aptos_fastai.common.console import format_duration, table
from aptos_fastai.pipeline.summary import difference_text

PREPARED = 320                               # px: images.size of one_table.ini


def results_of(seed: int, args: argparse.Namespace) -> dict[str, tuple[np.ndarray, float]]:
    "Train what is missing of a seed; return the grades of each with the seconds that it took, and the true grades"
    found = {}
    for size in args.sizes:
        options = argparse.Namespace(**vars(args) | dict(size=size))
        sets = [f'images.size={max(PREPARED, size)}']
        stages = ['teacher'] if args.teacher else ['teacher', 'retrain']
        scores: list[Scores] = [train(stage, f'{size}px', seed, options, sets) for stage in stages]
        frames, seconds = [frame for frame, _ in scores], [spent for _, spent in scores]
        if not args.teacher:
            mean = frames[0].assign(score=np.mean([o.score for o in frames], axis=0))
            found[f'{size} px, answer'] = grades_of(mean, None), sum(seconds)
            found[f'{size} px, retrained'] = grades_of(frames[1], None), sum(seconds)
        found[f'{size} px, teacher'] = grades_of(frames[0], None), seconds[0]
        found['truth'] = frames[0].diagnosis.to_numpy(), 0
    return found


def difference(results: list[dict], name: str, reference: str, rows: np.ndarray) -> float:
    return mean_kappas(results, name, rows) - mean_kappas(results, reference, rows)


def show(results: list[dict], args: argparse.Namespace) -> None:
    "Print the kappa of each, by seed and as the mean, and its difference from the first"
    names = [name for name in results[0] if name != 'truth']
    n, rng, reference = len(results[0]['truth'][0]), np.random.default_rng(0), names[0]
    draws = [rng.integers(0, n, n) for _ in range(BOOTSTRAPS)]
    everything, rows = np.arange(n), []
    for name in names:
        kappas = [f'{mean_kappas([o], name, everything):.3f}' for o in results]
        text = ''
        if name != reference:
            gain = partial(difference, results, name, reference)
            text = difference_text(gain(everything), *np.quantile([gain(o) for o in draws], [.025, .975]))
        seconds = float(np.mean([o[name][1] for o in results]))
        rows.append([name, *kappas, f'{mean_kappas(results, name, everything):.3f}', text, format_duration(seconds)])
    table(f'{n} images, {args.splits} folds, out-of-fold kappa; difference from "{reference}"',
          ['', *(f'seed {o}' for o in args.seeds[:len(results)]), 'mean', 'difference (95 % CI)', 'time'], rows)


def main(args: argparse.Namespace) -> None:
    results = []
    for seed in args.seeds:
        results.append(results_of(seed, args))
        show(results, args)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = dict(type=lambda text: [int(o) for o in text.split(',')], metavar='N,...')
    p.add_argument('--data', required=True, help='folder of train.csv and test.csv')
    p.add_argument('--sizes', default=[224, 288], help='px', **numbers)
    p.add_argument('--seeds', default=[1], help='of folds and training', **numbers)
    p.add_argument('--splits', type=int, default=5, help='folds')
    p.add_argument('--teacher', action='store_true', help='train the teachers alone')
    p.add_argument('--runs', type=Path, default=Path('runs/sizes'), help='folder for the runs')
    main(p.parse_args())
