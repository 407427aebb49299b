"""The check by people: the file with pairs to grade, written and read back; see :mod:`gateway.comparisons.sheet`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gateway.compare.beir import read_lines
from gateway.compare.dataset import Dataset
from gateway.compare.judge.pool import draw_checked
from gateway.compare.judge.prompt import cut
from gateway.compare.judge.values import Grades, Pair
from gateway.comparisons.sheet import CHECK_FILE, HEADER, form_line, form_text, parse_rows
from gateway.config.wording import count
from gateway.errors import CompareError


def check_lines(dataset: Dataset, pool: Sequence[Pair], seed: int, people: Grades | None = None) -> Iterator[bytes]:
    """Yield the lines of the file for people.

    Args:
        pool: the pairs in random order.
        people: known grades, which are filled in.
    """
    yield form_line(HEADER)
    by_query = _by_query(pool)
    for query in draw_checked(list(dataset.queries), dataset.groups, seed):
        for document in by_query.get(query, ()):
            known = (people or {}).get(query, {}).get(document)
            score = "" if known is None else str(known)
            texts = cut(dataset.queries[query], dataset.documents[document])
            yield form_line((query, document, score, *map(form_text, texts)))


def read_check(path: Path) -> dict[str, dict[str, int]]:
    """Read the grades of people; lines without a score are left out.

    Raises:
        CompareError: the file cannot be read, or a line is wrong.
    """
    grades: dict[str, dict[str, int]] = {}
    for row in parse_rows(read_lines(path)):
        if row.score is not None:
            grades.setdefault(row.query, {})[row.document] = row.score
    if not grades:
        raise CompareError(f"{path}: has no score; fill in the column `score` with 0, 1, 2 or 3")
    return grades


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
            f"{path}: query {others[0]!r} is not among the {len(drawn)} queries drawn from this data with --seed {seed}; "
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
