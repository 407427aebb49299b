"""The dashboard and the rules ask for series that exist."""

from __future__ import annotations

import re

import pytest

from deploy.watch import grafana
from deploy.watch.__main__ import stale
from tests.telemetry.observed import ROOT, asked, expressions, grouped, rules, series

EXPRESSIONS = [*expressions(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_series_and_label_exists(expression: str) -> None:
    known = series()
    found = list(asked(expression))

    assert found
    for name, labels in found:
        assert name in known, name
        assert labels <= known[name], name
    for labels, part in grouped(expression):
        for name, _ in asked(part):
            assert labels <= known[name], name


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("gateway_made_up", [("gateway_made_up", set())]),
        ('sum by (a, b) (rate(x_total{c="1",d=~"2"}[5m]))', [("x_total", {"c", "d"})]),
        ("histogram_quantile(0.9, sum by (le) (rate(x_bucket[5m])))", [("x_bucket", set())]),
        ("a:b:c > 0.5 and on (job) up == 0", [("a:b:c", set()), ("up", set())]),
        ('absent(up{job="x"})', [("up", {"job"})]),
    ],
)
def test_the_metrics_of_an_expression_are_found(expression: str, expected: list[tuple[str, set[str]]]) -> None:
    assert list(asked(expression)) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("sum by (a, b) (rate(x[5m])) / sum by (a) (y)", [({"a", "b"}, "rate(x[5m])"), ({"a"}, "y")]),
        ('max(f(x{p=~"(/v1)?/e"})) < on (job) y', [({"job"}, 'max(f(x{p=~"(/v1)?/e"})) < on (job) y')]),
        ("sum(x)", []),
    ],
)
def test_the_groups_of_an_expression_are_found(expression: str, expected: list[tuple[set[str], str]]) -> None:
    assert list(grouped(expression)) == expected


def test_every_metric_of_a_model_is_shown_or_alerts() -> None:
    used = {name for expression in EXPRESSIONS for name, _ in asked(expression)}

    unused = {
        name.removesuffix("_total")
        for name in series()
        if name not in used and not name.endswith(("_sum", "_count", "_bucket"))
    }
    assert unused <= {"gateway_shadow_texts", "gateway_shadow_tokens", "gateway_shadow_queue"}


def test_generated_files_are_up_to_date() -> None:
    assert stale() == []


def test_no_panel_lies_over_another_or_outside_the_grid() -> None:
    panels = grafana.dashboard()["panels"]
    taken: dict[tuple[int, int], str] = {}

    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w-]", "", line.lstrip("# ").lower().replace(" ", "-"))
        for line in page.splitlines()
        if line.startswith("#")
    }
    alerts = [rule for rule in rules() if "alert" in rule]

    assert len(alerts) >= 13
    for rule in alerts:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")
        file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert file == '{{ or $externalLabels.docs "docs" }}/operations.md'
        assert anchor == rule["alert"].lower()
        assert anchor in headings
