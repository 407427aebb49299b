"""The rows of a table with vectors, in the order of their ids, and the values that PostgreSQL receives."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import RowId
from gateway.bulk.stores.payloads import digest
from gateway.bulk.stores.pgvector_session import Connect, Session
from gateway.bulk.stores.pgvector_tables import Column, Connection, Table, identifier, refusals
from gateway.bulk.stores.protocol import Guard, Since, not_kept
from gateway.bulk.stores.reading import Item, KeysetSource
from gateway.types import Vectors

PAGE: Final = 1_000
"""Rows per read request."""
_EXACT_DIGITS: Final = 15
"""The decimal digits that a floating-point number keeps."""


def read_page(connection: Connection, table: Table, after: RowId | None, limit: int = PAGE) -> list[Item]:
    """Return the ids and payloads of the next rows, in ascending order of the ids."""
    condition: sql.Composable = sql.SQL("")
    values: list[object] = []
    if after is not None:
        condition = sql.SQL("WHERE {} > {}").format(order_of(table), cast_of(table))
        values = [after]
    query = sql.SQL("SELECT {}, {} FROM {} t {} ORDER BY {} LIMIT {}").format(
        id_of(table), _payload(table), table.name.sql, condition, order_of(table), sql.Literal(limit)
    )
    with refusals(table.place):
        return [_item(table, row) for row in connection.execute(query, values)]


def read_some(connection: Connection, table: Table, ids: Sequence[RowId], *, locks: bool = False) -> list[Item]:
    """Return the ids and payloads of the existing rows among these.

    Args:
        locks: no other transaction can change the rows before this one ends.
    """
    query = sql.SQL("SELECT {}, {} FROM {} t WHERE {} = ANY({}) {}").format(
        id_of(table),
        _payload(table),
        table.name.sql,
        identifier(table.id.name),
        _cast_all(table),
        sql.SQL("ORDER BY {} FOR NO KEY UPDATE OF t" if locks else "").format(identifier(table.id.name)),
    )
    with refusals(table.place):
        return [_item(table, row) for row in connection.execute(query, [known_ids(table, ids)])]


def known_ids(table: Table, ids: Sequence[RowId]) -> list[Any]:
    """Return the ids that have the type of a table's ids; the table cannot contain others."""
    return [id_ for id_ in ids if isinstance(id_, int) == table.is_counted]


def delete_rows(connection: Connection, table: Table, ids: Sequence[RowId], guard: Guard | None = None) -> None:
    """Delete rows, ignoring ids without a row, except those that a guard keeps."""
    query = sql.SQL("DELETE FROM {} WHERE {} = ANY({})").format(
        table.name.sql, identifier(table.id.name), _cast_all(table)
    )
    with connection.transaction():
        if guard is not None:
            ids = not_kept(ids, locked_digests(connection, table, ids), guard)
        connection.execute(query, [known_ids(table, ids)])


def locked_digests(connection: Connection, table: Table, ids: Sequence[RowId]) -> dict[RowId, bytes]:
    """Return the hashes of the existing rows among these, which stay as they are until the transaction ends."""
    return {row_id: digest(payload) for row_id, payload in read_some(connection, table, ids, locks=True)}


def follow_identity(connection: Connection, table: Table) -> None:
    """Advance the sequence of an identity column past the written ids, and never back to ids that are given out."""
    if table.id.is_identity:
        query = sql.SQL(
            "SELECT setval(s, m) FROM (SELECT pg_get_serial_sequence({}, {}) AS s, max({}) AS m FROM {}) r "
            "WHERE m > coalesce(pg_sequence_last_value(s::regclass), 0)"
        ).format(
            sql.Literal(table.name.quoted),
            sql.Literal(table.id.name),
            identifier(table.id.name),
            table.name.sql,
        )
        connection.execute(query)


