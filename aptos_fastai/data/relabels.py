"""Decisions of a reader about labels: relabels.csv, which `review` writes and the key `relabels` of a table reads.

The file only grows. Of several decisions on an image the last one counts; the table's own CSV is never changed.
"""
import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from aptos_fastai.common.console import plural
from aptos_fastai.common.io import file_hash, write_bytes
from aptos_fastai.data.grades import read_grade
from aptos_fastai.data.spreadsheet import TableError, count, first_few, read_spreadsheet, require_column
from aptos_fastai.decisions import UNGRADABLE
from aptos_fastai.recipe.sections import Table

RELABELS = 'relabels.csv'
COLUMNS = ['table', 'id_code', 'original', 'grade', 'reviewer', 'time', 'shown_label', 'note']
NEEDED = COLUMNS[:4]
HEADER = ','.join(COLUMNS)                   # first line of a file to which rows are appended
UNDONE = 'undone'                            # a note: the decision before this row was taken back
SKIPPED = 'skipped'                          # a note after UNDONE: the earlier decision, brought back, was to skip
EXAMPLE = 'Write a grade from 0 to 4, ungradable, or nothing for a skipped image.'


@dataclass(frozen=True)
class Relabels:
    "The last decision on each image of one table (`rows`: id_code, original, grade), and how many rows were ignored"
    file: Path
    rows: pd.DataFrame
    of_other_tables: int

    def counts(self) -> dict[str, int]:
        "Return how many images were regraded, confirmed, called ungradable and skipped, and how many rows ignored"
        is_grade = self.rows.grade.map(lambda o: o not in ('', UNGRADABLE)).astype(bool)
        changed = self.rows.grade != self.rows.original
        return dict(regraded=int((is_grade & changed).sum()), confirmed=int((is_grade & ~changed).sum()),
                    ungradable=int((self.rows.grade == UNGRADABLE).sum()), skipped=int((self.rows.grade == '').sum()),
                    of_other_tables=self.of_other_tables)

    def record(self) -> dict:
        "Return what a run records of them: the hash of the file and the counts"
        return dict(sha256=file_hash(self.file), **self.counts())

    def text(self) -> str:
        "Return what they change as a line for people"
        o = self.counts()
        ignored = f'; {plural(o["of_other_tables"], "row")} of other tables ignored' if o['of_other_tables'] else ''
        return (f'{self.file}: {plural(o["regraded"], "image")} regraded, {o["confirmed"]} confirmed, '
                f'{o["ungradable"]} ungradable and left out, {o["skipped"]} skipped{ignored}')


# Reading

def read_decisions(file: Path) -> pd.DataFrame:
    """Return the rows of relabels.csv as text, in the order of time: table, id_code, original, grade, …

    Grades are '0' to '4', 'ungradable' or '' (skipped: the grade stays). Raises `TableError`.
    """
    df = read_spreadsheet(file)
    for column in NEEDED: require_column(file, df, column, f'Columns of such a file: {", ".join(COLUMNS)}.')
    df = df.reindex(columns=COLUMNS, fill_value='')
    df['original'] = _canonical(file, df, 'original', ())
    df['grade'] = _canonical(file, df, 'grade', ('', UNGRADABLE))
    unnamed = df.index[(df.table == '') | (df.id_code == '')]
    if len(unnamed): raise TableError(f'{file}: row {first_few(unnamed)} names no table or no image. Remove it.')
    return df.sort_values('time', key=lambda times: _times(file, times), kind='stable').reset_index(drop=True)


def _canonical(file: Path, df: pd.DataFrame, column: str, others: tuple[str, ...]) -> list[str]:
    "Return the cells of a column of grades as '0' to '4' or one of `others`. Raises `TableError`"
    texts = df[column].str.casefold()
    grades = texts.map(read_grade)
    bad = grades.isna() & ~texts.isin(others)
    if bad.any():
        shown = [f'{o.id_code} = {getattr(o, column) or "(empty)"}' for o in df[bad].itertuples()]
        advice = EXAMPLE if others else "It is the table's own grade, from 0 to 4."
        raise TableError(f'{file}: {count(shown, "invalid value")} in column {column}: {first_few(shown)}. {advice}')
    return [text if pd.isna(grade) else f'{grade:.0f}' for text, grade in zip(texts, grades, strict=True)]


def _times(file: Path, times: pd.Series) -> pd.Series:
    "Return times as seconds; rows without a time keep their place before those with one. Raises `TableError`"
    try: return times.map(lambda o: datetime.fromisoformat(o).timestamp() if o else -np.inf)
    except ValueError as e:
        raise TableError(f'{file}: column time: {e}. Write times like 2026-01-31T12:00:00+00:00, or none.') from None


