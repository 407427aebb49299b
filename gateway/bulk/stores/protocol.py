"""The protocols of stores: of every store for `gateway embed`, and of those that `gateway move` supports."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BadRow, EmbeddedRows, Row, RowId, Sink, Source, SpaceNote
from gateway.types import SparseVector

MEM0_KEY: Final = "MEM0_STORE_KEY"
"""The environment variable that holds the key of Mem0's configuration in this process: places only name variables.

It must not begin with ``GATEWAY_``, because the settings reject such variables.
"""

Moment: TypeAlias = datetime | int | float
"""A point in time in an item's field: a date with its time, or seconds or milliseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Place:
    """A store and a collection or table in it: the parts of ``qdrant://localhost:6333/docs``.

    Attributes:
        kind: the kind of store, such as ``qdrant``.
        location: the folder, file or URI of a store without a server; empty for a server.
        is_secure: connect to the server with TLS.
        path: the part of a server's URL between the host and the collection: a prefix, or a database.
        key: the name of the environment variable with the key or password; ``None`` if Mem0's configuration has none.
            URLs never contain the secret itself.
        options: further settings of the store, from the URL's query.
    """

    kind: str
    collection: str = ""
    location: str = ""
    host: str = ""
    port: int = 0
    user: str = ""
    path: str = ""
    is_secure: bool = False
    key: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """The store without the collection, for messages and as an identity: ``qdrant://localhost:6333``."""
        if self.location:
            return f"{self.kind}:{self.location}"
        scheme = f"{self.kind}+https" if self.is_secure else self.kind
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{user}{host}:{self.port}" + (f"/{self.path}" if self.path else "")

    @property
    def secret(self) -> str:
        """The place of the key or password, for messages."""
        return "Mem0's configuration" if self.key in (None, MEM0_KEY) else f"the environment variable {self.key}"

    @property
    def remedy(self) -> str:
        """The instruction for a store that needs a key, for messages."""
        if self.key in (None, MEM0_KEY):
            return f"set it in {self.secret}"
        return f"set {self.secret}, or name another with ?key_env=NAME"

    def is_same_collection(self, other: Place) -> bool:
        """Return whether both are one collection, regardless of the vector, the user and the ways to write the store."""
        if (self.collection, self._within) != (other.collection, other._within):
            return False
        if "://" in self.location + other.location:
            return self.location.rstrip("/") == other.location.rstrip("/")
        if self.location or other.location:
            return os.path.realpath(self.location) == os.path.realpath(other.location)  # also of links in a circle
        return self.host.lower() == other.host.lower() or _is_one_machine(self.host, other.host)

    @property
    def _within(self) -> tuple[object, ...]:
        """The kind of store and the database, which has the name ``default`` unless the URL names another."""
        tenant, database = (
            self.options.get("tenant", "default_tenant"),
            self.options.get("database", "default_database"),
        )
        return self.kind, bool(self.location), self.port, self.path or "default", tenant, database

    def named(self, collection: str) -> str:
        """Return the URL of a collection of this store, without secrets."""
        return f"{self.store}{'#' if self.location else '/'}{collection}"


def _is_one_machine(one: str, other: str) -> bool:
    """Return whether two hosts are surely one: two names may share the address of a proxy that tells them apart."""
    common = _addresses(one) & _addresses(other)
    return bool(common) and ("127.0.0.1" in common or one in common or other in common)


def _addresses(host: str) -> set[str]:
    """Return the addresses of a host; the name itself if it has none, such as the folder of a socket."""
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return {host}
    return {"127.0.0.1" if address == "::1" else address for address in found}


Mark: TypeAlias = str
"""A moment in a collection's life, in the store's own notation. Only the store can interpret it."""


@dataclass(frozen=True, slots=True)
class Since:
    """A filter for items whose field is later than a point in time."""

    field: str
    moment: Moment


@dataclass(frozen=True, slots=True)
class SinkOptions:
    """The options of a sink.

    Attributes:
        text: the payload field for the text, a path as in `FieldNames`; ``None`` to leave out the text.
        vector: the name of the dense vector, if a store has several; ``None`` for the only one.
        adopts: accept a collection that has vectors but no note, because the user vouches that they are of the same
            space.
        updates: only add the named vector to existing items, and leave their payload and other vectors unchanged.
        like: a collection of the same store that serves as a template: a new collection gets its settings, fields and
            indexes, with the job's width, and each row gets the other vectors of the template's item with the same id.
    """

    text: str | None = "text"
    vector: str | None = None
    adopts: bool = False
    updates: bool = False
    like: str | None = None


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """A collection, as its store describes it.

    Attributes:
        name: the real name, even if the collection was looked up by an alias.
        count: the number of items.
        widths: the widths of its dense vectors by name; a single unnamed vector has the name ``""``.
        notes: the gateway's notes of their spaces, by the same names.
        identity: a value that a later collection of the same name does not have; empty if the store has none.
        has_auto_id: the store makes the ids of new items, and accepts none from applications.
    """

    name: str
    count: int
    widths: Mapping[str, int]
    notes: Mapping[str, SpaceNote]
    identity: str = ""
    has_auto_id: bool = False


@dataclass(frozen=True, slots=True)
class Hit:
    """An item that a search found. A higher score is nearer, whichever distance the store uses."""

    id: RowId
    score: float


Guard: TypeAlias = Callable[[Mapping[RowId, bytes | None]], Collection[RowId]]
"""Receives the hash of each row, as in `MovableStore.digests` (``None``: no such row); returns the ids of rows to keep."""


