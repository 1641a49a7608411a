"Make cross-validation folds, write them once and reuse them."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import changed_message, digest, write_bytes
from aptos_fastai.data.spreadsheet import TableError
from aptos_fastai.recipe.graph import Recipe

FOLDS = ['source', 'id_code', 'fold', 'digest']       # columns of folds.csv


def make_folds(frame: pd.DataFrame, splits: int, seed: int, grouped_by: str = 'images') -> np.ndarray:
    """Return the fold 0 … `splits`-1 of each row, stratified by grade; a group is never in two folds.

    `grouped_by` says what a group is. Raises `TableError` if there are too few groups, or too few images of a grade.
    """
    from sklearn.model_selection import StratifiedGroupKFold
    table, groups = f'[table.{frame.source.iloc[0]}]', frame.group.nunique()
    if groups < splits:
        raise TableError(f'{table}: {groups} {grouped_by} are too few for [recipe] splits = {splits}. '
                         'Lower splits, and folds of the stages with it, or add images.')
    cv = StratifiedGroupKFold(splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():       # real tables contain grades rarer than `splits`; some folds then lack them
        warnings.filterwarnings('ignore', message='The least populated class', category=UserWarning)
        try: parts = list(cv.split(frame, frame.diagnosis.astype(int), frame.group))
        except ValueError:
            raise TableError(f'{table}: every grade has fewer than {splits} images. '
                             'Lower [recipe] splits, and folds with it, or add images.') from None
    fold = np.zeros(len(frame), int)
    for k, (_, rows) in enumerate(parts):
        fold[rows] = k
        if frame.diagnosis.iloc[rows].nunique() < 2:
            raise TableError(f'{table}: fold {k} contains a single grade, so its kappa is undefined. '
                             'Lower [recipe] splits, and folds with it, or add images.')
    return fold


def add_folds(recipe: Recipe, frames: dict[str, pd.DataFrame], file: Path) -> dict[str, pd.DataFrame]:
    """Return `frames` with a column `fold`: read from `file` if it lists the same images, else made. Writes nothing.

    A group has one fold in all tables: an image that is also in an earlier table takes its fold there, graded or not.
    Other ungraded images have fold -1. Raises `TableError` if `file` is damaged or edited.
    """
    old = _read_folds(file) if file.is_file() else pd.DataFrame(columns=FOLDS)
    out: dict[str, pd.DataFrame] = {}
    fold_of_group: dict[str, int] = {}
    for name, df in frames.items():
        if not recipe.tables[name].graded: continue
        fold = _reuse_folds(recipe, df, old, file)
        if fold is None:
            made = pd.Series(make_folds(df, recipe.splits, recipe.seed, recipe.tables[name].grouped_by))
            fold = df.group.map(fold_of_group).fillna(made)
        out[name] = df.assign(fold=fold.astype(int))
        fold_of_group |= dict(zip(df.group, out[name].fold, strict=True))
    for name, df in frames.items():
        if name not in out: out[name] = df.assign(fold=df.group.map(fold_of_group).fillna(-1).astype(int))
    return {name: out[name] for name in frames}


def _reuse_folds(recipe: Recipe, df: pd.DataFrame, old: pd.DataFrame, file: Path) -> pd.Series | None:
    "Return the folds of a table from folds.csv; None if they were made for other images, grades, groups or settings."
    name = df.source.iloc[0]
    same_table = old.digest.map(lambda o: o.partition('-')[0]) == _table_digest(recipe, df)
    rows = old[(old.source == name) & same_table]
    if len(rows) != len(df) or set(rows.id_code) != set(df.id_code): return None
    fold = df.id_code.map(rows.set_index('id_code').fold)
    if set(rows.digest) != {_folds_digest(recipe, df, fold)}:
        raise TableError(changed_message(file, 'Restore it, or delete it and run again.'))
    return fold


def _read_folds(file: Path) -> pd.DataFrame:
    try: df = pd.read_csv(file, dtype=dict(source=str, id_code=str, fold=int, digest=str), keep_default_na=False)
    except (ValueError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise TableError(f'{file}: damaged CSV ({reason}). Delete it and run again.') from None
    if list(df) != FOLDS:
        raise TableError(f'{file}: its columns are {", ".join(df)}, not {", ".join(FOLDS)}. Delete it and run again.')
    return df


def _table_digest(recipe: Recipe, df: pd.DataFrame) -> str:
    "Hash all that the folds of a table depend on."
    return digest([recipe.splits, recipe.seed, df.id_code.tolist(), df.diagnosis.tolist(), df.group.tolist()])[:12]


def _folds_digest(recipe: Recipe, df: pd.DataFrame, fold: pd.Series) -> str:
    "Hash a table and its folds."
    return f'{_table_digest(recipe, df)}-{digest(fold.tolist())[:12]}'


def write_folds(recipe: Recipe, frames: dict[str, pd.DataFrame], file: Path):
    "Write the folds of every graded table to `file`; leave the file untouched if it already contains them."
    parts = []
    for name, df in frames.items():
        if not recipe.tables[name].graded: continue
        parts.append(df[['source', 'id_code', 'fold']].assign(digest=_folds_digest(recipe, df, df.fold)))
    data = pd.concat(parts).to_csv(index=False, lineterminator='\n').encode()
    if not file.is_file() or file.read_bytes() != data: write_bytes(file, data)
