"""``gateway key`` makes what the file of keys takes, and ``gateway check`` reads that file too."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.access.keyring import Keyring, key_digest
from gateway.cli import app
from gateway.config.settings import load_settings

DIGEST = "a" * 64


async def test_a_made_key_opens_with_its_entry(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["key", "search-team"])
    key = next(line for line in made.stderr.splitlines() if line.startswith("sk-"))
    file = tmp_path / "keys.yaml"
    file.write_text(f"version: 1\nkeys:\n{made.stdout}", encoding="utf-8")

    keyring = Keyring(load_settings({"GATEWAY_API_KEYS_FILE": str(file)}))

    assert made.exit_code == 0
    assert key not in made.stdout  # what is put into the file does not hold the key
    assert (await keyring.identify(key_digest(key), "127.0.0.1")).name == "search-team"


def test_each_made_key_is_another() -> None:
    keys = {CliRunner().invoke(app, ["key", "a"]).stderr for _ in range(20)}

    assert len(keys) == 20


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    models, keys = tmp_path / "models.yaml", tmp_path / "keys.yaml"
    models.write_text(
        "version: 1\nmodels:\n  - {id: mini, source: package:w}\naliases: {default: mini}\n", encoding="utf-8"
    )
    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", str(keys))
    return models, keys


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (f"{{name: a, sha256: {DIGEST}, models: [minni]}}", "key a: there is no model `minni`; did you mean `mini`?"),
        ("{name: a, sha256: secret}", "keys[0].sha256[0]: must be the 64 lowercase hex digits"),
        ("{name: a, sha256: 12345}", "got the number `12345`; put it in quotes"),
        (f"{{name: a, sha256: {DIGEST}}}\n  - {{name: a, sha256: {'b' * 64}}}", "`a` is there twice"),
    ],
)
def test_a_wrong_file_of_keys_fails_the_check(files: tuple[Path, Path], entry: str, problem: str) -> None:
    models, keys = files
    keys.write_text(f"version: 1\nkeys:\n  - {entry}\n", encoding="utf-8")

    result = CliRunner().invoke(app, ["check", str(models)])

    assert result.exit_code == 1
    assert problem in result.stderr
    assert str(keys) in result.stderr
    assert "secret" not in result.stderr


def test_a_right_file_of_keys_passes_the_check(files: tuple[Path, Path]) -> None:
    models, keys = files
    keys.write_text(f"version: 1\nkeys:\n  - {{name: a, sha256: {DIGEST}, models: [default]}}\n", encoding="utf-8")

    assert CliRunner().invoke(app, ["check", str(models)]).exit_code == 0


def test_a_missing_file_of_keys_fails_the_check(files: tuple[Path, Path]) -> None:
    models, keys = files

    result = CliRunner().invoke(app, ["check", str(models)])

    assert result.exit_code == 1
    assert str(keys) in result.stderr
