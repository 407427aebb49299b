"""An application that writes an item of the new collection while a pass writes the same item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import psycopg
import pytest
from rich.console import Console

from gateway.bulk.moving import writing
from gateway.bulk.moving.state import Move
from gateway.bulk.moving.steps import flip, start, sync
from gateway.bulk.rows import EmbeddedRows, RowId
from gateway.bulk.stores import pgvector_rows, pgvector_sink
from gateway.bulk.stores.milvus_rows import MilvusSink
from gateway.bulk.stores.pgvector_sink import PgvectorSink
from gateway.bulk.stores.pgvector_tables import Connection, Table
from gateway.bulk.stores.qdrant_sink import QdrantSink
from tests.bulk.moving.conftest import Models, Shop, copy_of, request_for

_SINKS: dict[str, Any] = {"pgvector": PgvectorSink, "qdrant": QdrantSink, "milvus": MilvusSink}


async def flipped(shop: Shop, folder: Path, console: Console) -> tuple[Move, Shop]:
    move = await start(request_for(shop), folder, console)
    move = await flip(move, folder, console, forces=True)
    return move, copy_of(shop, move)


async def test_a_pass_looks_at_the_items_again_before_each_small_write(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, copy = await flipped(any_shop, tmp_path, console)
    any_shop.put({n: f"word{n % 5} by an old replica" for n in range(40)})
    monkeypatch.setattr(writing, "_GUARDED_ROWS", 8)
    kind = _SINKS[any_shop.url.partition(":")[0]]
    name = "write_guarded" if hasattr(kind, "write_guarded") else "write"
    write = getattr(kind, name)
    done: list[int] = []

    def after_the_application(sink: object, shard: int, batch: EmbeddedRows, *guard: object) -> None:
        """Write the first rows after an application has written the last one."""
        if not done:
            done.append(shard)
            copy.put({39: "word4 by a new replica"})
        write(sink, shard, batch, *guard)

    monkeypatch.setattr(kind, name, after_the_application)

    await sync(move, tmp_path, console, skips=False)

    assert done
    content = copy.content()
    assert content[39][0] == "word4 by a new replica"
    assert [content[n][0] for n in range(39)] == [f"word{n % 5} by an old replica" for n in range(39)]
    copy.check_vectors()


@pytest.mark.parametrize("what", ["rows", "deletions"])
async def test_in_postgresql_nothing_comes_between_the_look_and_the_write(
    shop: Shop,
    postgres: str,
    what: str,
    models: Models,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An item that exists is locked until the pass has written; one that another program inserts is seen."""
    move, copy = await flipped(shop, tmp_path, console)
    if what == "rows":
        shop.put({3: "word3 by an old replica", 4: "word4 by an old replica", 100: "word1 by an old replica"})
    else:
        shop.delete(3, 4)
    waiting: list[Thread] = []
    look = pgvector_rows.locked_digests

    def then_write(connection: Connection, table: Table, ids: Sequence[RowId]) -> dict[RowId, bytes]:
        found = look(connection, table, ids)
        if not waiting:
            other = Shop(shop.url, copy.collection, "new")
            if what == "rows":
                other.put({100: "word2 by a new replica"})
            waiting.append(Thread(target=other.put, args=({3: "word1 by a new replica"},)))
            waiting[0].start()
            while waiting[0].is_alive() and not is_blocked():
                sleep(0.01)
        return found

    def is_blocked() -> bool:
        with psycopg.connect(postgres) as sql:
            return sql.execute("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted").fetchone() == (True,)

    monkeypatch.setattr(pgvector_sink, "locked_digests", then_write)
    monkeypatch.setattr(pgvector_rows, "locked_digests", then_write)

    await sync(move, tmp_path, console, skips=False)

    waiting[0].join()
    content = copy.content()
    assert content[3][0] == "word1 by a new replica"
    if what == "rows":
        assert content[100][0] == "word2 by a new replica"
        assert content[4][0] == "word4 by an old replica"
    else:
        assert 4 not in content
    copy.check_vectors()
    await sync(move, tmp_path, console, skips=False)
    assert copy.content() == content
