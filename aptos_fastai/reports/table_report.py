"What a table's images look like: originals with the circle found, crops, augmented samples, and what there is of what."
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError, write_bytes
from aptos_fastai.data.decode import decode
from aptos_fastai.data.duplicates import duplicates_table
from aptos_fastai.data.store import read_prepared, read_square, store_folder
from aptos_fastai.metrics import GRADE_NAMES
from aptos_fastai.pipeline.graph import start_run
from aptos_fastai.pipeline.summary import SYNTHETIC
from aptos_fastai.reports.html import Bar, Table, image, write_html
from aptos_fastai.run_folder import Run
from aptos_fastai.training.loaders import FundusAugment

SIDE = 192                                   # of a tile, pixels


def choose(df: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    "`count` rows: up to half of them those that ask for a look (flags, no circle, errors), the others at random; grades in order"
    asks = (df['flags'] != '') | (df.how != 'circle')
    odd, rest = df[asks], df[~asks]
    odd = odd.sample(min(len(odd), max(count // 2, count - len(rest))), random_state=seed)
    return pd.concat([odd, rest.sample(min(len(rest), count - len(odd)), random_state=seed)]).sort_values(['diagnosis', 'id_code'], kind='stable')


def tiles(row, run: Run) -> list[np.ndarray]:
    "The original with its circle, the crop, two augmented samples; each SIDE high"
    im, (w, h) = decode(Path(row.path).read_bytes(), 2 * SIDE)
    k = SIDE / im.shape[0]
    small = cv2.resize(im, (max(1, round(im.shape[1] * k)), SIDE), interpolation=cv2.INTER_AREA)
    k *= max(im.shape[:2]) / max(w, h)
    colour = dict(circle=(0, 255, 160), box=(255, 170, 0)).get(row.how, (255, 60, 60))
    cv2.circle(small, (round(row.x * k), round(row.y * k)), round(row.r * k), colour, 1, cv2.LINE_AA)
    sq = read_square(row.stored, run.prep, SIDE)
    aug = FundusAugment(run.recipe.augment, run.recipe.seed)
    return [small, sq, *(aug.apply(sq, [run.recipe.seed, k, row.Index]) for k in range(2))]


def counts(df: pd.DataFrame, col: str, most: int = 8) -> list[list]:
    "Rows of value, count and share, the commonest first"
    n = df[col].value_counts()
    rows = [[k or 'none', int(v), Bar(v / len(df))] for k, v in n.head(most).items()]
    return rows + ([[f'{len(n) - most} others', int(n[most:].sum()), Bar(n[most:].sum() / len(df))]] if len(n) > most else [])


def sections(run: Run, name: str, df: pd.DataFrame) -> list[tuple[str, list[Table]]]:
    "What there is of what: headings with their tables"
    df = df.assign(size=df.width.astype(str) + ' x ' + df.height.astype(str))
    flags = df['flags'].str.split().explode().dropna().value_counts()
    sizes, out = [Table(['original, pixels', 'images', 'share'], counts(df, 'size'))], []
    if run.recipe.tables[name].graded:
        rows = [[f'{g} {GRADE_NAMES[g]}', int((df.diagnosis == g).sum()), Bar((df.diagnosis == g).mean())] for g in range(5)]
        out.append(('Grades', [Table(['grade', 'images', 'share'], rows)]))
        by = pd.crosstab(df['size'], df.diagnosis).reindex(columns=range(5), fill_value=0).loc[df['size'].value_counts().index[:8]]
        sizes.append(Table(['original, pixels', *(f'grade {g}' for g in range(5))], [[k, *map(int, v)] for k, v in by.iterrows()],
                           'A camera has its sizes: where grades go with them, a network can learn the camera instead of the eye.'))
    return [*out, ('Sizes and cameras', sizes),
            ('Retina found as', [Table(['how', 'images', 'share'], counts(df, 'how'),
                                       'circle: fitted; box: of what is lit; whole: nothing found, the image as it is')]),
            ('Quality flags', [Table(['flag', 'images', 'share'], [[k, int(v), Bar(v / len(df))] for k, v in flags.items()] or [['none', len(df), Bar(1)]])]),
            ('Images that stand there more than once', [duplicate_sets(run, name)])]


def duplicate_sets(run: Run, name: str, most: int = 40) -> Table:
    "The images of a table that stand in the tables more than once"
    t = duplicates_table(run.frames)
    t = t[t.duplicate.isin(t.duplicate[t.source == name])]
    rows = [[', '.join(f'{o.source} {o.id_code}' + ('' if np.isnan(o.diagnosis) else f' (grade {o.diagnosis:.0f})') for o in g.itertuples()),
             'unequal grades' if g.conflict.any() else ''] for _, g in t.groupby('duplicate')]
    return Table(['images', ''], rows[:most], f'{len(rows) - most} more in duplicates.csv of the run folder' if len(rows) > most else '')


def show(row, run: Run) -> tuple[dict, np.ndarray]:
    "An image's tiles for the page and as a strip of the sheet"
    ims = tiles(row, run)
    words = row.id_code + ('' if np.isnan(row.diagnosis) else f'  grade {row.diagnosis:.0f}') + ('' if row.how == 'circle' else f'  {row.how}')
    return dict(tiles=[image(o, words) for o in ims], words=words, flags=row.flags), _strip(ims, f'{words} {row.flags}')


def inspect_table(run: Run, name: str, count: int):
    "`look TABLE [COUNT]`: <run>/look/<table>.html and the contact sheet alone as .png"
    if name not in run.frames: raise AptosError(f'{name}: no such table in {run.recipe.path}; there are {", ".join(run.frames)}')
    if count < 1: raise AptosError(f'{count}: at least one image must be looked at')
    with start_run(run) as (run, bars):
        rec = read_prepared(store_folder(run.frames[name], run.store, run.prep))
        df = run.frames[name].merge(rec[['id_code', 'width', 'height', 'x', 'y', 'r', 'how', 'flags']], on='id_code')
        shown, parts = choose(df, count, run.recipe.seed), []
        with bars(f'looking at {name}', len(shown), 'images') as bar:
            for row in shown.itertuples(): parts.append(show(row, run)); bar.to(len(parts))
    out = run.root / 'inspect' / f'{name}.html'
    note = f'{len(df)} images, {run.recipe.path.name}; prepared at {run.prep.size} px ({run.prep.name})'
    legend = f'{len(shown)} of {len(df)}: original with the circle found (orange: a box; red: nothing), crop, two augmented samples'
    write_html(out, 'table_report.html', title=f'{name}: what the images look like', note=note, warning=SYNTHETIC if run.recipe.demo else '',
               sections=sections(run, name, df), legend=legend, images=[p for p, _ in parts])
    write_bytes(out.with_suffix('.png'), cv2.imencode('.png', _sheet([o for _, o in parts])[..., ::-1])[1].tobytes())
    say(f'{len(df)} images of {name}, {len(shown)} shown -> {out} and {out.with_suffix(".png").name}')


def _strip(ims: list[np.ndarray], words: str) -> np.ndarray:
    "The tiles side by side, the original fitted into 4:3, the words below"
    first = cv2.resize(ims[0], (SIDE * 4 // 3, SIDE), interpolation=cv2.INTER_AREA) if ims[0].shape[1] > SIDE * 4 // 3 else \
        cv2.copyMakeBorder(ims[0], 0, 0, 0, SIDE * 4 // 3 - ims[0].shape[1], cv2.BORDER_CONSTANT)
    out = cv2.copyMakeBorder(np.hstack([first, *ims[1:]]), 0, 18, 0, 6, cv2.BORDER_CONSTANT)
    return cv2.putText(out, words, (2, SIDE + 13), cv2.FONT_HERSHEY_SIMPLEX, .42, (230, 230, 230), 1, cv2.LINE_AA)


def _sheet(lines: list[np.ndarray], across: int = 2) -> np.ndarray:
    lines += [np.zeros_like(lines[0])] * (-len(lines) % across)
    return np.vstack([np.hstack(lines[i:i + across]) for i in range(0, len(lines), across)])
