"""Run all steps of a move, and kill each of them at random moments, later each time, while an application writes.

    python -m tests.bulk.moving.killed URL COLLECTION ALIAS FOLDER

The application uses the alias. Prints the steps that were killed, and the items that the application has written, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

from rich.console import Console

from gateway.bulk.model_spec import ModelSpec
from gateway.bulk.moving import passes, steps, work
from gateway.bulk.moving.state import Move, read_moves
from gateway.bulk.rows import BulkError, RowId
from tests.bulk.moving.conftest import HashModel, Shop, request_for

_LONGEST_S = (0.04, 0.12, 0.3)
STEPS = ("start", "sync", "check", "flip", "sync", "back", "check", "flip", "finish")
_DONE = ("applications already use the new collection", "there is nothing to undo", "is finished")
"""Errors of a step that was killed when it had already ended."""


@asynccontextmanager
async def _open_embedder(spec: ModelSpec, _models: object, _console: object) -> AsyncIterator[HashModel]:
    yield HashModel(spec.name, lambda _texts: time.sleep(0.002))


def _run(step: str, shop: Shop, alias: str, folder: Path) -> None:
    """Run a step in this process."""
    console = Console(stderr=True, quiet=True)

    def again(step: Callable[[Move], Awaitable[object]]) -> Awaitable[object]:
        [move] = read_moves(folder).values()
        return step(move)

    commands: dict[str, Callable[[], Awaitable[object]]] = {
        "start": lambda: steps.start(request_for(shop, collection=alias), folder, console),
        "sync": lambda: again(lambda move: steps.sync(move, folder, console, skips=False)),
        "check": lambda: again(lambda move: steps.check(move, folder, console, None, None)),
        "flip": lambda: again(lambda move: steps.flip(move, folder, console, forces=True)),
        "back": lambda: again(lambda move: steps.back(move, folder, console, "old")),
        "finish": lambda: again(lambda move: steps.finish(move, folder, console, deletes=True)),
    }

    async def run() -> None:
        await commands[step]()

    try:
        asyncio.run(run())
    except BulkError as error:
        if not any(done in str(error) for done in _DONE):
            raise


def _child(step: str, shop: Shop, alias: str, folder: Path, kill_after_s: float) -> bool:
    """Run a step in a process that is killed after some time; return whether it was killed."""
    child = os.fork()
    if child == 0:
        if kill_after_s:
            signal.setitimer(signal.ITIMER_REAL, kill_after_s)  # its default action ends a process immediately
        try:
            _run(step, shop, alias, folder)
        except BaseException as error:
            os.write(2, f"{step}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"{step}: {status}"
    return os.WIFSIGNALED(status)


def _write(shop: Shop, alias: str, number: int) -> dict[RowId, str]:
    """Change one item and add another, as an application that uses the alias and its model."""
    used = shop.store.aliases()[alias]
    items: dict[RowId, str] = {number: f"word1 changed {number}", 1000 + number: f"word2 added {number}"}
    with closing(Shop(shop.url, used, "old" if used == shop.collection else "new")) as application:
        application.put(items)
    return items


def main() -> None:
    url, collection, alias, folder = sys.argv[1:]
    work.open_embedder, work.models_at, passes._SHARD_ROWS = _open_embedder, lambda *_: None, 16  # type: ignore[assignment]
    shop = Shop(url, collection)
    chance = random.Random()
    killed: list[str] = []
    written: dict[RowId, str] = {}
    for step in STEPS:
        for longest_s in _LONGEST_S:
            if not _child(step, shop, alias, Path(folder), chance.uniform(0.001, longest_s)):
                break
            killed.append(step)
            if step != "finish":
                written |= _write(shop, alias, len(killed))
        else:
            _child(step, shop, alias, Path(folder), 0.0)
    print(json.dumps({"killed": killed, "written": written}))  # noqa: T201
    shop.close()


if __name__ == "__main__":
    main()
