"""The documents, queries and judgments of a comparison, from a folder in BEIR's layout, and notes on them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from gateway.compare.beir import Corpus, Judgments, add_judgments, qrels_path, read_corpus, read_judgments, read_queries
from gateway.compare.captured import read_captured
from gateway.compare.groups import group_queries
from gateway.compare.results import DatasetSummary
from gateway.config.wording import count
from gateway.errors import CompareError


@dataclass(frozen=True, slots=True)
class Dataset:
    """The documents, queries and judgments of a comparison.

    Attributes:
        documents: text by id, with the title before it, in descending order of the ids, because among equal scores search
            prefers the first document, and trec_eval the greater id.
        queries: text by id, in the order of the file.
        judgments: score by document by query, in the order of ``queries``; empty without judgments. A document with
            a score above 0 is relevant.
        num_unjudged_queries: queries that were left out because no judgment names them.
        notes: sentences on the parts that were left out.
        groups: the group of each query that depends on others.
        own_documents: ids of queries whose document with the same id is the query itself, which is left out of the ranking.
    """

    folder: Path
    split: str | None
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    judgments: Mapping[str, Mapping[str, int]]
    num_unjudged_queries: int
    notes: tuple[str, ...]
    groups: Mapping[str, str]
    own_documents: frozenset[str]

    def summary(self) -> DatasetSummary:
        """Return the counts of the data, and a hash that does not depend on the order of the files' lines."""
        return DatasetSummary(
            folder=str(self.folder),
            split=self.split,
            sha256=self._sha256(),
            num_documents=len(self.documents),
            num_queries=len(self.queries),
            num_judgments=sum(len(scores) for scores in self.judgments.values()),
            num_unjudged_queries=self.num_unjudged_queries,
            num_groups=len({self.groups.get(query, (query,)) for query in self.queries}),
        )

    def _sha256(self) -> str:
        hashed = hashlib.sha256()
        # Hash JSON with the kind in front, so that different data sets never give the same bytes.
        for kind, texts in (("document", self.documents), ("query", self.queries), ("group", self.groups)):
            for id_ in sorted(texts):
                hashed.update(orjson.dumps((kind, id_, texts[id_]), option=orjson.OPT_APPEND_NEWLINE))
        for query, scores in sorted(self.judgments.items()):
            for judgment in sorted(scores.items()):
                hashed.update(orjson.dumps(("judgment", query, *judgment), option=orjson.OPT_APPEND_NEWLINE))
        return hashed.hexdigest()


def read_dataset(
    folder: Path,
    split: str | None,
    max_documents: int | None = None,
    seed: int = 0,
    judged: Path | None = None,
    captured: Path | None = None,
) -> Dataset:
    """Read a folder in BEIR's layout.

    Args:
        split: the file of ``qrels/`` to use; ``None`` for ``test``, or the only file.
        max_documents: number of documents to keep: all with a judgment, and a sample of the others.
        seed: seed of that sample.
        judged: more judgments, such as those of a filled-in ``to_judge.tsv``.
        captured: queries that replace the folder's, see :func:`gateway.compare.captured.read_captured`. The folder's
            judgments are about its own queries, so they count only if ``split`` names them.

    Raises:
        CompareError: a file is missing, a line is wrong, or no judgment is usable.
    """
    if not os.path.isdir(folder):  # noqa: PTH112  the method of a path raises for a name that is too long
        raise CompareError(f"{folder}: is not a folder; a data set is a folder with corpus.jsonl and queries.jsonl")
    notes: list[str] = []
    qrels = None if captured is not None and split is None else qrels_path(folder, split)
    query_set = read_captured(captured, notes) if captured is not None else read_queries(folder / "queries.jsonl")
    corpus = read_corpus(folder / "corpus.jsonl", query_set.texts)
    documents, queries = corpus.texts, query_set.texts
    judgments: Mapping[str, Mapping[str, int]] = {}
    if qrels is not None or judged is not None:
        read = _read_all(qrels, judged, notes)
        judgments = _known(read, documents, queries, qrels or folder, notes)
        queries = {id_: text for id_, text in queries.items() if id_ in judgments}
        judgments = {query: judgments[query] for query in queries}
        _note_unanswerable(judgments, notes)
    num_unjudged = len(query_set.texts) - len(queries)
    if num_unjudged:
        notes.insert(0, f"{count(num_unjudged, 'query was', 'queries were')} left out: no judgment names them.")
    if query_set.num_titles:
        notes.append(
            f"{count(query_set.num_titles, 'query has a title', 'queries have titles')}, which BEIR does not use."
        )
    groups = group_queries({id_: query_set.groups[id_] for id_ in queries if id_ in query_set.groups}, judgments, notes)
    own = _own_documents(corpus, queries, judgments, notes)
    documents = _sampled(documents, judgments, max_documents, seed, notes)
    _note_empty(documents, "documents", notes)
    _note_empty(queries, "queries", notes)
    return Dataset(
        folder=folder,
        split=qrels.stem if qrels else None,
        documents={id_: documents[id_] for id_ in sorted(documents, reverse=True)},
        queries=queries,
        judgments=judgments,
        num_unjudged_queries=num_unjudged,
        notes=tuple(notes),
        groups=groups,
        own_documents=own,
    )


