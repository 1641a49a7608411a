"Grade image files: find them, resume, write a CSV."
import csv
import glob
import io
import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import Bars, say
from aptos_fastai.common.io import AptosError, write_bytes
from aptos_fastai.inference.grader import COLUMNS, load_grader
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL

SUFFIXES = {'.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.dcm'}
FILE_COLUMNS = 'file', 'path', 'image', 'id_code'      # of a CSV that lists images; the first that it has counts


def find_images(paths: Iterable[str]) -> list[str]:
    """Return the image files that `paths` names, each once: files, folders with their sub-folders, globs and CSVs.

    A CSV lists them in its column file, path, image or id_code; they lie beside it or in a folder below.
    Raises `AptosError` for a path without images.
    """
    found: list[str] = []
    for path in paths:
        files = _images_at(path)
        if not files: raise AptosError(f'{path}: no images found. Give files, folders, a glob in quotes or a CSV.')
        found += files
    return list(dict.fromkeys(found))


def _images_at(path: str) -> list[str]:
    "Return the image files of one file, folder, glob or CSV"
    p = Path(path)
    if p.is_dir(): return list(map(str, _images_below(p)))
    if p.suffix.lower() == '.csv': return _images_in_csv(p)
    if p.is_file(): return [path]
    return sorted(glob.glob(path, recursive=True))


def _images_below(folder: Path) -> list[Path]:
    "Return the image files of a folder and its sub-folders, sorted"
    return [f for f in sorted(folder.rglob('*')) if f.suffix.lower() in SUFFIXES]


def _images_in_csv(table: Path) -> list[str]:
    "Return the image files that a CSV lists"
    try: df = pd.read_csv(table, dtype=str, keep_default_na=False)
    except FileNotFoundError: raise AptosError(f'{table}: no such file') from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as e:
        raise AptosError(f'{table}: not a readable CSV ({e})') from None
    column = next((c for c in FILE_COLUMNS if c in df), None)
    if not column:
        raise AptosError(f'{table}: no column file, path, image or id_code. Its columns are {", ".join(df.columns)}; '
                         'rename the one that names the images.')
    by_stem = {f.stem: str(f) for f in _images_below(table.parent)}
    folder = table.parent.resolve()

    def locate(name: str) -> str | None:
        file = table.parent / name
        if file.is_file(): return str(file) if file.resolve().is_relative_to(folder) else None
        return by_stem.get(file.name) or by_stem.get(file.stem)
    files = {name: locate(name) for name in df[column]}
    missing = [name for name in df[column] if files[name] is None]
    if missing:
        raise AptosError(f'{table}: {len(missing)} of {len(df)} images not found beside it or in a folder below: '
                         f'{", ".join(missing[:5])}. Add them or remove their rows.')
    return [file for name in df[column] if (file := files[name])]


def grade_files(model: str, paths: Iterable[str], output: str, backend: str, precision: str) -> None:
    """`predict MODEL IMAGES`: write a CSV with a row (`COLUMNS`) for each image.

    Rows are added to a hidden file beside `output` as they are made; `output` appears when all are there, so that an
    interrupted call can resume. Raises `AptosError` at the end if images could not be read; their rows say why.
    """
    files, grader, out = find_images(paths), load_grader(model, backend, precision), Path(output)
    if not out.parent.is_dir(): raise AptosError(f'{out.parent}: no such folder. Make it, or choose another with -o.')
    part = out.with_name(f'.{out.name}.{grader.model.key}-{backend}-{precision}.part')
    done = _resume(part, files)
    if done: say(f'{done} of {len(files)} images are graded already; resuming')
    with Bars() as bars, bars(f'grading with {grader.model.name}', len(files), 'images') as bar, \
            open(part, 'a', encoding='utf-8') as f:
        if not done: f.write(','.join(COLUMNS) + '\n')
        for df in grader.stream(files[done:]):
            f.write(df.to_csv(index=False, header=False, lineterminator='\n', float_format='%.4f'))
            f.flush()
            done += len(df)
            bar.to(done)
    os.replace(part, out)
    _report(out, grader.model.name, grader.model.synthetic)


def _report(csv_file: Path, model: str, synthetic: bool) -> None:
    "Say how many images were graded. Raises `AptosError` if some were not"
    df = pd.read_csv(csv_file, usecols=['file', 'error'], dtype=str, keep_default_na=False)
    bad = df[df.error != '']
    say(f'{len(df) - len(bad)} images graded by {model} -> {csv_file}')
    if synthetic: say(SYNTHETIC_MODEL, 'yellow')
    if not len(bad): return
    first = '; '.join(f'{file} {error}' for file, error in bad.head(3).itertuples(index=False))
    raise AptosError(f'{len(bad)} of {len(df)} images could not be graded: {first}. '
                     f'See the column error of {csv_file} for all of them.')


def _resume(part: Path, files: list[str]) -> int:
    """Return how many of the first `files` have a complete row in `part`, and remove what follows those rows.

    A file with other columns, other images or a damaged row counts as empty.
    """
    if not part.is_file(): return 0
    text = part.read_text(encoding='utf-8')
    complete = text[:text.rfind('\n') + 1]             # the last line may be half written
    try: header, *rows = csv.reader(io.StringIO(complete))
    except (csv.Error, ValueError): header, rows = [], []
    names = [row[0] for row in rows if len(row) == len(COLUMNS)]
    valid = header == COLUMNS and len(names) == len(rows) and names == files[:len(names)]
    write_bytes(part, complete.encode() if valid and names else b'')
    return len(names) if valid else 0
