"""The progress of a comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Step(Protocol):
    """One part of a comparison, counted in texts."""

    def advance(self, number: int) -> None:
        """Add to the number of finished texts."""


class Reporter(Protocol):
    """Shows the progress of a comparison."""

    def step(self, what: str, total: int) -> Step:
        """Begin a step of ``total`` texts."""


class Silent:
    """A reporter that shows nothing."""

    def step(self, what: str, total: int) -> Step:
        return self

    def advance(self, number: int) -> None:
        pass


class Bars:
    """A bar for each step on a terminal, and a line elsewhere."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress

    def step(self, what: str, total: int) -> Step:
        if not self._console.is_terminal:
            self._console.print(f"{what}: {total}", highlight=False, markup=False)
            return Silent()
        return _Bar(self._progress, self._progress.add_task(what, total=total))


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, number: int) -> None:
        self._progress.advance(self._task, number)


_LINE_EVERY_S: Final = 0.5


class Lines:
    """A line of JSON at the beginning of each step, and a few per second during it, for programs that show the progress."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, what: str, total: int) -> Step:
        return _Counted(self._console, what, total)


class _Counted:
    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console = console
        self._what = what
        self._done, self._total = 0, total
        self._written = 0.0
        self._write()

    def advance(self, number: int) -> None:
        self._done += number
        if self._done >= self._total or time.monotonic() - self._written >= _LINE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        line = json.dumps({"step": self._what, "done": self._done, "total": self._total})
        self._console.out(line, highlight=False)


@contextmanager
def progress_on(console: Console, *, is_json: bool = False) -> Iterator[Reporter]:
    """Show the steps of a comparison while the context lasts.

    Args:
        is_json: show the steps as lines of JSON.
    """
    if is_json:
        yield Lines(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bars(console, progress)
