"""The addresses of each model's replicas, which Ray Serve sends to every process with a handle whenever they change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, TypeAlias

from gateway.cluster.line import Place

Watcher: TypeAlias = Callable[[Mapping[str, Place]], None]
"""Called with the places of all replicas of a model, by replica id."""


class Directory:
    """The replicas of all deployments that this process watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, Mapping[str, Place]] = {}
        self._watchers: dict[str, list[tuple[asyncio.AbstractEventLoop, Watcher]]] = {}

    def publish(self, name: str, places: Mapping[str, Place]) -> None:
        """Record the addresses of a deployment's replicas. Ray Serve's thread calls this."""
        with self._lock:
            self._places[name] = places
            watchers = list(self._watchers.get(name, ()))
        for loop, watcher in watchers:
            if not loop.is_closed():
                loop.call_soon_threadsafe(watcher, places)

    def watch(self, name: str, watcher: Watcher) -> Callable[[], None]:
        """Call a function on this event loop with the current places, and after each change.

        Returns a function that ends these calls.
        """
        entry = (asyncio.get_running_loop(), watcher)
        with self._lock:
            self._watchers.setdefault(name, []).append(entry)
            places = self._places.get(name, {})
        watcher(places)

        def end() -> None:
            with self._lock, suppress(ValueError):  # it may be called twice
                self._watchers[name].remove(entry)

        return end


DIRECTORY: Final = Directory()


def place_of(replica_id: str, metadata: Mapping[str, Any]) -> Place:
    """Parse the place that a replica announced."""
    return Place(id=replica_id, **metadata)
