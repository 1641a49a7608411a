"""What thresholds, intervals and the report cost: python benchmarks/grades.py [IMAGES]

Thresholds against Nelder-Mead (scipy) on the same scores; the bootstrap against resampling images one set at a time; and a report of that many made-up
validated images (default 35,000), whose run folder is written to a temporary folder: time and size.
"""
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from safetensors.torch import save

from aptos_fastai.common.console import Bars, table
from aptos_fastai.common.io import file_hash, write_bytes, write_csv, write_record
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.data.retina import prepare
from aptos_fastai.data.store import jpeg_hash, store_folder
from aptos_fastai.metrics import MIDPOINTS, GradeThresholds, apply_thresholds, kappa_interval, quadratic_kappa
from aptos_fastai.pipeline.summary import oof_table, summarise
from aptos_fastai.recipe import read_recipe
from aptos_fastai.reports.run_report import write_report
from aptos_fastai.run_folder import HISTORY, PREDS, WEIGHTS, Run
from aptos_fastai.training.model import create_model

rng = np.random.default_rng(0)


def scored(n: int) -> tuple[np.ndarray, np.ndarray]:
    y = rng.choice(5, n, p=(.73, .07, .15, .03, .02))                    # EyePACS 2015
    return .6 * y + .2 + rng.normal(0, .45, n), y


def timed(f, *args):
    t0 = time.perf_counter()
    out = f(*args)
    return time.perf_counter() - t0, out


def nelder_mead(s, y) -> float:
    from scipy.optimize import minimize
    return -minimize(lambda c: -quadratic_kappa(apply_thresholds(s, np.sort(c)), y), MIDPOINTS, method='Nelder-Mead').fun


def resampled(g, y, n: int = 100): return [quadratic_kappa(g[r], y[r]) for r in rng.integers(0, len(y), (n, len(y)))]


def made_up_run(root: Path, n: int) -> Run:
    "A finished run of one_table.ini on `n` graded and `n` // 10 ungraded images that share 50 painted files"
    recipe = read_recipe(Path(__file__).parents[1] / 'recipes/one_table.ini')
    run = Run(recipe, root, root / 'runs' / recipe.name, {})
    cv2.imwrite(str(root / 'image.jpg'), np.zeros((64, 64, 3), np.uint8))
    for name, m in (('train', n), ('test', n // 10)):
        f = pd.DataFrame(dict(id_code=[f'{name}{i:06}' for i in range(m)], path=str(root / 'image.jpg'), source=name))
        f['group'] = [f'{name}:{i // 2}' for i in range(m)]
        f['diagnosis'] = scored(m)[1].astype(np.float32) if name == 'train' else np.float32('nan')
        folder = store_folder(f, run.store, run.prep)
        folder.mkdir(parents=True)
        painted = [prepare(cv2.imencode('.png', generate_fundus(rng, i % 5, list(CAMERAS)[i % len(CAMERAS)], True)[0][..., ::-1])[1].tobytes(), run.prep)
                   for i in range(50)]
        files = [str(folder / f'{i}.{jpeg_hash(jpeg)}{run.prep.suffix}') for i, (jpeg, _) in enumerate(painted)]
        for file, (jpeg, _) in zip(files, painted, strict=True): write_bytes(file, jpeg)
        rows = [dict(id_code=o, bytes=1, mtime=1, **painted[i % 50][1], stored='', error='') for i, o in enumerate(f.id_code)]
        write_csv(folder / 'prepared.csv', pd.DataFrame(rows))
        run.frames[name] = f.assign(stored=[files[i % 50] for i in range(m)], pixel_sha256=f.id_code, target=f.diagnosis, duplicate_group=np.arange(m) + (name == 'test') * n,
                                    fold=np.arange(m) // 2 % 5 if name == 'train' else -1)
    for stage, spec in recipe.stages.items(): write_stage(run, stage, spec)
    return run


def write_stage(run: Run, stage: str, spec):
    "The folds of a stage as training would leave them"
    train = run.frames['train']
    for k in range(spec.folds):
        out, mine = run.fold_dir(stage, k), train[train.fold == k]
        write_csv(out / PREDS, mine[['id_code', 'source', 'diagnosis', 'fold']].assign(score=.6 * mine.diagnosis + .2 + rng.normal(0, .45, len(mine))))
        e = np.arange(12)
        write_csv(out / HISTORY, pd.DataFrame(dict(epoch=e, train_loss=1 / (e + 1), valid_loss=1.1 / (e + 1), kappa=.9 - .5 / (e + 1), lr=1e-3, kept=e == 11)))
        write_bytes(out / WEIGHTS, save(create_model(spec.arch, spec.head, spec.size).state_dict()))
        write_record(out / 'stage.json', dict(
            files={f: dict(sha256=file_hash(out / f)) for f in (PREDS, WEIGHTS)}, seconds=1., kept_epoch=11, kept_kappa=.85, versions={}, synthetic=True,
            settings=asdict(spec), prep=asdict(run.prep), images=dict(train=len(train) - len(mine), valid=len(mine))))


def report(run: Run):
    with Bars() as bars:
        oof = oof_table(run)
        s = scored(len(run.frames['test']))[0]
        given = dict(id_code=run.frames['test'].id_code, mean=s, grade=apply_thresholds(s, MIDPOINTS), grade_low=0, grade_high=2, score_sd=np.abs(rng.normal(0, .1, len(s))))
        write_report(run, summarise(run, oof), oof, pd.DataFrame(given), bars)


def main(images: str = '35000'):
    n = int(images)
    s, y = scored(n)
    ours, theirs = timed(lambda: GradeThresholds().fit(s, y).kappa_), timed(nelder_mead, s, y)
    few = apply_thresholds(s[:3662], MIDPOINTS), y[:3662]
    fast, slow = timed(kappa_interval, *few), timed(resampled, *few)
    with tempfile.TemporaryDirectory() as tmp:
        run = made_up_run(Path(tmp), n)
        took, _ = timed(report, run)
        size = (run.root / 'report.html').stat().st_size / 1e6
    table(f'{n} images', ['what', 'here', 'reference', 'ratio'], [
        [f'thresholds of {n} scores (kappa {ours[1]:.4f}; Nelder-Mead {theirs[1]:.4f})', f'{ours[0]:.3f} s', f'{theirs[0]:.2f} s', f'{theirs[0] / ours[0]:.0f}'],
        ['10,000 resamples of 3,662 images', f'{fast[0]:.2f} s', f'{100 * slow[0]:.2f} s', f'{100 * slow[0] / fast[0]:.0f}'],
        [f'report of {n} images, {size:.1f} MB', f'{took:.1f} s', '', '']], right=('here', 'reference', 'ratio'), wrap=('what',))


if __name__ == '__main__': main(*sys.argv[1:])
