"""The names that applications use, and the state of a move, after a refusal, a lost response, and the death of a process."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from rich.console import Console

from gateway.bulk.moving import redirecting, state, steps
from gateway.bulk.moving.command import next_command
from gateway.bulk.moving.mem0 import read_mem0
from gateway.bulk.moving.state import Move, Stage, read_moves, write_move
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.rows import BulkError
from tests.bulk.moving.conftest import Models, Shop, copy_of, request_for
from tests.bulk.moving.test_steps import mem0_on


class _Killed(BaseException):
    """Ends a step at once, like the death of its process."""


def refuse(*_values: object) -> None:
    raise BulkError("the store refuses")


async def aliased(shop: Shop, folder: Path, console: Console) -> Move:
    """Start the move of a collection that applications find by an alias."""
    alias = f"alias_{uuid.uuid4().hex[:8]}"
    shop.store.flip(alias, shop.collection)
    return await start(request_for(shop, collection=alias), folder, console)


async def flip_and_die(shop: Shop, move: Move, folder: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirect the alias, and end before the state says so."""
    flips = type(shop.store).flip

    def die(store: object, *names: str) -> None:
        flips(store, *names)  # type: ignore[arg-type]
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(shop.store), "flip", die)
        with pytest.raises(_Killed):
            await flip(move, folder, console, forces=True)


