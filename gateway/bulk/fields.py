"""Choose the fields of a record that become the id, the text, the title and the payload of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from gateway.bulk.rows import BadRow, BulkError, Json, Position, Row, RowId
from gateway.config.wording import cut, describe, did_you_mean

ID_FIELDS = ("id", "_id")
TEXT_FIELDS = ("text", "content", "page_content", "document", "data")
"""The names to look for if the user names no field: ``page_content`` is LangChain's, ``data`` Mem0's."""

Record = Mapping[str, Json]

_MAX_ID_CHARACTERS = 1024
_MAX_LISTED = 30
_ABSENT = object()
_NOT_UNICODE = "is not valid Unicode: it contains a lone surrogate"


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The fields as the user names them; ``None`` for the default.

    A name may be a path: ``payload.text`` is the field ``text`` of the field ``payload``.

    Attributes:
        title: a field whose text is put in front of the text of ``text``.
        payload: the other fields to keep, each under the last part of its path; ``None`` for all.
    """

    id: str | None = None
    text: str | None = None
    title: str | None = None
    payload: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of the records of one source.

    Attributes:
        id: ``None`` if the records have no id: the source then makes one.
    """

    id: str | None
    text: str
    title: str | None = None
    payload: tuple[str, ...] | None = None

    def row(self, record: Record, place: str, position: Position, row_id: RowId | None = None) -> Row | BadRow:
        """Return the row of a record, or the reason why it cannot be embedded.

        Args:
            row_id: the id, if it is not one of the record's fields.
        """
        found_id = row_id if row_id is not None else self._id(record)
        if not _is_id(found_id):
            return BadRow(place, f"the id in field `{self.id}` {_wrong_id(found_id)}", position)
        text = get(record, self.text)
        if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
            return BadRow(place, f"the text in field `{self.text}` {_wrong_text(text)}", position, found_id)
        num_title = 0
        title = None if self.title is None else get(record, self.title)
        if title not in (None, _ABSENT, ""):
            if not isinstance(title, str):
                problem = f"the title in field `{self.title}` must be text, got {describe(title)}"
                return BadRow(place, problem, position, found_id)
            text, num_title = f"{title} {text}", len(title) + 1
        text_names = names_on(record, self.text) if "." in self.text else ()
        return Row(found_id, text, self._payload(record), place, position, num_title, text_names)

    def _id(self, record: Record) -> object:
        return _ABSENT if self.id is None else get(record, self.id)

    def _payload(self, record: Record) -> Record:
        if self.payload is None:
            return _without({name: value for name, value in record.items() if name != self.id}, self.text)
        found = ((path.rpartition(".")[2], get(record, path)) for path in self.payload)
        return {name: value for name, value in found if value is not _ABSENT}  # type: ignore[misc]


def resolve_fields(names: FieldNames, records: Sequence[Record], source: str) -> Fields:
    """Find the fields in the first records of a source.

    Args:
        records: the first records of the source; at least one.
        source: the name of the source, for messages.

    Raises:
        BulkError: no record has the field that the user named, or a field that can be the text.
    """
    paths = list(dict.fromkeys(path for record in records for path in paths_of(record)))

    def exists(path: str) -> bool:
        return any(has(record, path) for record in records)

    def known(path: str | None, option: str) -> str | None:
        if path is not None and not exists(path):
            raise BulkError(f"{source}: {option} {path}: no such field{did_you_mean(path, paths)}; {_listed(paths)}")
        return path

    row_id = known(names.id, "--id") or next(filter(exists, ID_FIELDS), None)
    text = known(names.text, "--text") or next(filter(exists, TEXT_FIELDS), None)
    if text is None:
        raise BulkError(
            f"{source}: no field is called {' or '.join(f'`{name}`' for name in TEXT_FIELDS)}: name the text field "
            f"with --text FIELD; {_listed(paths)}"
        )
    title = known(names.title, "--title")
    _check_payload(names.payload, source)
    return Fields(row_id, text, title, names.payload)


def _check_payload(paths: Sequence[str] | None, source: str) -> None:
    """Check that no two fields of the payload get the same name, and leave out fields that the records lack."""
    seen: dict[str, str] = {}
    for path in paths or ():
        name = path.rpartition(".")[2]
        if name in seen:
            raise BulkError(
                f"{source}: --payload has {seen[name]} and {path}, and both would be stored as `{name}`: leave out one"
            )
        seen[name] = path


def get(record: Record, path: str) -> Json | object:
    """Return the value at a path, or an object that is not JSON if the record has no such field.

    A field whose own name contains the dot takes precedence over a nested field.
    """
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    while dot:
        inner = record.get(head)
        if isinstance(inner, Mapping) and (found := get(inner, rest)) is not _ABSENT:
            return found
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return _ABSENT


def has(record: Record, path: str) -> bool:
    """Return whether a record has a field at a path."""
    return get(record, path) is not _ABSENT


def names_on(record: Record, path: str) -> tuple[str, ...]:
    """Return the names of the fields on the path of an existing field, of which each may contain a dot itself."""
    if path in record:
        return (path,)
    head, dot, rest = path.partition(".")
    while dot:
        inner = record.get(head)
        if isinstance(inner, Mapping) and get(inner, rest) is not _ABSENT:
            return (head, *names_on(inner, rest))
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return ()


def _without(record: Record, path: str) -> Record:
    """Return a record without the existing field at a path."""
    if path in record:
        return {name: value for name, value in record.items() if name != path}
    head, dot, rest = path.partition(".")
    while dot:
        inner = record.get(head)
        if isinstance(inner, Mapping) and get(inner, rest) is not _ABSENT:
            return {**record, head: _without(inner, rest)}
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return record


def paths_of(record: Record, prefix: str = "") -> list[str]:
    """Return the paths of the fields of a record, down to the second level."""
    paths: list[str] = []
    for name, value in record.items():
        paths.append(f"{prefix}{name}")
        if isinstance(value, Mapping) and not prefix.count("."):
            paths += paths_of(value, f"{prefix}{name}.")
    return paths


def _listed(paths: Sequence[str]) -> str:
    if not paths:
        return "the first records have no fields"
    more = len(paths) - _MAX_LISTED
    names = ", ".join(cut(path) for path in paths[:_MAX_LISTED])
    return f"the fields are: {names}{f' and {more} more' if more > 0 else ''}"


def _is_id(value: object) -> TypeGuard[RowId]:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number or (isinstance(value, str) and 0 < len(value) <= _MAX_ID_CHARACTERS and _is_unicode(value))


def _is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, which lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong_id(value: object) -> str:
    if value is _ABSENT:
        return "is missing"
    if isinstance(value, str) and not _is_unicode(value):
        return _NOT_UNICODE
    if isinstance(value, str) and value:
        return f"has {len(value):,} characters; the limit is {_MAX_ID_CHARACTERS:,}"
    return f"must be text or an integer, got {describe(value)}"


def _wrong_text(value: object) -> str:
    if value is _ABSENT:
        return "is missing"
    if isinstance(value, str) and not _is_unicode(value):
        return _NOT_UNICODE
    if isinstance(value, str):
        return "is empty" if not value else "is blank"
    return f"must be text, got {describe(value)}"
