"""Prepare images once and keep them as JPEG squares, in a folder for each size.

    <store>/<prep.name>/<table>-<hash of its folder>/<id>.<hash of the JPEG><prep.suffix>
    <store>/<prep.name>/<table>-<hash of its folder>/prepared.csv
"""
import hashlib
import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.distributed import all_gather, cores, run_on_all_ranks, shard, world_size
from aptos_fastai.common.io import changed_message, remove_stale_temp_files, write_bytes, write_csv
from aptos_fastai.data.decode import ImageError
from aptos_fastai.data.retina import MEASURE_SIDE, Prep, prepare, prepare_sizes, square_of

BATCH = 32                                   # images per core between two updates of the progress bar
SAVE_EVERY = 1000                            # images between two writes of prepared.csv
MEASURED = 'measured_at'                     # column of prepared.csv: the `MEASURE_SIDE` of what was found
NOT_PREPARED = dict(width=0, height=0, x=0, y=0, r=0, stretch=1., how='', flags='', red_green=0.,
                    green_blue=0., perceptual_hash='', pixel_sha256='', stored='')
UNREADABLE = {**NOT_PREPARED, MEASURED: 0}
REQUIRED = {*NOT_PREPARED, 'error', 'bytes', 'mtime'}            # columns of prepared.csv
FOUND = ('pixel_sha256', 'perceptual_hash', 'how', 'flags', 'red_green', 'green_blue')      # that a run's tables get

RESIZED = .03                                # warn of a table with a larger fraction of squashed images
# end of the name of a stored image: its hash and how it was prepared
STORED_NAME = re.compile(r'\.[0-9a-f]{16}\.(retina|none)-(pad|squash)[a-z-]*-\d+-q\d+\.jpg$')
ALL_SQUARES = 20                             # images of one square size look resized, ...
NO_CIRCLE = .2                               # ... if no circle was found in a larger fraction of them
NO_COLOUR = .1                               # log ratios of channels below it: photographs of IDRiD have .21 and more
COLOURLESS = .2                              # warn of a table with a larger fraction of such images


def jpeg_hash(data: bytes) -> str:
    "Return the hash that the name of a stored JPEG contains, so that a reader can verify the file."
    return hashlib.sha256(data).hexdigest()[:16]


def stored_path(folder: Path, id_code: str, sha: str, prep: Prep) -> Path:
    "Return the path of a prepared image; `sha` is its hash, the column `stored` of prepared.csv."
    safe_id = id_code.replace('/', '_').replace(os.sep, '_')
    return folder / f'{safe_id}.{sha}{prep.suffix}'


def read_square(path: str | Path, prep: Prep, size: int) -> np.ndarray:
    """Read an image as uint8 `size` x `size` x 3 RGB.

    `path` is a stored image, or an original, which is prepared first and gives the same pixels. Raises `ImageError`,
    also for a stored image that was prepared otherwise.
    """
    path = Path(path)
    try: data = path.read_bytes()
    except OSError as e:
        raise ImageError(f'{path}: cannot be read ({e.strerror}). Check the path and its permissions.') from None
    if path.name.endswith(prep.suffix):
        expected = path.name.removesuffix(prep.suffix).rpartition('.')[2]
        if jpeg_hash(data) != expected:
            raise ImageError(changed_message(path, 'Delete it and run again.'))
    elif STORED_NAME.search(path.name):
        raise ImageError(f'{path}: is prepared, but not as {prep.name}. Use the column '
                         f'{stored_column(prep.size)} of the run\'s tables.')
    else:
        try: data, _ = prepare(data, prep)
        except ImageError as e: raise ImageError(f'{path}: {e}') from None
    return square_of(data, prep, size)


def stored_column(size: int) -> str:
    "Return the column of a run's tables with the paths of the squares of side `size`; `stored` has the largest ones."
    return f'stored_{size}'


def column_of(names: Collection[str], size: int) -> str:
    "Return the column, of those called `names`, with the paths of the squares that a stage of `size` reads"
    return stored_column(size) if stored_column(size) in names else 'stored'


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


def colour_warning(records: pd.DataFrame) -> str:
    """Return a warning if many images of a table have hardly any colour; empty if they have.

    So are copies that were filtered (image minus its blur, plus grey: Graham 2015) and images in shades of grey.
    `records` has the columns how, flags, red_green and green_blue of prepared.csv; dark images do not count.
    """
    df = records[(records.how != '') & ~records['flags'].str.contains('dark')]
    grey = int((df[['red_green', 'green_blue']].abs().max(axis=1) < NO_COLOUR).sum())
    if grey <= COLOURLESS * len(df): return ''
    return (f'{grey} of {len(df)} images have hardly any colour: they look filtered, or are grey. Use the photographs '
            'if you can: a model of filtered images grades only images that were filtered in the same way.')


