"""PostgreSQL with pgvector, as a source, a sink, and a store whose tables can move to another model.

The note of the space is a line in the comment of the vectors' column, so that it survives a dump and a renamed table.
Applications can use views, which `gateway move` can redirect: ``CREATE VIEW docs AS SELECT * FROM docs_v1``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, LiteralString, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BadRow, BulkError, Row, RowId
from gateway.bulk.stores import pgvector_creation as creation
from gateway.bulk.stores import pgvector_order as order
from gateway.bulk.stores import pgvector_rows as rows
from gateway.bulk.stores import pgvector_tables as tables
from gateway.bulk.stores.payloads import digest
from gateway.bulk.stores.pgvector_connection import connect
from gateway.bulk.stores.pgvector_session import Session
from gateway.bulk.stores.pgvector_sink import PgvectorSink
from gateway.bulk.stores.pgvector_tables import Connection, Name, Table, identifier, read_name, refusals
from gateway.bulk.stores.protocol import CollectionInfo, Guard, Hit, Mark, Place, Since, SinkOptions
from gateway.bulk.stores.reading import KeysetSource, fields_named
from gateway.config.wording import quote
from gateway.types import SparseVector

Result = TypeVar("Result")
Query: TypeAlias = LiteralString | sql.Composed

_LOCK_S: Final = 5
_DIGEST_PAGE: Final = 5_000
_MAX_LISTINGS: Final = 10

_TABLES: Final = """
SELECT DISTINCT n.nspname, c.relname, pg_table_is_visible(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relkind IN ('r', 'p') AND a.atttypid::regtype::text ~ '(^|[.])(vector|halfvec)$' AND NOT a.attisdropped
ORDER BY 1, 2
"""
_VIEWS: Final = """
SELECT vn.nspname, v.relname, pg_table_is_visible(v.oid), tn.nspname, t.relname, pg_table_is_visible(t.oid),
       pg_get_viewdef(v.oid), v.oid,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = v.oid AND a.attnum > 0 ORDER BY a.attnum),
       ARRAY(
           SELECT a.attname::text FROM pg_attribute a
           WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum)
FROM pg_class v JOIN pg_namespace vn ON vn.oid = v.relnamespace JOIN pg_rewrite r ON r.ev_class = v.oid
JOIN pg_depend d ON d.objid = r.oid AND d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
JOIN pg_class t ON t.oid = d.refobjid AND t.oid <> v.oid JOIN pg_namespace tn ON tn.oid = t.relnamespace
WHERE v.relkind = 'v' AND t.relkind IN ('r', 'p')
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, t.oid
"""
_IS_VIEW: Final = "SELECT relkind IN ('v', 'm') FROM pg_class WHERE oid = to_regclass(%s)"
_USERS: Final = """
SELECT pg_describe_object(d.classid, d.objid, d.objsubid)
FROM pg_depend d LEFT JOIN pg_rewrite r ON r.oid = d.objid AND d.classid = 'pg_rewrite'::regclass
JOIN pg_class v ON (d.refclassid, d.refobjid) IN (('pg_class'::regclass, v.oid), ('pg_type'::regclass, v.reltype))
WHERE v.oid = to_regclass(%s) AND d.deptype IN ('n', 'a') AND (r.ev_class IS DISTINCT FROM v.oid OR r.rulename <> '_RETURN')
ORDER BY 1
"""
"""The objects that use a view, such as another view, or belong to it, such as a trigger, except its own definition."""
_QUOTED: Final = r'"(?:[^"]|"")*"'
# Columns and a table, without other names, functions and conditions.
_PLAIN_VIEW: Final = re.compile(
    r'\s*SELECT (?!DISTINCT)(?:quoted|(?!\sAS\s)[^()"])*\sFROM (?:quoted|[^\s"])+;\s*'.replace("quoted", _QUOTED)
)
# A sequence that a copy's defaults use belongs to the original table, and would be deleted with it.
_SHARED_SEQUENCES: Final = """
SELECT s.objid::regclass::text
FROM pg_depend s JOIN pg_class c ON c.oid = s.objid AND c.relkind = 'S'
WHERE s.refobjid = %(oid)s AND s.deptype = 'a' AND EXISTS (
    SELECT FROM pg_depend u JOIN pg_attrdef f ON f.oid = u.objid AND u.classid = 'pg_attrdef'::regclass
    WHERE u.refobjid = s.objid AND f.adrelid <> %(oid)s)
