"""A data set is read whole or refused with the line that is wrong, and hashes the same in any order."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gateway.compare import beir
from gateway.compare.dataset import Dataset, read_dataset
from gateway.errors import CompareError
from tests.compare.conftest import WriteData

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


CAPTURED = (
    '{"_id": "c1", "text": " reset ", "time": "2026-11-25T10:00:00+00:00", "name": "search", "group": "aa"}\n'
    '{"_id": "c2", "text": "ask", "group": "bb"}\n{"_id": "c3", "text": " "}\n'
)


def test_captured_queries_replace_those_of_the_folder(tmp_path: Path) -> None:
    """All days are read, the oldest first; the same text stays once; the folder's judgments are of other queries."""
    folder = write(tmp_path / "data", FILES)
    days = {
        "q-2026-11-25.jsonl": CAPTURED,
        "q-2026-11-24.jsonl": "",  # of a day on which the disk was full
        "q-2026-11-26.jsonl": '{"_id": "c4", "text": "reset"}\n{"_id": "c5", "text": "new"}\n',
    }
    write(tmp_path / "kept", days | {"q.jsonl.key": "key"})

    dataset = read_dataset(folder, None, captured=tmp_path / "kept" / "q.jsonl")
    one_day = read_dataset(folder, None, captured=tmp_path / "kept" / "q-2026-11-26.jsonl")

    assert list(dataset.queries.items()) == [("c1", "reset"), ("c2", "ask"), ("c5", "new")]
    assert dataset.judgments == {}
    assert dataset.split is None
    assert dataset.notes == ("1 query was left out: the same text was captured before.",)
    assert list(one_day.queries) == ["c4", "c5"]


def test_judgments_of_captured_queries_count_if_they_are_named(tmp_path: Path) -> None:
    qrels = "query-id\tcorpus-id\tscore\nc1\td1\t1\n"
    folder = write(tmp_path / "data", {"corpus.jsonl": CORPUS, "qrels/captured.tsv": qrels})
    write(tmp_path, {"q-2026-11-25.jsonl": CAPTURED})

    dataset = read_dataset(folder, "captured", captured=tmp_path / "q.jsonl")

    assert dataset.judgments == {"c1": {"d1": 1}}


def test_a_capture_that_kept_nothing_is_an_error_that_says_where_it_looked(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", FILES)

    with pytest.raises(
        CompareError, match=r"q.jsonl: there is no such file, and no file of a day, such as q-2026-11-25.jsonl"
    ):
        read_dataset(folder, None, captured=tmp_path / "q.jsonl")


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


def test_judgments_of_missing_documents_are_dropped_and_noted(tmp_path: Path) -> None:
    dataset = read(tmp_path, {**FILES, "qrels/test.tsv": QRELS + "q9\td1\t1\nq9\td2\t1\nq1\td9\t1\nq3\td9\t1\n"})
    assert dataset.judgments == {"q2": {"d1": 2, "d3": 0}, "q1": {"7": 1}}
    assert dataset.notes[1:] == (
        "2 judgments were dropped: the id is not in queries.jsonl.",
        "2 judgments were dropped: the id is not in corpus.jsonl. 2 of them name relevant documents, so figures are higher "
        "than on the whole corpus.",
    )


def test_notes_queries_without_a_relevant_document_and_empty_texts(tmp_path: Path) -> None:
    files = {**FILES, "qrels/test.tsv": QRELS + "q3\td2\t0\n", "corpus.jsonl": CORPUS + '{"_id": "e", "text": " "}'}
    assert read(tmp_path, files).notes == (
        "1 query has no relevant document, so no arm can find one.",
        "Among the documents, 1 text is empty.",
    )


def test_sample_keeps_judged_documents(tmp_path: Path) -> None:
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
        ("corpus.jsonl", '["a"]', "corpus.jsonl:1: must be a JSON object with _id and text, got ['a']"),
        ("corpus.jsonl", '{"id": "a", "text": ""}', "corpus.jsonl:1: has no _id; its keys: id, text"),
        ("corpus.jsonl", '{"_id": "a", "body": ""}', "corpus.jsonl:1: has no text; its keys: _id, body"),
        ("corpus.jsonl", '{"_id": "a", "text": 3}', "corpus.jsonl:1: text must be a text, got 3"),
        ("corpus.jsonl", '{"_id": "a", "text": "", "title": []}', "corpus.jsonl:1: title must be a text, got []"),
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
        ("qrels/test.tsv", QRELS + "q1\td1\tyes\n", "test.tsv:5: the score must be an integer, got 'yes'"),
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


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompareError, match="nowhere: is not a folder"):
        read_dataset(tmp_path / "nowhere", None)
    with pytest.raises(CompareError, match=r"queries\.jsonl: there is no such file"):
        read_dataset(tmp_path, None)
    write(tmp_path, {"queries.jsonl": QUERIES})
    with pytest.raises(CompareError, match=r"corpus\.jsonl: there is no such file"):
        read_dataset(tmp_path, None)
    write(tmp_path, {"corpus.jsonl": CORPUS})
    with pytest.raises(CompareError, match=r"test\.tsv: there is no such file; the splits are: none"):
        read_dataset(tmp_path, "test")
    write(tmp_path, {"qrels/dev.tsv": QRELS, "qrels/train.tsv": QRELS})
    with pytest.raises(CompareError, match="has several splits but not `test`; choose one with --split: dev, train"):
        read_dataset(tmp_path, None)
    with pytest.raises(CompareError, match="the splits are: dev, train"):
        read_dataset(tmp_path, "tset")
    with pytest.raises(CompareError, match="at most 0 documents: at least 1 is needed"):
        read_dataset(tmp_path, "dev", max_documents=0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (lambda content: content.encode("utf-16-le"), "is UTF-16, or not a text: save it as UTF-8"),
        (lambda content: gzip.compress(content.encode()), "is compressed with gzip: unpack it"),
        (lambda content: b"PK\x03\x04" + content.encode(), "is a zip archive or a spreadsheet: unpack it"),
        (lambda content: b"PAR1\x15\x04\x15", "is a Parquet file: save it as text in UTF-8"),
    ],
)
def test_files_of_other_kinds_are_named_with_the_remedy(
    tmp_path: Path, name: str, change: Callable[[str], bytes], message: str
) -> None:
    with pytest.raises(CompareError, match=rf"{Path(name).name}: {message}"):
        read(tmp_path, FILES | {name: change(FILES[name])})


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_a_folder_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, FILES)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CompareError, match=rf"{Path(name).name}: .* must be a regular file, but is a named pipe"):
        read_dataset(folder, None)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CompareError, match=rf"{Path(name).name}: .* must be a regular file, but is a folder"):
        read_dataset(folder, None)


