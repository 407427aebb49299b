"""A LanceDB table that stores the vectors of a job."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Final

import pyarrow as pa
from lancedb import DBConnection
from lancedb.table import Table

from gateway.bulk.files.tables import Tables
from gateway.bulk.rows import BulkError, EmbeddedRows, Row, SpaceNote
from gateway.bulk.stores.lancedb_tables import find_table, plain_errors
from gateway.bulk.stores.notes import NOTE, check_note, note_from_json, note_to_json
from gateway.bulk.stores.protocol import SinkOptions

_KEY: Final = NOTE.encode()


class LanceSink:
    """Writes each shard as one version of the table. Its rows replace rows with the same id.

    The first shard creates the table, and its rows determine the columns.
    """

    def __init__(self, database: DBConnection, name: str, table: str, options: SinkOptions) -> None:
        self.name = name
        self._database = database
        self._table_name = table
        self._options = options
        self._table: Table | None = None
        self._tables: Tables | None = None
        self._note: SpaceNote | None = None
        self._metadata: dict[bytes, bytes] = {}
        self._has_written = False

    def count(self) -> int:
        """Return the number of rows; 0 if the table does not exist."""
        table = find_table(self._database, self._table_name, self.name)
        with plain_errors(self.name):
            return 0 if table is None else int(table.count_rows())

    def open(self, note: SpaceNote) -> None:
        """Check that an existing table has vectors of this space.

        Raises:
            BulkError: the table has vectors of another space, or was not written by the gateway.
        """
        self._metadata = {_KEY: json.dumps(note_to_json(note)).encode()}
        # Lance reads a dot as a path, so a field with a dot goes into the rest.
        self._tables = Tables(pa, note, self._options.text, lambda name: name != "" and "." not in name)
        self._note = note
        self._table = find_table(self._database, self._table_name, self.name)
        if self._table is not None:
            self._tables.take_columns(self._checked(self._table, note))

    def _checked(self, table: Table, note: SpaceNote) -> pa.Schema:
        """Return the schema of a table that can take vectors of this space."""
        schema = table.schema
        written = (schema.metadata or {}).get(_KEY)
        if written is None:
            raise BulkError(f"{self.name} is a table without a note of its space: embed into a new table")
        check_note(note_from_json(json.loads(written), self.name), note, self.name, table.count_rows())
        return schema

    def problem(self, row: Row) -> str:
        """Return the reason why the table cannot store a row; empty if it can."""
        return "" if self._tables is None else self._tables.problem(row)

    def write(self, shard: int, batch: EmbeddedRows) -> None:
        """Store a shard's rows, all or none.

        Raises:
            BulkError: a row does not fit, or the folder cannot be written.
        """
        if self._tables is None or self._note is None:
            raise RuntimeError("a sink must be opened before the first write")
        if not batch.rows:
            return
        if self._table is None:  # another job may have created it since, in another space or with other columns
            self._table = find_table(self._database, self._table_name, self.name)
            if self._table is not None:
                self._tables.take_columns(self._checked(self._table, self._note))
        if not self._tables.has_columns:
            self._tables.choose_columns(batch)
        rows = self._tables.table(batch, self._metadata)
        if len(set(rows["id"].to_pylist())) < len(rows):
            raise BulkError(f"{self.name}: two rows of a shard have the same id, at or after {batch.rows[0].place}")
        with plain_errors(self.name):
            if self._table is None:
                self._table = self._database.create_table(self._table_name, schema=rows.schema)
            merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows)
        self._has_written = True

    def close(self) -> None:
        """Merge the small files that many shards leave behind."""
        if self._table is not None and self._has_written:
            # This only makes reading faster; the rows are already safe.
            with suppress(ValueError, OSError, RuntimeError):
                self._table.optimize()
