"""PostgreSQL tables with vectors: reading their columns from the catalog, and creating them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import psycopg
from psycopg import sql

from gateway.bulk.rows import BulkError, RowId, SpaceNote
from gateway.bulk.stores.notes import NOTE, note_from_json
from gateway.config.wording import cut, enumerate_names, quote

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]

_DENSE: Final = ("vector", "halfvec")
_SPARSE: Final = "sparsevec"
_INTEGERS: Final = ("smallint", "integer", "bigint")
_RANGES: Final = dict(zip(_INTEGERS, (range(-(2**bits), 2**bits) for bits in (15, 31, 63)), strict=True))
_TEXTS: Final = ("uuid", "text", "character varying")
_MAX_ID_BYTES: Final = 2_600
"""A little less than the largest entry of an index, a third of a page."""
_NO_SIZE: Final = -1
_VARHDRSZ: Final = 4
"""The catalog has the size of a text with its header."""
METRICS: Final = {"cosine": "<=>", "ip": "<#>", "l2": "<->"}
_PART: Final = r'("(?:[^"]|"")+"|[^".]+)'
_NAME: Final = re.compile(rf"(?:{_PART}\.)?{_PART}")

_UUID: Final = re.compile(r"(\{)?(?:[0-9a-fA-F]{4}-?){7}[0-9a-fA-F]{4}(?(1)\})")
"""The spellings that PostgreSQL reads: https://www.postgresql.org/docs/current/datatype-uuid.html"""
_AWAY: Final = ("08", "57P0")
"""The errors of a connection, and of a server that ends or starts: https://www.postgresql.org/docs/current/errcodes-appendix.html"""
_HINTS: Final = {
    psycopg.errors.DiskFull: "; make room, and run the same command again",
    psycopg.errors.LockNotAvailable: (
        "; another program's transaction holds a lock: end that transaction or wait for it, and run the same command again"
    ),
}
NAMED: Final = """
SELECT c.oid, n.nspname, c.relname, pg_table_is_visible(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass(%s)
"""
BEHIND: Final = """
WITH RECURSIVE behind(oid) AS (
    SELECT to_regclass(%s)::oid
    UNION
    SELECT o.oid FROM behind b, LATERAL (
        SELECT d.refobjid AS oid FROM pg_rewrite r JOIN pg_depend d ON d.objid = r.oid
        WHERE r.ev_class = b.oid AND d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
        GROUP BY d.refobjid HAVING count(*) > 1 OR min(d.refobjsubid) = 0
        UNION ALL SELECT i.inhrelid FROM pg_inherits i WHERE i.inhparent = b.oid
    ) o
)
SELECT n.nspname, c.relname, pg_table_is_visible(c.oid)
FROM behind b JOIN pg_class c ON c.oid = b.oid JOIN pg_namespace n ON n.oid = c.relnamespace
"""
"""The table of a name, and the tables whose rows it shows: those of a view, and the partitions or child tables of a table.

A table of which a view uses only one column is left out: it only filters rows, as by the ids that already have a vector.
"""
_COLUMNS: Final = """
SELECT a.attname, format_type(a.atttypid, NULL), a.atttypmod, a.attgenerated <> '', a.attidentity <> '',
       col_description(a.attrelid, a.attnum)
FROM pg_attribute a
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""
_UNIQUE: Final = """
SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = %s AND i.indisunique AND i.indnkeyatts = 1 AND i.indpred IS NULL AND i.indexprs IS NULL
ORDER BY i.indisprimary DESC
"""
VECTOR_INDEXES: Final = """
SELECT i.indexrelid::regclass::text, o.opcname
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
JOIN pg_opclass o ON o.oid = i.indclass[0]
WHERE i.indrelid = %s AND m.amname IN ('hnsw', 'ivfflat') AND EXISTS (
    SELECT FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.refobjid = i.indrelid AND a.attname = %s)
