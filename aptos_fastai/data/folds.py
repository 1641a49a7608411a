"Folds: written once and reused."
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.io import digest, write_bytes
from aptos_fastai.data.tables import TableError
from aptos_fastai.recipe import Recipe

FOLDS = ['source', 'id_code', 'fold', 'digest']       # columns of folds.csv


def make_folds(frame: pd.DataFrame, splits: int, seed: int) -> np.ndarray:
    "Part 0 … `splits`-1 of each row: grades spread evenly, a group never in two parts"
    from sklearn.model_selection import StratifiedGroupKFold
    n = frame.group.nunique()
    if n < splits: raise TableError(f'[table.{frame.source.iloc[0]}]: {n} patients or images are too few for [recipe] splits = {splits}')
    fold = np.zeros(len(frame), int)
    cv = StratifiedGroupKFold(splits, shuffle=True, random_state=seed)
    with warnings.catch_warnings():       # a grade rarer than `splits` is met with in real tables: it validates where it falls
        warnings.filterwarnings('ignore', message='The least populated class', category=UserWarning)
        try: parts = list(cv.split(frame, frame.diagnosis.astype(int), frame.group))
        except ValueError:
            raise TableError(f'[table.{frame.source.iloc[0]}]: every grade has fewer than {splits} images; set [recipe] splits lower') from None
    for k, (_, rows) in enumerate(parts): fold[rows] = k
    for k in range(splits):
        if frame.diagnosis[fold == k].nunique() < 2:
            raise TableError(f'[table.{frame.source.iloc[0]}]: fold {k} holds a single grade, no kappa can be measured on it; '
                             f'set [recipe] splits lower or give more images')
    return fold


def add_folds(recipe: Recipe, frames: dict[str, pd.DataFrame], file: Path) -> dict[str, pd.DataFrame]:
    """`frames` with a column `fold`: from `file` where it holds just these images, else made; `write_folds` writes them.

    A group has one fold in whichever tables it is: an image that stands in a second table follows the first, an ungraded one too; else that is -1.
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
