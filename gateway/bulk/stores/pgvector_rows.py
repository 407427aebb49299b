"""The rows of a table with vectors: reading them in the order of their ids, and writing them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BulkError, EmbeddedRows, Json, Row, RowId, SpaceNote
from gateway.bulk.stores import pgvector_tables as tables
from gateway.bulk.stores.notes import check_note
from gateway.bulk.stores.payloads import KindOfIds, has_nul, with_field
from gateway.bulk.stores.pgvector_session import Connect, Session
from gateway.bulk.stores.pgvector_tables import Column, Connection, Name, Table, find_table, identifier, refusals
from gateway.bulk.stores.protocol import Keeping, Since
from gateway.bulk.stores.reading import Item, KeysetSource
from gateway.config.wording import quote
from gateway.types import Vectors

PAGE: Final = 1_000
"""Rows per read request."""
_DEFAULT_VECTOR: Final = "embedding"


def read_page(connection: Connection, table: Table, after: RowId | None, limit: int = PAGE) -> list[Item]:
    """Return the ids and payloads of the next rows, in ascending order of the ids."""
    condition: sql.Composable = sql.SQL("")
    values: list[object] = []
    if after is not None:
        condition = sql.SQL("WHERE {} > {}").format(order_of(table), _cast(table))
        values = [after]
    query = sql.SQL("SELECT {}, {} FROM {} t {} ORDER BY {} LIMIT {}").format(
        id_of(table), _payload(table), table.name.sql, condition, order_of(table), sql.Literal(limit)
    )
    with refusals(table.place):
        return [_item(table, row) for row in connection.execute(query, values)]


def read_some(connection: Connection, table: Table, ids: Sequence[RowId]) -> list[Item]:
    """Return the ids and payloads of the existing rows among these."""
    query = sql.SQL("SELECT {}, {} FROM {} t WHERE {} = ANY({})").format(
        id_of(table), _payload(table), table.name.sql, identifier(table.id.name), _cast_all(table)
    )
    with refusals(table.place):
        return [_item(table, row) for row in connection.execute(query, [known_ids(table, ids)])]


def known_ids(table: Table, ids: Sequence[RowId]) -> list[Any]:
    """Return the ids that have the type of a table's ids; the table cannot contain others."""
    return [id_ for id_ in ids if isinstance(id_, int) == table.is_counted]


def order_of(table: Table) -> sql.Composable:
    """Return the sort order of the ids; text sorts by code points, as in Python."""
    name = identifier(table.id.name)
    return name if table.is_counted or table.id.kind == "uuid" else sql.SQL('{} COLLATE "C"').format(name)


def id_of(table: Table) -> sql.Composable:
    """Return the id as a row of a result has it: an integer, or text."""
    name = identifier(table.id.name)
    return name if table.is_counted else sql.SQL("{}::text").format(name)


def _cast(table: Table) -> sql.SQL:
    return sql.SQL("%s::" + table.id.kind)  # a type name from the catalog


def _cast_all(table: Table) -> sql.SQL:
    return sql.SQL("%s::" + table.id.kind + "[]")


def _payload(table: Table) -> sql.Composable:
    """Return the SQL expression of the payload: the only JSON column, or all columns as an object."""
    if table.is_document:
        return identifier(table.others[0].name)
    if not table.others:
        return sql.SQL("'{}'::jsonb")
    columns = sql.SQL(", ").join(identifier("t", column.name) for column in table.others)
    # jsonb_build_object accepts at most 50 columns.
    return sql.SQL("(SELECT to_jsonb(r) FROM (SELECT {}) r)").format(columns)


def _item(table: Table, row: Sequence[Any]) -> Item:
    row_id, payload = row
    return row_id, payload if isinstance(payload, dict) else {} if payload is None else {"payload": payload}


def open_source(connect: Connect, table: Table, names: FieldNames, since: Since | None) -> KeysetSource:
    """Return the rows of a table."""
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
    )


def _count_rows(connection: Connection, table: Table) -> int:
    query = sql.SQL("SELECT count(*) FROM {}").format(table.name.sql)
    with refusals(table.place):
        [number] = connection.execute(query).fetchone() or (0,)
    return int(number)


