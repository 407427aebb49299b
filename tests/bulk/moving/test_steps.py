"""A move from the first step to the last, in real stores, while applications write."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import uuid
from contextlib import closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import psycopg
import pytest
from rich.console import Console

from gateway.bulk.moving.command import next_command
from gateway.bulk.moving.mem0 import change_mem0, present_settings, read_mem0, restore_mem0
from gateway.bulk.moving.planning import real_name
from gateway.bulk.moving.state import Stage, find_move, lock_move, read_moves
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.places import read_place
from gateway.bulk.rows import BulkError, EmbeddedRows, Row
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.moving.conftest import HashModel, Models, Shop, copy_of, request_for, vector_of


class _Killed(BaseException):
    """Ends a step immediately, like the death of its process."""


async def test_a_copy_has_all_items_with_the_vectors_of_the_new_model(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)

    copy = copy_of(shop, move)
    assert copy.content() == shop.content()
    copy.check_vectors()
    shop.check_vectors()
    assert move.stage is Stage.COPIED
    assert move.pairs[0].new == f"{shop.collection}_new_000000000new"
    assert read_moves(tmp_path)[move.name] == move
    assert len(models.texts) == 50


async def test_later_passes_take_over_additions_changes_and_deletions_only(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(any_shop), tmp_path, console)
    models.texts.clear()
    any_shop.put({100: "word1 added", 3: "word3 changed"})
    any_shop.put({4: "word4 text 4"}, {"tag": "only the payload changed"})
    any_shop.delete(7, 8)

    await sync(move, tmp_path, console, skips=False)

    copy = copy_of(any_shop, move)
    assert copy.content() == any_shop.content()
    copy.check_vectors()
    assert sorted(models.texts) == ["word1 added", "word3 changed", "word4 text 4"]


async def test_the_check_finds_a_good_copy_ready_and_says_how_much_results_change(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)

    move, [report] = await check(move, tmp_path, console, None, None)

    assert move.stage is Stage.CHECKED
    assert report.problems() == []
    assert (report.first, report.second, report.num_vectors) == (50, 50, 50)
    assert report.agreement is not None
    assert report.agreement.num_queries == 50
    assert 0.5 < report.agreement.overlap < 1, "both models put texts with the same first word together"
    assert "50 sampled items as queries: overlap@10 0." in " ".join(report.sentences())


async def test_the_check_finds_vectors_of_another_model_of_the_same_width_and_foreign_items(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop, model="twin"), tmp_path, console)
    copy = copy_of(shop, move, "twin")
    content = copy.content()
    rows = [Row(row_id, text, payload, "", None) for row_id, (text, payload) in list(content.items())[:20]]
    with closing(copy.store.sink(copy.collection, SinkOptions("text"))) as sink:
        sink.open(HashModel("twin", lambda _texts: None).note)
        sink.write(0, EmbeddedRows(rows, np.stack([vector_of("old", row.text) for row in rows])))
    copy.put({1000: "word9 foreign"})

    move, [report] = await check(move, tmp_path, console, None, None)

    assert move.stage is Stage.COPIED
    foreign, mixed = report.problems()
    assert "has 1 item that the move did not write, such as 1000" in foreign
    assert "20 of 51 sampled items have vectors that differ from the model's vectors of their texts" in mixed
    with pytest.raises(BulkError, match=r"run `gateway move check` first, or add --force"):
        await flip(move, tmp_path, console, forces=False)
    assert 1000 in copy.content(), "an item that the move did not write is not deleted"


async def test_captured_queries_are_embedded_with_both_models(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"_id": "1", "text": "word1 what?"}\n{"_id": "2", "text": "word2 who?"}\n')

    _move, [report] = await check(move, tmp_path, console, queries, None)

    assert sorted(models.texts[-4:]) == ["word1 what?", "word1 what?", "word2 who?", "word2 who?"]
    assert report.agreement is not None
    assert report.agreement.num_queries == 2
    assert "2 captured queries" in " ".join(report.sentences())


async def test_flip_late_writes_back_and_finish(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """Applications find the collection by an alias, where the store has one; some of them are slow to switch."""
    alias = f"alias_{uuid.uuid4().hex[:8]}"
    any_shop.store.flip(alias, any_shop.collection)
    move = await start(request_for(any_shop, collection=alias), tmp_path, console)
    assert (move.alias, move.pairs[0].old) == (alias, any_shop.collection)
    move, _reports = await check(move, tmp_path, console, None, None)

    move = await flip(move, tmp_path, console, forces=False)
    assert any_shop.store.aliases()[alias] == move.pairs[0].new
    assert move.stage is Stage.FLIPPED

    copy = copy_of(any_shop, move)
    copy.put({1: "word1 new writer", 200: "word2 new writer"})  # applications that have switched
    copy.delete(2)
    any_shop.put({1: "word1 old writer", 3: "word3 old writer", 201: "word1 old writer"})  # and those that have not
    any_shop.delete(4)
    move = await sync(move, tmp_path, console, skips=False)
    content = {row_id: text for row_id, (text, _payload) in copy.content().items()}
    assert content[1] == "word1 new writer", "the new collection's own version wins"
    assert (content[3], content[201]) == ("word3 old writer", "word1 old writer")
    assert content[200] == "word2 new writer"
    assert not {2, 4} & content.keys()
    copy.check_vectors()

    move = await back(move, tmp_path, console, "old")
    assert any_shop.store.aliases()[alias] == any_shop.collection
    found = {row_id: text for row_id, (text, _payload) in any_shop.content().items()}
    assert found[200] == "word2 new writer", "an item that was written into the new collection is in the old one"
    assert 2 not in found
    any_shop.check_vectors()

    move, _reports = await check(move, tmp_path, console, None, None)
    move = await flip(move, tmp_path, console, forces=True)
    move = await finish(move, tmp_path, console, deletes=True)
    assert move.stage is Stage.FINISHED
    assert any_shop.collection not in any_shop.store.collections()
    with pytest.raises(BulkError, match="no move is under way"):
        find_move(tmp_path, None)


@pytest.mark.parametrize("seed", range(2))
async def test_a_move_that_is_killed_at_any_moment_continues(
    shop: Shop, models: Models, tmp_path: Path, console: Console, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bulk.moving.passes._SHARD_ROWS", 8)
    chance = random.Random(seed)

    def die(_texts: object) -> None:
        if chance.random() < 0.3:
            raise _Killed

    models.on_call = die
    for _attempt in range(60):
        with suppress(_Killed):
            await start(request_for(shop), tmp_path, console)
            break
        shop.put({chance.randrange(60): f"word{chance.randrange(5)} changed {chance.random()}"})
        shop.delete(chance.randrange(60))
    models.on_call = lambda _texts: None
    move = await start(request_for(shop), tmp_path, console)

    copy = copy_of(shop, move)
    assert copy.content() == shop.content()
    copy.check_vectors()


async def test_items_without_a_text_are_named_and_stay_only_on_the_users_word(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    rows = [Row(900, "word1 x", {"n": 1}, "", None)]
    with closing(shop.store.sink(shop.collection, SinkOptions("title"))) as sink:
        sink.open(HashModel("old", lambda _texts: None).note)
        sink.write(0, EmbeddedRows(rows, np.stack([vector_of("old", "word1 x")])))

    with pytest.raises(
        BulkError, match=r"1 item cannot be copied, such as 900: .*If the text is in another field than"
    ):
        await start(request_for(shop), tmp_path, console)
    move = find_move(tmp_path, None)
    assert move.stage is Stage.COPYING
    move = await sync(move, tmp_path, console, skips=True)
    move, [report] = await check(move, tmp_path, console, None, None)
    assert move.stage is Stage.CHECKED
    assert (report.first, report.second, report.counts.refused) == (51, 50, 1)
    assert "900" in (tmp_path / move.name / "ledger.not_copied.jsonl").read_text()


async def test_a_move_that_is_impossible_gives_the_reason(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    with pytest.raises(BulkError, match="no such model"):
        await start(request_for(shop, model="unknown"), tmp_path, console)
    with pytest.raises(BulkError, match=r"already has vectors of old@\S+: there is nothing to move"):
        await start(request_for(shop, model="old"), tmp_path, console)
    with pytest.raises(BulkError, match=r"does not exist|there is no|has no"):
        await start(request_for(shop, collection="gone"), tmp_path, console)
    other = Shop(shop.url, f"{shop.collection}_other", "twin")
    other.put({1: "word1 x"})
    with pytest.raises(BulkError, match=r"has vectors of twin@|has vectors of width 8"):
        await start(request_for(shop, into=other.collection), tmp_path, console)
    with pytest.raises(BulkError, match="is the old collection itself"):
        await start(request_for(shop, into=shop.collection), tmp_path, console)
    other.close()
    with pytest.raises(BulkError, match="no store was named"):
        await start(request_for(shop, store=None), tmp_path, console)
    move = await start(request_for(shop), tmp_path, console)
    with pytest.raises(BulkError, match=r"a move of .* to new is already in progress"):
        await start(request_for(shop, model="twin"), tmp_path, console)
    with pytest.raises(BulkError, match="there is nothing to undo"):
        await back(move, tmp_path, console, None)
    with pytest.raises(BulkError, match=r"run `gateway move flip` first"):
        await finish(move, tmp_path, console, deletes=True)


async def test_old_vectors_of_another_model_are_not_written_by_the_way_back(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    with pytest.raises(BulkError, match="have vectors that differ from those of twin, so nothing was written"):
        await back(move, tmp_path, console, "twin")
    shop.check_vectors()


async def test_the_way_back_can_be_interrupted_and_repeated(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    copy = copy_of(shop, move)
    copy.put({200: "word2 written by an application"})

    def die(_texts: object) -> None:
        raise _Killed

    models.on_call = die
    with pytest.raises(_Killed):
        await back(move, tmp_path, console, "old")
    models.on_call = lambda _texts: None
    with pytest.raises(BulkError, match=r"lacks items that applications wrote .* run `gateway move back "):
        await check(move, tmp_path, console, None, None)
    await sync(move, tmp_path, console, skips=False)
    assert 200 in copy.content()
    assert next_command(find_move(tmp_path, None)) == f"gateway move back {move.name}"

    move = await back(move, tmp_path, console, "old")

    assert shop.content()[200] == copy.content()[200]
    shop.check_vectors()
    with pytest.raises(BulkError, match="there is nothing to undo"):
        await back(move, tmp_path, console, "old")
    _move, [report] = await check(move, tmp_path, console, None, None)
    assert report.problems() == []


async def test_the_way_back_without_a_known_model_waits_for_its_name(
    shop: Shop, models: Models, postgres: str, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    with psycopg.connect(postgres, autocommit=True) as sql:
        sql.execute(f"COMMENT ON COLUMN {shop.collection}.embedding IS NULL".encode())
    move = await flip(move, tmp_path, console, forces=True)
    copy_of(shop, move).put({200: "word2 written by an application"})
    with pytest.raises(BulkError, match="name the model with `gateway move back --from-model NAME`"):
        await back(move, tmp_path, console, None)

    state = tmp_path / move.name / "move.json"
    waiting = state.read_bytes()
    lacking = await finish(move, tmp_path, console, deletes=False)
    assert lacking.log[-1].endswith(f"the old collection was kept; it lacks items that are only in {move.pairs[0].new}")
    state.write_bytes(waiting)
    await back(move, tmp_path, console, "old")

    assert 200 in shop.content()
    shop.check_vectors()


async def test_a_finished_move_has_no_further_steps(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    before = move
    await finish(move, tmp_path, console, deletes=True)

    for step in (
        sync(before, tmp_path, console, skips=False),
        check(before, tmp_path, console, None, None),
        flip(before, tmp_path, console, forces=True),
        back(before, tmp_path, console, "old"),
        finish(before, tmp_path, console, deletes=True),
    ):
        with pytest.raises(BulkError, match=f"the move {move.name} is finished"):
            await step


async def test_another_move_of_a_collection_copies_all_of_its_items(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """The files of the first move describe writes to another collection."""
    move = await start(request_for(any_shop, changed_at="changed_at"), tmp_path, console)
    await finish(move, tmp_path, console, deletes=False)

    second = await start(request_for(any_shop, model="twin", changed_at="changed_at"), tmp_path, console)

    assert second.pairs[0].new != move.pairs[0].new
    copy = copy_of(any_shop, second, "twin")
    assert copy.content() == any_shop.content()
    copy.check_vectors()


async def test_the_same_move_again_keeps_what_applications_did_in_the_new_collection(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    copy = copy_of(shop, move)
    copy.put({1: "word1 written by an application", 200: "word2 too"})
    copy.delete(2)
    await finish(move, tmp_path, console, deletes=False)
    before = copy.content()

    again = await start(request_for(shop), tmp_path, console)
    await check(again, tmp_path, console, None, None)

    assert copy.content() == before


async def test_an_interrupted_flip_is_repeated(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = f"alias_{uuid.uuid4().hex[:8]}"
    any_shop.store.flip(alias, any_shop.collection)
    move = await start(request_for(any_shop, collection=alias), tmp_path, console)

    def die(*_values: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(any_shop.store), "flip", die)
        with pytest.raises(_Killed):
            await flip(move, tmp_path, console, forces=True)
    assert any_shop.store.aliases()[alias] == any_shop.collection

    await flip(move, tmp_path, console, forces=False)

    assert any_shop.store.aliases()[alias] == move.pairs[0].new
    with pytest.raises(BulkError, match="applications already use the new collection"):
        await flip(move, tmp_path, console, forces=False)


def mem0_on(pgvector: str, path: Path) -> tuple[Shop, dict[str, Any]]:
    """Return a collection of Mem0's, and the configuration that names it, which is written to ``path``."""
    shop = Shop(f"{pgvector}?vector=vector", f"mem_{uuid.uuid4().hex[:8]}")
    for number in range(3):
        shop.put({number: f"word{number} text"}, {"data": f"word{number} text"})
    place = read_place(pgvector, has_collection=False)
    assert place is not None
    database = {"host": unquote(place.host), "user": "postgres", "dbname": "postgres"}
    config = {
        "vector_store": {"provider": "pgvector", "config": {**database, "collection_name": shop.collection}},
        "embedder": {"provider": "openai", "config": {"model": "old", "openai_base_url": "http://127.0.0.1:1/v1"}},
    }
    path.write_text(json.dumps(config))
    return shop, config


