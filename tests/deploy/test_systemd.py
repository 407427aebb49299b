"""deploy/systemd: valid for systemd, and consistent with the gateway's settings, its shutdown, and docs/gpu.md."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gateway.config.settings import load_settings
from gateway.server import EXIT_RESTART
from tests.deploy.deployment_files import DEPLOY, ROOT

UNIT = DEPLOY / "systemd" / "embedding-gateway.service"
TEXT = UNIT.read_text()
PAGE = (ROOT / "docs" / "gpu.md").read_text()


def values(key: str) -> list[str]:
    """Return the values of a key of the unit."""
    return re.findall(rf"^{key}=(.*)$", TEXT, re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(("text", "is_valid"), [(TEXT, True), (TEXT.replace("RestartSec=10", "RestrtSec=10"), False)])
def test_systemd_accepts_the_unit(tmp_path: Path, text: str, is_valid: bool) -> None:
    path = tmp_path / UNIT.name
    path.write_text(re.sub(r"^(ExecStart=)\S+", r"\1/bin/true", text, flags=re.MULTILINE))  # that must exist

    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], check=False, capture_output=True, text=True, timeout=60
    )

    complaints = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (complaints == []) == is_valid


def test_the_unit_gives_a_stop_the_time_that_it_needs() -> None:
    [seconds] = values("TimeoutStopSec")
    settings = load_settings({})

    assert int(seconds) >= settings.drain_delay_s + settings.shutdown_grace_s + 15 + 5  # a lost card, and the models


def test_the_unit_starts_the_gateway_again_after_a_lost_card() -> None:
    assert values("Restart") == ["on-failure"]
    assert f"exit code {EXIT_RESTART}" in TEXT
    assert f"exit code {EXIT_RESTART}" in PAGE


def test_the_unit_lets_the_gateway_write_all_of_its_files() -> None:
    environ = dict(value.split("=", 1) for value in values("Environment"))
    settings = load_settings({name: value for name, value in environ.items() if name.startswith("GATEWAY_")})

    assert environ["HF_HOME"].startswith(f"/var/lib/{values('StateDirectory')[0]}/")
    assert environ["XDG_CACHE_HOME"] == f"/var/cache/{values('CacheDirectory')[0]}"
    assert settings.log_format == "json"


def test_the_unit_runs_the_program_of_make_install() -> None:
    [folder] = values("WorkingDirectory")

    assert values("ExecStart") == [f"{folder}/.venv/bin/gateway serve"]
    assert f"make -C {folder} install" in PAGE
    assert f"useradd --system --home-dir /var/lib/{values('User')[0]}" in PAGE
