"Find the image file that a table names, wherever it lies below a folder."
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from aptos_fastai.common.console import say
from aptos_fastai.data.decode import HEADER_BYTES, image_format

SUFFIXES = {'.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.dcm', '.heic'}     # of images
NO_IMAGE = 'no such image'                           # how the error of a name without a file begins
SYSTEM_FILES = {'thumbs.db', 'desktop.ini'}            # ignored, as is whatever begins with a dot
SYSTEM_FOLDERS = {'__MACOSX'}


def files_below(folder: Path) -> list[Path]:
    "Return the files of a folder and its sub-folders, sorted, without those of operating systems"
    return sorted(folder / name for name in relative_files(folder))


def relative_files(folder: Path, below: str = '') -> Iterator[str]:
    "Yield the same as 'sub-folder/name'. Links to folders are named on the terminal and not followed"
    with os.scandir(folder / below) as entries: found = sorted(entries, key=lambda o: o.name)
    for entry in found:
        if entry.name.startswith('.') or entry.name in SYSTEM_FOLDERS or entry.name.lower() in SYSTEM_FILES: continue
        if entry.is_file(): yield below + entry.name
        elif entry.is_dir() and not entry.is_symlink(): yield from relative_files(folder, f'{below}{entry.name}/')
        elif entry.is_dir():
            say(f'{entry.path}: a link to a folder, which is not searched. Name the folder itself.', 'yellow')


def inside(file: Path, folder: Path) -> bool:
    "Return whether a file, its links followed, lies in a folder"
    return not file.is_symlink() or file.resolve().is_relative_to(folder.resolve())


def is_image(file: Path) -> bool:
    "Return whether a file begins as an image of a known format does"
    try:
        with open(file, 'rb') as f: return bool(image_format(f.read(HEADER_BYTES)))
    except OSError: return False


def has_image_suffix(name: str) -> bool:
    "Return whether a file name ends as the name of an image does"
    return f'.{name.rpartition(".")[2].lower()}' in SUFFIXES


