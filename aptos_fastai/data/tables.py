"Read a CSV and its folder of images into one checked frame per table."
import os
import re
from collections.abc import Sized
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError
from aptos_fastai.recipe import Recipe, Table


class TableError(AptosError):
    "Raised for a table that cannot be used; the message names the file, the ids and what to do."


def _first_few(ids) -> str:
    return ', '.join(map(str, list(ids)[:5])) + (', …' if len(ids) > 5 else '')


def _count(items: Sized, noun: str) -> str:
    return f'{len(items)} {noun}' if len(items) == 1 else f'{len(items)} {noun}s'


def find_folder(table: Table, data: Path) -> Path:
    "Return the first of the table's folders under `data` that contains its CSV. Raises `TableError`."
    tried = [data / f for f in table.folder]
    for folder in tried:
        if (folder / table.csv).is_file(): return folder
    content = table.csv if table.folder == ('.',) else ' or '.join(table.folder)
    raise TableError(f'[table.{table.name}]: {table.csv} not found in {" or ".join(map(str, tried))}. '
                     f'Set --data to the folder that contains {content}, or use --data demo for synthetic images.')


def _find_images(folder: Path) -> dict[str, Path]:
    "Return stem -> path of the files in `folder`. Raises `TableError` for two files of one stem and links to outside."
    if not folder.is_dir():
        raise TableError(f'{folder}: image folder not found. Put the images there, or change the key `images`.')
    with os.scandir(folder) as entries:
        files = sorted((o.name, o.is_symlink()) for o in entries if not o.name.startswith('.') and o.is_file())
    root = folder.resolve().parent
    for name, is_link in files:
        if is_link and not (folder / name).resolve().is_relative_to(root):
            raise TableError(f'{folder / name}: symbolic link to a file outside {root}. '
                             'Replace it with the image, or name the image\'s own folder in the recipe.')
    images: dict[str, Path] = {}
    for name, _ in files:
        stem = name.rpartition('.')[0] or name
        if stem in images:
            raise TableError(f'{folder}: {images[stem].name} and {name} have the same id {stem}. Keep one of them.')
        images[stem] = folder / name
    return images


def _read_grades(csv: Path, df: pd.DataFrame, table: Table) -> np.ndarray:
    "Return the grades as float32 (n,). Raises `TableError` for anything but 0, 1, 2, 3, 4."
    grades = pd.to_numeric(df[table.grade], errors='coerce')
    bad = df[~grades.isin(range(5))]
    if len(bad):
        shown = [f'{i} = {v}' for i, v in zip(bad[table.id], bad[table.grade], strict=True)]
        raise TableError(f'{csv}: {_count(bad, "invalid value")} in column {table.grade}: {_first_few(shown)}. '
                         'Grades are whole numbers from 0 to 4.')
    return grades.to_numpy(np.float32)


def _read_csv(csv: Path, columns: list[str]) -> pd.DataFrame:
    "Read a CSV as text. Raises `TableError` if it is unreadable, has no rows or lacks one of `columns`."
    try: df = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding='utf-8-sig')
    except pd.errors.EmptyDataError:
        raise TableError(f'{csv}: the file is empty. Write a header and one row per image.') from None
    except (pd.errors.ParserError, UnicodeDecodeError) as e:
        raise TableError(f'{csv}: not a readable CSV ({str(e).strip()}). Save it as comma-separated UTF-8.') from None
    for c in columns:
        if c not in df:
            raise TableError(f'{csv}: no column {c}. Its columns are {", ".join(df.columns)}. '
                             'Rename one, or set the column name in the recipe.')
    if not len(df): raise TableError(f'{csv}: no rows. Write one row per image.')
    return df


def _match_images(csv: Path, ids: pd.Series, folder: Path) -> list[str]:
    """Return the image path of each id; an id is a file name with or without its extension.

    Raises `TableError` for duplicate ids and for ids without an image.
    """
    by_stem = _find_images(folder)
    by_name = {p.name: p for p in by_stem.values()}
    paths = [by_stem.get(i) or by_name.get(i) for i in ids]
    path_or_id = pd.Series(paths, dtype=object).where(lambda o: o.notna(), ids)      # a and a.png are one image
    repeated = ids[ids.duplicated() | path_or_id.duplicated()].unique()
    if len(repeated):
        raise TableError(f'{csv}: {_count(repeated, "duplicate value")} in column {ids.name}: {_first_few(repeated)}. '
                         'Keep one row per image.')
    missing = [i for i, p in zip(ids, paths, strict=True) if p is None]
    if missing:
        raise TableError(f'{csv}: {len(missing)} of {len(ids)} ids have no image in {folder}: {_first_few(missing)}. '
                         'Add the images or remove these rows.')
    return [str(p) for p in paths]


