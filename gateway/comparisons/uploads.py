"""Data sets from uploaded tables: documents, queries and judgments as CSV, TSV or JSON lines, written in BEIR's layout.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.comparisons.runs import Runs
from gateway.comparisons.sheet import MAX_ID
from gateway.config.wording import count, cut
from gateway.errors import BadInput, NotFound

MAX_DATA_SETS: Final = 100
_MAX_DOCUMENTS: Final = 200_000
_MAX_QUERIES: Final = 20_000
_MAX_JUDGMENTS: Final = 1_000_000
_MAX_TEXT: Final = 100_000
_DELIMITERS: Final = ("\t", ",", ";")
_ID_NAMES: Final = ("_id", "id")
_JUDGMENT_NAMES: Final = (
    ("query-id", "query_id", "query"),
    ("corpus-id", "corpus_id", "document", "document-id", "document_id"),
    ("score", "grade", "relevance"),
)
# Files that are not tables, by their first bytes: enough of them that no text begins so. A spreadsheet is an archive.
_NO_TABLES: Final = (
    ((b"\xff\xfe", b"\xfe\xff"), "is in UTF-16 or UTF-32: save it as UTF-8"),
    ((b"PK\x03\x04", b"\xd0\xcf\x11\xe0"), "is a spreadsheet or an archive: save it as CSV in UTF-8"),
    (
        (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", *(b"BZh%d1AY&SY" % n for n in range(1, 10))),
        "is compressed: upload it uncompressed",
    ),
    ((b"PAR1\x15",), "is Parquet: write it as JSON lines"),
)
# The columns that are read; data sets have others, such as BEIR's `metadata`, with any values.
_READ: Final = frozenset(("title", "text", "group", *_ID_NAMES, *(name for names in _JUDGMENT_NAMES for name in names)))


@dataclass(frozen=True, slots=True)
class Table:
    """An uploaded file.

    Attributes:
        field: the field of the form, for error messages.
    """

    field: str
    filename: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """A data set that was written."""

    name: str
    num_documents: int
    num_queries: int
    num_judgments: int


def store_data_set(folder: Path, name: str, tables: Mapping[str, Table]) -> Stored:
    """Write a data set, completely or not at all.

    Args:
        folder: the folder of the data sets, which is created if missing.
        tables: ``documents``, and perhaps ``queries`` and ``judgments`` of both. Without queries, a comparison on the data
            needs captured ones.

    Raises:
        BadInput: a table is missing or wrong, the name is taken, or the folder cannot be written.
    """
    Runs.check_name(name, "data set")
    for field in ("documents", "queries") if "judgments" in tables else ("documents",):
        if field not in tables:
            raise BadInput(f"the form has no file `{field}`", param=field)
    documents = _texts(tables["documents"], _MAX_DOCUMENTS, ("title", "text"))
    queries = _texts(tables["queries"], _MAX_QUERIES, ("text", "group")) if "queries" in tables else {}
    judgments = _judgments(tables["judgments"], documents, queries) if "judgments" in tables else []
    parts: list[tuple[str, Iterator[str]]] = [
        ("corpus.jsonl", (_line(row) for row in documents.values())),
    ]
    if queries:
        parts.append(("queries.jsonl", (_line(row) for row in queries.values())))
    if judgments:
        header = "query-id\tcorpus-id\tscore\n"
        rows = (f"{query}\t{document}\t{score}\n" for query, document, score in judgments)
        parts.append(("qrels/test.tsv", iter((header, *rows))))
    _write(folder, name, parts)
    return Stored(name, len(documents), len(queries), len(judgments))


def remove_data_set(folder: Path, name: str) -> None:
    """Delete a data set; only the link, if it is one.

    Raises:
        NotFound: there is no such data set.
        BadInput: it cannot be deleted.
    """
    if not Runs.is_name(name) or not (folder / name).is_dir():
        raise NotFound(f"no data set is called {cut(name)!r}")
    path = folder / name
    try:
        path = path.rename(folder / f".old-{secrets.token_hex(6)}")  # first, so that no comparison finds half of it
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be deleted: {error.strerror}") from error


def _write(folder: Path, name: str, parts: Sequence[tuple[str, Iterator[str]]]) -> None:
    temporary = folder / f".new-{secrets.token_hex(6)}"  # a hidden folder is not a data set
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / name):
            raise BadInput(f"a data set {name!r} already exists: choose another name", param="name")
        if sum(1 for path in folder.iterdir() if Runs.is_name(path.name) and path.is_dir()) >= MAX_DATA_SETS:
            raise BadInput(f"{folder} has {MAX_DATA_SETS} data sets: remove some")
        for place, lines in parts:
            path = temporary / place
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(lines)
        temporary.rename(folder / name)
    except OSError as error:
        raise BadInput(f"{folder / name} cannot be written: {error.strerror}; data sets are kept there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _line(row: Mapping[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _texts(table: Table, most: int, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the texts of a table by id, in BEIR's form.

    The first line names the columns, including ``text``. In a ``.txt`` file, each line is a text. Texts without an id
    are numbered from 1.
    """
    rows: dict[str, dict[str, str]] = {}
    for number, row in _rows(table):
        text = row.get("text", "").strip()
        if not text:
            continue
        if len(text) > _MAX_TEXT:
            raise _wrong(table, number, f"the text has {len(text):,} characters; the limit is {_MAX_TEXT:,}")
        id_ = next((row[key].strip() for key in _ID_NAMES if row.get(key, "").strip()), "") or str(len(rows) + 1)
        if any(character.isspace() or character < " " for character in id_):
            raise _wrong(table, number, f"the id {cut(id_)!r} contains white space or a control character")
        if len(id_) > MAX_ID:
            raise _wrong(table, number, f"the id has {len(id_):,} characters; the limit is {MAX_ID:,}")
        if id_ in rows:
            raise _wrong(table, number, f"an earlier text has the id {cut(id_)!r} too")
        if len(rows) >= most:
            raise _wrong(table, number, f"the file has more than {most:,} texts")
        kept = {column: row[column].strip() for column in columns if column != "text" and row.get(column, "").strip()}
        rows[id_] = {"_id": id_, **kept, "text": text}
    if not rows:
        raise BadInput(f"{table.field}: {cut(table.filename)!r} has no texts", param=table.field)
    return rows


