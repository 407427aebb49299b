"""Captured queries as the queries of a data set: one file, or the files of all days."""

from __future__ import annotations

from pathlib import Path

from gateway.compare.beir import Queries, read_queries
from gateway.config.capture import dated_files
from gateway.config.wording import count
from gateway.errors import CompareError


def read_captured(path: Path, notes: list[str]) -> Queries:
    """Read queries from a file in the layout of ``queries.jsonl``, or from the files of ``capture.to``.

    A text that was sent several times is kept once, because its results are not independent.

    Raises:
        CompareError: there is no such file, or a line is wrong.
    """
    try:
        # A day on which nothing could be written may have left an empty file.
        files = [path] if path.exists() else [file for file in dated_files(path).values() if file.stat().st_size]
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {error.strerror}") from error
    if not files:
        raise CompareError(
            f"{path}: there is no such file, and no file of a day, such as {path.stem}-2026-11-25{path.suffix}: the capture "
            "has not kept any text yet, or writes elsewhere"
        )
    texts: dict[str, str] = {}
    groups: dict[str, str] = {}
    seen: set[str] = set()
    num_repeated = num_titles = 0
    for file in files:
        queries = read_queries(file)
        num_titles += queries.num_titles
        for id_, text in queries.texts.items():
            if not text or text in seen:
                num_repeated += bool(text)
                continue
            if id_ in texts:
                raise CompareError(
                    f"{file}: _id {id_!r} has another text in the file of an earlier day: give each text its own"
                )
            seen.add(text)
            texts[id_] = text
            if id_ in queries.groups:
                groups[id_] = queries.groups[id_]
    if not texts:
        raise CompareError(f"{path}: all queries are empty")
    if num_repeated:
        notes.append(f"{count(num_repeated, 'query was', 'queries were')} left out: the same text was captured before.")
    return Queries(texts, groups, num_titles)
