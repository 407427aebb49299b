"""Other people at work in the store of a move: collections that are created again, aliases that are redirected."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import psycopg
import pytest
from rich.console import Console

from gateway.bulk.moving import steps
from gateway.bulk.moving.ledger import Ledger
from gateway.bulk.moving.state import Move, Stage, read_moves, write_move
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.rows import BulkError, EmbeddedRows, Row
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.moving.conftest import HashModel, Models, Shop, closing_shop, copy_of, request_for, vector_of


class _Killed(BaseException):
    """Ends a step at once, as the death of its process would."""


def connect(shop: Shop) -> psycopg.Connection[tuple[Any, ...]]:
    socket = unquote(shop.url.split("@")[1].split("/")[0])
    return psycopg.connect(f"host={socket} user=postgres dbname=postgres", autocommit=True)


def create_again(shop: Shop) -> None:
    """Delete a collection, and let an application create it with two items, as many do when they start."""
    shop.store.delete_collection(shop.collection)
    shop.put({1: "word1 after a restart", 1000: "word2 after a restart"})


# ------------------------------------------------------------------------------------- a collection is created again


@pytest.mark.parametrize("step", ["sync", "finish"])
async def test_an_old_collection_that_was_created_again_does_not_empty_the_new_one(
    any_shop: Shop, step: str, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(any_shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    create_again(any_shop)

    with pytest.raises(
        BulkError, match=r"lacks 49 of the 50 items .* Nothing was deleted, in case docs_\S+ was emptied"
    ):
        await (
            sync(move, tmp_path, console, skips=False)
            if step == "sync"
            else finish(move, tmp_path, console, deletes=True)
        )

    assert set(copy_of(any_shop, move).content()) == {*range(50), 1000}
    assert any_shop.collection in any_shop.store.collections()


async def test_a_new_collection_that_was_created_again_does_not_empty_the_old_one(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(any_shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    create_again(copy_of(any_shop, move))

    try:
        await back(move, tmp_path, console, "old")
    except BulkError as error:  # where a collection has no identity besides its name
        assert "Nothing was deleted" in str(error)  # noqa: PT017

    assert set(any_shop.content()) == {*range(50), 1000}


async def test_few_deletions_of_applications_are_copied_after_the_flip(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(any_shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    any_shop.delete(*range(20))
    await sync(move, tmp_path, console, skips=False)
    assert set(copy_of(any_shop, move).content()) == set(range(20, 50))


async def test_a_new_collection_that_was_created_again_is_copied_again(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """Also where a pass reads only the changes since the last one."""
    move = await start(request_for(any_shop, changed_at="changed_at"), tmp_path, console)
    copy = copy_of(any_shop, move)
    copy.store.delete_collection(copy.collection)
    copy.put({1000: "word1 foreign"})
    copy.delete(1000)

    move = await sync(move, tmp_path, console, skips=False)

    assert copy_of(any_shop, move).content() == any_shop.content()


@pytest.mark.parametrize("into_vector", [None, "second"])
async def test_a_flipped_move_of_the_version_before_keeps_what_applications_deleted(
    any_shop: Shop, into_vector: str | None, models: Models, tmp_path: Path, console: Console
) -> None:
    """The ledger of that version does not have the identity of the collection."""
    if into_vector is not None and any_shop.url.startswith(("milvus", "qdrant")):
        pytest.skip("these items have one unnamed vector, or get no further ones")
    move = await start(request_for(any_shop, into_vector=into_vector), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    copy = copy_of(any_shop, move)
    copy.delete(3)
    path = tmp_path / move.name / move.pairs[0].ledger
    with closing(sqlite3.connect(path)) as ledger, ledger:
        target = json.dumps([move.pairs[0].new, move.new_vector])
        assert ledger.execute("UPDATE facts SET value = ? WHERE name = 'target'", (target,)).rowcount == 1
    models.texts.clear()

    await sync(move, tmp_path, console, skips=False)

    assert set(copy.content()) == {*range(50)} - {3}
    assert not models.texts


async def test_a_copy_without_its_note_is_refused(shop: Shop, models: Models, tmp_path: Path, console: Console) -> None:
    move = await start(request_for(shop), tmp_path, console)
    with connect(shop) as sql:
        sql.execute(f"COMMENT ON COLUMN {move.pairs[0].new}.embedding IS NULL".encode())
    for step in (
        sync(move, tmp_path, console, skips=False),
        check(move, tmp_path, console, None, None),
        flip(move, tmp_path, console, forces=True),
    ):
        with pytest.raises(BulkError, match="has 50 items and no note of their space"):
            await step


# ------------------------------------------------------------------------------------------------ the alias, the end


async def test_an_alias_that_someone_has_redirected_is_not_redirected_again(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    alias, third = f"alias_{uuid.uuid4().hex[:8]}", f"third_{uuid.uuid4().hex[:8]}"
    with closing(Shop(any_shop.url, third)) as other:
        other.put({1: "word1 third"})
    store = any_shop.store
    store.flip(alias, third)
    with pytest.raises(
        BulkError, match=f"the alias {alias} points to {third}, which is not part of this move: point it to"
    ):
        await start(request_for(any_shop, alias=alias), tmp_path, console)
    store.flip(alias, any_shop.collection)
    move = await start(request_for(any_shop, collection=alias), tmp_path, console)
    store.flip(alias, third)

    with pytest.raises(BulkError, match=f"points to {third}, which is not part of this move"):
        await flip(move, tmp_path, console, forces=True)
    assert store.aliases()[alias] == third
    assert read_moves(tmp_path)[move.name].stage is Stage.COPIED
    store.flip(alias, any_shop.collection)
    move = await flip(move, tmp_path, console, forces=True)
    store.flip(alias, third)
    with pytest.raises(BulkError, match=f"points to {third}, which is not part of this move"):
        await back(move, tmp_path, console, "old")
    assert store.aliases()[alias] == third
    store.delete_alias(alias)


async def test_a_flip_that_fails_leaves_the_move_as_it_was(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does it count as checked, nor is it forgotten that the old collection lacks items."""
    alias = f"alias_{uuid.uuid4().hex[:8]}"
    shop.store.flip(alias, shop.collection)
    move = await start(request_for(shop, collection=alias), tmp_path, console)

    def refuse(*_: object) -> None:
        raise BulkError("the store refuses")

    with monkeypatch.context() as patch:
        patch.setattr(type(shop.store), "flip", refuse)
        with pytest.raises(BulkError, match="the store refuses"):
            await flip(move, tmp_path, console, forces=True)
    with pytest.raises(BulkError, match="run `gateway move check` first"):
        await flip(move, tmp_path, console, forces=False)

    move = await flip(move, tmp_path, console, forces=True)
    with pytest.raises(BulkError, match="have vectors that differ"):
        await back(move, tmp_path, console, "twin")
    assert read_moves(tmp_path)[move.name].is_returning
    with monkeypatch.context() as patch:
        patch.setattr(type(shop.store), "flip", refuse)
        with pytest.raises(BulkError, match="the store refuses"):
            await flip(move, tmp_path, console, forces=True)
    assert read_moves(tmp_path)[move.name].is_returning
    shop.store.delete_alias(alias)


