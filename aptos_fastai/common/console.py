"What the terminal shows: live bars where it is one, plain lines where it is a log file."
import time
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def say(line: str, style: str | None = None):
    "A line on the terminal; square brackets in it stay as they are"
    console.print(line, style=style, markup=False)


def format_duration(seconds: float) -> str:
    "A duration for people: 42 s, 3 min 05 s, 2 h 10 min, 4 days 3 h"
    s = int(round(seconds))
    if s < 3600: return f'{s} s' if s < 60 else f'{s // 60} min {s % 60:02} s'
    return f'{s // 3600} h {s % 3600 // 60:02} min' if s < 172800 else f'{s // 86400} days {s % 86400 // 3600} h'


def table(title: str, columns: list[str], rows: list[list], *, right=(), wrap=()):
    "A rich table of `rows` (anything that str() can show); columns named in `right` align right, those in `wrap` give way first"
    t = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for c in columns: t.add_column(c, justify='right' if c in right else 'left', overflow='fold', no_wrap=c not in wrap)
    for r in rows: t.add_row(*map(str, r))
    console.print(t, soft_wrap=False)


class _Bar:
    "One bar; without a terminal, a plain line every `every` seconds and at the end"
    def __init__(self, live, title, total, unit, every=30):
        self.live, self.title, self.total, self.unit, self.every = live, title, total, unit, every
        self.n, self.t0, self.said = 0, time.monotonic(), time.monotonic()
        self.id = live.add_task(title, total=total, note='') if live else None

    def to(self, n: int, note: str = ''):
        "`n` of the total are done"
        self.n, now = n, time.monotonic()
        if self.live: self.live.update(self.id, completed=n, note=note)
        elif now - self.said > self.every and n < self.total:
            left = (now - self.t0) / max(n, 1) * (self.total - n)
            say(' '.join(f'{self.title}: {n}/{self.total} {self.unit} {note}'.split()) + f', {format_duration(left)} left')
            self.said = now

    def close(self):
        if self.live: self.live.remove_task(self.id)


class Bars:
    "The bars of a run: `with Bars() as bars`, then `with bars('preparing', total) as bar: bar.to(n)`"
    def __enter__(self):
        cols = (TextColumn('{task.description}'), BarColumn(24), MofNCompleteColumn(), TextColumn('{task.fields[note]}'),
                TimeRemainingColumn())
        self.live = Progress(*cols, console=console, transient=True) if console.is_terminal else None
        if self.live: self.live.start()
        return self

    def __exit__(self, *_):
        if self.live: self.live.stop()

    @contextmanager
    def __call__(self, title: str, total: int, unit: str = ''):
        bar = _Bar(self.live, title, total, unit)
        try: yield bar
        finally: bar.close()