def not_kept(ids: Iterable[RowId], present: Mapping[RowId, bytes | None], guard: Guard) -> list[RowId]:
    """Return the ids of the rows that a guard does not keep.

    Args:
        present: the hash of each row that exists.
    """
    ids = list(ids)
    kept = guard({row_id: present.get(row_id) for row_id in ids})
    return [row_id for row_id in ids if row_id not in kept]


@runtime_checkable
class GuardedSink(Protocol):
    """A sink of a store with transactions."""

    def write_guarded(self, shard: int, batch: EmbeddedRows, guard: Guard) -> None:
        """Write rows like `Sink.write`, except those that the guard keeps. No other write can come between.

        Args:
            guard: may be called several times: for rows that another program inserts in the meantime, and after a rejected
                write.
        """


class Store(Protocol):
    """A store with collections, or tables. Used from one thread at a time; so are its sources and sinks."""

    @property
    def name(self) -> str:
        """The name of the store in messages and manifests, without passwords."""

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> Source:
        """Return a source for a collection. It is closed separately, and can be used after the store is closed.

        The rows have the store's ids, unless ``names.id`` is a field of the payload.

        Raises:
            BulkError: the gateway cannot read the store, or the store lacks a field or cannot filter by time.
        """

    def sink(self, collection: str, options: SinkOptions) -> Sink:
        """Return a sink for a collection, whose `open` creates it if necessary. It is closed separately, like a source.

        Raises:
            BulkError: the gateway cannot write to the store.
        """

    def close(self) -> None:
        """Close connections and files."""


class MovableStore(Store, Protocol):
    """A store whose collections can move to another model while applications use them.

    Every method raises `BulkError` if the store has gone away or rejects a request, or a collection does not exist.
    """

    def collections(self) -> Sequence[str]:
        """Return the real names of all collections."""

    def describe(self, collection: str) -> CollectionInfo:
        """Return a collection's info, by its name or an alias."""

    def read_ids(self, collection: str, ids: Sequence[RowId], names: FieldNames) -> Iterator[Row | BadRow]:
        """Yield the existing items among these ids, in any order."""

    def digests(self, collection: str) -> Iterator[tuple[RowId, bytes]]:
        """Yield the id of each item and a 16-byte hash of its payload, text included, in ascending order of `sort_key`.

        Equal items in two collections of this store have equal hashes, so reading both in parallel finds added, changed
        and deleted items in constant memory.
        """

    def digests_of(self, collection: str, ids: Sequence[RowId]) -> Mapping[RowId, bytes]:
        """Return the hashes of those of these items that exist."""

    def sort_key(self, row_id: RowId) -> tuple[int, int | str]:
        """Return an id's sort key in the order of `digests`, which all collections of the store share."""

    def mark(self, collection: str, changed_at: str | None) -> Mark | None:
        """Return the present moment for `changes`; ``None`` if the store cannot report changes.

        Args:
            changed_at: the field, as a path, that applications set to the time of each change of an item; ``None`` if
                there is no such field. Stores with an order of all changes do not need it.
        """

    def changes(self, collection: str, since: Mark) -> Iterator[tuple[RowId, bool]]:
        """Yield the id of each item, and whether it may have changed since the mark, in the order of `digests`.

        Payloads are not read, where the store allows that. No change is missed. But a store without an order of changes
        misses the changes of an application that does not set the field, or has a clock that is slow by an hour.
        """

    def filled(self, collection: str, vector: str) -> Iterator[RowId]:
        """Yield the items that have a vector of this name, in the order of `digests`."""

    def delete_vector(self, collection: str, vector: str) -> None:
        """Delete a vector, of all items, and its note.

        Raises:
            BulkError: the store cannot delete it, or it is the only vector.
        """

    def delete_ids(self, collection: str, ids: Sequence[RowId], guard: Guard | None = None) -> None:
        """Delete these items durably, ignoring ids without an item.

        Args:
            guard: returns the items to keep. Without transactions, an application may write between that and the deletion.
        """

    def search(
        self, collection: str, query: npt.NDArray[np.float32] | SparseVector, limit: int, vector: str | None = None
    ) -> Sequence[Hit]:
        """Return the items nearest to a query vector, the nearest first.

        Args:
            query: ``(dimensions,)``, or sparse weights.
            vector: the name of the vector to search, if items have several.
        """

    def vectors(
        self, collection: str, ids: Sequence[RowId], vector: str | None = None
    ) -> Mapping[RowId, npt.NDArray[np.float32]]:
        """Return the dense vectors, ``(dimensions,)``, of these items. Items that lack one are left out.

        A store that normalizes vectors returns them with L2 norm 1.

        Args:
            vector: the name of the vector, if items have several.
        """

    def aliases(self) -> Mapping[str, str]:
        """Return the collection that each alias or view points to."""

    def why_not_flip(self, name: str) -> str:
        """Return the reason why a name cannot be pointed to another collection; empty if it can."""

    def flip(self, name: str, collection: str) -> None:
        """Point a name to another collection atomically: each request sees either the old or the new one. Reversible.

        Raises:
            BulkError: the name cannot be redirected; `why_not_flip` has the reason.
        """

    def delete_alias(self, name: str) -> None:
        """Delete an alias, but not its collection."""

    def delete_collection(self, collection: str, look: Callable[[], None] | None = None) -> None:
        """Delete a collection and its items, by its real name.

        Args:
            look: is called right before the deletion, and raises an error to prevent it. No other program can write into
                the collection between both, where the store has locks.

        Raises:
            BulkError: an alias still points to the collection.
        """
