"""Milvus as a source, a sink and a store that can be moved: Milvus Lite, which uses a server's protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pymilvus
import pytest
from pymilvus import DataType, MilvusClient

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BadRow, BulkError, Row, RowsRefused, RowValidator
from gateway.bulk.stores.milvus import MilvusStore
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.stores.rows import HYBRID, NOTE, by_id, embedded, name_of, open_url, read, row, vector_of, write

WIDE = replace(NOTE, space="wide@0123456789ab", model="wide", dimensions=6)
SPARSE = replace(NOTE, has_sparse=True)


@pytest.fixture
def url(milvus_url: str) -> str:
    return milvus_url


@pytest.fixture
def milvus(milvus_file: Path) -> Iterator[MilvusClient]:
    client = MilvusClient(str(milvus_file))
    yield client
    client.close()


@pytest.fixture
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.milvus_rows.PAGE", 3)
    monkeypatch.setattr("gateway.bulk.stores.milvus_rows.read_page.__defaults__", (3,))


def store_of(url: str) -> MilvusStore:
    place = read_place(url)
    assert place is not None
    store = open_movable(place)
    assert isinstance(store, MilvusStore)
    return store


def test_a_collection_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    """Milvus Lite makes its folder first; it does not list the collection, and cannot create it."""
    url = f"milvus:{tmp_path / 'm.db'}#"
    write(f"{url}first", [row(1, "a")])
    for name in ("half", "full"):
        folder = tmp_path / "m.db" / "collections" / name
        folder.mkdir()
        (folder / "schema.json.tmp").write_text("{")
    (folder / "data").mkdir()

    write(f"{url}half", [row(1, "a")])
    assert set(by_id(f"{url}half")) == {1}
    with pytest.raises(BulkError, match="File exists"):
        write(f"{url}full", [row(1, "a")])
    write(f"{url}half", [row(2, "a")], options=SinkOptions(like="first"))


def test_an_id_of_another_type_is_refused(url: str) -> None:
    write(url, [row(1, "a")])
    with pytest.raises(BulkError, match=r"id x: its id 'x' is text, but the ids of .* are integers"):
        write(url, [row("x", "b")])


def test_a_text_that_is_too_long_for_its_field_is_a_problem_of_its_row(url: str, milvus: MilvusClient) -> None:
    schema = milvus.create_schema(enable_dynamic_field=True)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=4)
    schema.add_field("text", DataType.VARCHAR, max_length=8)
    indexes = milvus.prepare_index_params()
    indexes.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
    milvus.create_collection(name_of(url), schema=schema, index_params=indexes)
    store = store_of(url)
    with closing(store), closing(store.sink(name_of(url), SinkOptions("text"))) as sink:
        sink.open(NOTE)
        assert isinstance(sink, RowValidator)
        assert "its field `text` has 10 bytes, but those of" in sink.problem(row(1, "äöüäö"))
        assert not sink.problem(row(2, "äöüä"))
        sink.write(0, embedded([row(2, "äöüä")]))
    assert by_id(url) == {2: ("äöüä", {})}


@pytest.fixture
def _limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a server's limit for the JSON of a row, and its message, before Milvus Lite, which has no limit."""
    insert = MilvusClient.insert

    def limited(self: MilvusClient, name: str, data: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        for item in data:
            size = len(json.dumps({key: value for key, value in item.items() if key not in ("id", "vector")}))
            if size > 65_536:
                message = f"the length ({size}) of json field ($meta) exceeds max length (65536): invalid parameter"
                raise pymilvus.MilvusException(1100, message)
        result: dict[str, Any] = insert(self, name, data, **settings)
        return result

    monkeypatch.setattr(MilvusClient, "insert", limited)


@pytest.mark.usefixtures("_limited")
def test_an_item_keeps_its_earlier_version_if_the_new_one_is_refused(url: str) -> None:
    write(url, [row(1, "a", {"old": 1}), row(2, "b", {"old": 2})])
    with pytest.raises(RowsRefused):
        write(url, [row(1, "a", {"long": "x" * 70_000}), row(2, "c", {"new": 2})])
    assert by_id(url) == {1: ("a", {"old": 1}), 2: ("c", {"new": 2})}


@pytest.mark.usefixtures("_limited")
def test_an_item_with_a_refused_row_leaves_no_other_row(url: str) -> None:
    rows = [
        replace(row(f"d{item}#{n}", f"text {n}", {"x": "x" * (70_000 if (item, n) == (1, 1) else 1)}), place=f"d{item}")
        for item in range(3)
        for n in range(3)
    ]
    with pytest.raises(RowsRefused):
        write(url, rows)
    assert set(by_id(url)) == {f"d{item}#{n}" for item in (0, 2) for n in range(3)}


@pytest.mark.usefixtures("_limited")
def test_rows_whose_json_is_too_long_for_a_server_are_named(url: str) -> None:
    rows = [row(n, "a", {"long": "x" * (70_000 if n in {4, 11} else 100)}) for n in range(20)]
    with pytest.raises(RowsRefused, match=r"id 4: Milvus rejects it: the length \(70\d+\) of json field") as caught:
        write(url, rows)
    assert [one.id for one in caught.value.rows] == [4, 11]
    write(url, [one for one in rows if one.id not in {4, 11}])
    assert len(by_id(url)) == 18


def test_requests_with_long_texts_stay_below_the_limit_of_a_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    insert = MilvusClient.insert

    def counting(self: MilvusClient, name: str, data: list[dict[str, Any]], **settings: Any) -> Any:
        sizes.append(sum(len(str(item["text"])) for item in data))
        return insert(self, name, data, **settings)

    monkeypatch.setattr(MilvusClient, "insert", counting)
    write(url, [row(n, f"{n} {'long ' * 50_000}") for n in range(100)])
    assert max(sizes) <= 16_000_000
    assert len(by_id(url)) == 100


def test_sparse_weights_are_kept_and_found(url: str, milvus: MilvusClient) -> None:
    rows = [row(n, "text" + "!" * n) for n in range(5)]
    write(url, rows, SPARSE)
    expected = embedded(rows, SPARSE).sparse
    assert expected is not None
    items = milvus.query(name_of(url), filter="id >= 0", output_fields=["sparse"])
    found = {item["id"]: item["sparse"] for item in items}
    for weights, one in zip(expected, rows, strict=True):
        assert found[one.id] == dict(zip(weights.indices.tolist(), weights.values.tolist(), strict=True))
    store = store_of(url)
    assert store.search(name_of(url), expected[4], 1)[0].id == 4
    store.close()
    with pytest.raises(BulkError, match="but no multi-vectors"):
        write(url, [], HYBRID)


def test_a_collection_without_a_note_or_of_another_width_is_refused(url: str, milvus: MilvusClient) -> None:
    milvus.create_collection("mine", dimension=4)
    milvus.insert("mine", [{"id": 1, "vector": [1, 2, 3, 4], "text": "x"}])
    mine = url.replace(name_of(url), "mine")
    with pytest.raises(BulkError, match="has 1 item and no note of their space"):
        write(mine, [])
    with pytest.raises(
        BulkError, match=r"`vector` of .*mine requires vectors of 4 dimensions, but those of wide have 6"
    ):
        write(mine, [], WIDE, SinkOptions(adopts=True))
    write(mine, [row(2, "y")], NOTE, SinkOptions(adopts=True))
    assert by_id(mine) == {1: ("x", {}), 2: ("y", {})}
    milvus.alter_collection_properties("mine", {"embedding_gateway": "nonsense"})
    with pytest.raises(BulkError, match="cannot be read, because a person or another program changed it"):
        write(mine, [])


def typed(milvus: MilvusClient, name: str) -> None:
    """Make a collection with everything that Mem0's has, and more."""
    schema = milvus.create_schema(enable_dynamic_field=True)
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("vectors", DataType.FLOAT_VECTOR, dim=4)
    schema.add_field("metadata", DataType.JSON)
    schema.add_field("n", DataType.DOUBLE, nullable=True)
    schema.add_field(
        "tags", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=8, max_length=20, nullable=True
    )
    schema.add_field("text", DataType.VARCHAR, max_length=65535, enable_analyzer=True)
    schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_field("own", DataType.SPARSE_FLOAT_VECTOR)
    schema.add_field("title", DataType.FLOAT_VECTOR, dim=2)
    schema.add_function(
        pymilvus.Function(
            name="bm25",
            input_field_names=["text"],
            output_field_names=["sparse"],
            function_type=pymilvus.FunctionType.BM25,
        )
    )
    indexes = milvus.prepare_index_params()
    indexes.add_index("vectors", index_type="AUTOINDEX", metric_type="L2")
    indexes.add_index("title", index_type="AUTOINDEX", metric_type="COSINE")
    indexes.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
    indexes.add_index("own", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    milvus.create_collection(name, schema=schema, index_params=indexes, properties={"mine": "kept"})
    milvus.insert(
        name,
        [
            {
                "key": f"k{n}", "vectors": [1, 2, 3, n], "metadata": {"data": f"body {n}", "x": [1, None]},
                "n": None if n == 2 else n / 3, "tags": ["a", "b"], "text": f"body {n}", "own": {n: 0.5},
                "title": [1, n], "dynamic": {"deep": n},
            }
            for n in range(7)
        ],
    )  # fmt: skip


@pytest.mark.usefixtures("_small_pages")
def test_a_copy_has_all_fields_functions_and_indexes_and_vectors_of_another_width(
    url: str, milvus: MilvusClient
) -> None:
    old, new = name_of(url), f"{name_of(url)}_wide"
    typed(milvus, old)
    store, _ = open_url(url)
    fields, options = FieldNames(text="metadata.data"), SinkOptions(text="metadata.data", vector="vectors", like=old)
    source, sink = store.source(old, fields), store.sink(new, options)
    rows = [found for found in source.read() if isinstance(found, Row)]
    sink.open(WIDE)
    sink.write(0, embedded(rows, WIDE))
    source.close()
    sink.close()
    store.close()

    movable = store_of(url)
    assert list(movable.digests(old)) == list(movable.digests(new))
    assert movable.describe(new).widths == {"vectors": 6, "title": 2}
    assert movable.describe(new).notes == {"vectors": WIDE}
    names = ["metadata", "n", "tags", "text", "own", "title", "dynamic"]
    both = [milvus.query(name, filter='key != ""', output_fields=names, limit=10) for name in (old, new)]
    assert len(both[0]) == 7
    assert {item["key"]: item for item in both[0]} == {item["key"]: item for item in both[1]}
    [hits] = milvus.search(new, data=["body"], anns_field="sparse", limit=3)
    assert len(hits) == 3, "Milvus computes the words of the copy itself"
    assert milvus.describe_index(new, "vectors")["metric_type"] == "L2"
    assert milvus.describe_collection(new)["properties"]["mine"] == "kept"
    assert movable.search(new, vector_of("body 3", 6), 1, "vectors")[0].id == "k3"
    with pytest.raises(BulkError, match=r"several vectors: name one of `vectors`, `title` with \?vector=NAME"):
        movable.search(new, vector_of("a"), 1)
    movable.close()


def test_rows_without_a_text_are_reported(url: str, milvus: MilvusClient) -> None:
    write(url, [row(1, "a")])
    milvus.insert(name_of(url), [{"id": 2, "vector": [1, 2, 3, 4], "text": ""}, {"id": 3, "vector": [1, 2, 3, 4]}])
    bad = [found for found in read(url) if isinstance(found, BadRow)]
    assert [(found.id, found.problem) for found in bad] == [
        (2, "the text in field `text` is empty"),
        (3, "the text in field `text` is missing"),
    ]


def test_items_get_no_further_vector(url: str) -> None:
    write(url, [row(1, "a")])
    store, collection = open_url(url)
    assert isinstance(store, MilvusStore)
    with pytest.raises(BulkError, match="Milvus adds no vectors to items that exist: choose a second collection"):
        write(url, [row(1, "a")], options=SinkOptions(updates=True))
    for refused in (store.filled, store.delete_vector):
        with pytest.raises(BulkError, match="Milvus adds no vectors to items that exist"):
            refused(collection, "vector")
    store.close()
    assert by_id(url) == {1: ("a", {})}


class _Rejecting(grpc.GenericRpcHandler):
    """A server that rejects each token, with Milvus' own words."""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def reject(_request: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "auth check failure, please check username and password are correct"
            )
            return b""

        return grpc.unary_unary_rpc_method_handler(reject)


def test_a_token_that_is_wrong_or_missing_is_named_and_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.server(ThreadPoolExecutor(2), [_Rejecting()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for query, name, secret, message in [
            ("", "MILVUS_TOKEN", "root:hunter2", "rejects the token in the environment variable MILVUS_TOKEN"),
            (
                "",
                "MILVUS_TOKEN",
                None,
                "needs a token: set the environment variable MILVUS_TOKEN, or name another with",
            ),
            ("?key_env=MINE", "MINE", "root:hunter2", "rejects the token in the environment variable MINE"),
        ]:
            monkeypatch.delenv("MILVUS_TOKEN", raising=False)
            if secret:
                monkeypatch.setenv(name, secret)
            with pytest.raises(BulkError, match=message) as caught:
                read(f"milvus://127.0.0.1:{port}/docs{query}")
            assert "hunter2" not in str(caught.value)
    finally:
        server.stop(None)


def test_an_alias_is_searched_and_not_deleted_as_a_collection(url: str) -> None:
    old, new = name_of(url), f"{name_of(url)}_2"
    alias = f"{old}_alias"
    write(url, [row(1, "old")])
    write(url.replace(old, new), [row(1, "new")], WIDE, SinkOptions(like=old))
    store = store_of(url)
    store.flip(alias, old)
    assert store.describe(alias).notes == {"vector": NOTE}
    store.flip(alias, new)
    assert store.search(alias, vector_of("new", 6), 5)[0].score == pytest.approx(1, abs=1e-5)
    with pytest.raises(BulkError, match="is an alias of"):
        store.delete_collection(alias)
    store.close()


def test_a_server_or_file_that_cannot_be_used_is_an_error_of_the_job(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bulk.stores.milvus.TIMEOUT_S", 0.2)
    with pytest.raises(BulkError, match=r"milvus://127.0.0.1:1 cannot be reached, or has gone away"):
        open_url("milvus://127.0.0.1:1/docs")
    with pytest.raises(BulkError, match=r"must end in \.db"):
        open_url(f"milvus:{tmp_path}/m#docs")
    with pytest.raises(BulkError, match="there is no collection `gone`"):
        read(url.replace(name_of(url), "gone"))


@pytest.mark.parametrize("like", [None, "old"])
def test_a_collection_gets_its_indexes_also_after_an_interruption(
    like: str | None, url: str, milvus: MilvusClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection and its indexes are created by several requests, and a server loads no collection without an index."""
    old = name_of(url)
    write(url, [row(1, "a")], SPARSE)
    new = f"{url}_new"

    def die(*_values: object, **_named: object) -> None:
        raise BulkError("killed")

    options = SinkOptions(like=old if like else None)
    with monkeypatch.context() as patch:
        patch.setattr(MilvusClient, "create_index", die)
        with pytest.raises(BulkError, match="killed"):
            write(new, [row(1, "a")], SPARSE, options)
    assert not milvus.list_indexes(name_of(new))
    write(new, [row(1, "a")], SPARSE, options)

    assert sorted(milvus.list_indexes(name_of(new))) == sorted(milvus.list_indexes(old)) == ["sparse", "vector"]
    for name in ("sparse", "vector"):
        both = [milvus.describe_index(found, name) for found in (old, name_of(new))]
        assert both[0]["metric_type"] == both[1]["metric_type"]


def test_vectors_that_are_not_normalized_are_compared_by_their_dot_product(url: str, milvus: MilvusClient) -> None:
    write(url, [row(1, "a")], replace(NOTE, is_normalized=False))
    assert milvus.describe_index(name_of(url), "vector")["metric_type"] == "IP"
