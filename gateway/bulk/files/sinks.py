"""Files of vectors as sinks: JSON lines, and the choice between JSON lines and Parquet."""

from __future__ import annotations

import json
from typing import BinaryIO

import numpy as np
import orjson

from gateway.bulk.files.columns import ID, MULTIVECTOR, REST, SPARSE, VECTOR
from gateway.bulk.files.folder import FolderSink
from gateway.bulk.rows import BulkError, EmbeddedRows, Json

_JSONL_ENDINGS = (".jsonl", ".ndjson")


def open_folder(place: str, text_field: str | None) -> FolderSink:
    """Return the sink of a folder, which need not exist: JSON lines if its name ends in ``.jsonl``, else Parquet.

    Raises:
        BulkError: a package is missing, or the URL is wrong.
    """
    if place.rstrip("/").lower().endswith(_JSONL_ENDINGS):
        return JsonlSink(place, text_field)
    from gateway.bulk.files.parquet_sink import ParquetSink

    return ParquetSink(place, text_field)


class JsonlSink(FolderSink):
    """JSON lines: ``{"id": …, "text": …, …, "vector": […]}``, one line per row."""

    ending = ".jsonl"

    def _encode(self, shard: int, batch: EmbeddedRows, file: BinaryIO) -> None:
        for index, row in enumerate(batch.rows):
            columns, rest = self._flat.flatten(row)
            line: dict[str, Json | object] = {ID: row.id, **columns}
            if batch.dense is not None:
                line[VECTOR] = batch.dense[index]
            if batch.sparse is not None:
                weights = batch.sparse[index]
                line[SPARSE] = {"indices": weights.indices, "values": weights.values}
            if batch.multivectors is not None:
                line[MULTIVECTOR] = batch.multivectors[index]
            if rest:
                line[REST] = rest
            file.write(_dump(line, row.place))

    def _space_found(self) -> str | None:
        return None  # the manifest keeps the note


def _dump(line: dict[str, Json | object], place: str) -> bytes:
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # an integer of more than 64 bits
        try:
            return f"{json.dumps(line, ensure_ascii=False, default=np.ndarray.tolist)}\n".encode()
        except (TypeError, ValueError) as error:
            raise BulkError(f"{place}: cannot be written as JSON: {error}") from error
