"""docs/gpu.md: its commands, settings and registries exist. Its program runs in tests/clients/test_gpu_page_program.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from gateway.cli.main import app
from gateway.config.registry import load_registry
from gateway.config.settings import Settings, variable

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_exists() -> None:
    named = set(re.findall(r"(?:bin/|`)gateway ([a-z]+)", PAGE))

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert {"doctor", "download", "verify"} <= named
    assert named <= commands


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in re.findall(r"\bmake ([a-z -]+)", PAGE) for word in line.split()} & {
        "install",
        "run",
        "clean",
    }

    assert named == {"install", "run", "clean"}
    assert named <= targets


def test_every_setting_exists() -> None:
    named = set(re.findall(r"\bGATEWAY_[A-Z_]+\b", PAGE))

    assert named
    assert named <= {variable(name) for name in Settings.model_fields}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_registries_are_valid(tmp_path: Path, text: str) -> None:
    own = yaml.safe_load((ROOT / "models.yaml").read_text())
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump({**own, "aliases": {}, **yaml.safe_load(text)}))

    assert load_registry(path, {}).models


def test_the_keys_of_the_table_are_keys_of_the_registry(tmp_path: Path) -> None:
    rows = re.findall(r"^\| .* \| (`(?:max_|load|device).*) \|$", PAGE, re.MULTILINE)
    for row in rows:
        for setting in re.findall(r"`([a-z_]+: [a-z0-9:_]+)`", row):
            entry = {"id": "m", "source": "./m", **yaml.safe_load(setting)}
            entry |= {"load": "on_demand"} if "idle_unload_s" in entry else {}
            path = tmp_path / "models.yaml"
            path.write_text(yaml.safe_dump({"version": 1, "models": [entry]}))
            assert load_registry(path, {}).models

    assert len(rows) == 4


def test_the_page_is_in_the_readme_and_on_the_site() -> None:
    assert "docs/gpu.md" in (ROOT / "README.md").read_text()
    assert "- gpu.md" in (ROOT / "docs" / "mkdocs.yml").read_text()
