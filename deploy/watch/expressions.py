"""The expressions that panels show, in no query language.

``promql.py`` and ``datadog_query.py`` write them in the languages of Prometheus and Datadog. Metrics have the names that
Prometheus knows, such as ``gateway_texts_total``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class Where:
    """A condition on a label.

    Args:
        values: the label has one of them. ``*`` in a value matches any text. None at all: the label is not empty.
        is_not: the label has none of them.
    """

    label: str
    values: tuple[str, ...] = ()
    is_not: bool = False


MODEL = Where("model", ("$model",))
"""The model, or all models, that the reader of the dashboard has chosen."""
EMBEDDINGS = Where("path", ("/v1/embeddings", "/embeddings"))
FAULTS = Where("status", ("5*",))
"""Requests that failed because of the gateway, not because of their content."""
IN_EXPERIMENTS = Where("experiment")
OF_GATEWAY = Where("job", ("gateway",))
"""For Prometheus, where every program has metrics of its process."""
NOT_OK = Where("outcome", ("ok",), is_not=True)


@dataclass(frozen=True)
class Rate:
    """The increase of a counter per second; of a histogram's sum or count, too.

    Args:
        by: the labels of the series that are shown; without any, all are added up.
        over: the time that a value is the mean of. ``auto`` follows the width of the plot, ``shown`` is all the time shown.
    """

    metric: str
    by: tuple[str, ...] = ()
    where: tuple[Where, ...] = (MODEL,)
    over: Literal["auto", "shown", "5m"] = "auto"


@dataclass(frozen=True)
class Increase:
    """The increase of a counter, for events that are rare."""

    metric: str
    by: tuple[str, ...] = ()
    where: tuple[Where, ...] = (MODEL,)


@dataclass(frozen=True)
class Level:
    """The value of a gauge, series with the same labels put together by ``how``."""

    metric: str
    by: tuple[str, ...] = ()
    where: tuple[Where, ...] = (MODEL,)
    how: Literal["sum", "max", "min"] = "sum"


@dataclass(frozen=True)
class Present:
    """The series of a gauge of zeros and ones that are 1."""

    metric: str
    by: tuple[str, ...]
    where: tuple[Where, ...] = (MODEL,)


@dataclass(frozen=True)
class Quantile:
    """A quantile of a histogram."""

    share: float
    metric: str
    by: tuple[str, ...] = ()
    where: tuple[Where, ...] = (MODEL,)


@dataclass(frozen=True)
class Mean:
    """The mean of a histogram."""

    metric: str
    by: tuple[str, ...] = ()
    where: tuple[Where, ...] = (MODEL,)


@dataclass(frozen=True)
class Share:
    """A rate as a share of another, or the rest of it."""

    part: Rate
    whole: Rate
    is_rest: bool = False


Expression: TypeAlias = Rate | Increase | Level | Present | Quantile | Mean | Share


@dataclass(frozen=True)
class Series:
    """A drawn expression, and the name of each of its lines, with labels in braces: ``{model} limit``."""

    expression: Expression
    name: str = ""


@dataclass(frozen=True)
class Panel:
    """A plot, or with ``kind="number"`` a number, or with ``kind="table"`` the labels of an info metric.

    Args:
        unit: ``none``, ``per_second`` (of requests), ``seconds``, ``share`` (1 is all) or ``bytes``.
        width: in columns, of 24.
        thresholds: for a number: the values from which on it has a color, the first from ``None`` on.
    """

    title: str
    series: Sequence[Series]
    unit: Literal["none", "per_second", "seconds", "share", "bytes"] = "none"
    kind: Literal["plot", "number", "table"] = "plot"
    description: str = ""
    width: int = 8
    is_stacked: bool = False
    thresholds: tuple[tuple[float | None, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """Panels under a title."""

    title: str
    panels: Sequence[Panel]


def quantiles(of: Quantile, *shares: float) -> list[Series]:
    """Return some quantiles of a histogram, p50, p95 and p99 by default; the share of ``of`` does not matter."""
    labels = " ".join(f"{{{label}}}" for label in of.by)
    return [
        Series(replace(of, share=share), f"{labels} p{round(100 * share)}".strip())
        for share in shares or (0.5, 0.95, 0.99)
    ]
