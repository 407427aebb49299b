"""Rows of a Parquet file as JSON. Only this module and the sink's need pyarrow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from typing import Any

from gateway.bulk.fields import Record
from gateway.bulk.files.columns import REST, with_rest
from gateway.bulk.files.lines import FileRecord, Mark
from gateway.bulk.files.paths import SourceFile
from gateway.bulk.files.tables import is_json
from gateway.bulk.rows import BulkError, Json

_BATCH_ROWS = 512
_OLD_VECTORS = ("vector", "sparse", "multivector")


def import_pyarrow() -> Any:
    """Import and return pyarrow with its Parquet module.

    Raises:
        BulkError: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise BulkError(
            f'Parquet needs a package that is not installed ({error.name}): pip install "embedding-gateway[parquet]", '
            "or in a checkout: make install EXTRAS=stores"
        ) from error
    return pa


def count_rows(file: SourceFile) -> int:
    """Return the number of rows, from the end of the file.

    Raises:
        BulkError: it is not Parquet.
    """
    with _open(file) as opened:
        return int(opened.metadata.num_rows)


@contextmanager
def _open(file: SourceFile) -> Iterator[Any]:
    pa = import_pyarrow()
    with file.open_raw() as raw:  # rejects a pipe, and reports a missing file by its name
        try:
            opened = pa.parquet.ParquetFile(file.path if file.filesystem is None else raw)
        except pa.ArrowInvalid as error:
            raise BulkError(f"{file.path}: is not a Parquet file: {error}") from error
        with opened:
            yield opened


def read_parquet(
    file: SourceFile, start: Mark, columns: Sequence[str] | None, *, reads_all: bool = False
) -> Iterator[FileRecord]:
    """Yield the rows after a mark, whose ``offset`` and ``number`` are both a row number.

    Args:
        columns: the columns to keep; ``None`` for all.
        reads_all: read the others too.

    Raises:
        BulkError: a column to keep has bytes, or the file is damaged.
    """
    pa = import_pyarrow()
    with _open(file) as opened:
        if twice := _repeated(opened.schema_arrow.names):
            raise BulkError(f"{file.path}: two columns are called `{twice}`; rename or remove one of them")
        own = {field.name for field in opened.schema_arrow if is_json(field)}
        names = [
            name
            for name in opened.schema_arrow.names
            if columns is None or reads_all or name in columns or name in own & {REST}
        ]
        if columns is None or reads_all:  # vectors of another model are slow to read, and replaced anyway
            names = [name for name in names if name not in _OLD_VECTORS or not _is_nested(pa, opened, name)]
        convert = _converters(pa, file.path, opened.schema_arrow, names, columns)
        convert |= dict.fromkeys(own.intersection(names), _from_json)
        group, skipped = 0, 0
        while group < opened.num_row_groups and skipped + opened.metadata.row_group(group).num_rows <= start.offset:
            skipped += opened.metadata.row_group(group).num_rows
            group += 1
        number = skipped
        try:
            batches = opened.iter_batches(_BATCH_ROWS, list(range(group, opened.num_row_groups)), names)
            for batch in batches:
                first, number = max(0, start.offset - number), number + batch.num_rows
                kept = batch.slice(first)
                for row, content in enumerate(_rows(pa, kept, convert), start=number - kept.num_rows + 1):
                    whole = _whole(content) if REST in own and not isinstance(content, str) else content
                    yield FileRecord(whole, row, Mark(row, row))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise BulkError(f"{file.path}: cannot be read after row {number}: {error}") from error


def _rows(pa: Any, batch: Any, convert: Mapping[str, Callable[[Any], Json]]) -> Iterator[Record | str]:
    """Yield the rows of a batch; a row with a value that cannot be read does not affect the others."""
    try:
        rows: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError, LookupError, NotImplementedError):
        for index in range(batch.num_rows):
            row = _row(pa, batch, index)
            yield row if isinstance(row, str) else _converted(row, convert)
        return
    for row in rows:
        yield _converted(row, convert)


def _row(pa: Any, batch: Any, index: int) -> dict[str, Any] | str:
    """Return one row, or the problem with it."""
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return f"is not UTF-8: {error.reason}"
        except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
            text = _as_text(pa, column[index])
            if text is None:
                return f"the value in column `{name}` cannot be read: {error}"
            row[name] = text
    return row


def _as_text(pa: Any, value: Any) -> str | None:
    """Return the text of a value that has no equal in Python, such as a time in nanoseconds; ``None`` if it has none."""
    try:
        text = str(value.cast(pa.string()).as_py())
    except (pa.ArrowException, ValueError):
        return None
    return None if text.startswith("<") else text  # "<value out of range: 1000000000000000>"


def _converted(row: dict[str, Any], convert: Mapping[str, Callable[[Any], Json]]) -> Record:
    for name, change in convert.items():
        row[name] = change(row[name])
    return row


def _whole(record: Record) -> Record:
    """Return a row of a file that the gateway wrote. A field without a value is one that the row did not have."""
    fields = {name: value for name, value in record.items() if value is not None}
    rest = fields.pop(REST, None)
    return with_rest(fields, rest) if isinstance(rest, Mapping) else fields


def _from_json(text: Any) -> Json:
    """Parse the JSON text of a column; return the text itself if another program wrote it."""
    try:
        value: Json = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return str(text)
    return value


def _converters(
    pa: Any, path: str, schema: Any, names: Sequence[str], kept: Sequence[str] | None
) -> dict[str, Callable[[Any], Json]]:
    """Return a function for each column whose values are not JSON.

    Raises:
        BulkError: a column to keep holds bytes.
    """
    types = pa.types
    plain = [types.is_string, types.is_large_string, types.is_integer, types.is_boolean]
    converters: dict[str, Callable[[Any], Json]] = {}
    for name in names:
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if any(is_plain(kind) for is_plain in plain):
            continue
        is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
        if is_bytes and (kept is None or name in kept):
            raise BulkError(
                f"{path}: column `{name}` has bytes, which no sink can store: cast it to a string if it has text, or "
                "name the columns to keep with --payload"
            )
        converters[name] = _to_json
    return converters


def _repeated(names: Sequence[str]) -> str:
    return next((name for index, name in enumerate(names) if name in names[:index]), "")


def _is_nested(pa: Any, opened: Any, name: str) -> bool:
    return bool(pa.types.is_nested(opened.schema_arrow.field(name).type))


def _to_json(value: Any) -> Json:
    """Convert a value to JSON: times in ISO 8601, decimal numbers as text, numbers that are not finite as nothing."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():  # pandas writes NaN for a value that is missing
            return value if math.isfinite(value) else None
        case datetime() | date() | time():
            return value.isoformat()
        case Mapping():
            return {str(name): _to_json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_to_json(inner) for inner in value]
    return value.hex() if isinstance(value, bytes) else str(value)