async def test_the_collection_that_mem0_still_names_is_not_deleted(
    pgvector: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flip was killed before it changed the file, or the file was restored."""
    path, moves = tmp_path / "mem0.json", tmp_path / "moves"
    shop, _config = mem0_on(pgvector, path)
    before = path.read_text()
    move = await start(request_for(shop, collection=None, store=None, mem0=path), moves, console)

    def die(*_values: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr("gateway.bulk.moving.redirecting.change_mem0", die)
        with pytest.raises(_Killed):
            await flip(move, moves, console, forces=True)
    with pytest.raises(BulkError, match="applications use the old collection: run `gateway move flip` first"):
        await finish(move, moves, console, deletes=True)
    await flip(move, moves, console, forces=True)
    flipped = path.read_text()
    path.write_text(before)
    with pytest.raises(BulkError, match="run `gateway move flip` first"):
        await finish(move, moves, console, deletes=True)
    assert shop.collection in shop.store.collections()
    path.write_text(flipped)

    await finish(move, moves, console, deletes=True)

    assert shop.collection not in shop.store.collections()


async def test_an_alias_stays_if_mem0s_file_cannot_be_changed(
    pgvector: str, models: Models, tmp_path: Path, console: Console
) -> None:
    """Otherwise Mem0 would search the new collection with vectors of the old model."""
    path, moves, alias = tmp_path / "mem0.json", tmp_path / "moves", f"alias_{uuid.uuid4().hex[:8]}"
    shop, config = mem0_on(pgvector, path)
    shop.store.flip(alias, shop.collection)
    path.write_text(json.dumps(config | {"embedder": {"provider": "huggingface", "config": {"model": "old"}}}))
    request = request_for(shop, collection=None, store=None, mem0=path, alias=alias)
    move = await start(request, moves, console)

    with pytest.raises(BulkError, match="pass its URL with --url"):
        await flip(move, moves, console, forces=True)

    assert real_name(shop.store, alias) == shop.collection
    shop.store.delete_alias(alias)


async def test_a_flip_of_mem0_that_is_killed_after_its_file_was_changed_can_be_undone(
    pgvector: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mem0.json"
    shop, config = mem0_on(pgvector, path)
    move = await start(request_for(shop, collection=None, store=None, mem0=path), tmp_path / "moves", console)

    def change_and_die(*values: Any) -> None:
        change_mem0(*values)
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr("gateway.bulk.moving.redirecting.change_mem0", change_and_die)
        with pytest.raises(_Killed):
            await flip(move, tmp_path / "moves", console, forces=True)
    assert read_mem0(path).collection == move.pairs[0].new
    assert (await flip(move, tmp_path / "moves", console, forces=True)).stage is Stage.FLIPPED

    await back(move, tmp_path / "moves", console, "old")

    assert json.loads(path.read_text()) == config


@pytest.mark.parametrize("embedder", [{"provider": "openai", "config": {"model": "old"}}, {"config": None}, None])
async def test_the_way_back_restores_a_configuration_that_named_no_gateway(
    embedder: dict[str, Any] | None, pgvector: str, models: Models, tmp_path: Path, console: Console
) -> None:
    """A key for the gateway that stayed there would be sent to OpenAI, instead of the one in OPENAI_API_KEY."""
    path, moves = tmp_path / "mem0.json", tmp_path / "moves"
    shop, config = mem0_on(pgvector, path)
    path.write_text(json.dumps(config | {"embedder": embedder}))
    request = request_for(shop, collection=None, store=None, mem0=path, url="http://127.0.0.1:1")
    move = await start(request, moves, console)
    await flip(move, moves, console, forces=True)
    flipped = json.loads(path.read_text())["embedder"]["config"]
    assert flipped["openai_base_url"] == "http://127.0.0.1:1/v1"
    assert flipped["api_key"]

    await back(move, moves, console, "old")

    restored = json.loads(path.read_text())["embedder"]
    assert restored.pop("config") == ((embedder or {}).get("config") or {})
    assert restored == ({"provider": "openai"} if embedder and "provider" in embedder else {})


class _Models(BaseHTTPRequestHandler):
    """An API with one model, which wants no key."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v1/models/here" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_values: object) -> None:
        pass