def test_captured_queries_from_a_pipe_or_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", FILES)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, kind in (("pipe.jsonl", "a named pipe"), ("data", "a folder")):
        with pytest.raises(CompareError, match=rf"{name}: cannot be read: must be a regular file, but is {kind}"):
            read_dataset(folder, None, captured=tmp_path / name)


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beir, "_MAX_LINE_BYTES", 200)
    assert read(tmp_path, FILES).queries
    with pytest.raises(CompareError, match=r"corpus\.jsonl:6: the line has more than 200 bytes"):
        read(tmp_path, FILES | {"corpus.jsonl": CORPUS + "x" * 201})


def test_a_packed_file_under_another_name_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, FILES | {"corpus.jsonl.gz": gzip.compress(CORPUS.encode())})
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(CompareError, match=r"corpus\.jsonl: there is no such file, but corpus\.jsonl\.gz: unpack it"):
        read_dataset(folder, None)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    files = {name: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for name, text in FILES.items()}
    assert read(tmp_path / "a", files).summary().sha256 == read(tmp_path / "b", FILES).summary().sha256


def test_lost_judgments_of_irrelevant_documents_raise_no_figure(tmp_path: Path) -> None:
    dataset = read(tmp_path, {**FILES, "qrels/test.tsv": QRELS + "q1\td9\t0\n"})
    assert dataset.notes[1:] == ("1 judgment was dropped: the id is not in corpus.jsonl.",)


def test_titles_of_queries_are_not_searched_for(tmp_path: Path) -> None:
    dataset = read(tmp_path, {**FILES, "queries.jsonl": QUERIES + '{"_id": "q4", "title": "Long", "text": "short"}\n'})
    assert "q4" not in dataset.queries
    asked = QUERIES.replace('"text": "ask"', '"title": "Please", "text": "ask"')
    dataset = read(tmp_path, {**FILES, "queries.jsonl": asked})
    assert dataset.queries["q1"] == "ask"
    assert "1 query has a title, which BEIR does not use." in dataset.notes


# ------------------------------------------------------------------------------------------- ids of queries and documents


@pytest.mark.parametrize(
    ("text", "title", "is_own"),
    [
        ("Is it  wise to\nask?", None, True),
        ("IS IT WISE TO ASK?", "Debate", True),
        ("wise to ask?", "Is it", True),
        ("Is it wise to ask? [1]", None, False),
        ("Is it wise to ask? " * 3, None, False),
        ("It is, since others cannot know.", None, False),
        ("", None, False),
    ],
)
def test_a_document_is_the_query_only_with_its_text(tmp_path: Path, text: str, title: str | None, is_own: bool) -> None:
    corpus = json.dumps({"_id": 1, "title": title, "text": text}) + '\n{"_id": 2, "text": "No."}\n'
    files = {
        "corpus.jsonl": corpus,
        "queries.jsonl": '{"_id": 1, "text": "Is it wise to ask?"}',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\t2\t1\n",
    }
    dataset = read(tmp_path, files)
    assert dataset.own_documents == (frozenset({"1"}) if is_own else frozenset())
    assert ("1 document was left out of one ranking" in " ".join(dataset.notes)) == is_own
    assert ("1 query has the id of a document with another text" in " ".join(dataset.notes)) != is_own


