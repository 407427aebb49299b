"""A process that has imported the gateway and collected tests, and forks itself for each change of a function.

Imports and the collection take seconds, and most runs end at the first test that notices the change.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import psutil
import pytest

from bench.mutants.patching import patch
from bench.mutants.plugin import Selection
from bench.mutants.running import ARGUMENTS, Child, Workspace, end_with
from bench.mutants.usage import Limits, Usage

_POLL_S = 0.1
_PARENT_POLL_S = 5.0
_LIMITS = Limits(cpu_s=120.0, still_s=60.0, wall_s=600.0)


class Collected:
    """A process that waits with the tests of some files.

    Attributes:
        is_usable: whether it may be forked: the collection succeeded, and has started no threads.
    """

    def __init__(self, workspace: Workspace, files: Sequence[str]) -> None:
        self.workspace = workspace
        ours, theirs = socket.socketpair()

        def work() -> Mapping[str, object]:
            ours.close()
            return _collect_and_serve(workspace, files, theirs)

        self._child = Child(workspace, work, _LIMITS, name="collected")
        theirs.close()
        self._socket = ours
        self._file = ours.makefile("rb")
        self.is_usable = self._is_ready()

    def _is_ready(self) -> bool:
        """Wait for the end of the collection, which is killed at a limit."""
        while not select.select((self._socket,), (), (), _POLL_S)[0]:
            if self._child.has_ended():
                return False
        return self._file.readline() == b"ready\n"

    def ask(self, question: Mapping[str, object]) -> int:
        """Let it fork for a change; return the process id."""
        self._socket.sendall(orjson.dumps(question) + b"\n")
        return int(self._file.readline())

    def poll(self, flags: int) -> int | None:
        """Return the status of the process that was forked last, as ``os.waitpid`` does."""
        if flags & os.WNOHANG and not select.select((self._socket,), (), (), 0)[0]:
            return None
        return int(self._file.readline())

    def close(self) -> None:
        """End the process."""
        self._file.close()
        self._socket.close()
        if not self._child.has_ended():
            self._child.kill()


class ChildOfCollected(Child):
    """A process that runs some of the collected tests with a change of a function in place.

    Its result lacks ``status`` if the change could not be put in place.
    """

    def __init__(
        self, collected: Collected, module: Path, sources: tuple[str, str], tests: Sequence[str], limits: Limits
    ):
        self._collected = collected
        self._prepare(collected.workspace, limits, "result")
        question = {"module": str(module), "before": sources[0], "after": sources[1], "tests": tests}
        self._pid = collected.ask(question)
        self._usage = Usage(self._pid)

    def _poll(self, flags: int) -> int | None:
        return self._collected.poll(flags)


def _collect_and_serve(workspace: Workspace, files: Sequence[str], asked: socket.socket) -> Mapping[str, object]:
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    server = _Server(workspace, asked)
    status = pytest.main([*ARGUMENTS, f"--basetemp={workspace.temporary}", *files], plugins=[server])
    return {"status": int(status)}


class _Server:
    """A plugin of pytest that forks where the tests would run."""

    def __init__(self, workspace: Workspace, asked: socket.socket) -> None:
        self._workspace = workspace
        self._socket = asked
        self._parent = os.getppid()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if psutil.Process().num_threads() > 1:
            return True
        self._socket.sendall(b"ready\n")
        with self._socket.makefile("rb") as questions:
            while question := self._next(questions):  # empty at the end
                self._answer(session, orjson.loads(question))
        return True

    def _next(self, questions: BinaryIO) -> bytes:
        while not select.select((self._socket,), (), (), _PARENT_POLL_S)[0]:
            if os.getppid() != self._parent:
                return b""
        return questions.readline()

    def _answer(self, session: pytest.Session, question: Mapping[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            end_with(lambda: self._run(session, question))
        self._socket.sendall(b"%d\n" % pid)
        self._socket.sendall(b"%d\n" % os.waitpid(pid, 0)[1])

    def _run(self, session: pytest.Session, question: Mapping[str, Any]) -> None:
        """Run the tests with the change in place, and write the result."""
        result: dict[str, object] = {}
        if patch(Path(question["module"]), question["before"], question["after"]):
            result = _run_items(session, question["tests"])
        (self._workspace.folder / "result").write_bytes(pickle.dumps(result))


def _run_items(session: pytest.Session, tests: Sequence[str]) -> dict[str, object]:
    """Run some of a session's tests up to the first that fails, as pytest does with ``-x``."""
    selection = Selection(tests)
    session.config.pluginmanager.register(selection)
    selection.pytest_collection_modifyitems(session.config, session.items)
    for item, following in zip(session.items, [*session.items[1:], None], strict=True):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail or session.shouldstop:
            break
    session.config.hook.pytest_sessionfinish(session=session, exitstatus=int(bool(selection.failed)))
    return {"status": int(bool(selection.failed)), "failed": selection.failed}
