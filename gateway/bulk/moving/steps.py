"""The steps of a move: start, sync, check, flip, back, finish. Each step can be interrupted and repeated."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gateway.bulk.moving.checking import CheckReport, Side, allowed_changes, wrong_vectors
from gateway.bulk.moving.comparing import check_pair
from gateway.bulk.moving.direction import NUM_DRAWN
from gateway.bulk.moving.ending import NO_CONSENT, Consent, delete_old
from gateway.bulk.moving.mem0 import present_settings, read_mem0
from gateway.bulk.moving.planning import StartRequest, check_alias, name_copies, places_of, plan, real_name
from gateway.bulk.moving.redirecting import begin, is_in_use, redirect, settle
from gateway.bulk.moving.results import accept, describe_refused, with_counts
from gateway.bulk.moving.state import Move, Pair, Stage, hold, write_move
from gateway.bulk.moving.work import (
    Work,
    at_work,
    check_way_back,
    old_ledger,
    old_model_of,
    pairs_left,
    store_of,
)
from gateway.bulk.places import open_movable
from gateway.bulk.rows import BulkError, RowId
from gateway.cli.console import say
from gateway.config.files import one_writer
from gateway.config.wording import count


async def start(request: StartRequest, folder: Path, console: Console) -> Move:
    """Begin a move, or continue it, and copy until the new collection has all items.

    Raises:
        BulkError: the move cannot start or cannot finish.
    """
    known, place = places_of(request)
    with ExitStack() as locks:
        with closing(open_movable(place)) as store:
            move = plan(request, known, place, store, folder, locks)
        async with at_work(move, folder, console) as opened:
            with one_writer(
                folder / move.name
            ):  # of two starts into one collection, the second sees the state of the first
                move = name_copies(move, opened, request.into)
                check_alias(opened.reading, move)
                work = replace(opened, move=move)
                work.make_copies()
                pairs = [replace(pair, new=real_name(work.reading, pair.new)) for pair in move.pairs]
                move = replace(move, pairs=pairs)
                write_move(folder, move)
            return await _copy(replace(work, move=move), skips=request.skips)


async def _copy(work: Work, *, skips: bool = False, keeps_stage: bool = False) -> Move:
    """Copy until the new collections have all items, and write the state.

    Args:
        skips: the user agrees to leave items behind that cannot be copied.
        keeps_stage: few changes make no new check necessary.

    Raises:
        BulkError: items cannot be copied, and the user has not agreed to leave so many behind.
    """
    results = await work.passes()
    move = accept(work, results, skips=skips)
    are_few = all(counts.earlier + counts.changes <= allowed_changes(counts.items) for counts in results.values())
    stage = move.stage if (keeps_stage and are_few) or move.stage is Stage.FLIPPED else Stage.COPIED
    move = move.at(stage, f"synced: {sum(counts.changes for counts in results.values())} changes in the last pass")
    write_move(work.folder, move)
    return move


async def sync(
    move: Move, folder: Path, console: Console, *, skips: bool, max_deletions: int = 0, restores: bool = False
) -> Move:
    """Copy the changes in the old collection since the last pass.

    Args:
        skips: the user agrees to leave items behind that cannot be copied.
        max_deletions: the number of items that the pass may delete, even if they are many.
        restores: copy items again that the new collection has lost.
    """
    with begin(folder, move) as held:
        async with at_work(held, folder, console) as work:
            return await _copy(replace(work, max_deletions=max_deletions, restores=restores), skips=skips)


async def check(
    move: Move, folder: Path, console: Console, queries: Path | None, old_model: str | None
) -> tuple[Move, list[CheckReport]]:
    """Copy changes, and compare each collection with its copy.

    Raises:
        BulkError: `back` was interrupted and must be completed first, or a store or the model fails.
    """
    with begin(folder, move) as held:
        if held.is_returning:
            raise BulkError(
                f"{held.pairs[0].old} lacks items that applications wrote into {held.pairs[0].new}: run `gateway move back "
                f"{held.name}` until it ends, or let applications use the new collection with `gateway move flip "
                f"{held.name} --force`"
            )
        async with at_work(held, folder, console) as work:
            results = await work.passes(is_full=True)
            move = with_counts(held, results)
            reports = [
                await check_pair(
                    replace(work, move=move),
                    pair,
                    results[pair.old],
                    queries if pair == move.pairs[0] else None,
                    old_model,
                )
                for pair in move.pairs
            ]
        is_ready = not any(report.problems() for report in reports)
        if move.stage is Stage.FLIPPED:
            write_move(folder, move)
            return move, reports
        what = f"checked: {'ready' if is_ready else 'not ready'}"
        checked = move.at(Stage.CHECKED if is_ready else Stage.COPIED, what)
        write_move(folder, checked)
        return checked, reports


async def flip(move: Move, folder: Path, console: Console, *, forces: bool) -> Move:
    """Let applications use the new collection, and copy the changes made in the meantime.

    Raises:
        BulkError: the last check did not pass, or the store refuses.
    """
    with hold(folder, move) as held:
        was_interrupted = held.is_redirecting and held.stage is not Stage.FLIPPED
        settled = settle(held, folder)
        if was_interrupted and settled.stage is Stage.FLIPPED and is_in_use(settled):
            async with at_work(settled, folder, console) as work:
                return await _copy(work)
        return await _flip(settled, folder, console, forces=forces or was_interrupted)


async def _flip(move: Move, folder: Path, console: Console, *, forces: bool) -> Move:
    if move.stage is Stage.FLIPPED and is_in_use(move):
        raise BulkError("applications already use the new collection: `gateway move sync` copies late changes")
    if move.stage not in (Stage.CHECKED, Stage.FLIPPED) and not forces:
        raise BulkError(
            "the collections have not been compared since the last change: run `gateway move check` first, or add "
            "--force"
        )
    async with at_work(move, folder, console) as work:
        check_alias(work.reading, move)
        was_checked = move.stage is Stage.CHECKED
        move = await _copy(work, keeps_stage=True)
        if was_checked and move.stage is Stage.COPIED and not forces:
            raise BulkError(
                "many items changed since the check, and were copied: run `gateway move check` again, or add --force"
            )
        if move.into_vector is not None:
            for pair in move.pairs:
                # The old vectors of these payloads are right; those of later writes by applications may not be.
                with work.ledger(pair) as ledger:
                    ledger.copy_to(old_ledger(work.files / pair.ledger))
        before = present_settings(move.mem0) if move.mem0 is not None and move.mem0_before is None else move.mem0_before
        move = redirect(replace(move, mem0_before=before), work.writing, folder, back=False)
        return await _copy(replace(work, move=move))


async def back(
    move: Move, folder: Path, console: Console, old_model: str | None, *, skips: bool = False, max_deletions: int = 0
) -> Move:
    """Let applications use the old collection again, and copy back their writes into the new one.

    Args:
        skips: the user agrees that the old collection does not get the writes that cannot be copied.
        max_deletions: the number of items that may be deleted from the old collection, even if they are many.

    Raises:
        BulkError: the move was not flipped, the old model is unknown, or writes cannot be copied. Except in the first
        case the flip itself is already undone, and the same step does the rest.
    """
    with begin(folder, move) as held:
        return await _back(held, folder, console, old_model, skips=skips, max_deletions=max_deletions)


async def _back(
    move: Move, folder: Path, console: Console, old_model: str | None, *, skips: bool, max_deletions: int
) -> Move:
    if move.stage is not Stage.FLIPPED and not move.is_returning and not move.is_redirecting:
        raise BulkError("applications use the old collection: there is nothing to undo")
    with store_of(move) as store:
        check_way_back(move, store)
        model = old_model or old_model_of(move, store, move.pairs[0])
        if move.stage is Stage.FLIPPED or move.is_redirecting:
            move = redirect(move, store, folder, back=True)
    say(console, f"Let applications use {move.pairs[0].old} again.")
    if model is None:
        raise BulkError(
            "Items that applications wrote into the new collection are missing from the old one, because its model is "
            "unknown: name the model with `gateway move back --from-model NAME`"
        )
    async with at_work(move, folder, console, model) as work:
        await _return_changes(replace(work, max_deletions=max_deletions), model, skips=skips)
    move = replace(move, is_returning=False)
    write_move(folder, move)
    return move


async def _return_changes(work: Work, model: str, *, skips: bool) -> None:
    """Copy the applications' writes from the new collection back into the old one, embedded by the old model.

    Raises:
        BulkError: the old collection's vectors are of another model, or items cannot be copied.
    """
    move = work.move
    for pair in move.pairs:
        ids = _unchanged(work, pair)
        compared, wrong = await wrong_vectors(work.reading, Side(pair.old, move.vector), move.text, ids, work.embedder)
        if len(wrong) > compared // 10:
            raise BulkError(
                f"{len(wrong)} of {count(compared, 'sampled item')} of {pair.old} have vectors that differ from "
                f"those of {model}, so nothing was written into it. Name the right model, with its task, with "
                "--from-model"
            )
    results = await work.passes(back=True)
    refused = with_counts(move, results)
    if refused.refused and not skips:
        raise BulkError(
            f"{describe_refused(work, results, refused, back=True)}. Correct the items and run the same command again, or "
            f"leave them out of {move.pairs[0].old} with `gateway move back {move.name} --skip`"
        )


def _unchanged(work: Work, pair: Pair) -> list[RowId]:
    """Return items of the old collection whose old vectors must be right, since nothing has written them again."""
    with work.ledger(pair, back=True) as ledger:
        sample = ledger.sample(NUM_DRAWN)
    if work.move.into_vector is None:
        return list(sample)
    now = work.reading.digests_of(pair.old, list(sample))
    return [row_id for row_id, digest in sample.items() if now.get(row_id) == digest]


async def finish(move: Move, folder: Path, console: Console, *, deletes: bool, consent: Consent = NO_CONSENT) -> Move:
    """End a move, and delete the old collections if the user asked for it.

    Raises:
        BulkError: applications do not use the new collection, or still write into the old one; or the new one lacks items
            or has vectors of another model.
    """
    with hold(folder, move) as found:
        move = held = _settled_or_kept(found, folder, deletes=deletes)
        if not deletes:
            lacks = f"; it lacks items that are only in {held.pairs[0].new}" if held.is_returning else ""
            what = f"the old collection was kept{lacks}"
            move = replace(held, was_flipped=held.may_be_in_use, is_redirecting=False)
        elif (
            held.stage is not Stage.FLIPPED
            or held.is_redirecting
            or (held.mem0 and read_mem0(held.mem0).collection == held.pairs[0].old)
        ):
            raise BulkError("applications use the old collection: run `gateway move flip` first")
        else:
            one = held.into_vector is not None
            what = f"deleted {f'the vector {held.vector}' if one else ', '.join(pair.old for pair in held.pairs)}"
            if left := pairs_left(held):
                move = await delete_old(replace(held, pairs=left), folder, console, consent)
            what += f", with {count(move.refused, 'item')} that could not be copied" if move.refused else ""
        move = replace(move, pairs=held.pairs).at(Stage.FINISHED, f"finished; {what}")
        write_move(folder, move)
        return move


def _settled_or_kept(move: Move, folder: Path, *, deletes: bool) -> Move:
    """Return a move with the state after an interrupted step. A move whose store is gone can be ended too."""
    try:
        return settle(move, folder)
    except BulkError:
        if deletes:
            raise
        return move