def image_warnings(records: pd.DataFrame) -> list[str]:
    "Return what to warn of in the images of a table, by its rows of prepared.csv: that they look resized, or filtered"
    return [warning for warning in (resized_warning(records), colour_warning(records)) if warning]


Known = dict[str, dict]                      # id -> its row of a prepared.csv


def _prepare_one(row, folders: dict[Prep, Path], known: dict[Prep, Known]) -> list[dict]:
    "Return the records of an image, one for each size; prepare it at those without an up-to-date record in `known`."
    path, old = Path(row.path), {prep: known[prep].get(row.id_code) for prep in folders}
    try:
        stat = path.stat()
        state = dict(bytes=stat.st_size, mtime=stat.st_mtime_ns)
        missing = [p for p, record in old.items() if not record or not _is_up_to_date(record, state, folders[p], p)]
        if not missing: return [record for record in old.values() if record]
        jpegs, found = prepare_sizes(path.read_bytes(), missing[0], [prep.size for prep in missing])
        for prep in missing: _write_square(folders[prep], row.id_code, jpegs[prep.size], prep, old[prep])
    except ImageError as e: return [dict(id_code=row.id_code, **state, **UNREADABLE, error=str(e))] * len(folders)
    except OSError as e:
        error = f'cannot be read ({e.strerror})'
        return [dict(id_code=row.id_code, bytes=0, mtime=0, **UNREADABLE, error=error)] * len(folders)
    measured = dict(id_code=row.id_code, **state, **found, error='', **{MEASURED: MEASURE_SIDE})
    for prep in missing: old[prep] = dict(measured, stored=jpeg_hash(jpegs[prep.size]))
    return [record for record in old.values() if record]


def _write_square(folder: Path, id_code: str, jpeg: bytes, prep: Prep, old: dict | None) -> None:
    "Write the square of an image, and remove the one of its `old` record if that was another."
    out = stored_path(folder, id_code, jpeg_hash(jpeg), prep)
    write_bytes(out, jpeg)
    if old and old['stored']: _remove_replaced(stored_path(folder, id_code, old['stored'], prep), out)


def _is_up_to_date(record: dict, state: dict, folder: Path, prep: Prep) -> bool:
    "Return whether a record's image is stored and its original has the same size and modification time as before."
    if record['error'] or record.get(MEASURED) != MEASURE_SIDE: return False
    if not stored_path(folder, record['id_code'], record['stored'], prep).exists(): return False
    return all(record[k] == v for k, v in state.items())


def _remove_replaced(old: Path, new: Path):
    if old != new: old.unlink(missing_ok=True)


def _prepare_chunk(_bars: Bars, frame: pd.DataFrame, folders: dict[Prep, Path],
                   known: dict[Prep, Known]) -> list[list[dict]]:
    "Return the records of the rows of `frame`, prepared by all cores of all processes."
    cv2.setNumThreads(1)                     # the thread pool already uses every core
    rows = frame.iloc[shard(len(frame))].itertuples()
    with ThreadPoolExecutor(cores()) as pool:
        try: return all_gather(list(pool.map(partial(_prepare_one, folders=folders, known=known), rows)))
        finally: pool.shutdown(cancel_futures=True)


def prepare_table(frame: pd.DataFrame, store: Path, prep: Prep, bars: Bars, *, sizes: Sequence[int] = (),
                  skip_unreadable: bool = False) -> pd.DataFrame:
    """Prepare the images of `frame` that are not in the store yet, at each of `sizes`: the largest first, `prep.size`.

    Returns `frame` with the columns `stored` (path of the largest square), `stored_SIZE` of each size, and those of
    `FOUND`. Raises `ImageError` with a list of unreadable images; with `skip_unreadable` prints the list and drops
    their rows.
    """
    folders = size_folders(frame, store, prep, sizes)
    for folder in folders.values(): remove_stale_temp_files(folder)      # only old ones: other runs may be writing here
    records = _prepare_rows(frame, folders, bars)
    _check_unreadable(records[prep], frame.source.iloc[0], folders[prep], skip_unreadable)
    for warning in image_warnings(records[prep]): say(f'{frame.source.iloc[0]}: {warning}', 'yellow')
    return _with_stored(frame, folders, records)


