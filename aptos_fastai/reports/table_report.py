"Write inspect/<table>.html: what a table holds and what its images look like."
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, write_bytes
from aptos_fastai.common.privacy import patient_data
from aptos_fastai.data.decode import decode
from aptos_fastai.data.duplicates import duplicates_table
from aptos_fastai.data.groups import patients_text
from aptos_fastai.data.id_order import ORDERS, compare_id_orders, id_order_text
from aptos_fastai.data.retina import Circle
from aptos_fastai.data.spreadsheet import first_few
from aptos_fastai.data.store import colour_warning, read_square, resized_warning
from aptos_fastai.data.tables import describe, table_contents
from aptos_fastai.metrics import GRADE_NAMES, GRADES
from aptos_fastai.pipeline.graph import start_run
from aptos_fastai.pipeline.summary import SYNTHETIC
from aptos_fastai.reports.html import Bar, Figure, Section, Table, embed_image, write_html
from aptos_fastai.run_folder import Run
from aptos_fastai.training.loaders import FundusAugment

TILE = 192                                   # height of an image on the page, pixels
ORIGINAL_WIDTH = TILE * 4 // 3               # width of the original on the contact sheet, pixels
AUGMENTED = 2                                # augmented samples of each image
MAX_ROWS = 8                                 # of a table of counts
MAX_DUPLICATES = 40                          # sets of duplicates that are listed
CIRCLE_COLOURS = dict(circle=(0, 255, 160), box=(255, 170, 0), whole=(255, 60, 60))      # RGB
LEGEND = ('original with the circle or ellipse found (green: fitted; orange: bounding box; red: no retina found), '
          'crop, two augmented samples')


def inspect_table(run: Run, name: str, count: int) -> None:
    "`inspect TABLE [COUNT]`: write inspect/<table>.html, and its images as the contact sheet inspect/<table>.png."
    if name not in run.frames: raise AptosError(f'{name}: this table of {run.recipe.path} is not there or not used.')
    if count < 1: raise AptosError(f'{count}: choose at least 1 image.')
    with start_run(run) as (run, bars):
        prepared = run.prepared_record(name)
        columns = ['width', 'height', 'x', 'y', 'r', 'stretch', 'how', 'flags']
        frame = run.frames[name].drop(columns=columns, errors='ignore')
        df = frame.merge(prepared[['id_code', *columns]], on='id_code')
        chosen = choose_images(df, count, run.recipe.seed)
        images, strips = [], []
        with bars(f'inspecting {name}', len(chosen), 'images') as bar:
            for row in chosen.itertuples():
                image, strip = inspect_image(row, run)
                images.append(image)
                strips.append(strip)
                bar.to(len(images))
    contents = Section('Contents', understood(run, name, df))
    for line in contents.parts: say(f'{name}: {line}')
    file = run.root / 'inspect' / f'{name}.html'
    write_html(file, 'table_report.html', title=f'{name}: table report',
               note=f'{len(df)} images of {run.recipe.path.name}, prepared at {run.prep.size} px ({run.prep.name})\n'
                    f'{DISCLAIMER}',
               warning=SYNTHETIC if run.synthetic else '',
               sections=[contents, *table_sections(run, name, df)],
               legend=f'{len(chosen)} of {len(df)} images: {LEGEND}.', images=images)
    sheet = contact_sheet(strips)
    write_bytes(file.with_suffix('.png'), cv2.imencode('.png', sheet[..., ::-1])[1].tobytes())
    say(f'{name}: {len(chosen)} of {len(df)} images -> {file} and {file.with_suffix(".png").name}')
    if not run.recipe.demo: say(patient_data(file.parent, f'embeds {len(chosen)} images and their ids'), 'dim')


def understood(run: Run, name: str, df: pd.DataFrame) -> list[str]:
    "Return what the table holds, how its ids were matched, sizes and duplicates: lines to check before a training."
    table = run.recipe.tables[name]
    contents = table_contents(table, run.data, run.recipe.images.skip_unreadable == 'yes')
    of_image = df.width.astype(str) + ' x ' + df.height.astype(str)
    sizes = [f'{size} ({n})' for size, n in of_image.value_counts().items()]
    duplicates = duplicates_table(run.frames)
    duplicates = duplicates[duplicates.source == name]
    found = df.how.value_counts()
    return [f'{describe(table, contents)}.',
            *(f'{note}.' for note in contents.notes),
            f'Sizes of the originals, pixels: {first_few(sizes)}.',
            f'Retina found as {", ".join(f"{how} {n}" for how, n in found.items())}.',
            f'Duplicate images: {len(duplicates)}, {int(duplicates.conflict.sum())} with conflicting grades.']


