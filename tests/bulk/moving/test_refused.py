"""Items that cannot be copied: each is named and counted, and no step loses one without the user's consent."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

import psycopg
import pytest
from rich.console import Console

from gateway.bulk.embedder import TextRefused
from gateway.bulk.moving import command
from gateway.bulk.moving.command import show_status
from gateway.bulk.moving.state import Move, Stage, find_move
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.rows import BulkError
from tests.bulk.moving.conftest import Models, Shop, copy_of, request_for
from tests.bulk.moving.test_losses import late_change


@pytest.fixture
def narrow(pgvector: str) -> Iterator[Shop]:
    """A table whose ids have at most four characters."""
    with closing(Shop(pgvector, f"docs_{uuid.uuid4().hex[:12]}")) as found:
        found.put({f"n{n}": f"word{n % 5} text {n}" for n in range(20)})
        _widen(found, found.collection, 4)
        yield found


def _widen(shop: Shop, table: str, size: int) -> None:
    """Let the ids of a table have this many characters."""
    _run_sql(shop, f'ALTER TABLE "{table}" ALTER COLUMN id TYPE varchar({size})')


def _run_sql(shop: Shop, statement: str) -> None:
    with psycopg.connect(f"host={unquote(shop.url.split('@')[1].split('/')[0])} user=postgres dbname=postgres") as db:
        db.execute(statement)


def _forget_text(shop: Shop, table: str, row_id: str) -> None:
    statement = f"UPDATE \"{table}\" SET payload = payload - 'text' WHERE id = '{row_id}'"  # noqa: S608  of the test
    _run_sql(shop, statement)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The output of the commands."""
    found = io.StringIO()
    monkeypatch.setattr(command, "make_console", lambda **_: Console(file=found, width=400))
    return found


async def test_an_item_that_the_new_collection_cannot_store_is_named_and_the_others_are_copied(
    narrow: Shop, models: Models, tmp_path: Path, console: Console, shown: io.StringIO
) -> None:
    move = await start(request_for(narrow), tmp_path, console)
    _widen(narrow, narrow.collection, 40)
    narrow.put({"long id": "word1 refused", "new": "word2 added"})

    with pytest.raises(
        BulkError,
        match=r"1 item cannot be copied, such as long id: its id has 7 characters, but the column `id` takes at most 4"
        rf"\. The others are copied; \S+/{move.name}/ledger.not_copied.jsonl lists these\. Correct the items .* --skip`",
    ):
        await sync(move, tmp_path, console, skips=False)

    copy = copy_of(narrow, move)
    assert "new" in copy.content()
    assert "long id" in (tmp_path / move.name / "ledger.not_copied.jsonl").read_text()
    show_status(tmp_path, None)
    assert "1 item could not be copied, such as long id: its id has 7 characters" in shown.getvalue()

    with pytest.raises(BulkError, match="1 item cannot be copied"):
        await flip(move, tmp_path, console, forces=True)
    assert find_move(tmp_path, None).stage is Stage.COPIED

    _widen(narrow, copy.collection, 40)
    move = await sync(move, tmp_path, console, skips=False)
    assert copy.content() == narrow.content()
    assert (move.refused, move.problems) == (0, [])
    move, [report] = await check(move, tmp_path, console, None, None)
    assert report.problems() == []
    assert (await flip(move, tmp_path, console, forces=False)).stage is Stage.FLIPPED


async def test_consent_to_leave_items_behind_is_for_those_items_only(
    narrow: Shop, models: Models, tmp_path: Path, console: Console, shown: io.StringIO
) -> None:
    move = await start(request_for(narrow), tmp_path, console)
    _widen(narrow, narrow.collection, 40)
    narrow.put({"long 1": "word1 refused"})
    move = await sync(move, tmp_path, console, skips=True)
    assert move.left_behind == 1
    move, _reports = await check(move, tmp_path, console, None, None)
    assert move.stage is Stage.CHECKED
    move = await flip(move, tmp_path, console, forces=False)
    show_status(tmp_path, None)
    assert "1 item could not be copied (leaving 1 behind was accepted), such as long 1:" in shown.getvalue()

    narrow.put({"long 2": "word1 of a late writer"})
    with pytest.raises(BulkError, match=r"2 items cannot be copied, such as long 1: .*; long 2: .*\(1 are accepted\)"):
        await finish(move, tmp_path, console, deletes=True)
    assert {"long 1", "long 2"} <= narrow.content().keys()

    move = await sync(move, tmp_path, console, skips=True)
    move = await finish(move, tmp_path, console, deletes=True)
    assert move.log[-1].endswith(f"finished; deleted {narrow.collection}, with 2 items that could not be copied")


