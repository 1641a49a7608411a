"""Prepare images once and keep them as JPEG squares.

    <store>/<prep.name>/<table>-<hash of its folder>/<id>.<hash of the JPEG><prep.suffix>
    <store>/<prep.name>/<table>-<hash of its folder>/prepared.csv
"""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.distributed import all_gather, cores, run_on_all_ranks, shard, world_size
from aptos_fastai.common.io import changed_message, remove_stale_temp_files, write_bytes, write_csv
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import Prep, prepare, square_of

BATCH = 32                                   # images per core between two updates of the progress bar
SAVE_EVERY = 1000                            # images between two writes of prepared.csv
NOT_PREPARED = dict(width=0, height=0, x=0, y=0, r=0, stretch=1., how='', flags='', red_green=0.,
                    green_blue=0., perceptual_hash='', pixel_sha256='', stored='')
REQUIRED = {*NOT_PREPARED, 'error', 'bytes', 'mtime'}            # columns of prepared.csv
FOUND = ('pixel_sha256', 'perceptual_hash', 'how', 'flags', 'red_green', 'green_blue')      # that a run's tables get

RESIZED = .03                                # warn of a table with a larger fraction of squashed images
ALL_SQUARES = 20                             # images of one square size look resized, ...
NO_CIRCLE = .2                               # ... if no circle was found in a larger fraction of them


def jpeg_hash(data: bytes) -> str:
    "Return the hash that the name of a stored JPEG contains, so that a reader can verify the file."
    return hashlib.sha256(data).hexdigest()[:16]


def stored_path(folder: Path, id_code: str, sha: str, prep: Prep) -> Path:
    "Return the path of a prepared image; `sha` is its hash, the column `stored` of prepared.csv."
    safe_id = id_code.replace('/', '_').replace(os.sep, '_')
    return folder / f'{safe_id}.{sha}{prep.suffix}'


def read_square(path: str | Path, prep: Prep, size: int) -> np.ndarray:
    """Read an image as uint8 `size` x `size` x 3 RGB.

    `path` is a stored image, or an original, which is prepared first and gives the same pixels. Raises `ImageError`.
    """
    path = Path(path)
    try: data = path.read_bytes()
    except OSError as e:
        raise ImageError(f'{path}: cannot be read ({e.strerror}). Check the path and its permissions.') from None
    if path.name.endswith(prep.suffix):
        expected = path.name.removesuffix(prep.suffix).rpartition('.')[2]
        if jpeg_hash(data) != expected:
            raise ImageError(changed_message(path, 'Delete it and run again.'))
    else:
        try: data, _ = prepare(data, prep)
        except ImageError as e: raise ImageError(f'{path}: {e}') from None
    return square_of(data, prep, size)


def store_folder(frame: pd.DataFrame, store: Path, prep: Prep) -> Path:
    """Return the folder of the prepared images of `frame`.

    Its name contains a hash of the data folder, so that tables of one name from two data folders stay apart.
    The hash is of the relative path if the data lies beside the store: both can then be moved together.
    """
    images, parent = Path(frame.path.iloc[0]).resolve().parent, Path(store).resolve().parent
    if images.is_relative_to(parent): images = images.relative_to(parent)
    sha = hashlib.sha256(images.as_posix().encode()).hexdigest()[:8]
    return Path(store) / prep.name / f'{frame.source.iloc[0]}-{sha}'


