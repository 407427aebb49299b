"""Merge the metrics of several processes into one page, each with a label that names its replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LABEL = "replica"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(slots=True)
class _Family:
    """A metric: its help and its type once, and the samples of all processes."""

    head: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge(pages: Mapping[str, str]) -> str:
    """Return the metrics of all replicas as one page in Prometheus' text format.

    Lines are edited as text, because parsing and writing a hundred pages of a thousand lines each would take seconds.

    Args:
        pages: the result of :func:`gateway.telemetry.metrics.render` in each replica, by replica.
    """
    families: dict[str, _Family] = {}
    for replica, page in pages.items():
        label = f'{LABEL}="{replica.translate(_ESCAPES)}"'
        family = _Family()
        for line in page.splitlines():
            if line.startswith("#"):
                _, kind, name = line.split(" ", 3)[:3]
                family = families.setdefault(name, _Family())
                family.head.setdefault(kind, line)
            elif line:
                family.samples.append(_labeled(line, label))
    lines = [line for family in families.values() for line in (*family.head.values(), *family.samples)]
    return "".join(f"{line}\n" for line in lines)


def _labeled(sample: str, label: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
