"""Items that a collection has lost: no step copies the loss to the other collection, or deletes the last copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psycopg
import pytest
from rich.console import Console

from gateway.bulk.moving import passes
from gateway.bulk.moving.command import show_status
from gateway.bulk.moving.ending import Consent
from gateway.bulk.moving.losses import allowed_deletions, allowed_missing
from gateway.bulk.moving.state import Move, Stage, find_move
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.rows import BulkError
from tests.bulk.moving.conftest import Models, Shop, closing_shop, copy_of, request_for, vector_of


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Shop]:
    """A collection of 50 items in a Qdrant folder."""
    with closing_shop(f"qdrant:{tmp_path / 'qdrant'}") as found:
        yield found


async def flipped(shop: Shop, folder: Path, console: Console, **changes: object) -> Move:
    move = await start(request_for(shop, **changes), folder, console)
    move, _reports = await check(move, folder, console, None, None)
    return await flip(move, folder, console, forces=False)


@pytest.mark.parametrize(
    ("num_items", "deletions", "missing"),
    [(0, 0, 0), (1, 0, 0), (3, 1, 0), (20, 10, 2), (50, 20, 5), (100, 20, 10), (1_000, 100, 10), (10_000, 1_000, 100)],
)
def test_few_missing_items_need_no_consent(num_items: int, deletions: int, missing: int) -> None:
    assert (allowed_deletions(num_items), allowed_missing(num_items)) == (deletions, missing)


# ------------------------------------------------------------------------------------------- the new collection's loss


async def test_the_last_copy_is_not_deleted(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    move = await flipped(any_shop, tmp_path, console)
    copy = copy_of(any_shop, move)
    copy.delete(*range(49))

    with pytest.raises(
        BulkError,
        match=rf"nothing was deleted: {copy.collection} lacks 49 of the 50 items that the move has copied into it\. .*"
        rf"`gateway move sync {move.name} --restore`.* {move.name} --delete-old --max-missing 49`",
    ):
        await finish(move, tmp_path, console, deletes=True)
    _move, [report] = await check(move, tmp_path, console, None, None)

    assert report.problems() == [problem for problem in report.problems() if "lacks 49 of the 50 items" in problem]
    assert "49 missing from docs_" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "newer in" not in console.file.getvalue()  # type: ignore[attr-defined]
    show_status(tmp_path, None)
    assert f"49 copied items missing from {copy.collection}" in " ".join(capsys.readouterr().out.split())
    assert len(any_shop.content()) == 50

    move = await sync(move, tmp_path, console, skips=False, restores=True)
    assert copy.content() == any_shop.content()
    copy.check_vectors()
    move = await finish(move, tmp_path, console, deletes=True)
    assert move.log[-1].endswith(f"deleted {any_shop.collection}")


async def test_the_user_may_accept_what_applications_deleted(
    local: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await flipped(local, tmp_path, console)
    copy = copy_of(local, move)
    copy.delete(*range(30))
    with pytest.raises(BulkError, match="lacks 30 of the 50 items"):
        await finish(move, tmp_path, console, deletes=True, consent=Consent(max_missing=29))

    await finish(move, tmp_path, console, deletes=True, consent=Consent(max_missing=30))

    assert local.store.collections() == [copy.collection]


async def test_a_sync_that_reads_changes_only_notices_an_emptied_collection(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await flipped(shop, tmp_path, console)
    copy = copy_of(shop, move)
    copy.delete(*range(50))
    with monkeypatch.context() as patch:
        patch.setattr(passes._Changes, "_all_items", lambda _self: pytest.fail("all items were read"))
        move = await sync(move, tmp_path, console, skips=False)
    assert move.missing == 50


# ------------------------------------------------------------------------------------------- the old collection's loss


@pytest.mark.parametrize("step", ["sync", "check", "flip"])
async def test_an_emptied_collection_does_not_empty_the_checked_copy(
    step: str, local: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(local), tmp_path, console)
    move, _reports = await check(move, tmp_path, console, None, None)
    local.delete(*range(50))

    steps = {
        "sync": lambda: sync(move, tmp_path, console, skips=False),
        "check": lambda: check(move, tmp_path, console, None, None),
        "flip": lambda: flip(move, tmp_path, console, forces=True),
    }

    with pytest.raises(
        BulkError, match=rf"lacks 50 of the 50 items .* `gateway move sync {move.name} --max-deletions 50`"
    ):
        await steps[step]()

    copy = copy_of(local, move)
    assert len(copy.content()) == 50
    assert find_move(tmp_path, None).stage is Stage.CHECKED
    with pytest.raises(BulkError, match="lacks 50 of the 50 items"):
        await sync(move, tmp_path, console, skips=False, max_deletions=49)
    await sync(move, tmp_path, console, skips=False, max_deletions=50)
    assert not copy.content()


async def test_no_flip_after_many_changes_since_the_check(
    local: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(local), tmp_path, console)
    move, _reports = await check(move, tmp_path, console, None, None)
    local.put({number: f"word1 changed {number}" for number in range(11)})

    for _attempt in range(2):
        with pytest.raises(BulkError, match="run `gateway move check`"):
            await flip(move, tmp_path, console, forces=False)

    move, _reports = await check(move, tmp_path, console, None, None)
    local.delete(*range(10))
    move = await flip(move, tmp_path, console, forces=False)
    assert copy_of(local, move).content() == local.content()


@pytest.mark.parametrize("num_items", [1, 3, 20])
async def test_a_small_collection_is_not_emptied_either(
    num_items: int, models: Models, tmp_path: Path, console: Console
) -> None:
    """In both directions."""
    shop = Shop(f"qdrant:{tmp_path / 'qdrant'}", "docs")
    shop.put({number: f"word1 text {number}" for number in range(num_items)})
    move = await flipped(shop, tmp_path, console)
    copy = copy_of(shop, move)
    shop.delete(*range(num_items))
    with pytest.raises(BulkError, match=f"lacks {num_items} of the {num_items} item"):
        await sync(move, tmp_path, console, skips=False)
    assert len(copy.content()) == num_items
    shop.put({number: f"word1 text {number}" for number in range(num_items)})
    copy.delete(*range(num_items))

    with pytest.raises(BulkError, match=rf"lacks {num_items} .* `gateway move back docs --max-deletions {num_items}`"):
        await back(move, tmp_path, console, "old")

    assert len(shop.content()) == num_items
    await back(move, tmp_path, console, "old", max_deletions=num_items)
    assert not shop.content()


# --------------------------------------------------------------------------------------------------------- the last step


def late_change(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let an application change an item after the last pass has read it."""
    read = passes._Changes._to_embed

    def read_and_change(self: Any, items: Any) -> Any:
        yield from read(self, items)
        change()

    monkeypatch.setattr(passes._Changes, "_to_embed", read_and_change)


