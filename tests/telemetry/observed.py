"""The series that the dashboard and the rules ask for, and those that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from deploy.watch.promql import promql
from deploy.watch.rows import ROWS
from gateway.telemetry import metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
_SUFFIXES = {
    "counter": ["_total"],
    "gauge": [""],
    "histogram": ["_bucket", "_sum", "_count"],
}
# The labels that Prometheus adds to every series, and the metrics that its client library counts of the process.
_LABELS = {"job", "instance"}
_PROCESS = {
    *("up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"),
    "process_start_time_seconds",
}
_WORDS = {"by", "on", "and", "or", "unless", "group_left", "group_right", "ignoring", "without", "bool"}
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


def expressions() -> list[str]:
    """Return every expression of Grafana's dashboard."""
    return [promql(series.expression) for row in ROWS for panel in row.panels for series in panel.series]


def rules() -> list[dict[str, Any]]:
    """Return the recording and alert rules, in the order of their file."""
    content = YAML(typ="safe").load(PROMETHEUS / "rules.yml")
    return [rule for group in content["groups"] for rule in group["rules"]]


def series() -> dict[str, set[str]]:
    """Return every series that a query can use, with its labels."""
    known = dict.fromkeys(_PROCESS, _LABELS)
    for metric in metrics.declared():
        for suffix in _SUFFIXES[metric.kind]:
            bucket = {"le"} if suffix == "_bucket" else set()
            known[metric.name + suffix] = {*metric.labels, *bucket, *_LABELS}
    for rule in rules():
        if "record" in rule:
            known[rule["record"]] = {"job"}
    return known


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each series that an expression asks for, with the labels that it selects by."""
    text = re.sub(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)|\[[^\]]*\]", " ", expression)
    for match in _SELECTOR.finditer(text):
        name, selector = match[1], match[2]
        is_function = re.match(rf"{re.escape(name)}\s*\(", text[match.start() :])
        if selector is None and (name in _WORDS or is_function):
            continue
        yield name, set(_MATCHER.findall(selector or ""))


def grouped(expression: str) -> Iterator[tuple[set[str], str]]:
    """Yield the labels that an expression groups or joins by, each with the part whose series must have them.

    That is the text in parentheses, as in ``sum by (label) (part)``, and for a join the whole expression.
    """
    for match in re.finditer(r"\b(by|without|on|ignoring)\s*\(([^)]*)\)\s*", expression):
        labels = {label.strip() for label in match[2].split(",") if label.strip()}
        is_join = match[1] in {"on", "ignoring"}
        yield labels, expression if is_join else _parenthesized(expression[match.end() :])


def _parenthesized(text: str) -> str:
    """Return the text between the opening parenthesis that it begins with and the matching one."""
    assert text.startswith("("), f"written as `sum by (label) (part)`, not with the labels behind: {text}"
    depth = 0
    for end, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[1:end]
    raise AssertionError(f"no closing parenthesis: {text}")
