"""``gateway check`` checks models.yaml, fast and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway import __version__
from gateway.cli.main import app

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_valid_file_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nmodels:\n  - {id: a, source: package:w}\naliases: {default: a, b: a}\n")

    result = CliRunner().invoke(app, ["check", "--models", str(path)])

    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"{path}: ok, 1 model, 2 aliases"
    assert result.stderr == ""


def test_a_scrub_must_exist(tmp_path: Path) -> None:
    capture = "{queries: 0.1, to: kept/q.jsonl, scrub: gateway.capture.scrubbing:unmask}"
    alias = f"{{model: a, capture: {capture}}}"
    path = write(tmp_path, f"version: 1\nmodels:\n  - {{id: a, source: package:w}}\naliases:\n  default: {alias}\n")

    result = CliRunner().invoke(app, ["check", "--models", str(path)])

    assert result.exit_code == 1
    assert "`scrub` of the capture of 'default' cannot be imported" in result.stderr
    assert not (tmp_path / "kept").exists()


def test_every_problem_is_one_line_on_stderr(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 2\nmodels: []\n")

    result = CliRunner().invoke(app, ["check", "--models", str(path)])

    assert result.exit_code == 1
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith(f"{path}:1:10: version: ")
    assert second.startswith(f"{path}:2:9: models: ")


def test_without_a_file_the_settings_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "version: 1\nmodels:\n  - {id: a, source: package:w}\n")
    monkeypatch.setenv("GATEWAY_MODELS", str(path))

    result = CliRunner().invoke(app, ["check"])

    assert result.stdout.splitlines()[0] == f"{path}: ok, 1 model, 0 aliases"


def test_a_wrong_setting_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MODLES", "x.yaml")

    result = CliRunner().invoke(app, ["check"])

    assert result.exit_code == 1
    assert result.stderr == "environment: GATEWAY_MODLES: is not a setting; did you mean `GATEWAY_MODELS`?\n"


def test_the_file_sees_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "version: 1\nmodels:\n  - {id: a, source: '${WEIGHTS}'}\n")
    monkeypatch.setenv("WEIGHTS", "package:w")

    assert CliRunner().invoke(app, ["check", "--models", str(path)]).exit_code == 0


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])

    assert (result.exit_code, result.stdout) == (0, f"gateway {__version__}\n")


@pytest.mark.parametrize("arguments", [["check", "--models", "models.yaml"], ["--help"]])
def test_check_and_help_import_no_engine(arguments: list[str]) -> None:
    program = f"""
import atexit, sys
from gateway.cli.main import app
heavy = {{"torch", "transformers", "infinity_emb", "sentence_transformers"}}
atexit.register(lambda: print("imported:", sorted(heavy & sys.modules.keys())))
app({arguments!r})
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )

    assert result.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("command", ["serve", "check", "lock", "models", "verify", "compare", "experiments"])
def test_every_command_that_reads_models_yaml_names_it_alike(command: str) -> None:
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())

    assert "--models FILE File of models. By default GATEWAY_MODELS, or models.yaml." in text


@pytest.mark.parametrize("command", [["check"], ["lock"], ["models"], ["verify", "x"], ["serve"]], ids=" ".join)
def test_every_command_reads_the_file_that_the_environment_names(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_MODELS", str(tmp_path / "other.yaml"))

    result = CliRunner().invoke(app, command)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"{tmp_path}/other.yaml: ")


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("serve", ["GATEWAY_HOST, or", "127.0.0.1", "GATEWAY_PORT, or 8000", "GATEWAY_MODELS, or models.yaml"]),
        ("key", ["--file", "--models", "--requests-per-minute", "--tokens-per-minute", "--expires"]),
        ("experiments", ["Only with --exposures: more exposure logs"]),
    ],
)
def test_the_help_has_the_defaults_in_plain_text(command: str, parts: list[str]) -> None:
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())

    assert all(part in text for part in parts)
    assert "<bool>" not in text


def test_the_help_shows_the_whole_sentence_of_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"], terminal_width=80).stdout

    assert "--install-completion" in text
    assert "..." not in text.partition("Commands:")[2]


def test_warnings_of_a_command_go_to_standard_error() -> None:
    code = (
        "import sys; sys.argv = ['gateway', '--version']\n"
        "import structlog; from gateway.cli import main\n"
        "try: main.main()\n"
        "finally: structlog.get_logger('gateway.x').warning('seen', by='people')"
    )

    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert result.stdout == f"gateway {__version__}\n"
    assert result.stderr.endswith(" warning: seen by=people\n")


def test_a_change_of_weights_says_which_units_it_moves(tmp_path: Path) -> None:
    models = "version: 1\nmodels:\n  - {id: a, source: package:w}\n  - {id: b, source: package:v}\n"
    arms = "[{model: a, weight: 9}, {model: b, weight: %s}]"
    text = models + "experiments:\n  - {id: e, kind: cross_space, unit: {from: [api_key]}, arms: " + arms + "}\n"
    old = tmp_path / "old.yaml"
    old.write_text(text % 1, encoding="utf-8")
    path = write(tmp_path, text % 9)

    changed, unchanged = (
        CliRunner().invoke(app, ["check", "--models", str(new), "--against", str(old)]) for new in (path, old)
    )

    assert changed.stdout.startswith("e: a 9, b 1 -> a 9, b 9; counts start over; units that move: a -> b 4")
    assert unchanged.stdout.startswith(f"aliases and experiments as in {old}\n")
