"""An application that writes an item of the new collection while a pass writes the same item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from gateway.bulk.moving import writing
from gateway.bulk.moving.state import Move
from gateway.bulk.moving.steps import flip, start, sync
from gateway.bulk.rows import RowId
from gateway.bulk.stores import pgvector_rows, pgvector_sink
from gateway.bulk.stores.pgvector_tables import Connection, Table
from tests.bulk.moving.conftest import Models, Shop, copy_of, request_for


async def flipped(shop: Shop, folder: Path, console: Console) -> tuple[Move, Shop]:
    move = await start(request_for(shop), folder, console)
    move = await flip(move, folder, console, forces=True)
    return move, copy_of(shop, move)


@pytest.mark.parametrize("what", ["rows", "deletions"])
async def test_a_pass_looks_at_the_items_again_before_each_small_write(
    any_shop: Shop, what: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, copy = await flipped(any_shop, tmp_path, console)
    if what == "rows":
        any_shop.put({n: f"word{n % 5} by an old replica" for n in range(40)})
    else:
        any_shop.delete(*range(20))
    monkeypatch.setattr(writing, "_GUARDED_ROWS", 8)
    record, forget = writing.Ledger.record, writing.Ledger.forget
    done: list[object] = []

    def then_write(ids: Sequence[RowId]) -> None:
        """Write the last item of the shard, after its first items were written."""
        if 0 in ids and not done:
            done.append(ids)
            copy.put({39 if what == "rows" else 19: "word4 by a new replica"})

    def recorded(ledger: writing.Ledger, digests: Any) -> None:
        record(ledger, digests)
        then_write(list(digests))

    def forgotten(ledger: writing.Ledger, ids: Any) -> None:
        forget(ledger, ids)
        then_write(list(ids))

    monkeypatch.setattr(writing.Ledger, "record", recorded)
    monkeypatch.setattr(writing.Ledger, "forget", forgotten)

    await sync(move, tmp_path, console, skips=False)

    assert done
    content = copy.content()
    if what == "rows":
        assert content[39][0] == "word4 by a new replica"
        assert [content[n][0] for n in range(39)] == [f"word{n % 5} by an old replica" for n in range(39)]
    else:
        assert set(content) == {*range(19, 50)}
        assert content[19][0] == "word4 by a new replica"
    copy.check_vectors()


@pytest.mark.parametrize("what", ["rows", "deletions"])
async def test_in_postgresql_nothing_comes_between_the_look_and_the_write(
    shop: Shop, what: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
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
        return found

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
