"""Find the changes in a table of PostgreSQL since a point in time, by the transactions that wrote its rows.

Each version of a row has the number of its transaction, in a system column. A mark is the lowest number of all
transactions that had not ended: later changes of rows have that number or a higher one. So no change is missed, whatever an
application writes, and no column is needed for it. Deleted rows have no version; they are those whose ids are missing.

https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import psycopg
from psycopg import sql

from gateway.bulk.rows import RowId
from gateway.bulk.stores.pgvector_rows import id_of, order_of
from gateway.bulk.stores.pgvector_tables import Connection, Table, away, identifier, refusals
from gateway.bulk.stores.protocol import Mark

_CURSORS: Final = count()
_PAGE: Final = 5_000
_NUM_IDS: Final = 2**32
"""The number of transaction numbers in rows; then they begin again."""
_FAR: Final = 2**30
"""After this many transactions since a mark, all rows count as changed, long before the numbers are ambiguous."""
# Another server, a replica that took over, and a restored backup have numbers of another history.
_NOW: Final = """
SELECT pg_snapshot_xmin(pg_current_snapshot())::text, (SELECT system_identifier::text FROM pg_control_system()),
       substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), c.relfilenode::text
FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE c.oid = %s AND c.relkind = 'r' AND a.amname = 'heap'
"""


def mark(connection: Connection, table: Table) -> Mark | None:
    """Return the present moment; ``None`` if the server does not reveal it, or stores the table in another way."""
    found = _now(connection, table)
    return None if found is None else json.dumps(found)


def _now(connection: Connection, table: Table) -> dict[str, Any] | None:
    try:
        row = connection.execute(_NOW, [table.oid]).fetchone()
    except psycopg.OperationalError as error:
        raise away(table.place, error) from error
    except psycopg.Error:  # the administrator may forbid these functions
        return None
    if row is None:
        return None
    transaction, *history = row
    # A column that is added or dropped changes all payloads without a new version of a row.
    columns = [[column.name, column.kind, column.size] for column in table.others]
    return {"transaction": int(transaction), "history": [*history, table.oid], "columns": columns}


def changes(connection: Connection, table: Table, since: Mark) -> Iterator[tuple[RowId, bool]]:
    """Yield the id of each row, and whether it may have changed since a mark, by ascending id."""
    then = json.loads(since)
    now = _now(connection, table)
    is_known = (
        now is not None
        and all(now[name] == then[name] for name in ("history", "columns"))
        and 0 <= now["transaction"] - then["transaction"] < _FAR
    )
    query = sql.SQL("SELECT {}, {} FROM {} t ORDER BY {}").format(
        id_of(table), is_later(then["transaction"]) if is_known else sql.SQL("true"), table.name.sql, order_of(table)
    )
    yield from _stream(connection, table, query)


def filled(connection: Connection, table: Table, vector: str) -> Iterator[RowId]:
    """Yield the ids of rows that have a vector in a column, in ascending order."""
    query = sql.SQL("SELECT {} FROM {} t WHERE {} IS NOT NULL ORDER BY {}").format(
        id_of(table), table.name.sql, identifier(table.vector(vector).name), order_of(table)
    )
    for (row_id,) in _stream(connection, table, query):
        yield row_id


def _stream(connection: Connection, table: Table, query: sql.Composed) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a result, sorted once. The server keeps it, so that other statements can come in between."""
    name = f"gateway_{next(_CURSORS)}"
    with refusals(table.place), connection.cursor(name, withhold=True) as cursor:
        cursor.itersize = _PAGE
        cursor.execute(query)
        yield from cursor


def is_later(transaction: int) -> sql.Composable:
    """Return the condition that a row is from this transaction or a later one, by the lower 32 bits."""
    return sql.SQL("mod(t.xmin::text::bigint - {} + {}, {}) < {}").format(
        sql.Literal(transaction % _NUM_IDS), sql.Literal(_NUM_IDS), sql.Literal(_NUM_IDS), sql.Literal(_NUM_IDS // 2)
    )
