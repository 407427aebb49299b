"""A connection to PostgreSQL that reconnects after the server was briefly unavailable, and repeats what it rolled back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import psycopg

from gateway.bulk.rows import BulkError
from gateway.bulk.stores.patience import PATIENCE_S, insist
from gateway.bulk.stores.pgvector_tables import Connection

Connect: TypeAlias = Callable[[], Connection]
Result = TypeVar("Result")


class Session:
    """A connection that can be replaced.

    Args:
        connect: raises `BulkError` if the server cannot be reached.

    Raises:
        BulkError: the server cannot be reached now, more likely because of a wrong URL than because of a restart.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self.connection = connect()

    def call(self, work: Callable[[Connection], Result]) -> Result:
        """Return the result of some work; repeat the work if the connection is lost or the server rolls it back.

        Args:
            work: may run twice, so it must not matter whether the first run had an effect.

        Raises:
            BulkError: PostgreSQL rejects it, or stays unavailable.
        """

        def attempt() -> Result:
            if self.connection.closed:
                self.connection = self._connect()
            return work(self.connection)

        return insist(attempt, self._pause_after, PATIENCE_S)

    def _pause_after(self, error: Exception) -> float | None:
        cause = error.__cause__ if isinstance(error, BulkError) else None
        if not isinstance(cause, psycopg.OperationalError):
            return None
        # The server ended the transaction in favor of another program's, as it does with one of two in a deadlock.
        is_rolled_back = (cause.sqlstate or "").startswith("40")
        return 0.0 if is_rolled_back or self.connection.closed else None

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
