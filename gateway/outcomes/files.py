"""Read exposures and outcomes from the files of several replicas."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import structlog

from gateway.config.files import open_regular
from gateway.config.registry import Experiment
from gateway.errors import StartError
from gateway.experiments.arms import Generation
from gateway.experiments.exposures import Exposure, now, read_exposures
from gateway.experiments.outcome_report import OutcomesReport
from gateway.experiments.split import Split
from gateway.experiments.tally import add_tally
from gateway.outcomes.declarations import UNKNOWN, first_declared, is_declared, note
from gateway.outcomes.joining import Branch, Exposures, Outcomes, signed
from gateway.outcomes.reading import Seen, read_csv
from gateway.outcomes.served import Served, changes_of, read_served, why_models_changed
from gateway.outcomes.store import Decision, NewOutcome, Reader
from gateway.outcomes.traffic import read_tally
from gateway.outcomes.verdicts import branches_of, no_decisions, report_outcomes

log = structlog.get_logger(__name__)

_MAGIC = b"SQLite format 3\0"
# The clocks of two replicas differ. An outcome that follows at once may be posted to the one whose clock is behind.
_CLOCKS_S = 5.0


def is_store(path: Path) -> bool:
    """Return whether a file is an SQLite database, rather than an exposure log or a CSV file.

    Raises:
        StartError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise StartError(f"the file {path} cannot be read: {error.strerror}") from error


def read_units(paths: Iterable[Path]) -> Iterator[Exposure]:
    """Read the exposures of exposure logs and of files of experiments, one file after the other.

    Raises:
        StartError: a file cannot be read.
    """
    for path in paths:
        if is_store(path):
            with Reader(path) as reader:
                yield from (exposure for _number, exposure in reader.log())
        else:
            yield from read_exposures([path])


def read_changes(paths: Iterable[Path], experiment: str) -> list[Served]:
    """Return when weights and models were served, from files of experiments, in order.

    Raises:
        StartError: a file cannot be read.
    """
    found: list[Served] = []
    for path in dict.fromkeys(path for path in paths if is_store(path)):
        with Reader(path) as reader:
            found += read_served(reader, experiment)
    return sorted(found, key=lambda one: one.time)


def read_requests(paths: Iterable[Path], experiment: str, generation: str) -> Generation:
    """Return the counts of requests under one set of weights in files of experiments; exposure logs have none.

    Raises:
        StartError: a file cannot be read.
    """
    counts = Generation(now())
    for path in dict.fromkeys(path for path in paths if is_store(path)):
        with Reader(path) as reader:
            try:
                add_tally(counts, read_tally(reader, experiment, generation))
            except sqlite3.Error as error:
                raise StartError(f"{path} cannot be read: {error}") from error
    return counts


def report_files(experiment: Experiment, exposures: Sequence[Path], outcomes: Sequence[Path]) -> OutcomesReport:
    """Report the outcomes of an experiment from files, by the rules of a running gateway.

    The verdicts of earlier looks count if all data is from one file of experiments. A replica among several decided about
    its own units, and not about these.

    Args:
        exposures: exposure logs and files of experiments; the outcomes in the latter count too.
        outcomes: CSV files, see :func:`gateway.outcomes.reading.read_csv`, and files of experiments.

    Raises:
        StartError: a file cannot be read, or an outcome is wrong.
    """
    stores = [path for path in dict.fromkeys([*exposures, *outcomes]) if is_store(path)]
    exposed = dict.fromkeys([*exposures, *stores])
    declared: dict[str, float] = {}
    served = read_changes(stores, experiment.id)
    units = replace(_gather(experiment, _note_declared(experiment, exposed, declared)), changes=changes_of(served))
    split, primary = Split(experiment), experiment.outcome.name if experiment.outcome else None
    seen: Seen = {}
    posted = [outcome for path in outcomes if path not in stores for outcome in read_csv(path, split, primary, seen)]
    for path in stores:
        with Reader(path) as reader:
            for one, seconds in first_declared(reader.declarations(experiment.id)).items():
                note(declared, one, seconds)
    undeclared = None if experiment.outcome is None or is_declared(experiment, declared) else _NOT_DECLARED
    is_whole = not posted and len(stores) == 1 and list(exposed) == stores
    return report_outcomes(
        experiment,
        units,
        _by_name(experiment, posted, stores, _CLOCKS_S if len(exposed) > 1 else 0.0),
        time.time(),
        partial(_decisions, stores[0], experiment.id) if is_whole else no_decisions,
        declarations=declared,
        why_none=undeclared or why_models_changed(experiment, served),
    ).report


