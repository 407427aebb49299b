"""Wait for a store that is briefly unavailable."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

Result = TypeVar("Result")

PATIENCE_S: Final = 60.0
"""The seconds that a store may be unavailable: enough for a restart, or a failover to another replica."""

RETRY_HINT: Final = "run the same command again when the store is back, and it continues where it stopped"

_FIRST_PAUSE_S: Final = 0.25
_MAX_PAUSE_S: Final = 8.0


def insist(
    call: Callable[[], Result], pause_after: Callable[[Exception], float | None], patience_s: float = PATIENCE_S
) -> Result:
    """Return the result of a call, repeating it while its errors are temporary.

    Args:
        pause_after: returns the shortest pause in seconds after a temporary error, and ``None`` after other errors.
        patience_s: the limit for all calls together, in seconds.
    """
    end = time.monotonic() + patience_s
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:  # each client library has its own errors, which `pause_after` knows
            shortest = pause_after(error)
            if shortest is None:
                raise
            wait = max(shortest, pause)
            if time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        pause = min(2 * pause, _MAX_PAUSE_S)
