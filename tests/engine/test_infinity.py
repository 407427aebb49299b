"""Importing Infinity leaves nothing behind, no file, no log handler, no telemetry, and imports no more than is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, logging, os, sys
root = logging.getLogger()
handler = logging.NullHandler()
root.addHandler(handler)
root.setLevel(logging.ERROR)

import gateway.engine.infinity
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
from infinity_emb.telemetry import TELEMETRY_ENABLED

print(json.dumps({
    "handlers": root.handlers == [handler],
    "level": root.level == logging.ERROR,
    "home": os.environ.get("INFINITY_HOME"),
    "telemetry": [TELEMETRY_ENABLED, not HF_HUB_DISABLE_TELEMETRY],
}))
"""


def test_the_import_leaves_files_logging_and_environment_alone(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("INFINITY_", "HF_", "DO_NOT"))}
    environ |= {"HOME": str(tmp_path), "TMPDIR": str(temporary), "INFINITY_HOME": "own"}

    process = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env={**environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(process.stdout) == {"handlers": True, "level": True, "home": "own", "telemetry": [False, False]}
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["temporary"]


def test_the_import_brings_infinitys_engine_without_its_server_and_its_embedders() -> None:
    code = """
import sys
import gateway.engine.infinity as infinity
import infinity_emb, infinity_emb.args, infinity_emb.engine  # as the library's own modules import each other

assert issubclass(infinity.Engine, infinity_emb.engine.AsyncEmbeddingEngine)
assert infinity.EngineArgs is infinity_emb.args.EngineArgs
print({"sentence_transformers", "infinity_emb.infinity_server", "infinity_emb.transformer.utils"} & set(sys.modules))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert process.stdout == "set()\n"
