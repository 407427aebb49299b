"""Qdrant over HTTP: keys, retries, and a server that goes away."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError, Row, RowsRefused
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.stores.qdrant_server import QdrantServer
from tests.bulk.stores.rows import HYBRID, NOTE, by_id, embedded, open_url, read, row, vector_of, write


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    opened = QdrantServer()
    yield opened
    opened.close()


@pytest.fixture
def url(server: QdrantServer) -> str:
    return f"qdrant://127.0.0.1:{server.port}/docs"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.patience._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("gateway.bulk.stores.qdrant_connection.PATIENCE_S", 0.5)


def test_rows_go_there_and_back(url: str, server: QdrantServer) -> None:
    rows = [row(n, f"text {n}", {"n": n, "none": None, "日本": {"a": [n]}}) for n in range(4)] + [row("x", "x")]
    write(url, rows, HYBRID)
    assert by_id(url) == {item.id: (item.text, item.payload) for item in rows}
    assert any("/points?wait=true" in path for path in server.paths)
    place = read_place(url)
    assert place is not None
    store = open_movable(place)
    assert store.search("docs", vector_of("x"), 1)[0].id == "x"
    assert list(store.vectors("docs", ["x"])) == ["x"]
    store.flip("live", "docs")
    assert store.describe("live").name == "docs"
    store.delete_ids("docs", ["x"])
    assert [row_id for row_id, _ in store.digests("live")] == [0, 1, 2, 3]
    store.close()


def test_requests_stay_below_the_limit_of_the_server(url: str, server: QdrantServer) -> None:
    note = replace(NOTE, dimensions=1024)
    write(url, [row(n, f"text {n}") for n in range(500)], note)
    assert max(server.sizes) < server.max_bytes / 3
    assert sum("/points?wait=true" in path for path in server.paths) == 2
    assert server.engine.count("docs").count == 500


def test_requests_with_long_texts_stay_below_the_limit_of_the_server(url: str, server: QdrantServer) -> None:
    write(url, [row(n, f"{n} {'long ' * 50_000}", {"n": "x" * 50_000}) for n in range(250)])
    assert max(server.sizes) < server.max_bytes / 3
    assert server.engine.count("docs").count == 250


def test_a_row_that_is_too_large_for_the_server_says_what_to_raise(url: str, server: QdrantServer) -> None:
    server.max_bytes = 2000
    rows = [row(n, "long " * 1000 if n in {3, 7} else "short") for n in range(20)]
    with pytest.raises(
        RowsRefused, match=r"id 3: .* because of its size: .* Raise Qdrant's `service.max_request_size_mb`"
    ) as caught:
        write(url, rows)
    assert [one.id for one in caught.value.rows] == [3, 7]
    write(url, [one for one in rows if one.id not in {3, 7}])
    assert len(by_id(url)) == 18


def test_an_item_with_a_refused_row_leaves_no_other_row(url: str, server: QdrantServer) -> None:
    """Neither those of this shard nor those of an earlier version; an item of one row keeps its earlier version."""
    server.max_bytes = 2000
    rows = [
        replace(row(f"d{item}#{n}", "long " * 1000 if (item, n) == (1, 1) else f"text {n}"), place=f"d{item}")
        for item in range(3)
        for n in range(3)
    ]
    write(url, [row("alone", "short"), row("d1#1", "short")])
    with pytest.raises(RowsRefused):
        write(url, [*rows, row("alone", "long " * 1000)])
    assert set(by_id(url)) == {"alone", *(f"d{item}#{n}" for item in (0, 2) for n in range(3))}


@pytest.mark.parametrize("fault", ["close", "late", "429", "500", "503"])
@pytest.mark.parametrize("num_before", range(6))
def test_a_short_absence_does_not_matter(
    url: str, server: QdrantServer, fault: str, num_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bulk.stores.qdrant_connection.PATIENCE_S", 10.0)  # a busy machine is slow
    store, name = open_url(url)
    sink = store.sink(name, SinkOptions())
    with pytest.raises(BulkError):  # the first response shows that it is Qdrant
        read(f"{url}-other")
    server.faults.extend([""] * num_before + [fault, fault])
    sink.open(NOTE)
    sink.write(0, embedded([row(1, "a"), row("x", "b")]))
    sink.close()
    server.faults.extend([""] * num_before + [fault, fault])
    assert set(by_id(url)) == {1, "x"}
    assert server.engine.count("docs").count == 2
    store.close()


def test_a_server_that_stays_away_ends_the_job_which_can_continue(url: str, server: QdrantServer) -> None:
    store, name = open_url(url)
    sink = store.sink(name, SinkOptions())
    store.close()
    sink.open(NOTE)
    sink.write(0, embedded([row(1, "a")]))
    server.faults.extend(["close"] * 1000)
    with pytest.raises(
        BulkError, match=r"has gone away: .*; run the same command again when the store is back, and it continues"
    ):
        sink.write(1, embedded([row(2, "b")]))
    server.faults.clear()
    sink.close()
    write(url, [row(2, "b")], shard=1)
    assert set(by_id(url)) == {1, 2}


def test_a_reader_continues_after_a_server_that_went_away(
    url: str, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bulk.stores.qdrant_source._PAGE", 4)
    write(url, [row(n, f"text {n}") for n in range(10)])
    store, name = open_url(url)
    source = store.source(name, FieldNames(text="text"))
    reader = source.read()
    seen = [next(reader) for _ in range(4)]
    server.faults.extend(["503"] * 1000)
    with pytest.raises(BulkError, match="fails with status 503: Service internal error; run the same command again"):
        next(reader)
    server.faults.clear()
    seen += source.read(seen[-1].position)
    assert [item.id for item in seen if isinstance(item, Row)] == list(range(10))
    source.close()
    store.close()


def test_a_server_that_never_responds_is_a_wrong_url(server: QdrantServer) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(BulkError, match=f"qdrant://127.0.0.1:{port} cannot be reached: .* is {port} its HTTP port"):
            read(f"qdrant://127.0.0.1:{port}/docs")
    with pytest.raises(BulkError, match=r"failed to set up TLS: .* write qdrant:// instead of qdrant\+https://"):
        read(f"qdrant+https://127.0.0.1:{server.port}/docs")


def test_a_key_comes_from_the_environment(url: str, server: QdrantServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "hunter2"
    with pytest.raises(BulkError, match=r"needs a key: set the environment variable QDRANT_API_KEY, or name another"):
        read(url)
    monkeypatch.setenv("QDRANT_API_KEY", "wrong-secret")
    with pytest.raises(
        BulkError, match="rejects the key in the environment variable QDRANT_API_KEY: Invalid"
    ) as caught:
        read(url)
    assert "wrong-secret" not in str(caught.value)
    monkeypatch.setenv("OTHER_KEY", "hunter2")
    write(f"{url}?key_env=OTHER_KEY", [row(1, "a")])
    assert set(by_id(f"{url}?key_env=OTHER_KEY")) == {1}


def test_a_server_without_metadata_is_refused(url: str, server: QdrantServer) -> None:
    server.has_metadata = False
    with pytest.raises(BulkError, match=r"does not store metadata of collections; this needs Qdrant 1\.16 or later"):
        write(url, [row(1, "a")])
    assert not server.engine.collection_exists("docs")
    server.engine.create_collection("docs", models.VectorParams(size=4, distance=models.Distance.COSINE))
    with pytest.raises(BulkError, match=r"does not store metadata of collections; this needs Qdrant 1\.16 or later"):
        write(url, [row(1, "a")])
    assert server.engine.count("docs").count == 0


def test_another_server_is_not_qdrant(server: QdrantServer) -> None:
    with pytest.raises(BulkError, match="rejects a request with status 404: no route GET /prefix/"):
        read(f"qdrant://127.0.0.1:{server.port}/prefix/docs")


def test_a_collection_in_the_place_of_a_prefix_is_named(url: str) -> None:
    """``gateway move docs --from qdrant://host/docs``: the collection belongs before --from, not into it."""
    write(url, [row(1, "a")])
    place = read_place(url, has_collection=False)
    assert place is not None
    with (
        closing(open_movable(place)) as store,
        pytest.raises(BulkError, match="Is `docs` a prefix of all paths of the"),
    ):
        store.describe("docs")


