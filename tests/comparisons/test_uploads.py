"""Data sets from uploaded tables: accepted and refused formats, and no half-written files."""

from __future__ import annotations

import bz2
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gateway.compare.dataset import read_dataset
from gateway.comparisons.uploads import MAX_DATA_SETS, Table, remove_data_set, store_data_set
from gateway.errors import BadInput, NotFound

DOCUMENTS = 'id,title,text\nd1,Trains,They run on rails.\nd2,,"Cheese, of milk"\n'
QUERIES = "text\nwhat runs on rails\nwhat is of milk\n"


def table(field: str, content: str | bytes, filename: str = "my.csv") -> Table:
    return Table(field, filename, content if isinstance(content, bytes) else content.encode())


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["first"]}), file)
    return file.getvalue()


def store(folder: Path, name: str = "mine", **contents: str | bytes | Table) -> object:
    tables = {
        field: content if isinstance(content, Table) else table(field, content) for field, content in contents.items()
    }
    return store_data_set(folder, name, tables)


def test_three_tables_become_a_data_set_that_compare_reads(tmp_path: Path) -> None:
    judgments = "query-id\tcorpus-id\tscore\n1\td1\t2\n2\td2\t1\n2\td1\t0\n"
    stored = store(tmp_path, documents=DOCUMENTS, queries=QUERIES, judgments=judgments)

    dataset = read_dataset(tmp_path / "mine", None)

    assert (stored.num_documents, stored.num_queries, stored.num_judgments) == (2, 2, 3)
    assert dataset.documents == {"d2": "Cheese, of milk", "d1": "Trains They run on rails."}
    assert dataset.queries == {"1": "what runs on rails", "2": "what is of milk"}
    assert dataset.judgments == {"1": {"d1": 2}, "2": {"d2": 1, "d1": 0}}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "documents",
    [
        table("documents", "text\ta\nfirst\t1\nsecond, and more\t2\n", "my.tsv"),
        table("documents", '\ufeffText;ID\r\nfirst;1\r\n"second, and more";2\r\n'),
        table("documents", '{"_id": 1, "text": "first"}\n\n{"text": "second, and more"}\n', "my.jsonl"),
        table("documents", "first\n\n  second, and more\n", "my.txt"),
        table("documents", '\n\ntext\nfirst\n"second, and more"\n'),
        table("documents", '{"text": "first", "metadata": {}, "tags": ["\\ud83d"]}\n{"text": "second, and more"}\n'),
    ],
)
def test_each_kind_of_file_is_understood(tmp_path: Path, documents: Table) -> None:
    store(tmp_path, documents=documents, queries=QUERIES)
    assert dict(sorted(read_dataset(tmp_path / "mine", None).documents.items())) == {
        "1": "first",
        "2": "second, and more",
    }


