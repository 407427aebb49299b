"""Records which lines of the gateway a child process of a test runs.

A workspace has it as ``sitecustomize.py``, so that every Python process begins with it: it imports next to nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType
from typing import Any

TRACE_FILE = "MUTANTS_TRACE_FILE"
TRACE_FOLDER = "MUTANTS_TRACE_FOLDER"


def trace_child() -> None:
    """Append to the trace file each line of the gateway that this process runs, once, as soon as it runs.

    Raises:
        KeyError: the process was not started by a test that is recorded.
    """
    root, file = os.environ[TRACE_FOLDER], os.environ[TRACE_FILE]
    prefix = f"{root}gateway/"
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    seen: set[tuple[str, int]] = set()
    out = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def enter(frame: FrameType, _event: str, _argument: object) -> Any:
        return line if frame.f_code.co_filename.startswith(prefix) else None

    def line(frame: FrameType, event: str, _argument: object) -> Any:
        key = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and key not in seen:
            seen.add(key)
            os.write(out, f"{test}\t{key[0].removeprefix(root)}\t{key[1]}\n".encode())
        return line

    threading.settrace(enter)
    sys.settrace(enter)


if __name__ == "sitecustomize" and TRACE_FILE in os.environ:
    trace_child()
