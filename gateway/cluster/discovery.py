"""The addresses of each model's replicas, which Ray Serve sends to every process with a handle whenever they change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any, Final, TypeAlias

from gateway.cluster.line import Place

Watcher: TypeAlias = Callable[[Mapping[str, Place]], None]
"""Called with the places of all replicas of a model, by replica id."""
_Entry: TypeAlias = tuple[asyncio.AbstractEventLoop, Watcher]


class Directory:
    """The replicas of all deployments that this process watches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, Mapping[str, Place]] = {}
        self._watchers: dict[str, list[_Entry]] = {}

    def publish(self, name: str, places: Mapping[str, Place]) -> None:
        """Record the addresses of a deployment's replicas. Ray Serve's thread calls this."""
        with self._lock:
            self._places[name] = places
            watchers = list(self._watchers.get(name, ()))
        for entry in watchers:
            if not entry[0].is_closed():
                entry[0].call_soon_threadsafe(self._tell, name, entry, places)

    def _tell(self, name: str, entry: _Entry, places: Mapping[str, Place]) -> None:
        if entry in self._watchers[name]:  # it may have ended in the meantime
            entry[1](places)

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
    """Parse the place that a replica announced.

    Fields that this version does not know are left out: the replica may belong to gateways of a newer one, and an error here
    would end Ray Serve's announcements of all models.
    """
    known = {field.name for field in fields(Place)}
    return Place(id=replica_id, **{name: value for name, value in metadata.items() if name in known})