"""
"""The indexes of a column of vectors, also those of an expression, such as ``embedding::halfvec(3072)``."""


def identifier(*parts: str) -> sql.Composable:
    """Return a quoted name for a statement, also with parameters: psycopg would take a percent sign for one."""
    if not any("%" in part for part in parts):
        return sql.Identifier(*parts)
    return sql.SQL(".".join(f'U&"{_escaped(part)}"' for part in parts))


def _escaped(part: str) -> str:
    for character, escape in (("\\", "\\\\"), ('"', '""'), ("%", "\\0025")):
        part = part.replace(character, escape)
    return part


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a table, with its schema unless the table is on the search path."""

    table: str
    schema: str | None = None

    def __str__(self) -> str:
        return ".".join(_shown(part) for part in (self.schema, self.table) if part)

    @property
    def sql(self) -> sql.Composable:
        """The name, as part of a statement."""
        return identifier(*[part for part in (self.schema, self.table) if part])

    @property
    def quoted(self) -> str:
        """The name, as text that PostgreSQL's functions parse."""
        return ".".join('"{}"'.format(part.replace('"', '""')) for part in (self.schema, self.table) if part)


def read_name(text: str) -> Name:
    """Parse the name of a table: ``docs``, ``schema.docs``, or any characters in double quotes, as in SQL.

    Raises:
        BulkError: the text is not a name.
    """
    if (found := _NAME.fullmatch(text)) is None:
        raise BulkError(f'{quote(text)} is not the name of a table: write it like docs, sales.docs or "my.docs"')
    schema, table = (part and (part[1:-1].replace('""', '"') if part[0] == '"' else part) for part in found.groups())
    return Name(table, schema)


def _shown(part: str) -> str:
    return part if re.fullmatch(r'[^".]+', part) else '"{}"'.format(part.replace('"', '""'))


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        kind: its type, without its size.
        size: the size of its type; -1 for a type without a size.
        is_generated: PostgreSQL computes the column from others.
    """

    name: str
    kind: str
    size: int
    is_generated: bool
    is_identity: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table with vectors.

    Attributes:
        place: the table's name in messages.
        vectors, sparse: the columns of dense and of sparse vectors.
        others: the columns that are neither the id nor vectors.
    """

    oid: int
    name: Name
    place: str
    id: Column
    vectors: Sequence[Column]
    sparse: Sequence[Column]
    others: Sequence[Column]

    @property
    def is_document(self) -> bool:
        """All other fields are in one JSON column, as in Mem0's tables."""
        return len(self.others) == 1 and self.others[0].kind == "jsonb"

    @property
    def is_counted(self) -> bool:
        """The ids are integers."""
        return self.id.kind in _INTEGERS

    def vector(self, name: str | None) -> Column:
        """Return the column of the dense vectors.

        Raises:
            BulkError: there is no such column, or there are several and no name was given.
        """
        for column in self.vectors:
            if column.name == name or (name is None and len(self.vectors) == 1):
                return column
        names = enumerate_names([column.name for column in self.vectors])
        if name is not None:
            raise BulkError(f"{self.place} has no vector {quote(name)}; it has {names or 'none'}")
        if not self.vectors:
            raise BulkError(f"{self.place} has no column of the type vector or halfvec")
        raise BulkError(f"{self.place} has several vectors: name one of {names} with ?vector=NAME")

    def note(self, column: Column) -> SpaceNote | None:
        """Return the note in the comment of a column.

        Raises:
            BulkError: it cannot be read.
        """
        for line in (column.comment or "").splitlines():
            key, _, text = line.partition("=")
            if key == NOTE:
                try:
                    return note_from_json(json.loads(text), self.place)
                except json.JSONDecodeError:
                    return note_from_json(None, self.place)
        return None


