"""The pointing game (Zhang et al. 2018) on the demo's lesions: python benchmarks/explain.py [RUN] [DEMO FOLDER]

How often the hottest place of a heat map lies on a lesion, with a tolerance of 3 % of the retina's radius, compared
with a random place in the retina. The images are test images of grade 1 and above; no network was trained on their
grades.
Defaults: runs/settings-demo and the demo folder beside it.
"""
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import table
from aptos_fastai.data.retina import Circle, crop_box
from aptos_fastai.inference.explain import heatmap
from aptos_fastai.inference.grader import Grader, load_grader
from aptos_fastai.metrics import wilson_interval
from aptos_fastai.pipeline.summary import interval_text

TOLERANCE = .03                              # of the retina's radius
RETINA = .95                                 # share of the radius within which random places lie


def lesion_mask(lesions: pd.DataFrame, shape: tuple[int, int], radius: float) -> np.ndarray:
    "Return uint8 1 where a place counts as a lesion; `radius` is that of the retina, pixels"
    mask = np.zeros(shape, np.uint8)
    for o in lesions.itertuples():
        cv2.circle(mask, (round(o.x), round(o.y)), round(o.radius + TOLERANCE * radius), 1, -1)
    return mask


def hottest_place(grader: Grader, squares: dict, info: dict) -> tuple[int, int]:
    "Return the row and column of the hottest place, pixels of the original image"
    hot = heatmap(grader, {side: square[None] for side, square in squares.items()})[0]
    circle = Circle(info['x'], info['y'], info['r'])
    x0, x1, y0, y1 = crop_box(info['height'], info['width'], circle, grader.model.prep)
    v, u = np.unravel_index(hot.argmax(), hot.shape)
    row = y0 + (v + .5) / len(hot) * (y1 - y0)
    column = x0 + (u + .5) / len(hot) * (x1 - x0)
    return round(row), round(column)


def point(grader: Grader, file: Path, lesions: pd.DataFrame) -> dict:
    "Return whether the hottest place of an image is a hit, and how likely a random place is one"
    squares, info = grader.read(file)
    if squares is None: raise SystemExit(f'{file}: {info["error"]}')
    height, width = info['height'], info['width']
    row, column = hottest_place(grader, squares, info)
    mask = lesion_mask(lesions, (height, width), info['r'])
    centre = round(info['x']), round(info['y'])
    retina = cv2.circle(np.zeros_like(mask), centre, round(RETINA * info['r']), 1, -1) > 0
    inside = 0 <= row < height and 0 <= column < width
    return dict(hit=bool(inside and mask[row, column]), chance=mask[retina].mean())


def summary_row(name: str, df: pd.DataFrame) -> list:
    "Return the table's row for some of the images"
    hits, chance = df.hit.mean(), df.chance.mean()
    interval = wilson_interval(df.hit.sum(), len(df))
    return [name, len(df), interval_text(hits, interval), f'{chance:.2f}', f'{hits / chance:.1f}']


def main(run: str = 'runs/settings-demo', demo: str = ''):
    folder = Path(demo or next(Path(run).parent.glob('demo-*'))) / 'aptos2019-blindness-detection'
    lesions = pd.read_csv(folder / 'lesions.csv', dtype=dict(id_code=str))
    grades = pd.read_csv(folder / 'test_grades.csv', dtype=dict(id_code=str)).set_index('id_code').diagnosis
    grader, rows = load_grader(run), []
    for id_code, grade in grades[grades > 0].items():
        found = point(grader, folder / 'test_images' / f'{id_code}.png', lesions[lesions.id_code == id_code])
        rows.append(dict(grade=grade, **found))
    df = pd.DataFrame(rows)
    lines = [summary_row('all', df)]
    lines += [summary_row(f'grade {grade}', part) for grade, part in df.groupby('grade')]
    table(f'pointing game, {grader.model.name} (SYNTHETIC demo)',
          ['images', 'n', 'hits (95 % CI)', 'random', 'ratio'], lines, right=('n', 'random', 'ratio'))


if __name__ == '__main__': main(*sys.argv[1:])
