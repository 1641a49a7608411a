"Bytes -> retina crop -> uint8 square, and the store of prepared images."
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import say
from aptos_fastai.common.distributed import all_gather, cores, run_on_all_ranks, shard, world_size
from aptos_fastai.common.io import remove_stale_temp_files, write_bytes, write_csv
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import Prep, prepare, square_of


def read_square(path: str | Path, prep: Prep, size: int) -> np.ndarray:
    "uint8 `size` x `size` x 3 RGB of an image of the store, or of an original prepared on the way: the same pixels"
    path = Path(path)
    try: data = path.read_bytes()
    except OSError as e: raise ImageError(f'{path}: cannot be read ({e.strerror})') from None
    if not path.name.endswith(prep.suffix):
        try: data = prepare(data, prep)[0]
        except ImageError as e: raise ImageError(f'{path}: {e}') from None
    elif _hash(data) != path.name.removesuffix(prep.suffix).rpartition('.')[2]:
        raise ImageError(f'{path}: is not what was stored (its hash differs); delete it and run again, it will be made anew')
    return square_of(data, prep, size)


# The store: <store>/<prep.name>/<table>-<hash of the folder>/<id>.<hash of the file><suffix> and prepared.csv

BATCH = 32                                   # images a core between two looks at progress
KEEP_EVERY = 1000                            # images: how often prepared.csv is written on the way

def _hash(data: bytes) -> str:
    "Of a stored file, in its name: who reads it sees whether it is what was written"
    return hashlib.sha256(data).hexdigest()[:16]


def _place(folder: Path, id_code: str, stored: str, prep: Prep) -> Path:
    return folder / f'{id_code.replace("/", "_").replace(os.sep, "_")}.{stored}{prep.suffix}'


def _stored(row, folder: Path, prep: Prep, old: dict) -> dict:
    "The record of one image, prepared now unless `old` has it and the original is as it was then"
    src = Path(row.path)
    try:
        st = src.stat()
        same = dict(bytes=st.st_size, mtime=st.st_mtime_ns)
        was = old.get(row.id_code)
        if was and not was['error'] and _place(folder, row.id_code, was['stored'], prep).exists() and all(was[k] == v for k, v in same.items()): return was
        jpeg, info = prepare(src.read_bytes(), prep)
        write_bytes(out := _place(folder, row.id_code, _hash(jpeg), prep), jpeg)
        if was and was['stored'] and (gone := _place(folder, row.id_code, was['stored'], prep)) != out: gone.unlink(missing_ok=True)
        return dict(id_code=row.id_code, **same, **info, stored=_hash(jpeg), error='')
    except ImageError as e: why = str(e)
    except OSError as e: why, same = f'cannot be read ({e.strerror})', dict(bytes=0, mtime=0)
    return dict(id_code=row.id_code, **same, width=0, height=0, x=0, y=0, r=0, how='', flags='', perceptual_hash='', pixel_sha256='', stored='', error=why)


def store_folder(frame: pd.DataFrame, store: Path, prep: Prep) -> Path:
    "Where the prepared images of `frame` are; tables of one name from two data folders keep apart, and data beside the store may move with it"
    where, beside = Path(frame.path.iloc[0]).resolve().parent, Path(store).resolve().parent
    if where.is_relative_to(beside): where = where.relative_to(beside)
    return Path(store) / prep.name / f'{frame.source.iloc[0]}-{hashlib.sha256(where.as_posix().encode()).hexdigest()[:8]}'


def read_prepared(folder: Path) -> pd.DataFrame | None:
    "The record of a prepared table, a row an image; None where there is none of this version. Raises `ImageError`"
    file = folder / 'prepared.csv'
    if not file.is_file(): return None
    try: df = pd.read_csv(file, dtype=dict(id_code=str, stored=str), keep_default_na=False)
    except (ValueError, OSError) as e:
        raise ImageError(f'{file}: is damaged ({str(e).splitlines()[0]}); delete it and run again, it will be made anew') from None
    return df if {'stored', 'perceptual_hash', 'pixel_sha256', 'error', 'bytes', 'mtime'} <= set(df) else None        # of an earlier version