@pytest.mark.parametrize("fault", ["503", "late", "400"])
def test_a_copy_gets_all_payload_indexes_also_after_an_interruption(fault: str, url: str, server: QdrantServer) -> None:
    """Without them, filters are slow, or rejected: Qdrant Cloud does not filter by fields without an index."""
    write(url, [row(1, "a", {"user": "ada", "n": 1})])
    with closing(server_client(server)) as client:
        client.create_payload_index(
            "docs", "user", models.KeywordIndexParams(type=models.KeywordIndexType.KEYWORD, is_tenant=True)
        )
        client.create_payload_index("docs", "n", models.PayloadSchemaType.INTEGER)
    like = server.indexes["docs"]
    create = QdrantServer.answer

    def fail_after_creation(self: QdrantServer, method: str, path: str, body: dict[str, Any]) -> tuple[int, object]:
        answer = create(self, method, path, body)
        if (method, path) == ("PUT", "/collections/copy"):
            server.faults.append(fault)
        return answer

    copy = url.replace("docs", "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QdrantServer, "answer", fail_after_creation)
        with suppress(BulkError):
            write(copy, [row(1, "a")], options=SinkOptions(like="docs"))
    write(copy, [row(1, "a")], options=SinkOptions(like="docs"))

    assert server.indexes["copy"] == like


def server_client(server: QdrantServer) -> QdrantClient:
    return QdrantClient(host="127.0.0.1", port=server.port, check_compatibility=False)
