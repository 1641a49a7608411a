"CSVs and folders of pictures -> one checked frame a table; folds written once and reused."
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.config import Recipe, Table
from aptos_fastai.files import AptosError, digest, write_bytes

FOLDS = ['source', 'id_code', 'fold', 'digest']       # columns of folds.csv


class TableError(AptosError):
    "A table that cannot be used: names the file, the ids and what to do."


def _few(ids) -> str: return ', '.join(map(str, list(ids)[:5])) + (', …' if len(ids) > 5 else '')


def find_folder(table: Table, data: Path) -> Path:
    "The first of the table's folders under `data` that holds its CSV"
    tried = [data / f for f in table.folder]
    for o in tried:
        if (o / table.csv).is_file(): return o
    raise TableError(f'[table.{table.name}]: no {table.csv} in {" or ".join(map(str, tried))}; --data is to name the folder '
                     f'that holds {" or ".join(table.folder) if table.folder != (".",) else table.csv} (--data demo runs on synthetic pictures)')


def _pictures(folder: Path) -> dict[str, Path]:
    "Stem -> path of the pictures in `folder`"
    if not folder.is_dir(): raise TableError(f'{folder}: no such folder of pictures')
    out: dict[str, Path] = {}
    with os.scandir(folder) as it: found = sorted((o.name, o.is_symlink()) for o in it if not o.name.startswith('.') and o.is_file())
    names, inside = [n for n, _ in found], folder.resolve().parent
    for n in [n for n, link in found if link and not (folder / n).resolve().is_relative_to(inside)]:
        raise TableError(f'{folder / n}: is a link out of {inside}; put the picture itself there, or name its own folder in the recipe')
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
    """The frame of `table` under the folder `data`, a row a picture: id_code, diagnosis (float; NaN where ungraded), path, group, source.

    Raises `TableError`: missing file, folder or column; no rows; grades off 0-4; ids twice; ids without a picture.
    """
    if not data.is_dir(): raise TableError(f'{data}: no such data folder; --data demo runs on synthetic pictures')
    folder = find_folder(table, data)
    csv, pics = folder / table.csv, folder / table.images
    df = _read_csv(csv, [table.id] + ([table.grade] if table.graded else []))
    raw = df[table.id]
    by_stem = _pictures(pics)
    names = {p.name: p for p in by_stem.values()}
    paths = [by_stem.get(o) or names.get(o) for o in raw]
    twice = raw[raw.duplicated() | pd.Series(paths, dtype=object).where(lambda o: o.notna(), raw).duplicated()].unique()     # a and a.png are one
    if len(twice): raise TableError(f'{csv}: {len(twice)} {table.id} stand there more than once: {_few(twice)}')
    lost = [o for o, p in zip(raw, paths, strict=True) if p is None]
    if lost: raise TableError(f'{csv}: {len(lost)} of {len(raw)} ids have no picture in {pics}: {_few(lost)}')
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


def make_folds(frame: pd.DataFrame, splits: int, seed: int) -> np.ndarray:
    "Part 0 … `splits`-1 of each row: grades spread evenly, a group never in two parts"
    from sklearn.model_selection import StratifiedGroupKFold
    n = frame.group.nunique()
    if n < splits: raise TableError(f'[table.{frame.source.iloc[0]}]: {n} patients or pictures are too few for [recipe] splits = {splits}')
    fold = np.zeros(len(frame), int)
    cv = StratifiedGroupKFold(splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():       # a grade rarer than `splits` is met with in real tables: it validates where it falls
        warnings.filterwarnings('ignore', message='The least populated class', category=UserWarning)
        try: parts = list(cv.split(frame, frame.diagnosis.astype(int), frame.group))
        except ValueError:
            raise TableError(f'[table.{frame.source.iloc[0]}]: every grade has fewer than {splits} pictures; set [recipe] splits lower') from None
    for k, (_, rows) in enumerate(parts): fold[rows] = k
    for k in range(splits):
        if frame.diagnosis[fold == k].nunique() < 2:
            raise TableError(f'[table.{frame.source.iloc[0]}]: fold {k} holds a single grade, no kappa can be measured on it; '
                             f'set [recipe] splits lower or give more pictures')
    return fold


def add_folds(recipe: Recipe, frames: dict[str, pd.DataFrame], file: Path) -> dict[str, pd.DataFrame]:
    """`frames` with a column `fold`: from `file` where it holds just these pictures, else made; `write_folds` writes them.

    A group has one fold in whichever tables it is: a picture that stands in a second table follows the first, an ungraded one too; else that is -1.
    """
    old = _read_folds(file) if file.is_file() else pd.DataFrame(columns=FOLDS)
    out: dict[str, pd.DataFrame] = {}
    given: dict[str, int] = {}
    for name, df in frames.items():
        if not recipe.tables[name].graded: continue
        mine = old[(old.source == name) & (old.digest.str.partition('-')[0] == _folds_digest(recipe, df))] if len(old) else old
        if len(mine) == len(df) and set(mine.id_code) == set(df.id_code):
            fold = df.id_code.map(mine.set_index('id_code').fold)
            if set(mine.digest) != {_sealed(recipe, df, fold)}:
                raise TableError(f'{file}: the folds of {name} are not those that a run wrote (their hash differs); restore it, or delete it and run again')
        else: fold = df.group.map(given).fillna(pd.Series(make_folds(df, recipe.splits, recipe.seed)))
        out[name] = df.assign(fold=fold.astype(int))
        given |= dict(zip(df.group, out[name].fold, strict=True))
    return {n: out[n] if n in out else df.assign(fold=df.group.map(given).fillna(-1).astype(int)) for n, df in frames.items()}


def _read_folds(file: Path) -> pd.DataFrame:
    try: df = pd.read_csv(file, dtype=dict(source=str, id_code=str, fold=int, digest=str), keep_default_na=False)
    except (ValueError, OSError) as e:
        raise TableError(f'{file}: is damaged ({str(e).splitlines()[0]}); delete it and run again, it will be made anew') from None
    if list(df) != FOLDS: raise TableError(f'{file}: is not what a run wrote (columns {", ".join(df)}); delete it and run again')
    return df


def _folds_digest(recipe: Recipe, df: pd.DataFrame) -> str:
    return digest([recipe.splits, recipe.seed, df.id_code.tolist(), df.diagnosis.tolist(), df.group.tolist()])[:12]


def _sealed(recipe: Recipe, df: pd.DataFrame, fold: pd.Series) -> str:
    "The table's digest and that of its folds"
    return f'{_folds_digest(recipe, df)}-{digest(fold.tolist())[:12]}'


def write_folds(recipe: Recipe, frames: dict[str, pd.DataFrame], file: Path):
    "The folds of every graded table as `file`, untouched where it holds them"
    parts = [df[['source', 'id_code', 'fold']].assign(digest=_sealed(recipe, df, df.fold)) for n, df in frames.items() if recipe.tables[n].graded]
    text = pd.concat(parts).to_csv(index=False, lineterminator='\n')
    if not file.is_file() or file.read_text() != text: write_bytes(file, text.encode())
