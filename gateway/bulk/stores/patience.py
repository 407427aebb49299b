"""Wait for a store that is away for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

Result = TypeVar("Result")

PATIENCE_S: Final = 60.0
"""How long a store may be away: a restart, or a failover to another replica."""

GOES_ON: Final = "start the same command again when it is back, and it goes on where it was"

_FIRST_PAUSE_S: Final = 0.25
_MAX_PAUSE_S: Final = 8.0


def insist(
    call: Callable[[], Result], pause_after: Callable[[Exception], float | None], patience_s: float = PATIENCE_S
) -> Result:
    """Return the result of a call, which is made again while it fails for a passing reason.

    Args:
        pause_after: returns the shortest pause in seconds after an error that may pass, and ``None`` after others.
        patience_s: for all calls together.
    """
    end = time.monotonic() + patience_s
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:  # each client has its own; `pause_after` knows them
            shortest = pause_after(error)
            if shortest is None:
                raise
            wait = max(shortest, pause)
            if time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        pause = min(2 * pause, _MAX_PAUSE_S)
