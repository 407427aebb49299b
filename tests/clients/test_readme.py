"""The commands and the program of the README work as described."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.gateway_process import WIDTH, Gateway

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def block(language: str, word: str) -> str:
    """Return the one block of code in a language that has a word in it."""
    [found] = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in code]
    return found


def test_curl_gets_an_embedding(gateway: Gateway) -> None:
    command = block("sh", "curl").replace(ADDRESS, gateway.root_url)

    done = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True, timeout=60)

    [item] = json.loads(done.stdout)["data"]
    assert len(item["embedding"]) == WIDTH


def test_mem0_remembers(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("python", "mem0").replace(ADDRESS, gateway.root_url).replace("/tmp/", f"{tmp_path}/")  # noqa: S108
    monkeypatch.setenv("MEM0_DIR", str(tmp_path))

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)

    assert done.stdout.strip().splitlines()[-1] == "Prefers trains to planes"
