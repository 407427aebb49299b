"""The standard streams of the process."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that the process was started without.

    Otherwise the next file or socket that is opened gets the number of the stream, and warnings are written there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  open as long as the process runs