_NOT_DECLARED = (
    "the files do not say which `outcome` was declared while the units arrived: an earlier version wrote them, or they have "
    "no unit of the experiment"
)


def _note_declared(experiment: Experiment, paths: Iterable[Path], declared: dict[str, float]) -> Iterator[Exposure]:
    """Yield the exposures of files, and note the declarations in those of logs; files of experiments have them elsewhere."""
    for path in paths:
        is_log = not is_store(path)
        for exposure in read_units([path]):
            if is_log and exposure.experiment == experiment.id:
                note(declared, exposure.declared or UNKNOWN, datetime.fromisoformat(exposure.time).timestamp())
            yield exposure


def _decisions(path: Path, experiment: str, question: str) -> Mapping[str, Decision]:
    with Reader(path) as reader:
        return reader.decisions(experiment, question)


def _gather(experiment: Experiment, found: Iterable[Exposure]) -> Exposures:
    """Return the first exposure of each unit in each branch, in the order of their times."""
    branches = branches_of(experiment, Split(experiment).generation)
    places = {(branch.generation, branch.arm): place for place, branch in enumerate(branches)}
    tasks = {(arm.label, arm.model): arm.task for arm in experiment.arms}
    first: dict[tuple[int, int], float] = {}
    for exposure in found:
        if exposure.experiment != experiment.id:
            continue
        place = places.get((exposure.generation, exposure.arm))
        if place is None:
            if exposure.share is None:  # of an earlier version: the weights of other generations are not known
                continue
            place = places[exposure.generation, exposure.arm] = len(branches)
            branches.append(
                Branch(
                    exposure.generation,
                    exposure.arm,
                    exposure.model,
                    tasks.get((exposure.arm, exposure.model)),
                    exposure.share,
                )
            )
        key, seconds = (signed(exposure.unit), place), datetime.fromisoformat(exposure.time).timestamp()
        first[key] = min(first.get(key, seconds), seconds)
    pairs = sorted(first.items(), key=lambda pair: pair[1])
    unit, branch = (np.array([key[i] for key, _ in pairs], np.int64) for i in (0, 1))
    return Exposures(branches, unit, branch, np.array([seconds for _, seconds in pairs], np.float64))


_Row: TypeAlias = tuple[int, float, float, float, bool]


def _by_name(
    experiment: Experiment, posted: Sequence[NewOutcome], stores: Sequence[Path], clocks_s: float
) -> dict[str, Outcomes]:
    """Return the outcomes by name, each key once, as it was first posted; log the keys of different outcomes.

    Args:
        clocks_s: the seconds by which the clock of a replica may be behind that of another.
    """
    found: dict[str, dict[bytes, _Row]] = {}
    num_different = 0
    for name, key, row in _rows(experiment, posted, stores, clocks_s):
        known = found.setdefault(name, {}).setdefault(key, row)
        num_different += _content(known) != _content(row)
        found[name][key] = min(known, row, key=lambda one: one[3])
    if num_different:
        log.warning("outcomes_with_the_id_of_another", experiment=experiment.id, outcomes=num_different)
    kinds = (np.int64, np.float64, np.float64, np.float64, np.bool_)
    return {
        name: Outcomes(*(np.array(c, kind) for c, kind in zip(zip(*rows.values(), strict=True), kinds, strict=True)))
        for name, rows in found.items()
    }


def _rows(
    experiment: Experiment, posted: Sequence[NewOutcome], stores: Sequence[Path], clocks_s: float
) -> Iterator[tuple[str, bytes, _Row]]:
    """Yield the name, the key and the values of each outcome."""
    for outcome in posted:
        yield outcome.name, outcome.key, (outcome.unit, outcome.value, outcome.of, outcome.time, outcome.is_before)
    for path in stores:
        with Reader(path) as reader:
            for name in reader.names(experiment.id):
                kept, keys = reader.outcomes(experiment.id, name)
                columns = (kept.unit, kept.value, kept.of, kept.time + clocks_s, kept.is_before)
                for key, row in zip(keys, zip(*(column.tolist() for column in columns), strict=True), strict=True):
                    yield name, key, row


def _content(row: _Row) -> tuple[object, ...]:
    """Return an outcome without its time, at which it may have been sent again."""
    unit, value, of, _time, is_before = row
    return unit, value, of, is_before
