"Grade image files: resume an interrupted call, write a CSV."
import csv
import glob
import io
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from aptos_fastai.common.console import Bars, plural, say
from aptos_fastai.common.disclaimer import DISCLAIMER
from aptos_fastai.common.io import AptosError, check_output_file, digest, file_lock, make_private, write_bytes
from aptos_fastai.data.spreadsheet import SPREADSHEETS, has_columns, safe_cell
from aptos_fastai.inference.audit import (
    audit_file,
    audit_record,
    check_audit_free,
    note_start,
    processed_text,
    write_audit,
)
from aptos_fastai.inference.find_images import ImageEntry, find_images
from aptos_fastai.inference.grader import COLUMNS, Grader, load_grader
from aptos_fastai.inference.model_spec import SYNTHETIC_MODEL
from aptos_fastai.inference.patients import (
    DEFAULTS,
    PATIENTS,
    Choices,
    check_patients_free,
    find_people,
    privacy_text,
    write_with_people,
)

STARTS = '.starts'                           # suffix of the hidden file of the times at which a call began or resumed


def grade_files(model: str, paths: Iterable[str], output: str, backend: str = 'torch', precision: str = 'f32', *,
                root: str | None = None, overwrite: bool = False, choices: Choices = DEFAULTS,
                prevalence: float | None = None, sheet: str = '') -> pd.DataFrame:
    """`predict MODEL IMAGES`: write a CSV with a row (`COLUMNS`) for each image, and return it.

    A CSV of images gives a row for each of its rows, in order, with its own id column first. Rows are added to a hidden
    file beside `output` as they are made; `output` appears when all are there, so that an interrupted call can resume.
    Raises `AptosError` if `output` exists, unless `overwrite`, or if another process is writing it; and at the end if
    images could not be read; their rows say why. `choices` are about patients: patients.csv is written beside `output`.
    grades.csv.json says what made the CSV: `verify` checks it.
    """
    choices.check()
    out = Path(output)
    check_output_file(out)
    if out.suffix.lower() in SPREADSHEETS:
        raise AptosError(f'{out}: predict writes CSV. Choose a name that ends in .csv.')
    _check_free(out, overwrite)
    paths = list(paths)
    entries, grader = find_images(paths, root, sheet), load_grader(model, backend, precision, prevalence)
    audit = audit_record(grader)
    id_column = next((e.id_column for e in entries if e.id_column), '')
    columns = COLUMNS if id_column in ('', *COLUMNS) else [id_column, *COLUMNS]
    inputs = [*map(Path, paths), *(e.path for e in entries if e.path)]
    if out.exists() and any(out.samefile(path) for path in inputs if path.exists()):
        raise AptosError(f'{out}: is one of the inputs. Choose another file with -o.')
    people = find_people(entries, choices)
    check_patients_free(out, people, overwrite)
    part = out.with_name(f'.{out.name}.{_digest_of(entries, audit)}.part')
    options = _options(model, paths, root, sheet, overwrite, choices)
    with file_lock(out, 'Wait for it, or choose another file with -o.'):
        _grade_into(part, grader, entries, columns)
        _check_free(out, overwrite)
        audit_file(out).unlink(missing_ok=True)            # if this stops now, the CSV has none rather than a wrong one
        model_eyes = grader.model.eyes
        if people is None and not choices.deidentify and not model_eyes: write_bytes(out, part.read_bytes())
        else: write_with_people(part, out, people, choices, grader.model.gate, model_eyes, grader.prevalence)
        patients = None if people is None else out.with_name(PATIENTS)
        write_audit(out, audit, part.with_suffix(STARTS), options, patients)
        _remove_parts(out)
    say(privacy_text(out, people, choices), 'dim')
    texts = ['file', 'error', id_column, 'patient']
    df = pd.read_csv(out, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[''])
    _report(df, out, grader, audit)
    return df


def _remove_parts(out: Path) -> None:
    "Remove the hidden files of this and of earlier, interrupted calls beside `out`"
    for suffix in ('.part', STARTS):
        for stale in out.parent.glob(f'.{glob.escape(out.name)}.*{suffix}'): stale.unlink(missing_ok=True)


def _check_free(out: Path, overwrite: bool) -> None:
    "Raise `AptosError` if `out` or its audit file exists; with `overwrite`, if it is no earlier output of `predict`"
    if out.exists() and not overwrite:
        raise AptosError(f'{out}: already exists. Choose another file with -o, or add --overwrite.')
    check_audit_free(out, overwrite)
    if not out.exists() or has_columns(out, COLUMNS): return
    raise AptosError(f'{out}: is not a CSV that predict wrote, so it is not replaced. Choose another file with -o.')


