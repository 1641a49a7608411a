"Check for shortcuts: how well do features of the camera predict the grades, without the retina?"
import os

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import ProgressBar
from aptos_fastai.data.store import read_square
from aptos_fastai.metrics import cross_fitted_grades, kappa_interval, quadratic_kappa, stratified_group_parts
from aptos_fastai.run_folder import Run

MAX_IMAGES = 3000                            # a random sample of a larger table
IMAGE_SIZE = 'original image: width, height, position and stretch of the retina'
CROP_SHAPE = 'prepared image: shape of the crop'
FILE_SIZE = 'original image: file size'
COLOUR = 'prepared image: mean colour and contrast'


def mask_shape(square: np.ndarray, side: int = 64) -> np.ndarray:
    "Return the shape of the non-black part of a uint8 RGB square: area, width, height, column and row profiles."
    small = cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)
    mask = small.max(2) > 10
    return np.r_[mask.mean(), mask.any(0).sum(), mask.any(1).sum(), mask.mean(0)[::4], mask.mean(1)[::4]]


def forest_kappa(features: np.ndarray, grades: np.ndarray, parts: np.ndarray,
                 groups: np.ndarray | None = None) -> tuple[float, tuple[float, float]]:
    """Return the kappa of a random forest on `features` (n, k), and its interval over `groups` (patients) or images.

    Cross-fitted: each part of `parts` (n,) is graded by a forest and by thresholds that were fitted on the other parts.
    """
    from sklearn.ensemble import RandomForestRegressor
    scores = np.empty(len(features))
    for part in np.unique(parts):
        test = parts == part
        # one job: scikit-learn's threads reset the warning filters of the whole process, now and then for good
        forest = RandomForestRegressor(100, min_samples_leaf=5, random_state=0)
        scores[test] = forest.fit(features[~test], grades[~test]).predict(features[test])
    scores += 1e-9 * np.random.default_rng(0).random(len(scores))        # thresholds cannot be fitted on equal scores
    predicted = cross_fitted_grades(scores, grades, parts)
    return quadratic_kappa(predicted, grades), kappa_interval(predicted, grades, groups)


def shortcut_check(run: Run, bar: ProgressBar | None = None) -> list[tuple[str, int, float, tuple[float, float]]]:
    """Return (features, images, kappa, interval) for each set of features that shows the camera rather than the retina.

    Uses up to `MAX_IMAGES` of the final model's validation images. A kappa clearly above 0 for `IMAGE_SIZE` or
    `CROP_SHAPE` means that a network can learn the camera instead of the disease.
    """
    df = _sample(run)
    crop_shapes, colours = [], []
    for i, path in enumerate(df.stored):
        square = read_square(path, run.prep, 64)
        crop_shapes.append(mask_shape(square))
        colours.append(np.r_[square.mean((0, 1)), square.std((0, 1))])
        if bar: bar.to(i + 1)
    features = {
        IMAGE_SIZE: df[['width', 'height', 'x', 'y', 'r', 'stretch']].to_numpy(float),
        CROP_SHAPE: np.array(crop_shapes),
        FILE_SIZE: np.array([[os.path.getsize(path)] for path in df.path]),
        COLOUR: np.array(colours),
    }
    grades = df.diagnosis.to_numpy(float)
    parts = stratified_group_parts(df.diagnosis, df.group)
    groups = df.group.to_numpy()
    return [(name, len(df), *forest_kappa(x, grades, parts, groups)) for name, x in features.items()]


def _sample(run: Run) -> pd.DataFrame:
    "Return up to `MAX_IMAGES` validation images of the final model, with the columns of prepared.csv."
    ids = run.oof(run.recipe.submit.final)[['source', 'id_code']]
    frames = {name: run.frames[name] for name in ids.source.unique()}
    records = [run.prepared_record(name).assign(source=name) for name in frames]
    df = ids.merge(pd.concat(frames.values()), on=['source', 'id_code'])
    df = df.merge(pd.concat(records), on=['source', 'id_code'], suffixes=('', '_prepared'))
    return df.sample(min(MAX_IMAGES, len(df)), random_state=0).reset_index(drop=True)