def continue_identity(connection: Connection, table: Table, other: Table) -> None:
    """Advance the sequence of an identity column past the ids that another table has given out, also to uncopied rows."""
    if table.id.is_identity and other.id.is_identity:
        query = sql.SQL(
            "SELECT setval(s, n) FROM (SELECT pg_get_serial_sequence({}, {}) AS s, pg_get_serial_sequence({}, {}) AS o) q, "
            "LATERAL (SELECT CASE WHEN has_sequence_privilege(o, 'USAGE, SELECT') THEN pg_sequence_last_value(o::regclass) "
            "END AS n) r WHERE n > coalesce(pg_sequence_last_value(s::regclass), 0)"
        )
        names = [part for one in (table, other) for part in (one.name.quoted, one.id.name)]
        connection.execute(query.format(*map(sql.Literal, names)))


def order_of(table: Table) -> sql.Composable:
    """Return the sort order of the ids; text sorts by code points, as in Python."""
    name = identifier(table.id.name)
    return name if table.is_counted or table.id.kind == "uuid" else sql.SQL('{} COLLATE "C"').format(name)


def id_of(table: Table) -> sql.Composable:
    """Return the id as a row of a result has it: an integer, or text."""
    name = identifier(table.id.name)
    return name if table.is_counted else sql.SQL("{}::text").format(name)


def cast_of(table: Table) -> sql.SQL:
    """Return a parameter of the type of the ids."""
    return sql.SQL("%s::" + table.id.kind)  # a type name from the catalog


def _cast_all(table: Table) -> sql.SQL:
    return sql.SQL("%s::" + table.id.kind + "[]")


def _payload(table: Table) -> sql.Composable:
    """Return the SQL expression of the payload: the only JSON column, or all columns as an object."""
    if table.is_document:
        return identifier(table.others[0].name)
    if not table.others:
        return sql.SQL("'{}'::jsonb")
    columns = sql.SQL(", ").join(map(_value, table.others))
    # jsonb_build_object accepts at most 50 columns.
    return sql.SQL("(SELECT to_jsonb(r) FROM (SELECT {}) r)").format(columns)


def _value(column: Column) -> sql.Composable:
    """Return a column as a value that JSON can hold exactly.

    A decimal number with many digits is text, because Python reads JSON's numbers with a fraction as floating-point numbers.
    PostgreSQL takes the text back as a number.
    """
    name = identifier("t", column.name)
    if column.kind != "numeric":
        return name
    return sql.SQL(
        "CASE WHEN scale({0}) = 0 OR length({0}::text) <= {2} THEN to_jsonb({0}) ELSE to_jsonb({0}::text) END AS {1}"
    ).format(name, identifier(column.name), sql.Literal(_EXACT_DIGITS))


def _item(table: Table, row: Sequence[Any]) -> Item:
    row_id, payload = row
    return row_id, payload if isinstance(payload, dict) else {} if payload is None else {"payload": payload}


def open_source(
    connect: Connect, table: Table, names: FieldNames, since: Since | None, behind: Sequence[str]
) -> KeysetSource:
    """Return the rows of a table.

    Args:
        behind: the names of the tables whose rows it shows, which may include its own.
    """
    session = Session(connect)

    def read(after: RowId | None, limit: int = PAGE) -> list[Item]:
        return session.call(lambda connection: read_page(connection, table, after, limit))

    return KeysetSource(
        table.place,
        table.oid,
        names,
        since,
        read_page=read,
        count=lambda: session.call(partial(_count_rows, table=table)),
        close=session.close,
        behind=behind,
    )


def _count_rows(connection: Connection, table: Table) -> int:
    query = sql.SQL("SELECT count(*) FROM {}").format(table.name.sql)
    with refusals(table.place):
        [number] = connection.execute(query).fetchone() or (0,)
    return int(number)


class _Packed(bytes):
    """A vector in the format that pgvector receives."""


class _PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: _Packed) -> bytes:
        return bytes(obj)


def send_vectors(connection: Connection) -> None:
    """Enable a connection to send the values of `pack`."""
    connection.adapters.register_dumper(_Packed, _PackedDumper)


def pack(vector: Vectors, kind: str) -> bytes:
    """Return a vector in pgvector's binary format: its size, two bytes of zero, then its numbers, all big-endian.

    https://github.com/pgvector/pgvector/blob/master/src/vector.c (vector_recv); ``halfvec`` works in the same way.
    """
    numbers = vector.astype(">f2" if kind == "halfvec" else ">f4").tobytes()
    return _Packed(struct.pack(">HH", len(vector), 0) + numbers)
