"Read tables as people have them: CSVs of any separator and encoding, with or without a header, and .xlsx."
import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, time
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from aptos_fastai.common.console import plural, say
from aptos_fastai.common.io import AptosError
from aptos_fastai.recipe.values import did_you_mean

SEPARATORS = ',;\t'                          # in this order where several are equally good; then spaces
SNIFFED_ROWS = 200
SNIFFED_BYTES = 10_000
MANY_ZEROS = .4                              # of every second byte: UTF-16 without a byte order mark
TITLE_ROWS = 10                              # above a header, at most
SPREADSHEETS = '.xlsx', '.xlsm'
ZIP = b'PK\x03\x04'                        # how a workbook begins, whatever its suffix
SAVE_AS = 'Save it as comma-separated UTF-8.'
FORMULA_STARTS = '=+-@\t\r'               # a spreadsheet runs a cell that begins with one of these


class TableError(AptosError):
    "Raised for a table that cannot be used; the message names the file, the ids and what to do."
    parts: Sequence['TableError'] = ()       # the errors that `raise_all` made one of


@contextmanager
def collected(faults: list[TableError]) -> Iterator[None]:
    "Append a `TableError` of the block to `faults`, so that one message can name all that is wrong with a table"
    try: yield
    except TableError as e: faults += e.parts or [e]


def raise_all(file: Path, faults: Sequence[TableError]) -> None:
    "Raise the only one of `faults`, or one error with all of their messages"
    if not faults: return
    if len(faults) == 1: raise faults[0]
    texts = [f'({i}) {str(e).removeprefix(f"{file}: ")}' for i, e in enumerate(faults, 1)]
    error = TableError(f'{file}: {len(faults)} problems: {" ".join(texts)}')
    error.parts = list(faults)
    raise error


def first_few(items) -> str:
    "Return the first five items as text"
    return ', '.join(map(str, list(items)[:5])) + (', …' if len(items) > 5 else '')


def count(items: Sized, noun: str) -> str:
    "Return '1 id' or '3 ids'"
    return plural(len(items), noun)


def has_columns(csv: Path, columns: Iterable[str]) -> bool:
    "Return whether the first line of a CSV names all of `columns`: whether this program wrote it"
    with open(csv, 'rb') as f: header = f.readline().decode(errors='replace').strip().split(',')
    return set(columns) <= set(header)


def safe_cell(text: str) -> str:
    "Return a text that a spreadsheet does not run as a formula: an apostrophe is put before one that it would run"
    return f"'{text}" if isinstance(text, str) and text.startswith(tuple(FORMULA_STARTS)) else text


def unsafe_cell(text: str) -> str:
    "Return the text that `safe_cell` was given"
    return text[1:] if text.startswith(tuple(f"'{start}" for start in FORMULA_STARTS)) else text


@dataclass(frozen=True)
class Sheet:
    "A sheet of a workbook: its name, the cells of each row as text, and what a person should know of it"
    name: str
    rows: list[list[str]]
    notes: list[str]

    @property
    def data_rows(self) -> int:
        "How many rows have a cell, without the header"
        return max(sum(any(row) for row in self.rows) - 1, 0)


def read_spreadsheet(file: Path, *, header: bool = True, keep_blank: bool = False,
                     sheet: str | None = None, notes: list[str] | None = None) -> pd.DataFrame:
    """Return a table as text, without spaces around headers and cells, without empty rows and columns.

    Encodings: UTF-8, UTF-16, Windows-1252. Separators: comma, semicolon, tab, spaces; a first line `sep=;` counts.
    `header` = False: the columns are called 1, 2, 3 … The index is the number of each row in the file. `keep_blank`
    keeps rows of empty cells before the last filled row, but not blank lines, as pandas does. `sheet` is that of a
    workbook, '' its only one with data; None: the user cannot name one. What a person should know is appended to
    `notes`, or printed if there is no such list.
    Raises `TableError` if there is no such table in the file.
    """
    found: list[str] = []
    df = _read(file, header, keep_blank, sheet, found)
    if notes is not None: notes += found
    else:
        for note in found: say(f'{file}: {note}', 'yellow')
    return df


