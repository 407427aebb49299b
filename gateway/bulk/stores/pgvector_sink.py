"""A table of PostgreSQL that stores the vectors of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

import psycopg
from psycopg import sql

from gateway.bulk.rows import BadRow, BulkError, EmbeddedRows, Json, Row, RowId, RowsRefused, SpaceNote
from gateway.bulk.stores import pgvector_creation as creation
from gateway.bulk.stores import pgvector_tables as tables
from gateway.bulk.stores.notes import check_note, replaced
from gateway.bulk.stores.payloads import KindOfIds, has_nul, with_text
from gateway.bulk.stores.pgvector_rows import cast_of, delete_rows, follow_identity, locked_digests, pack
from gateway.bulk.stores.pgvector_session import Connect, Session
from gateway.bulk.stores.pgvector_tables import (
    Column,
    Connection,
    Name,
    Table,
    find_table,
    identifier,
    message_of,
    refusals,
)
from gateway.bulk.stores.protocol import Guard, SinkOptions, not_kept
from gateway.config.wording import quote
from gateway.types import Vectors

_DEFAULT_VECTOR: Final = "embedding"
_DEFAULT_ID: Final = "id"
_OF_A_ROW: Final = (psycopg.IntegrityError, psycopg.DataError)
"""The errors about the values of a row: constraints, and values that a type cannot hold."""
_LOOKS: Final = 3


class PgvectorSink:
    """Writes vectors into a table, which it creates if necessary.

    Args:
        name: the table's name as the user wrote it, unless that is a view's.
        collections: the names of this table, and of the tables whose rows it shows, as a source names them.
        id_column: the column with the ids of an existing table; by default its primary key.
    """

    def __init__(
        self,
        connect: Connect,
        name: Name,
        collections: Sequence[str],
        store: str,
        options: SinkOptions,
        id_column: str | None,
    ) -> None:
        self.name = f"{store}/{name}"
        self.collections = collections
        self._session = Session(connect)
        self._name, self._store, self._options, self._id_column = name, store, options, id_column
        self._note: SpaceNote | None = None
        self._table: Table | None = None
        self._like: Table | None = None
        self._ids = KindOfIds()

    @property
    def _connection(self) -> Connection:
        return self._session.connection

    def count(self) -> int:
        """Return the number of rows; 0 if the table does not exist."""
        with refusals(self.name):
            table = find_table(self._connection, self._name, self._store, self._id_column)
            if table is None:
                return 0
            query = sql.SQL("SELECT count(*) FROM {}").format(table.name.sql)
            return int((self._connection.execute(query).fetchone() or (0,))[0])

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
        creation.vector_type(note.dimensions, self.name)
        with refusals(self.name):
            if self._options.like is not None:
                self._make_like(self._options.like, note)
            self._table = find_table(self._connection, self._name, self._store, self._id_column)
            if self._table is None:
                if self._id_column not in (None, _DEFAULT_ID):
                    raise BulkError(
                        f"{self.name} does not exist, and a new table has its ids in the column {quote(_DEFAULT_ID)}: "
                        f"leave out ?id={self._id_column}"
                    )
                creation.require_extension(self._connection, self._store)
                return
            self._ids.are_counted = self._table.is_counted
            with self._connection.transaction():
                self._check(self._table, note)
            self._table = find_table(self._connection, self._name, self._store, self._id_column)

    def _make_like(self, like: str, note: SpaceNote) -> None:
        other = find_table(self._connection, tables.read_name(like), self._store, self._id_column)
        if other is None:
            raise BulkError(f"there is no table {quote(like)} in {self._store}")
        self._like = other
        if find_table(self._connection, self._name, self._store) is None:
            with self._connection.transaction():
                creation.create_like(self._connection, self._name, other, note, other.vector(self._options.vector))

    def _check(self, table: Table, note: SpaceNote) -> None:
        """Check an existing table, and write the note if it is missing."""
        wanted = self._options.vector
        if self._options.updates and wanted is not None and not any(one.name == wanted for one in table.vectors):
            creation.add_vector(self._connection, table, wanted, note)
            return
        column = table.vector(wanted)
        held = table.note(column)
        filled = sql.SQL("SELECT count(*) FROM (SELECT 1 FROM {} WHERE {} IS NOT NULL LIMIT 1000000) r").format(
            table.name.sql, identifier(column.name)
        )
        [number] = self._connection.execute(filled).fetchone() or (0,) if held is None else (0,)
        check_note(held, note, self.name, number, adopts=self._options.adopts)
        if column.size not in (-1, note.dimensions):
            raise BulkError(
                f"the column {quote(column.name)} of {self.name} requires vectors of {column.size} dimensions, but "
                f"those of {note.model} have {note.dimensions}: choose another table"
            )
        if held is None:
            creation.write_comment(self._connection, table.name, column.name, note, column.comment)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Insert rows, or replace those with the same ids, in one transaction.

        Raises:
            RowsRefused: the table's constraints or types do not allow some rows.
        """
        self._write_shard(batch, None)

    def write_guarded(self, shard: int, batch: EmbeddedRows, guard: Guard) -> None:
        """Write rows in the transaction in which the guard sees those that exist."""
        self._write_shard(batch, guard)

    def _write_shard(self, batch: EmbeddedRows, guard: Guard | None) -> None:
        if not batch.rows or batch.dense is None:
            return
        rows, vectors = batch.rows, batch.dense
        try:
            self._session.call(lambda connection: self._write(connection, rows, vectors, guard))
        except BulkError as error:
            if not isinstance(error.__cause__, _OF_A_ROW):
                raise
            bad = self._session.call(lambda connection: self._refused(connection, rows, vectors, guard))
            if not bad:
                raise
            raise RowsRefused(bad) from error

    def problem(self, row: Row) -> str:
        """Return the reason why PostgreSQL cannot store a row; empty if it can."""
        if problem := self._ids.problem(row, self.name) or self._value_problem(row):
            return problem
        self._ids.add(row)
        return ""

    def _value_problem(self, row: Row) -> str:
        for name, value in (("id", row.id), ("text", row.text if self._options.text else ""), *row.payload.items()):
            if "\0" in name or has_nul(value):
                shown = name.replace("\0", "\\0")
                return f"the field {quote(shown)} has the character U+0000, which PostgreSQL cannot store: remove it"
        if self._table is None:
            return tables.id_problem(row.id, None)
        texts = {} if self._options.updates or self._table.is_document else self._payload(row)
        problems = (
            tables.text_problem("text", value, column)
            for column in self._table.others
            if isinstance(value := texts.get(column.name), str)
        )
        return tables.id_problem(row.id, self._table.id) or next(filter(None, problems), "")

    def _write(self, connection: Connection, rows: Sequence[Row], vectors: Vectors, guard: Guard | None) -> None:
        with refusals(self.name), connection.transaction():
            table = self._ready(connection, rows)
            if guard is None:
                self._insert(connection, table, self._statement(table, rows), rows, vectors)
            else:
                self._insert_guarded(connection, table, guard, rows, vectors)
            follow_identity(connection, table)
        self._table = table

    def _refused(
        self, connection: Connection, rows: Sequence[Row], vectors: Vectors, guard: Guard | None
    ) -> list[BadRow]:
        """Return the rows that PostgreSQL rejects. They are found by halves, and nothing is stored."""
        bad = []
        with refusals(self.name), connection.transaction(force_rollback=True):
            table = self._ready(connection, rows)
            if guard is not None:
                ids = [row.id for row in rows]
                some_ids = set(not_kept(ids, locked_digests(connection, table, ids), guard))
                written = [number for number, row_id in enumerate(ids) if row_id in some_ids]
                rows, vectors = [rows[number] for number in written], vectors[written]
            statement = self._statement(table, rows)
            parts = [range(len(rows))] if rows else []
            while parts:
                part = parts.pop()
                some, row = slice(part.start, part.stop), rows[part.start]
                try:
                    with connection.transaction():
                        self._insert(connection, table, statement, rows[some], vectors[some])
                except _OF_A_ROW as error:
                    if len(part) == 1:
                        problem = f"PostgreSQL rejects it: {message_of(error)}"
                        bad.append(BadRow(row.place, problem, row.position, row.id))
                    else:
                        parts += [part[len(part) // 2 :], part[: len(part) // 2]]
        return bad

    def _ready(self, connection: Connection, rows: Sequence[Row]) -> Table:
        """Return the table, after checking that it is still the one that was opened, and can hold the rows' ids."""
        table = self._table or self._create(rows)
        if connection.execute("SELECT to_regclass(%s)::oid", [table.name.quoted]).fetchone() != (table.oid,):
            raise BulkError(replaced(self.name))
        self._ids.are_counted = table.is_counted
        for row in rows:
            if problem := self.problem(row):
                raise BulkError(f"{row.place}: {problem}")
        return table

    def _insert(
        self, connection: Connection, table: Table, statement: sql.Composed, rows: Sequence[Row], vectors: Vectors
    ) -> None:
        values = self._values(table, rows, vectors)
        try:
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(statement, values)
        except psycopg.errors.UniqueViolation:
            if not self._may_delete(connection, table):
                raise
            # Two rows may have exchanged a unique value, so that neither can be changed before the other.
            delete_rows(connection, table, [row.id for row in rows])
            with connection.cursor() as cursor:
                cursor.executemany(statement, values)

    def _values(self, table: Table, rows: Sequence[Row], vectors: Vectors) -> list[tuple[RowId, str, bytes]]:
        kind = table.vector(self._options.vector).kind
        return [
            (row.id, _json(self._payload(row)), pack(vector, kind)) for row, vector in zip(rows, vectors, strict=True)
        ]

    def _insert_guarded(
        self, connection: Connection, table: Table, guard: Guard, rows: Sequence[Row], vectors: Vectors
    ) -> None:
        """Replace the rows that exist and are not kept, and insert the others that are not kept.

        Rows that exist are locked. A row that another transaction inserts after that is checked before it is replaced.

        Raises:
            RowsRefused: some rows are neither inserted nor there.
        """
        left = list(range(len(rows)))
        for _look in range(_LOOKS):
            ids = [rows[number].id for number in left]
            present = locked_digests(connection, table, ids)
            written = set(not_kept(ids, present, guard))
            left = [number for number in left if rows[number].id in written]
            known = [number for number in left if rows[number].id in present]
            new = [number for number in left if rows[number].id not in present]
            if known:
                some = [rows[number] for number in known]
                self._insert(connection, table, self._statement(table, some), some, vectors[known])
            left = self._taken(connection, table, [rows[number] for number in new], vectors[new], new)
            if not left:
                return
        why = "PostgreSQL does not insert it, and shows no row with its id: a trigger or a policy prevents it"
        raise RowsRefused([BadRow(rows[number].place, why, rows[number].position, rows[number].id) for number in left])

    def _taken(
        self, connection: Connection, table: Table, rows: Sequence[Row], vectors: Vectors, numbers: Sequence[int]
    ) -> list[int]:
        """Insert rows; return the numbers of those that another transaction has inserted before."""
        if not rows:
            return []
        statement = self._statement(table, rows, replaces=False)
        with connection.cursor() as cursor:
            cursor.executemany(statement, self._values(table, rows, vectors), returning=True)
            return [
                number for number, result in zip(numbers, cursor.results(), strict=True) if result.fetchone() is None
            ]

    def _may_delete(self, connection: Connection, table: Table) -> bool:
        """Return whether rows can be deleted and inserted again: in a copy that no other table refers to."""
        if self._like is None or self._options.adopts:
            return False
        query = "SELECT EXISTS (SELECT FROM pg_constraint WHERE contype = 'f' AND confrelid = %s)"
        return connection.execute(query, [table.oid]).fetchone() == (False,)

    def _create(self, rows: Sequence[Row]) -> Table:
        if self._note is None:
            raise ValueError("write before open")
        if (found := find_table(self._connection, self._name, self._store)) is not None:
            self._check(found, self._note)  # of a transaction whose answer was lost, or of another program
            return found
        are_integers = all(isinstance(row.id, int) for row in rows)
        vector = self._options.vector or _DEFAULT_VECTOR
        id_type = "bigint" if are_integers else "text"
        creation.create_table(self._connection, self._name, self._store, self._note, id_type, vector)
        table = find_table(self._connection, self._name, self._store)
        if table is None:
            raise BulkError(f"{self.name} was deleted while it was being created")
        return table

    def _payload(self, row: Row) -> Mapping[str, Json]:
        return row.payload if self._options.text is None else with_text(row, self._options.text)

    def _statement(self, table: Table, rows: Sequence[Row], *, replaces: bool = True) -> sql.Composed:
        """Return the statement that writes a row. Its parameters are the id, the payload and the vector.

        Args:
            replaces: otherwise a row that exists is kept, and the statement returns nothing.
        """
        column = table.vector(self._options.vector)
        id_name, vector_name = identifier(table.id.name), identifier(column.name)
        given = sql.SQL("WITH given AS (SELECT {} AS id, %s::jsonb AS payload, {} AS vector)").format(
            cast_of(table),
            sql.SQL("%s::" + column.kind),
        )
        if self._options.updates:
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
        others = self._other_vectors(table, column)
        names, values = [*names, *others], [*values, *others.values()]
        fixed = {other.name for other in table.others if other.is_identity}  # these cannot be updated
        changed = [name for name in [*names, column.name] if name not in fixed]
        changes = [sql.SQL("{0} = EXCLUDED.{0}").format(identifier(name)) for name in changed]
        conflict = "DO UPDATE SET {}" if replaces else "DO NOTHING RETURNING true"
        return sql.SQL("{} INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} ON CONFLICT ({}) {}").format(
            given,
            table.name.sql,
            sql.SQL(", ").join([id_name, *map(identifier, names), vector_name]),
            sql.SQL(", ").join([sql.SQL("given.id"), *values, sql.SQL("given.vector")]),
            source,
            id_name,
            sql.SQL(conflict).format(sql.SQL(", ").join(changes)),
        )

    def _other_vectors(self, table: Table, column: Column) -> dict[str, sql.Composable]:
        """Return the vectors that this job does not compute, from the same row of the table that this one copies."""
        if (like := self._like) is None:
            return {}
        theirs = {other.name for other in (*like.vectors, *like.sparse)}
        return {
            other.name: sql.SQL("(SELECT o.{} FROM {} o WHERE o.{} = given.id)").format(
                identifier(other.name), like.name.sql, identifier(like.id.name)
            )
            for other in (*table.vectors, *table.sparse)
            if other.name in theirs and other.name != column.name and not other.is_generated
        }

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


def _json(payload: Mapping[str, Json]) -> str:
    return json.dumps(payload, ensure_ascii=False)
