"""Folders of Parquet and JSON lines as sinks."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import orjson
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.files.folder import FolderSink
from gateway.bulk.files.sinks import open_folder
from gateway.bulk.files.source import open_files
from gateway.bulk.rows import BulkError, EmbeddedRows, Json, Row, RowValidator, SpaceNote
from gateway.types import SparseVector

NOTE = SpaceNote("mini@0123456789ab", "mini", None, dimensions=4, is_normalized=True, token_width=2, has_sparse=True)


def rows(*payloads: dict[str, Json], first: int | str = 0) -> list[Row]:
    ids = [first if isinstance(first, str) else first + i for i in range(len(payloads))]
    return [Row(i, f"text {i}", payload, f"docs.jsonl:{i}", None) for i, payload in zip(ids, payloads, strict=True)]


def embedded(batch: Sequence[Row], *, is_full: bool = True) -> EmbeddedRows:
    dense = np.arange(4 * len(batch), dtype=np.float32).reshape(-1, 4)
    if not is_full:
        return EmbeddedRows(batch, dense)
    sparse = [SparseVector(np.array([1, 70_000 + i]), np.array([0.5, 0.25], np.float32)) for i in range(len(batch))]
    multivectors = [np.full((i, 2), i, np.float32) for i in range(len(batch))]
    return EmbeddedRows(batch, dense, sparse, multivectors)


def opened(place: Path | str, text_field: str | None = "text") -> FolderSink:
    sink = open_folder(str(place), text_field)
    sink.open(NOTE)
    return sink


def test_parquet_has_vectors_of_fixed_size_sparse_weights_and_the_payload(tmp_path: Path) -> None:
    opened(tmp_path / "out").write(0, embedded(rows({"lang": "en", "n": 1}, {"lang": None, "n": 2})))
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "int64",
        "text": "string",
        "lang": "string",
        "n": "int64",
        "_rest": "string",
        "vector": "fixed_size_list<element: float>[4]",
        "sparse": "struct<indices: list<element: int32>, values: list<element: float>>",
        "multivector": "list<element: fixed_size_list<element: float>[2]>",
    }
    assert table.to_pylist()[1] == {
        "id": 1,
        "text": "text 1",
        "lang": None,
        "n": 2,
        "_rest": None,
        "vector": [4.0, 5.0, 6.0, 7.0],
        "sparse": {"indices": [1, 70_001], "values": [0.5, 0.25]},
        "multivector": [[1.0, 1.0]],
    }
    assert orjson.loads(table.schema.metadata[b"embedding-gateway"])["space"] == NOTE.space


def test_json_lines_have_the_same_columns(tmp_path: Path) -> None:
    opened(tmp_path / "out.jsonl").write(0, embedded(rows({"lang": "en"}, {"n": [1]})))
    lines = (tmp_path / "out.jsonl" / "part-00000.jsonl").read_bytes().splitlines()
    assert [orjson.loads(line) for line in lines] == [
        {"id": 0, "text": "text 0", "lang": "en", "vector": [0.0, 1.0, 2.0, 3.0],
         "sparse": {"indices": [1, 70_000], "values": [0.5, 0.25]}, "multivector": []},
        {"id": 1, "text": "text 1", "n": [1], "vector": [4.0, 5.0, 6.0, 7.0],
         "sparse": {"indices": [1, 70_001], "values": [0.5, 0.25]}, "multivector": [[1.0, 1.0]]},
    ]  # fmt: skip


def test_all_files_have_the_columns_of_the_first(tmp_path: Path) -> None:
    opened(tmp_path).write(0, embedded(rows({"n": 1, "score": 1, "tags": ["a"]}, {"score": 0.5}), is_full=False))
    later = rows({"n": "many", "new": {"deep": True}, "tags": "b", "score": True}, {"n": 2**70, "score": 3})
    opened(tmp_path).write(1, embedded(later, is_full=False))  # by another process, which reads the columns
    table = ds.dataset(tmp_path).to_table()
    assert table.schema.field("score").type == "double"
    found = [{k: v for k, v in row.items() if k not in {"vector", "text", "id"}} for row in table.to_pylist()]
    assert found == [
        {"n": 1, "score": 1.0, "tags": '["a"]', "_rest": None},
        {"n": None, "score": 0.5, "tags": None, "_rest": None},
        {"n": None, "score": None, "tags": '"b"', "_rest": found[2]["_rest"]},
        {"n": None, "score": 3.0, "tags": None, "_rest": found[3]["_rest"]},
    ]
    assert orjson.loads(found[2]["_rest"]) == {"n": "many", "new": {"deep": True}, "score": True}
    # JSON has no limit for whole numbers, but few readers take one as large.
    assert "1180591620717411303424" in found[3]["_rest"]


@pytest.mark.parametrize("place", ["out", "out.jsonl"])
def test_a_field_with_the_name_of_a_column_of_the_sink_is_kept_apart(place: str, tmp_path: Path) -> None:
    payload: dict[str, Json] = {"id": "other", "vector": "mosquito", "body": "clash", "fine": 1}
    sink = opened(tmp_path / place, "meta.body")
    sink.write(0, embedded(rows(payload), is_full=False))
    path = next((tmp_path / place).iterdir())
    row = pq.read_table(path).to_pylist()[0] if path.suffix == ".parquet" else orjson.loads(path.read_bytes())
    rest = row.pop("_rest")
    assert (orjson.loads(rest) if isinstance(rest, str) else rest) == {
        "id": "other",
        "vector": "mosquito",
        "body": "clash",
    }
    assert row == {"id": 0, "body": "text 0", "fine": 1, "vector": [0.0, 1.0, 2.0, 3.0]}


def test_the_text_can_be_left_out(tmp_path: Path) -> None:
    opened(tmp_path, None).write(0, embedded(rows({}), is_full=False))
    assert pq.read_table(tmp_path).schema.names == ["id", "_rest", "vector"]


def test_ids_are_text_unless_the_first_ones_are_all_numbers(tmp_path: Path) -> None:
    opened(tmp_path / "text").write(0, embedded([*rows({}, first=1), *rows({}, first="a")]))
    assert pq.read_table(tmp_path / "text").column("id").to_pylist() == ["1", "a"]
    sink = opened(tmp_path / "numbers")
    sink.write(0, embedded(rows({})))
    with pytest.raises(BulkError, match=r"docs\.jsonl:a: its id 'a' does not fit into the id column, which holds"):
        sink.write(1, embedded(rows({}, first="a")))
    assert [path.name for path in (tmp_path / "numbers").iterdir()] == ["part-00000.parquet"]


def test_a_text_that_is_read_before_the_first_shard_is_written_makes_all_ids_texts(tmp_path: Path) -> None:
    """Rows are read ahead, so a row that was accepted must be stored."""
    sink = opened(tmp_path)
    [number], [text], [late] = rows({}), rows({}, first="a"), rows({}, first="b")
    assert isinstance(sink, RowValidator)
    assert (sink.problem(number), sink.problem(text)) == ("", "")
    sink.write(0, embedded([number]))
    sink.write(1, embedded([text]))
    assert sink.problem(late) == ""
    assert ds.dataset(tmp_path, format="parquet").to_table().column("id").to_pylist() == ["0", "a"]


@pytest.mark.parametrize("place", ["out", "out.jsonl"])
def test_a_shard_again_replaces_the_shard_and_leaves_nothing_half_written(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    sink = opened(folder)
    sink.write(0, embedded(rows({"n": 1})))
    (folder / f".{sink.file_name(1)}.tmp").write_bytes(b"a killed process has left this")
    opened(folder).write(1, embedded(rows({"n": 2})))
    sink.write(0, embedded(rows({"n": 3})))
    assert sorted(path.name for path in folder.iterdir()) == [sink.file_name(0), sink.file_name(1)]
    sink.remove([*map(sink.file_name, range(2)), "gone"])
    assert not list(folder.iterdir())


def test_vectors_of_another_space_are_refused(tmp_path: Path) -> None:
    opened(tmp_path).write(0, embedded(rows({})))
    other = SpaceNote("big@ffffffffffff", "big", None, dimensions=4, is_normalized=True)
    with pytest.raises(BulkError, match=r"has vectors of space mini@0123456789ab, .* vectors of big@ffffffffffff"):
        open_folder(str(tmp_path), "text").open(other)


def test_a_parquet_file_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"x": [1]}), tmp_path / "part-00000.parquet")
    with pytest.raises(BulkError, match=r"part-00000\.parquet was not written by the gateway, and would be replaced"):
        opened(tmp_path)


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = opened(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gateway.bulk.files.folder.os.fsync", full)
    with pytest.raises(BulkError, match=r"part-00000\.parquet cannot be written: No space left on device; make room"):
        sink.write(0, embedded(rows({})))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BulkError, match="the folder cannot be created: File exists"):
        opened(tmp_path / "file")


@pytest.mark.parametrize("ending", ["", ".jsonl"])
def test_a_folder_of_another_filesystem_is_written(ending: str) -> None:
    place = f"memory://bulk-written{ending}"
    opened(place).write(0, embedded(rows({"n": 1}), is_full=False))
    sink = opened(place)
    sink.write(1, embedded(rows({"n": 2}), is_full=False))
    memory = fsspec.filesystem("memory")
    found: Any = sorted(path.rpartition("/")[2] for path in memory.ls(f"/bulk-written{ending}", detail=False))
    assert found == [sink.file_name(0), sink.file_name(1)]
    sink.remove([*map(sink.file_name, range(2)), "gone"])
    assert not memory.ls(f"/bulk-written{ending}", detail=False)


def test_integers_of_any_size_stay_exact_next_to_fractions(tmp_path: Path) -> None:
    """A floating-point number has 53 bits, and JSON's integers have no limit."""
    large: list[Json] = [0.5, 2**53, 2**53 + 1, -(2**60) - 1, 2**70, [2**70]]
    payloads: list[dict[str, Json]] = [{"n": number} for number in large]
    opened(tmp_path / "out").write(0, embedded(rows(*payloads[:4])))
    opened(tmp_path / "out").write(1, embedded(rows(*payloads[4:])))
    source = open_files([str(tmp_path / "out")], FieldNames())
    assert [row.payload["n"] for row in source.read() if isinstance(row, Row)] == large

    opened(tmp_path / "out.jsonl").write(0, embedded(rows(*payloads)))
    lines = (tmp_path / "out.jsonl/part-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["n"] for line in lines] == large
    assert json.loads(lines[-1])["vector"] == [20.0, 21.0, 22.0, 23.0]
