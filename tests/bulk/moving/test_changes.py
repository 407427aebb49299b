"""If the store can report changes, a later pass reads only those since the last one, and misses none."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from rich.console import Console

from gateway.bulk.moving.state import Move
from gateway.bulk.moving.steps import check, start, sync
from gateway.bulk.rows import Json
from gateway.bulk.stores.pgvector_order import is_later
from gateway.bulk.stores.protocol import Since
from gateway.bulk.stores.reading import is_later as is_later_than
from tests.bulk.moving.conftest import Models, Shop, copy_of, request_for

OLD = (datetime.now(UTC) - timedelta(days=3)).isoformat()


def now() -> str:
    return datetime.now(UTC).isoformat()


async def begun(shop: Shop, folder: Path, console: Console) -> Move:
    """Return a move whose items are old, and for which no pass reads all payloads from now on."""
    shop.put({n: f"word{n % 5} text {n}" for n in range(50)}, {"at": OLD})
    return await start(request_for(shop, changed_at="at"), folder, console)


def forbid_full_passes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(_self: object, collection: str) -> None:
        pytest.fail(f"all payloads of {collection} were read")

    monkeypatch.setattr(type(shop.store), "digests", digests)


async def test_additions_changes_and_deletions_are_found_without_reading_all_payloads(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await begun(any_shop, tmp_path, console)
    models.texts.clear()
    any_shop.put({100: "word1 added late"}, {"at": OLD})  # by an import, for example
    any_shop.put({3: "word3 changed", 101: "word2 added"}, {"at": now()})
    any_shop.delete(7, 8)
    with monkeypatch.context() as patched:
        forbid_full_passes(any_shop, patched)
        await sync(move, tmp_path, console, skips=False)

    copy = copy_of(any_shop, move)
    assert copy.content() == any_shop.content()
    copy.check_vectors()
    assert sorted(models.texts) == ["word1 added late", "word2 added", "word3 changed"]


async def test_any_mixture_of_changes_between_passes_ends_equal(
    any_shop: Shop, models: Models, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = await begun(any_shop, tmp_path, console)
    chance = random.Random(19)
    with monkeypatch.context() as patched:
        forbid_full_passes(any_shop, patched)
        for _ in range(4):
            for _ in range(6):
                number = chance.randrange(60)
                if chance.random() < 0.4:
                    any_shop.delete(number)
                else:
                    any_shop.put({number: f"word{number % 5} {chance.random()}"}, {"at": now()})
            move = await sync(move, tmp_path, console, skips=False)

    copy = copy_of(any_shop, move)
    assert copy.content() == any_shop.content()
    copy.check_vectors()


async def test_a_change_that_its_field_does_not_tell_is_found_by_the_check(
    models: Models, tmp_path: Path, console: Console
) -> None:
    """Qdrant has no order of changes, so a change without a new time is missed until a pass compares all items."""
    shop = Shop(f"qdrant:{tmp_path / 'qdrant'}", "docs")
    move = await begun(shop, tmp_path, console)
    shop.put({3: "word3 changed"}, {"at": OLD})
    copy = copy_of(shop, move)

    await sync(move, tmp_path, console, skips=False)
    assert copy.content()[3][0] == "word3 text 3"

    await check(move, tmp_path, console, None, None)
    assert copy.content() == shop.content()


async def test_a_transaction_that_ends_after_a_pass_has_begun_is_not_missed(
    shop: Shop, postgres: str, models: Models, tmp_path: Path, console: Console
) -> None:
    """Its number is older than others that the pass has seen."""
    with psycopg.connect(postgres) as slow:
        table = sql.Identifier(shop.collection)
        slow.execute(sql.SQL("UPDATE {} SET payload = payload || '{{\"n\": 2}}' WHERE id = 5").format(table))
        shop.put({6: "word1 later number"})
        move = await start(request_for(shop), tmp_path, console)
        shop.put({7: "word2 even later"})
        slow.commit()

    await sync(move, tmp_path, console, skips=False)

    copy = copy_of(shop, move)
    assert copy.content()[5][1]["n"] == 2
    assert copy.content() == shop.content()


@pytest.mark.parametrize("change", ["VACUUM FULL {}", "ALTER TABLE {} ADD COLUMN tag text DEFAULT 'x'"])
async def test_a_table_that_was_rewritten_is_compared_as_a_whole(
    shop: Shop, postgres: str, change: str, models: Models, tmp_path: Path, console: Console
) -> None:
    mark = shop.store.mark(shop.collection, None)
    assert mark is not None
    assert not any(may_differ for _id, may_differ in shop.store.changes(shop.collection, mark))
    with psycopg.connect(postgres, autocommit=True) as db:
        db.execute(change.format(shop.collection).encode())

    found = list(shop.store.changes(shop.collection, mark))

    assert found == [(n, True) for n in range(50)]


@pytest.mark.parametrize(
    ("row", "mark", "expected"),
    [
        (5, 5, True),
        (6, 5, True),
        (4, 5, False),
        (5, 2**32 - 5, True),
        (2**32 - 5, 2**32 + 5, False),
        (7, 2**32 + 5, True),
        (3, 2**35 - 7, True),
    ],
)
def test_rows_have_32_bits_of_the_number_of_their_transaction(
    postgres: str, row: int, mark: int, expected: bool
) -> None:
    """After four billion transactions, the numbers start over."""
    with psycopg.connect(postgres) as db:
        query = sql.SQL("SELECT {} FROM (VALUES (%s::text::xid)) t (xmin)").format(is_later(mark))
        assert db.execute(query, [str(row)]).fetchone() == (expected,)


@pytest.mark.parametrize(
    ("value", "is_it"),
    [
        ("2026-11-27T11:59:59+00:00", False),
        ("2026-11-27T13:00:01+01:00", True),
        ("2026-11-26T23:59:59.999999", False),  # 11:59 of the 27th in UTC, in the westernmost zone
        ("2026-11-27 00:00:01", True),
        ("2026-11-20", True),  # the end of the day may be later
        ("20261120", True),
        ("9999-12-31T23:59:59", True),
        ("yesterday", True),
        (1_795_000_000, True),
        (None, True),
    ],
)
def test_a_time_without_a_zone_counts_as_later_only_if_it_may_be(value: Json, is_it: bool) -> None:
    """Many programs write such times; if all of them counted, each sync would read all items."""
    since = Since("m.at", datetime(2026, 11, 27, 12, tzinfo=UTC))
    assert is_later_than({"m": {"at": value}}, since) is is_it


@pytest.mark.parametrize(
    ("text", "payload"),
    [("meta.body", {"meta.body": "word1 text"}), ("a.b.c", {"a.b": {"c": "word1 text"}})],
)
async def test_a_text_field_whose_own_name_has_a_dot_is_copied_as_it_is_and_embedded_once(
    text: str, payload: dict[str, Json], models: Models, tmp_path: Path, console: Console
) -> None:
    shop = Shop(f"qdrant:{tmp_path / 'qdrant'}", "docs")
    shop.put(dict.fromkeys(range(3), "word1 text"))
    client: Any = shop.store._connection.client  # type: ignore[attr-defined]
    client.overwrite_payload("docs", payload, [0, 1, 2])
    move = await start(request_for(shop, text=text), tmp_path, console)
    models.texts.clear()

    await sync(move, tmp_path, console, skips=False)

    assert not models.texts
    assert client.retrieve(move.pairs[0].new, [1])[0].payload == payload
