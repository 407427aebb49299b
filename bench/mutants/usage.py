"""Limits of a run of tests: processor time, and time without progress.

Neither depends on what else the machine does, so a busy machine gives up on no run that an idle one would finish.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

# In between, a process that ends takes its last bit of time with it, uncounted.
_LOOK_S = 0.25
# Less than this share of a core in use or waited for: the run stands still. A loop that only polls is below it.
_STILL = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a run of tests.

    Attributes:
        cpu_s: seconds of processor time, of all its processes together.
        still_s: seconds in which they neither run nor wait for a core.
        wall_s: seconds by the clock, for cases that the other two miss.
    """

    cpu_s: float
    still_s: float
    wall_s: float


class Usage:
    """Counts the processor time of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = self._looked_at = time.monotonic()
        self._threads: dict[str, tuple[float, float]] = {}
        self.cpu_s = 0.0
        self.still_s = 0.0

    def exceeded(self, limits: Limits) -> str:
        """Return which limit is exceeded, in words; empty if none is."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_S:
            self._look(now - self._looked_at)
            self._looked_at = now
        if self.cpu_s > limits.cpu_s:
            return f"took {self.cpu_s:.0f} s of processor time"
        if self.still_s > limits.still_s:
            return f"stood still for {self.still_s:.0f} s"
        return f"ran for {limits.wall_s:.0f} s" if now - self._began > limits.wall_s else ""

    def _look(self, elapsed_s: float) -> None:
        ran_s = waited_s = 0.0
        threads: dict[str, tuple[float, float]] = {}
        for path in _thread_folders(self._pid):
            if (times := _times_of(path)) is not None:
                before = self._threads.get(str(path), (0.0, 0.0))
                threads[str(path)] = times
                ran_s += times[0] - before[0]
                waited_s += times[1] - before[1]
        self._threads = threads
        self.cpu_s += ran_s
        if ran_s + waited_s < _STILL * elapsed_s:
            self.still_s += min(elapsed_s, 4 * _LOOK_S)  # and not hours, after a machine was suspended


def _thread_folders(pid: int) -> Iterable[Path]:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (root := psutil.Process(pid), *root.children(recursive=True)):
            with contextlib.suppress(OSError):
                yield from Path(f"/proc/{process.pid}/task").iterdir()


def _times_of(thread: Path) -> tuple[float, float] | None:
    """Return the seconds that a thread of Linux ran, and that it waited for a core."""
    try:
        ran, waited, *_ = (thread / "schedstat").read_text().split()
    except (OSError, ValueError):  # it has ended
        return None
    return int(ran) / 1e9, int(waited) / 1e9