def _read_groups(ids: pd.Series, table: Table) -> pd.Series:
    """Return TABLE:PATIENT of each id; an id without a patient is its own group.

    Raises `TableError` if the table's pattern matches no id.
    """
    if not table.group: return f'{table.name}:' + ids
    patients = _read_patients(ids, table)
    if patients.isna().all():
        raise TableError(f'[table.{table.name}] group = {table.group}: matches none of the {len(ids)} ids, for example '
                         f'{ids.iloc[0]}. Put the part that is the patient in parentheses, or remove group and set '
                         'block = 10 if patients are unknown.')
    return f'{table.name}:' + patients.fillna(ids)


def _read_patients(ids: pd.Series, table: Table) -> pd.Series:
    "Return the first group of the table's pattern in each id; NaN where it matches nothing."
    return ids.str.extract(table.group)[0].replace('', np.nan)


def unmatched_ids(ids: pd.Series, table: Table) -> pd.Series:
    "Return the ids that the table's `group` does not match; none without `group`."
    if not table.group: return ids[:0]
    return ids[_read_patients(ids, table).isna()]


def unmatched_text(ids: pd.Series, table: Table) -> str:
    "Return a warning of ids that the table's `group` does not match, or an empty text."
    unmatched = unmatched_ids(ids, table)
    if not len(unmatched): return ''
    each = 'it is' if len(unmatched) == 1 else 'each is'
    return (f'[table.{table.name}] group = {table.group}: does not match {len(unmatched)} of {len(ids)} ids '
            f'({_first_few(unmatched)}); {each} a patient of its own. Change the pattern if that is wrong.')


def patients_text(frame: pd.DataFrame, table: Table) -> str:
    "Return how many patients the images of a table are of: '120 patients', or 'patients unknown'."
    n = frame.group.nunique()
    if table.group: return f'{n} patient' if n == 1 else f'{n} patients'
    return f'patients unknown, {n} {table.grouped_by}' if table.block else 'patients unknown'


def natural_order(ids: pd.Series) -> np.ndarray:
    "Return the positions of ids in natural order: a2 before a10"
    def key(text: str) -> list[tuple[int, str]]:
        parts = re.split(r'([0-9]+)', text)              # text and number in turn
        return [(int(part), '') if i % 2 else (0, part) for i, part in enumerate(parts)]
    return np.array(sorted(range(len(ids)), key=lambda i: key(ids.iloc[i])), int)


def _blocks(ids: pd.Series, table: Table) -> pd.Series:
    "Return TABLE:block K of each id: `block` neighbouring ids in natural order are one group"
    block = np.empty(len(ids), int)
    block[natural_order(ids)] = np.arange(len(ids)) // table.block
    return f'{table.name}:block ' + pd.Series(block, ids.index).astype(str)


def read_table(table: Table, data: Path) -> pd.DataFrame:
    """Read `table` under the folder `data`, one row per image.

    Columns: id_code, diagnosis (float32; NaN if the table is ungraded), path, group, source.
    Raises `TableError` for a missing file, folder or column, no rows, invalid grades, duplicate ids, missing images.
    """
    if not data.is_dir():
        raise TableError(f'{data}: data folder not found. Check --data, or use --data demo for synthetic images.')
    folder = find_folder(table, data)
    csv = folder / table.csv
    df = _read_csv(csv, [table.id, table.grade] if table.graded else [table.id])
    ids = df[table.id]
    paths = _match_images(csv, ids, folder / table.images)
    groups = _blocks(ids, table) if table.block else _read_groups(ids, table)
    grades = _read_grades(csv, df, table) if table.graded else np.full(len(df), np.nan, np.float32)
    return pd.DataFrame(dict(id_code=ids, diagnosis=grades, path=paths, group=groups, source=table.name))


def read_tables(recipe: Recipe, data: Path) -> dict[str, pd.DataFrame]:
    "Read every table that the recipe uses; returns name -> frame."
    return {t.name: read_table(t, Path(data)) for t in recipe.used_tables}


def read_order(table: Table, data: Path) -> list[str]:
    """Return the ids of the submission in order: those of the table's `order` CSV, or the table's own if there is none.

    Raises `TableError` if the two lists contain different ids.
    """
    folder = find_folder(table, data)
    own = _read_csv(folder / table.csv, [table.id])[table.id].tolist()
    csv = folder / table.order if table.order else None
    if csv is None or not csv.is_file(): return own
    ids = _read_csv(csv, ['id_code']).id_code.tolist()
    differing = sorted(set(ids) ^ set(own))
    if differing:
        raise TableError(f'{csv}: {_count(differing, "id")} in only one of this file and {table.csv}: '
                         f'{_first_few(differing)}. List the same images in both.')
    return ids
