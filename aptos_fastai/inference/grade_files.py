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

SUFFIXES = {'.jpg', '.jpeg', '.png', '.tif', '.tiff', '.bmp', '.webp', '.dcm'}


def find_images(given: Iterable[str]) -> list[str]:
    """The images that files, folders (with their sub-folders), globs and CSVs name. A CSV names them in its column file, path, image or id_code,
    beside itself or in one folder below. Raises `AptosError` where something names none."""
    out = []
    for o in given:
        p = Path(o)
        found = ([str(f) for f in sorted(p.rglob('*')) if f.suffix.lower() in SUFFIXES] if p.is_dir() else _of_csv(p) if p.suffix.lower() == '.csv'
                 else [o] if p.is_file() else sorted(glob.glob(o, recursive=True)))
        if not found: raise AptosError(f'{o}: names no image; give files, folders, a glob in quotes or a CSV')
        out += found
    return list(dict.fromkeys(out))


def _of_csv(table: Path) -> list[str]:
    try: df = pd.read_csv(table, dtype=str, keep_default_na=False)
    except FileNotFoundError: raise AptosError(f'{table}: no such file') from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as e: raise AptosError(f'{table}: is no readable CSV ({e})') from None
    col = next((c for c in ('file', 'path', 'image', 'id_code') if c in df), None)
    if not col: raise AptosError(f'{table}: has no column file, path, image or id_code; it has {", ".join(df.columns)}')
    by_stem = {f.stem: str(f) for f in sorted(table.parent.glob('**/*')) if f.suffix.lower() in SUFFIXES}
    inside = table.parent.resolve()

    def place(o: str) -> str | None:
        p = table.parent / o
        if p.is_file(): return str(p) if p.resolve().is_relative_to(inside) else None
        return by_stem.get(p.name) or by_stem.get(p.stem)
    at = [place(o) for o in df[col]]
    lost = [o for o, a in zip(df[col], at, strict=True) if a is None]
    if lost: raise AptosError(f'{table}: {len(lost)} of {len(df)} have no image beside it or in a folder below: {", ".join(lost[:5])}')
    return at


def grade_files(model: str, given: Iterable[str], output: str, backend: str, precision: str):
    """`predict MODEL IMAGES`: rows are written as they come beside `output`, which appears when all are there; an interrupted run goes on.

    Raises `AptosError` at the end where images could not be read; their rows say why.
    """
    files, grader, out = find_images(given), load_grader(model, backend, precision), Path(output)
    if not out.parent.is_dir(): raise AptosError(f'{out.parent}: no such folder; make it or choose another with -o')
    part = out.with_name(f'.{out.name}.{grader.model.key}-{backend}-{precision}.part')
    done = _begun(part, files)
    if done: say(f'{done} of {len(files)} images were graded before; going on')
    with Bars() as bars, bars(f'grading by {grader.model.name}', len(files), 'images') as bar, open(part, 'a', encoding='utf-8') as f:
        if not done: f.write(','.join(COLUMNS) + '\n')
        for df in grader.stream(files[done:]):
            f.write(df.to_csv(index=False, header=False, lineterminator='\n', float_format='%.4f')); f.flush()
            done += len(df)
            bar.to(done)
    os.replace(part, out)
    df = pd.read_csv(out, usecols=['file', 'error'], dtype=str, keep_default_na=False)
    bad = df[df.error != '']
    say(f'{len(df) - len(bad)} images graded by {grader.model.name} -> {out}')
    if grader.model.synthetic: say('This model was trained on SYNTHETIC images: its grades say nothing about eyes', 'yellow')
    if len(bad):
        first = '; '.join(f'{f} {e}' for f, e in bad.head(3).itertuples(index=False))
        raise AptosError(f'{len(bad)} of {len(df)} images could not be graded: {first}; all rows with an error in {out} say why')


def _begun(part: Path, files: list[str]) -> int:
    "How many of the first files stand in `part` whole; what else is in it is cut off"
    if not part.is_file(): return 0
    text = part.read_text(encoding='utf-8')
    try: rows = list(csv.reader(io.StringIO(text[:text.rfind('\n') + 1])))
    except csv.Error: rows = []
    done = [r[0] for r in rows[1:] if len(r) == len(COLUMNS)]
    if rows[:1] != [COLUMNS] or done != files[:len(done)] or len(done) != len(rows) - 1: done = []
    write_bytes(part, text[:text.rfind('\n') + 1].encode() if done else b'')
    return len(done)
