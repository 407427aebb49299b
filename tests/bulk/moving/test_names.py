"""Collections with any name, and moves and copies that never share one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from gateway.bulk.moving.state import find_move, new_name, read_moves
from gateway.bulk.moving.steps import check, finish, flip, start
from tests.bulk.moving.conftest import Models, Shop, closing_shop, copy_of, request_for

SPACE = "new@0123456789ab"


def test_a_simple_name_is_kept_in_the_copys_name() -> None:
    assert new_name("orders", SPACE) == "orders_new_0123456789ab"


@pytest.mark.parametrize(
    "names",
    [
        ("文档", "记忆"),
        ("my docs", "my_docs", "my-docs", "my.docs"),
        ("x" * 70 + "1", "x" * 70 + "2", "x" * 50, "x" * 60),
        ("naïve", "naäve"),
    ],
)
def test_copies_of_two_collections_never_have_one_name(names: tuple[str, ...]) -> None:
    copies = [new_name(name, SPACE) for name in names]
    assert len(set(copies)) == len(names)
    assert all(len(copy) <= 60 and copy.isascii() for copy in copies)


async def test_collections_with_similar_names_are_moved_apart(models: Models, tmp_path: Path, console: Console) -> None:
    names = ["文档", "记忆", "My Docs", "my.docs", "My%Docs"]
    with closing_shop(f"qdrant:{tmp_path / 'qdrant'}") as first:
        shops = {name: Shop(first.url, name) for name in names}
        for number, shop in enumerate(shops.values()):
            shop.put({n: f"word{n} of {number}" for n in range(5 + number)})
        moves = {name: await start(request_for(shop), tmp_path, console) for name, shop in shops.items()}
        assert len({move.name for move in moves.values()}) == len(names) == len(read_moves(tmp_path))
        for name, shop in shops.items():
            with closing(copy_of(shop, moves[name])) as copy:
                assert copy.content() == shop.content()
            assert find_move(tmp_path, name) == moves[name]  # by the collection's name, as it is
            assert (await start(request_for(shop), tmp_path, console)).name == moves[name].name
        move, [report] = await check(moves["记忆"], tmp_path, console, None, None)
        assert not report.problems()
        move = await flip(move, tmp_path, console, forces=False)
        await finish(move, tmp_path, console, deletes=True)
        assert set(names) - set(first.store.collections()) == {"记忆"}
        assert {n for n in names if n in first.store.collections()} == {"文档", "My Docs", "my.docs", "My%Docs"}
