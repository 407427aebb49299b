"""Writes the expressions of panels in Datadog's language: queries, and a formula over them.

https://docs.datadoghq.com/dashboards/querying/ and, for conditions, https://docs.datadoghq.com/metrics/advanced-filtering/.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from deploy.watch.expressions import Expression, Increase, Level, Mean, Present, Quantile, Rate, Share, Where
from deploy.watch.names import datadog_metric, datadog_tag

DASHBOARD_SCOPE: Final = ("$env", "$service")
"""The choices of a dashboard's reader."""


@dataclass(frozen=True)
class Formula:
    """Queries, each named by a letter, and a formula of these letters."""

    formula: str
    queries: tuple[str, ...]


def formula(expression: Expression, scope: Iterable[str] = DASHBOARD_SCOPE) -> Formula:
    """Return an expression for Datadog, of the series that ``scope`` selects."""
    match expression:
        case Share(part, whole, is_rest):
            share = "default_zero(a) / b" if not part.by else "a / b"
            return Formula(f"1 - {share}" if is_rest else share, (query(part, scope), query(whole, scope)))
        case Present():
            return Formula("cutoff_min(a, 1)", (query(expression, scope),))
        case _:
            return Formula("a", (query(expression, scope),))


def query(
    expression: Rate | Increase | Level | Present | Quantile | Mean, scope: Iterable[str] = DASHBOARD_SCOPE
) -> str:
    """Return the query of an expression that needs no formula."""
    name = datadog_metric(expression.metric)
    match expression:
        case Rate():
            aggregation, suffix = "sum", ".as_rate()"
        case Increase():
            aggregation, suffix = "sum", ".as_count()"
        case Level():
            aggregation, suffix = expression.how, ""
        case Present():
            aggregation, suffix = "max", ""
        case Quantile():
            aggregation, suffix = f"p{100 * expression.share:g}", ""
        case Mean():
            aggregation, suffix = "avg", ""
    return f"{aggregation}:{name}{{{conditions(scope, expression.where)}}}{_by(expression.by)}{suffix}"


def conditions(scope: Iterable[str], where: Iterable[Where]) -> str:
    """Return the text between the braces of a query. Prometheus' label ``job`` is Datadog's namespace."""
    return " AND ".join([*scope, *(_condition(condition) for condition in where if condition.label != "job")])


def _by(labels: tuple[str, ...]) -> str:
    return f" by {{{','.join(datadog_tag(label) for label in labels)}}}" if labels else ""


def _condition(where: Where) -> str:
    tag = datadog_tag(where.label)
    if not where.values:
        return f"{tag}:*"  # an empty label becomes a tag without a value, which this does not match
    if where.values[0].startswith("$"):
        return where.values[0]
    if len(where.values) == 1:
        return f"{'NOT ' if where.is_not else ''}{tag}:{where.values[0]}"
    return f"{tag} {'NOT IN' if where.is_not else 'IN'} ({','.join(where.values)})"
