"""Look up the addresses of a name, in threads, because the system's resolver blocks and may never return."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Final, TypeAlias

LookUp: TypeAlias = Callable[[str, int], Iterable[str]]
"""Returns the addresses of a name, in any order; raises ``OSError`` if it has no address, or the resolver fails."""

TIMEOUT_S: Final = 5.0


class NotResolved(Exception):
    """A name could not be resolved to an address.

    Attributes:
        outcome: ``failed`` or ``timeout``, for the metrics.
    """

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


def system_look_up(host: str, port: int) -> list[str]:
    """Ask the system's resolver: ``/etc/hosts``, then the DNS servers, A and AAAA.

    Addresses of a family that this machine does not use are left out, because they could not be reached.

    Raises:
        OSError: the name has no address, or the resolver does not answer.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(address[0]) for *_, address in found]


class Resolver:
    """Looks names up, each in at most one thread at a time, however long the system's resolver hangs.

    Args:
        look_up: looks one name up, and blocks.
        timeout_s: the seconds to wait for an answer.
    """

    def __init__(self, look_up: LookUp = system_look_up, timeout_s: float = TIMEOUT_S) -> None:
        self._look_up = look_up
        self._timeout_s = timeout_s
        self._running: dict[tuple[str, int], Future[list[str]]] = {}
        self._hanging: set[tuple[str, int]] = set()

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """Return the distinct addresses of a name, IPv4 first, in numerical order.

        Raises:
            NotResolved: it has none, or the resolver fails or is too slow.
        """
        key = (host, port)
        if key in self._hanging and key in self._running:  # no further waiters, which would add up
            raise NotResolved("timeout", f"the resolver still has not responded for {host!r}")
        try:
            answer = asyncio.wrap_future(self._running.get(key) or self._begin(key))
            addresses = await asyncio.wait_for(answer, self._timeout_s)
        except TimeoutError:
            self._hanging.add(key)
            raise NotResolved(
                "timeout", f"the resolver has not responded for {host!r} in {self._timeout_s:g} s"
            ) from None
        except (OSError, ValueError) as error:  # a label that is too long is a ValueError
            raise NotResolved(
                "failed", f"{host!r} cannot be resolved: {getattr(error, 'strerror', None) or error}"
            ) from error
        if not addresses:
            raise NotResolved("failed", f"{host!r} has no address")
        return addresses

    def _begin(self, key: tuple[str, int]) -> Future[list[str]]:
        future: Future[list[str]] = Future()
        future.set_running_or_notify_cancel()  # a waiter that times out must not cancel it for the others
        self._hanging.discard(key)
        self._running[key] = future
        # A daemon: the end of the process does not wait for it.
        threading.Thread(target=self._run, args=(key, future), name=f"resolve-{key[0]}", daemon=True).start()
        return future

    def _run(self, key: tuple[str, int], future: Future[list[str]]) -> None:
        try:
            addresses = sorted({ipaddress.ip_address(text) for text in self._look_up(*key)}, key=_rank)
            answer, error = [str(address) for address in addresses], None
        except Exception as failure:  # the waiter handles it
            answer, error = [], failure
        self._running.pop(key, None)
        if error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)


def _rank(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[int, int]:
    return address.version, int(address)


RESOLVER: Final = Resolver()
"""The resolver of this process: models whose servers have the same name share a look-up."""
