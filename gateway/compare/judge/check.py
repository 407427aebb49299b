"""The check by people: a file with pairs to grade, blind to the judge and the arms, written and read back.

``judge_check.tsv`` has one line per pair, with queries and their documents in random order::

    query-id <tab> corpus-id <tab> score <tab> query <tab> document

People fill in ``score`` with 0 to 3 by the same rubric as the judge.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gateway.compare.beir import Tabs, form_line, read_lines
from gateway.compare.dataset import Dataset
from gateway.compare.judge.pool import draw_checked
from gateway.compare.judge.prompt import cut
from gateway.compare.judge.values import MAX_GRADE, Grades, Pair
from gateway.config.wording import count
from gateway.errors import CompareError

CHECK_FILE = "judge_check.tsv"
_HEADER = ("query-id", "corpus-id", "score", "query", "document")
_NUM_READ_COLUMNS = 3


def check_lines(dataset: Dataset, pool: Sequence[Pair], seed: int, people: Grades | None = None) -> Iterator[bytes]:
    """Yield the lines of the file for people.

    Args:
        pool: the pairs in random order.
        people: known grades, which are filled in.
    """
    yield form_line(_HEADER)
    by_query = _by_query(pool)
    for query in draw_checked(list(dataset.queries), dataset.groups, seed):
        for document in by_query.get(query, ()):
            known = (people or {}).get(query, {}).get(document)
            score = "" if known is None else str(known)
            texts = cut(dataset.queries[query], dataset.documents[document])
            yield form_line((query, document, score, *map(_for_people, texts)))


def read_check(path: Path) -> dict[str, dict[str, int]]:
    """Read the grades of people; lines without a score are left out.

    Raises:
        CompareError: the file cannot be read, or a line is wrong.
    """
    grades: dict[str, dict[str, int]] = {}
    for number, (place, line) in enumerate(read_lines(path)):
        query, document, text = _columns(place, line)
        if number == 0:
            if (query, document, text) != _HEADER[:_NUM_READ_COLUMNS]:
                raise CompareError(f"{place}: the header is missing: the first line must be {', '.join(_HEADER)}")
            continue
        if not text:
            continue
        if text not in map(str, range(MAX_GRADE + 1)):
            raise CompareError(f"{place}: the score must be 0, 1, 2 or 3, or empty, and is {text!r}")
        score = int(text)
        if grades.setdefault(query, {}).setdefault(document, score) != score:
            raise CompareError(
                f"{place}: query {query!r} and document {document!r} have score {score}, and "
                f"{grades[query][document]} earlier"
            )
    if not grades:
        raise CompareError(f"{path}: has no score; fill in the column `score` with 0, 1, 2 or 3")
    return grades


def _columns(place: str, line: bytes) -> tuple[str, str, str]:
    try:
        columns = [column.strip() for column in next(csv.reader([line.decode()], Tabs))]
    except UnicodeDecodeError as error:
        raise CompareError(f"{place}: is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except csv.Error as error:
        raise CompareError(f"{place}: cannot be read: {error}") from error
    if len(columns) < _NUM_READ_COLUMNS:
        raise CompareError(f"{place}: must have the columns {', '.join(_HEADER)}, separated by tabs")
    query, document, score = columns[:_NUM_READ_COLUMNS]
    return query, document, score


def complete_queries(
    people: Grades, dataset: Dataset, pool: Sequence[Pair], seed: int, path: Path
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return the grades of the queries whose pooled documents all have a grade, and notes on the others.

    Raises:
        CompareError: the file belongs to other data or another seed, so its queries are not a random sample of these.
    """
    drawn = draw_checked(list(dataset.queries), dataset.groups, seed)
    others = sorted(set(people) - set(drawn))
    if others:
        raise CompareError(
            f"{path}: query {others[0]!r} is not among the {len(drawn)} that are drawn from this data with --seed {seed}; "
            "people must check a random sample, so grade the file that this comparison writes"
        )
    by_query = _by_query(pool)
    complete: dict[str, dict[str, int]] = {}
    num_lacking = num_begun = 0
    for query in drawn:
        scores = people.get(query, {})
        wanted = by_query.get(query, [])
        lacking = sum(document not in scores for document in wanted)
        if not lacking:
            complete[query] = {document: scores[document] for document in wanted}
        elif scores:
            num_begun += 1
            num_lacking += lacking
    notes = []
    if num_begun:
        notes.append(
            f"{path}: {count(num_begun, 'query is', 'queries are')} checked in part, and left out: "
            f"{count(num_lacking, 'document has', 'documents have')} no score. The new {CHECK_FILE} lists them."
        )
    return complete, notes


def _by_query(pool: Sequence[Pair]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in pool:
        found.setdefault(pair.query, []).append(pair.document)
    return found


def _for_people(text: str) -> str:
    """Return a text on one line, protected from spreadsheets, which read a text that begins with ``=`` as a formula."""
    text = " ".join(text.split())
    return f" {text}" if text.startswith(("=", "+", "-", "@")) else text
