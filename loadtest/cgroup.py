"""Limit the memory of a process, with a cgroup if possible, or else by watching the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import psutil

_CGROUPS = (
    ("a cgroup (v2)", Path("/sys/fs/cgroup"), "memory.max"),
    ("a cgroup (v1)", Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


class MemoryLimit(Protocol):
    """A memory limit for processes.

    Attributes:
        name: how, for the report.
    """

    name: str

    def add(self, pid: int) -> None:
        """Hold a process to it from now on."""


class _Cgroup:
    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder

    def add(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid))


class _Watch:
    """Kills a process whose resident memory exceeds the limit."""

    name = "watching it"

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.is_over = threading.Event()

    def add(self, pid: int) -> None:
        threading.Thread(target=self._watch, args=(psutil.Process(pid),), daemon=True).start()

    def _watch(self, process: psutil.Process) -> None:
        with suppress(psutil.Error):
            while not self.is_over.wait(0.02):
                if process.memory_info().rss > self._max_bytes:
                    process.kill()


@contextmanager
def limited_memory(max_bytes: int) -> Iterator[MemoryLimit]:
    """Yield a memory limit; processes in it must have ended before the block does."""
    for name, parent, file in _CGROUPS:
        folder = parent / f"loadtest-{os.getpid()}"
        if not _make(folder, file, max_bytes):
            continue
        try:
            yield _Cgroup(name, folder)
        finally:
            with suppress(OSError):
                folder.rmdir()
        return
    watch = _Watch(max_bytes)
    try:
        yield watch
    finally:
        watch.is_over.set()


def _make(folder: Path, file: str, max_bytes: int) -> bool:
    """Make a cgroup; return whether that was possible."""
    try:
        folder.mkdir()
    except OSError:
        return False
    with suppress(OSError):
        if (folder / file).exists():  # else it is a folder like any other
            (folder / file).write_text(str(max_bytes))
            return True
    with suppress(OSError):
        folder.rmdir()
    return False
