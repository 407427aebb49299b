"""PostgreSQL tables with vectors: creating them, copies of them, and views of them."""

from __future__ import annotations

import json
from typing import Final

import psycopg
from psycopg import sql

from gateway.bulk.rows import BulkError, SpaceNote
from gateway.bulk.stores.notes import NOTE, note_to_json
from gateway.bulk.stores.pgvector_tables import (
    METRICS,
    VECTOR_INDEXES,
    Column,
    Connection,
    Name,
    Table,
    identifier,
    message_of,
)
from gateway.config.wording import quote

MAX_WIDTH: Final = 16_000
"""The largest number of dimensions of a `vector`."""
_MAX_INDEXED: Final = {"vector": 2_000, "halfvec": 4_000}
"""The largest number of dimensions that an index of pgvector supports, by type."""
_POLICIES: Final = """
SELECT CASE WHEN polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
       CASE polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE'
       ELSE 'ALL' END,
       polname, ARRAY(SELECT pg_get_userbyid(role)::text FROM unnest(polroles) role WHERE role <> 0),
       pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)
FROM pg_policy WHERE polrelid = %s ORDER BY polname
"""


_INDEX_SETTINGS: Final = """
SELECT CASE WHEN m.amname = 'hnsw' THEN c.reloptions END, pg_get_expr(i.indpred, i.indrelid)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam WHERE i.indexrelid = %s::regclass
"""


def require_extension(connection: Connection, store: str) -> None:
    """Create the extension if it is missing.

    Raises:
        BulkError: it cannot be created.
    """
    if connection.execute("SELECT to_regtype('vector')").fetchone() != (None,):
        return
    try:
        connection.execute("CREATE EXTENSION vector")
    except Exception as error:  # a missing package, a missing right or a lost server: the remedy is the same
        raise BulkError(
            f"{store} has no pgvector: install it, and have the owner of the database run CREATE EXTENSION vector"
        ) from error


def vector_type(width: int, place: str) -> str:
    """Return the type for vectors of a width: `halfvec` if only that type can be indexed.

    Raises:
        BulkError: pgvector does not support this width.
    """
    if not 0 < width <= MAX_WIDTH:
        raise BulkError(f"{place}: pgvector accepts dense vectors of at most {MAX_WIDTH:,} dimensions, got {width:,}")
    return "halfvec" if _MAX_INDEXED["vector"] < width <= _MAX_INDEXED["halfvec"] else "vector"


def create_table(connection: Connection, name: Name, store: str, note: SpaceNote, id_type: str, vector: str) -> None:
    """Create a table with an id, a vector, and a JSON payload, within the open transaction."""
    kind = vector_type(note.dimensions, f"{store}/{name}")
    connection.execute(
        sql.SQL("CREATE TABLE {} (id {} PRIMARY KEY, {} {}({}), payload jsonb)").format(
            name.sql, sql.SQL(id_type), identifier(vector), sql.SQL(kind), sql.Literal(note.dimensions)
        )
    )
    write_comment(connection, name, vector, note, None)
    _create_index(connection, name, vector, kind, note, _metric(note))


def create_like(connection: Connection, name: Name, other: Table, note: SpaceNote, vector: Column) -> None:
    """Create a table with the columns, indexes, grants and row security of another table, within the open transaction.

    Foreign keys and triggers are not copied, because they may prevent writing copies of rows.
    """
    if name.schema is other.name.schema is None:  # not the first schema of this role's search path, but the original's
        name = Name(name.table, _schema(connection, other.oid))
    kind = vector_type(note.dimensions, other.place)
    indexes = _indexes_of(connection, other, vector)
    connection.execute(sql.SQL("CREATE TABLE {} (LIKE {} INCLUDING ALL)").format(name.sql, other.name.sql))
    [oid] = connection.execute("SELECT %s::regclass::oid", [name.quoted]).fetchone() or (0,)
    for index, _operators in connection.execute(VECTOR_INDEXES, [oid, vector.name]).fetchall():
        connection.execute(sql.SQL("DROP INDEX {}").format(sql.SQL(index)))
    connection.execute(
        sql.SQL("ALTER TABLE {} ALTER COLUMN {} TYPE {}({})").format(
            name.sql, identifier(vector.name), sql.SQL(kind), sql.Literal(note.dimensions)
        )
    )
    copy_grants(connection, other.oid, name)
    write_comment(connection, name, vector.name, note, vector.comment)
    if vector.size > _MAX_INDEXED.get(vector.kind, MAX_WIDTH):  # so no index tells that the owner wants none
        indexes = indexes or [(_metric(note), "")]
    for metric, settings in indexes:
        _create_index(connection, name, vector.name, kind, note, metric, settings)
    _copy_row_security(connection, other, name)  # last: it may give the table to another owner


