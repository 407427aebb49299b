"""Documents without a judgment: their influence on the verdict, and the list of documents to judge.

Judgments often cover only the documents that one system finds. A document that only the other system finds then counts as
irrelevant, and the other system looks worse than it is. Leaving out such documents favors it instead (Sakai 2007,
https://doi.org/10.1145/1277741.1277756, calls the rest a condensed list). In simulations, each method alone showed clear
differences with the wrong sign, so a verdict needs both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gateway.compare.beir import HEADER, add_judgments
from gateway.compare.dataset import Dataset
from gateway.compare.results import Comparison, Contrast, Verdict
from gateway.compare.search import Ranking
from gateway.comparisons.sheet import form_line, form_text
from gateway.config.files import write_whole
from gateway.errors import CompareError

TO_JUDGE = "to_judge.tsv"

_MAX_GAP = 0.05
# Some data sets have a few irrelevant judgments by chance. Judging search results gives them for most queries.
_LEAST_WITH_IRRELEVANT = 0.1
_MAX_CHARACTERS = 2_000


def lists_only_relevant(judgments: Mapping[str, Mapping[str, int]]) -> bool:
    """Return whether the judgments only list relevant documents, as in most of BEIR.

    The share of judged documents then equals the precision, and says nothing about unjudged documents.
    """
    number = sum(min(scores.values(), default=1) <= 0 for scores in judgments.values())
    return number < _LEAST_WITH_IRRELEVANT * len(judgments)


def condense(ranking: Ranking, judgments: Mapping[str, Mapping[str, int]]) -> Ranking:
    """Return the rankings of the judged queries without the documents that have no judgment."""
    return {query: [hit for hit in ranking[query] if hit[0] in scores] for query, scores in judgments.items()}


def are_judged_alike(judged: Mapping[str, Mapping[str, float]], arm: str, baseline: str) -> bool:
    """Return whether two arms have about the same share of judged documents.

    Args:
        judged: Judged@10 by arm and query.
    """
    shares = [sum(judged[name].values()) / len(judged[name]) for name in (arm, baseline)]
    return abs(shares[0] - shares[1]) <= _MAX_GAP


def reconcile(whole: Contrast, condensed: Contrast) -> Contrast:
    """Return a contrast with the verdict that it shares with the condensed lists.

    Args:
        whole: documents without judgment count as irrelevant.
        condensed: documents without judgment are left out.
    """
    verdict = whole.verdict if whole.verdict is condensed.verdict else Verdict.NOT_JUDGED_ALIKE
    return replace(whole, verdict=verdict, condensed=condensed.difference, condensed_verdict=condensed.verdict)


def write_to_judge(comparison: Comparison, dataset: Dataset, folder: Path) -> Path | None:
    """Write the unjudged documents among the first ten of any arm, for a person to judge.

    The lines do not name the arm that found a document, and are shuffled within a query. ``--judged`` reads the file. A file
    in which a person has filled in grades is kept as it is.

    Returns:
        The file; ``None`` if there is nothing to judge, or only relevant documents are listed.

    Raises:
        CompareError: the file cannot be written.
    """
    if not dataset.judgments or lists_only_relevant(dataset.judgments):
        return None
    lines = list(_lines(comparison, dataset))
    if not lines:
        return None
    path = folder / TO_JUDGE
    try:
        if _has_grades(path):
            return path
        write_whole(path, [f"{HEADER}\tquery\tdocument\n".encode(), *lines])
    except OSError as error:
        raise CompareError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _has_grades(path: Path) -> bool:
    """Return whether a person has written into the file, even if not all of it can be read."""
    if not path.exists():
        return False
    try:
        return add_judgments({}, path)[0] > 0
    except CompareError:
        return True


def _lines(comparison: Comparison, dataset: Dataset) -> Iterator[bytes]:
    rng = random.Random(comparison.seed)  # noqa: S311  an order, not a secret
    for query in comparison.queries:
        judged = dataset.judgments.get(query.id, {})
        found = {hit.document for hits in query.rankings.values() for hit in hits} - judged.keys()
        for document in rng.sample(sorted(found), len(found)):
            texts = (form_text(text)[:_MAX_CHARACTERS] for text in (query.text, dataset.documents[document]))
            yield form_line((query.id, document, "", *texts))


def with_condensed(whole: Sequence[Contrast], condensed: Sequence[Contrast], unlike: frozenset[str]) -> list[Contrast]:
    """Reconcile the contrasts of the arms that are not judged like the baseline."""
    by_arm = {contrast.arm: contrast for contrast in condensed}
    return [reconcile(contrast, by_arm[contrast.arm]) if contrast.arm in unlike else contrast for contrast in whole]
