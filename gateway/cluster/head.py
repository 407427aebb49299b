"""The head of a Ray cluster: whether it answers, and what its loss means.

A process that cannot reach the head for ``RAY_gcs_rpc_server_reconnect_timeout_s`` (60 s by default) is ended by Ray, from
its C++ code and without notice to its clients. The replicas end in the same way.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog

log = structlog.get_logger(__name__)

# How long to try at the start, in seconds: the head may be starting too. Ray itself would try for two minutes.
_START_S: Final = 10.0
_ATTEMPT_S: Final = 2.0
_INTERVAL_S: Final = 2.0
# What a client of HTTP/2 sends first, with empty settings. A server of gRPC, such as the head, answers with its own.
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_RAY_ENDS, _RAY_ENDS_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
_TO_DRAIN_S: Final = 15.0


def patience_s() -> float:
    """Return how long a front waits for a lost head, in seconds: it needs the rest of Ray's limit to stop properly."""
    ends_s = _RAY_ENDS_S
    with suppress(ValueError):
        ends_s = float(os.environ.get(_RAY_ENDS) or ends_s)
    return max(ends_s / 2, ends_s - _TO_DRAIN_S)


def split_address(address: str) -> tuple[str, int]:
    """Return the host and the port of ``HOST:PORT``; an IPv6 address may be in brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def require(address: str) -> None:
    """Connect to the head once.

    Raises:
        ConnectionError: nothing listens there, or something else: Ray itself would try for minutes.
    """
    where, deadline = split_address(address), time.monotonic() + _START_S
    while True:
        try:
            _greet(where)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"{address}: {error.strerror or error}") from error
            time.sleep(0.25)


def _greet(where: tuple[str, int]) -> None:
    """Connect to a server, and check that it speaks gRPC.

    Raises:
        OSError: it cannot be reached, or speaks something else.
    """
    with socket.create_connection(where, timeout=_ATTEMPT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        connection.sendall(_PREFACE)
        answer = connection.recv(9)
        if answer[3:4] != b"\x04":  # the kind of a frame with settings
            raise ConnectionAbortedError(
                "the server there is not the head of a Ray cluster, whose port is 6379 by default"
            )


async def watch(address: str, on_lost: Callable[[str], None]) -> None:
    """Connect to the head every few seconds, and call ``on_lost`` with the reason once it has not answered for too long."""
    silent_since: float | None = None
    while True:
        await asyncio.sleep(_INTERVAL_S)
        problem = await _problem(address)
        if not problem:
            if silent_since is not None:
                log.info("cluster_head_back", head=address, seconds=round(time.monotonic() - silent_since))
            silent_since = None
            continue
        if silent_since is None:
            silent_since = time.monotonic()
            log.warning("cluster_head_lost", head=address, reason=problem, ends_after_s=patience_s())
        elif (silent_s := time.monotonic() - silent_since) >= patience_s():
            on_lost(f"the head of the Ray cluster, {address}, has not answered for {silent_s:.0f} s: {problem}")
            return


async def _problem(address: str) -> str:
    """Return why the head cannot be reached; empty if it can."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_ATTEMPT_S):
            _reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        return os.strerror(error.errno) if error.errno else str(error) or "no answer"
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return ""
