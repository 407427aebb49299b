"""Chroma as a source and a sink: a real one, in a folder and as a server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import chromadb
import httpx
import numpy as np
import pytest
from chromadb.api import ClientAPI
from chromadb.api.base_http_client import BaseHTTPClient
from chromadb.config import Settings

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import read_place
from gateway.bulk.rows import BadRow, BulkError, Json, Row
from gateway.bulk.stores.chroma_connection import Connection
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.stores.rows import HYBRID, NOTE, by_id, embedded, name_of, open_url, read, row, vector_of, write


@pytest.fixture
def url(chroma_url: str) -> str:
    return chroma_url


@pytest.fixture
def client(chroma_folder: Path) -> Iterator[ClientAPI]:
    opened = chromadb.PersistentClient(str(chroma_folder), Settings(anonymized_telemetry=False))
    yield opened
    opened.close()


def test_rows_come_back_with_their_ids_text_and_payload(url: str, client: ClientAPI) -> None:
    payload: dict[str, Json] = {
        "yes": True,
        "n": 3,
        "x": 0.5,
        "日本": "語\n\U0001f600",
        "tags": ["a", "b"],
        "none": None,
    }
    rows = [row(5, "five", payload), row(-1, "minus"), row(2**70, "large"), row(6, "six", {"nested": {"a": [1, None]}})]
    write(url, rows)
    expected = {
        5: ("five", {name: value for name, value in payload.items() if value is not None}),
        -1: ("minus", {}),
        2**70: ("large", {}),
        6: ("six", {"nested": json.dumps({"a": [1, None]})}),
    }
    assert by_id(url) == expected
    found = client.get_collection(name_of(url), embedding_function=None).get(ids=["5"], include=["embeddings"])
    assert found["embeddings"] is not None
    np.testing.assert_allclose(found["embeddings"][0], vector_of("five"), atol=1e-6)


@pytest.mark.parametrize(("rows", "message"), [
    ([row(5, "a"), row("5", "b")], "id 5: its id '5' is text, but the ids of"),
    ([row("", "a")], "id : its id is empty, which Chroma does not allow"),
    ([row(1, "a", {"gateway_id": 2})], "has a field `gateway_id`"),
])  # fmt: skip
def test_ids_that_would_be_one_item_are_refused(url: str, rows: list[Row], message: str) -> None:
    with pytest.raises(BulkError) as caught:
        write(url, rows)
    assert message in str(caught.value)


def test_vectors_without_a_note_are_refused_unless_the_user_knows_them(url: str, client: ClientAPI) -> None:
    collection = client.create_collection(name_of(url), metadata={"mine": 1}, embedding_function=None)
    collection.add(ids=["a"], embeddings=[[1.0, 0, 0, 0]], documents=["x"])
    with pytest.raises(BulkError, match=r"has 1 item and no note of their space.* or add --adopt if"):
        write(url, [row("b", "y")])
    with pytest.raises(BulkError, match="has vectors of width 4, but this job's have 8"):
        write(url, [], replace(NOTE, dimensions=8), SinkOptions(adopts=True))
    with pytest.raises(
        BulkError, match="uses the distance l2, but tiny needs ip, because its vectors are not normalized"
    ):
        write(url, [], replace(NOTE, is_normalized=False), SinkOptions(adopts=True))
    write(url, [row("b", "y")], options=SinkOptions(adopts=True))
    write(url, [row("c", "z")])
    assert list(by_id(url)) == ["a", "b", "c"]
    assert client.get_collection(name_of(url), embedding_function=None).metadata["mine"] == 1


@pytest.mark.parametrize(("is_normalized", "space"), [(True, "cosine"), (False, "ip")])
def test_a_new_collection_has_the_distance_of_the_space(
    url: str, client: ClientAPI, is_normalized: bool, space: str
) -> None:
    write(url, [row("b", "y")], replace(NOTE, is_normalized=is_normalized))
    configuration = client.get_collection(name_of(url), embedding_function=None).configuration_json
    assert configuration["hnsw"]["space"] == space


def test_reading_continues_after_a_position_while_items_come_and_go(
    url: str, client: ClientAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bulk.stores.chroma_source._PAGE", 8)
    write(url, [row(f"i{n:02}", f"text {n}") for n in range(40)])
    collection = client.get_collection(name_of(url), embedding_function=None)
    store, name = open_url(url)
    source = store.source(name, FieldNames())
    assert source.count() == 40
    reader = source.read()
    first = [next(reader) for _ in range(20)]
    collection.delete(ids=["i00", "i01", "i02", "i22", "i30"])
    collection.upsert(ids=["i40", "i05"], embeddings=[[1.0, 0, 0, 0]] * 2, documents=["text 40", "text 5 again"])
    expected = [f"i{n:02}" for n in range(20, 41) if n not in (22, 30)]
    assert [item.id for item in reader] == expected
    rest = list(source.read(first[-1].position))
    assert [item.id for item in rest] == expected
    assert list(source.read(rest[-1].position)) == []
    collection.delete(ids=["i19"])
    with pytest.raises(BulkError, match=r"the item 'i19' of .* was deleted while the job was reading"):
        next(source.read(first[-1].position))
    with pytest.raises(BulkError, match="'x' is not a position in chroma:"):
        next(source.read("x"))
    source.close()


def test_the_text_is_the_document_or_a_field(url: str, client: ClientAPI) -> None:
    collection = client.create_collection(name_of(url), embedding_function=None)
    collection.add(
        ids=["a", "b"],
        embeddings=[[1.0, 0, 0, 0]] * 2,
        documents=["doc", None],  # type: ignore[list-item]
        metadatas=[{"text": "title", "id": 7}, {"text": "only"}],
    )
    good, bad = read(url)
    assert isinstance(good, Row)
    assert (good.id, good.text, good.payload) == ("a", "doc", {"text": "title", "id": 7})
    assert bad == BadRow(f"id b of {url}", "the text in field `document` must be text, got nothing", [1, "b"], "b")
    assert [item.text for item in read(url, FieldNames(text="text")) if isinstance(item, Row)] == ["title", "only"]


def test_a_folder_that_is_not_chroma_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "chroma.sqlite3").write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(BulkError, match="cannot be opened as a Chroma store"):
        read(f"chroma:{tmp_path}#docs")


def test_operations_that_chroma_lacks_are_refused(url: str) -> None:
    for options in (SinkOptions(vector="a"), SinkOptions(updates=True), SinkOptions(like="b")):
        with pytest.raises(BulkError, match="stores one unnamed vector per item"):
            write(url, [], options=options)
    with pytest.raises(BulkError, match="can store only dense vectors"):
        write(url, [], HYBRID)


def test_a_server_is_a_source_and_a_sink(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"chroma://127.0.0.1:{port}/docs"
    with pytest.raises(BulkError, match=f"chroma://127.0.0.1:{port} cannot be reached"):
        read(url)
    command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            rows = [row(n, f"text {n}", {"n": n}) for n in range(3)]
            write(url, rows)
            write(url, rows)
            assert by_id(url) == {item.id: (item.text, item.payload) for item in rows}
            store, name = open_url(url)
            sink = store.sink(name, SinkOptions())
            sink.open(NOTE)
        finally:
            server.terminate()
            server.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.bulk.stores.chroma_connection.PATIENCE_S", 0.4)
        with pytest.raises(BulkError, match=r"has gone away: .*; run the same command again when the store is back"):
            sink.write(1, embedded([row(9, "late")]))
    sink.close()


def test_a_server_that_restarts_does_not_end_a_job(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("chroma")), "run", "--path", str(tmp_path), "--port", str(port)]
    url = f"chroma://127.0.0.1:{port}/docs"
    servers: list[subprocess.Popen[bytes]] = []

    def restart() -> None:
        for server in servers:
            server.kill()
            server.wait()
        servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        restart()
        wait_for(port)
        store, name = open_url(url)
        with closing(store.sink(name, SinkOptions())) as sink:
            sink.open(NOTE)
            for number in range(3):
                restart()  # and the server is not up yet
                sink.write(number, embedded([row(2 * number, "a"), row(2 * number + 1, "b")]))
        with closing(store.source(name, FieldNames())) as source:
            reading = source.read()
            first = next(reading)
            restart()
            assert [getattr(found, "id", None) for found in (first, *reading)] == list(range(6))
    finally:
        for server in servers:
            server.kill()
            server.wait()


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_wrong_or_missing_is_named_and_not_printed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rejecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b'{"error": "AuthError", "message": "Forbidden"}'
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Rejecting) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"chroma://127.0.0.1:{server.server_address[1]}/docs"
        try:
            monkeypatch.delenv("CHROMA_AUTH_TOKEN", raising=False)
            with pytest.raises(BulkError, match="needs a key: set the environment variable CHROMA_AUTH_TOKEN, or name"):
                read(url)
            monkeypatch.setenv("MINE", "hunter2")
            with pytest.raises(BulkError, match="rejects the key in the environment variable MINE") as caught:
                read(f"{url}?key_env=MINE")
            assert "hunter2" not in str(caught.value)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [500, 502])
def test_an_error_of_a_proxy_is_waited_for_and_then_named(
    status: int, chroma_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chroma's client has no separate class for a response that is not JSON."""
    monkeypatch.setattr("gateway.bulk.stores.patience._FIRST_PAUSE_S", 0.01)
    place = read_place(f"chroma:{chroma_folder}#docs")
    assert place is not None
    connection = Connection(place, is_source=False)
    request = httpx.Request("GET", "http://chroma")
    responses = [httpx.Response(status, html="<p>Bad gateway", request=request)] * 2 + [
        httpx.Response(200, request=request)
    ]
    assert connection.call(lambda: BaseHTTPClient._raise_chroma_error(responses.pop(0)), "docs") is None
    monkeypatch.setattr("gateway.bulk.stores.chroma_connection.PATIENCE_S", 0.0)
    responses = [httpx.Response(status, html="<p>Bad gateway", request=request)]
    with pytest.raises(BulkError, match="docs has gone away: <p>Bad gateway; run the same command again"):
        connection.call(lambda: BaseHTTPClient._raise_chroma_error(responses[0]), "docs")
    connection.close()


def wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end
        time.sleep(0.05)