async def test_a_new_collection_that_was_deleted_after_the_flip_is_not_created_again(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(any_shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    [pair] = move.pairs
    any_shop.store.delete_collection(pair.new)

    for step in (
        lambda: sync(move, tmp_path, console, skips=False),
        lambda: finish(move, tmp_path, console, deletes=True),
    ):
        with pytest.raises(
            BulkError, match=r"which applications use since the flip, was deleted: `gateway move finish "
        ):
            await step()
        assert pair.new not in any_shop.store.collections()
    assert (await finish(move, tmp_path, console, deletes=False)).stage is Stage.FINISHED
    assert len(any_shop.content()) == 50


@pytest.mark.parametrize("way", ["sync", "back"])
async def test_what_an_application_writes_while_a_pass_embeds_is_kept(
    any_shop: Shop, way: str, models: Models, tmp_path: Path, console: Console
) -> None:
    """The pass read these items before, and would overwrite one and delete the other."""
    move = await start(request_for(any_shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    read, written = any_shop, copy_of(any_shop, move)
    if way == "back":
        read, written = written, read
    read.put({3: "word3 by one application", 100: "word1 added"})
    read.delete(7)

    def write(texts: object) -> None:
        if "word1 added" in texts:  # type: ignore[operator]  # not the check of the model
            models.on_call = lambda _texts: None
            written.put({3: "word3 by another one", 7: "word2 by another one"})

    models.on_call = write
    if way == "sync":
        await sync(move, tmp_path, console, skips=False)
    else:
        await back(move, tmp_path, console, "old")

    content = written.content()
    assert [content[n][0] for n in (3, 7, 100)] == ["word3 by another one", "word2 by another one", "word1 added"]
    written.check_vectors()
    assert "2 newer in" in console.file.getvalue()  # type: ignore[attr-defined]


async def test_an_end_that_is_killed_after_the_old_collection_was_deleted_is_repeated(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await start(request_for(any_shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)

    def die(folder: Path, move: Move) -> None:
        if move.stage is Stage.FINISHED:
            raise _Killed
        write_move(folder, move)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "write_move", die)
        with pytest.raises(_Killed):
            await finish(move, tmp_path, console, deletes=True)
    assert any_shop.collection not in any_shop.store.collections()

    move = await finish(move, tmp_path, console, deletes=True)

    assert move.stage is Stage.FINISHED
    assert move.log[-1].endswith(f"finished; deleted {any_shop.collection}")
    assert len(copy_of(any_shop, move).content()) == 50


# ------------------------------------------------------------------------------------------------ several vectors


@pytest.fixture(params=["pgvector", "qdrant"])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """A collection whose 50 items have a further vector, of the model ``twin``."""
    place = f"qdrant:{tmp_path / 'qdrant'}" if request.param == "qdrant" else request.getfixturevalue("pgvector")
    with closing_shop(f"{place}?vector=embedding") as found:
        rows = [Row(row_id, text, {}, "", None) for row_id, (text, _payload) in found.content().items()]
        with closing(found.store.sink(found.collection, SinkOptions("text", "extra", updates=True))) as sink:
            sink.open(HashModel("twin", lambda _texts: None).note)
            sink.write(0, EmbeddedRows(rows, np.stack([vector_of("twin", row.text) for row in rows])))
        yield found


def check_extra(shop: Shop, ids: list[int]) -> None:
    content = shop.content()
    vectors = shop.store.vectors(shop.collection, ids, "extra")
    assert set(vectors) == set(ids)
    for row_id, vector in vectors.items():
        np.testing.assert_allclose(vector, vector_of("twin", content[row_id][0]), atol=1e-5)


async def test_the_other_vectors_of_items_go_there_and_back(
    two: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(two), tmp_path, console)
    copy = copy_of(two, move)
    check_extra(copy, list(range(50)))
    move = await flip(move, tmp_path, console, forces=True)
    if two.url.startswith("qdrant"):
        copy.store._connection.client.set_payload(copy.collection, {"n": 2}, [7])  # type: ignore[attr-defined]
    else:
        with connect(two) as sql:
            sql.execute(f"UPDATE {copy.collection} SET payload = payload || '{{\"n\": 2}}' WHERE id = 7".encode())  # noqa: S608

    await back(move, tmp_path, console, "old")

    assert two.content()[7][1] == {"n": 2}
    check_extra(two, list(range(50)))


async def test_items_that_exchange_a_unique_value_between_passes_are_copied(
    pgvector: str, models: Models, tmp_path: Path, console: Console
) -> None:
    shop = Shop(pgvector, f"docs_{uuid.uuid4().hex[:12]}")
    with connect(shop) as sql:
        columns = "id bigint PRIMARY KEY, embedding vector(8), text text, n int, slug text UNIQUE"
        sql.execute(f"CREATE TABLE {shop.collection} ({columns})".encode())
        for number in range(30):
            shop.put({number: f"word1 {number}"}, {"slug": f"s{number}"})
        move = await start(request_for(shop), tmp_path, console)
        statements = [
            "UPDATE {} SET slug = NULL WHERE id = 1", "UPDATE {} SET slug = 's1' WHERE id = 2",
            "UPDATE {} SET slug = 's2' WHERE id = 1",
            "DELETE FROM {} WHERE id = 3", "UPDATE {} SET slug = 's3' WHERE id = 4",
        ]  # fmt: skip
        for statement in statements:
            sql.execute(statement.format(shop.collection).encode())

    move = await sync(move, tmp_path, console, skips=False)

    copy = copy_of(shop, move)
    assert copy.content() == shop.content()
    assert move.refused == 0
    copy.check_vectors()


# --------------------------------------------------------------------------------------------------- the move's own disk


def test_a_full_disk_is_named_and_the_ledger_can_be_used_again(tmp_path: Path) -> None:
    digests = {number: number.to_bytes(16) for number in range(5_000)}
    with closing(Ledger(tmp_path / "ledger.sqlite3", lambda row_id: (0, row_id))) as ledger:
        ledger.record({-1: bytes(16)})
        [[pages]] = ledger._db.execute("PRAGMA page_count")
        ledger._db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(
            BulkError, match=r"cannot be used: database or disk is full; make room, and run the same command"
        ):
            ledger.record(digests)
        assert len(list(ledger.bases())) == 1
        ledger._db.execute("PRAGMA max_page_count = 1000000")
        ledger.record(digests)
        assert len(list(ledger.bases())) == 5_001
