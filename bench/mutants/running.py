"""Runs pytest next to a change: in a copy of the project, in a process forked from one that has the libraries loaded.

The parent never imports the gateway, so a child imports it with the change in place; and it starts no threads, so that
forking is safe.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from bench.mutants import child_trace
from bench.mutants.plugin import Recorder, Selection
from bench.mutants.usage import Limits, Usage
from bench.processes import ROOT

_POLL_S = 0.02
ARGUMENTS = [
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:ddtrace",
    # The parent has imported pytest's plugins already.
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]
_OURS = ("gateway", "tests", "bench", "conftest", "loadtest", "docs", "deploy", "clients", "examples")
# Modules that start threads, which a fork would lose, or that change others as they are imported.
_NEVER_PRELOADED = (
    "__main__",
    "chromadb",
    "ddtrace",
    "gevent",
    "grpc",
    "lancedb",
    "locust",
    "milvus_lite",
    "pymilvus",
    "ray",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run of pytest.

    Attributes:
        status: pytest's status: 0 passed, 5 no test was run, others failed; -1 for a run that exceeded a limit, -2 for one
            that was ended from outside.
        failed: the first test that failed, if any.
        detail: that test, the limit that was exceeded, or the end of the output.
    """

    status: int
    failed: str
    detail: str

    @property
    def is_passed(self) -> bool:
        return self.status in (0, 5)

    @property
    def is_lost(self) -> bool:
        return self.status == -2


class Workspace:
    """A copy of the project without the files that git ignores; ``.venv`` and ``build`` are links."""

    def __init__(self, folder: Path, source: Path = ROOT) -> None:
        self.root = folder / "project"
        self.folder = folder
        self.temporary = folder / "temporary"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=source, capture_output=True, check=False
        )
        if listed.returncode == 0:
            names = [Path(name) for name in listed.stdout.decode().split("\0") if name]
        else:
            names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
        for name in names:
            if (source / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, self.root / name)
        for linked in (".venv", "build"):
            if (source / linked).exists() and not (self.root / linked).exists():
                (self.root / linked).symlink_to((source / linked).resolve())
        shutil.copy2(child_trace.__file__, self.root / "sitecustomize.py")
        self._num_changes = 0
        self._original: tuple[Path, bytes, float] | None = None

    def take_compiled(self, other: Workspace) -> None:
        """Copy the compiled files of another copy of the same sources, instead of compiling them for each change."""
        for path in other.root.rglob("__pycache__"):
            if not path.is_relative_to(other.root / "build") and not path.is_relative_to(other.root / ".venv"):
                shutil.copytree(path, self.root / path.relative_to(other.root), dirs_exist_ok=True)

    def change(self, path: Path, source: str) -> None:
        """Replace the text of a file until :meth:`restore`."""
        modified_s = path.stat().st_mtime
        self._original = path, path.read_bytes(), modified_s
        self._num_changes += 1
        path.write_text(source, encoding="utf-8")
        # A compiled file holds its source's modification time in whole seconds.
        os.utime(path, (modified_s, modified_s + 10 * self._num_changes))

    def restore(self) -> None:
        """Restore the changed file."""
        if self._original is not None:
            path, content, modified_s = self._original
            path.write_bytes(content)
            os.utime(path, (modified_s, modified_s))
            self._original = None


