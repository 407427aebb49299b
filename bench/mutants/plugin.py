"""The plugin that runs inside pytest, next to a mutant: it chooses the tests, and records which lines each of them runs.

Nothing here may import the gateway: a module that is imported before a mutant is in place stays unchanged.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Container, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bench.mutants.child_trace import TRACE_FILE, TRACE_FOLDER

IMPORT = ""
"""Replaces the name of a test for lines that run before the first test, when a module is imported."""


class Selection:
    """Runs the given tests only, and remembers the first that failed.

    Args:
        tests: ids of the tests to run, the likeliest to fail first; ``None`` for all.
    """

    def __init__(self, tests: Sequence[str] | None) -> None:
        self._tests = None if tests is None else {test: rank for rank, test in enumerate(tests)}
        self.failed = ""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self._tests is None:
            return
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self._tests])
        rank = self._tests
        items[:] = [item for item in items if item.nodeid in rank]
        # File by file, so that the fixtures that a file's tests share are made once.
        first: dict[object, int] = {}
        for item in items:
            first[item.path] = min(first.get(item.path, len(rank)), rank[item.nodeid])
        items.sort(key=lambda item: (first[item.path], rank[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (import)"


@dataclass(slots=True)
class Trace:
    """The record of one test.

    Attributes:
        outcome: ``passed``, ``failed`` or ``skipped``.
        duration_s: seconds by the clock.
        cpu_s: seconds of processor time, of this process and of the children that it waited for.
        lines: numbers of the lines that it ran, by the file's path from the project's root.
    """

    outcome: str = "passed"
    duration_s: float = 0.0
    cpu_s: float = 0.0
    lines: dict[str, set[int]] = field(default_factory=dict)


class Recorder:
    """Records the lines of the gateway that each test runs, in all threads and, with their help, child processes.

    A child process that runs Python finds ``sitecustomize.py`` in the workspace, which is
    :mod:`bench.mutants.child_trace`.

    Args:
        known: tests that are left out.
    """

    def __init__(self, root: Path, child_file: Path, known: Container[str] = ()) -> None:
        self.traces: dict[str, Trace] = {IMPORT: Trace()}
        self._root = f"{root}/"
        self._child_file = child_file
        self._known = known
        self._lines = self.traces[IMPORT].lines
        self._names: dict[str, str] = {}

    def start(self) -> None:
        os.environ[TRACE_FILE], os.environ[TRACE_FOLDER] = str(self._child_file), self._root
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def stop(self) -> None:
        sys.settrace(None)
        threading.settrace(None)
        for test, lines in read_child_lines(self._child_file).items():
            for file, numbers in lines.items():
                self.traces.setdefault(test, Trace()).lines.setdefault(file, set()).update(numbers)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._known]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        trace = self.traces.setdefault(item.nodeid, Trace())
        self._lines = trace.lines
        if sys.gettrace() is None:  # a test took it off
            sys.settrace(self._enter)
        before_s = _cpu_s()
        try:
            return (yield)
        finally:
            trace.cpu_s += _cpu_s() - before_s

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        trace = self.traces[report.nodeid]
        trace.duration_s += report.duration
        if report.outcome != "passed" and trace.outcome != "failed":
            trace.outcome = report.outcome

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Any:
        file = frame.f_code.co_filename
        if file not in self._names:
            is_ours = file.startswith(f"{self._root}gateway/")
            self._names[file] = file.removeprefix(self._root) if is_ours else ""
        return self._line if self._names[file] else None

    def _line(self, frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            self._lines.setdefault(self._names[frame.f_code.co_filename], set()).add(frame.f_lineno)
        return self._line


def _cpu_s() -> float:
    return sum(os.times()[:4])


def read_child_lines(file: Path) -> Mapping[str, dict[str, set[int]]]:
    """Return the lines that child processes ran, by test and file."""
    found: dict[str, dict[str, set[int]]] = {}
    if file.exists():
        for row in file.read_text(encoding="utf-8").splitlines():
            test, _, place = row.partition("\t")
            name, _, number = place.partition("\t")
            if number.isdecimal():  # a process that was killed may have left half a row
                found.setdefault(test, {}).setdefault(name, set()).add(int(number))
    return found