class ImageLocator:
    """Find the file under `root` that a table names; a name that fits no file, or several, raises `LookupError`.

    A name with a folder or the suffix of an image matches exactly, or else the one file whose suffix is `.JPG` for
    `.jpg`; a bare name matches the one file with that name without suffix, in any sub-folder. With `loose`, a name
    without such a match may match the one file that differs from it in suffix, case or composition of accents, or that
    lies in a sub-folder; `loosely` counts these. A relative name must lead into `within` (default: `root`), an absolute
    one, too, if `within` is given; otherwise it may lead anywhere.
    """
    def __init__(self, root: Path, loose: bool = False, within: Path | None = None):
        self.root, self.loose, self.loosely = root, loose, 0
        self.within, self.anywhere = (within or root).resolve(), within is None
        self.used: set[str] = set()

    @cached_property
    def files(self) -> list[str]:
        "The files below `root`, as 'sub-folder/name'"
        return list(relative_files(self.root))

    def _index(self, keys: Callable[[str], Iterable[str]]) -> dict[str, list[str]]:
        "Return the files of each key that `keys` gives for them"
        index = defaultdict(list)
        for file in self.files:
            for key in keys(unicodedata.normalize('NFC', file)): index[key].append(file)
        return index

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        "'left.png' -> files in any folder"
        return self._index(lambda o: [o.rpartition('/')[2]])

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        "'left' -> files in any folder"
        return self._index(lambda o: [without_suffix(o.rpartition('/')[2])])

    @cached_property
    def by_path(self) -> dict[str, list[str]]:
        "'a/left' -> files in that folder"
        return self._index(lambda o: [without_suffix(o)])

    @cached_property
    def by_suffix(self) -> dict[str, list[str]]:
        "A path with its suffix in lower case -> files"
        return self._index(lambda o: [_with_lower_suffix(o)])

    @cached_property
    def by_folded(self) -> dict[str, list[str]]:
        "Every end of a path, with its suffix or without, folded -> files"
        return self._index(_folded_ends)

    @cached_property
    def by_bare(self) -> dict[str, list[str]]:
        "Every end of a path without any suffix of an image, folded -> files: left.png.jpg is left"
        return self._index(_folded_bare_ends)

    def __call__(self, name: str) -> Path:
        "Return the file that `name` names"
        text = name.strip().replace('\\', '/')
        if not text: raise LookupError('the row names no image')
        if text.startswith('/') or text[1:3] == ':/': return self._absolute(name.strip(), text)
        path = posixpath.normpath(text)
        if os.path.isfile(f'{self.root}/{path}'): return self._contained(path)
        candidates = self._candidates(path) or ([] if self.loose else self.by_suffix.get(_with_lower_suffix(path), []))
        if candidates: return self._contained(self._only(candidates))
        if self.loose: candidates = self._loose_candidates(path)
        if not candidates: raise LookupError(self._missing(path))
        file = self._contained(self._only(candidates))
        self.loosely += 1
        return file

    def _candidates(self, path: str) -> list[str]:
        "Return the files that a name without a suffix names, and the one with another coding of accents"
        name = unicodedata.normalize('NFC', path)
        if '/' in name: return self.by_path.get(name, [])
        if self.loose:                       # an image in the folder itself comes before one in a sub-folder
            found = self.by_name.get(name) or self.by_stem.get(name, [])
            return [file for file in found if '/' not in file] or found
        if has_image_suffix(name):
            return [file for file in self.by_name.get(name, []) if '/' not in file]
        return self.by_name.get(name) or self.by_stem.get(name, [])

    def _missing(self, path: str) -> str:
        "Return why a name has no file; names files of that name in sub-folders"
        found = [] if '/' in path else self.by_name.get(unicodedata.normalize('NFC', path), [])
        like = [] if found or self.loose else self._loose_candidates(path)       # a loose search has tried them
        where = f'; {", ".join(found[:5])} has this name: give it with its folder' if found else ''
        return f'{NO_IMAGE} in {self.root}{where}{f"; like it is {like[0]}" if len(like) == 1 else ""}'

    def _loose_candidates(self, path: str) -> list[str]:
        "Return the files whose folded path ends as the folded name does, with its suffix or without"
        bare = without_image_suffix(path)
        names = [path, bare, *(name.removeprefix(f'{self.root.name}/') for name in (path, bare))]
        return next((index[name] for index in (self.by_folded, self.by_bare) for name in map(_fold, names)
                     if name in index), [])

    def _only(self, candidates: list[str]) -> str:
        "Return the only image among files"
        if len(candidates) == 1: return candidates[0]
        images = [file for file in candidates if is_image(self.root / file)] or candidates
        if len(images) == 1: return images[0]
        raise LookupError(f'{len(images)} images have this name: {", ".join(images[:5])}; give one with its folder and '
                          'suffix')

    def _contained(self, file: str) -> Path:
        "Return the path of a file below `root`. Raises `LookupError` if it, or what it links to, is not in `within`"
        path = self.root / file
        if ('/' in file or path.is_symlink()) and not path.resolve().is_relative_to(self.within):
            verb = 'links to a file' if path.is_symlink() else 'lies'
            raise LookupError(f'{verb} outside {self.within}; copy the file into this folder')
        self.used.add(file)
        return path

    def unused(self) -> list[str]:
        "Return the images below `root` that no name named"
        others = (file for file in self.files if file not in self.used)
        return [file for file in others if has_image_suffix(file) or is_image(self.root / file)]

    def _absolute(self, name: str, text: str) -> Path:
        "Return the file of an absolute name; with `loose`, one of another computer may match by the end of its path"
        if os.path.isfile(name) and (self.anywhere or Path(name).resolve().is_relative_to(self.within)):
            return Path(name)
        parts = text.split('/')[1:] if self.loose else []
        for n in range(len(parts), 0, -1):
            candidates = self._candidates('/'.join(parts[-n:])) or self._loose_candidates('/'.join(parts[-n:]))
            if not candidates: continue
            file = self._contained(self._only(candidates))
            self.loosely += 1
            return file
        raise LookupError('no such file' if self.anywhere else f'{NO_IMAGE} in {self.within}')


def without_image_suffix(path: str) -> str:
    "Return 'a/left' for 'a/left.png'; an id such as IMG.001 keeps its number"
    return without_suffix(path) if has_image_suffix(path) else path


def _with_lower_suffix(path: str) -> str:
    "Return 'a/Left.jpg' for 'a/Left.JPG'"
    stem = without_suffix(path)
    return unicodedata.normalize('NFC', stem + path[len(stem):].lower())


def _fold(text: str) -> str:
    "Return the text without differences of case and of the composition of accents"
    return unicodedata.normalize('NFC', text).casefold()


def without_suffix(path: str) -> str:
    "Return 'a/left.v2' for 'a/left.v2.png'; a name that only begins with a dot keeps it"
    stem, dot, suffix = path.rpartition('.')
    return stem if dot and '/' not in suffix and stem and not stem.endswith('/') else path


def _folded_ends(path: str) -> Iterable[str]:
    "Return 'left', 'left.jpg', 'a/left', 'a/left.jpg' … of a file, folded"
    parts = _fold(path).split('/')
    ends = ['/'.join(parts[-n:]) for n in range(1, len(parts) + 1)]
    return {*ends, *map(without_suffix, ends)}


def _folded_bare_ends(path: str) -> Iterable[str]:
    "Return 'left', 'a/left' … of a file left.png.jpg, folded"
    return {without_image_suffix(end) for end in _folded_ends(path)} if has_image_suffix(path) else ()
