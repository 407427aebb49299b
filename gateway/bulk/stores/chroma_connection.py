"""Connections to Chroma, a server or a folder, and plain messages for its errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Final, TypeVar
from urllib import parse

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
from gateway.telemetry.tracebacks import chain

Result = TypeVar("Result")


_TIMEOUT_S: Final = 60.0
_FULL: Final = "disk is full"
_PASSING: Final = (429, 500, 502, 503, 504)


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
            if not place.location:
                self._check_server()
            self.client = self._connect()
        except (ChromaError, httpx.HTTPError, ValueError, OSError, RuntimeError) as error:
            raise BulkError(self._explain(error, place.store, has_responded=False)) from error
        for session in self._sessions():
            session.timeout = httpx.Timeout(_TIMEOUT_S)

    @property
    def _headers(self) -> dict[str, str] | None:
        # Servers read one of these two.
        return {"Authorization": f"Bearer {self._key}", "X-Chroma-Token": self._key} if self._key else None

    def _check_server(self) -> None:
        """Send the client's first requests: the client itself would wait for their responses without a limit."""
        place = self.place
        host = f"[{place.host}]" if ":" in place.host else place.host
        url = f"{'https' if place.is_secure else 'http'}://{host}:{place.port}/api/v2"
        tenant = f"{url}/tenants/{parse.quote(self._tenant)}"
        with httpx.Client(headers=self._headers, timeout=_TIMEOUT_S) as http:
            http.get(f"{url}/auth/identity").raise_for_status().json()
            for path in (tenant, f"{tenant}/databases/{parse.quote(self._database)}"):
                http.get(path)  # the client explains errors better

    def _connect(self) -> ClientAPI:
        place = self.place
        settings = Settings(anonymized_telemetry=False)
        at = settings, self._tenant, self._database
        if place.location:
            return chromadb.PersistentClient(place.location, *at)
        return chromadb.HttpClient(place.host, place.port, place.is_secure, self._headers, *at)

    @property
    def _tenant(self) -> str:
        return self.place.options.get("tenant", DEFAULT_TENANT)

    @property
    def _database(self) -> str:
        return self.place.options.get("database", DEFAULT_DATABASE)

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
        except Exception as error:  # of a response that is not JSON, which has no class but this
            if _status_of(error) is None:
                raise
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
        message = cut(str(error).partition("\n")[0], 300) or type(error).__name__
        if (status := _status_of(error)) in (401, 403):
            return (
                f"{where} rejects the key in {self.place.secret}"
                if self._key
                else f"{where} needs a key: {self.place.remedy}"
            )
        if not has_responded:
            return f"{where} {self._first_problem(error, status, message)}"
        if _pause_after(error) is not None:
            return f"{where} has gone away: {message}; {RETRY_HINT}"
        room = "; make room, and start the same command again" if _FULL in message else ""
        return f"{where} rejects a request: {message}{room}"

    def _first_problem(self, error: Exception, status: int | None, message: str) -> str:
        """Return the problem with a store that has never responded."""
        if self.place.location:
            return f"cannot be opened as a Chroma store: {message}"
        if status is not None or isinstance(error, json.JSONDecodeError):
            return f"does not respond like Chroma: {message}"
        return f"cannot be reached: {message}. Is it running, and is {self.place.port} its port?"


def _status_of(error: Exception) -> int | None:
    """Return the status of the response to a failed request; ``None`` if there was no response."""
    if isinstance(error, ChromaError):
        return int(error.code())
    # For a response that is not JSON, Chroma's client raises an error with the text alone.
    causes = (
        cause.response.status_code for cause, _is_context in chain(error) if isinstance(cause, httpx.HTTPStatusError)
    )
    return next(causes, None)


def _pause_after(error: Exception) -> float | None:
    """Return the seconds to wait before the same request may succeed; ``None`` if it never will."""
    match error:
        case _ if _FULL in str(error):  # the disk is full, and will not have room soon
            return None
        case httpx.TransportError() if "SSL" not in str(error):
            return 0.0
    return 0.0 if _status_of(error) in _PASSING else None
