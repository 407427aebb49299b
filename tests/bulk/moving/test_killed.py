"""A move whose steps are each killed by a signal, in the middle of anything, and repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

from gateway.bulk.moving.state import Stage, read_moves
from tests.bulk.moving.conftest import Shop, copy_of
from tests.bulk.moving.killed import STEPS

ROOT = Path(__file__).parents[3]


def test_a_move_whose_steps_are_killed_loses_and_mixes_nothing(pgvector: str, tmp_path: Path) -> None:
    shop = Shop(pgvector, f"killed_{uuid.uuid4().hex[:8]}")
    shop.put({n: f"word{n % 5} text {n}" for n in range(200)})
    expected: dict[int, str] = {row_id: text for row_id, (text, _payload) in shop.content().items()}  # type: ignore[misc]
    alias = f"{shop.collection}_view"
    shop.store.flip(alias, shop.collection)

    arguments = [pgvector, shop.collection, alias, str(tmp_path)]
    command = [sys.executable, "-m", "tests.bulk.moving.killed", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["killed"]) >= len(STEPS) // 2
    expected |= {int(row_id): text for row_id, text in found["written"].items()}
    [move] = read_moves(tmp_path).values()
    assert move.stage is Stage.FINISHED
    assert shop.collection not in shop.store.collections()
    copy = copy_of(shop, move)
    assert {row_id: text for row_id, (text, _payload) in copy.content().items()} == expected
    copy.check_vectors()
