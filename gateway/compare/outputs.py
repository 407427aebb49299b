"""A comparison as files for other programs: the figures as JSON, the rankings in trec_eval's format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from gateway.compare.results import Comparison
from gateway.compare.search import Ranking, without_ties
from gateway.config.files import write_whole
from gateway.errors import CompareError

RESULTS = "results.json"
PAGE = "report.html"
RUNS = "runs"
QUERIES = "queries.jsonl"
_MAX_NAME = 100
_READING = {
    "interval": "95 % for each arm and measure separately, not for all at once; null if too few values vary",
    "p_holm": "corrected for the number of arms, not of measures; only nDCG@10 has a verdict",
    "query_time, texts_per_s": "median ratios of an arm to the baseline; their intervals hold simultaneously",
}
# Windows refuses files of these names with any ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def write_results(comparison: Comparison, rankings: Mapping[str, Ranking], folder: Path) -> list[Path]:
    """Write the results into a folder, which is created if missing; files of the same names are replaced.

    ::

        results.json        everything except the queries
        queries.jsonl       one query per line: its first documents by arm, and their quality
        runs/<arm>.trec     the whole rankings, one document per line: query Q0 document rank score arm

    A run separates its columns by spaces, so in an id with a space, the space is written as ``%20`` and ``%`` as ``%25``.
    Equal scores are written one step of single precision apart, so that every tool sees the measured order. ``results.json``
    is written last, so a folder that has it has the others as well.

    Args:
        rankings: the rankings of every arm, by name.

    Returns:
        The files, in the order above.

    Raises:
        CompareError: a file cannot be written.
    """
    whole = {field.name: getattr(comparison, field.name) for field in fields(comparison) if field.name != "queries"}
    whole["reading"] = _READING
    names = file_names(rankings)
    contents: list[tuple[Path, Iterable[bytes]]] = [
        (folder / RESULTS, [_json(whole, orjson.OPT_INDENT_2)]),
        (folder / QUERIES, (_json(query) for query in comparison.queries)),
        *((folder / RUNS / f"{names[arm]}.trec", _run_lines(arm, rankings[arm])) for arm in rankings),
    ]
    for path, lines in [*contents[1:], contents[0]]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lines)
        except OSError as error:
            raise CompareError(f"{path}: cannot be written: {error.strerror or error}") from error
    return [path for path, _ in contents]


def write_page(page: str, folder: Path) -> Path:
    """Write ``report.html`` into the folder of a comparison.

    Raises:
        CompareError: the file cannot be written.
    """
    path = folder / PAGE
    try:
        write_whole(path, page)
    except OSError as error:
        raise CompareError(f"{path} cannot be written: {error.strerror}") from error
    return path


def file_names(arms: Iterable[str]) -> dict[str, str]:
    """Return a distinct file name, without its ending, for each arm, safe on every system.

    Characters other than ASCII letters, digits and ``@._-`` become ``_``. Resulting names that are equal, or differ only in
    case, get a number.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for arm in arms:
        safe = re.sub(r"[^A-Za-z0-9@._-]", "_", arm)[:_MAX_NAME].strip(".") or "arm"
        if _RESERVED.match(safe):
            safe = f"_{safe}"
        name, number = safe, 1
        while name.lower() in taken:
            number += 1
            name = f"{safe}-{number}"
        taken.add(name.lower())
        names[arm] = name
    return names


def _run_lines(arm: str, ranking: Ranking) -> Iterable[bytes]:
    tag = _one_word(arm) or "arm"
    for query, documents in ranking.items():
        for rank, (document, score) in enumerate(without_ties(documents), start=1):
            yield f"{_one_word(query)} Q0 {_one_word(document)} {rank} {score!r} {tag}\n".encode()


def _one_word(text: str) -> str:
    """Return an id that no program splits; an id without a space is unchanged."""
    if not any(character.isspace() for character in text):
        return text
    return "".join(quote(character) if character.isspace() or character == "%" else character for character in text)


def _json(value: object, option: int = 0) -> bytes:
    options = option | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    return orjson.dumps(value, default=_plain, option=options)


def _plain(value: Any) -> object:
    """Convert a mapping or a sequence into a type that orjson knows."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