def test_a_long_argument_with_a_reference_is_still_the_query(tmp_path: Path) -> None:
    argument = " ".join(f"word{number}" for number in range(40))
    files = {
        "corpus.jsonl": json.dumps({"_id": "a", "text": f"{argument} [1]"}),
        "queries.jsonl": json.dumps({"_id": "a", "text": argument}),
    }
    assert read(tmp_path, files).own_documents == {"a"}


def test_a_document_that_is_judged_relevant_is_never_left_out(tmp_path: Path) -> None:
    files = {
        "corpus.jsonl": '{"_id": 1, "text": "same"}\n{"_id": 2, "text": "also"}\n',
        "queries.jsonl": '{"_id": 1, "text": "same"}\n{"_id": 2, "text": "also"}\n',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\t1\t1\n2\t1\t1\n2\t2\t0\n",
    }
    assert read(tmp_path, files).own_documents == {"2"}


# ----------------------------------------------------------------------------------------------------------------- groups


def queries_about(documents: list[list[str]], groups: Mapping[int, object] | None = None) -> dict[str, str]:
    """Write queries with these relevant documents, and groups by the number of the query."""
    names = sorted({document for found in documents for document in found})
    lines = [
        json.dumps({"_id": f"q{number}", "text": "x"} | ({"group": groups[number]} if number in (groups or {}) else {}))
        for number in range(len(documents))
    ]
    judged = [f"q{number}\t{document}\t1" for number, found in enumerate(documents) for document in found]
    return {
        "corpus.jsonl": "\n".join(json.dumps({"_id": name, "text": name}) for name in names),
        "queries.jsonl": "\n".join(lines),
        "qrels/test.tsv": "\n".join(["query-id\tcorpus-id\tscore", *judged]),
    }


def test_named_groups(tmp_path: Path) -> None:
    dataset = read(tmp_path, queries_about([["d"]] * 5, {0: "ada", 1: "ada", 2: 7, 3: 7, 4: "alone"}))
    assert dataset.groups == {"q0": "ada", "q1": "ada", "q2": "7", "q3": "7"}
    assert dataset.summary().num_groups == 3
    assert "4 queries belong to 2 groups, named in queries.jsonl." in " ".join(dataset.notes)
    other = read(tmp_path, queries_about([["d"]] * 5, {0: "ada", 1: "ada"}))
    assert other.summary().sha256 != dataset.summary().sha256
    with pytest.raises(CompareError, match=r"queries.jsonl:1: group must be a non-empty text or an integer, got \[\]"):
        read(tmp_path, queries_about([["d"]], {0: []}))


def test_queries_that_share_a_relevant_document_are_a_group(tmp_path: Path) -> None:
    apart = [[f"d{number}"] for number in range(30)]
    dataset = read(tmp_path, queries_about([*apart, ["x"], ["x", "y"], ["y"], ["z"], ["z"]]))
    assert set(dataset.groups) == {"q30", "q31", "q32", "q33", "q34"}
    assert dataset.groups["q30"] == dataset.groups["q31"] == dataset.groups["q32"] != dataset.groups["q33"]
    assert dataset.summary().num_groups == 32
    assert "5 of 35 queries share a relevant document with another query: intervals" in " ".join(dataset.notes)


def test_few_that_share_and_all_that_are_linked_stay_apart(tmp_path: Path) -> None:
    apart = [[f"d{number}"] for number in range(30)]
    few = read(tmp_path, queries_about([*apart, ["x"], ["x"]]))
    assert (few.groups, few.notes) == ({}, ())
    chain = [[f"d{number}", f"d{number + 1}"] for number in range(30)]
    linked = read(tmp_path, queries_about(chain))
    assert linked.groups == {}
    assert "These links join most queries, so they are counted as independent" in " ".join(linked.notes)


# ---------------------------------------------------------------------------------------------------------- more judgments

FORM = "query-id\tcorpus-id\tscore\tquery\tdocument\nq1\td2\t0\task\tZurück\nq2\t7\t\treset\t=1+1\nq3\td2\t1\tx\ty\n"


