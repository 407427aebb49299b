"""Keep exposures and outcomes while requests are answered; all work that waits for the disk runs in a thread."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import structlog

from gateway.config.registry import Experiment
from gateway.errors import OutcomesUnavailable, StartError
from gateway.experiments.exposures import Exposure, iso
from gateway.experiments.outcome_report import OutcomesReport
from gateway.experiments.split import Split, declaration_of, hash_of_declaration
from gateway.outcomes.declarations import first_declared
from gateway.outcomes.served import Served, Spaces, changes_of, name_of, note_served, read_served, why_models_changed
from gateway.outcomes.store import DECLARED, FILE_NAME, Decision, Kept, NewOutcome, Reader, Store, StoreBusy, StoreFull
from gateway.outcomes.traffic import Traffic
from gateway.outcomes.verdicts import Reported, branches_of, report_outcomes
from gateway.telemetry import metrics

log = structlog.get_logger(__name__)
T = TypeVar("T")

# About 30 MB. When this many exposures wait for a file that cannot be written, further exposures are lost.
_MAX_WAITING = 100_000
_SECONDS_BETWEEN_WARNINGS = 60.0
_PATIENCE_S = 30.0
_MAX_AGE_S = 10.0
# A report is renewed after this many times the time it took to compute, so reports of few units are never old.
_AGE_PER_COMPUTING = 100
_MAX_READ_AT_ONCE = 20_000
_MAX_REPORTS = 20


class Keeper:
    """One file of experiments, for one process.

    Args:
        folder: the folder in which ``experiments.sqlite3`` is, or will be created.
        experiments: returns the experiments that are served now.
        spaces: returns the space of each arm of an experiment whose model is known.
        since: returns when this process began to serve the present weights of an experiment, in seconds since the epoch.

    Raises:
        StartError: the file cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        experiments: Callable[[], Sequence[Experiment]],
        spaces: Callable[[Experiment], Mapping[str, str]] = lambda _experiment: {},
        since: Callable[[Experiment], float] = lambda _experiment: time.time(),
    ) -> None:
        self._store = Store(folder / FILE_NAME, max_bytes)
        self._experiments = experiments
        self._spaces = spaces
        self._since = since
        self._thread = ThreadPoolExecutor(1, "outcomes")
        # Not the threads that the rest of the gateway shares: with a disk that hangs, each report would block one.
        self._reading = ThreadPoolExecutor(1, "outcomes-read")
        self._waiting: deque[Exposure] = deque()
        self._writing: Future[None] | None = None
        self._declared: set[tuple[str, str]] = set()
        self._served: dict[str, tuple[str, Spaces]] = {}
        self._noted: set[tuple[str, str, str]] = set()
        self._warned_at = -_SECONDS_BETWEEN_WARNINGS
        # The last report of each experiment, with the time at which to renew it and the state that it was computed
        # from.
        self._reports: dict[str, tuple[float, tuple[object, ...], OutcomesReport]] = {}
        self._computing = threading.Lock()
        self._num_read = 0
        self._declare_or_warn()
        self.traffic = Traffic(self._store, self._thread, self._declare)

    def read_log(self) -> list[Exposure]:
        """Return some of the exposures added since the last call, by this or another process; an empty list at the end.

        Raises:
            StartError: the file cannot be read.
        """
        with Reader(self._store.path) as reader:
            try:
                found = list(islice(reader.log(self._num_read), _MAX_READ_AT_ONCE))
            except sqlite3.Error as error:  # the file is damaged further on
                raise StartError(
                    f"{self._store.path} cannot be read: {error}; move it away to start with a new one"
                ) from error
        self._num_read = max([self._num_read, *(number for number, _exposure in found)])
        return [exposure for _number, exposure in found]

    async def read_new(self) -> list[Exposure]:
        """Run :meth:`read_log` in a thread.

        Raises:
            OutcomesUnavailable: the file cannot be read now.
        """
        try:
            return await self._in_reader(self.read_log)
        except (sqlite3.Error, StartError) as error:
            raise _unreadable() from error

    def offer(self, exposure: Exposure) -> None:
        """Queue an exposure to be kept. Never waits: if the disk cannot keep up, the exposure is lost and counted."""
        if len(self._waiting) >= _MAX_WAITING:
            metrics.DROPPED_EXPOSURES.inc()
        else:
            self._waiting.append(exposure)
        if self._writing is None or self._writing.done():
            self._writing = self._thread.submit(self._write_waiting)

    async def post(self, experiment: Experiment, outcomes: Sequence[NewOutcome]) -> Kept:
        """Keep outcomes, and return once they are on the disk.

        Raises:
            OutcomesUnavailable: the file has no room, or cannot be written now.
        """
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.wrap_future(self._thread.submit(self._post, experiment, outcomes))
        except TimeoutError as error:
            raise OutcomesUnavailable(
                f"the disk did not respond in {_PATIENCE_S:g} s, so the outcomes may be stored or not: send them again "
                "with the same ids",
                retry_after_s=5,
            ) from error
        except StoreFull as error:
            raise OutcomesUnavailable(
                f"no outcome was stored: {self._store.path.name} has reached GATEWAY_STATE_MAX_BYTES, or the "
                "disk is full",
                is_permanent=True,
            ) from error
        except StoreBusy as error:
            raise OutcomesUnavailable(
                f"no outcome was stored: the file of experiments cannot be written at the moment: {error}",
                retry_after_s=5,
            ) from error

    async def report(self, experiment: Experiment, mismatch: str | None) -> OutcomesReport:
        """Report the outcomes of an experiment; computed at most every 10 s, and only if something was added.

        Args:
            mismatch: the reason why no verdict can be given, if the split is known to be wrong.

        Raises:
            OutcomesUnavailable: the file cannot be read now.
        """
        try:
            await asyncio.wrap_future(self._thread.submit(self._write_all))
            return await self._in_reader(partial(self._report, experiment, mismatch))
        except (sqlite3.Error, StartError) as error:
            raise _unreadable() from error

    async def warnings(self, experiment: Experiment) -> list[str]:
        """Return the reasons, found in the file, why the figures may mean nothing.

        Raises:
            OutcomesUnavailable: the file cannot be read now.
        """

        def find() -> str | None:
            with Reader(self._store.path) as reader:
                return why_models_changed(experiment, read_served(reader, experiment.id))

        try:
            found = await self._in_reader(find)
        except (sqlite3.Error, StartError) as error:
            raise _unreadable() from error
        return [] if found is None else [found]

    async def _in_reader(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    def close(self) -> None:
        """Write the waiting exposures, and close the file."""
        self._reading.shutdown(cancel_futures=True)  # first, because a report writes its decisions
        self._thread.submit(self._write_waiting).result()
        self.traffic.close()
        self._thread.shutdown()
        self._store.close()

    # ------------------------------------------------------------------------------------------------- in a thread

    def _post(self, experiment: Experiment, outcomes: Sequence[NewOutcome]) -> Kept:
        self._declare_or_warn()
        # First, because the exposures that wait may be later than these outcomes.
        self._note_declaration(experiment, min((outcome.time for outcome in outcomes), default=time.time()))
        self._write_waiting()
        return self._store.keep(experiment.id, outcomes, experiment.outcome.name if experiment.outcome else None)

    def _write_all(self) -> None:
        """Write the waiting exposures, and the weights and models that are served, even if no request came."""
        self._declare_or_warn()
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the waiting exposures in transactions; if a transaction fails, the remaining exposures wait on."""
        while self._waiting:
            exposures = [self._waiting[i] for i in range(min(1_000, len(self._waiting)))]
            try:
                if any((one.experiment, one.generation) not in self._declared for one in exposures):
                    self._declare()
                timed = [(exposure, datetime.fromisoformat(exposure.time).timestamp()) for exposure in exposures]
                self._note_declarations(timed)
                self._store.expose(timed)
            except (StoreBusy, StoreFull) as error:
                self._warn(error)
                return
            for _ in exposures:
                self._waiting.popleft()

    def _declare(self) -> None:
        """Store the arms that are served now, so that their exposures can be stored, and since when."""
        for experiment in self._experiments():
            generation, known = Split(experiment).generation, self._spaces(experiment)
            spaces = {name_of(arm): known[arm.label] for arm in experiment.arms if arm.label in known}
            if (experiment.id, generation) not in self._declared:
                self._store.declare(experiment.id, branches_of(experiment, generation))
                self._declared.add((experiment.id, generation))
            if self._served.get(experiment.id) != (generation, spaces):
                self._note_served(experiment, generation, spaces)

    def _declare_or_warn(self) -> None:
        try:
            self._declare()
        except (StoreBusy, StoreFull) as error:  # the gateway serves anyway, and the next call tries again
            self._warn(error)

    def _note_served(self, experiment: Experiment, generation: str, spaces: Spaces) -> None:
        """Store the weights and models that are served; if there is no room, the next call tries again."""
        before, known = self._served.get(experiment.id, ("", {}))
        # A model that was not known before has answered no request of these weights.
        is_first = before != generation or known.items() <= spaces.items()
        served = Served(self._since(experiment) if is_first else time.time(), generation, spaces)
        try:
            note_served(self._store, experiment.id, served)
        except (StoreBusy, StoreFull) as error:  # a full file may still have room for counts and exposures
            self._warn(error)
        else:
            self._served[experiment.id] = generation, spaces

    def _warn(self, error: Exception) -> None:
        if time.monotonic() - self._warned_at > _SECONDS_BETWEEN_WARNINGS:
            self._warned_at = time.monotonic()
            log.error("exposures_not_kept", path=str(self._store.path), reason=str(error))

    def _note_declarations(self, exposures: Sequence[tuple[Exposure, float]]) -> None:
        """Store when exposures first had the present declarations: their outcomes may be in a file, and never posted."""
        first: dict[tuple[str, str | None], float] = {}
        for exposure, moment in exposures:
            key = exposure.experiment, exposure.declared
            first[key] = min(moment, first.get(key, moment))
        for experiment in self._experiments():
            present = experiment.id, hash_of_declaration(*declaration_of(experiment))
            if present in first:
                self._note_declaration(experiment, first[present])

    def _note_declaration(self, experiment: Experiment, now: float) -> None:
        """Store when the declaration of the outcome was first seen, so that a later change is noticed."""
        every, this = declaration_of(experiment)
        key = experiment.id, every, this  # experiments may share a salt
        if key not in self._noted:
            self._store.decide(experiment.id, every, this, Decision(DECLARED, iso(now)))
            self._noted.add(key)

    def _report(self, experiment: Experiment, mismatch: str | None) -> OutcomesReport:
        with self._computing, Reader(self._store.path) as reader:
            served = read_served(reader, experiment.id)
            state = ((reader.state(), len(served)), experiment, mismatch)
            known = self._reports.get(experiment.id)
            if known and (known[1] == state or (known[1][1:] == state[1:] and time.monotonic() < known[0])):
                return known[2]
            began = time.monotonic()
            reported = read_report(reader, experiment, mismatch)
            took_s = time.monotonic() - began
            for (question, arm), decision in reported.decided.items():
                with suppress(StoreBusy, StoreFull):  # the next look decides
                    self._thread.submit(self._store.decide, experiment.id, question, arm, decision).result()
            if len(self._reports) >= _MAX_REPORTS:
                self._reports.clear()
            renewed_at = began + took_s + min(_MAX_AGE_S, _AGE_PER_COMPUTING * took_s)
            self._reports[experiment.id] = (renewed_at, state, reported.report)
            return reported.report


def _unreadable() -> OutcomesUnavailable:
    return OutcomesUnavailable("the file of experiments cannot be read now", retry_after_s=5)


def read_report(reader: Reader, experiment: Experiment, mismatch: str | None = None) -> Reported:
    """Compute the report of an experiment from a file."""
    served = read_served(reader, experiment.id)
    outcomes = {name: reader.outcomes(experiment.id, name)[0] for name in reader.names(experiment.id)}
    return report_outcomes(
        experiment,
        replace(reader.exposures(experiment.id), changes=changes_of(served)),
        outcomes,
        time.time(),
        lambda question: reader.decisions(experiment.id, question),
        declarations=first_declared(reader.declarations(experiment.id)),
        why_none=mismatch or why_models_changed(experiment, served),
    )