def _schema(connection: Connection, oid: int) -> str:
    query = "SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s"
    [schema] = connection.execute(query, [oid]).fetchone() or ("",)
    return str(schema)


def replace_view(connection: Connection, oid: int, table: Name) -> None:
    """Let a view show another table, within the open transaction. It keeps its schema, grants, owner and options."""
    query = "SELECT relname, pg_get_userbyid(relowner), current_user, reloptions FROM pg_class WHERE oid = %s"
    [view, owner, mine, options] = connection.execute(query, [oid]).fetchone() or ("", "", "", None)
    name, spare = Name(view, _schema(connection, oid)), f"gateway_{oid}"  # a name may already have all 63 bytes
    connection.execute(sql.SQL("ALTER VIEW {} RENAME TO {}").format(name.sql, identifier(spare)))
    given = sql.SQL(f" WITH ({', '.join(options)})" if options else "")  # such as security_invoker=true
    connection.execute(sql.SQL("CREATE VIEW {}{} AS SELECT * FROM {}").format(name.sql, given, table.sql))
    copy_grants(connection, oid, name)
    _copy_view_comments(connection, oid, name)
    if owner != mine:
        may_read = "SELECT has_table_privilege(%s, to_regclass(%s), 'SELECT')"
        if connection.execute(may_read, [owner, table.quoted]).fetchone() != (True,):
            raise BulkError(
                f"{quote(owner)}, who owns the view {quote(view)}, may not read {table}: grant SELECT on it first"
            )
        connection.execute(sql.SQL("ALTER VIEW {} OWNER TO {}").format(name.sql, identifier(owner)))
    connection.execute(sql.SQL("DROP VIEW {}").format(Name(spare, name.schema).sql))


def _copy_view_comments(connection: Connection, oid: int, name: Name) -> None:
    """Copy the comments of a view and of its columns to another view with the same columns."""
    query = """
        SELECT a.attname, d.description
        FROM pg_description d LEFT JOIN pg_attribute a ON a.attrelid = d.objoid AND a.attnum = d.objsubid AND a.attnum > 0
        WHERE d.objoid = %s AND d.classoid = 'pg_class'::regclass
    """
    for column, comment in connection.execute(query, [oid]).fetchall():
        target = sql.SQL("VIEW {}").format(name.sql)
        if column is not None:
            target = sql.SQL("COLUMN {}.{}").format(name.sql, identifier(column))
        connection.execute(sql.SQL("COMMENT ON {} IS {}").format(target, sql.Literal(comment)))


def copy_grants(connection: Connection, oid: int, name: Name) -> None:
    """Copy the grants of a table or view to another, whose maker may be another role than the owner of the first."""
    grants = """
        SELECT NULL, CASE WHEN grantee = 0 THEN NULL ELSE pg_get_userbyid(grantee) END, privilege_type, is_grantable
        FROM pg_class, aclexplode(relacl) WHERE oid = %(oid)s AND grantee <> relowner
        UNION ALL
        SELECT attname::text, CASE WHEN grantee = 0 THEN NULL ELSE pg_get_userbyid(grantee) END, privilege_type, is_grantable
        FROM pg_class c JOIN pg_attribute ON attrelid = c.oid, aclexplode(attacl)
        WHERE c.oid = %(oid)s AND grantee <> relowner AND NOT attisdropped
        UNION ALL SELECT NULL, pg_get_userbyid(relowner), 'ALL', true
        FROM pg_class WHERE oid = %(oid)s AND pg_get_userbyid(relowner) <> current_user
    """
    for column, role, privilege, is_grantable in connection.execute(grants, {"oid": oid}).fetchall():
        connection.execute(
            sql.SQL("GRANT {}{} ON {} TO {}{}").format(
                sql.SQL(privilege),
                sql.SQL("") if column is None else sql.SQL(" ({})").format(identifier(column)),
                name.sql,
                sql.SQL("PUBLIC") if role is None else identifier(role),
                sql.SQL(" WITH GRANT OPTION" if is_grantable else ""),
            )
        )


