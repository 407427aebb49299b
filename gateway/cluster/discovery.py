"""Where the replicas of each model are: what Ray Serve tells every process that has a handle, as soon as it changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, TypeAlias

from gateway.cluster.line import Place

Watcher: TypeAlias = Callable[[Mapping[str, Place]], None]
"""Takes the places of all replicas of a model, by their ids."""


class Directory:
    """The replicas of all deployments that this process watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, Mapping[str, Place]] = {}
        self._watchers: dict[str, list[tuple[asyncio.AbstractEventLoop, Watcher]]] = {}

    def publish(self, name: str, places: Mapping[str, Place]) -> None:
        """Note where the replicas of a deployment are; called by Ray Serve's thread."""
        with self._lock:
            self._places[name] = places
            watchers = list(self._watchers.get(name, ()))
        for loop, watcher in watchers:
            if not loop.is_closed():
                loop.call_soon_threadsafe(watcher, places)

    def watch(self, name: str, watcher: Watcher) -> Callable[[], None]:
        """Call a function on this event loop with the present places, and at each change; return what ends that."""
        entry = (asyncio.get_running_loop(), watcher)
        with self._lock:
            self._watchers.setdefault(name, []).append(entry)
            places = self._places.get(name, {})
        watcher(places)

        def end() -> None:
            with self._lock, suppress(ValueError):  # it may be ended twice
                self._watchers[name].remove(entry)

        return end


DIRECTORY: Final = Directory()


def place_of(replica_id: str, metadata: Mapping[str, Any]) -> Place:
    """Return the place that a replica has announced."""
    return Place(id=replica_id, **metadata)