def read_prepared(folder: Path) -> pd.DataFrame | None:
    """Read prepared.csv of a store folder, one row per image.

    Returns None if there is none or an earlier version of this package wrote it. Raises `ImageError` if it is damaged.
    """
    file = folder / 'prepared.csv'
    if not file.is_file(): return None
    try: df = pd.read_csv(file, dtype=dict(id_code=str, stored=str), keep_default_na=False)
    except (ValueError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise ImageError(f'{file}: damaged CSV ({reason}). Delete it and run again.') from None
    return df if set(df) >= REQUIRED else None


def resized_warning(records: pd.DataFrame) -> str:
    """Return a warning if the images of a table look resized to another aspect; empty if they do not.

    `records` has the columns width, height, how and flags of prepared.csv. Images look resized if more than `RESIZED`
    of the retinas are ellipses, or if all images have one square size and many retinas are no circle.
    """
    df = records[records.how != '']
    squashed = df['flags'].str.split().map(lambda flags: 'squashed' in flags).sum()
    advice = 'Use the original images if you can: resizing loses detail.'
    if squashed > RESIZED * len(df):
        return (f'{squashed} of {len(df)} images look resized (their retinas are ellipses; they are made circles '
                f'again). {advice}')
    missing = (df.how != 'circle').sum()
    sizes = df[['width', 'height']].drop_duplicates().to_numpy().tolist()
    if len(df) < ALL_SQUARES or len(sizes) > 1 or sizes[0][0] != sizes[0][1]: return ''
    if (df.how == 'whole').all() or missing <= NO_CIRCLE * len(df): return ''         # whole: retinas are not searched
    return (f'All {len(df)} images are squares of {sizes[0][0]:.0f} pixels, and {missing} of them show no circle: they '
            f'look resized. {advice}')


def _prepare_one(row, folder: Path, prep: Prep, known: dict[str, dict]) -> dict:
    "Return the record of one image; prepare the image unless `known` holds an up-to-date record."
    path, old = Path(row.path), known.get(row.id_code)
    try:
        stat = path.stat()
        state = dict(bytes=stat.st_size, mtime=stat.st_mtime_ns)
        if old and _is_up_to_date(old, state, folder, prep): return old
        jpeg, found = prepare(path.read_bytes(), prep)
        out = stored_path(folder, row.id_code, jpeg_hash(jpeg), prep)
        write_bytes(out, jpeg)
        if old and old['stored']: _remove_replaced(stored_path(folder, row.id_code, old['stored'], prep), out)
    except ImageError as e: return dict(id_code=row.id_code, **state, **NOT_PREPARED, error=str(e))
    except OSError as e:
        return dict(id_code=row.id_code, bytes=0, mtime=0, **NOT_PREPARED, error=f'cannot be read ({e.strerror})')
    return dict(id_code=row.id_code, **state, **found, stored=jpeg_hash(jpeg), error='')


def _is_up_to_date(record: dict, state: dict, folder: Path, prep: Prep) -> bool:
    "Return whether a record's image is stored and its original has the same size and modification time as before."
    if record['error'] or not stored_path(folder, record['id_code'], record['stored'], prep).exists(): return False
    return all(record[k] == v for k, v in state.items())


def _remove_replaced(old: Path, new: Path):
    if old != new: old.unlink(missing_ok=True)


def _prepare_chunk(_bars: Bars, frame: pd.DataFrame, folder: Path, prep: Prep, known: dict[str, dict]) -> list[dict]:
    "Return the records of the rows of `frame`, prepared by all cores of all processes."
    cv2.setNumThreads(1)                     # the thread pool already uses every core
    rows = frame.iloc[shard(len(frame))].itertuples()
    with ThreadPoolExecutor(cores()) as pool:
        try: return all_gather(list(pool.map(partial(_prepare_one, folder=folder, prep=prep, known=known), rows)))
        finally: pool.shutdown(cancel_futures=True)


def prepare_table(frame: pd.DataFrame, store: Path, prep: Prep, bars: Bars, *,
                  skip_unreadable: bool = False) -> pd.DataFrame:
    """Prepare the images of `frame` that are not in the store yet.

    Returns `frame` with the columns `stored` (path) and those of `FOUND`.
    Raises `ImageError` with a list of unreadable images; with `skip_unreadable` prints the list and drops their rows.
    """
    folder = store_folder(frame, store, prep)
    remove_stale_temp_files(folder)          # only old ones: other runs may be writing here
    record = _prepare_rows(frame, folder, prep, bars)
    _check_unreadable(record, frame.source.iloc[0], folder, skip_unreadable)
    warning = resized_warning(record)
    if warning: say(f'{frame.source.iloc[0]}: {warning}', 'yellow')
    return _with_stored(frame, folder, prep, record)


def _prepare_rows(frame: pd.DataFrame, folder: Path, prep: Prep, bars: Bars) -> pd.DataFrame:
    "Return the record of every image of `frame`; prepare the missing ones and write prepared.csv."
    old = read_prepared(folder)
    old_rows: list[dict] = [] if old is None else old.to_dict('records')
    known = {o['id_code']: o for o in old_rows}
    done: list[dict] = []

    def save():
        "Write the finished rows and, for the rest, those of an earlier run: an interrupted run resumes from here."
        rows = done + [known[i] for i in frame.id_code[len(done):] if i in known]
        if rows and rows != old_rows: write_csv(folder / 'prepared.csv', pd.DataFrame(rows))

    chunk_size = BATCH * cores() * world_size()
    with bars(f'preparing {frame.source.iloc[0]}', len(frame), 'images') as bar:
        try:
            for start in range(0, len(frame), chunk_size):
                chunk = frame.iloc[start:start + chunk_size]
                known_here = {i: known[i] for i in chunk.id_code if i in known}
                done += run_on_all_ranks(_prepare_chunk, bars, chunk, folder, prep, known_here)
                bar.to(len(done))
                if len(done) // SAVE_EVERY > start // SAVE_EVERY: save()
        finally: save()
    return pd.DataFrame(done)


def _check_unreadable(record: pd.DataFrame, table: str, folder: Path, skip_unreadable: bool):
    "Raise `ImageError` for unreadable images; with `skip_unreadable` print them, and raise if no image is left."
    bad = record[record.error != '']
    if not len(bad): return
    first = '; '.join(f'{o.id_code} {o.error}' for o in bad.head(5).itertuples())
    line = (f'[table.{table}]: {len(bad)} of {len(record)} images are unreadable: {first}. '
            f'The full list is in {folder / "prepared.csv"}.')
    if not skip_unreadable or len(bad) == len(record):
        raise ImageError(f'{line} Replace these files, or set [images] skip_unreadable = yes to leave them out.')
    say(f'{line} They are left out (skip_unreadable = yes).', 'yellow')


def prepared_already(frame: pd.DataFrame, store: Path, prep: Prep, *, skip_unreadable: bool = False) -> pd.DataFrame:
    """Return what `prepare_table` returns from prepared.csv alone, without reading an image.

    Returns `frame` unchanged if prepared.csv is missing, lists other images, or has unreadable ones that are not
    skipped.
    """
    folder = store_folder(frame, store, prep)
    record = read_prepared(folder)
    if record is None or record.id_code.tolist() != frame.id_code.tolist(): return frame
    if (record.error != '').any() and not skip_unreadable: return frame
    return _with_stored(frame, folder, prep, record)


def _with_stored(frame: pd.DataFrame, folder: Path, prep: Prep, record: pd.DataFrame) -> pd.DataFrame:
    "Add the columns `stored` and those of `FOUND`; drop the rows of unreadable images."
    stored = [str(stored_path(folder, i, h, prep)) for i, h in zip(frame.id_code, record.stored, strict=True)]
    df = frame.assign(stored=stored, **{name: record[name].to_numpy() for name in FOUND})
    readable = (record.error == '').to_numpy()
    return df[readable].reset_index(drop=True)
