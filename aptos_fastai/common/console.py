"Terminal output: live progress bars on a terminal, plain lines in a log file."
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LOG_SECONDS = 30                             # without a terminal: seconds between two progress lines

console = Console(highlight=False, soft_wrap=True, emoji=False)     # `dicom:eye:` is no emoji


def say(line: str, style: str | None = None) -> None:
    "Print a line; square brackets in it are printed as they are"
    console.print(line, style=style, markup=False)


def format_duration(seconds: float) -> str:
    "Format seconds for people: 42 s, 3 min 05 s, 2 h 10 min, 4 days 3 h"
    s = int(round(seconds))
    if s < 60: return f'{s} s'
    if s < 3600: return f'{s // 60} min {s % 60:02} s'
    if s < 2 * 86400: return f'{s // 3600} h {s % 3600 // 60:02} min'
    return f'{s // 86400} days {s % 86400 // 3600} h'


def plural(n: float, noun: str) -> str:
    "Return '1 hour', '0.5 hours' or '3 hours'"
    number = f'{n:g}' if isinstance(n, float) else n
    return f'{number} {noun}' if n == 1 else f'{number} {noun}s'


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Collection[str] = (),
          wrap: Collection[str] = ()) -> None:
    """Print `rows` as a table; columns named in `right` are right-aligned, those in `wrap` may wrap between words.

    Where the terminal is too narrow for that, each row is a list under its first cell: no name and no number is cut.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = _column_widths(columns, cells, wrap, console.width)
    if not widths:
        _print_lists(title, columns, cells)
        return
    t = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, show_edge=False,
              pad_edge=False, padding=(0, 1, 0, 0))
    for c, width in zip(columns, widths, strict=True):
        t.add_column(c, justify='right' if c in right else 'left', overflow='fold', width=width)
    for row in cells: t.add_row(*row)
    console.print(t, soft_wrap=False)


def _column_widths(columns: Sequence[str], rows: Sequence[Sequence[str]], wrap: Collection[str],
                   room: int) -> list[int]:
    "Return the widths of columns in a table of at most `room` characters, where those in `wrap` may wrap; [] for none"
    texts = [[c, *(row[i] for row in rows)] for i, c in enumerate(columns)]
    full = [max(cell_len(line) for text in column for line in text.split('\n')) for column in texts]
    widths = [max((cell_len(word) for text in column for word in text.split()), default=0) if c in wrap else width
              for c, column, width in zip(columns, texts, full, strict=True)]
    spare = room - sum(widths) - 2 * (len(columns) - 1)            # two spaces between columns
    if spare < 0: return []
    for _ in range(spare):
        narrow = [i for i, width in enumerate(widths) if width < full[i]]
        if narrow: widths[min(narrow, key=widths.__getitem__)] += 1
    return widths


def _print_lists(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    "Print each row as its first cell and a line for each other one"
    say(title, 'bold')
    for first, *others in rows:
        say(first)
        for c, text in zip(columns[1:], others, strict=True):
            if text: say(f'  {c}: {" ".join(text.split())}')


class ProgressBar:
    "One progress bar; without a terminal it prints a plain line every `LOG_SECONDS` seconds"

    def __init__(self, progress: Progress | None, title: str, total: int, unit: str):
        self.progress, self.title, self.total, self.unit = progress, title, total, unit
        self.started = self.last_line = time.monotonic()
        self.id = progress.add_task(title, total=total, note='') if progress else None

    def to(self, n: int, note: str = '') -> None:
        "Show that `n` of the total are done"
        if self.progress and self.id is not None:
            self.progress.update(self.id, completed=n, note=note)
            return
        now = time.monotonic()
        if n >= self.total or now - self.last_line <= LOG_SECONDS: return
        left = (now - self.started) / max(n, 1) * (self.total - n)
        words = [f'{self.title}:', f'{n}/{self.total}', self.unit, note]
        say(' '.join(w for w in words if w) + f', {format_duration(left)} left')
        self.last_line = now

    def close(self) -> None:
        "Remove the bar from the terminal"
        if self.progress and self.id is not None: self.progress.remove_task(self.id)


class Bars:
    "The progress bars of a run: `with Bars() as bars: with bars('preparing', total) as bar: bar.to(n)`"

    def __enter__(self) -> 'Bars':
        self.progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn('{task.description}'), BarColumn(24), MofNCompleteColumn(),
                       TextColumn('{task.fields[note]}'), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console, transient=True)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress: self.progress.stop()

    @contextmanager
    def __call__(self, title: str, total: int, unit: str = '') -> Iterator[ProgressBar]:
        "Show a bar while the block runs"
        bar = ProgressBar(self.progress, title, total, unit)
        try: yield bar
        finally: bar.close()
