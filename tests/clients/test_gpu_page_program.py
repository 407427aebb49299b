"""The program of docs/gpu.md runs; with the bundled model instead of both, and Milvus Lite instead of the server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.gateway_process import MODEL, WIDTH, Gateway

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_mem0_remembers_with_two_models(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for old, new in {
        "http://127.0.0.1:8000": gateway.root_url,
        "http://127.0.0.1:19530": f"{tmp_path}/milvus.db",
        '"jina-embeddings-v3"': f'"{MODEL}"',
        '"bge-m3"': f'"{MODEL}"',
        "1024": str(WIDTH),
    }.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.setenv("MEM0_DIR", str(tmp_path))

    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=180)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-2:] == ["Prefers trains to planes"] * 2