@pytest.mark.parametrize("text", ["PAR1 bulbs", "BZh is not a word"])
def test_a_text_may_begin_like_the_name_of_a_format(tmp_path: Path, text: str) -> None:
    store(tmp_path, documents=table("documents", text, "my.txt"), queries=QUERIES)
    assert read_dataset(tmp_path / "mine", None).documents == {"1": text}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"queries": QUERIES}, "the form has no file `documents`"),
        (
            {"documents": "a,b\n1,2\n"},
            "documents, line 1 of 'my.csv': the first line must name the columns, including `text`",
        ),
        ({"documents": "text\n\n"}, "documents: 'my.csv' has no texts"),
        ({"documents": b"text\n\xff\n"}, "documents: 'my.csv' is not UTF-8 at byte 6"),
        (
            {"documents": "text\nFüße\n".encode("utf-16")},
            "documents: 'my.csv' is in UTF-16 or UTF-32: save it as UTF-8",
        ),
        (
            {"documents": table("documents", b"PK\x03\x04\x14", "my.xlsx")},
            "'my.xlsx' is a spreadsheet or an archive: save",
        ),
        (
            {"documents": table("documents", b"\x1f\x8b\x08", "my.csv.gz")},
            "'my.csv.gz' is compressed: upload it uncompressed",
        ),
        (
            {"documents": table("documents", bz2.compress(b"text"), "my.csv.bz2")},
            "'my.csv.bz2' is compressed: upload it uncompressed",
        ),
        (
            {"documents": table("documents", parquet(), "my.parquet")},
            "'my.parquet' is Parquet: write it as JSON lines",
        ),
        (
            {"documents": table("documents", '[{"text": "a"}]', "my.json")},
            "documents, line 1 of 'my.json': the file is a JSON array: write JSON lines, an object in each line",
        ),
        ({"documents": "id,text\n1,a\n1,b\n"}, "line 3 of 'my.csv': an earlier text has the id '1' too"),
        ({"documents": "id,text\na b,c\n"}, "the id 'a b' contains white space or a control character"),
        ({"documents": "id,text\na\0b,c\n"}, "the id 'a\\x00b' contains white space or a control character"),
        ({"documents": f"id,text\n{'a' * 10_001},c\n"}, "line 2 of 'my.csv': the id has 10,001 characters; the limit"),
        ({"documents": "id,text,Text\n1,a,b\n"}, "line 1 of 'my.csv': the column `text` appears twice"),
        (
            {"documents": '{"text": "a"}\n{"id": 1, "ID": 2, "text": "b"}\n'},
            "line 2 of 'my.csv': the column `id` appears",
        ),
        ({"documents": "id,text\n1,a,b\n"}, "line 2 of 'my.csv': the line has 3 columns, not 2"),
        ({"documents": 'text\n"open\n'}, "the line cannot be read: unexpected end of data"),
        ({"documents": f"text\n{'x' * 100_001}\n"}, "the text has 100,001 characters; the limit is 100,000"),
        ({"documents": '{"text": "a"}\n{\n'}, "line 2 of 'my.csv': the line is not JSON"),
        (
            {"documents": '{"text": "\\ud83d x"}\n'},
            "`text` contains half a surrogate pair, '\\ud83d', which is not text",
        ),
        ({"documents": '{"text": "a", "_id": "\\udc00"}\n'}, "`_id` contains half a surrogate pair"),
        ({"documents": '{"text": ["a"]}\n'}, "line 1 of 'my.csv': `text` must be a string, got a list"),
        ({"documents": '{"text": true}\n'}, "`text` must be a string, got true or false"),
        ({"documents": DOCUMENTS, "judgments": "query-id,corpus-id,score\n"}, "the form has no file `queries`"),
        (
            {"documents": DOCUMENTS, "queries": QUERIES, "judgments": "1,d1,1\n"},
            "judgments, line 1 of 'my.csv': the first line must have the columns query-id, corpus-id, score",
        ),
        (
            {"documents": DOCUMENTS, "queries": QUERIES, "judgments": "query-id,corpus-id,score\n9,d1,1\n"},
            "'9' is not the id of one of the queries",
        ),
        (
            {"documents": DOCUMENTS, "queries": QUERIES, "judgments": "query-id,corpus-id,score\n1,d1,good\n"},
            "the score must be a whole number, got 'good'",
        ),
        (
            {"documents": DOCUMENTS, "queries": QUERIES, "judgments": "query,document,score\n1,d1,1\n1,d1,1\n1,d1,0\n"},
            "judgments, line 4 of 'my.csv': query '1' and document 'd1' have the scores 1 and 0: keep one",
        ),
    ],
)
def test_a_wrong_table_is_refused_with_its_line_and_leaves_nothing(
    tmp_path: Path, contents: dict[str, str | bytes], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        store(tmp_path, **contents)
    assert message in caught.value.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "../out", ".hidden", "a/b", "x" * 101])
def test_a_name_stays_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="the name of a data set has"):
        store(tmp_path, name, documents=DOCUMENTS)


def test_a_data_set_is_not_replaced_and_the_folder_is_bounded(tmp_path: Path) -> None:
    store(tmp_path, documents=DOCUMENTS)
    with pytest.raises(BadInput, match="a data set 'mine' already exists"):
        store(tmp_path, documents=DOCUMENTS)
    for number in range(MAX_DATA_SETS - 1):
        (tmp_path / f"set {number}").mkdir()
    with pytest.raises(BadInput, match=f"has {MAX_DATA_SETS} data sets"):
        store(tmp_path, "another", documents=DOCUMENTS)


def test_a_data_set_is_deleted(tmp_path: Path) -> None:
    store(tmp_path, documents=DOCUMENTS)
    remove_data_set(tmp_path, "mine")
    assert not list(tmp_path.iterdir())
    for name in ("mine", "../x", ""):
        with pytest.raises(NotFound, match="no data set is called"):
            remove_data_set(tmp_path, name)


def test_a_link_to_a_data_set_is_deleted_alone(tmp_path: Path) -> None:
    store(tmp_path / "elsewhere", documents=DOCUMENTS)
    data = tmp_path / "data"
    data.mkdir()
    (data / "mine").symlink_to(tmp_path / "elsewhere" / "mine")

    remove_data_set(data, "mine")

    assert not list(data.iterdir())
    assert (tmp_path / "elsewhere" / "mine" / "corpus.jsonl").is_file()


def test_a_data_set_that_cannot_be_deleted_whole_is_gone_from_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, documents=DOCUMENTS)

    def fail(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(BadInput, match=r"/\.old-[0-9a-f]{12} cannot be deleted: Permission denied"):
        remove_data_set(tmp_path, "mine")
    assert not (tmp_path / "mine").exists()