def choose_images(df: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    "Choose `count` rows, sorted by grade: up to half of them have quality flags or no circle, the others are random."
    suspect = (df['flags'] != '') | (df.how != 'circle')
    first, others = df[suspect], df[~suspect]
    n = min(len(first), max(count // 2, count - len(others)))
    first = first.sample(n, random_state=seed)
    others = others.sample(min(len(others), count - n), random_state=seed)
    return pd.concat([first, others]).sort_values(['diagnosis', 'id_code'], kind='stable')


def inspect_image(row: Any, run: Run) -> tuple[dict, np.ndarray]:
    "Return an image's tiles for the page, and the same as a strip of the contact sheet."
    parts = [row.id_code]
    if not np.isnan(row.diagnosis): parts.append(f'grade {row.diagnosis:.0f}')
    if row.how != 'circle': parts.append(row.how)
    caption = '  '.join(parts)
    images = tiles(row, run)
    entry = dict(tiles=[embed_image(im, caption) for im in images], caption=caption, flags=row.flags)
    return entry, _strip(images, f'{caption} {row.flags}')


def tiles(row: Any, run: Run) -> list[np.ndarray]:
    "Return the original with its circle, the crop and the augmented samples (uint8 RGB), each `TILE` pixels high."
    square = read_square(row.stored, run.prep, TILE)
    augment = FundusAugment(run.recipe.augment, run.recipe.seed)
    samples = [augment.apply(square, [run.recipe.seed, k, row.Index]) for k in range(AUGMENTED)]
    return [_original_with_circle(row), square, *samples]


def _original_with_circle(row: Any) -> np.ndarray:
    "Return the original, `TILE` pixels high, with the circle or ellipse that was found."
    im, (width, height) = decode(Path(row.path).read_bytes(), 2 * TILE)
    scale = TILE / im.shape[0]
    small = cv2.resize(im, (max(1, round(im.shape[1] * scale)), TILE), interpolation=cv2.INTER_AREA)
    scale *= max(im.shape[:2]) / max(width, height)                      # x, y and r are pixels of the full size
    centre = round(row.x * scale), round(row.y * scale)
    rx, ry = (round(o * scale) for o in Circle(row.x, row.y, row.r, row.how, row.stretch).half_axes)
    return cv2.ellipse(small, centre, (rx, ry), 0, 0, 360, CIRCLE_COLOURS[row.how], 1, cv2.LINE_AA)


def table_sections(run: Run, name: str, df: pd.DataFrame) -> list[Section]:
    "Return the counts of grades, sizes, circles, quality flags and duplicates of a table."
    df = df.assign(size=df.width.astype(str) + ' x ' + df.height.astype(str))
    sizes: list[Table | Figure | str] = _warning(resized_warning(df))
    sizes.append(Table(['original, pixels', 'images', 'proportion'], count_rows(df, 'size')))
    sections = []
    if run.recipe.tables[name].graded:
        sections.append(Section('Grades', [Table(['grade', 'images', 'proportion'], _grade_rows(df))]))
        sizes.append(grades_by_size(df))
        sections.append(id_order_section(run, name, df))
    flags = df['flags'].str.split().explode().dropna().value_counts()
    flag_rows = [[flag, int(n), Bar(n / len(df))] for flag, n in flags.items()] or [['none', len(df), Bar(1)]]
    flagged = Table(['flag', 'images', 'proportion'], flag_rows)
    found = Table(['method', 'images', 'proportion'], count_rows(df, 'how'),
                  'circle: a fitted circle, or an ellipse that is made a circle again; box: the bounding box of the '
                  'bright part; whole: no retina found, so the whole image is used')
    return [*sections, Section('Image sizes', sizes), Section('Retina detection', [found]),
            Section('Quality flags', [*_warning(colour_warning(df)), flagged]),
            Section('Duplicate images', [duplicate_sets(run, name)])]


def _warning(text: str) -> list[Table | Figure | str]: return [f'Warning: {text}'] if text else []


def id_order_section(run: Run, name: str, df: pd.DataFrame) -> Section:
    "Return the tests of whether ids are associated with the grade, and the warning if they do; print it too."
    table = run.recipe.tables[name]
    tests = compare_id_orders(df, run.recipe.seed)
    warning = id_order_text(tests, table)
    if warning: say(f'{name}: {warning}', 'yellow')
    rows = [[f'{t.order}, {ORDERS[t.order]}', f'{100 * t.share:.0f} %', f'{100 * t.chance:.0f} %', f'{t.p:.3f}']
            for t in tests]
    caption = (f'{patients_text(df, table)}. One image of each patient or block. If neighbours have equal grades more '
               'often than by chance, they may be of one patient, and an out-of-fold kappa is optimistic.')
    return Section('Order of ids', [Table(['neighbours', 'equal grades', 'by chance', 'p'], rows, caption),
                                    *([f'Warning: {warning}'] if warning else [])])


def _grade_rows(df: pd.DataFrame) -> list[list]:
    "Return grade, count and share for each grade."
    counts = [int((df.diagnosis == grade).sum()) for grade in range(GRADES)]
    return [[f'{grade} {GRADE_NAMES[grade]}', n, Bar(n / len(df))] for grade, n in enumerate(counts)]


def count_rows(df: pd.DataFrame, column: str, most: int = MAX_ROWS) -> list[list]:
    "Return value, count and share of the `most` commonest values, and one row for all others."
    counts = df[column].value_counts()
    rows = [[value or 'none', int(n), Bar(n / len(df))] for value, n in counts.head(most).items()]
    others = counts[most:]
    if len(others): rows.append([f'{len(others)} others', int(others.sum()), Bar(others.sum() / len(df))])
    return rows


def grades_by_size(df: pd.DataFrame) -> Table:
    "Return the number of images of each grade for the commonest image sizes."
    commonest = df['size'].value_counts().index[:MAX_ROWS]
    counts = pd.crosstab(df['size'], df.diagnosis).reindex(columns=range(GRADES), fill_value=0).loc[commonest]
    columns = ['original, pixels', *(f'grade {grade}' for grade in range(GRADES))]
    return Table(columns, [[size, *map(int, row)] for size, row in counts.iterrows()],
                 'The image size identifies the camera. Where sizes correlate with grades, a network can learn the '
                 'camera instead of the disease.')


def duplicate_sets(run: Run, name: str) -> Table:
    "Return the sets of duplicate images with at least one image of the table."
    df = duplicates_table(run.frames)
    df = df[df.duplicate_group.isin(df.duplicate_group[df.source == name])]
    rows = []
    for _, images in df.groupby('duplicate_group'):
        note = 'conflicting grades' if images.conflict.any() else ''
        rows.append([', '.join(map(_duplicate_text, images.itertuples())), note])
    more = len(rows) - MAX_DUPLICATES
    return Table(['images', 'note'], rows[:MAX_DUPLICATES],
                 f'{more} more in duplicates.csv of the run folder' if more > 0 else '')


def _duplicate_text(row: Any) -> str:
    "Return table, id and grade of an image."
    text = f'{row.source} {row.id_code}'
    return text if np.isnan(row.diagnosis) else f'{text} (grade {row.diagnosis:.0f})'


def _strip(images: list[np.ndarray], caption: str) -> np.ndarray:
    "Return the tiles side by side above the caption; the original is squeezed or padded to `ORIGINAL_WIDTH`."
    original, *others = images
    missing = ORIGINAL_WIDTH - original.shape[1]
    if missing < 0: original = cv2.resize(original, (ORIGINAL_WIDTH, TILE), interpolation=cv2.INTER_AREA)
    else: original = cv2.copyMakeBorder(original, 0, 0, 0, missing, cv2.BORDER_CONSTANT)
    strip = cv2.copyMakeBorder(np.hstack([original, *others]), 0, 18, 0, 6, cv2.BORDER_CONSTANT)
    font, width = cv2.FONT_HERSHEY_SIMPLEX, strip.shape[1] - 8
    scale = .42 * min(1, width / cv2.getTextSize(caption, font, .42, 1)[0][0])   # a long id or many flags: smaller
    return cv2.putText(strip, caption, (2, TILE + 13), font, scale, (230, 230, 230), 1, cv2.LINE_AA)


def contact_sheet(strips: list[np.ndarray], columns: int = 2) -> np.ndarray:
    "Return the strips in rows of `columns`, the last row filled up with black."
    missing = -len(strips) % columns
    strips = strips + [np.zeros_like(strips[0])] * missing
    return np.vstack([np.hstack(strips[i:i + columns]) for i in range(0, len(strips), columns)])
