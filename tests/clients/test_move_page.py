"""The commands of docs/move.md work as the page describes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.clients.gateway_process import TOLD, Gateway

PAGE = (Path(__file__).parents[2] / "docs" / "move.md").read_text(encoding="utf-8")


@pytest.mark.timeout(900)
def test_every_command_of_the_page_runs_in_its_order(furnished_gateway: Gateway, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "gateway"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway "$@"\n')
    program.chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "EMBEDDINGS_API_KEY": KEY,
    }
    commands = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert len(commands) == 12
    assert "gateway serve" in commands.pop(0)  # one with both models runs already
    # tests/bulk/moving runs the one for PostgreSQL, which needs a server at that address.
    assert "pgvector://me@localhost/shop" in commands.pop(9)
    shown = []
    for command in commands:
        here = command.replace("http://127.0.0.1:8000", furnished_gateway.root_url).replace(
            "multilingual-e5-small", TOLD
        )
        done = subprocess.run(
            ["bash", "-ec", here], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environ
        )
        assert done.returncode == 0, f"{here}\n{done.stdout}{done.stderr}"
        shown.append(done.stdout + done.stderr)

    copied, synced, checked, flipped, again, back, _second, finished, one = shown[1:]
    assert "200 items, 200 embedded, 0 deleted" in copied
    assert "200 items, 0 embedded, 0 deleted, 200 already equal" in synced
    assert "ready: the new collection can be used" in checked
    assert "x-gateway-expect-space: told@" in flipped
    assert "0 embedded" in again
    assert "Let applications use orders again." in back
    assert "finished" in finished
    assert "tickets → tickets, vector e5: 200 items, 200 embedded, 0 deleted" in one
    assert "next: gateway move check tickets" in one
