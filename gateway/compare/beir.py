"""The files of a data set in BEIR's layout, read line by line.

::

    corpus.jsonl        {"_id": "…", "title": "…", "text": "…"}    one document per line; the title is optional
    queries.jsonl       {"_id": "…", "text": "…"}                  optional: "group" for queries that depend on each other
    qrels/test.tsv      query-id <tab> corpus-id <tab> score       optional: without it, no quality is measured

(Thakur et al. 2021, https://arxiv.org/abs/2104.08663.)
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from gateway.comparisons.sheet import MAX_ID, Tabs
from gateway.config.files import open_regular, why_not_text
from gateway.config.wording import cut
from gateway.errors import CompareError

HEADER = "query-id\tcorpus-id\tscore"

_MAX_SHOWN = 60
_BEGINNING_BYTES = 512
_MAX_LINE_BYTES = 64 * 2**20
# trec_eval has a counter for each possible score: its memory grows with the largest score, until it crashes.
_MAX_SCORE = 1_000_000
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
# The minimum ratio of the shorter to the longer text for a document that is its query with a few more words.
_NEARLY_ALL = 0.9

Judgments = dict[str, dict[str, int]]
"""Score by document by query."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of a data set.

    Attributes:
        texts: texts by id, with the title, if there is one, in front.
        same_text: ids that also belong to a query with the same text.
        other_text: ids that also belong to a query with another text.
    """

    texts: dict[str, str]
    same_text: frozenset[str]
    other_text: frozenset[str]


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of a data set.

    Attributes:
        texts: texts by id, without the titles, as in BEIR.
        groups: name of the group by query, for the queries that name a group.
        num_titles: number of queries with a title, which is not used.
    """

    texts: dict[str, str]
    groups: dict[str, str]
    num_titles: int


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines that are not blank, each with its ``file:line``."""
    try:
        with open_regular(path) as file:
            if why := why_not_text(file.peek(_BEGINNING_BYTES)[:_BEGINNING_BYTES]):
                raise CompareError(f"{path}: {why}")
            for number, line in enumerate(iter(partial(file.readline, _MAX_LINE_BYTES + 1), b""), start=1):
                if len(line) > _MAX_LINE_BYTES:
                    raise CompareError(f"{path}:{number}: the line has more than {_MAX_LINE_BYTES:,} bytes, the limit")
                # Some editors put a byte order mark in front.
                content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
                if content.strip():
                    yield f"{path}:{number}", content
    except FileNotFoundError:
        packed = path.with_name(f"{path.name}.gz")
        hint = f", but {packed.name}: unpack it" if packed.exists() else ""
        raise CompareError(f"{path}: there is no such file{hint}") from None
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_texts(path: Path) -> dict[str, str]:
    """Read the texts of ``corpus.jsonl`` by id, with the title, if there is one, in front."""
    return read_corpus(path, {}).texts


def read_corpus(path: Path, queries: Mapping[str, str]) -> Corpus:
    """Read ``corpus.jsonl``.

    Args:
        queries: query texts by id, for a comparison with the documents of the same id.
    """
    texts: dict[str, str] = {}
    same: set[str] = set()
    other: set[str] = set()
    for place, id_, entry in _entries(path):
        title, text = _title(place, entry), _text(place, entry, "text")
        texts[id_] = f"{title} {text}".strip()
        if id_ in queries:
            (same if _is_same(queries[id_], text, texts[id_]) else other).add(id_)
    return Corpus(texts, frozenset(same), frozenset(other))


def _is_same(query: str, text: str, whole: str) -> bool:
    """Return whether a document is the query, with or without its title, apart from spaces and a few words."""
    normalized = " ".join(query.split()).casefold()
    for content in (text, whole):
        found = " ".join(content.split()).casefold()
        shorter, longer = sorted((normalized, found), key=len)
        if shorter in longer and len(shorter) >= _NEARLY_ALL * len(longer):
            return True
    return False


def read_queries(path: Path) -> Queries:
    """Read ``queries.jsonl``."""
    texts: dict[str, str] = {}
    groups: dict[str, str] = {}
    num_titles = 0
    for place, id_, entry in _entries(path):
        texts[id_] = _text(place, entry, "text").strip()
        num_titles += bool(_title(place, entry).strip())
        if entry.get("group") is not None:
            groups[id_] = _id(place, entry, "group")
    return Queries(texts, groups, num_titles)


def _entries(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the place, the id and the keys of each line; ids are unique, and there is at least one line."""
    seen: set[str] = set()
    for place, line in read_lines(path):
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise CompareError(f"{place}: is not JSON: {error.msg}") from error
        if not isinstance(entry, dict):
            raise CompareError(f"{place}: must be a JSON object with _id and text, got {_shown(entry)}")
        if "_id" not in entry:
            raise CompareError(f"{place}: has no _id; its keys: {', '.join(entry) or 'none'}")
        id_ = _id(place, entry, "_id")
        if id_ in seen:
            raise CompareError(f"{place}: _id {id_!r} appears twice; every id must be unique")
        seen.add(id_)
        yield place, id_, entry
    if not seen:
        raise CompareError(f"{path}: is empty; at least one line is needed")