@pytest.mark.parametrize(("model", "is_kept"), [("here", True), ("not-here", False)])
def test_mem0_keeps_its_server_if_that_has_the_model(model: str, *, is_kept: bool, tmp_path: Path) -> None:
    """It may be the gateway by another name, or a server that Mem0 has used until now."""
    path = tmp_path / "mem0.json"
    with ThreadingHTTPServer(("127.0.0.1", 0), _Models) as server:
        Thread(target=server.serve_forever).start()
        own = f"http://127.0.0.1:{server.server_port}/v1"
        path.write_text(json.dumps({"embedder": {"provider": "openai", "config": {"openai_base_url": own}}}))
        change_mem0(path, "new", model, 3, "http://127.0.0.1:1/")
        server.shutdown()

    url = json.loads(path.read_text())["embedder"]["config"]["openai_base_url"]
    assert url == (own if is_kept else "http://127.0.0.1:1/v1")


@pytest.mark.parametrize("settings", [{}, {"api_key": "any"}, {"api_key": "sk-1"}])
def test_the_way_back_restores_mem0s_key_and_server(settings: dict[str, str], tmp_path: Path) -> None:
    """The server was replaced, because it did not have the model."""
    path = tmp_path / "mem0.json"
    with ThreadingHTTPServer(("127.0.0.1", 0), _Models) as server:
        Thread(target=server.serve_forever).start()
        own = f"http://127.0.0.1:{server.server_port}/v1"
        content = {
            "vector_store": {"config": {"collection_name": "old", "embedding_model_dims": 3}},
            "embedder": {"provider": "openai", "config": {"openai_base_url": own, "model": "old", **settings}},
        }
        path.write_text(json.dumps(content))
        before = present_settings(path)
        change_mem0(path, "new", "not-here", 4, "http://127.0.0.1:1")
        server.shutdown()
    changed = json.loads(path.read_text())["embedder"]["config"]
    assert changed["openai_base_url"] != own
    assert changed["api_key"] == settings.get("api_key", "any")

    restore_mem0(path, before)

    assert json.loads(path.read_text()) == content