"""


def open_store(place: Place) -> PgvectorStore:
    """Open the database of a place.

    Raises:
        BulkError: the database cannot be reached.
    """
    return PgvectorStore(place)


class PgvectorStore:
    """A database with tables of vectors."""

    def __init__(self, place: Place) -> None:
        self.name = place.store
        self._place = place
        self._id = place.options.get("id")
        self._vector = place.options.get("vector")
        self._session = Session(self._connect_to_all)

    @property
    def _connection(self) -> Connection:
        return self._session.connection

    def _connect(self) -> Connection:
        return connect(self._place)

    def _connect_to_all(self) -> Connection:
        connection = self._connect()
        with refusals(
            self.name
        ):  # a table whose policies hide rows from this role would be copied, and deleted, in part
            connection.execute("SET row_security = off")
        return connection

    def source(self, collection: str, names: FieldNames, since: Since | None = None) -> KeysetSource:
        """Return the rows of a table."""
        table = self._table(collection)
        return rows.open_source(self._connect, table, names, since, self._tables_behind(str(table.name)))

    def _tables_behind(self, name: str) -> list[str]:
        found = self._fetch(self.name, tables.BEHIND, [read_name(name).quoted])
        return [f"{self.name}/{_shown(*row)}" for row in found]

    def sink(self, collection: str, options: SinkOptions) -> PgvectorSink:
        """Return a sink for a table, also by a view: a view that is redirected meanwhile does not redirect the job."""
        name = self._behind(collection)
        names = [f"{self.name}/{self._real_name(str(name))}", *self._tables_behind(str(name))]
        return PgvectorSink(self._connect, name, names, self.name, options, self._id)

    def _behind(self, collection: str) -> Name:
        """Return the name of a table, which may be given by a view."""
        return read_name(self.aliases().get(self._real_name(collection), collection))

    def _table(self, collection: str) -> Table:
        """Return a table by its name or by the name of a view.

        Raises:
            BulkError: the table does not exist.
        """
        name = self._behind(collection)
        found = self._call(self.name, lambda connection: tables.find_table(connection, name, self.name, self._id))
        if found is None:
            raise BulkError(f"there is no table {quote(str(name))} in {self.name}")
        return found

    def _call(self, place: str, work: Callable[[Connection], Result]) -> Result:
        """Return the result of work that may be repeated, over a new connection if the old one is lost."""

        def attempt(connection: Connection) -> Result:
            with refusals(place):
                return work(connection)

        return self._session.call(attempt)

    def _fetch(self, place: str, query: Query, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        return self._call(place, lambda connection: connection.execute(query, values or None).fetchall())

    def collections(self) -> Sequence[str]:
        """Return the tables that have vectors, with their schema unless they are on the search path."""
        return [_shown(*row) for row in self._fetch(self.name, _TABLES)]

    def describe(self, collection: str) -> CollectionInfo:
        """Return a table's info."""
        table = self._table(collection)
        [[number]] = self._fetch(self.name, sql.SQL("SELECT count(*) FROM {}").format(table.name.sql))
        return CollectionInfo(
            name=str(table.name),
            count=int(number),
            widths={column.name: max(column.size, 0) for column in table.vectors},
            notes={column.name: note for column in table.vectors if (note := table.note(column)) is not None},
            identity=str(table.oid),
        )

    def read_ids(self, collection: str, ids: Sequence[RowId], names: FieldNames) -> Iterator[Row | BadRow]:
        """Yield the rows with these ids."""
        table = self._table(collection)
        items = self._session.call(lambda connection: rows.read_some(connection, table, ids))
        fields = fields_named(names)
        for row_id, payload in items:
            yield fields.row(payload, f"id {row_id} of {table.place}", row_id, row_id)

    def digests(self, collection: str) -> Iterator[tuple[RowId, bytes]]:
        """Yield ids and hashes of payloads, in ascending order of the ids."""
        table = self._table(collection)
        last: RowId | None = None
        while page := self._session.call(partial(rows.read_page, table=table, after=last, limit=_DIGEST_PAGE)):
            for row_id, payload in page:
                last = row_id
                yield row_id, digest(payload)

    def digests_of(self, collection: str, ids: Sequence[RowId]) -> Mapping[RowId, bytes]:
        """Return the hashes of the payloads of those of these rows that exist."""
        table = self._table(collection)
        found = self._session.call(lambda connection: rows.read_some(connection, table, ids))
        return {row_id: digest(payload) for row_id, payload in found}

    def mark(self, collection: str, changed_at: str | None) -> Mark | None:
        """Return the present moment in the order of transactions."""
        table = self._table(collection)
        return self._session.call(lambda connection: order.mark(connection, table))

    def changes(self, collection: str, since: Mark) -> Iterator[tuple[RowId, bool]]:
        """Yield the id of each row, and whether a transaction that had not ended at the mark has written it."""
        table = self._table(collection)  # which connects again, if it must
        return order.changes(self._connection, table, since)

    def sort_key(self, row_id: RowId) -> tuple[int, int | str]:
        """Return an id's sort key: integers sort by value, strings by code points."""
        return (0, row_id) if isinstance(row_id, int) else (1, row_id)

    def filled(self, collection: str, vector: str) -> Iterator[RowId]:
        """Yield the rows that have a vector in this column."""
        table = self._table(collection)
        return order.filled(self._connection, table, vector)

    def delete_vector(self, collection: str, vector: str) -> None:
        """Drop a column of vectors, with its index."""
        table = self._table(collection)
        with refusals(table.place):
            self._connection.execute(
                sql.SQL("ALTER TABLE {} DROP COLUMN {}").format(table.name.sql, identifier(table.vector(vector).name))
            )

    def delete_ids(self, collection: str, ids: Sequence[RowId], guard: Guard | None = None) -> None:
        """Delete rows, in the transaction in which the guard sees them."""
        table = self._table(collection)
        self._call(table.place, lambda connection: rows.delete_rows(connection, table, ids, guard))

    def search(
        self, collection: str, query: npt.NDArray[np.float32] | SparseVector, limit: int, vector: str | None = None
    ) -> Sequence[Hit]:
        """Return the nearest rows, by the distance of the column's index, or by cosine."""
        table = self._table(collection)
        column = table.vector(vector or self._vector)
        if isinstance(query, SparseVector):
            raise BulkError(f"{table.place} has no sparse vectors")
        packed = rows.pack(query, column.kind)

        def run(connection: Connection) -> list[tuple[Any, ...]]:
            operator = tables.operator_of(connection, table, column)
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL hnsw.ef_search = {}").format(sql.Literal(max(40, 4 * limit))))
                return connection.execute(
                    sql.SQL("SELECT {}, {} {} {} AS d FROM {} WHERE {} IS NOT NULL ORDER BY d LIMIT {}").format(
                        identifier(table.id.name)
                        if table.is_counted
                        else sql.SQL("{}::text").format(identifier(table.id.name)),
                        identifier(column.name),
                        sql.SQL(operator),
                        sql.SQL("%s::" + column.kind),
                        table.name.sql,
                        identifier(column.name),
                        sql.Literal(limit),
                    ),
                    [packed],
                ).fetchall()

        return [Hit(row_id, -float(distance)) for row_id, distance in self._call(table.place, run)]

    def vectors(
        self, collection: str, ids: Sequence[RowId], vector: str | None = None
    ) -> Mapping[RowId, npt.NDArray[np.float32]]:
        """Return the vectors of rows."""
        table = self._table(collection)
        column = table.vector(vector or self._vector)
        name = identifier(table.id.name)
        query = sql.SQL("SELECT {}, {}::real[] FROM {} WHERE {} = ANY({}) AND {} IS NOT NULL").format(
            name if table.is_counted else sql.SQL("{}::text").format(name),
            identifier(column.name),
            table.name.sql,
            name,
            sql.SQL("%s::" + table.id.kind + "[]"),
            identifier(column.name),
        )
        found = self._fetch(table.place, query, [rows.known_ids(table, ids)])
        return {row_id: np.array(numbers, np.float32) for row_id, numbers in found}

    def aliases(self) -> Mapping[str, str]:
        """Return the views that only give a table another name, and their tables."""
        found = self._views()
        return {name: table for name, (table, _oid) in found.items() if table}

    def _views(self) -> dict[str, tuple[str, int]]:
        """Return all views of tables, each with its table if it shows all rows and columns of exactly one table."""
        found: dict[str, tuple[str, int]] = {}
        for *names, definition, oid, shown, columns in self._list_views():
            view, table = _shown(*names[:3]), _shown(*names[3:])
            has_all = shown == columns[: len(shown)]  # the table may have gained columns since
            is_plain = view not in found and has_all and _PLAIN_VIEW.fullmatch(definition or "") is not None
            found[view] = (table if is_plain else "", oid)
        return found

    def _list_views(self) -> list[tuple[Any, ...]]:
        for _attempt in range(_MAX_LISTINGS - 1):
            try:
                return self._fetch(self.name, _VIEWS)
            except (
                BulkError
            ) as error:  # another program has dropped a view since the list began, as dbt does all the time
                if not isinstance(error.__cause__, psycopg.errors.InternalError_):
                    raise
        return self._fetch(self.name, _VIEWS)

    def why_not_flip(self, name: str) -> str:
        """Return the reason why a name cannot be redirected to another table as a view; empty if it can."""
        name = self._real_name(name)
        kinds = self._fetch(self.name, _IS_VIEW, [read_name(name).quoted])
        if name in self.aliases():
            users = self._fetch(self.name, _USERS, [read_name(name).quoted])
            return _not_redirected(name, users[0][0]) if users else ""
        if kinds == [(True,)]:
            return f"{quote(name)} is a view that does more than give a table another name: change it yourself"
        if not kinds:
            return ""
        return (
            f"{quote(name)} is itself a table: rename it, for example to {quote(f'{name}_1')}, and create a view with "
            "the old name and all rows and columns, which can then be redirected to another table"
        )

    def _real_name(self, name: str) -> str:
        """Return the name of a table or view, without its schema if that is on the search path."""
        found = self._fetch(self.name, tables.NAMED, [read_name(name).quoted])
        return _shown(*found[0][1:]) if found else str(read_name(name))

    def flip(self, name: str, collection: str) -> None:
        """Redirect a view to another table, in one transaction that waits for running queries."""
        if reason := self.why_not_flip(name):
            raise BulkError(reason)
        view, table = self._real_name(name), self._table(collection)

        def redirect(connection: Connection) -> None:
            shown, old = self._views().get(view, ("", None))
            before = self._table(shown) if shown else table
            with connection.transaction():
                # Otherwise, while this change waits for a long query, it blocks all later queries.
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{_LOCK_S}s")))
                if old is not None:
                    creation.replace_view(connection, old, table.name)
                    rows.continue_identity(connection, table, before)  # while no statement can use the view
                    return
                create = sql.SQL("CREATE VIEW {} AS SELECT * FROM {}")
                connection.execute(create.format(read_name(view).sql, table.name.sql))

        self._call(self.name, redirect)

    def delete_alias(self, name: str) -> None:
        """Delete a view."""
        view = self._real_name(name)
        if view not in self.aliases():
            raise BulkError(f"{self.name} has no view {quote(name)} of a table")
        with refusals(self.name):
            self._connection.execute(sql.SQL("DROP VIEW {}").format(read_name(view).sql))

    def delete_collection(self, collection: str, look: Callable[[], None] | None = None) -> None:
        """Delete a table, but keep a sequence that its copy uses. The table is locked during the look."""
        table = self._table(collection)
        if views := [name for name, means in self.aliases().items() if means == str(table.name)]:
            raise BulkError(f"{table.place} is still in use by the view {quote(views[0])}")
        with refusals(table.place), self._connection.transaction():
            if look is not None:
                self._connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{_LOCK_S}s")))
                self._connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(table.name.sql))
                look()
            for (sequence,) in self._connection.execute(_SHARED_SEQUENCES, {"oid": table.oid}).fetchall():
                self._connection.execute(sql.SQL("ALTER SEQUENCE {} OWNED BY NONE").format(sql.SQL(sequence)))
            self._connection.execute(sql.SQL("DROP TABLE {}").format(table.name.sql))

    def close(self) -> None:
        """Close the connection."""
        self._session.close()


def _not_redirected(view: str, user: str) -> str:
    return (
        f"{quote(view)} would lose {quote(user)}, because a view that is redirected is a new one: drop that first, and "
        "create it again after the flip"
    )


def _shown(schema: str, table: str, is_visible: bool) -> str:
    return str(Name(table, None if is_visible else schema))
