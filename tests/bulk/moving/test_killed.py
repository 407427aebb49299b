"""A move whose process is killed by SIGKILL, in the middle of anything, and started again."""

from __future__ import annotations

import random
import subprocess
import sys
import uuid
from pathlib import Path

from gateway.bulk.moving.state import Stage, find_move
from tests.bulk.moving.conftest import Shop, copy_of

_PROGRAM = """
import asyncio, sys, time
from contextlib import asynccontextmanager
from pathlib import Path
from rich.console import Console
from gateway.bulk.moving import passes, steps, work
from tests.bulk.moving.conftest import HashModel, Shop, request_for

@asynccontextmanager
async def open_embedder(asked, _models, _console):
    yield HashModel(asked.name, lambda _texts: time.sleep(0.01))

url, collection, folder = sys.argv[1:]
work.open_embedder, work.models_at, passes._SHARD_ROWS = open_embedder, lambda *_: None, 16
shop = Shop(url, collection)
print("starts", flush=True)
asyncio.run(steps.start(request_for(shop), Path(folder), Console(stderr=True)))
print("done", flush=True)
"""


def test_a_killed_move_continues_and_ends_with_the_same_content(pgvector: str, tmp_path: Path) -> None:
    shop = Shop(pgvector, f"killed_{uuid.uuid4().hex[:8]}")
    shop.put({n: f"word{n % 5} text {n}" for n in range(600)})
    chance = random.Random(5)
    num_kills = 0
    for attempt in range(8):
        program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, pgvector, shop.collection, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert program.stdout is not None
        assert program.stdout.readline() == "starts\n"
        try:
            # The last attempts may take as long as they need.
            output, errors = program.communicate(timeout=60 if attempt >= 4 else chance.uniform(0.05, 0.5))
            assert output == "done\n", errors
            break
        except subprocess.TimeoutExpired:
            program.kill()
            program.communicate()
            num_kills += 1
            shop.put({attempt: f"word1 changed {attempt}", 1000 + attempt: "word2 added"})
            shop.delete(100 + attempt)

    assert num_kills >= 2
    move = find_move(tmp_path, None)
    assert move.stage is Stage.COPIED
    copy = copy_of(shop, move)
    expected, found = shop.content(), copy.content()
    assert expected.keys() ^ found.keys() == set()
    assert found == expected
    copy.check_vectors()