def test_mem0_keeps_a_server_with_a_name_that_is_unknown_here(tmp_path: Path) -> None:
    """In the network of the containers, for example."""
    path = tmp_path / "mem0.json"
    own = "http://gateway.invalid:8000/v1"
    path.write_text(json.dumps({"embedder": {"provider": "openai", "config": {"openai_base_url": own}}}))

    change_mem0(path, "new", "bge-m3", 1024, "http://127.0.0.1:1")

    assert json.loads(path.read_text())["embedder"]["config"]["openai_base_url"] == own


async def test_a_relative_path_of_mem0_is_the_same_folder_in_each_step(
    models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cron, for example, runs the steps in another folder."""
    application, moves = tmp_path / "application", tmp_path / "moves"
    application.mkdir()
    monkeypatch.chdir(application)
    with closing(Shop("qdrant:./store", "mem")) as shop:
        shop.put({1: "word1 text"}, {"data": "word1 text"})
    path = application / "mem0.json"
    store = {"provider": "qdrant", "config": {"path": "store", "collection_name": "mem"}}
    embedder = {"provider": "openai", "config": {"model": "old", "openai_base_url": "http://127.0.0.1:1/v1"}}
    path.write_text(json.dumps({"vector_store": store, "embedder": embedder}))
    move = await start(request_for(shop, collection=None, store=None, mem0=Path("mem0.json")), moves, console)
    monkeypatch.chdir(tmp_path)

    await sync(move, moves, console, skips=False)
    await flip(move, moves, console, forces=True)
    assert read_mem0(path).collection == move.pairs[0].new
    await finish(move, moves, console, deletes=True)

    assert not (tmp_path / "store").exists()
    monkeypatch.chdir(application)
    with closing(Shop("qdrant:./store", move.pairs[0].new, "new")) as copy:
        assert copy.store.collections() == [move.pairs[0].new]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["100%25", "c#", "what?"])
async def test_a_folder_may_have_any_name(name: str, models: Models, tmp_path: Path, console: Console) -> None:
    with closing(Shop(f"qdrant:{quote(str(tmp_path / name))}", "docs")) as shop:
        shop.put({1: "word1 text"})
        move = await start(request_for(shop), tmp_path / "moves", console)
        await sync(move, tmp_path / "moves", console, skips=False)
    assert names_in(tmp_path) == {name, "moves"}


async def test_a_step_continues_from_the_state_that_another_process_has_written(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """A step reads the state first, and then loads the model, while another process may flip."""
    move = await start(request_for(shop), tmp_path, console)
    before = move
    await flip(move, tmp_path, console, forces=True)

    move = await sync(before, tmp_path, console, skips=False)

    assert (move.stage, move.was_flipped) == (Stage.FLIPPED, True)
    assert read_moves(tmp_path)[move.name] == move


async def test_one_process_at_a_time_works_on_a_move(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    with lock_move(tmp_path, move.name):
        for step in (
            start(request_for(shop), tmp_path, console),
            sync(move, tmp_path, console, skips=False),
            flip(move, tmp_path, console, forces=True),
            finish(move, tmp_path, console, deletes=False),
        ):
            with pytest.raises(
                BulkError, match=f"another process works on the move {move.name}; wait for it, or end it"
            ):
                await step
    assert read_moves(tmp_path)[move.name].stage is Stage.COPIED


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_file: object, _kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    named = r"the move cannot be locked: .*/docs/lock: No locks available"
    with pytest.raises(BulkError, match=named), lock_move(tmp_path, "docs"):
        pass


async def test_a_model_whose_space_has_changed_since_is_refused(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await start(request_for(shop), tmp_path, console)
    shop.put({100: "word1 added"})
    note = HashModel("new", lambda _texts: None).note
    monkeypatch.setattr(HashModel, "note_of", {"new": replace(note, space="new@0123456789ab")})
    changed = (
        r"new is now in the space new@0123456789ab, but the vectors of this move are of new@000000000new\. Restore"
    )

    for step in (
        start(request_for(shop), tmp_path, console),
        sync(move, tmp_path, console, skips=False),
        flip(move, tmp_path, console, forces=True),
    ):
        with pytest.raises(BulkError, match=changed):
            await step
    assert 100 not in copy_of(shop, move).content()


async def test_a_move_while_an_application_writes_ends_with_the_same_content(
    pgvector: str, postgres: str, models: Models, tmp_path: Path, console: Console
) -> None:
    """Additions, changes and deletions in another connection, all the time; a reader of the view never sees a mixture."""
    shop = Shop(pgvector, f"live_{uuid.uuid4().hex[:8]}")
    shop.put({n: f"word{n % 5} text {n}" for n in range(300)})
    view = f"{shop.collection}_view"
    shop.store.flip(view, shop.collection)
    ends = Event()
    failures: list[BaseException] = []
    widths: set[tuple[int, ...]] = set()

    def write() -> None:
        chance = random.Random(1)
        try:
            with psycopg.connect(postgres, autocommit=True) as sql:
                writer = Shop(pgvector, shop.collection)
                while not ends.is_set():
                    number = chance.randrange(400)
                    if chance.random() < 0.3:
                        sql.execute(f"DELETE FROM {shop.collection} WHERE id = {number}".encode())  # noqa: S608
                    else:
                        writer.put({number: f"word{number % 5} written {chance.random()}"})
                    ends.wait(0.01)
                writer.close()
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        try:
            with psycopg.connect(postgres, autocommit=True) as sql:
                while not ends.is_set():
                    query = f"SELECT DISTINCT vector_dims(embedding) FROM {view}"  # noqa: S608
                    widths.add(tuple(width for (width,) in sql.execute(query.encode())))
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=write), Thread(target=read), Thread(target=read)]
    for thread in threads:
        thread.start()
    move = await start(request_for(shop, collection=view), tmp_path, console)
    move, _reports = await check(move, tmp_path, console, None, None)
    move = await flip(move, tmp_path, console, forces=True)
    await asyncio.to_thread(ends.wait, 0.05)
    ends.set()
    for thread in threads:
        thread.join()
    await sync(move, tmp_path, console, skips=False)

    assert not failures
    assert widths == {(8,), (12,)}
    copy = copy_of(shop, move)
    assert copy.content() == shop.content()
    copy.check_vectors()


@pytest.mark.parametrize("is_patient", [True, False])
async def test_the_move_waits_for_a_store_that_goes_away_midway_and_continues_later(
    pgvector: str,
    postgres: str,
    is_patient: bool,
    models: Models,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop = Shop(pgvector, f"away_{uuid.uuid4().hex[:8]}")
    shop.put({n: f"word{n % 5} text {n}" for n in range(60)})
    calls = 0

    def cut_off(_texts: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            with psycopg.connect(postgres, autocommit=True) as sql:
                sql.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE application_name = 'embedding-gateway'"
                )

    models.on_call = cut_off
    if not is_patient:
        monkeypatch.setattr("gateway.bulk.stores.pgvector_session.PATIENCE_S", 0.0)
        with pytest.raises(BulkError, match="cannot be reached, or has gone away"):
            await start(request_for(shop), tmp_path, console)
    move = await start(request_for(shop), tmp_path, console)
    shop.close()
    again = Shop(pgvector, shop.collection)
    copy = copy_of(again, move)
    assert copy.content() == again.content()


async def test_a_new_collection_that_was_deleted_is_copied_again(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    request = request_for(any_shop, changed_at="changed_at")
    move = await start(request, tmp_path, console)
    any_shop.store.delete_collection(move.pairs[0].new)
    any_shop.close()

    move = await start(request, tmp_path, console)

    copy = copy_of(any_shop, move)
    assert len(copy.content()) == 50
    copy.check_vectors()
