"""A Milvus server that stops responding between two requests: each request has a limit, and the store works again later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError
from gateway.bulk.stores import milvus, milvus_collections, milvus_rows
from gateway.bulk.stores.protocol import MovableStore
from tests.bulk.stores.rows import row, write
from tests.listener import make_listener

# Each goes as far as the request that has no limit by default.
REQUESTS: dict[str, Callable[[MovableStore], object]] = {
    "describe": lambda store: store.describe("docs"),
    "search": lambda store: store.search("docs", np.ones(4, np.float32), 1),
    "read_ids": lambda store: list(store.read_ids("docs", [1], FieldNames(text="text"))),
    "aliases": lambda store: store.aliases(),
    "delete_ids": lambda store: store.delete_ids("docs", [9]),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The URL and the process of a server."""
    with make_listener() as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-u", "-m", "milvus_lite", "server", "--data-dir", str(tmp_path / "m")]
    with subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b"listening" in process.stdout.readline()
        yield f"milvus://127.0.0.1:{port}", process.pid
        os.kill(process.pid, signal.SIGCONT)
        process.kill()


def test_a_server_that_freezes_ends_each_request(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    url, pid = server
    write(f"{url}/docs", [row(1, "a")])
    for module in (milvus, milvus_collections, milvus_rows):
        monkeypatch.setattr(module, "TIMEOUT_S", 0.5)
    place = read_place(url, has_collection=False)
    assert place is not None
    with closing(open_movable(place)) as store:
        for request in REQUESTS.values():
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(BulkError, match=r"milvus://127\.0\.0\.1:\d+") as caught:
                request(store)
            assert "RpcError" not in str(caught.value)
            os.kill(pid, signal.SIGCONT)
        monkeypatch.undo()
        assert store.describe("docs").count == 1


@pytest.mark.parametrize("call", ["list_indexes", "describe_index"])
def test_the_requests_about_indexes_have_a_limit_too(
    server: tuple[str, int], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server freezes right before the request."""
    url, pid = server
    write(f"{url}/docs", [row(1, "a")])
    for module in (milvus, milvus_collections, milvus_rows):
        monkeypatch.setattr(module, "TIMEOUT_S", 0.5)
    place = read_place(url, has_collection=False)
    assert place is not None
    real = getattr(milvus.MilvusClient, call)

    def freeze(*values: object, **named: object) -> object:
        os.kill(pid, signal.SIGSTOP)
        return real(*values, **named)

    monkeypatch.setattr(milvus.MilvusClient, call, freeze)
    with closing(open_movable(place)) as store:
        with pytest.raises(BulkError, match=r"milvus://127\.0\.0\.1:\d+.* has gone away: Deadline Exceeded"):
            store.search("docs", np.ones(4, np.float32), 1)
        os.kill(pid, signal.SIGCONT)
