"""Retrieval data in BEIR's layout: documents, queries, and judgments of which document answers which query.

::

    corpus.jsonl        {"_id": "…", "title": "…", "text": "…"}    one document per line; the title is optional
    queries.jsonl       {"_id": "…", "text": "…"}
    qrels/test.tsv      query-id <tab> corpus-id <tab> score      optional: without it, no quality is measured

(Thakur et al. 2021, https://arxiv.org/abs/2104.08663.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from gateway.compare.results import DatasetSummary
from gateway.config.files import open_regular
from gateway.config.wording import count, cut
from gateway.errors import CompareError

HEADER = "query-id\tcorpus-id\tscore"

_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Dataset:
    """The documents, queries and judgments of a comparison.

    Attributes:
        documents: text by id, with the title before it, in descending order of the ids: of documents with equal scores,
            search prefers the first one, and trec_eval the one with the greater id.
        queries: text by id, in the order of the file.
        judgments: score by document by query, in the order of ``queries``; empty without judgments. A document with
            a score above 0 is relevant.
        num_unjudged_queries: queries that were left out because no judgment names them.
        notes: sentences on the parts that were left out.
    """

    folder: Path
    split: str | None
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    judgments: Mapping[str, Mapping[str, int]]
    num_unjudged_queries: int
    notes: tuple[str, ...]

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
        )

    def _sha256(self) -> str:
        hashed = hashlib.sha256()
        # As JSON with the kind in front, so that no two data sets look the same.
        for kind, texts in (("document", self.documents), ("query", self.queries)):
            for id_ in sorted(texts):
                hashed.update(orjson.dumps((kind, id_, texts[id_]), option=orjson.OPT_APPEND_NEWLINE))
        for query, scores in sorted(self.judgments.items()):
            for judgment in sorted(scores.items()):
                hashed.update(orjson.dumps(("judgment", query, *judgment), option=orjson.OPT_APPEND_NEWLINE))
        return hashed.hexdigest()


def read_dataset(folder: Path, split: str | None, max_documents: int | None = None, seed: int = 0) -> Dataset:
    """Read a folder in BEIR's layout.

    Args:
        split: which file of ``qrels/`` to take; ``None`` takes ``test``, or the only one.
        max_documents: how many documents to keep: all that have a judgment, and a sample of the others.
        seed: of that sample.

    Raises:
        CompareError: a file is missing, a line is wrong, or no judgment is usable.
    """
    if not folder.is_dir():
        raise CompareError(f"{folder}: is not a folder; a data set is a folder with corpus.jsonl and queries.jsonl")
    qrels = _qrels_path(folder, split)
    documents, queries = read_texts(folder / "corpus.jsonl"), read_texts(folder / "queries.jsonl")
    notes: list[str] = []
    judgments: Mapping[str, Mapping[str, int]] = {}
    num_queries = len(queries)
    if qrels is not None:
        judgments = _known(_read_judgments(qrels), documents, queries, qrels, notes)
        queries = {id_: text for id_, text in queries.items() if id_ in judgments}
        judgments = {query: judgments[query] for query in queries}
        _note_unanswerable(judgments, notes)
    num_unjudged = num_queries - len(queries)
    if num_unjudged:
        notes.insert(0, f"{count(num_unjudged, 'query was', 'queries were')} left out: no judgment names them.")
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
    )


def _qrels_path(folder: Path, split: str | None) -> Path | None:
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


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines that are not blank, each with its ``file:line``."""
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, start=1):
                # Some editors put a byte order mark in front.
                content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
                if content.strip():
                    yield f"{path}:{number}", content
    except FileNotFoundError:
        raise CompareError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CompareError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_texts(path: Path) -> dict[str, str]:
    """Read the texts of ``corpus.jsonl`` or ``queries.jsonl`` by id, with the title, if there is one, in front."""
    texts: dict[str, str] = {}
    for place, line in read_lines(path):
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise CompareError(f"{place}: is not JSON: {error.msg}") from error
        if not isinstance(entry, dict):
            raise CompareError(f"{place}: must be a JSON object with _id and text, and is {_shown(entry)}")
        id_ = _id(place, entry)
        if id_ in texts:
            raise CompareError(f"{place}: _id {id_!r} appears twice; every id must be unique")
        title = _text(place, entry, "title") if entry.get("title") is not None else ""
        texts[id_] = f"{title} {_text(place, entry, 'text')}".strip()
    if not texts:
        raise CompareError(f"{path}: is empty; at least one line is needed")
    return texts


