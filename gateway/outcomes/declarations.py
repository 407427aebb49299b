"""Check that an experiment's outcome was declared before its results were known. Pure.

If you choose among several outcomes or margins after you know the results, one often shows a difference by chance. No file
can prove when an outcome was chosen. But the files say when a gateway first served each declaration, and when the first
units arrived, by which time it should have been known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

import numpy as np

from gateway.config.registry import Experiment
from gateway.experiments.exposures import iso
from gateway.experiments.split import declaration_of, hash_of_declaration
from gateway.outcomes.joining import Exposures, Outcomes

Declared = Mapping[str, float]
"""When each declaration was first served, by its hash; `UNKNOWN` has the first time at which none was recorded."""

UNKNOWN = ""
RELOAD_S = 900.0
"""A gateway serves a new `counts_from` a little later than the time in it, at most by this."""


def first_declared(rows: Iterable[tuple[str, str, str]]) -> dict[str, float]:
    """Return when each declaration was first served.

    Args:
        rows: the two texts of each declaration, see :func:`gateway.experiments.split.declaration_of`, and a time.
    """
    found: dict[str, float] = {}
    for every, this, when in rows:
        note(found, hash_of_declaration(every, this), datetime.fromisoformat(when).timestamp())
    return found


def note(declared: dict[str, float], one: str, seconds: float) -> None:
    """Note a time at which a declaration was served."""
    declared[one] = min(declared.get(one, seconds), seconds)


def is_declared(experiment: Experiment, declared: Declared) -> bool:
    """Return whether any declaration is known under the experiment's present salt and `counts_from`."""
    return bool(_here(declared, hash_of_declaration(*declaration_of(experiment))))


def why_too_late(
    experiment: Experiment, exposures: Exposures, posted: Outcomes, declared: Declared, now: float
) -> str | None:
    """Return why an outcome cannot decide: it was declared, or its definition changed, when its results were known."""
    if not declared:
        return None
    present = hash_of_declaration(*declaration_of(experiment))
    here = _here(declared, present)
    since = here.get(present, now)
    if {_definition(one) for one in declared} == {_definition(present)}:  # counting again changes no definition
        since = min(declared.values())
    began = float(exposures.time.min(initial=since))
    if since <= min(here.values(), default=since) and since <= began + RELOAD_S:
        return None
    has_no_time = np.isinf(posted.time)  # rows of a file, which may be from any time
    num_known = int((((posted.time < since) | has_no_time) & ~posted.is_before).sum())
    if not num_known:
        return None
    add_times = "; with a column `time`, later outcomes are recognized" if has_no_time.any() else ""
    if any(seconds < since for one, seconds in declared.items() if one != UNKNOWN):
        return (
            f"`outcome` in models.yaml was changed by {iso(since)[:10]}, after {num_known:,} of its outcomes had been "
            f"posted: change it back, or count again, so that only later outcomes count{add_times}"
        )
    return (
        f"the declared `outcome` is known only since {iso(since)[:10]}, and {num_known:,} of its outcomes may have been "
        f"known before that: count again, so that only later outcomes count{add_times}"
    )


def _here(declared: Declared, present: str) -> Declared:
    """Return the declarations under the present salt and begin of the counts."""
    of_all = present.partition(".")[0]
    return {one: seconds for one, seconds in declared.items() if one.partition(".")[0] == of_all}


def _definition(declared: str) -> str:
    return declared.partition(".")[2]