def _prepare_part(_, frame: pd.DataFrame, folder: Path, prep: Prep, old: dict) -> list[dict]:
    "The records of the rows of `frame`, by all cores of all processes"
    cv2.setNumThreads(1)                     # the pool has the cores
    with ThreadPoolExecutor(cores()) as pool:
        try: return all_gather(list(pool.map(partial(_stored, folder=folder, prep=prep, old=old), frame.iloc[shard(len(frame))].itertuples())))
        finally: pool.shutdown(cancel_futures=True)


def prepare_table(frame: pd.DataFrame, store: Path, prep: Prep, bars, *, skip_unreadable: bool = False) -> pd.DataFrame:
    """`frame` with its images prepared: columns `stored` (path), `pixel_sha256` and `perceptual_hash` (hashes).

    Raises `ImageError` with the list of those that cannot be read; with `skip_unreadable` they are said and their rows left out.
    """
    folder = store_folder(frame, store, prep)
    remove_stale_temp_files(folder)                            # other runs may be writing here: only what is an hour old
    old = read_prepared(folder)
    known = {o['id_code']: o for o in old.to_dict('records')} if old is not None else {}
    done: list[dict] = []

    def keep():
        "What is done, and of the others what was known: an interrupted run goes on from here"
        rows = done + [known[i] for i in frame.id_code[len(done):] if i in known]
        if rows and (old is None or rows != old.to_dict('records')): write_csv(folder / 'prepared.csv', pd.DataFrame(rows))
    each = BATCH * cores() * world_size()
    with bars(f'preparing {frame.source.iloc[0]}', len(frame), 'images') as bar:
        try:
            for i in range(0, len(frame), each):
                part = frame.iloc[i:i + each]
                done += run_on_all_ranks(_prepare_part, bars, part, folder, prep, {o: known[o] for o in part.id_code if o in known})
                bar.to(len(done))
                if len(done) // KEEP_EVERY > i // KEEP_EVERY: keep()
        finally: keep()
    new = pd.DataFrame(done)
    bad = new[new.error != '']
    if len(bad):
        first = '; '.join(f'{o.id_code} {o.error}' for o in bad.head(5).itertuples())
        line = f'{len(bad)} of {len(new)} images of {frame.source.iloc[0]} cannot be used: {first}; all are in {folder / "prepared.csv"}'
        if not skip_unreadable or len(bad) == len(new): raise ImageError(f'{line}; [images] skip_unreadable = yes goes on without them')
        say(f'skipped (skip_unreadable = yes): {line}', 'yellow')
    return _with_stored(frame, folder, prep, new)


def prepared_already(frame: pd.DataFrame, store: Path, prep: Prep, *, skip_unreadable: bool = False) -> pd.DataFrame:
    "What `prepare_table` gives, by its record alone; `frame` itself where that is missing, of other images or holds bad ones"
    folder = store_folder(frame, store, prep)
    old = read_prepared(folder)
    if old is None or old.id_code.tolist() != frame.id_code.tolist(): return frame
    return frame if (old.error != '').any() and not skip_unreadable else _with_stored(frame, folder, prep, old)


def _with_stored(frame: pd.DataFrame, folder: Path, prep: Prep, record: pd.DataFrame) -> pd.DataFrame:
    "`frame` with the columns `stored`, `pixel_sha256` and `perceptual_hash` of its store's record, without the rows that could not be read"
    fine = (record.error == '').to_numpy()
    stored = [str(_place(folder, i, h, prep)) for i, h in zip(frame.id_code, record.stored, strict=True)]
    return frame.assign(stored=stored, pixel_sha256=record.pixel_sha256.to_numpy(), perceptual_hash=record.perceptual_hash.to_numpy())[fine].reset_index(drop=True)
