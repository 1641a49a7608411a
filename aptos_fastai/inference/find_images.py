"Find the image files that a user names: files, folders, globs and CSVs."
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import plural, say
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.locate import ImageLocator, files_below, has_image_suffix, inside, is_image
from aptos_fastai.data.spreadsheet import SPREADSHEETS, read_spreadsheet, require_column
from aptos_fastai.data.understand import ID_SHARE, id_rank, image_shares

ID = 'id_code'
FILE_COLUMNS = 'file', 'path', 'image', ID      # of a CSV that lists images; the first that it has counts
LISTS = '.csv', '.tsv', *SPREADSHEETS


@dataclass(frozen=True)
class ImageEntry:
    "One image that a user names: its file, or why there is none"
    path: Path | None
    error: str = ''
    name: str = ''                           # the value in the CSV that names its file
    id: str = ''                             # the CSV's id of the row: its id_code, or else `name`
    id_column: str = ''                      # the CSV's column of `id`; empty for a file, folder or glob
    cells: dict[str, str] = field(default_factory=dict, compare=False)       # the row of the CSV: column -> text

    def __str__(self) -> str:
        return str(self.path) if self.path else self.name


def find_images(paths: Iterable[str], root: str | Path | None = None, sheet: str = '') -> list[ImageEntry]:
    """Return the images that `paths` names: files, folders with their sub-folders, globs and CSVs.

    Files, folders and globs give each file once; a folder is searched by content, and a file with the suffix of an
    image counts, too. A CSV gives an entry for each row, in order; relative names begin at `root` or else at the CSV's
    folder. A name with a folder or a suffix matches exactly; a bare name matches the one file with that name without
    suffix. A row without its image is an entry with an `error`. `sheet` is that of a workbook. Raises `AptosError` for
    a path that names no image.
    """
    entries: list[ImageEntry] = []
    seen: set[Path] = set()
    for path in paths:
        found = list(_entries_of(path, root, sheet))
        if not found:
            problem = 'no images found' if Path(path).exists() or glob.has_magic(path) else 'no such file or folder'
            raise AptosError(f'{path}: {problem}. Give files, folders, a glob in quotes or a CSV.')
        for entry in found:
            if not entry.id_column and entry.path in seen: continue
            if entry.path: seen.add(entry.path)
            entries.append(entry)
    columns = list(dict.fromkeys(entry.id_column for entry in entries if entry.id_column))
    if len(columns) > 1:
        raise AptosError(f'{", ".join(paths)}: the CSVs name their images in different columns ({", ".join(columns)}). '
                         'Give one CSV at a time.')
    return entries


def _entries_of(path: str, root: str | Path | None, sheet: str) -> Iterator[ImageEntry]:
    "Yield the entries of one file, folder, glob or CSV"
    p = Path(path)
    if p.is_dir(): yield from map(ImageEntry, _images_below(p))
    elif p.suffix.lower() in LISTS: yield from _entries_of_csv(p, Path(root) if root else p.parent, sheet)
    elif p.is_file(): yield ImageEntry(p)
    else: yield from (ImageEntry(Path(f)) for f in sorted(glob.glob(path, recursive=True)) if os.path.isfile(f))


def _images_below(folder: Path) -> list[Path]:
    "Return the image files of a folder and its sub-folders, sorted; say how many other files there are"
    images, others = [], Counter[str]()
    for file in files_below(folder):
        if not inside(file, folder):
            raise AptosError(f'{file}: links to a file outside {folder}. Copy the file into the folder.')
        if is_image(file) or has_image_suffix(file.name): images.append(file)
        else: others[file.suffix.lower() or 'no suffix'] += 1
    if others:
        kinds = ', '.join(f'{n} {suffix}' for suffix, n in others.most_common())
        say(f'{folder}: ignored {plural(others.total(), "file")} of other kinds ({kinds})', 'yellow')
    return images


def _entries_of_csv(table: Path, root: Path, sheet: str) -> Iterator[ImageEntry]:
    "Yield an entry for each row of a CSV"
    if not table.is_file(): raise AptosError(f'{table}: no such file')
    df = read_spreadsheet(table, keep_blank=True, sheet=sheet)
    if not root.is_dir(): raise AptosError(f'--root {root}: no such folder')
    locate = ImageLocator(root)
    column = next((c for c in FILE_COLUMNS if c in df), '') or _column_of_images(table, df, locate)
    id_column = ID if ID in df else column
    for name in (column, id_column): require_column(table, df, name, '')
    for name, own_id, cells in zip(df[column], df[id_column], df.to_dict('records'), strict=True):
        try: yield ImageEntry(locate(name), '', name, own_id, id_column, cells)
        except LookupError as e: yield ImageEntry(None, str(e), name, own_id, id_column, cells)


def _column_of_images(table: Path, df: pd.DataFrame, locate: ImageLocator) -> str:
    "Return the column whose values name images, as `fit` finds it, and say so. Raises `AptosError` for none or several"
    def has_image(name: str) -> bool:
        with suppress(LookupError): return bool(locate(name))
        return False
    shares = image_shares(df, has_image) if len(df) else {}
    found = sorted((c for c, share in shares.items() if share >= ID_SHARE), key=id_rank)
    if not found:
        raise AptosError(f'{table}: no column file, path, image or id_code, and none that names images in '
                         f'{locate.root}. Its columns are {", ".join(df.columns)}. Rename the one that names the '
                         'images, or give their folder with --root.')
    if len(found) > 1 and id_rank(found[0]) == id_rank(found[1]):
        raise AptosError(f'{table}: the images can be in {len(found)} columns: {", ".join(found)}. Rename the '
                         'right one to file.')
    say(f'{table}: column {found[0]} names the images ({100 * shares[found[0]]:.0f} % of its values)')
    return found[0]
