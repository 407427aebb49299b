"""Connect to PostgreSQL, and detect a server that has stopped responding.

PostgreSQL's own time limits do not help: a statement such as CREATE INDEX may take hours, and a frozen server does not
enforce limits. So if a response is overdue, a second connection checks whether the server still accepts connections.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from time import monotonic
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import psycopg
from psycopg.abc import PQGen

from gateway.bulk.rows import BulkError
from gateway.bulk.stores import pgvector_rows as rows
from gateway.bulk.stores.pgvector_tables import refusals
from gateway.bulk.stores.protocol import Place
from gateway.config.wording import did_you_mean, enumerate_names, quote

Value = TypeVar("Value")

_CONNECT_S: Final = 10
_SILENCE_S: Final = 30.0
"""After so many seconds without a response, a second connection checks the server."""
_WAIT_S: Final = 0.1
"""The interval of psycopg's own waits, in which it also notices Ctrl-C."""
_LIVELINESS: Final = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""The settings of libpq that end the wait for a server that has lost its power or network; by default, it takes hours."""
_SSL_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_REJECTED: Final = "password authentication failed"
_NOT_GIVEN: Final = "no password supplied"
"""Parts of libpq's messages, which have no code while a connection is made."""


class WatchedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose statements end with an error if the server has stopped responding."""

    settings: Mapping[str, Any] | None = None

    def wait(self, gen: PQGen[Value], interval: float = _WAIT_S, timeout: float | None = None) -> Value:
        """Wait for a response, as psycopg does, and watch the server meanwhile.

        Raises:
            psycopg.OperationalError: the server does not respond, and does not accept a new connection either.
        """
        return super().wait(self._watched(gen), interval, timeout)

    def _watched(self, gen: PQGen[Value]) -> PQGen[Value]:
        heard = monotonic()
        try:
            state = next(gen)
            while True:
                ready = yield state
                if ready:
                    heard = monotonic()
                elif monotonic() - heard > _SILENCE_S:
                    self._check_server(monotonic() - heard)
                    heard = monotonic()
                state = gen.send(ready)
        except StopIteration as end:
            result: Value = end.value
            return result

    def _check_server(self, silence: float) -> None:
        try:
            psycopg.connect(connect_timeout=_CONNECT_S, **(self.settings or {})).close()
        except psycopg.errors.ConnectionTimeout:
            self.pgconn.finish()
            raise psycopg.OperationalError(
                f"no response for {silence:.0f} s, and none to a new connection either"
            ) from None
        except psycopg.Error:  # it responds, such as with "too many clients"
            return


def connect(place: Place) -> WatchedConnection:
    """Connect to the database of a place.

    Raises:
        BulkError: the `sslmode` is unknown, the server cannot be reached, or it rejects the user or needs a password.
    """
    parts: dict[str, Any] = {
        **_LIVELINESS,
        "host": unquote(place.host),
        "port": place.port,
        "user": place.user,
        "dbname": unquote(place.path),
        "sslmode": _ssl_mode(place),
    }
    if place.key not in {None, "PGPASSWORD"}:  # libpq reads this variable itself, and then ~/.pgpass
        parts["password"] = os.environ.get(str(place.key), "")
    settings = {name: value for name, value in parts.items() if value}
    with refusals(place.store):
        try:
            connection = WatchedConnection.connect(
                autocommit=True, connect_timeout=_CONNECT_S, application_name="embedding-gateway", **settings
            )
        except psycopg.OperationalError as error:
            if _REJECTED not in str(error) and _NOT_GIVEN not in str(error):
                raise
            # With this cause, the session would take it for a server that will be back, and try again.
            raise BulkError(_about_password(place, is_wrong=_REJECTED in str(error))) from None
        connection.settings = settings
        connection.execute("SET lock_timeout = '60s'")  # another program may leave a transaction open
    rows.send_vectors(connection)
    return connection


def _ssl_mode(place: Place) -> str:
    mode = place.options.get("sslmode") or ("verify-full" if place.is_secure else "")
    if mode and mode not in _SSL_MODES:
        hint = did_you_mean(mode, _SSL_MODES) or ";"
        raise BulkError(
            f"{place.store}: PostgreSQL has no sslmode {quote(mode)}{hint} its modes are {enumerate_names(_SSL_MODES)}"
        )
    return mode


def _about_password(place: Place, *, is_wrong: bool) -> str:
    where = place.secret
    if place.key == "PGPASSWORD":
        where += " or in ~/.pgpass"
    user = quote(place.user) if place.user else "this machine's user"
    if is_wrong:
        return f"{place.store} rejects the password of {user} in {where}"
    return f"{place.store} needs a password for {user}: put it into {where}"