def _copy_row_security(connection: Connection, other: Table, name: Name) -> None:
    """Copy the row security of a table: without it, each role with grants would see all rows of the copy.

    Raises:
        BulkError: a policy cannot be copied, for example because it names the table itself.
    """
    query = "SELECT relrowsecurity, relforcerowsecurity, pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s"
    [is_on, is_forced, owner] = connection.execute(query, [other.oid]).fetchone() or (False, False, "")
    if not is_on:
        return
    for *parts, policy, roles, uses, checks in connection.execute(_POLICIES, [other.oid]).fetchall():
        statement = sql.SQL("CREATE POLICY {} ON {} AS {} FOR {} TO {}{}{}").format(
            identifier(policy),
            name.sql,
            *map(sql.SQL, parts),
            sql.SQL(", ").join([identifier(role) for role in roles] or [sql.SQL("PUBLIC")]),
            sql.SQL(f" USING ({uses})" if uses else ""),
            sql.SQL(f" WITH CHECK ({checks})" if checks else ""),
        )
        try:
            connection.execute(statement)
        except psycopg.Error as error:
            raise BulkError(
                f"the policy {quote(policy)} of {other.place} cannot be copied: {message_of(error)}. Create the new table "
                "yourself, with its policies and without rows, and name it with --into"
            ) from error
    changes = ["ENABLE ROW LEVEL SECURITY", *(["FORCE ROW LEVEL SECURITY"] if is_forced else [])]
    for change in changes:
        connection.execute(sql.SQL("ALTER TABLE {} {}").format(name.sql, sql.SQL(change)))
    # Policies do not apply to the owner, and so not to views of the owner either.
    try:
        connection.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(name.sql, identifier(owner)))
    except psycopg.errors.InsufficientPrivilege as error:
        raise BulkError(
            f"the copy of {other.place} must have its owner, {quote(owner)}, because policies do not apply to an owner: "
            f"{message_of(error)}. Move as that role, or create the new table yourself, and name it with --into"
        ) from error


def add_vector(connection: Connection, table: Table, vector: str, note: SpaceNote) -> None:
    """Add a column of vectors to a table, within the open transaction."""
    kind = vector_type(note.dimensions, table.place)
    connection.execute(
        sql.SQL("ALTER TABLE {} ADD COLUMN {} {}({})").format(
            table.name.sql, identifier(vector), sql.SQL(kind), sql.Literal(note.dimensions)
        )
    )
    write_comment(connection, table.name, vector, note, None)
    _create_index(connection, table.name, vector, kind, note, _metric(note))


def _metric(note: SpaceNote) -> str:
    return "cosine" if note.is_normalized else "ip"


def _indexes_of(connection: Connection, table: Table, vector: Column) -> list[tuple[str, str]]:
    """Return the metric of each index of a column of vectors, and its settings and condition as SQL.

    An index of another kind becomes hnsw with default settings: ivfflat takes its lists from the rows that exist when it is
    created, so in an empty table it would find few neighbors.
    """
    found = {}
    for index, operators in connection.execute(VECTOR_INDEXES, [table.oid, vector.name]).fetchall():
        metric = next((metric for metric in METRICS if f"_{metric}_" in operators), "cosine")
        [options, condition] = connection.execute(_INDEX_SETTINGS, [index]).fetchone() or (None, None)
        settings = f" WITH ({', '.join(options)})" if options else ""
        found[metric, condition] = settings + (f" WHERE {condition}" if condition else "")
    return [(metric, settings) for (metric, _condition), settings in found.items()]


def _create_index(
    connection: Connection, name: Name, vector: str, kind: str, note: SpaceNote, metric: str, settings: str = ""
) -> None:
    """Create an index of a column of vectors, if pgvector supports one of that width."""
    if note.dimensions <= _MAX_INDEXED[kind]:
        connection.execute(
            sql.SQL("CREATE INDEX ON {} USING hnsw ({} {}){}").format(
                name.sql, identifier(vector), sql.SQL(f"{kind}_{metric}_ops"), sql.SQL(settings)
            )
        )


def write_comment(connection: Connection, name: Name, vector: str, note: SpaceNote, comment: str | None) -> None:
    """Write the note into the comment of a column, after the comment's other lines."""
    lines = [line for line in (comment or "").splitlines() if not line.startswith(f"{NOTE}=")]
    text = "\n".join([*lines, f"{NOTE}={json.dumps(note_to_json(note))}"])
    connection.execute(sql.SQL("COMMENT ON COLUMN {}.{} IS {}").format(name.sql, identifier(vector), sql.Literal(text)))