def id_problem(row_id: RowId, column: Column | None) -> str:
    """Return the reason why the ids' column, ``None`` in a new table, cannot store an id of its kind; empty if it can."""
    if isinstance(row_id, int):
        kind = "bigint" if column is None else column.kind
        return "" if row_id in _RANGES[kind] else f"its id {row_id} is out of range for the type {kind}"
    if column is not None and column.kind == "uuid" and not _UUID.fullmatch(row_id):
        return f"its id {cut(repr(row_id))} is not a UUID, as the column {quote(column.name)} requires"
    if column is not None and (problem := text_problem("id", row_id, column)):
        return problem
    size = len(row_id.encode())
    return f"its id has {size:,} bytes, but can have at most {_MAX_ID_BYTES:,}" if size > _MAX_ID_BYTES else ""


def text_problem(what: str, text: str, column: Column) -> str:
    """Return the reason why a column cannot store a text because of its length; empty if it can."""
    if column.kind != "character varying" or not _NO_SIZE < column.size < len(text) + _VARHDRSZ:
        return ""
    most = column.size - _VARHDRSZ
    return f"its {what} has {len(text):,} characters, but the column {quote(column.name)} takes at most {most:,}"


@contextmanager
def refusals(place: str) -> Iterator[None]:
    """Turn PostgreSQL's errors within the context into a `BulkError`.

    Raises:
        BulkError: PostgreSQL rejects the request, or has gone away.
    """
    try:
        yield
    except psycopg.Error as error:
        # Other operational errors are those of a server that is there, such as one whose disk is full.
        if isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08").startswith(_AWAY):
            raise away(place, error) from error
        hint = next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), "")
        raise BulkError(f"{place}: PostgreSQL rejects the request: {message_of(error)}{hint}") from error


def away(place: str, error: psycopg.OperationalError) -> BulkError:
    """Return the error of a job whose server has gone away."""
    return BulkError(f"{place} cannot be reached, or has gone away: {message_of(error)}")


def message_of(error: psycopg.Error) -> str:
    """Return PostgreSQL's message, without the values that it quotes in other lines."""
    return " ".join((error.diag.message_primary or str(error) or type(error).__name__).split())


def find_table(connection: Connection, name: Name, store: str, id_column: str | None = None) -> Table | None:
    """Return a table or a view of a table; ``None`` if it does not exist.

    Args:
        id_column: the column with the ids; by default the primary key.

    Raises:
        BulkError: no column can be the id.
    """
    known = connection.execute(NAMED, [name.quoted]).fetchone()
    if known is None:
        return None
    oid, schema, table, is_visible = known
    name = Name(table, None if is_visible else schema)  # public.docs and docs are one table
    place = f"{store}/{name}"
    columns = [Column(*values) for values in connection.execute(_COLUMNS, [oid])]
    unique = [name for (name,) in connection.execute(_UNIQUE, [oid])]
    wanted = id_column or next(iter(unique), "id")
    found = next((column for column in columns if column.name == wanted), None)
    if found is None:
        hint = "; name the id column with ?id=NAME" if id_column is None else ""
        raise BulkError(f"{place} has no column {quote(wanted)}, and no primary key of one column{hint}")
    if found.kind not in (*_INTEGERS, *_TEXTS):
        raise BulkError(f"{place}: the ids have the type {found.kind}, but must be integers, uuid or text")
    others = [column for column in columns if column is not found]
    return Table(
        oid=oid,
        name=name,
        place=place,
        id=found,
        vectors=[column for column in others if column.kind in _DENSE],
        sparse=[column for column in others if column.kind == _SPARSE],
        others=[column for column in others if column.kind not in (*_DENSE, _SPARSE)],
    )


def operator_of(connection: Connection, table: Table, column: Column) -> str:
    """Return the operator by which a search sorts: the index's, or cosine distance without an index."""
    for _index, operators in connection.execute(VECTOR_INDEXES, [table.oid, column.name]):
        for metric, operator in METRICS.items():
            if f"_{metric}_" in operators:
                return operator
    return METRICS["cosine"]
