"""The pointing game (Zhang et al. 2018) on the demo's lesions: python benchmarks/explain.py [RUN] [DEMO FOLDER]

How often the hottest place of a heat map lies on a lesion, give or take 3 % of the retina's radius, beside how often a place at random does:
test images of grade 1 and above, which no network was trained on with a grade. Defaults: runs/settings-demo and its demo folder beside it.
"""
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import table
from aptos_fastai.data.retina import Circle, crop_box
from aptos_fastai.inference.explain import heat
from aptos_fastai.inference.grader import load_grader
from aptos_fastai.metrics import share_interval
from aptos_fastai.pipeline.summary import interval_text

TOLERANCE = .03


def lesion_mask(lesions: pd.DataFrame, shape: tuple[int, int], r: float) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for o in lesions.itertuples(): cv2.circle(mask, (round(o.x), round(o.y)), round(o.radius + TOLERANCE * r), 1, -1)
    return mask


def main(run: str = 'runs/settings-demo', demo: str = ''):
    folder = Path(demo or next(Path(run).parent.glob('demo-*'))) / 'aptos2019-blindness-detection'
    lesions = pd.read_csv(folder / 'lesions.csv', dtype=dict(id_code=str))
    grades = pd.read_csv(folder / 'test_grades.csv', dtype=dict(id_code=str)).set_index('id_code').diagnosis
    grader, rows = load_grader(run), []
    for i, g in grades[grades > 0].items():
        squares, info = grader.read(folder / 'test_images' / f'{i}.png')
        hot = heat(grader, {n: s[None] for n, s in squares.items()})[0]
        x0, x1, y0, y1 = crop_box(info['height'], info['width'], Circle(info['x'], info['y'], info['r']), grader.model.prep)
        v, u = np.unravel_index(hot.argmax(), hot.shape)
        at = round(y0 + (v + .5) / len(hot) * (y1 - y0)), round(x0 + (u + .5) / len(hot) * (x1 - x0))
        mask = lesion_mask(lesions[lesions.id_code == i], (info['height'], info['width']), info['r'])
        retina = cv2.circle(np.zeros_like(mask), (round(info['x']), round(info['y'])), round(.95 * info['r']), 1, -1) > 0
        inside = 0 <= at[0] < len(mask) and 0 <= at[1] < mask.shape[1]
        rows.append(dict(grade=g, hit=bool(inside and mask[at]), chance=mask[retina].mean()))
    df = pd.DataFrame(rows)
    lines = [[name, len(d), interval_text(d.hit.mean(), share_interval(d.hit.sum(), len(d))), f'{d.chance.mean():.2f}', f'{d.hit.mean() / d.chance.mean():.1f}']
             for name, d in [('all', df), *((f'grade {g}', d) for g, d in df.groupby('grade'))]]
    table(f'pointing game, {grader.model.name} (SYNTHETIC demo)', ['images', 'n', 'hits [95 %]', 'at random', 'factor'], lines,
          right=('n', 'at random', 'factor'))


if __name__ == '__main__': main(*sys.argv[1:])