def test_filled_in_judgments_are_added(tmp_path: Path) -> None:
    folder = write(tmp_path, {**FILES, "to_judge.tsv": FORM})
    dataset = read_dataset(folder, None, judged=folder / "to_judge.tsv")
    assert dataset.judgments == {"q2": {"d1": 2, "d3": 0}, "q1": {"7": 1, "d2": 0}, "q3": {"d2": 1}}
    assert dataset.notes == (f"2 judgments were added from {folder}/to_judge.tsv; 1 line has no score yet.",)


def test_filled_in_judgments_may_be_the_only_ones(tmp_path: Path) -> None:
    files = {name: text for name, text in FILES.items() if name != "qrels/test.tsv"}
    folder = write(tmp_path, {**files, "to_judge.tsv": FORM})
    dataset = read_dataset(folder, None, judged=folder / "to_judge.tsv")
    assert (dataset.split, dataset.judgments) == (None, {"q1": {"d2": 0}, "q3": {"d2": 1}})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            FORM.replace("q1\td2\t0", "q2\td1\t1"),
            "to_judge.tsv:2: query 'q2' and document 'd1' have score 1, and 2 earlier",
        ),
        (FORM.replace("d2\t0", "d2\tyes"), "to_judge.tsv:2: the score must be an integer, got 'yes'"),
        (FORM.replace("q1\td2\t0\task\tZurück", "q1 d2 0"), "to_judge.tsv:2: must have 3 columns"),
    ],
)
def test_wrong_forms_are_refused(tmp_path: Path, form: str, message: str) -> None:
    folder = write(tmp_path, {**FILES, "to_judge.tsv": form})
    with pytest.raises(CompareError, match=message):
        read_dataset(folder, None, judged=folder / "to_judge.tsv")


def test_an_empty_form_says_what_to_do(tmp_path: Path) -> None:
    files = {name: text for name, text in FILES.items() if name != "qrels/test.tsv"}
    folder = write(tmp_path, {**files, "to_judge.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t\n"})
    with pytest.raises(CompareError, match="has no scores; fill in the column `score`"):
        read_dataset(folder, None, judged=folder / "to_judge.tsv")


@pytest.mark.parametrize("score", ["1000001", "-1000001", str(2**31 - 1), str(-(2**40)), "9" * 5000, "1_0", "٣"])
def test_a_score_that_the_measures_cannot_take_is_reported(write_data: WriteData, score: str) -> None:
    """trec_eval crashes on some of them, and others are not numbers in any file of judgments."""
    folder = write_data()
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq0\td0\t{score}\n")
    with pytest.raises(
        CompareError, match=r"the score must be (an integer|from -1,000,000 to 1,000,000), got"
    ) as raised:
        read_dataset(folder, None)
    assert len(str(raised.value)) < 300 + len(str(folder))


@pytest.mark.parametrize("id_", ["a\tb", "a\nb", "a\rb", " a", "a\u00a0"])
def test_an_id_that_no_file_of_judgments_can_name_is_reported(write_data: WriteData, id_: str) -> None:
    folder = write_data({id_: "text"}, {"q": "query"}, None)
    with pytest.raises(CompareError, match=r"corpus.jsonl:1: _id contains a tab or a line break, or begins"):
        read_dataset(folder, None)


def test_an_id_that_no_form_can_hold_is_reported(write_data: WriteData) -> None:
    folder = write_data({"a" * 10_001: "text"}, {"q": "query"}, None)
    with pytest.raises(CompareError, match=r"corpus.jsonl:1: _id has 10,001 characters; the limit is 10,000"):
        read_dataset(folder, None)


def test_a_captured_query_with_the_id_of_another_is_reported(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"corpus.jsonl": CORPUS})
    days = {f"q-2026-11-2{day}.jsonl": json.dumps({"_id": "c1", "text": f"query {day}"}) for day in (5, 6)}
    write(tmp_path / "kept", days)
    with pytest.raises(CompareError, match=r"q-2026-11-26.jsonl: _id 'c1' has another text in the file of an earlier"):
        read_dataset(folder, None, captured=tmp_path / "kept" / "q.jsonl")


def test_names_that_are_too_long_cause_no_traceback(write_data: WriteData) -> None:
    long = Path("/tmp", "a" * 300)  # noqa: S108  never made
    with pytest.raises(CompareError, match="is not a folder"):
        read_dataset(long, None)
    with pytest.raises(CompareError, match="File name too long"):
        read_dataset(write_data(), None, captured=long)


def test_captured_queries_that_are_all_empty_are_reported(write_data: WriteData, tmp_path: Path) -> None:
    captured = tmp_path / "captured.jsonl"
    captured.write_text('{"_id": "a", "text": " "}\n')
    with pytest.raises(CompareError, match="all queries are empty"):
        read_dataset(write_data(), None, captured=captured)
