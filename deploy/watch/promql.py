"""Writes the expressions of panels in Prometheus' language."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from deploy.watch.expressions import Expression, Increase, Level, Mean, Present, Quantile, Rate, Share, Where

_RANGES: Final = {"auto": "$__rate_interval", "shown": "$__range", "5m": "5m"}


def promql(expression: Expression) -> str:
    """Return an expression for Grafana, with its variables ``$__rate_interval``, ``$__range`` and ``$model``."""
    if isinstance(expression, Mean):
        sums, counts = (Rate(f"{expression.metric}_{end}", expression.by, expression.where) for end in ("sum", "count"))
        expression = Share(sums, counts)
    match expression:
        case Rate(metric, by, where, over):
            return f"{_sum(by)}(rate({metric}{_selector(where)}[{_RANGES[over]}]))"
        case Increase(metric, by, where):
            return f"{_sum(by)}(increase({metric}{_selector(where)}[$__rate_interval]))"
        case Level(metric, by, where, how):
            return f"{_sum(by, how)}({metric}{_selector(where)})"
        case Present(metric, _, where):
            return f"{metric}{_selector(where)} == 1"
        case Quantile(share, metric, by, where):
            buckets = promql(Rate(f"{metric}_bucket", (*by, "le"), where))
            return f"histogram_quantile({share:g}, {buckets})"
        case Share(part, whole, is_rest):
            return _share(part, whole, is_rest=is_rest)


def _share(part: Rate, whole: Rate, *, is_rest: bool) -> str:
    top, bottom = promql(part), promql(whole)
    if not is_rest:
        return f"{top} / {bottom}"
    # One number, also while nothing has failed and the numerator has no series. Series by labels have no such default.
    return f"1 - {top} / {bottom}" if part.by else f"1 - ({top} or vector(0)) / ({bottom} > 0)"


def _sum(by: tuple[str, ...], how: str = "sum") -> str:
    return f"{how} by ({', '.join(by)}) " if by else how


def _selector(where: Iterable[Where]) -> str:
    conditions = ",".join(_condition(condition) for condition in where)
    return f"{{{conditions}}}" if conditions else ""


def _condition(where: Where) -> str:
    if not where.values:
        return f'{where.label}!=""'
    is_exact = len(where.values) == 1 and not {"*", "$"} & set(where.values[0])
    if is_exact:
        return f'{where.label}{"!=" if where.is_not else "="}"{where.values[0]}"'
    pattern = "|".join(value.replace("*", ".*") for value in where.values)
    return f'{where.label}{"!~" if where.is_not else "=~"}"{pattern}"'
