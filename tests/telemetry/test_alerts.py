"""Prometheus' own tool finds that the rules are well-formed, and that each alert fires exactly when it should."""

from __future__ import annotations

import subprocess

import pytest

from tests.peers import needs
from tests.telemetry.observed import PROMETHEUS, rules

pytestmark = needs("promtool", "prometheus")
TESTS = sorted(PROMETHEUS.glob("*_test.yml"))


def promtool(*arguments: str) -> str:
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml")])
def test_the_files_are_well_formed(arguments: tuple[str, ...]) -> None:
    assert "SUCCESS" in promtool(*arguments)


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_alerts_fire_when_they_must_and_only_then(file: object) -> None:
    assert "SUCCESS" in promtool("test", "rules", str(file))


def test_every_alert_is_made_to_fire() -> None:
    fired = "".join(file.read_text(encoding="utf-8") for file in TESTS)
    alerts = [rule["alert"] for rule in rules() if "alert" in rule]

    assert alerts
    assert [alert for alert in alerts if f'alertname="{alert}"' not in fired] == []