def _read_all(qrels: Path | None, judged: Path | None, notes: list[str]) -> Judgments:
    """Read the judgments of the split, and later ones.

    Raises:
        CompareError: no line has a score, or a line is wrong.
    """
    judgments = read_judgments(qrels) if qrels else {}
    if judged is not None:
        num_added, num_empty = add_judgments(judgments, judged)
        if not judgments:
            raise CompareError(
                f"{judged}: has no scores; fill in the column `score`: 0 for a document that does not help"
            )
        left = f"; {count(num_empty, 'line has', 'lines have')} no score yet" if num_empty else ""
        notes.append(f"{count(num_added, 'judgment was', 'judgments were')} added from {judged}{left}.")
    return judgments


def _known(
    judgments: Mapping[str, Mapping[str, int]],
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    path: Path,
    notes: list[str],
) -> dict[str, dict[str, int]]:
    """Drop judgments of unknown queries or documents, and note their number.

    Raises:
        CompareError: no judgment is left.
    """
    known: dict[str, dict[str, int]] = {}
    num_unknown_queries = num_unknown_documents = num_lost = 0
    for query, scores in judgments.items():
        if query not in queries:
            num_unknown_queries += len(scores)
            continue
        kept = {document: score for document, score in scores.items() if document in documents}
        num_unknown_documents += len(scores) - len(kept)
        num_lost += sum(score > 0 for document, score in scores.items() if document not in documents)
        if kept:
            known[query] = kept
    for number, file in ((num_unknown_queries, "queries.jsonl"), (num_unknown_documents, "corpus.jsonl")):
        if number:
            were = count(number, "judgment was", "judgments were")
            notes.append(f"{were} dropped: the id is not in {file}.")
    if num_lost:
        name = count(num_lost, "of them names a relevant document", "of them name relevant documents")
        notes[-1] += f" {name}, so figures are higher than on the whole corpus."
    if not known:
        example = next(iter(judgments.items()))
        raise CompareError(
            f"{path}: no judgment names both a query of queries.jsonl and a document of corpus.jsonl; the first names "
            f"query {example[0]!r} and document {next(iter(example[1]))!r}"
        )
    return known


def _note_unanswerable(judgments: Mapping[str, Mapping[str, int]], notes: list[str]) -> None:
    number = sum(max(scores.values()) <= 0 for scores in judgments.values())
    if number:
        notes.append(f"{count(number, 'query has', 'queries have')} no relevant document, so no arm can find one.")


def _note_empty(texts: Mapping[str, str], what: str, notes: list[str]) -> None:
    number = sum(not text for text in texts.values())
    if number:
        notes.append(f"Among the {what}, {count(number, 'text is', 'texts are')} empty.")


def _own_documents(
    corpus: Corpus, queries: Mapping[str, str], judgments: Mapping[str, Mapping[str, int]], notes: list[str]
) -> frozenset[str]:
    """Return the queries whose document with the same id is the query itself, and note the treatment of equal ids.

    BEIR leaves every document with the query's id out of the ranking, because in ArguAna and Quora these are the queries
    themselves. Files that number both from 1 share ids by chance, so that rule would remove answers.
    """
    own = frozenset(id_ for id_ in corpus.same_text & queries.keys() if judgments.get(id_, {}).get(id_, 0) <= 0)
    if own:
        were = count(len(own), "document was", "documents were")
        notes.append(
            f"{were} left out of one ranking: that of the query with the same id and the same text, as BEIR does."
        )
    num_others = len(corpus.other_text & queries.keys())
    if num_others:
        notes.append(
            f"{count(num_others, 'query has', 'queries have')} the id of a document with another text. Such a document is "
            "searched like all others; BEIR would leave it out."
        )
    return own


def _sampled(
    documents: dict[str, str],
    judgments: Mapping[str, Mapping[str, int]],
    max_documents: int | None,
    seed: int,
    notes: list[str],
) -> dict[str, str]:
    """Return all documents, or the documents with a judgment and a sample of the others.

    Raises:
        CompareError: ``max_documents`` is below 1.
    """
    if max_documents is None or len(documents) <= max_documents:
        return documents
    if max_documents < 1:
        raise CompareError(f"at most {max_documents} documents: at least 1 is needed")
    judged = {document for scores in judgments.values() for document in scores}
    # Sorted, so that the sample does not depend on the order of the lines.
    others = sorted(documents.keys() - judged)
    num_others = max(0, max_documents - len(judged))
    picked = np.random.default_rng(seed).permutation(len(others))[:num_others]
    kept = judged | {others[place] for place in picked}
    notes.append(
        f"{len(kept):,} of {len(documents):,} documents were searched: the {len(judged):,} with a judgment, and "
        f"{num_others:,} of the others, drawn at random. Quality is higher on a part than on the whole."
    )
    return {id_: documents[id_] for id_ in kept}