def last_decisions(decisions: pd.DataFrame) -> pd.DataFrame:
    "Return the last row on each image"
    return decisions.drop_duplicates(['table', 'id_code'], keep='last')


def decision_of(grade: str, note: str) -> str | None:
    "Return the decision of a row: '0' to '4', 'ungradable', '' (skipped); None where undo left the image to do"
    notes = [o.strip() for o in note.split(';')]
    return None if UNDONE in notes and SKIPPED not in notes and not grade else grade


# Applying

def read_relabels(table: Table, folder: Path) -> Relabels:
    "Return the decisions on a table by its key `relabels`: a file in the table's `folder`, or a full path"
    file = folder / Path(table.relabels).expanduser()
    if not file.is_file():
        raise TableError(f'[table.{table.name}] relabels = {table.relabels}: no such file ({file}). Give its full '
                         f'path, or copy it to {folder}.')
    decisions = last_decisions(read_decisions(file))
    rows = decisions[decisions.table == table.name].reset_index(drop=True)
    return Relabels(file, rows, len(decisions) - len(rows))


def apply_relabels(frame: pd.DataFrame, table: Table, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return `frame` with the decisions on it, the rows that are ungradable by them, and a line that says so.

    `frame` has the columns id_code and diagnosis. Raises `TableError` for an image that the table lacks, and for a
    decision on another grade than the table has now.
    """
    relabels = read_relabels(table, folder)
    rows, file = relabels.rows, relabels.file
    unknown = rows.id_code[~rows.id_code.isin(frame.id_code)]
    if len(unknown):
        raise TableError(f'{file}: {count(unknown, "id")} not among the graded images of [table.{table.name}]: '
                         f'{first_few(unknown)}. Remove these rows, or use the file of this table.')
    new = rows.set_index('id_code').reindex(frame.id_code)
    has_decision = new.original.notna().to_numpy()
    present = frame.diagnosis.map('{:.0f}'.format)
    stale = has_decision & (new.original.to_numpy() != present.to_numpy())
    if stale.any():
        pairs = zip(frame.id_code[stale], new.original[stale], present[stale], strict=True)
        shown = [f'{name} was {old}, is {now}' for name, old, now in pairs]
        raise TableError(f'{file}: {count(shown, "decision")} on grades that [table.{table.name}] no longer has: '
                         f'{first_few(shown)}. Review these images again, or remove these rows.')
    decided, ungradable = new.grade.fillna('').to_numpy(), (new.grade == UNGRADABLE).to_numpy()
    grades = [float(now if text in ('', UNGRADABLE) else text)
              for now, text in zip(frame.diagnosis, decided, strict=True)]
    regraded = frame.assign(diagnosis=np.array(grades, np.float32))
    if ungradable.all(): raise TableError(f'{file}: all images of [table.{table.name}] are ungradable.')
    return regraded[~ungradable].reset_index(drop=True), frame[ungradable], relabels.text()


# Writing

def append_decisions(file: Path, rows: Iterable[dict]) -> None:
    """Append decisions (`COLUMNS`) to relabels.csv atomically. Raises `AptosError`.

    Every byte that is there stays. A file that another program saved with another separator, encoding or header is
    rewritten with `COLUMNS` first: its rows, their order and its other columns stay.
    """
    old = file.read_bytes() if file.is_file() else b''
    if old and not _can_grow(old): old = _converted(file)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    if not old: writer.writeheader()
    elif not old.endswith(b'\n'): text.write('\n')
    writer.writerows(rows)
    write_bytes(file, old + text.getvalue().encode())


def _can_grow(data: bytes) -> bool:
    "Whether rows of `COLUMNS` can be appended to the bytes of a file: its header begins with them, and it is UTF-8"
    try: first = data.decode().partition('\n')[0].rstrip('\r')
    except UnicodeDecodeError: return False
    return first == HEADER or first.startswith(f'{HEADER},')


def _converted(file: Path) -> bytes:
    "Return a readable relabels.csv as comma-separated UTF-8 with `COLUMNS` first. Raises `TableError`"
    read_decisions(file)                     # nothing is rewritten that could not be read again
    df = read_spreadsheet(file)
    others = [column for column in df if column not in COLUMNS]
    return df.reindex(columns=[*COLUMNS, *others], fill_value='').to_csv(index=False, lineterminator='\n').encode()
