"""When which weights were served, and which models answered for the arms: one row for each change."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gateway.config.registry import Arm, Experiment
from gateway.experiments.exposures import iso
from gateway.experiments.split import Split, has_same_salt
from gateway.outcomes.declarations import RELOAD_S
from gateway.outcomes.joining import Changes
from gateway.outcomes.store import Reader, Store

_SCHEMA = """
CREATE TABLE IF NOT EXISTS served (
    id INTEGER PRIMARY KEY, experiment TEXT NOT NULL, generation TEXT NOT NULL, time REAL NOT NULL, spaces TEXT NOT NULL)
"""

Spaces = Mapping[str, str]
"""The space of each arm whose model is known, by :func:`name_of`."""


@dataclass(frozen=True, slots=True)
class Served:
    """Weights and models, and the time in seconds since the epoch from which they were served."""

    time: float
    generation: str
    spaces: Spaces


def name_of(arm: Arm) -> str:
    """Return a text that identifies an arm with its model and task."""
    return json.dumps([arm.label, arm.model, arm.task])


def note_served(store: Store, experiment: str, served: Served) -> None:
    """Store the weights and models that are served, if they are others than those of the last row.

    Raises:
        StoreFull, StoreBusy: they could not be written.
    """
    with store.writing() as db:
        db.execute(_SCHEMA)
        last = _rows(db, experiment, "ORDER BY id DESC LIMIT 1")
        # The space of a model that is not known yet may be in the last row, but not in one of other weights: if the salt
        # is another too, that model was never part of this experiment.
        is_same = bool(last) and last[0].generation == served.generation
        spaces = {**(last[0].spaces if is_same else {}), **served.spaces}
        if not last or (served.generation, spaces) != (last[0].generation, last[0].spaces):
            row = (experiment, served.generation, served.time, json.dumps(spaces, sort_keys=True))
            db.execute("INSERT INTO served (experiment, generation, time, spaces) VALUES (?, ?, ?, ?)", row)


def read_served(reader: Reader, experiment: str) -> list[Served]:
    """Return the changes in order; an empty list for a file of an earlier version.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    if not reader.db.execute("PRAGMA table_info(served)").fetchall():
        return []
    return _rows(reader.db, experiment, "ORDER BY time, id")


def _rows(db: sqlite3.Connection, experiment: str, order: str) -> list[Served]:
    query = f"SELECT time, generation, spaces FROM served WHERE experiment = ? {order}"  # noqa: S608  constants
    return [
        Served(seconds, generation, json.loads(spaces))
        for seconds, generation, spaces in db.execute(query, (experiment,))
    ]


def changes_of(served: Iterable[Served]) -> Changes:
    """Return the times at which weights began to be served."""
    ordered = sorted(served, key=lambda one: one.time)
    return Changes(np.array([one.time for one in ordered], np.float64), [one.generation for one in ordered])


def why_models_changed(experiment: Experiment, served: Sequence[Served]) -> str | None:
    """Return why nothing can be decided: under the id of an arm's model, another model was served since the counts began."""
    generation = Split(experiment).generation
    since = -np.inf if experiment.counts_from is None else experiment.counts_from.timestamp()
    ends = [*(one.time for one in served), np.inf][1:]
    counted = [
        one
        for one, end in zip(served, ends, strict=True)
        if has_same_salt(one.generation, generation) and (one.time >= since or end > since + RELOAD_S)
    ]
    for arm in experiment.arms:
        known = [(one.time, one.spaces[name_of(arm)]) for one in counted if name_of(arm) in one.spaces]
        for (_, before), (changed_at, after) in pairwise(known):
            if before.rpartition("@")[2] != after.rpartition("@")[2]:  # the hash alone counts
                return (
                    f"the model of arm {arm.label!r} changed on {iso(changed_at)[:10]}: {arm.model!r} returned vectors of "
                    f"space {before} before, and of {after} since, so the figures are those of two models: count again"
                )
    return None
