"""Connections to Qdrant, a server or a folder, and plain messages for its errors."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Final, TypeVar

from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException

from gateway.bulk.rows import BulkError
from gateway.bulk.stores.folders import check_folder
from gateway.bulk.stores.patience import PATIENCE_S, insist
from gateway.bulk.stores.protocol import Place
from gateway.bulk.stores.qdrant_errors import explain, pause_after
from gateway.config.wording import did_you_mean, enumerate_names, quote

if TYPE_CHECKING:
    from qdrant_client.http.models import CollectionInfo

Result = TypeVar("Result")

_TIMEOUT_S: Final = 60
_MARKER: Final = "meta.json"
"""A file that Qdrant's client writes into every folder."""


class Connection:
    """A Qdrant client that all users of a place share, because a folder can be opened only once.

    Sources and sinks may use it from several threads.
    """

    _open: Final[dict[tuple[str, str | None], Connection]] = {}
    # Reentrant: the garbage collector may close a forgotten user while this thread holds the lock.
    _lock: Final = threading.RLock()

    def __init__(self, place: Place) -> None:
        self.place = place
        self._num_users = 1
        # For a folder, whose client is not a server: a move reads in one thread while it writes in another.
        self._in_turn = threading.RLock() if place.location else nullcontext()
        # If the server has never responded, the URL is more likely wrong than the server restarting.
        self._has_responded = False
        self._key = os.environ.get(place.key or "") or None
        self._client: QdrantClient | None = None

    @classmethod
    def to(cls, place: Place) -> Connection:
        """Return the open connection to a place, or a new one, which connects on first use."""
        with cls._lock:
            connection = cls._open.get((place.store, place.key))
            if connection is None:
                connection = cls._open[place.store, place.key] = cls(place)
            else:
                connection._num_users += 1
            return connection

    def again(self) -> Connection:
        """Return this connection for another user, who must close it too."""
        with self._lock:
            self._num_users += 1
        return self

    def close(self) -> None:
        """Close the connection if this was its last user."""
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0:
                self._open.pop((self.place.store, self.place.key), None)
                if self._client is not None:
                    self._client.close()

    @property
    def client(self) -> QdrantClient:
        """The client.

        Raises:
            BulkError: the folder cannot be opened.
        """
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def check_source(self) -> None:
        """Check that a folder contains a store, rather than creating one.

        Raises:
            BulkError: the folder does not contain a store.
        """
        if self.place.location:
            check_folder(self.place, _MARKER, must_exist=True)

    def _connect(self) -> QdrantClient:
        place = self.place
        with warnings.catch_warnings():
            # The user may decide to send a key without TLS, for example inside a cluster.
            warnings.simplefilter("ignore")
            if not place.location:
                return QdrantClient(
                    host=place.host,
                    port=place.port,
                    https=place.is_secure,
                    prefix=place.path or None,
                    api_key=self._key,
                    timeout=_TIMEOUT_S,
                    check_compatibility=False,
                )
            check_folder(place, _MARKER, must_exist=False)
            try:
                # Several threads use sources and sinks in turn.
                return QdrantClient(path=place.location, force_disable_check_same_thread=True)
            except (RuntimeError, OSError, ValueError, KeyError, TypeError, sqlite3.Error) as error:
                reason = "another process uses it" if "already accessed" in str(error) else str(error)
                raise BulkError(f"the folder {place.location} cannot be opened as a Qdrant store: {reason}") from error

    def call(self, ask: Callable[[QdrantClient], Result], collection: str) -> Result:
        """Return the result of a request, repeating it while the server is briefly unavailable.

        Args:
            ask: sends the request; must be idempotent, because it may be called again.
            collection: the collection of the request, for messages.

        Raises:
            BulkError: the server rejects the request, or stays unavailable.
        """
        try:
            with self._in_turn:
                result = insist(lambda: ask(self.client), pause_after, PATIENCE_S if self._has_responded else 0.0)
        except (ApiException, QdrantException) as error:
            raise BulkError(
                explain(error, self.place, collection, self._key is not None, self._has_responded)
            ) from error
        except json.JSONDecodeError as error:
            raise BulkError(f"{self.place.store} does not respond like Qdrant: its response is not JSON") from error
        except (ValueError, RuntimeError, OSError, sqlite3.Error) as error:
            # Errors of a folder, or values that cannot be serialized.
            room = "; make room, and start the same command again" if "full" in str(error) else ""
            raise BulkError(f"{self.place.named(collection)}: {error}{room}") from error
        self._has_responded = True
        return result

    def read_info(self, collection: str) -> CollectionInfo:
        """Return a collection's settings, by its name or an alias.

        Raises:
            BulkError: the collection does not exist, or the server fails.
        """
        if not self.call(lambda client: client.collection_exists(collection), collection):
            names = self.call(lambda client: [found.name for found in client.get_collections().collections], collection)
            hint = did_you_mean(collection, names) or ";"
            there = f"it has {enumerate_names(sorted(names)[:20])}" if names else "it has no collections"
            raise BulkError(f"{self.place.store} has no collection {quote(collection)}{hint} {there}")
        return self.call(lambda client: client.get_collection(collection), collection)
