"""The progress of a job: a bar with rate and remaining time on a terminal, and an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn
from rich.text import Text

from gateway.bulk.job import Reporter
from gateway.cli.console import say

_LINE_S = 30.0


def rate_and_rest(done: int, total: int | None, seconds: float) -> str:
    """Describe the rate and the estimated remaining time: ``512 rows/s, about 3 min left``.

    Args:
        done: the rows that this process has finished.
        total: all rows of this process; ``None`` if unknown.
    """
    if seconds <= 0 or not done:
        return ""
    rate = done / seconds
    shown = f"{rate:,.0f} rows/s" if rate >= 10 else f"{rate:.1f} rows/s"
    if total is None or done > total:
        return shown
    return f"{shown}, about {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """Format a time in its largest units: ``45 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class _RateColumn(TextColumn):
    def __init__(self, describe: Callable[[], str]) -> None:
        super().__init__("")
        self._describe = describe

    def render(self, task: Task) -> Text:
        return Text(self._describe())


class _Counter:
    """The number of finished rows, and the time since the first of them was started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.before = self.done = 0
        self.total: int | None = None
        self.started = clock()

    def start(self, done: int, total: int | None) -> None:
        self.before, self.total, self.started = done, total, self._clock()

    def advance(self, number: int) -> None:
        self.done += number

    def describe(self) -> str:
        rest = None if self.total is None else self.total - self.before
        return rate_and_rest(self.done, rest, self._clock() - self.started)


class _Bar(_Counter):
    def __init__(self, console: Console) -> None:
        super().__init__(time.monotonic)
        self._task: TaskID | None = None
        columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), _RateColumn(self.describe))
        self.progress = Progress(*columns, console=console)

    def start(self, done: int, total: int | None) -> None:
        super().start(done, total)
        self._task = self.progress.add_task("embedding", total=total, completed=done)

    def advance(self, number: int) -> None:
        super().advance(number)
        if self._task is not None:
            self.progress.advance(self._task, number)


class _Lines(_Counter):
    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console
        self._shown = clock()

    def advance(self, number: int) -> None:
        super().advance(number)
        if self._clock() - self._shown < _LINE_S:
            return
        self._shown = self._clock()
        of = "" if self.total is None else f" of {self.total:,}"
        say(self._console, f"{self.before + self.done:,}{of} rows: {self.describe()}")


@contextmanager
def show_progress(console: Console) -> Iterator[Reporter]:
    """Show the progress of a job within the context."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    bar = _Bar(console)
    with bar.progress:
        yield bar
