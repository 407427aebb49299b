"""Reads the part of Datadog's query language that the dashboard, the monitors and the objectives use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deploy.watch.names import NAMESPACE, datadog_tag
from gateway.telemetry import metrics

AGENT_TAGS = frozenset({"service", "env", "version", "instance", "host"})
"""The tags that the Agent adds to every metric, by its settings."""
_QUERY = re.compile(
    r"(?P<aggregation>sum|avg|min|max|count|p\d+(?:\.\d+)?|count\(v: v(?:<=|<|>=|>)\d+(?:\.\d+)?\)):"
    r"(?P<metric>[a-z][\w.]*)"
    r"\{(?P<scope>[^}]*)\}"
    r"(?: by \{(?P<by>[^}]*)\})?"
    r"(?P<functions>(?:\.\w+\(\))*)"
)
_ATOM = re.compile(r"(?:NOT )?([a-z_]+):([^\s,(){}!]+)|([a-z_]+) (?:NOT )?IN \(([^()]+)\)")
_FUNCTIONS = {"default_zero", "cutoff_min", "clamp_max", "diff"}
_MONITOR = re.compile(
    r"(?P<how>sum|min|max|avg)\(last_(?P<time>\d+[mhd])\):(?P<expression>.*) (?P<sign>>=|<=|>|<) (?P<limit>\S+)"
)


class NotAQuery(Exception):
    """Datadog would refuse it, or return nothing for it."""


@dataclass(frozen=True)
class Metric:
    """A metric that Datadog has."""

    kind: Literal["count", "gauge", "distribution"]
    tags: frozenset[str]


@dataclass(frozen=True)
class Asked:
    """One query of an expression."""

    aggregation: str
    metric: str
    scope: tuple[tuple[str, tuple[str, ...]], ...]
    by: tuple[str, ...]
    functions: tuple[str, ...]
    variables: frozenset[str]


def known_metrics() -> dict[str, Metric]:
    """Return the metrics that the Agent makes of those that the gateway declares, and of its process."""
    found = {
        f"{NAMESPACE}.process_{name}": Metric("gauge", AGENT_TAGS)
        for name in ("virtual_memory_bytes", "resident_memory_bytes", "start_time_seconds", "open_fds", "max_fds")
    }
    found[f"{NAMESPACE}.process_cpu_seconds.count"] = Metric("count", AGENT_TAGS)
    for declared in metrics.declared():
        name = f"{NAMESPACE}.{declared.name.removeprefix('gateway_')}"
        tags = AGENT_TAGS | {datadog_tag(label) for label in declared.labels}
        match declared.kind:
            case "counter":
                found[f"{name}.count"] = Metric("count", tags)
            case "gauge":
                found[name] = Metric("gauge", tags)
            case "histogram":
                found |= {f"{name}.count": Metric("count", tags), f"{name}.sum": Metric("count", tags)}
                found[name] = Metric("distribution", tags)
    return found


def queries(expression: str) -> list[Asked]:
    """Return the queries of an expression: arithmetic and functions over queries.

    Raises:
        NotAQuery: it is something else.
    """
    found: list[Asked] = []

    def read(match: re.Match[str]) -> str:
        found.append(_asked(match))
        return f"q{len(found)}"

    names = _QUERY.sub(read, expression)
    _check_arithmetic(names, {f"q{number}" for number in range(1, len(found) + 1)})
    return found


def _check_arithmetic(text: str, names: set[str]) -> None:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise NotAQuery(text) from error
    for node in ast.walk(tree.body):
        match node:
            case ast.Name(name) if name in names or name in _FUNCTIONS:
                pass
            case ast.Call(ast.Name(), _, []) | ast.BinOp() | ast.Constant(int() | float()):
                pass
            case ast.operator() | ast.Load():
                pass
            case _:
                raise NotAQuery(f"{ast.unparse(node)} in {text}")


def formula_names(formula: str, names: set[str]) -> None:
    """Check a formula over queries with these names.

    Raises:
        NotAQuery: it has another name, or is not arithmetic.
    """
    _check_arithmetic(formula, names)


def _asked(match: re.Match[str]) -> Asked:
    scope, variables = [], set()
    for atom in match["scope"].split(" AND "):
        if atom.startswith("$"):
            variables.add(atom[1:])
        elif (found := _ATOM.fullmatch(atom)) is None:
            raise NotAQuery(f"{atom!r} in {match[0]}")
        else:
            scope.append((found[1] or found[3], tuple((found[2] or found[4]).split(","))))
    by = tuple((match["by"] or "").split(",")) if match["by"] else ()
    functions = tuple(re.findall(r"\.(\w+)\(", match["functions"]))
    return Asked(match["aggregation"], match["metric"], tuple(scope), by, functions, frozenset(variables))


def check(asked: Asked) -> None:
    """Compare a query with the metrics of the gateway.

    Raises:
        NotAQuery: the metric or a tag does not exist, or cannot be asked in this way.
    """
    metric = known_metrics().get(asked.metric)
    if metric is None:
        raise NotAQuery(f"there is no {asked.metric}")
    unknown = {key for key, _ in asked.scope} | set(asked.by)
    if unknown := unknown - metric.tags:
        raise NotAQuery(f"{asked.metric} has no {unknown}")
    is_of_values = asked.aggregation[0] == "p" or "(" in asked.aggregation or asked.aggregation == "count"
    if is_of_values and metric.kind != "distribution":
        raise NotAQuery(f"{asked.aggregation} of {asked.metric}, which is not a distribution")
    is_counted = bool({"as_rate", "as_count"} & set(asked.functions))
    must_be_counted = metric.kind == "count" or asked.aggregation.startswith("count")
    if is_counted != must_be_counted:
        raise NotAQuery(f"{asked.metric}: as_count() or as_rate() is for counts, and always for them")
    if metric.kind == "count" and asked.aggregation != "sum":
        raise NotAQuery(f"{asked.aggregation} of {asked.metric}, a count")


@dataclass(frozen=True)
class Condition:
    """The comparison of a metric monitor: its value, its time window, and its threshold."""

    how: str
    minutes: int
    expression: str
    sign: str
    limit: float


def condition(query: str) -> Condition:
    """Read the query of a metric monitor.

    Raises:
        NotAQuery: it is something else, or over a time that Datadog does not take.
    """
    match = _MONITOR.fullmatch(query)
    if match is None:
        raise NotAQuery(query)
    minutes = int(match["time"][:-1]) * {"m": 1, "h": 60, "d": 1440}[match["time"][-1]]
    if not 1 <= minutes <= 10_080:
        raise NotAQuery(query)
    return Condition(match["how"], minutes, match["expression"], match["sign"], float(match["limit"]))


def dashboard_queries(widgets: list[dict[str, object]]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield the title, formula and queries by name of each line that the widgets draw, those in groups too."""
    for widget in widgets:
        definition = widget["definition"]
        assert isinstance(definition, dict)
        yield from dashboard_queries(definition.get("widgets", []))
        for request in definition.get("requests", []):
            named = {query["name"]: query["query"] for query in request.get("queries", [])}
            for formula in request.get("formulas", []):
                yield definition["title"], formula["formula"], named