class PgvectorSink:
    """Writes vectors into a table, which it creates if necessary.

    Args:
        id_column: the column with the ids of an existing table; by default its primary key.
    """

    def __init__(self, connect: Connect, name: Name, store: str, keeping: Keeping, id_column: str | None) -> None:
        self.name = f"{store}/{name}"
        self._session = Session(connect)
        self._name, self._store, self._keeping, self._id_column = name, store, keeping, id_column
        self._note: SpaceNote | None = None
        self._table: Table | None = None
        self._ids = KindOfIds()

    @property
    def _connection(self) -> Connection:
        return self._session.connection

    def is_empty(self) -> bool:
        """Return whether the table is empty or does not exist."""
        with refusals(self.name):
            table = find_table(self._connection, self._name, self._store, self._id_column)
            if table is None:
                return True
            query = sql.SQL("SELECT NOT EXISTS (SELECT FROM {})").format(table.name.sql)
            return self._connection.execute(query).fetchone() == (True,)

    def open(self, note: SpaceNote) -> None:
        """Check that the table can take vectors of this space. If it does not exist, the first write creates it.

        Raises:
            BulkError: the table has vectors of another space, or pgvector cannot store these.
        """
        if note.has_sparse or note.token_width or not note.dimensions:
            raise BulkError(
                f"{self.name}: pgvector can store one dense vector per row, but no sparse weights or multi-vectors"
            )
        self._note = note
        tables.vector_type(note.dimensions, self.name)
        with refusals(self.name):
            if self._keeping.like is not None:
                self._make_like(self._keeping.like, note)
            self._table = find_table(self._connection, self._name, self._store, self._id_column)
            if self._table is None:
                self._check_extension()
                return
            self._ids.are_counted = self._table.is_counted
            with self._connection.transaction():
                self._check(self._table, note)
            self._table = find_table(self._connection, self._name, self._store, self._id_column)

    def _make_like(self, like: str, note: SpaceNote) -> None:
        other = find_table(self._connection, tables.read_name(like), self._store, self._id_column)
        if other is None:
            raise BulkError(f"there is no table {quote(like)} in {self._store}")
        if find_table(self._connection, self._name, self._store) is None:
            with self._connection.transaction():
                tables.create_like(self._connection, self._name, other, note, other.vector(self._keeping.vector))

    def _check_extension(self) -> None:
        found = self._connection.execute("SELECT to_regtype('vector')").fetchone()
        if found == (None,):
            try:
                self._connection.execute("CREATE EXTENSION vector")
            except Exception as error:  # a missing package, a missing right or a lost server: the remedy is the same
                raise BulkError(
                    f"{self._store} has no pgvector: install it, and have the owner of the database run "
                    "CREATE EXTENSION vector"
                ) from error

    def _check(self, table: Table, note: SpaceNote) -> None:
        """Check an existing table, and write the note if it is missing."""
        wanted = self._keeping.vector
        if self._keeping.updates and wanted is not None and not any(one.name == wanted for one in table.vectors):
            tables.add_vector(self._connection, table, wanted, note)
            return
        column = table.vector(wanted)
        held = table.note(column)
        filled = sql.SQL("SELECT count(*) FROM (SELECT 1 FROM {} WHERE {} IS NOT NULL LIMIT 1000000) r").format(
            table.name.sql, identifier(column.name)
        )
        [number] = self._connection.execute(filled).fetchone() or (0,) if held is None else (0,)
        check_note(held, note, self.name, number, adopts=self._keeping.adopts)
        if column.size not in (-1, note.dimensions):
            raise BulkError(
                f"the column {quote(column.name)} of {self.name} requires vectors of {column.size} dimensions, but "
                f"those of {note.model} have {note.dimensions}: choose another table"
            )
        if held is None:
            tables.write_comment(self._connection, table.name, column.name, note, column.comment)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Insert rows, or replace those with the same ids, in one transaction."""
        if batch.rows and batch.dense is not None:
            vectors = batch.dense
            self._session.call(lambda connection: self._write(connection, batch.rows, vectors))

    def problem(self, row: Row) -> str:
        """Return the reason why PostgreSQL cannot store a row; empty if it can."""
        if problem := self._ids.problem(row, self.name) or self._value_problem(row):
            return problem
        self._ids.add(row)
        return ""

    def _value_problem(self, row: Row) -> str:
        for name, value in (("id", row.id), ("text", row.text if self._keeping.text else ""), *row.payload.items()):
            if "\0" in name or has_nul(value):
                shown = name.replace("\0", "\\0")
                return f"the field {quote(shown)} has the character U+0000, which PostgreSQL cannot store: remove it"
        if self._table is None:
            return tables.id_problem(row.id, None)
        texts = {} if self._keeping.updates or self._table.is_document else self._payload(row)
        problems = (
            tables.text_problem("text", value, column)
            for column in self._table.others
            if isinstance(value := texts.get(column.name), str)
        )
        return tables.id_problem(row.id, self._table.id) or next(filter(None, problems), "")

    def _write(self, connection: Connection, rows: Sequence[Row], vectors: Vectors) -> None:
        with refusals(self.name), connection.transaction():
            table = self._table or self._create(rows)
            self._ids.are_counted = table.is_counted
            for row in rows:
                if problem := self.problem(row):
                    raise BulkError(f"{row.place}: {problem}")
            column = table.vector(self._keeping.vector)
            values = [
                (row.id, _json(self._payload(row)), pack(vector, column.kind))
                for row, vector in zip(rows, vectors, strict=True)
            ]
            with connection.cursor() as cursor:
                cursor.executemany(self._statement(table, column, rows), values)
            follow_identity(connection, table)
        self._table = table

    def _create(self, rows: Sequence[Row]) -> Table:
        if self._note is None:
            raise ValueError("write before open")
        if (found := find_table(self._connection, self._name, self._store)) is not None:
            self._check(found, self._note)  # of a transaction whose answer was lost, or of another program
            return found
        are_integers = all(isinstance(row.id, int) for row in rows)
        vector = self._keeping.vector or _DEFAULT_VECTOR
        id_type = "bigint" if are_integers else "text"
        tables.create_table(self._connection, self._name, self._store, self._note, id_type, vector)
        table = find_table(self._connection, self._name, self._store)
        if table is None:
            raise BulkError(f"{self.name} was deleted while it was being created")
        return table

    def _payload(self, row: Row) -> Mapping[str, Json]:
        return row.payload if self._keeping.text is None else with_field(row.payload, self._keeping.text, row.text)

    def _statement(self, table: Table, column: Column, rows: Sequence[Row]) -> sql.Composed:
        """Return the statement that writes a row. Its parameters are the id, the payload and the vector."""
        id_name, vector_name = identifier(table.id.name), identifier(column.name)
        given = sql.SQL("WITH given AS (SELECT {} AS id, %s::jsonb AS payload, {} AS vector)").format(
            _cast(table),
            sql.SQL("%s::" + column.kind),
        )
        if self._keeping.updates:
            return sql.SQL("{} UPDATE {} t SET {} = given.vector FROM given WHERE t.{} = given.id").format(
                given, table.name.sql, vector_name, id_name
            )
        names: list[str]
        values: list[sql.Composable]
        source: sql.Composable
        if table.is_document:
            names, values = [table.others[0].name], [sql.SQL("given.payload")]
            source = sql.SQL("given")
        else:
            names = self._columns(table, rows)
            values = [identifier("r", name) for name in names]
            source = sql.SQL("given, jsonb_populate_record(NULL::{}, given.payload) r").format(table.name.sql)
        fixed = {other.name for other in table.others if other.is_identity}  # these cannot be updated
        changed = [name for name in [*names, column.name] if name not in fixed]
        changes = [sql.SQL("{0} = EXCLUDED.{0}").format(identifier(name)) for name in changed]
        return sql.SQL(
            "{} INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} ON CONFLICT ({}) DO UPDATE SET {}"
        ).format(
            given,
            table.name.sql,
            sql.SQL(", ").join([id_name, *map(identifier, names), vector_name]),
            sql.SQL(", ").join([sql.SQL("given.id"), *values, sql.SQL("given.vector")]),
            source,
            id_name,
            sql.SQL(", ").join(changes),
        )

    def _columns(self, table: Table, rows: Sequence[Row]) -> list[str]:
        """Return all columns that any payload fills. Every row sets all of them, so that no old values remain.

        Raises:
            BulkError: the table has no column for a field.
        """
        known = {column.name for column in table.others}
        for row in rows:
            for name in self._payload(row):
                if name not in known:
                    raise BulkError(
                        f"{self.name} has no column {quote(name)} for the field of {row.place}: add the column, or "
                        "keep fewer fields with --payload"
                    )
        filled = {name for row in rows for name in self._payload(row)}
        return [column.name for column in table.others if column.name in filled and not column.is_generated]

    def close(self) -> None:
        """Close the connection."""
        self._session.close()


def follow_identity(connection: Connection, table: Table) -> None:
    """Advance the sequence of an identity column past the written ids."""
    if table.id.is_identity:
        query = sql.SQL(
            "SELECT setval(s, m) FROM (SELECT pg_get_serial_sequence({}, {}) AS s, max({}) AS m FROM {}) r WHERE m > 0"
        ).format(
            sql.Literal(table.name.quoted),
            sql.Literal(table.id.name),
            identifier(table.id.name),
            table.name.sql,
        )
        connection.execute(query)


def _json(payload: Mapping[str, Json]) -> str:
    return json.dumps(payload, ensure_ascii=False)


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