async def test_after_a_refused_flip_a_pass_still_owns_the_new_collection(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No application has ever used it, so an item that it lacks was not deleted by one."""
    move = await aliased(any_shop, tmp_path, console)
    move, _reports = await check(move, tmp_path, console, None, None)
    with monkeypatch.context() as patch:
        patch.setattr(type(any_shop.store), "flip", refuse)
        with pytest.raises(BulkError, match="the store refuses"):
            await flip(move, tmp_path, console, forces=False)
    found = read_moves(tmp_path)[move.name]
    assert (found.stage, found.was_flipped, found.is_redirecting) == (Stage.CHECKED, False, False)
    copy_of(any_shop, move).delete(3)

    await check(found, tmp_path, console, None, None)

    assert copy_of(any_shop, move).content() == any_shop.content()


@pytest.mark.parametrize("way", ["flip", "back"])
async def test_a_step_whose_response_was_lost_has_succeeded(
    any_shop: Shop, way: str, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, passes would overwrite what applications write into the new collection."""
    move = await aliased(any_shop, tmp_path, console)
    real = type(any_shop.store).flip

    def lose(store: object, *names: str) -> None:
        real(store, *names)  # type: ignore[arg-type]
        raise BulkError("the store has gone away")

    if way == "back":
        move = await flip(move, tmp_path, console, forces=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(any_shop.store), "flip", lose)
        if way == "flip":
            move = await flip(move, tmp_path, console, forces=True)
        else:
            move = await back(move, tmp_path, console, "old")

    assert move.stage is (Stage.FLIPPED if way == "flip" else Stage.COPIED)
    assert read_moves(tmp_path)[move.name] == move
    assert move.was_flipped


async def test_a_store_that_cannot_be_asked_leaves_the_names_open(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await aliased(shop, tmp_path, console)
    real = type(shop.store).flip

    def die(store: object, *names: str) -> None:
        real(store, *names)  # type: ignore[arg-type]
        monkeypatch.setattr(type(shop.store), "aliases", refuse)
        raise BulkError("the store has gone away")

    monkeypatch.setattr(type(shop.store), "flip", die)
    with pytest.raises(BulkError, match="has gone away"):
        await flip(move, tmp_path, console, forces=True)
    monkeypatch.undo()
    found = read_moves(tmp_path)[move.name]
    assert (found.is_redirecting, found.may_be_in_use) == (True, True)
    assert next_command(found) == f"gateway move flip {move.name}"
    with pytest.raises(BulkError, match="is already in progress"):
        await start(request_for(shop), tmp_path, console)


async def test_a_collection_that_cannot_be_described_now_hides_no_flip(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting its items may take too long for the store; passes must know that applications use it."""
    move = await aliased(shop, tmp_path, console)
    await flip_and_die(shop, move, tmp_path, console, monkeypatch)
    describe = type(shop.store).describe

    def fail_for_the_alias(store: object, name: str) -> object:
        return refuse() if name == move.alias else describe(store, name)  # type: ignore[arg-type]

    monkeypatch.setattr(type(shop.store), "describe", fail_for_the_alias)

    found = redirecting.settle(read_moves(tmp_path)[move.name], tmp_path)

    assert (found.stage, found.was_flipped) == (Stage.FLIPPED, True)


async def test_an_alias_that_a_person_restored_after_an_interrupted_flip_may_have_been_used(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await aliased(shop, tmp_path, console)
    await flip_and_die(shop, move, tmp_path, console, monkeypatch)
    copy = copy_of(shop, move)
    copy.delete(3)
    shop.store.flip(move.alias or "", shop.collection)

    await sync(move, tmp_path, console, skips=False)

    assert 3 not in copy.content()


def at_each_change(monkeypatch: pytest.MonkeyPatch, store: type, tick: Callable[[], None]) -> None:
    """Call ``tick`` before and after each write of the state, of an alias, and of Mem0's configuration."""

    def around(function: Callable[..., object]) -> Callable[..., object]:
        def changed(*values: object, **named: object) -> object:
            tick()
            result = function(*values, **named)
            tick()
            return result

        return changed

    for module in (steps, redirecting):
        monkeypatch.setattr(module, "write_move", around(write_move))
    monkeypatch.setattr(store, "flip", around(store.flip))  # type: ignore[attr-defined]
    for name in ("change_mem0", "restore_mem0"):
        monkeypatch.setattr(redirecting, name, around(getattr(redirecting, name)))


async def killed(
    step: Callable[[], Awaitable[object]], moment: int, store: type, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Take a step that dies at the moment of a change; return whether it has died before its end."""
    left = iter(range(moment))

    def tick() -> None:
        if next(left, None) is None:
            raise _Killed

    with monkeypatch.context() as patch:
        at_each_change(patch, store, tick)
        try:
            await step()
        except _Killed:
            return True
    return False


@pytest.mark.parametrize("with_mem0", [False, True])
@pytest.mark.parametrize("moment", range(14))
async def test_a_step_that_is_killed_at_any_change_leaves_a_true_state_and_is_repeated(
    pgvector: str,
    with_mem0: bool,
    moment: int,
    models: Models,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, moves = tmp_path / "mem0.json", tmp_path / "moves"
    shop, _config = mem0_on(pgvector, path)
    if with_mem0:
        move = await start(request_for(shop, collection=None, store=None, mem0=path), moves, console)
    else:
        move = await aliased(shop, moves, console)

    def uses_new() -> bool:
        name = read_mem0(path).collection if with_mem0 else shop.store.aliases()[str(move.alias)]
        return name == move.pairs[0].new

    for step, is_new in (
        (lambda: flip(move, moves, console, forces=True), True),
        (lambda: back(move, moves, console, "old"), False),
        (lambda: flip(move, moves, console, forces=True), True),
    ):
        was_killed = await killed(step, moment, type(shop.store), monkeypatch)
        found = read_moves(moves)[move.name]
        assert found.may_be_in_use or not uses_new()
        assert found.is_redirecting or uses_new() == (found.stage is Stage.FLIPPED)
        if was_killed:
            with nullcontext() if found.is_redirecting else suppress(BulkError):  # it was killed in its last pass
                await step()
        found = read_moves(moves)[move.name]
        assert uses_new() == is_new == (found.stage is Stage.FLIPPED)
        assert (found.was_flipped, found.is_redirecting, found.is_returning) == (True, False, False)
    assert (await finish(move, moves, console, deletes=True)).stage is Stage.FINISHED


async def test_a_kill_and_then_a_refused_flip_do_not_forget_what_the_old_collection_lacks(
    shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await aliased(shop, tmp_path, console)
    move = await flip(move, tmp_path, console, forces=True)
    copy_of(shop, move).put({200: "word2 written by an application"})
    with pytest.raises(BulkError, match="have vectors that differ"):
        await back(move, tmp_path, console, "twin")

    def die(*_values: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(type(shop.store), "flip", die)
        with pytest.raises(_Killed):
            await flip(move, tmp_path, console, forces=True)
        patch.setattr(type(shop.store), "flip", refuse)
        with pytest.raises(BulkError, match="the store refuses"):
            await flip(move, tmp_path, console, forces=True)
    found = read_moves(tmp_path)[move.name]
    assert (found.stage, found.is_returning) == (Stage.COPIED, True)

    await back(move, tmp_path, console, "old")

    assert 200 in shop.content()
    shop.check_vectors()


def test_a_state_of_the_version_before_can_be_read(tmp_path: Path) -> None:
    move = Move("m", "qdrant:/x", [state.Pair("a", "b", "l")], "new", "text")
    write_move(tmp_path, move)
    path = tmp_path / "m" / "move.json"
    lines = [line for line in path.read_text().splitlines() if "is_redirecting" not in line]
    path.write_text("\n".join(lines))

    assert read_moves(tmp_path) == {"m": move}
