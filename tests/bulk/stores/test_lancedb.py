"""LanceDB as a source and a sink: a real one, in a folder."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.rows import BulkError, Json, Row
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.stores.rows import HYBRID, NOTE, by_id, embedded, open_url, read, row, vector_of, write


@pytest.fixture
def url(lancedb_url: str) -> str:
    return lancedb_url


def table_of(url: str) -> lancedb.table.Table:
    folder, _, name = url.removeprefix("lancedb:").partition("#")
    return lancedb.connect(folder).open_table(name)


def test_rows_come_back_with_their_ids_text_and_payload(url: str) -> None:
    payload: dict[str, Json] = {"n": 1, "x": 0.5, "yes": True, "日本": "語\n\U0001f600", "nested": {"a": [1, None]}}
    rows = [row(5, "five", payload), row(-6, "six", {**payload, "n": 2})]
    write(url, rows)
    assert by_id(url) == {item.id: (item.text, item.payload) for item in rows}
    table = table_of(url)
    assert table.search(vector_of("six")).limit(1).to_list()[0]["id"] == -6
    assert table.search().where("n = 2").to_list()[0]["text"] == "six"


def test_a_later_row_keeps_values_that_do_not_fit_into_the_columns(url: str) -> None:
    write(url, [row("a", "x", {"n": 1})])
    write(url, [row("b", "y", {"n": "two", "new": [1]})], shard=1)
    assert by_id(url)["b"] == ("y", {"n": "two", "new": [1]})


def test_all_outputs_are_columns(url: str) -> None:
    rows = [row(n, f"text {n}" + "!" * n) for n in range(5)]
    write(url, rows, HYBRID)
    expected = embedded(rows, HYBRID)
    assert expected.sparse
    assert expected.multivectors
    found = sorted(table_of(url).to_arrow().to_pylist(), key=lambda item: item["id"])
    for index, item in enumerate(found):
        np.testing.assert_allclose(item["vector"], vector_of(rows[index].text), atol=1e-6)
        np.testing.assert_allclose(item["multivector"], expected.multivectors[index], atol=1e-6)
        assert item["sparse"]["indices"] == expected.sparse[index].indices.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"has_sparse": True}, "has dense vectors of 4, but this job has dense vectors of 4 and sparse vectors"),
        ({"token_width": 3}, "has dense vectors of 4, but this job has dense vectors of 4 and multi-vectors of 3"),
    ],
)
def test_other_outputs_are_refused_before_the_first_write(url: str, change: dict[str, object], message: str) -> None:
    write(url, [row(1, "a")])
    with pytest.raises(BulkError) as caught:
        write(url, [row(2, "b")], replace(NOTE, **change))
    assert message in str(caught.value)
    assert list(by_id(url)) == [1]


def test_a_table_of_another_program_is_refused(url: str) -> None:
    folder = url.removeprefix("lancedb:").partition("#")[0]
    lancedb.connect(folder).create_table("docs", pa.table({"id": [1], "vector": [[1.0]]}))
    with pytest.raises(BulkError, match="is a table without a note of its space: embed into a new table"):
        write(url, [row(1, "a")])


@pytest.mark.parametrize(("rows", "message"), [
    ([row(1, "a"), row(1, "b")], "two rows of a shard have the same id"),
    ([row(1, "a")], "its id 'x' does not fit into the id column"),
])  # fmt: skip
def test_ids_that_do_not_fit_are_refused(url: str, rows: list[Row], message: str) -> None:
    with pytest.raises(BulkError) as caught:  # noqa: PT012  the second write fails if the first does not
        write(url, rows)
        write(url, [row("x", "a")])
    assert message in str(caught.value)


def test_reading_continues_in_the_same_version_while_the_table_changes(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bulk.stores.lancedb_source._BATCH", 4)
    write(url, [row(n, f"text {n}") for n in range(20)])
    store, name = open_url(url)
    source = store.source(name, FieldNames())
    assert source.count() == 20
    reader = source.read()
    first = [next(reader) for _ in range(7)]
    table_of(url).delete("id < 10")
    write(url, [row(15, "changed"), row(99, "new")])
    rest = list(source.read(first[-1].position))
    assert [item.text for item in [*first, *rest] if isinstance(item, Row)] == [f"text {n}" for n in range(20)]
    assert [item.text for item in reader if isinstance(item, Row)] == [f"text {n}" for n in range(7, 20)]
    assert {item.id for item in read(url)} == {*range(10, 20), 99}
    with pytest.raises(BulkError, match=r"version 999 of .* was cleaned up"):
        next(source.read([999, 1]))
    with pytest.raises(BulkError, match="is not a position"):
        next(source.read("x"))


def test_columns_of_every_kind_become_json(url: str) -> None:
    folder = url.removeprefix("lancedb:").partition("#")[0]
    moment = datetime(2026, 11, 26, 3, 30, tzinfo=UTC)
    data = pa.table(
        {
            "key": ["a"],
            "body": ["hello"],
            "emb": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)),
            "at": pa.array([moment], pa.timestamp("us", "UTC")),
            "day": pa.array([date(2026, 11, 26)]),
            "raw": pa.array([b"\x00\xff"]),
            "tags": [["x", None]],
            "nan": [float("nan")],
            "s": [{"a": 1}],
        }
    )
    lancedb.connect(folder).create_table("docs", data)
    with pytest.raises(BulkError, match="name the text field with --text"):
        read(url)
    with pytest.raises(BulkError, match="no column is called `id`: name the id column with --id COLUMN"):
        read(url, FieldNames(text="body"))
    assert by_id(url, FieldNames(id="key", text="body")) == {
        "a": ("hello", {
            "at": "2026-11-26T03:30:00+00:00", "day": "2026-11-26", "raw": "AP8=", "tags": ["x", None], "nan": None,
            "s": {"a": 1},
        }),
    }  # fmt: skip


def test_operations_that_lancedb_lacks_are_refused(url: str) -> None:
    for options in (
        SinkOptions(vector="a"),
        SinkOptions(updates=True),
        SinkOptions(like="b"),
        SinkOptions(adopts=True),
    ):
        with pytest.raises(BulkError, match="in a table that the job creates"):
            write(url, [], options=options)
