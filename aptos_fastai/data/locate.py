"Find the image file that a table names, wherever it lies below a folder."
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from aptos_fastai.common.console import say
from aptos_fastai.data.decode import HEADER_BYTES, image_format

SUFFIXES = {'.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.dcm', '.heic'}     # of images
SYSTEM_FILES = {'thumbs.db', 'desktop.ini'}            # ignored, as is whatever begins with a dot
SYSTEM_FOLDERS = {'__MACOSX'}


def files_below(folder: Path) -> list[Path]:
    "Return the files of a folder and its sub-folders, sorted, without those of operating systems"
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SYSTEM_FOLDERS and not f.startswith('.'))
        for linked in (f for f in folders if Path(parent, f).is_symlink()):
            say(f'{Path(parent, linked)}: a link to a folder, which is not searched. Name the folder itself.', 'yellow')
        for name in sorted(names):
            if name.startswith('.') or name.lower() in SYSTEM_FILES: continue
            files.append(Path(parent, name))
    return sorted(files)


def inside(file: Path, folder: Path) -> bool:
    "Return whether a file, its links followed, lies in a folder"
    return not file.is_symlink() or file.resolve().is_relative_to(folder.resolve())


def is_image(file: Path) -> bool:
    "Return whether a file begins as an image of a known format does"
    try:
        with open(file, 'rb') as f: return bool(image_format(f.read(HEADER_BYTES)))
    except OSError: return False


class ImageLocator:
    """Find the file under `root` that a table names; a name that fits no file, or several, raises `LookupError`.

    A name with a folder or a suffix matches exactly, a bare name the one file with that name without suffix. With
    `loose`, a name that matches nothing so matches the one file that differs in suffix, case, or composition of
    accents, or that lies in a sub-folder; `loosely` counts these.
    """
    def __init__(self, root: Path, loose: bool = False):
        self.root, self.loose, self.loosely = root, loose, 0
        self.used: set[Path] = set()

    @cached_property
    def files(self) -> list[Path]:
        "The files below `root`"
        return files_below(self.root)

    def _index(self, keys: Callable[[PurePosixPath], Iterable[str]]) -> dict[str, list[Path]]:
        "Return the files of each key that `keys` gives for their path from `root`"
        index = defaultdict(list)
        for file in self.files:
            for key in keys(PurePosixPath(file.relative_to(self.root).as_posix())): index[key].append(file)
        return index

    @cached_property
    def by_name(self) -> dict[str, list[Path]]:
        "'left.png' -> files in any folder"
        return self._index(lambda o: [o.name])

    @cached_property
    def by_stem(self) -> dict[str, list[Path]]:
        "'left' -> files in any folder"
        return self._index(lambda o: [o.stem])

    @cached_property
    def by_path(self) -> dict[str, list[Path]]:
        "'a/left' -> files in that folder"
        return self._index(lambda o: [o.with_suffix('').as_posix()])

    @cached_property
    def by_folded(self) -> dict[str, list[Path]]:
        "Every end of a path, with its suffix or without, folded -> files"
        return self._index(_folded_ends)

    def __call__(self, name: str) -> Path:
        "Return the file that `name` names"
        file = self._find(name)
        self.used.add(file)
        return file

    def _find(self, name: str) -> Path:
        text = name.strip().replace('\\', '/')
        if not text: raise LookupError('the row names no image')
        if Path(text).is_absolute() or PureWindowsPath(text).is_absolute(): return self._absolute(name.strip())
        exact = self.root / text
        if os.path.isfile(exact):            # Path.is_file raises for a name that is too long
            if exact.resolve().is_relative_to(self.root.resolve()): return exact
            raise LookupError(f'lies outside {self.root}; give the folder with --root')
        if '/' in text: candidates = self.by_path.get(PurePosixPath(text).as_posix(), [])
        else: candidates = self.by_name.get(text) or self.by_stem.get(text, [])
        if candidates: return self._only(candidates)
        if self.loose: candidates = self._loose_candidates(text)
        if not candidates: raise LookupError(f'no such image in {self.root}')
        file = self._only(candidates)
        self.loosely += 1
        return file

    def _loose_candidates(self, text: str) -> list[Path]:
        "Return the files whose folded path ends as the folded name does, with its suffix or without"
        path = PurePosixPath(text)
        return self.by_folded.get(_fold(path.as_posix())) or self.by_folded.get(_fold(_without_suffix(path)), [])

    def _only(self, candidates: list[Path]) -> Path:
        "Return the only image among files"
        images = [file for file in candidates if is_image(file)] or candidates
        if len(images) > 1:
            found = ', '.join(file.relative_to(self.root).as_posix() for file in images[:5])
            raise LookupError(f'{len(images)} images have this name: {found}; give one with its folder and suffix')
        if not inside(images[0], self.root): raise LookupError(f'links to a file outside {self.root}')
        return images[0]

    def unused(self) -> Counter[str]:
        "Return how many images below `root` no name named, by their folder"
        return Counter(str(file.parent) for file in self.files if file not in self.used and is_image(file))

    @staticmethod
    def _absolute(name: str) -> Path:
        if os.path.isfile(name): return Path(name)
        raise LookupError('no such file')


def _fold(text: str) -> str:
    "Return the text without differences of case and of the composition of accents"
    return unicodedata.normalize('NFC', text).casefold()


def _without_suffix(path: PurePosixPath) -> str:
    "Return a path without its suffix, if that is one of an image: an id such as IMG.001 keeps its number"
    return path.with_suffix('').as_posix() if path.suffix.lower() in SUFFIXES else path.as_posix()


def _folded_ends(path: PurePosixPath) -> Iterable[str]:
    "Yield 'left', 'left.jpg', 'a/left', 'a/left.jpg' … of a file, folded"
    for n in range(1, len(path.parts) + 1):
        end = PurePosixPath(*path.parts[-n:])
        yield from {_fold(end.as_posix()), _fold(end.with_suffix('').as_posix())}