def _id(place: str, entry: Mapping[str, Any]) -> str:
    if "_id" not in entry:
        raise CompareError(f"{place}: has no _id; its keys: {', '.join(entry) or 'none'}")
    id_ = entry["_id"]
    if isinstance(id_, int) and not isinstance(id_, bool):
        return str(id_)
    if not isinstance(id_, str) or not id_ or "\0" in id_:
        raise CompareError(f"{place}: _id must be a non-empty text or an integer, and is {_shown(id_)}")
    return id_


def _text(place: str, entry: Mapping[str, Any], key: str) -> str:
    if key not in entry:
        raise CompareError(f"{place}: has no {key}; its keys: {', '.join(entry)}")
    if not isinstance(entry[key], str):
        raise CompareError(f"{place}: {key} must be a text, and is {_shown(entry[key])}")
    return str(entry[key])


def _read_judgments(path: Path) -> dict[str, dict[str, int]]:
    judgments: dict[str, dict[str, int]] = {}
    is_first = True
    for place, line in read_lines(path):
        columns = _columns(place, line)
        if is_first:
            if _is_number(columns[2]):
                raise CompareError(
                    f"{place}: the header is missing: the first line must be {HEADER!r}, and is {_shown_line(columns)}"
                )
            is_first = False
            continue
        query, document, text = columns
        score = _integer(text)
        if score is None:
            raise CompareError(f"{place}: the score must be an integer, and is {text!r}")
        scores = judgments.setdefault(query, {})
        if scores.setdefault(document, score) != score:
            raise CompareError(
                f"{place}: query {query!r} and document {document!r} have score {score}, and {scores[document]} earlier"
            )
    if not judgments:
        raise CompareError(f"{path}: is empty; at least one judgment below the header is needed")
    return judgments


def _columns(place: str, line: bytes) -> list[str]:
    try:
        columns = [column.strip() for column in line.decode().split("\t")]
    except UnicodeDecodeError as error:
        raise CompareError(f"{place}: is not UTF-8: {error.reason} at byte {error.start + 1}") from error
    if len(columns) != 3 or not all(columns):
        raise CompareError(
            f"{place}: must have 3 columns, separated by tabs (query-id, corpus-id, score), and is {_shown_line(columns)}"
        )
    return columns


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known(
    judgments: Mapping[str, Mapping[str, int]],
    documents: Mapping[str, str],
    queries: Mapping[str, str],
    path: Path,
    notes: list[str],
) -> dict[str, dict[str, int]]:
    """Drop judgments of unknown queries or documents, and note how many.

    Raises:
        CompareError: no judgment is left.
    """
    known: dict[str, dict[str, int]] = {}
    num_unknown_queries = num_unknown_documents = 0
    for query, scores in judgments.items():
        if query not in queries:
            num_unknown_queries += len(scores)
            continue
        kept = {document: score for document, score in scores.items() if document in documents}
        num_unknown_documents += len(scores) - len(kept)
        if kept:
            known[query] = kept
    for number, file in ((num_unknown_queries, "queries.jsonl"), (num_unknown_documents, "corpus.jsonl")):
        if number:
            were = count(number, "judgment was", "judgments were")
            notes.append(f"{were} dropped: the id is not in {file}.")
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


def _sampled(
    documents: dict[str, str],
    judgments: Mapping[str, Mapping[str, int]],
    max_documents: int | None,
    seed: int,
    notes: list[str],
) -> dict[str, str]:
    """Return all documents, or those with a judgment and a sample of the others.

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


def _shown(value: object) -> str:
    return cut(repr(value), _MAX_SHOWN)


def _shown_line(columns: Sequence[str]) -> str:
    return _shown("\t".join(columns))
