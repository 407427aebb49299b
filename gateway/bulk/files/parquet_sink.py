"""Parquet files as a sink: all files of a folder have the columns of the first one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, BinaryIO, Final

import orjson

from gateway.bulk.files.folder import FolderSink
from gateway.bulk.files.parquet import import_pyarrow
from gateway.bulk.files.tables import Tables
from gateway.bulk.rows import BulkError, EmbeddedRows, Row, SpaceNote

NOTE_KEY: Final = b"embedding-gateway"
"""The key of the note about the space in a file's metadata."""


class ParquetSink(FolderSink):
    """Parquet files with one row per source row, whose vector is a list of fixed size.

    The columns are those of `Tables`, with the fields of the first file.
    """

    ending = ".parquet"

    def __init__(self, place: str, text_field: str | None) -> None:
        super().__init__(place, text_field)
        self._text_field = text_field
        self._pa = import_pyarrow()
        self._tables: Tables | None = None

    def open(self, note: SpaceNote) -> None:
        """Open the folder. Files that it already has determine the columns of the others."""
        super().open(note)
        self._tables = Tables(self._pa, note, self._text_field)
        if self._exists(0):
            self._tables.take_columns(self._first_schema())

    def problem(self, row: Row) -> str:
        """Return the reason why the files cannot hold a row; empty if they can."""
        return "" if self._tables is None else self._tables.problem(row)

    def _encode(self, shard: int, batch: EmbeddedRows, file: BinaryIO) -> None:
        assert self._note is not None  # noqa: S101  `open` comes first
        assert self._tables is not None  # noqa: S101
        if shard == 0:
            self._tables.choose_columns(batch)
        elif not self._tables.has_columns:
            self._tables.take_columns(self._first_schema())
        table = self._tables.table(batch, {NOTE_KEY: orjson.dumps(asdict(self._note))})
        texts = [field.name for field in table.schema if self._pa.types.is_string(field.type)]
        self._pa.parquet.write_table(table, file, compression="zstd", use_dictionary=texts)

    def _first_schema(self) -> Any:
        with self._open_shard(0) as file:
            try:
                return self._pa.parquet.read_schema(file)
            except self._pa.ArrowInvalid as error:
                raise BulkError(f"{self.name}: {self.file_name(0)} is damaged: {error}") from error

    def _space_found(self) -> str | None:
        note = (self._first_schema().metadata or {}).get(NOTE_KEY)
        if note is None:
            raise BulkError(
                f"{self.name}: {self.file_name(0)} was not written by the gateway, and would be replaced; choose "
                "another folder"
            )
        return SpaceNote(**orjson.loads(note)).space