async def test_a_write_during_the_last_pass_keeps_the_old_collection(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await flipped(any_shop, tmp_path, console)
    with monkeypatch.context() as patch:
        late_change(patch, lambda: any_shop.put({3: "word3 late change", 100: "word1 late addition"}))
        with pytest.raises(
            BulkError,
            match=rf"2 items of {any_shop.collection} changed since .* {any_shop.collection} was not deleted\.",
        ):
            await finish(move, tmp_path, console, deletes=True)
    assert any_shop.collection in any_shop.store.collections()

    await sync(move, tmp_path, console, skips=False)
    await finish(move, tmp_path, console, deletes=True)

    content = copy_of(any_shop, move).content()
    assert (content[3][0], content[100][0]) == ("word3 late change", "word1 late addition")


async def test_a_write_during_the_last_look_fails_in_a_store_with_locks(
    shop: Shop, postgres: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application gets an error, instead of losing its write."""
    move = await flipped(shop, tmp_path, console)
    begun = Event()
    errors: list[str] = []

    def write() -> None:
        with psycopg.connect(postgres, autocommit=True) as sql:
            begun.wait()
            try:
                sql.execute(f"DELETE FROM {shop.collection} WHERE id = 3".encode())  # noqa: S608
            except psycopg.Error as error:
                errors.append(type(error).__name__)

    writer = Thread(target=write)
    writer.start()
    look = passes.count_changes

    def slow_look(*values: Any) -> int:
        begun.set()
        writer.join(0.3)
        return look(*values)

    monkeypatch.setattr("gateway.bulk.moving.ending.count_changes", slow_look)
    await finish(move, tmp_path, console, deletes=True)
    writer.join()

    assert errors == ["UndefinedTable"]
    assert 3 in copy_of(shop, move).content()


async def test_a_mixture_of_models_is_found_before_the_old_collection_is_deleted(
    local: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    """The application was not restarted after the flip, and both models have the same width."""
    move = await flipped(local, tmp_path, console, model="twin")
    copy = copy_of(local, move, "twin")
    copy.put({number: f"word1 right {number}" for number in range(100, 110)})
    _move, [report] = await check(move, tmp_path, console, None, None)
    assert report.problems() == []
    assert "10 items of the new collection were written by applications" in report.sentences()
    assert report.num_vectors == 60
    stale = [
        (number, vector_of("old", f"word1 stale {number}").tolist(), {"text": f"word1 stale {number}", "n": 1})
        for number in range(200, 240)
    ]
    for row_id, vector, payload in stale:
        copy.store._connection.call(  # type: ignore[attr-defined]
            lambda client, point=(row_id, vector, payload): client.upsert(copy.collection, [_point(*point)]), ""
        )

    _move, [report] = await check(move, tmp_path, console, None, None)
    assert any("sampled items have vectors that differ" in problem for problem in report.problems())
    with pytest.raises(BulkError, match=r"of 100 sampled items .* differ from those of twin, .* --max-mismatched 100`"):
        await finish(move, tmp_path, console, deletes=True)
    assert local.collection in local.store.collections()

    await finish(move, tmp_path, console, deletes=True, consent=Consent(max_mismatched=100))
    assert local.collection not in local.store.collections()


def _point(row_id: int, vector: list[float], payload: dict[str, Any]) -> Any:
    from qdrant_client.models import PointStruct

    return PointStruct(id=row_id, vector=vector, payload=payload)
