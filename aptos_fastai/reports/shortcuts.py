"The shortcut audit: what can be told of the grades without looking at the retina."
import os

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.data.store import read_prepared, read_square, store_folder
from aptos_fastai.metrics import even_parts, kappa_interval, nested_grades, quadratic_kappa
from aptos_fastai.run_folder import Run

MOST = 3000                                  # images that are looked at
CAMERA = 'original: width, height, where its retina is', 'prepared image: shape of what is lit'


def mask_shape(sq: np.ndarray, side: int = 64) -> np.ndarray:
    "What the shape of the lit part of a uint8 square tells: its area, and its profiles across and down"
    lit = cv2.resize(sq, (side, side), interpolation=cv2.INTER_AREA).max(2) > 10
    return np.r_[lit.mean(), lit.any(0).sum(), lit.any(1).sum(), lit.mean(0)[::4], lit.mean(1)[::4]]


def forest_kappa(x: np.ndarray, grades: np.ndarray, parts: np.ndarray) -> tuple[float, tuple[float, float]]:
    "Kappa, with its interval, of a random forest on the features `x` (n, k): every part graded by a forest and thresholds fitted on the others"
    from sklearn.ensemble import RandomForestRegressor
    score = np.empty(len(x))
    for k in np.unique(parts):
        mine = parts == k
        score[mine] = RandomForestRegressor(100, min_samples_leaf=5, random_state=0, n_jobs=-1).fit(x[~mine], grades[~mine]).predict(x[mine])
    score += 1e-9 * np.random.default_rng(0).random(len(x))              # equal features give equal scores, on which no cut can be fitted
    given = nested_grades(score, grades, parts)
    return quadratic_kappa(given, grades), kappa_interval(given, grades)


def audit(run: Run, bar=None) -> list[tuple[str, int, float, tuple[float, float]]]:
    """(what is known, images, kappa, interval) for the graded images that the final answer validates on, up to `MOST` of them.

    Where the size of a file or the camera's shape alone gives a kappa well above 0, a network may have learnt the camera; the last row is what ours is shown.
    """
    ids = run.oof(run.recipe.submit.final)[['source', 'id_code']]
    recs = [read_prepared(store_folder(run.frames[n], run.store, run.prep)).assign(source=n) for n in ids.source.unique()]
    df = ids.merge(pd.concat([run.frames[n] for n in ids.source.unique()]), on=['source', 'id_code'])
    df = df.merge(pd.concat(recs), on=['source', 'id_code'], suffixes=('', '_prepared'))
    df = df.sample(min(MOST, len(df)), random_state=0).reset_index(drop=True)
    sizes = df[['width', 'height', 'x', 'y', 'r']].to_numpy(float)
    files = np.array([[os.path.getsize(p)] for p in df.path])
    shape, colour = [], []
    for i, p in enumerate(df.stored):
        sq = read_square(p, run.prep, 64)
        shape.append(mask_shape(sq))
        colour.append(np.r_[sq.mean((0, 1)), sq.std((0, 1))])
        if bar: bar.to(i + 1)
    y, parts = df.diagnosis.to_numpy(float), even_parts(df.diagnosis, df.group)
    known = {CAMERA[0]: sizes, CAMERA[1]: np.array(shape), 'original: bytes of its file': files, 'prepared image: mean colour and contrast': np.array(colour)}
    return [(k, len(df), *forest_kappa(x, y, parts)) for k, x in known.items()]
