"Find the image files that a user names: files, folders, globs and CSVs."
import glob
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import pandas as pd

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError
from aptos_fastai.data.decode import HEADER_BYTES, image_format

FILE_COLUMNS = 'file', 'path', 'image', 'id_code'      # of a CSV that lists images; the first that it has counts
SUFFIXES = {'.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.dcm', '.heic'}     # of images
SYSTEM_FILES = {'thumbs.db', 'desktop.ini'}            # ignored, as is whatever begins with a dot
SYSTEM_FOLDERS = {'__MACOSX'}


@dataclass(frozen=True)
class ImageEntry:
    "One image that a user names: its file, or why there is none"
    path: Path | None
    error: str = ''
    id: str = ''                             # the value in the CSV that names it
    id_column: str = ''                      # the CSV's column; empty for a file, folder or glob

    def __str__(self) -> str:
        return str(self.path) if self.path else self.id


def find_images(paths: Iterable[str], root: str | Path | None = None) -> list[ImageEntry]:
    """Return the images that `paths` names: files, folders with their sub-folders, globs and CSVs.

    Files, folders and globs give each file once; a folder is searched by content, and a file with the suffix of an
    image counts, too. A CSV gives an entry for each row, in order; relative names begin at `root` or else at the CSV's
    folder. A name with a folder or a suffix matches exactly; a bare name matches the one file with that name without
    suffix. A row without its image is an entry with an `error`. Raises `AptosError` for a path that names no image.
    """
    entries: list[ImageEntry] = []
    seen: set[Path] = set()
    for path in paths:
        found = list(_entries_of(path, root))
        if not any(entry.path for entry in found):
            raise AptosError(_nothing_found(path, found))
        for entry in found:
            if not entry.id_column and entry.path in seen: continue
            if entry.path: seen.add(entry.path)
            entries.append(entry)
    columns = list(dict.fromkeys(entry.id_column for entry in entries if entry.id_column))
    if len(columns) > 1:
        raise AptosError(f'{", ".join(paths)}: the CSVs name their images in different columns ({", ".join(columns)}). '
                         'Give one CSV at a time.')
    return entries


def _nothing_found(path: str, entries: list[ImageEntry]) -> str:
    "Return the message for a path that names no image"
    if entries: return f'{path}: none of its {len(entries)} rows has an image: {entries[0].id}: {entries[0].error}'
    return f'{path}: no images found. Give files, folders, a glob in quotes or a CSV.'


def _entries_of(path: str, root: str | Path | None) -> Iterator[ImageEntry]:
    "Yield the entries of one file, folder, glob or CSV"
    p = Path(path)
    if p.is_dir(): yield from map(ImageEntry, _images_below(p))
    elif p.suffix.lower() == '.csv': yield from _entries_of_csv(p, Path(root) if root else p.parent)
    elif p.is_file(): yield ImageEntry(p)
    else: yield from (ImageEntry(Path(f)) for f in sorted(glob.glob(path, recursive=True)) if os.path.isfile(f))


def _images_below(folder: Path) -> list[Path]:
    "Return the image files of a folder and its sub-folders, sorted; say how many other files there are"
    images, others = [], Counter[str]()
    for file in _files_below(folder):
        if not _inside(file, folder):
            raise AptosError(f'{file}: links to a file outside {folder}. Copy the file into the folder.')
        if is_image(file) or file.suffix.lower() in SUFFIXES: images.append(file)
        else: others[file.suffix.lower() or 'no suffix'] += 1
    if others:
        kinds = ', '.join(f'{n} {suffix}' for suffix, n in others.most_common())
        say(f'{folder}: ignored {others.total()} files that are not images ({kinds})', 'yellow')
    return images


def _files_below(folder: Path) -> list[Path]:
    "Return the files of a folder and its sub-folders, sorted, without those of operating systems"
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SYSTEM_FOLDERS and not f.startswith('.'))
        for name in sorted(names):
            if name.startswith('.') or name.lower() in SYSTEM_FILES: continue
            files.append(Path(parent, name))
    return sorted(files)


def _inside(file: Path, folder: Path) -> bool:
    "Return whether a file, its links followed, lies in a folder"
    return not file.is_symlink() or file.resolve().is_relative_to(folder.resolve())


def is_image(file: Path) -> bool:
    "Return whether a file begins as an image of a known format does"
    try:
        with open(file, 'rb') as f: return bool(image_format(f.read(HEADER_BYTES)))
    except OSError: return False


def _entries_of_csv(table: Path, root: Path) -> Iterator[ImageEntry]:
    "Yield an entry for each row of a CSV"
    try: df = pd.read_csv(table, dtype=str, keep_default_na=False, encoding='utf-8-sig')
    except FileNotFoundError: raise AptosError(f'{table}: no such file') from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as e:
        raise AptosError(f'{table}: not a readable CSV ({e})') from None
    column = next((c for c in FILE_COLUMNS if c in df), None)
    if not column:
        raise AptosError(f'{table}: no column file, path, image or id_code. Its columns are {", ".join(df.columns)}; '
                         'rename the one that names the images.')
    if not root.is_dir(): raise AptosError(f'--root {root}: no such folder')
    locate = ImageLocator(root)
    for name in df[column]:
        try: yield ImageEntry(locate(name), id=name, id_column=column)
        except LookupError as e: yield ImageEntry(None, str(e), name, column)


class ImageLocator:
    "Find the file under `root` that a CSV names; a name that fits no file, or several, raises `LookupError`"
    def __init__(self, root: Path):
        self.root = root
        self.by_name: dict[str, list[Path]] = defaultdict(list)      # 'left.png' -> files in any folder
        self.by_stem: dict[str, list[Path]] = defaultdict(list)      # 'left' -> files in any folder
        self.by_path: dict[str, list[Path]] = defaultdict(list)      # 'a/left' -> files in that folder
        for file in _files_below(root):
            relative = PurePosixPath(file.relative_to(root).as_posix())
            self.by_name[relative.name].append(file)
            self.by_stem[relative.stem].append(file)
            self.by_path[relative.with_suffix('').as_posix()].append(file)

    def __call__(self, name: str) -> Path:
        "Return the file that `name` names"
        text = name.strip().replace('\\', '/')
        if not text: raise LookupError('the row names no image')
        if Path(text).is_absolute() or PureWindowsPath(text).is_absolute(): return self._absolute(name.strip())
        exact = self.root / text
        if exact.is_file():
            if exact.resolve().is_relative_to(self.root.resolve()): return exact
            raise LookupError(f'lies outside {self.root}; give the folder with --root')
        if '/' in text: candidates = self.by_path.get(PurePosixPath(text).as_posix(), [])
        else: candidates = self.by_name.get(text) or self.by_stem.get(text, [])
        images = [file for file in candidates if is_image(file)] or candidates
        if not images: raise LookupError(f'no such image in {self.root}')
        if not _inside(images[0], self.root): raise LookupError(f'links to a file outside {self.root}')
        if len(images) > 1:
            found = ', '.join(file.relative_to(self.root).as_posix() for file in images[:5])
            raise LookupError(f'{len(images)} images have this name: {found}; give one with its folder and suffix')
        return images[0]

    @staticmethod
    def _absolute(name: str) -> Path:
        if os.path.isfile(name): return Path(name)
        raise LookupError('no such file')
