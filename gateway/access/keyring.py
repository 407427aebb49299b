"""The clients of the gateway, identified by the API key of a request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from gateway.config.api_keys import KeyEntry, load_key_file
from gateway.config.settings import Settings
from gateway.errors import ConfigError, Unauthorized
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)

# Seconds between checks of the file: one `stat`, which takes microseconds.
_CHECK_EVERY_S = 1.0

# So that scanners for leaked secrets recognize our keys. Only letters and digits follow: a double click selects all of it.
KEY_PREFIX = "egw_"
_KEY_CHARACTERS = 43  # 256 bits


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request.

    Attributes:
        name: for logs and fairness: the name of its key, or the network address if no keys are required.
        models: the names that the client may use; ``None`` for all.
        requests_per_minute: 0 for no limit, as for the tokens.
    """

    name: str
    models: frozenset[str] | None = None
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    expires: datetime | None = None

    def may_use(self, *names: str) -> bool:
        """Return whether one of a model's names is among those that the client may use."""
        return self.models is None or not self.models.isdisjoint(names)


class Keyring:
    """The valid keys; without any, no key is required.

    A file of keys is reloaded in the background within a second of a change, so that keys can be replaced without a
    restart and without delaying a request. If the file becomes invalid or is deleted, the previous keys stay valid.

    Raises:
        ConfigError: the file of keys cannot be read, or is wrong.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        self._settings = settings
        self._environ = environ
        # Hides the place of a key in the dictionary from clients: the time of a lookup reveals nothing.
        self._secret = secrets.token_bytes(32)
        self._from_settings = {
            self._place(key_digest(key.get_secret_value())): self._client(
                f"key-{key_digest(key.get_secret_value())[:8]}"
            )
            for key in settings.api_keys
        }
        self._file: Path | None = settings.api_keys_file
        self._seen: tuple[int, ...] = ()
        self._unread: tuple[int, ...] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._clients = self._from_settings
        self._lent: dict[bytes, Client] = {}
        if self._file is not None:
            self._seen = _stamp(self._file)
            self._clients = self._read(self._file)

    def __bool__(self) -> bool:
        return bool(self._settings.api_keys) or self._file is not None

    async def identify(self, digest: str | None, address: str) -> Client:
        """Return the client that sent a request.

        Args:
            digest: hex sha256 of the request's key, if it has one.
            address: the network address of the client.

        Raises:
            Unauthorized: keys are required, and the request has no valid one.
        """
        if not self:
            return self._client(address)
        self.watch()
        if digest is None:
            raise Unauthorized("an API key is required: send `Authorization: Bearer KEY`")
        client = self._clients.get(self._place(digest)) or self._lent.get(self._place(digest))
        if client is None:
            raise Unauthorized("the API key is not valid")
        if client.expires is not None and client.expires <= datetime.now(UTC):
            raise Unauthorized(f"the API key of {client.name} expired on {client.expires:%Y-%m-%d}")
        return client

    def lend(self, name: str) -> tuple[str, Callable[[], None]]:
        """Return a key without limits for the gateway's own requests, and the function that makes it invalid."""
        key = make_key()
        place = self._place(key_digest(key))
        self._lent[place] = Client(name)

        def take_back() -> None:
            self._lent.pop(place, None)

        return key, take_back

    def named(self, name: str) -> Client | None:
        """Return the client that has a key under a name, if one of its keys is valid now.

        Without any keys, every sender counts as that client.
        """
        if not self:
            return self._client(name)
        self.watch()
        clients = (client for client in self._clients.values() if client.name == name)
        now = datetime.now(UTC)
        return next((client for client in clients if client.expires is None or client.expires > now), None)

    def watch(self) -> None:
        """Check the file every second from now on, until the running event loop ends or `close` is called."""
        if self._file is not None and (self._watching is None or self._watching.done()):
            self._watching = asyncio.get_running_loop().create_task(self._watch_file(self._file))

    async def close(self) -> None:
        """Stop checking the file."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))

    async def _watch_file(self, path: Path) -> None:
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            try:
                await self._read_if_changed(path)
            except Exception:  # keep checking: a revoked key would otherwise work until a restart
                log.exception("api_keys_not_looked_at")

    async def _read_if_changed(self, path: Path) -> None:
        seen = await asyncio.to_thread(_stamp, path)
        is_again = seen == self._unread
        if seen == self._seen and not is_again:
            return
        # Even if the file is wrong, so that the error is logged once and not every second.
        self._seen, self._unread = seen, None
        try:
            # In a thread: a file of thousands of keys takes seconds to read, and until then requests use the previous
            # keys.
            self._clients = await asyncio.to_thread(self._read, path)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):  # it may pass without a change: a right, or a free descriptor
                self._unread = seen
                if is_again:
                    return
            metrics.KEY_RELOADS.labels("refused").inc()
            log.error("api_keys_refused", reason=str(error))
        else:
            metrics.KEY_RELOADS.labels("ok").inc()
            log.info("api_keys_read", num_keys=len(self._clients))

    def _read(self, path: Path) -> dict[bytes, Client]:
        entries = load_key_file(path, self._environ).keys
        from_file = {self._place(digest): self._client_of(entry) for entry in entries for digest in entry.sha256}
        return {**self._from_settings, **from_file}

    def _place(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), "sha256")

    def _client(self, name: str) -> Client:
        return Client(
            name,
            requests_per_minute=self._settings.requests_per_minute,
            tokens_per_minute=self._settings.tokens_per_minute,
        )

    def _client_of(self, entry: KeyEntry) -> Client:
        return Client(
            entry.name,
            models=None if entry.models is None else frozenset(entry.models),
            requests_per_minute=entry.requests_per_minute or self._settings.requests_per_minute,
            tokens_per_minute=entry.tokens_per_minute or self._settings.tokens_per_minute,
            expires=entry.expires,
        )


def key_digest(key: str) -> str:
    """Return the hex sha256 of a key, in UTF-8: the form in which keys are stored and compared."""
    return hashlib.sha256(key.encode()).hexdigest()


def make_key() -> str:
    """Return a new key: 256 random bits, as letters and digits, which need no quoting anywhere."""
    alphabet = string.ascii_letters + string.digits
    return KEY_PREFIX + "".join(secrets.choice(alphabet) for _ in range(_KEY_CHARACTERS))


def _stamp(path: Path) -> tuple[int, ...]:
    """Return values that change when the file is written or replaced, through links too; empty if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
