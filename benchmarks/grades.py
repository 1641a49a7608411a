"""What cuts, intervals and the report cost: python benchmarks/grades.py [PICTURES]

Cuts against Nelder-Mead (scipy) on the same scores; the bootstrap against resampling pictures one set at a time; and a report of that many made-up
validated pictures (default 35,000), whose run folder is written to a temporary folder: time and size.
"""
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.config import read_recipe
from aptos_fastai.console import Bars, table
from aptos_fastai.demo import CAMERAS
from aptos_fastai.files import file_hash, write_csv, write_json
from aptos_fastai.images import store_folder
from aptos_fastai.metrics import HALF, GradeCuts, apply_cuts, kappa_interval, quadratic_kappa
from aptos_fastai.record import HISTORY, PREDS, WEIGHTS, Run
from aptos_fastai.report import write_report
from aptos_fastai.summary import oof_table, summarise
from aptos_fastai.twins import add_groups, settle_conflicts

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
    return -minimize(lambda c: -quadratic_kappa(apply_cuts(s, np.sort(c)), y), HALF, method='Nelder-Mead').fun


def resampled(g, y, n: int = 100): return [quadratic_kappa(g[r], y[r]) for r in rng.integers(0, len(y), (n, len(y)))]


def made_up_run(root: Path, n: int) -> Run:
    "A finished run of one_table.ini on `n` graded and `n` // 10 ungraded pictures that share 50 files"
    from aptos_fastai.demo import paint
    recipe = read_recipe(Path(__file__).parents[1] / 'recipes/one_table.ini')
    frames = {}
    for name, m in (('train', n), ('test', n // 10)):
        y = scored(m)[1]
        frames[name] = pd.DataFrame(dict(id_code=[f'{name}{i:06}' for i in range(m)], diagnosis=y.astype(np.float32) if name == 'train' else np.nan,
                                         path=str(root / 'picture.jpg'), group=[f'{name}:{i // 2}' for i in range(m)], source=name))
    run = Run(recipe, root, root / 'runs' / recipe.name, frames)
    cv2.imwrite(str(root / 'picture.jpg'), np.zeros((64, 64, 3), np.uint8))
    pics = [paint(i, i % 5, list(CAMERAS)[i % len(CAMERAS)])[0] for i in range(50)] if False else [rng.integers(0, 255, (320, 320, 3), np.uint8) for _ in range(50)]
    for name, f in frames.items():
        folder = store_folder(f, run.store, run.prep)
        folder.mkdir(parents=True, exist_ok=True)
        for i, p in enumerate(pics): cv2.imwrite(str(folder / f'{i}{run.prep.suffix}'), p)
        frames[name] = f.assign(stored=[str(folder / f'{i % 50}{run.prep.suffix}') for i in range(len(f))], look='', pixels=[f'{name}{i}' for i in range(len(f))],
                                fold=np.arange(len(f)) // 2 % 5 if name == 'train' else -1)
    return run
