"""The request of a move: what is wrong with it is found before anything is embedded or written."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import uuid
from contextlib import AbstractContextManager, closing
from pathlib import Path

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient
from rich.console import Console

from gateway.bulk.moving.mem0 import read_mem0
from gateway.bulk.moving.state import read_moves
from gateway.bulk.moving.steps import start, sync
from gateway.bulk.moving.work import Work
from gateway.bulk.rows import BulkError, EmbeddedRows, Row
from gateway.bulk.stores.protocol import SinkOptions
from gateway.cli.models import OwnModels, models_at
from gateway.config.files import one_writer
from tests.bulk.moving.conftest import HashModel, Models, Shop, closing_shop, copy_of, request_for, vector_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("provider", "settings"),
    [
        ("pgvector", {"host": "localhost", "user": "me", "dbname": "shop", "password": "secret"}),
        ("milvus", {"url": "http://localhost:19530", "token": "root:secret"}),
        ("qdrant", {"url": "http://localhost:6333", "api_key": "secret"}),
    ],
)
def test_after_the_password_of_mem0s_store_was_read_the_settings_accept_the_environment(
    provider: str, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move without --url loads the model in its own process, with the settings."""
    monkeypatch.setattr(os, "environ", environ := {"HOME": str(tmp_path)})
    path = tmp_path / "mem0.json"
    path.write_text(json.dumps({"vector_store": {"provider": provider, "config": settings}}))

    key = read_mem0(path).place.key

    assert key is not None
    assert environ[key] == "secret"
    assert isinstance(models_at(None, "KEY", ROOT / "models.yaml"), OwnModels)


@pytest.mark.parametrize("into_vector", [None, "e5"])
async def test_a_vector_that_does_not_exist_is_rejected_with_those_that_do(
    any_shop: Shop, into_vector: str | None, models: Models, tmp_path: Path, console: Console
) -> None:
    names = {"qdrant": "`one without a name`", "milvus": "`vector`", "pgvector": "`embedding`"}
    known = names[any_shop.url.partition(":")[0]]
    before = set(any_shop.store.collections())

    with pytest.raises(BulkError, match=rf"has no vector `vectro`.* it has {known}"):
        await start(
            request_for(any_shop, store=f"{any_shop.url}?vector=vectro", into_vector=into_vector), tmp_path, console
        )

    assert not models.texts
    assert not read_moves(tmp_path)
    assert set(any_shop.store.collections()) == before


@pytest.mark.parametrize("kind", ["qdrant", "pgvector"])
async def test_the_old_vector_of_several_must_be_named_before_anything_is_written(
    kind: str, request: pytest.FixtureRequest, models: Models, tmp_path: Path, console: Console
) -> None:
    url = f"qdrant:{tmp_path / 'qdrant'}" if kind == "qdrant" else request.getfixturevalue("pgvector")
    with closing_shop(f"{url}?vector=embedding") as shop:
        rows = [Row(row_id, text, {}, "", None) for row_id, (text, _payload) in shop.content().items()]
        with closing(shop.store.sink(shop.collection, SinkOptions("text", "extra", updates=True))) as sink:
            sink.open(HashModel("twin", lambda _texts: None).note)
            sink.write(0, EmbeddedRows(rows, np.stack([vector_of("twin", row.text) for row in rows])))

        with pytest.raises(
            BulkError, match=r"which vector of docs_\S+ is the old one\? It has `embedding`, `extra`; name"
        ):
            await start(request_for(shop, store=url), tmp_path / "moves", console)

        assert [name for name in shop.store.collections() if name.startswith(shop.collection)] == [shop.collection]


async def test_two_collections_in_one_request_are_rejected(shop: Shop, tmp_path: Path, console: Console) -> None:
    with pytest.raises(BulkError, match="must name a store without a collection: leave out `#others`"):
        await start(request_for(shop, store=f"{shop.url}#others"), tmp_path, console)


async def test_a_first_item_without_a_text_is_one_item_that_cannot_be_copied(
    store_url: str, models: Models, tmp_path: Path, console: Console
) -> None:
    """Each item may have other fields, so the first one says nothing about the others."""
    shop = Shop(store_url, f"docs_{uuid.uuid4().hex[:12]}")
    shop.put({n: f"word{n % 5} text {n}" for n in range(1, 20)})
    rows = [Row(0, "word1 x", {"n": 1}, "", None)]
    with closing(shop.store.sink(shop.collection, SinkOptions("title"))) as sink:
        sink.open(HashModel("old", lambda _texts: None).note)
        sink.write(0, EmbeddedRows(rows, np.stack([vector_of("old", "word1 x")])))
    with pytest.raises(BulkError, match="1 item cannot be copied, such as 0: "):
        await start(request_for(shop, text="text"), tmp_path, console)
    [move] = read_moves(tmp_path).values()

    await sync(move, tmp_path, console, skips=True)

    assert set(copy_of(shop, move).content()) == {*range(1, 20)}


