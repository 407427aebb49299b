"""Whether an experiment's outcome was declared before its results were known. Pure.

Of several outcomes or margins, one often shows a difference by chance, so it must be chosen before. No file can prove that;
the files of an experiment say when a gateway first served each declaration, and the earliest units say since when it
should have been known.
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
"""When each declaration was first served, by its hash; under an empty text, when it was first not known."""

UNKNOWN = ""
_RELOAD_S = 900.0  # counts begin at a time in a file, which is served a little later


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
    """Return whether any declaration is known of the time in which the experiment's units count."""
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
    if since <= min(here.values(), default=since) and since <= began + _RELOAD_S:
        return None
    has_no_time = np.isinf(posted.time)  # rows of a file, which may be from any time
    num_known = int((((posted.time < since) | has_no_time) & ~posted.is_before).sum())
    if not num_known:
        return None
    add_times = "; with a column `time`, later outcomes are recognized" if has_no_time.any() else ""
    if any(seconds < since for one, seconds in declared.items() if one != UNKNOWN):
        return (
            f"`outcome` in models.yaml was changed by {iso(since)[:10]}, after {num_known:,} of its outcomes had been "
            f"posted: change it back, or count again to use later outcomes alone{add_times}"
        )
    return (
        f"which `outcome` was declared is known only from {iso(since)[:10]} on, and {num_known:,} of its outcomes may have "
        f"been known before: count again to use later outcomes alone{add_times}"
    )


def _here(declared: Declared, present: str) -> Declared:
    """Return the declarations under the present salt and begin of the counts."""
    of_all = present.partition(".")[0]
    return {one: seconds for one, seconds in declared.items() if one.partition(".")[0] == of_all}


def _definition(declared: str) -> str:
    return declared.partition(".")[2]
