"""A data set is read whole or refused with the line that is wrong, and hashes the same in any order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.compare.dataset import Dataset, read_dataset
from gateway.errors import CompareError

CORPUS = """\
{"_id": "d1", "title": "Router", "text": "Hold the button."}
{"_id": 7, "text": " Ask us. "}

{"_id": "d2", "title": "", "text": "Zurücksetzen", "metadata": {}}
{"_id": "d3", "title": null, "text": "none"}
"""
QUERIES = '{"_id": "q2", "text": "reset"}\n{"_id": "q1", "text": "ask"}\n{"_id": "q3", "text": "unjudged"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\t7\t1\nq2\td1\t2\nq2\td3\t0\n"
FILES = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.tsv": QRELS}


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(folder: Path, files: Mapping[str, str | bytes], split: str | None = None) -> Dataset:
    return read_dataset(write(folder, files), split)


def test_reads_titles_ids_and_judgments(tmp_path: Path) -> None:
    dataset = read(tmp_path, FILES)
    assert dict(dataset.documents) == {
        "d1": "Router Hold the button.",
        "7": "Ask us.",
        "d2": "Zurücksetzen",
        "d3": "none",
    }
    assert list(dataset.queries.items()) == [("q2", "reset"), ("q1", "ask")]
    assert dataset.judgments == {"q2": {"d1": 2, "d3": 0}, "q1": {"7": 1}}
    assert (dataset.split, dataset.num_unjudged_queries) == ("test", 1)
    assert dataset.notes == ("1 query was left out: no judgment names them.",)


def test_documents_are_in_descending_order_of_their_ids(tmp_path: Path) -> None:
    assert list(read(tmp_path, FILES).documents) == ["d3", "d2", "d1", "7"]


def test_summary_counts(tmp_path: Path) -> None:
    summary = read(tmp_path, FILES).summary()
    assert (summary.num_documents, summary.num_queries, summary.num_judgments) == (4, 2, 3)
    assert (summary.folder, summary.split, summary.num_unjudged_queries) == (str(tmp_path), "test", 1)


def test_hash_is_of_the_content_alone(tmp_path: Path) -> None:
    def sha256(name: str, **changes: str) -> str:
        files = {**FILES, **{key.replace("__", "/"): value for key, value in changes.items()}}
        return read(tmp_path / name, files).summary().sha256

    whole = sha256("a")
    turned = {
        "corpus.jsonl": "\n".join(reversed(CORPUS.splitlines())),
        "queries.jsonl": "\r\n".join(reversed(QUERIES.splitlines())),
    }
    assert sha256("b", **turned) == whole
    changes = {
        "corpus.jsonl": CORPUS.replace("button", "buttons"),
        "queries.jsonl": QUERIES.replace("reset", "rest"),
        "qrels/test.tsv": QRELS.replace("d1\t2", "d1\t1"),
    }
    hashes = {sha256(f"c{number}", **{name: text}) for number, (name, text) in enumerate(changes.items())}
    assert len(hashes | {whole}) == 4


def test_without_judgments_every_query_stays(tmp_path: Path) -> None:
    dataset = read(tmp_path, {name: FILES[name] for name in ("corpus.jsonl", "queries.jsonl")})
    assert list(dataset.queries) == ["q2", "q1", "q3"]
    assert (dataset.judgments, dataset.split, dataset.num_unjudged_queries, dataset.notes) == ({}, None, 0, ())


@pytest.mark.parametrize(
    ("splits", "asked", "taken"),
    [(["dev", "test", "train"], None, "test"), (["dev"], None, "dev"), (["dev", "test"], "dev", "dev")],
)
def test_split(tmp_path: Path, splits: list[str], asked: str | None, taken: str) -> None:
    files = {**FILES, **{f"qrels/{split}.tsv": QRELS for split in splits}}
    if "test" not in splits:
        del files["qrels/test.tsv"]
    assert read(tmp_path, files, asked).split == taken


def test_judgments_of_what_is_not_there_are_dropped_and_noted(tmp_path: Path) -> None:
    dataset = read(tmp_path, {**FILES, "qrels/test.tsv": QRELS + "q9\td1\t1\nq9\td2\t1\nq1\td9\t1\nq3\td9\t1\n"})
    assert dataset.judgments == {"q2": {"d1": 2, "d3": 0}, "q1": {"7": 1}}
    assert dataset.notes[1:] == (
        "2 judgments were dropped: the id is not in queries.jsonl.",
        "2 judgments were dropped: the id is not in corpus.jsonl.",
    )


def test_notes_queries_without_a_relevant_document_and_empty_texts(tmp_path: Path) -> None:
    files = {**FILES, "qrels/test.tsv": QRELS + "q3\td2\t0\n", "corpus.jsonl": CORPUS + '{"_id": "e", "text": " "}'}
    assert read(tmp_path, files).notes == (
        "1 query has no relevant document, so no arm can find one.",
        "Among the documents, 1 text is empty.",
    )


def test_sample_keeps_what_is_judged(tmp_path: Path) -> None:
    corpus = CORPUS + "".join(f'{{"_id": "x{number}", "text": "other"}}\n' for number in range(100))
    folder = write(tmp_path, {**FILES, "corpus.jsonl": corpus})
    one, again, other = (read_dataset(folder, None, max_documents=10, seed=seed) for seed in (0, 0, 1))
    assert len(one.documents) == 10
    assert {"7", "d1", "d3"} <= one.documents.keys()
    assert one == again
    assert one.documents.keys() != other.documents.keys()
    assert "10 of 104 documents were searched: the 3 with a judgment, and 7 of the others" in one.notes[1]
    assert len(read_dataset(folder, None, max_documents=2).documents) == 3
    assert read_dataset(folder, None, max_documents=104).notes == read_dataset(folder, None).notes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", CORPUS + "{", "corpus.jsonl:6: is not JSON: "),
        ("corpus.jsonl", b'{"_id": "a", "text": "\xff"}', "corpus.jsonl:1: is not JSON: "),
        ("corpus.jsonl", '["a"]', "corpus.jsonl:1: must be a JSON object with _id and text, and is ['a']"),
        ("corpus.jsonl", '{"id": "a", "text": ""}', "corpus.jsonl:1: has no _id; its keys: id, text"),
        ("corpus.jsonl", '{"_id": "a", "body": ""}', "corpus.jsonl:1: has no text; its keys: _id, body"),
        ("corpus.jsonl", '{"_id": "a", "text": 3}', "corpus.jsonl:1: text must be a text, and is 3"),
        ("corpus.jsonl", '{"_id": "a", "text": "", "title": []}', "corpus.jsonl:1: title must be a text, and is []"),
        ("corpus.jsonl", '{"_id": "", "text": ""}', "corpus.jsonl:1: _id must be a non-empty text"),
        ("corpus.jsonl", '{"_id": true, "text": ""}', "corpus.jsonl:1: _id must be a non-empty text or an"),
        ("corpus.jsonl", CORPUS + '{"_id": "7", "text": ""}', "corpus.jsonl:6: _id '7' appears twice"),
        ("corpus.jsonl", "\n\n", "corpus.jsonl: is empty; at least one line is needed"),
        ("queries.jsonl", "", "queries.jsonl: is empty; at least one line is needed"),
        ("queries.jsonl", QUERIES + '{"_id": "q4"}', "queries.jsonl:4: has no text; its keys: _id"),
        ("qrels/test.tsv", "q1\td1\t1\n", "test.tsv:1: the header is missing: the first line must be 'query-id\\tcorp"),
        ("qrels/test.tsv", "q1\td1\t0.5\n", "test.tsv:1: the header is missing"),
        (
            "qrels/test.tsv",
            QRELS + "q1 d1 1\n",
            "test.tsv:5: must have 3 columns, separated by tabs (query-id, corpus-",
        ),
        ("qrels/test.tsv", QRELS + "q1\t0\td1\t1\n", "test.tsv:5: must have 3 columns"),
        ("qrels/test.tsv", QRELS + "q1\td1\tyes\n", "test.tsv:5: the score must be an integer, and is 'yes'"),
        (
            "qrels/test.tsv",
            QRELS + "q2\td1\t1\n",
            "test.tsv:5: query 'q2' and document 'd1' have score 1, and 2 earlier",
        ),
        ("qrels/test.tsv", QRELS.encode() + b"q\xff\td\t1\n", "test.tsv:5: is not UTF-8: "),
        ("qrels/test.tsv", "", "test.tsv: is empty; at least one judgment"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: is empty; at least one judgment"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\tZ\t1\n", "test.tsv: no judgment names both a query of"),
    ],
)
def test_refuses(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(CompareError) as error:
        read(tmp_path, {**FILES, name: content})
    assert str(error.value).startswith(str(tmp_path))
    assert message in str(error.value)


def test_refuses_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="nowhere: is not a folder"):
        read_dataset(tmp_path / "nowhere", None)
    with pytest.raises(CompareError, match=r"corpus\.jsonl: there is no such file"):
        read_dataset(tmp_path, None)
    write(tmp_path, {"corpus.jsonl": CORPUS})
    with pytest.raises(CompareError, match=r"queries\.jsonl: there is no such file"):
        read_dataset(tmp_path, None)
    write(tmp_path, {"queries.jsonl": QUERIES})
    with pytest.raises(CompareError, match=r"test\.tsv: there is no such file; the splits are: none"):
        read_dataset(tmp_path, "test")
    write(tmp_path, {"qrels/dev.tsv": QRELS, "qrels/train.tsv": QRELS})
    with pytest.raises(CompareError, match="has several splits but not `test`; choose one with --split: dev, train"):
        read_dataset(tmp_path, None)
    with pytest.raises(CompareError, match="the splits are: dev, train"):
        read_dataset(tmp_path, "tset")
    with pytest.raises(CompareError, match="at most 0 documents: at least 1 is needed"):
        read_dataset(tmp_path, "dev", max_documents=0)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    files = {name: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for name, text in FILES.items()}
    assert read(tmp_path / "a", files).summary().sha256 == read(tmp_path / "b", FILES).summary().sha256
