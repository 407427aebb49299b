"""A move whose new vectors are next to the old ones, in the same items."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gateway.bulk.moving.command import show_status
from gateway.bulk.moving.state import Move, Stage
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.rows import BulkError, EmbeddedRows, Row
from gateway.bulk.stores.notes import write_notes
from gateway.bulk.stores.protocol import SinkOptions
from tests.bulk.moving.conftest import HashModel, Models, Shop, closing_shop, request_for, vector_of


@pytest.fixture(params=["pgvector", "qdrant"])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """A collection of 50 items in a store that can add vectors."""
    url = (
        f"qdrant:{tmp_path / 'qdrant'}?vector=embedding"
        if request.param == "qdrant"
        else f"{request.getfixturevalue('pgvector')}?vector=embedding"
    )
    with closing_shop(url) as found:
        yield found


def check_vectors(shop: Shop, vector: str, model: str) -> None:
    """Check that each item has the vector that a model makes of its text."""
    content = shop.content()
    vectors = shop.store.vectors(shop.collection, list(content), vector)
    assert vectors.keys() == content.keys()
    for row_id, (text, _payload) in content.items():
        np.testing.assert_allclose(vectors[row_id], vector_of(model, text), atol=1e-5)


def write_new(shop: Shop, row_id: int, text: str) -> None:
    """Write an item with the new vector alone, as an application that has switched does."""
    with closing(shop.store.sink(shop.collection, SinkOptions("text", "second"))) as sink:
        sink.open(HashModel("new", lambda _texts: None).note)
        sink.write(0, EmbeddedRows([Row(row_id, text, {"n": 1}, "", None)], np.stack([vector_of("new", text)])))


async def begun(shop: Shop, folder: Path, console: Console) -> Move:
    return await start(request_for(shop, into_vector="second"), folder, console)


async def test_the_items_get_a_second_vector_and_stay_as_they_are(
    one: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    before = one.content()

    move = await begun(one, tmp_path, console)

    assert one.content() == before
    check_vectors(one, "embedding", "old")
    check_vectors(one, "second", "new")
    assert one.store.describe(one.collection).notes["second"].model == "new"
    assert (move.stage, move.pairs[0].new, len(models.texts)) == (Stage.COPIED, one.collection, 50)


async def test_items_that_applications_write_in_between_get_the_second_vector_too(
    one: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """A new item has no vector, a changed item has a stale one, and in Qdrant a replaced item has lost its vector."""
    move = await begun(one, tmp_path, console)
    models.texts.clear()
    one.put({100: "word1 added", 3: "word3 changed", 4: "word4 text 4"})
    one.delete(7)

    move = await sync(move, tmp_path, console, skips=False)

    check_vectors(one, "second", "new")
    expected = {"word1 added", "word3 changed"}
    assert expected <= set(models.texts) <= expected | {"word4 text 4"}
    move, [report] = await check(move, tmp_path, console, None, None)
    assert report.problems() == []
    assert (report.first, report.second, report.num_vectors) == (50, 50, 50)
    assert report.agreement is not None
    assert report.agreement.num_queries == 50
    assert "50 with second" in report.sentences()[0]


async def test_flip_back_and_finish_keep_both_vectors_right_until_the_old_one_is_deleted(
    one: Shop, models: Models, tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    move = await begun(one, tmp_path, console)
    move, _reports = await check(move, tmp_path, console, None, None)
    move = await flip(move, tmp_path, console, forces=False)
    show_status(tmp_path, move.name)
    assert f"let applications search the vector second of {one.collection}" in " ".join(capsys.readouterr().out.split())
    write_new(one, 200, "word2 new writer")
    write_new(one, 5, "word0 changed by a new writer")
    one.put({201: "word1 old writer"})

    move = await sync(move, tmp_path, console, skips=False)
    check_vectors(one, "second", "new")
    move = await back(move, tmp_path, console, "old")
    check_vectors(one, "embedding", "old")
    move = await sync(move, tmp_path, console, skips=False)
    check_vectors(one, "second", "new")

    move, _reports = await check(move, tmp_path, console, None, None)
    move = await flip(move, tmp_path, console, forces=True)
    move = await finish(move, tmp_path, console, deletes=True)
    assert move.stage is Stage.FINISHED
    info = one.store.describe(one.collection)
    assert (list(info.widths), list(info.notes), info.count) == (["second"], ["second"], 52)
    check_vectors(one, "second", "new")


@pytest.mark.parametrize("killed_after", ["vector", "note"])
async def test_the_last_step_ends_well_after_it_was_killed_while_it_deleted_the_old_vector(
    one: Shop, killed_after: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await begun(one, tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    if killed_after == "vector" and one.url.startswith("qdrant"):
        before = one.store.describe(one.collection).notes
        one.store.delete_vector(one.collection, "embedding")
        store: Any = one.store
        store._connection.call(
            lambda client: client.update_collection(one.collection, metadata=write_notes(before)), one.collection
        )
        assert set(one.store.describe(one.collection).notes) == {"embedding", "second"}
    else:
        one.store.delete_vector(one.collection, "embedding")

    with pytest.raises(
        BulkError, match=r"there is no way back: `gateway move finish .* --delete-old` completes the move"
    ):
        await back(move, tmp_path, console, "old")
    move = await finish(move, tmp_path, console, deletes=True)

    assert move.stage is Stage.FINISHED
    info = one.store.describe(one.collection)
    assert (list(info.widths), list(info.notes), info.count) == (["second"], ["second"], 50)
    check_vectors(one, "second", "new")


async def test_the_way_back_needs_the_right_old_model(
    one: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await begun(one, tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    with pytest.raises(BulkError, match="have vectors that differ from those of twin"):
        await back(move, tmp_path, console, "twin")
    check_vectors(one, "embedding", "old")


async def test_a_second_vector_that_does_not_fit_is_refused(
    one: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    with pytest.raises(BulkError, match="cannot be combined with --into, --alias or --mem0"):
        await start(request_for(one, into_vector="second", into="other"), tmp_path, console)
    with pytest.raises(BulkError, match=r"is the old vector itself|which vector of .* is the old one"):
        await start(request_for(one, into_vector="embedding"), tmp_path, console)
    with pytest.raises(BulkError, match=r"already has vectors of old@.*: there is nothing to move"):
        await start(request_for(one, into_vector="second", model="old"), tmp_path, console)
    assert list(one.store.describe(one.collection).widths) == ["embedding"]


async def test_a_vector_without_a_name_can_be_the_old_one_but_stays(
    models: Models, tmp_path: Path, console: Console
) -> None:
    with closing_shop(f"qdrant:{tmp_path / 'qdrant'}") as shop:
        move = await begun(shop, tmp_path, console)
        check_vectors(shop, "second", "new")
        check_vectors(shop, "", "old")
        move = await flip(move, tmp_path, console, forces=True)
        write_new(shop, 5, "word0 changed by a new writer")
        move = await sync(move, tmp_path, console, skips=False)
        move = await back(move, tmp_path, console, "old")
        check_vectors(shop, "", "old")
        move = await flip(move, tmp_path, console, forces=True)
        with pytest.raises(
            BulkError, match=r"a vector without a name as long as the collection; to end .* leave out --delete-old"
        ):
            await finish(move, tmp_path, console, deletes=True)
