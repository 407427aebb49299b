"""Connections to Chroma, a server or a folder, and plain messages for its errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import chromadb
import httpx
from chromadb.api import ClientAPI
from chromadb.api.models.Collection import Collection
from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT, Settings
from chromadb.errors import ChromaError, NotFoundError

from gateway.bulk.rows import BulkError
from gateway.bulk.stores.folders import check_folder
from gateway.bulk.stores.patience import PATIENCE_S, RETRY_HINT, insist
from gateway.bulk.stores.protocol import Place
from gateway.config.wording import cut, did_you_mean, enumerate_names, quote

Result = TypeVar("Result")


_TIMEOUT_S: Final = 60.0
_FULL: Final = "disk is full"


class Connection:
    """A client of Chroma. Used from one thread at a time.

    Args:
        is_source: the store must exist.

    Raises:
        BulkError: the folder does not contain a store, or the server cannot be reached.
    """

    def __init__(self, place: Place, *, is_source: bool) -> None:
        if place.location:
            check_folder(place, "chroma.sqlite3", must_exist=is_source)
        self.place = place
        self._key = os.environ.get(place.key or "") or None
        try:
            self.client = self._connect()
        except (ChromaError, httpx.HTTPError, ValueError, OSError, RuntimeError) as error:
            raise BulkError(self._explain(error, place.store, has_responded=False)) from error
        for session in self._sessions():
            session.timeout = httpx.Timeout(_TIMEOUT_S)

    def _connect(self) -> ClientAPI:
        place = self.place
        settings = Settings(anonymized_telemetry=False)
        tenant = place.options.get("tenant", DEFAULT_TENANT)
        database = place.options.get("database", DEFAULT_DATABASE)
        if place.location:
            return chromadb.PersistentClient(place.location, settings, tenant, database)
        # Servers read one of these two headers.
        headers = {"Authorization": f"Bearer {self._key}", "X-Chroma-Token": self._key} if self._key else None
        return chromadb.HttpClient(place.host, place.port, place.is_secure, headers, settings, tenant, database)

    def call(self, ask: Callable[[], Result], where: str) -> Result:
        """Return the result of a request, repeating it while the server is briefly unavailable.

        Args:
            where: the collection, for messages.

        Raises:
            BulkError: the server rejects the request, or stays unavailable.
        """
        try:
            return insist(ask, _pause_after, PATIENCE_S)
        except (ChromaError, httpx.HTTPError, ValueError, OSError, RuntimeError) as error:
            raise BulkError(self._explain(error, where, has_responded=True)) from error

    def find(self, collection: str) -> Collection | None:
        """Return a collection if it exists.

        Raises:
            BulkError: the server fails.
        """

        def get() -> Collection | None:
            try:
                # The collection's own embedding function is not needed, and may require a package or a key.
                return self.client.get_collection(collection, embedding_function=None)
            except NotFoundError:
                return None

        return self.call(get, self.place.named(collection))

    def get(self, collection: str) -> Collection:
        """Return a collection.

        Raises:
            BulkError: the collection does not exist, or the server fails.
        """
        found = self.find(collection)
        if found is None:
            names = self.call(lambda: [other.name for other in self.client.list_collections()], self.place.store)
            hint = did_you_mean(collection, names) or ";"
            there = f"it has {enumerate_names(sorted(names)[:20])}" if names else "it has no collections"
            raise BulkError(f"{self.place.store} has no collection {quote(collection)}{hint} {there}")
        return found

    def close(self) -> None:
        """Close the client."""
        sessions = list(self._sessions())
        self.client.close()  # type: ignore[attr-defined]  # its interface does not declare it
        for session in sessions:
            session.close()

    def _sessions(self) -> Iterator[httpx.Client]:
        """Yield the client's connections to a server; the client itself neither sets timeouts nor closes them."""
        for client in (self.client, getattr(self.client, "_admin_client", None)):
            session = getattr(getattr(client, "_server", None), "_session", None)
            if isinstance(session, httpx.Client):
                yield session

    def _explain(self, error: Exception, where: str, *, has_responded: bool) -> str:
        message = cut(str(error), 300) or type(error).__name__
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if status in (401, 403) or (isinstance(error, ChromaError) and error.code() in (401, 403)):
            if self._key:
                return f"{where} rejects the key in {self.place.secret}: {message}"
            return f"{where} needs a key: {self.place.remedy}"
        if _pause_after(error) is not None and has_responded:
            return f"{where} has gone away: {message}; {RETRY_HINT}"
        if not has_responded:
            problem = "cannot be opened as a Chroma store" if self.place.location else "cannot be reached"
            return f"{where} {problem}: {message}"
        room = "; make room, and start the same command again" if _FULL in message else ""
        return f"{where} rejects a request: {message}{room}"


def _pause_after(error: Exception) -> float | None:
    """Return the seconds to wait before the same request may succeed; ``None`` if it never will."""
    match error:
        case _ if _FULL in str(error):  # the disk is full, and will not have room soon
            return None
        case httpx.HTTPStatusError() if error.response.status_code in (429, 500, 502, 503, 504):
            return 0.0
        case httpx.TransportError() if "SSL" not in str(error):
            return 0.0
        case ChromaError() if error.code() in (429, 500, 503):
            return 0.0
    return None