def _read(file: Path, header: bool, keep_blank: bool, sheet: str | None, notes: list[str]) -> pd.DataFrame:
    "`read_spreadsheet`; appends to `notes`"
    if file.name.startswith('~$'):
        raise TableError(f'{file}: is the lock file of an open spreadsheet. Name the spreadsheet itself.')
    data = file.read_bytes()
    is_workbook = file.suffix.lower() in SPREADSHEETS or data.startswith(ZIP)
    if sheet and not is_workbook: raise TableError(f'{file}: sheet = {sheet}, but only a workbook has sheets.')
    if is_workbook:
        found = _the_sheet(file, _sheets(file, data), sheet)
        rows, notes[:] = found.rows, found.notes
    else: rows = _rows_of_text(_decode(file, data))
    rows = [[' '.join(cell.split()) if '\n' in cell else cell.strip() for cell in row] for row in rows]
    filled = [i for i, row in enumerate(rows) if any(row)]
    if not filled: raise TableError(f'{file}: the file is empty. Write a header and one row per image.')
    kept = [i for i in range(filled[0], filled[-1] + 1) if any(rows[i]) or keep_blank and len(rows[i]) > 1]
    rows = [rows[i] for i in kept]
    return _frame(file, rows, [i + 1 for i in kept], header, notes)


def _frame(file: Path, rows: list[list[str]], numbers: list[int], header: bool, notes: list[str]) -> pd.DataFrame:
    """Return the frame of a table's rows; columns without a name and without a cell are dropped.

    So is a first column without a name that numbers the rows, as pandas writes it, with a note. `numbers` are those of
    the rows in the file.
    """
    width = max(map(len, rows))
    rows = [row + [''] * (width - len(row)) for row in rows]
    names = rows.pop(0) if header else [str(i + 1) for i in range(width)]
    filled = [bool(names[i]) and header or any(row[i] for row in rows) for i in range(width)]
    if filled[0] and not names[0] and _numbers_rows([row[0] for row in rows if any(row)]):
        filled[0] = False
        notes.append('the first column has no name and numbers the rows: it is not used')
    unnamed = [i + 1 for i in range(width) if filled[i] and not names[i]]
    if unnamed:
        if names[0]: _refuse_title(file, names, rows, numbers[1:])
        raise TableError(f'{file}: column {unnamed[0]} has cells but no name in the header. Name it, or, in a text '
                         'file, quote cells that contain the separator.')
    kept = [i for i in range(width) if filled[i]]
    names = _unique([names[i] for i in kept])
    index = numbers[1:] if header else numbers
    return pd.DataFrame([[row[i] for i in kept] for row in rows], index, names, dtype=str)


def _numbers_rows(cells: list[str]) -> bool:
    "Return whether cells are different whole numbers without leading zeros: an index, also of chosen or shuffled rows"
    return len(set(cells)) == len(cells) and all(re.fullmatch('0|[1-9][0-9]*', cell) for cell in cells)


def _refuse_title(file: Path, first: list[str], rows: list[list[str]], numbers: list[int]) -> None:
    "Raise `TableError` if `first` is a title and one of `rows`, of which `numbers` are those in the file, the header"
    for row, number in list(zip(rows, numbers, strict=True))[:TITLE_ROWS]:
        if sum(map(bool, row)) < 2 * sum(map(bool, first)) or any(map(_is_number, row)): continue
        raise TableError(f'{file}: the header seems to be row {number}, below "{" ".join(filter(None, first))}". '
                         'Delete the rows above it.')


def _is_number(cell: str) -> bool: return bool(re.fullmatch('[-+]?[0-9]+([.,][0-9]+)?', cell))


def _unique(names: list[str]) -> list[str]:
    "Return the names with ' (2)' after the second of one name"
    counts = [names[:i].count(name) + 1 for i, name in enumerate(names)]
    return [name if n == 1 else f'{name} ({n})' for name, n in zip(names, counts, strict=True)]


def _decode(file: Path, data: bytes) -> str:
    "Return the text of a file's bytes. Raises `TableError` if they are no text"
    for mark, encoding in ((codecs.BOM_UTF8, 'utf-8-sig'), (codecs.BOM_UTF16_LE, 'utf-16'),
                           (codecs.BOM_UTF16_BE, 'utf-16')):
        if data.startswith(mark): return _decoded(file, data, encoding)
    even, odd = (data[i:SNIFFED_BYTES:2].count(0) / max(len(data[i:SNIFFED_BYTES:2]), 1) for i in (0, 1))
    if odd > MANY_ZEROS > even: return _decoded(file, data, 'utf-16-le')
    if even > MANY_ZEROS > odd: return _decoded(file, data, 'utf-16-be')
    if b'\0' in data: raise TableError(f'{file}: not a readable CSV (it is no text). {SAVE_AS}')
    try: return data.decode('utf-8')
    except UnicodeDecodeError: return _decoded(file, data, 'cp1252')


def _decoded(file: Path, data: bytes, encoding: str) -> str:
    try: return data.decode(encoding)
    except UnicodeDecodeError as e:
        raise TableError(f'{file}: not a readable CSV ({e}). {SAVE_AS}') from None


def _rows_of_text(text: str) -> list[list[str]]:
    "Return the cells of each row"
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    first, _, rest = text.partition('\n')
    if first.lower().startswith('sep=') and len(first) == 5: return _split(rest, first[4])
    return _split(text, separator_of(text))