async def test_two_moves_do_not_write_into_one_collection(
    shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    into = f"into_{uuid.uuid4().hex[:12]}"
    with closing_shop(shop.url) as other:
        first = await start(request_for(shop, into=into), tmp_path, console)
        with pytest.raises(
            BulkError, match=rf"the move {first.name} writes into {into}: continue that move, or choose another name"
        ):
            await start(request_for(other, into=into), tmp_path, console)
        with pytest.raises(BulkError, match=rf"the move {first.name} writes into {into}"):
            await start(request_for(other, store=f"{shop.url}?key_env=ANOTHER_KEY", into=into), tmp_path, console)
        assert (await start(request_for(shop, into=into), tmp_path, console)).pairs == first.pairs


async def test_two_starts_at_once_do_not_write_into_one_collection(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = f"into_{uuid.uuid4().hex[:12]}"
    errors: list[BaseException] = []
    waits = threading.Event()
    make, lock = Work.make_copies, one_writer

    def start_second() -> None:
        try:
            asyncio.run(start(request_for(other, into=into), tmp_path, console))
        except BaseException as error:  # shown below
            errors.append(error)

    def make_while_another_starts(work: Work) -> None:
        if threading.current_thread() is not second:
            second.start()
            while not waits.wait(0.05) and second.is_alive():
                pass
        make(work)

    def announce(path: Path) -> AbstractContextManager[None]:
        if threading.current_thread() is second:
            waits.set()
        return lock(path)

    monkeypatch.setattr(Work, "make_copies", make_while_another_starts)
    monkeypatch.setattr("gateway.bulk.moving.steps.one_writer", announce, raising=False)
    with closing_shop(shop.url) as other:
        second = threading.Thread(target=start_second)
        first = await start(request_for(shop, into=into), tmp_path, console)
        second.join()

    [error] = errors
    assert f"the move {first.name} writes into {into}" in str(error)
    assert copy_of(shop, first).content() == shop.content()


async def test_a_misspelled_field_of_times_is_named(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """Each sync would read all items, and no one would notice."""
    any_shop.put({1: "word1 changed"}, {"updated_at": "2026-01-01T00:00:00Z"})
    with pytest.raises(BulkError, match=r"--changed-at updatd_at: the first items have no such field.*`updated_at`"):
        await start(request_for(any_shop, changed_at="updatd_at"), tmp_path, console)
    assert not read_moves(tmp_path)
    move = await start(request_for(any_shop, changed_at="created_at"), tmp_path, console)
    assert move.pairs[0].changed_at == "created_at", "another word"
    move = await start(request_for(any_shop, changed_at="modified"), tmp_path, console)
    assert move.pairs[0].changed_at == "modified", "no item may have it yet"
    move = await start(request_for(any_shop, changed_at="updated_at"), tmp_path, console)
    assert move.pairs[0].changed_at == "updated_at", "the same command again may correct it"
    move = await start(request_for(any_shop), tmp_path, console)
    assert move.pairs[0].changed_at == "updated_at"


async def test_a_collection_whose_ids_milvus_makes_is_refused_without_consent(
    milvus_file: Path, models: Models, tmp_path: Path, console: Console
) -> None:
    """The copy keeps the ids, and applications that give none could no longer write."""
    name = f"auto_{uuid.uuid4().hex[:8]}"
    with closing(MilvusClient(str(milvus_file))) as client:
        schema = client.create_schema(auto_id=True, enable_dynamic_field=True)
        schema.add_field("pk", DataType.INT64, is_primary=True, auto_id=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=8)
        indexes = client.prepare_index_params()
        indexes.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        client.create_collection(name, schema=schema, index_params=indexes)
        vector = vector_of("old", "word1 text").tolist()
        client.insert(name, [{"text": f"word1 text {n}", "vector": vector} for n in range(3)])
    shop = Shop(f"milvus:{milvus_file}", name)
    with pytest.raises(
        BulkError,
        match=rf"{name} has auto_id, .* rejects items without an id\. .* --without-auto-id, .* from the flip on, not before",
    ):
        await start(request_for(shop), tmp_path, console)

    move = await start(request_for(shop, without_auto_id=True), tmp_path, console)

    assert copy_of(shop, move).content() == shop.content()