def _options(model: str, paths: list[str], root: str | None, sheet: str, overwrite: bool, choices: Choices) -> dict:
    """Return the options of a call for its audit file.

    De-identified, they name no files, folders and sheets, and `patient` and `eye` are 'given' or empty: a pattern can
    name people.
    """
    if not choices.deidentify:
        return dict(model=model, images=paths, root=root, sheet=sheet, overwrite=overwrite, **asdict(choices))
    given = {name: 'given' if getattr(choices, name) else '' for name in ('patient', 'eye')}
    return dict(model=Path(model).name, overwrite=overwrite, **asdict(choices) | given)


def _digest_of(entries: list[ImageEntry], audit: dict) -> str:
    """Return a hash of what makes the predictions and of the images: their ids, files, sizes and times.

    A resumed call needs the same, so that all rows of a CSV are of one model, program and machine.
    """
    def state(path: Path | None) -> list:
        try: stat = path.stat() if path else None
        except OSError: return []
        return [stat.st_size, stat.st_mtime_ns] if stat else []
    made_by = {key: value for key, value in audit.items() if key != 'time'}
    return digest([made_by, [[e.id, str(e), state(e.path)] for e in entries]])[:16]


def _grade_into(part: Path, grader: Grader, entries: list[ImageEntry], columns: list[str]) -> None:
    "Append the rows that `part` lacks"
    names = [safe_cell(e.id if e.id_column == 'file' else str(e)) for e in entries]
    done = _resume(part, names, columns)
    note_start(part.with_suffix(STARTS), resumed=bool(done))
    if done: say(f'{done} of {len(entries)} images are graded already; resuming')
    with Bars() as bars, bars(f'grading with {grader.model.name}', len(entries), 'images') as bar, \
            open(part, 'a', encoding='utf-8', newline='') as f:
        make_private(f.fileno())             # it names images also where the CSV is de-identified
        if not done: f.write(','.join(columns) + '\n')
        for df in grader.stream(entries[done:]):
            if columns[0] != COLUMNS[0]: df.insert(0, columns[0], [e.id for e in entries[done:done + len(df)]])
            df['file'] = names[done:done + len(df)]
            text = df.select_dtypes(exclude='number').columns
            df[text] = df[text].map(safe_cell, na_action='ignore')
            f.write(df.to_csv(index=False, header=False, lineterminator='\n', float_format='%.4f'))
            f.flush()
            done += len(df)
            bar.to(done)


def _report(df: pd.DataFrame, csv_file: Path, grader: Grader, audit: dict) -> None:
    "Say how many images were graded. Raises `AptosError` if some were not"
    bad = df[df.error.notna()]
    say(f'{plural(len(df) - len(bad), "image")} processed by {processed_text(audit)} -> {csv_file}')
    say(DISCLAIMER, 'dim')
    if grader.model.synthetic: say(SYNTHETIC_MODEL, 'yellow')
    for text in grader.model.warnings: say(f'warning of the model: {text}', 'yellow')
    say(grader.model.gate.count_text(df.referable.astype(object).fillna('')))
    if not len(bad): return
    first = '; '.join(f'{f"row {i + 1}" if pd.isna(file) else file}: {error}'
                      for i, file, error in bad[['file', 'error']].head(3).itertuples())
    raise AptosError(f'{len(bad)} of {len(df)} images could not be found or read: {first}. '
                     f'See the column error of {csv_file} for all of them.')


def _resume(part: Path, files: list[str], columns: list[str]) -> int:
    """Return how many of the first `files` have a complete row in `part`, and remove what follows those rows.

    A file with other columns, other images or a damaged row counts as empty.
    """
    if not part.is_file(): return 0
    data = part.read_bytes()
    complete = data[:data.rfind(b'\n') + 1]            # the last line may be half written
    try: header, *rows = csv.reader(io.StringIO(complete.decode(), newline=''))
    except (csv.Error, ValueError): header, rows = [], []
    at = columns.index('file')
    names = [row[at] for row in rows if len(row) == len(columns)]
    valid = header == columns and len(names) == len(rows) and names == files[:len(names)]
    os.truncate(part, len(complete) if valid and names else 0)
    return len(names) if valid else 0