def preload(workspace: Workspace, files: Sequence[str]) -> None:
    """Import into this process the modules that the tests in ``files`` import, except the project's own."""

    def collect() -> Mapping[str, object]:
        import pytest

        sys.dont_write_bytecode = False  # for take_compiled()
        pytest.main(["--collect-only", *ARGUMENTS, *files])
        return {"modules": list(sys.modules)}

    os.environ["DO_NOT_TRACK"] = "1"  # otherwise Infinity starts a thread that reports its use
    child = Child(workspace, collect, Limits(cpu_s=300, still_s=60, wall_s=1800))
    result = child.wait()
    modules = result.get("modules", [])
    root = logging.getLogger()  # Infinity configures it when it is imported, and HTTPX would log to the tests' output
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules if isinstance(modules, list) else []:
            if name.partition(".")[0] not in (*_OURS, *_NEVER_PRELOADED) and not name.startswith("test_"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    root.handlers[:] = handlers
    root.setLevel(level)
    # A garbage collection in a child would touch, and so copy, every page that it shares with this process.
    gc.collect()
    gc.freeze()


def end_with(work: Callable[[], None]) -> NoReturn:
    """Run a function in a process that was just forked, as the leader of a new group, and end the process.

    Its status is 0, or 1 if the function raises an exception.
    """
    status = 1
    try:
        os.setsid()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Child:
    """A forked process that runs a function in a workspace and returns a dictionary; at a limit it is killed."""

    def __init__(
        self, workspace: Workspace, work: Callable[[], Mapping[str, object]], limits: Limits, name: str = "result"
    ) -> None:
        self._prepare(workspace, limits, name)
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            end_with(lambda: self._run(work))
        self._usage = Usage(self._pid)

    def _prepare(self, workspace: Workspace, limits: Limits, name: str) -> None:
        self.workspace = workspace
        self._result = workspace.folder / name
        self._log = workspace.folder / "log"
        self._result.unlink(missing_ok=True)
        self._limits = limits
        self._status: int | None = None
        self.given_up = ""

    def _run(self, work: Callable[[], Mapping[str, object]]) -> None:
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        root = str(self.workspace.root)
        os.chdir(root)
        sys.path[:] = [root, *(path for path in sys.path if path not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = root
        self._result.write_bytes(pickle.dumps(work()))

    def has_ended(self) -> bool:
        """Whether the process has ended. If it exceeds a limit, it is killed with its children; ``given_up`` names it."""
        if self._status is None:
            self._status = self._poll(os.WNOHANG)
            if self._status is not None:
                self._kill([])
            elif reason := self._usage.exceeded(self._limits):
                self.given_up = reason
                self.kill()
        return self._status is not None

    def kill(self) -> None:
        """End the process and its children."""
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended, and its parent has already noticed
            children = psutil.Process(self._pid).children(recursive=True)
        self._kill(children)
        self._poll(0)
        self._status = -1

    def _poll(self, flags: int) -> int | None:
        """Return the process's status; ``None`` while it runs."""
        pid, status = os.waitpid(self._pid, flags)
        return status if pid else None

    @property
    def was_ended(self) -> bool:
        """Whether the process was ended from outside, such as by a machine without memory."""
        status = self._status or 0
        return status > 0 and os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM)

    def wait(self) -> Mapping[str, object]:
        """Return the function's result; empty if it took too long or ended otherwise."""
        while not self.has_ended():
            time.sleep(_POLL_S)
        return self.result()

    def result(self) -> Mapping[str, object]:
        if not self._result.exists():
            return {}
        result: Mapping[str, object] = pickle.loads(self._result.read_bytes())  # noqa: S301  our own child wrote it
        return result

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def _kill(self, children: Sequence[psutil.Process]) -> None:
        """Kill the child's process group, which outlives it, and children that created a separate group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def run_tests(workspace: Workspace, files: Sequence[str], tests: Sequence[str] | None) -> Mapping[str, object]:
    """Run tests in this process, and return pytest's ``status``, and in ``failed`` the first test that failed."""
    import pytest

    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    selection = Selection(tests)
    status = pytest.main([*ARGUMENTS, f"--basetemp={workspace.temporary}", *files], plugins=[selection])
    return {"status": int(status), "failed": selection.failed}


def record_tests(workspace: Workspace, file: str, known: Container[str]) -> Mapping[str, object]:
    """Run the tests of a file except the known ones, and return a trace of each in ``traces``, and pytest's ``status``."""
    import pytest

    recorder = Recorder(workspace.root, workspace.folder / "child_lines", known)
    (workspace.folder / "child_lines").unlink(missing_ok=True)
    arguments = [argument for argument in ARGUMENTS if argument != "-x"]
    recorder.start()
    try:
        status = pytest.main([*arguments, f"--basetemp={workspace.temporary}", file], plugins=[recorder])
    finally:
        recorder.stop()
    return {"traces": recorder.traces, "status": int(status)}


def outcome_of(child: Child) -> Outcome:
    """Return the outcome of :func:`run_tests` in a child."""
    if child.given_up:
        return Outcome(-1, "", child.given_up)
    if child.was_ended:
        return Outcome(-2, "", "it was ended from outside")
    result = child.result()
    status, failed = result.get("status"), result.get("failed")
    if not isinstance(status, int):
        return Outcome(1, "", f"the process ended: {child.log_tail()}")
    return Outcome(status, str(failed or ""), str(failed) if failed else child.log_tail())


@contextlib.contextmanager
def workspaces(number: int, source: Path = ROOT) -> Iterator[list[Workspace]]:
    """Make copies of the project, and remove them in the end."""
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        yield [Workspace(Path(folder) / str(i), source) for i in range(number)]