async def test_a_correction_after_the_last_pass_keeps_the_old_collection(
    narrow: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user has accepted the loss of the refused version only."""
    move = await _flipped(narrow, tmp_path, console)
    narrow.put({"new": "word1 added"})
    for item in ("n1", "new"):
        _forget_text(narrow, narrow.collection, item)
    move = await sync(move, tmp_path, console, skips=True)

    with monkeypatch.context() as patch:
        late_change(patch, lambda: narrow.put({"n1": "word1 corrected", "new": "word1 corrected"}))
        with pytest.raises(BulkError, match=f"2 items of {narrow.collection} changed since the last pass"):
            await finish(move, tmp_path, console, deletes=True)

    assert narrow.content()["new"][0] == "word1 corrected"


async def test_the_check_is_not_ready_before_consent(
    narrow: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(narrow), tmp_path, console)
    _forget_text(narrow, narrow.collection, "n1")

    move, [report] = await check(move, tmp_path, console, None, None)

    assert move.stage is Stage.COPIED
    [problem] = report.problems()
    assert problem.startswith("1 item cannot be copied: correct it, or")
    assert any(line.startswith("1 item not copied, such as n1: ") for line in report.sentences())


async def test_a_copied_item_that_loses_its_text_is_named_by_every_later_sync(
    narrow: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await start(request_for(narrow), tmp_path, console)
    _forget_text(narrow, narrow.collection, "n1")
    for _pass in range(3):
        with pytest.raises(BulkError, match="1 item cannot be copied, such as n1: "):
            await sync(move, tmp_path, console, skips=False)

    narrow.put({"n1": "word1 restored"})
    move = await sync(move, tmp_path, console, skips=False)
    assert copy_of(narrow, move).content() == narrow.content()


async def test_an_item_that_the_model_rejects_is_named(
    narrow: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    def refuse(texts: object) -> None:
        if any("text 7" in text for text in texts):  # type: ignore[attr-defined]
            raise TextRefused("the text has 9,000 tokens, but the model takes at most 512")

    models.on_call = refuse
    with pytest.raises(BulkError, match="1 item cannot be copied, such as n7: the text has 9,000 tokens"):
        await start(request_for(narrow), tmp_path, console)
    models.on_call = lambda _texts: None
    move = await start(request_for(narrow), tmp_path, console)
    assert copy_of(narrow, move).content() == narrow.content()


async def test_the_way_back_does_not_end_while_it_cannot_copy_an_item(
    narrow: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await _flipped(narrow, tmp_path, console)
    copy = copy_of(narrow, move)
    _widen(narrow, copy.collection, 40)
    copy.put({"long id": "word1 of an application", "new": "word2 of an application"})

    with pytest.raises(BulkError, match=rf"1 item cannot be copied, such as long id: .*{move.name} --skip`"):
        await back(move, tmp_path, console, None)

    assert "new" in narrow.content()
    move = find_move(tmp_path, None)
    assert move.is_returning
    skipped = await back(move, tmp_path, console, None, skips=True)
    assert not skipped.is_returning
    assert "long id" not in narrow.content()


async def test_the_way_back_ends_after_its_item_is_corrected(
    narrow: Shop, models: Models, tmp_path: Path, console: Console
) -> None:
    move = await _flipped(narrow, tmp_path, console)
    copy = copy_of(narrow, move)
    _forget_text(narrow, copy.collection, "n1")
    with pytest.raises(BulkError, match="1 item cannot be copied, such as n1: "):
        await back(move, tmp_path, console, None)

    copy.put({"n1": "word1 corrected"})
    move = await back(find_move(tmp_path, None), tmp_path, console, None)

    assert not move.is_returning
    assert narrow.content()["n1"][0] == "word1 corrected"
    narrow.check_vectors()


async def _flipped(shop: Shop, folder: Path, console: Console) -> Move:
    move = await start(request_for(shop), folder, console)
    move, _reports = await check(move, folder, console, None, None)
    return await flip(move, folder, console, forces=False)
