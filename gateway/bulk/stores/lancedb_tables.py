"""Tables of LanceDB, and plain messages for its errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lancedb import DBConnection
from lancedb.table import Table

from gateway.bulk.rows import BulkError
from gateway.config.wording import cut, did_you_mean, enumerate_names, quote


@contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """Turn LanceDB's errors within the context into a `BulkError`.

    Args:
        where: the table, for messages.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise BulkError(f"{where}: {cut(str(error), 300)}") from error


def find_table(database: DBConnection, table: str, where: str) -> Table | None:
    """Return a table if it exists.

    Raises:
        BulkError: the folder or the table cannot be read.
    """
    with plain_errors(where):
        return database.open_table(table) if table in list_tables(database) else None


def get_table(database: DBConnection, table: str, store: str) -> Table:
    """Return a table.

    Raises:
        BulkError: it does not exist or cannot be read.
    """
    found = find_table(database, table, f"{store}#{table}")
    if found is None:
        names = list_tables(database)
        hint = did_you_mean(table, names) or ";"
        there = f"it has {enumerate_names(names[:20])}" if names else "it has no tables"
        raise BulkError(f"{store} has no table {quote(table)}{hint} {there}")
    return found


def list_tables(database: DBConnection) -> list[str]:
    """Return the names of all tables."""
    names: list[str] = []
    token: str | None = None
    while True:
        page = database.list_tables(page_token=token)
        names += page.tables
        token = page.page_token
        if not token:
            return sorted(names)