def _id(place: str, entry: Mapping[str, Any], key: str) -> str:
    id_ = entry[key]
    if isinstance(id_, int) and not isinstance(id_, bool):
        return str(id_)
    if not isinstance(id_, str) or not id_ or "\0" in id_:
        raise CompareError(f"{place}: {key} must be a non-empty text or an integer, got {_shown(id_)}")
    if (key == "_id" and id_ != id_.strip()) or any(mark in id_ for mark in "\t\n\r"):
        raise CompareError(
            f"{place}: {key} contains a tab or a line break, or begins or ends with a space, so a file of judgments cannot "
            f"name it: got {_shown(id_)}"
        )
    if len(id_) > MAX_ID:
        raise CompareError(f"{place}: {key} has {len(id_):,} characters; the limit is {MAX_ID:,}")
    return id_


def _title(place: str, entry: Mapping[str, Any]) -> str:
    return _text(place, entry, "title") if entry.get("title") is not None else ""


def _text(place: str, entry: Mapping[str, Any], key: str) -> str:
    if key not in entry:
        raise CompareError(f"{place}: has no {key}; its keys: {', '.join(entry)}")
    if not isinstance(entry[key], str):
        raise CompareError(f"{place}: {key} must be a text, got {_shown(entry[key])}")
    return str(entry[key])


def qrels_path(folder: Path, split: str | None) -> Path | None:
    """Return the file of judgments, or ``None`` if the folder has no such file."""
    found = {path.stem: path for path in sorted((folder / "qrels").glob("*.tsv"))}
    names = ", ".join(found) or "none"
    if split is not None:
        if split not in found:
            raise CompareError(f"{folder / 'qrels' / split}.tsv: there is no such file; the splits are: {names}")
        return found[split]
    if not found:
        return None
    if "test" in found:
        return found["test"]
    if len(found) > 1:
        raise CompareError(f"{folder / 'qrels'}: has several splits but not `test`; choose one with --split: {names}")
    return next(iter(found.values()))


def read_judgments(path: Path) -> Judgments:
    """Read a file of ``qrels/``."""
    judgments: Judgments = {}
    _add(judgments, path, is_form=False)
    if not judgments:
        raise CompareError(f"{path}: is empty; at least one judgment below the header is needed")
    return judgments


def add_judgments(judgments: Judgments, path: Path) -> tuple[int, int]:
    """Add the judgments of a filled-in ``to_judge.tsv``, whose lines may have more columns and may lack a score.

    Returns:
        The number of added judgments, and the number of lines without a score.

    Raises:
        CompareError: a line is wrong, or contradicts an earlier judgment.
    """
    before = sum(map(len, judgments.values()))
    num_empty = _add(judgments, path, is_form=True)
    return sum(map(len, judgments.values())) - before, num_empty


def _add(judgments: Judgments, path: Path, *, is_form: bool) -> int:
    """Add the judgments of a file, and return the number of form lines without a score."""
    is_first = True
    num_empty = 0
    for place, line in read_lines(path):
        query, document, text = _columns(place, line, is_form=is_form)
        if is_first:
            if _is_number(text):
                raise CompareError(
                    f"{place}: the header is missing: the first line must be {HEADER!r}, got "
                    f"{_shown_line((query, document, text))}"
                )
            is_first = False
            continue
        if not text:
            num_empty += 1
            continue
        score = _integer(text)
        if score is None:
            raise CompareError(f"{place}: the score must be an integer, got {_shown(text)}")
        if abs(score) > _MAX_SCORE:
            raise CompareError(f"{place}: the score must be from {-_MAX_SCORE:,} to {_MAX_SCORE:,}, got {_shown(text)}")
        scores = judgments.setdefault(query, {})
        if scores.setdefault(document, score) != score:
            raise CompareError(
                f"{place}: query {query!r} and document {document!r} have score {score}, and {scores[document]} earlier"
            )
    return num_empty


def _columns(place: str, line: bytes, *, is_form: bool) -> Sequence[str]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise CompareError(f"{place}: is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    if is_form and len(columns := _cells(text)) >= 3 and all(columns[:2]):
        return columns[:3]
    columns = [column.strip() for column in text.split("\t")]
    if len(columns) != 3 or not all(columns):
        raise CompareError(
            f"{place}: must have 3 columns, separated by tabs (query-id, corpus-id, score), got {_shown_line(columns)}"
        )
    return columns


def _cells(text: str) -> list[str]:
    """Return the columns of a line that a spreadsheet may have written; empty if the line has another form."""
    try:
        return [column.strip() for column in next(csv.reader([text], Tabs))]
    except csv.Error:
        return []


def _integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    return cut(repr(value), _MAX_SHOWN)


def _shown_line(columns: Sequence[str]) -> str:
    return _shown("\t".join(columns))
