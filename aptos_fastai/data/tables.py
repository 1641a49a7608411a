"CSVs and folders of images -> one checked frame a table; folds written once and reused."
import os
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import AptosError
from aptos_fastai.recipe import Recipe, Table


class TableError(AptosError):
    "A table that cannot be used: names the file, the ids and what to do."


def _few(ids) -> str: return ', '.join(map(str, list(ids)[:5])) + (', …' if len(ids) > 5 else '')


def find_folder(table: Table, data: Path) -> Path:
    "The first of the table's folders under `data` that holds its CSV"
    tried = [data / f for f in table.folder]
    for o in tried:
        if (o / table.csv).is_file(): return o
    raise TableError(f'[table.{table.name}]: no {table.csv} in {" or ".join(map(str, tried))}; --data is to name the folder '
                     f'that holds {" or ".join(table.folder) if table.folder != (".",) else table.csv} (--data demo runs on synthetic images)')


def _images(folder: Path) -> dict[str, Path]:
    "Stem -> path of the images in `folder`"
    if not folder.is_dir(): raise TableError(f'{folder}: no such folder of images')
    out: dict[str, Path] = {}
    with os.scandir(folder) as it: found = sorted((o.name, o.is_symlink()) for o in it if not o.name.startswith('.') and o.is_file())
    names, inside = [n for n, _ in found], folder.resolve().parent
    for n in [n for n, link in found if link and not (folder / n).resolve().is_relative_to(inside)]:
        raise TableError(f'{folder / n}: is a link out of {inside}; put the image itself there, or name its own folder in the recipe')
    for n in names:
        stem = n.rpartition('.')[0] or n
        if stem in out: raise TableError(f'{folder}: both {out[stem].name} and {n} stand for the id {stem}; keep one')
        out[stem] = folder / n
    return out


def _grades(csv: Path, df: pd.DataFrame, table: Table) -> np.ndarray:
    g = pd.to_numeric(df[table.grade], errors='coerce')
    bad = ~g.isin(range(5))
    if bad.any():
        shown = [f'{i} = {v}' for i, v in zip(df[table.id][bad], df[table.grade][bad], strict=True)]
        raise TableError(f'{csv}: {bad.sum()} {table.grade} not a whole number from 0 to 4: {_few(shown)}')
    return g.to_numpy(np.float32)


def _read_csv(csv: Path, cols: list[str]) -> pd.DataFrame:
    try: df = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding='utf-8-sig')
    except pd.errors.EmptyDataError: raise TableError(f'{csv}: is empty') from None
    except (pd.errors.ParserError, UnicodeDecodeError) as e: raise TableError(f'{csv}: is no readable CSV ({e})') from None
    for c in cols:
        if c not in df: raise TableError(f'{csv}: no column {c}; it has {", ".join(df.columns)}')
    if not len(df): raise TableError(f'{csv}: has no rows')
    return df


def read_table(table: Table, data: Path) -> pd.DataFrame:
    """The frame of `table` under the folder `data`, a row an image: id_code, diagnosis (float; NaN where ungraded), path, group, source.

    Raises `TableError`: missing file, folder or column; no rows; grades off 0-4; ids twice; ids without an image.
    """
    if not data.is_dir(): raise TableError(f'{data}: no such data folder; --data demo runs on synthetic images')
    folder = find_folder(table, data)
    csv, pics = folder / table.csv, folder / table.images
    df = _read_csv(csv, [table.id] + ([table.grade] if table.graded else []))
    raw = df[table.id]
    by_stem = _images(pics)
    names = {p.name: p for p in by_stem.values()}
    paths = [by_stem.get(o) or names.get(o) for o in raw]
    twice = raw[raw.duplicated() | pd.Series(paths, dtype=object).where(lambda o: o.notna(), raw).duplicated()].unique()     # a and a.png are one
    if len(twice): raise TableError(f'{csv}: {len(twice)} {table.id} stand there more than once: {_few(twice)}')
    lost = [o for o, p in zip(raw, paths, strict=True) if p is None]
    if lost: raise TableError(f'{csv}: {len(lost)} of {len(raw)} ids have no image in {pics}: {_few(lost)}')
    group = raw.str.extract(table.group, expand=False if '(' not in table.group else True) if table.group else None
    if group is not None: group = group.iloc[:, 0] if isinstance(group, pd.DataFrame) else group
    return pd.DataFrame(dict(
        id_code=raw, diagnosis=_grades(csv, df, table) if table.graded else np.full(len(df), np.nan, np.float32),
        path=[str(p) for p in paths], group=f'{table.name}:' + (raw if group is None else group.fillna(raw)), source=table.name))


def read_tables(recipe: Recipe, data: Path) -> dict[str, pd.DataFrame]:
    "The frames of every table that the recipe uses"
    return {t.name: read_table(t, Path(data)) for t in recipe.used_tables}


def read_order(table: Table, data: Path) -> list[str]:
    "The ids of the submission, in order: those of the table's `order` CSV where it is there, else the table's own"
    folder = find_folder(table, data)
    own = _read_csv(folder / table.csv, [table.id])[table.id].tolist()
    csv = folder / table.order if table.order else None
    if csv is None or not csv.is_file(): return own
    ids = _read_csv(csv, ['id_code']).id_code.tolist()
    lost = sorted(set(ids) ^ set(own))
    if lost: raise TableError(f'{csv}: its ids and those of {table.csv} differ in {len(lost)}: {_few(lost)}')
    return ids
