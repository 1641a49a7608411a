"""Measure how well resized retinas are found: python benchmarks/squashed.py IDRID-FOLDER [--count N]

The images are resized to other aspects, so that their circles become ellipses: how many are found, and the error of
the width / height. Then only images of grades 2-4 are resized to squares: how well does the shape of the crop predict
the grade, with and without the search for an ellipse?
"""
import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import table
from aptos_fastai.data import retina
from aptos_fastai.data.decode import decode
from aptos_fastai.data.demo import CAMERAS, generate_fundus
from aptos_fastai.data.retina import Prep, crop_square, find_retina
from aptos_fastai.reports.shortcuts import forest_kappa, mask_shape

PREP = Prep(size=256)
FOLDS = 5


def cut(im: np.ndarray, share: float) -> np.ndarray:
    "Return an image without `share` of its height at the top and at the bottom."
    rows = round(len(im) * share)
    return im[rows:len(im) - rows]


def resize(im: np.ndarray, width: float, height: float) -> np.ndarray:
    return cv2.resize(im, (round(width), round(height)), interpolation=cv2.INTER_AREA)


def square(im: np.ndarray, side: int) -> np.ndarray: return resize(im, side, side)


def no_ellipse(points: np.ndarray, tol: float) -> tuple[np.ndarray, float]:
    "Find circles only, as before ellipses were searched."
    return np.zeros(4), 0.


VARIANTS = {
    'as it is': lambda im: im,
    'cut at top and bottom': lambda im: cut(im, .05),
    '512 x 512': lambda im: square(im, 512),
    '224 x 224': lambda im: square(im, 224),
    '4:3': lambda im: resize(im, .75 * im.shape[1], len(im)),
    '1.2 narrower': lambda im: resize(im, im.shape[1] / 1.2, len(im)),
    '1.1 narrower': lambda im: resize(im, im.shape[1] / 1.1, len(im)),
    '1.2 flatter': lambda im: resize(im, im.shape[1], len(im) / 1.2),
    '1.5 flatter': lambda im: resize(im, im.shape[1], len(im) / 1.5),
    'cut 5 %, 512 x 512': lambda im: square(cut(im, .05), 512),
    'cut 10 %, 512 x 512': lambda im: square(cut(im, .1), 512),
}


def read_images(folder: Path, count: int) -> dict[str, np.ndarray]:
    files = sorted(p for p in folder.rglob('*_images/*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    return {p.stem: decode(p.read_bytes(), 512)[0] for p in files[::max(1, len(files) // count)]}


def demo_images(count: int) -> Iterator[np.ndarray]:
    rng, cameras = np.random.default_rng(0), list(CAMERAS)
    for i in range(count): yield generate_fundus(rng, i % 5, cameras[i % len(cameras)], i % 2 == 0)[0]


def measure(name: str, images: list[np.ndarray], variant) -> list[str]:
    "Return a row: shares of circles, ellipses and boxes, error of width / height, milliseconds per image"
    found, errors, seconds = [], [], []
    for im in images:
        changed = np.ascontiguousarray(variant(im))
        cut_rows = len(cut(im, .05 if '5 %' in name else .1 if '10 %' in name else 0))
        expected = 1. if name.startswith(('as', 'cut at')) else changed.shape[1] / im.shape[1] / len(changed) * cut_rows
        start = time.perf_counter()
        c = find_retina(changed)
        seconds.append(time.perf_counter() - start)
        found.append('box' if c.how != 'circle' else 'circle' if c.stretch == 1 else 'ellipse')
        if c.stretch != 1: errors.append(abs(c.stretch / expected - 1))
    shares = [f'{100 * found.count(o) / len(found):.1f}' for o in ('circle', 'ellipse', 'box')]
    error = [f'{100 * np.quantile(errors, q):.1f}' if errors else '' for q in (.5, .95)]
    return [name, len(images), *shares, *error, f'{1e3 * np.median(seconds):.1f}']


def crop_shapes(images: dict[str, np.ndarray], grades: pd.Series) -> np.ndarray:
    "Return the shape of the crop of each image, after those of grades 2-4 are resized to squares"
    originals = [square(im, 512) if grades[i] >= 2 else im for i, im in images.items()]
    return np.array([mask_shape(crop_square(im, find_retina(im), PREP)) for im in originals])


def measure_shortcut(images: dict[str, np.ndarray], grades: pd.Series) -> list[list[str]]:
    "Return a row for both searches: kappa of a forest on the shape of the crop"
    folds, y = np.arange(len(images)) % FOLDS, grades[list(images)].to_numpy(float)
    with patch.object(retina, '_fit_ellipse', no_ellipse): shapes = {'circle': crop_shapes(images, grades)}
    shapes['circle or ellipse'] = crop_shapes(images, grades)
    rows = []
    for name, x in shapes.items():
        kappa, (low, high) = forest_kappa(x, y, folds)
        rows.append([name, len(y), f'{kappa:.3f} ({low:.2f} to {high:.2f})'])
    return rows


def main(folder: Path, count: int) -> None:
    cv2.setNumThreads(1)
    images = read_images(folder, count)
    demo = list(demo_images(min(count, 120)))
    rows = [measure(name, list(images.values()), variant) for name, variant in VARIANTS.items()]
    for name in ('as it is', '512 x 512', '1.2 flatter'):
        label, *row = measure(name, demo, VARIANTS[name])
        rows.append([f'demo, {label}', *row])
    columns = ['images', 'circle', 'ellipse', 'box', 'median', '95 %', 'ms']
    table('retinas found, % of images; median and 95 % quantile of the error of width / height, %', ['image', *columns],
          rows, right=columns)
    graded = pd.concat([pd.read_csv(folder / name) for name in ('train.csv', 'test.csv')])
    grades = graded.set_index('id_code').diagnosis
    table('only images of grades 2-4 are resized to 512 x 512', ['searched', 'images', 'kappa of the crop shape'],
          measure_shortcut({i: im for i, im in images.items() if i in grades.dropna().index}, grades))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--count', type=int, default=516, help='images to use')
    args = p.parse_args()
    main(args.folder, args.count)