def separator_of(text: str) -> str:
    "Return the separator that splits most rows into two cells or more; ' ' if all have as many words; or a comma"
    lines = [line for line in text.split('\n') if line.strip()][:SNIFFED_ROWS]
    rows = {separator: _split('\n'.join(lines), separator) for separator in SEPARATORS}
    share = {separator: sum(len(row) > 1 for row in split) / max(len(split), 1) for separator, split in rows.items()}
    best = max(SEPARATORS, key=share.__getitem__)
    if share[best]: return best
    words = {len(line.split()) for line in lines}
    return ' ' if len(words) == 1 and words != {1} else ','


def _split(text: str, separator: str) -> list[list[str]]:
    if separator == ' ': return [line.split() for line in text.split('\n')]
    return list(csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True))


@lru_cache(maxsize=1)                        # a table is read several times: to understand it, and to use it
def _sheets(file: Path, data: bytes) -> list[Sheet]:
    "Return the sheets of a workbook"
    if find_spec('openpyxl') is None:
        raise TableError(f'{file}: reading .xlsx needs openpyxl. Run pip install openpyxl, or save it as CSV.')
    import openpyxl
    try:
        book = openpyxl.load_workbook(io.BytesIO(data), data_only=True)
        return [_sheet(o) for o in book.worksheets]
    except Exception as e:
        advice = 'Unpack it, if it is an archive.' if file.suffix.lower() == '.zip' else 'Save it as CSV.'
        raise TableError(f'{file}: not a readable workbook ({e}). {advice}') from None


def _sheet(worksheet: Any) -> Sheet:
    "Return a worksheet of openpyxl as text"
    rows = [[_cell_text(cell.value, cell.number_format or '') for cell in row] for row in worksheet.iter_rows()]
    notes = []
    merged = _fill_merged(rows, worksheet.merged_cells.ranges)
    if merged: notes.append(f'{plural(merged, "merged cell")} over several rows: each of the rows has the value')
    hidden = sum(row.hidden and n <= len(rows) and any(rows[n - 1]) for n, row in worksheet.row_dimensions.items())
    text = f'{plural(hidden, "row")} hidden in the workbook (by a filter?) are used: delete what is not meant'
    if hidden: notes.append(text)
    return Sheet(worksheet.title, rows, notes)


def _fill_merged(rows: list[list[str]], ranges: Iterable[Any]) -> int:
    "Write the value of merged cells into each filled row that they span; return how many of them had a value to write"
    filled, n = [any(row) for row in rows], 0
    for cells in ranges:
        column, first = cells.min_col - 1, cells.min_row - 1
        below = [i for i in range(first + 1, cells.max_row) if i < len(rows) and filled[i]]
        if not below or not rows[first][column]: continue
        for i in below: rows[i][column] = rows[first][column]
        n += 1
    return n


def _the_sheet(file: Path, sheets: list[Sheet], name: str | None) -> Sheet:
    "Return the sheet called `name`, or the only one with data. Raises `TableError`"
    if name:
        named = [sheet for sheet in sheets if sheet.name.strip() == name]
        if named: return named[0]
        raise TableError(f'{file}: no sheet {name}. Its sheets are {", ".join(sheet.name for sheet in sheets)}.')
    filled = [sheet for sheet in sheets if sheet.data_rows] or [o for o in sheets if any(map(any, o.rows))] or sheets
    if len(filled) == 1: return filled[0]
    shown = ', '.join(f'{sheet.name} ({plural(sheet.data_rows, "row")})' for sheet in filled)
    how = f'Name one: --sheet "{filled[0].name}" (key `sheet`), or' if name is not None else 'One is needed:'
    raise TableError(f'{file}: {len(filled)} sheets have data: {shown}. {how} save the sheet as a CSV of its own.')


def _cell_text(value: object, number_format: str) -> str:
    "Return a cell as the workbook shows it: a number with the format 000000 keeps its zeros, a day has no time"
    if value is None: return ''
    if isinstance(value, datetime) and value.time() == time(): value = value.date()
    if isinstance(value, float) and value.is_integer(): value = int(value)
    zeros = len(number_format) if number_format and not number_format.strip('0') else 0
    return str(value).zfill(zeros) if isinstance(value, int) else str(value)


def require_column(file: Path, df: pd.DataFrame, column: str, what_to_do: str) -> None:
    "Raise `TableError` if a table has no such column, or two of them"
    if f'{column} (2)' in df: raise TableError(f'{file}: two columns are called {column}. Rename one.')
    if column in df: return
    raise TableError(f'{file}: no column {column}{did_you_mean(column, df.columns)} '
                     f'Its columns are {", ".join(df.columns)}. {what_to_do}')