def _judgments(
    table: Table, documents: Mapping[str, object], queries: Mapping[str, object]
) -> list[tuple[str, str, int]]:
    """Return the judgments of a table: the id of a query, the id of a document, and a score."""
    found: dict[tuple[str, str], int] = {}
    for number, row in _rows(table):
        values = [next((row[key].strip() for key in keys if key in row), "") for keys in _JUDGMENT_NAMES]
        if not any(values):
            continue
        query, document, text = values
        if query not in queries or document not in documents:
            unknown = query if query not in queries else document
            what = "queries" if query not in queries else "documents"
            raise _wrong(table, number, f"{cut(unknown)!r} is not the id of one of the {what}")
        if not text.removeprefix("-").isdecimal() or len(text) > 4:
            raise _wrong(table, number, f"the score must be a whole number, got {cut(text)!r}")
        if len(found) >= _MAX_JUDGMENTS:
            raise _wrong(table, number, f"the file has more than {_MAX_JUDGMENTS:,} judgments")
        score = int(text)
        if found.setdefault((query, document), score) != score:
            earlier = found[query, document]
            raise _wrong(
                table,
                number,
                f"query {cut(query)!r} and document {cut(document)!r} have the scores {earlier} and {score}: keep one",
            )
    if not found:
        raise BadInput(f"{table.field}: {cut(table.filename)!r} has no judgments", param=table.field)
    return [(*pair, score) for pair, score in found.items()]


def _rows(table: Table) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each line and its values by column.

    Raises:
        BadInput: the file is not UTF-8, or a line is wrong.
    """
    for starts, problem in _NO_TABLES:
        if table.content.startswith(starts):
            raise BadInput(f"{table.field}: {cut(table.filename)!r} {problem}", param=table.field)
    try:
        text = table.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{table.field}: {cut(table.filename)!r} is not UTF-8 at byte {error.start + 1}: save it as UTF-8",
            param=table.field,
        ) from error
    if table.filename.lower().endswith(".txt"):
        yield from ((number, {"text": line}) for number, line in enumerate(io.StringIO(text), 1))
    elif text.lstrip().startswith("[") and table.filename.lower().endswith((".json", ".jsonl", ".ndjson")):
        raise _wrong(table, 1, "the file is a JSON array: write JSON lines, an object in each line")
    elif text.lstrip().startswith("{"):
        yield from _json_rows(table, text)
    else:
        yield from _csv_rows(table, text)


def _json_rows(table: Table, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _wrong(table, number, "the line is not JSON") from error
        if not isinstance(row, dict):
            raise _wrong(table, number, "the line is not a JSON object")
        names = {key: key.lower() for key, value in row.items() if value is not None}
        _check_columns(table, number, list(names.values()))
        yield number, {name: _value(table, number, name, row[key]) for key, name in names.items() if name in _READ}


def _value(table: Table, number: int, name: str, value: object) -> str:
    """Return a value of a JSON object as text. Ids and scores may be numbers."""
    if isinstance(value, bool | list | dict):
        got = "true or false" if isinstance(value, bool) else "a list" if isinstance(value, list) else "an object"
        raise _wrong(table, number, f"`{name}` must be a string, got {got}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise _wrong(table, number, f"`{name}` contains half a surrogate pair, {half!r}, which is not text") from None
    return text


def _csv_rows(table: Table, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    first_line = text.lstrip("\r\n").partition("\n")[0]
    is_tabbed = table.filename.lower().endswith((".tsv", ".tab"))
    delimiter = "\t" if is_tabbed else max(_DELIMITERS, key=first_line.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: Sequence[str] | None = None
    try:
        for cells in lines:
            number = lines.line_num
            if names is None:
                # Some exports begin with a blank line.
                names = _names(table, cells) if any(cells) else None
                continue
            if any(cell.strip() for cell in cells[len(names) :]):
                raise _wrong(table, number, f"the line has {count(len(cells), 'column')}, not {len(names)}")
            yield number, dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise _wrong(table, lines.line_num, f"the line cannot be read: {error}") from error


def _names(table: Table, cells: Sequence[str]) -> Sequence[str]:
    """Return the names of the columns, which the first line has."""
    names = [cell.strip().lower() for cell in cells]
    _check_columns(table, 1, names)
    if table.field == "judgments":
        if all(any(key in names for key in keys) for keys in _JUDGMENT_NAMES):
            return names
        usual = ", ".join(keys[0] for keys in _JUDGMENT_NAMES)
        raise _wrong(table, 1, f"the first line must have the columns {usual}")
    if "text" not in names:
        raise _wrong(
            table, 1, "the first line must name the columns, including `text`; for a text in each line, use .txt"
        )
    return names


def _check_columns(table: Table, number: int, names: Sequence[str]) -> None:
    """Refuse a column that appears twice: only one of its values could be read."""
    if twice := next((name for name in names if name in _READ and names.count(name) > 1), None):
        raise _wrong(table, number, f"the column `{twice}` appears twice")


def _wrong(table: Table, number: int, problem: str) -> BadInput:
    return BadInput(f"{table.field}, line {number:,} of {cut(table.filename)!r}: {problem}", param=table.field)