def size_folders(frame: pd.DataFrame, store: Path, prep: Prep, sizes: Sequence[int] = ()) -> dict[Prep, Path]:
    "Return the preparation for each of `sizes` (default `prep.size`), and the folder of the squares of `frame`."
    preps = [replace(prep, size=size) for size in sizes or [prep.size]]
    return {o: store_folder(frame, store, o) for o in preps}


def _prepare_rows(frame: pd.DataFrame, folders: dict[Prep, Path], bars: Bars) -> dict[Prep, pd.DataFrame]:
    "Return the records of every image of `frame` at each size; prepare the missing ones and write each prepared.csv."
    old = {prep: read_prepared(folder) for prep, folder in folders.items()}
    old_rows: dict[Prep, list[dict]] = {prep: [] if df is None else df.to_dict('records') for prep, df in old.items()}
    known = {prep: {o['id_code']: o for o in rows} for prep, rows in old_rows.items()}
    done: list[list[dict]] = []

    def save():
        "Write the finished rows and, for the rest, those of an earlier run: an interrupted run resumes from here."
        for i, (prep, folder) in enumerate(folders.items()):
            rows = [records[i] for records in done]
            rows += [known[prep][o] for o in frame.id_code[len(done):] if o in known[prep]]
            if rows and rows != old_rows[prep]: write_csv(folder / 'prepared.csv', pd.DataFrame(rows))

    chunk_size = BATCH * cores() * world_size()
    with bars(f'preparing {frame.source.iloc[0]}', len(frame), 'images') as bar:
        try:
            for start in range(0, len(frame), chunk_size):
                chunk = frame.iloc[start:start + chunk_size]
                here = {prep: {i: rows[i] for i in chunk.id_code if i in rows} for prep, rows in known.items()}
                done += run_on_all_ranks(_prepare_chunk, bars, chunk, folders, here)
                bar.to(len(done))
                if len(done) // SAVE_EVERY > start // SAVE_EVERY: save()
        finally: save()
    return {prep: pd.DataFrame([records[i] for records in done]) for i, prep in enumerate(folders)}


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


def prepared_already(frame: pd.DataFrame, store: Path, prep: Prep, *, sizes: Sequence[int] = (),
                     skip_unreadable: bool = False) -> pd.DataFrame:
    """Return what `prepare_table` returns from prepared.csv alone, without reading an image.

    The columns `stored_SIZE` of sizes that are not prepared are missing, and `stored` is the largest that is. Returns
    `frame` unchanged if no size is: its prepared.csv is missing, lacks some of the images, or has unreadable ones that
    are not skipped.
    """
    folders, records = size_folders(frame, store, prep, sizes), {}
    for size_prep, folder in folders.items():
        record = read_prepared(folder)
        if record is None or not frame.id_code.isin(record.id_code).all(): continue
        record = record.drop_duplicates('id_code').set_index('id_code').loc[frame.id_code].reset_index()
        if skip_unreadable or not (record.error != '').any(): records[size_prep] = record
    return _with_stored(frame, folders, records) if records else frame


def missing_images(frame: pd.DataFrame, store: Path, prep: Prep, sizes: Sequence[int] = ()) -> dict[int, set[str]]:
    """Return the ids of the images of `frame` that are not prepared yet at each of `sizes`, by prepared.csv.

    Those that an earlier version prepared count as not prepared, too: `prepare_table` prepares them again.
    """
    missing = {}
    for size_prep, folder in size_folders(frame, store, prep, sizes).items():
        record, ids = read_prepared(folder), set(frame.id_code)
        if record is not None and MEASURED in record:
            ids -= set(record.id_code[(record.error == '') & (record[MEASURED] == MEASURE_SIDE)])
        missing[size_prep.size] = ids
    return missing


def _with_stored(frame: pd.DataFrame, folders: dict[Prep, Path], records: dict[Prep, pd.DataFrame]) -> pd.DataFrame:
    "Add the columns `stored_SIZE`, `stored` and those of `FOUND`; drop the rows of unreadable images."
    paths = {stored_column(prep.size): [str(stored_path(folders[prep], i, sha, prep))
                                        for i, sha in zip(frame.id_code, record.stored, strict=True)]
             for prep, record in records.items()}
    record = next(iter(records.values()))
    found = {name: record[name].to_numpy() for name in FOUND}
    df = frame.assign(stored=next(iter(paths.values())), **paths, **found)
    readable = (record.error == '').to_numpy()
    return df[readable].reset_index(drop=True)
