"""A server that stops in the middle of a step: each step waits for it, or is repeated, and nothing is lost or mixed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from gateway.bulk.moving.state import find_move
from gateway.bulk.moving.steps import back, check, finish, flip, start, sync
from gateway.bulk.rows import BulkError
from tests.bulk.moving.conftest import Models, Shop, request_for
from tests.bulk.stores.qdrant_server import Fault, QdrantServer

ALIAS = "live"


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    opened = QdrantServer()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.patience._FIRST_PAUSE_S", 0.001)


@dataclass
class Walk:
    """A whole move of a collection on a server, with writes of applications between the steps."""

    server: QdrantServer
    folder: Path
    console: Console

    @property
    def url(self) -> str:
        return f"qdrant://127.0.0.1:{self.server.port}"

    def fill(self) -> None:
        shop = Shop(self.url, "docs")
        shop.put({n: f"word{n % 5} text {n}" for n in range(60)})
        shop.store.flip(ALIAS, "docs")
        shop.close()

    async def run(self, do: Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]) -> None:
        """Take all steps, each by ``do``; in between, applications write."""
        shop = Shop(self.url, "docs")
        request = request_for(shop, collection=ALIAS)
        await do(lambda: start(request, self.folder, self.console))
        shop.put({1: "word1 changed", 100: "word2 added"})
        shop.delete(2)
        await do(lambda: sync(find_move(self.folder, None), self.folder, self.console, skips=False))
        await do(lambda: check(find_move(self.folder, None), self.folder, self.console, None, None))
        await do(lambda: flip(find_move(self.folder, None), self.folder, self.console, forces=False))
        new = find_move(self.folder, None).pairs[0].new
        assert self.server.engine.get_aliases().aliases[0].collection_name == new
        copy = Shop(self.url, new, "new")
        copy.put({3: "word3 by the new application"})
        await do(lambda: back(find_move(self.folder, None), self.folder, self.console, "old"))
        assert self.server.engine.get_aliases().aliases[0].collection_name == "docs"
        assert shop.content() == copy.content()
        shop.check_vectors()
        await do(lambda: check(find_move(self.folder, None), self.folder, self.console, None, None))
        await do(lambda: flip(find_move(self.folder, None), self.folder, self.console, forces=False))
        await do(lambda: finish(find_move(self.folder, None), self.folder, self.console, deletes=True))
        assert {one.name for one in self.server.engine.get_collections().collections} == {new}
        content = copy.content()
        copy.check_vectors()
        assert set(content) == {*range(60), 100} - {2}
        assert [content[n][0] for n in (1, 3, 100)] == ["word1 changed", "word3 by the new application", "word2 added"]


async def test_a_server_that_is_away_again_and_again_only_delays_the_steps(
    server: QdrantServer, models: Models, tmp_path: Path, console: Console
) -> None:
    walk = Walk(server, tmp_path, console)
    walk.fill()
    faults: list[Fault] = ["", "", "503", "", "late", "", "", "close"]

    async def do(step: Callable[[], Awaitable[object]]) -> None:
        server.faults.extend(faults * 500)
        await step()
        server.faults.clear()

    await walk.run(do)


@pytest.mark.parametrize("seed", range(4))
async def test_a_step_that_lost_its_server_at_any_request_is_repeated(
    server: QdrantServer,
    seed: int,
    models: Models,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.bulk.stores.qdrant_connection.PATIENCE_S", 0.0)
    walk = Walk(server, tmp_path, console)
    walk.fill()
    chance = random.Random(seed)

    async def do(step: Callable[[], Awaitable[object]]) -> None:
        for _ in range(3):
            server.faults.extend([""] * chance.randrange(40) + ["late"] + ["close"] * 1000)
            with suppress(BulkError):
                await step()
                return
            server.faults.clear()
        await step()

    async def and_clear(step: Callable[[], Awaitable[object]]) -> None:
        try:
            await do(step)
        except BulkError as error:  # only the last pass of a flip is missing
            assert "applications already use the new collection" in str(error)  # noqa: PT017
        finally:
            server.faults.clear()

    await walk.run(and_clear)
