"""Runs the tests against the mutants of a module, and counts the mutants that they kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, TypeVar

from bench.mutants.collected import ChildOfCollected, Collected
from bench.mutants.equivalents import Equivalent, reason_for, unmatched
from bench.mutants.operators import Mutant, mutants_of
from bench.mutants.outcomes import Outcomes
from bench.mutants.own_tests import own_tests
from bench.mutants.plugin import Trace
from bench.mutants.records import Candidate, Records
from bench.mutants.running import Child, Workspace, outcome_of, record_tests, run_tests
from bench.mutants.usage import Limits

_CORE = """
vectors service computing requests observation deployment cli/lock
http/head http/protocol http/middleware http/body http/turns http/decoding http/pace
access/keyring access/quotas access/memory
api/endpoint api/openai api/openai_schema api/token_ids api/json_body api/tei api/tei_schema api/rerank api/classify
fleet backends/infinity backends/same_space backends/watchdog
backends/upstream/answers backends/upstream/backend backends/upstream/breaker backends/upstream/dialects
backends/upstream/failures backends/upstream/pool backends/upstream/probe backends/upstream/quirks
backends/upstream/server backends/upstream/watch
batches/answering batches/contents batches/lines batches/recording batches/runner batches/store
bulk/chunking bulk/fields bulk/job bulk/manifest
cache/entries cache/files cache/model_cache cache/stores cluster/line cluster/placing cluster/wire
compare/comparison compare/cost compare/quality compare/search compare/statistics
engine/admission engine/ahead engine/batch_queue engine/batcher engine/cards engine/checks engine/devices golden
engine/memory engine/pending engine/scheduler engine/tokenizer_pool engine/worker
engine/checkpoint/classes engine/checkpoint/classifier engine/checkpoint/gte_layout engine/checkpoint/headers
engine/checkpoint/json_files engine/checkpoint/layouts engine/checkpoint/modules engine/checkpoint/nomic_layout
engine/checkpoint/prompts engine/checkpoint/read engine/checkpoint/score_modules engine/checkpoint/sizes
engine/checkpoint/sources engine/checkpoint/transformer engine/checkpoint/weights
engine/model/adapters engine/model/heads engine/model/pairs engine/model/states engine/model/tokenizer
engine/model/runtimes/flash engine/model/runtimes/low_rank engine/model/runtimes/network
engine/model/runtimes/packed engine/model/runtimes/rows
experiments/exposures experiments/sample_ratio experiments/split experiments/stats experiments/units
outcomes/reading routing/names routing/router routing/rules routing/shadow routing/spaces telemetry/logs
"""
CORE = tuple(_CORE.split())

T = TypeVar("T")

_START = Limits(cpu_s=60.0, still_s=20.0, wall_s=600.0)
# A test may take this many times as long as it took while it was recorded, because a mutant may slow it down.
_SLOWER = 3.0
_RECORDING = Limits(cpu_s=1200.0, still_s=300.0, wall_s=7200.0)
_POLL_S = 0.02
# A test that takes longer than this must fail twice to kill a mutant, because on a busy machine it may just be too slow.
_LONG_S = 0.3


@dataclass(frozen=True, slots=True)
class Options:
    """The number of mutants, and the time for each.

    Attributes:
        sample: number of mutants per module; 0 for all.
        budget_s: total recorded duration of the tests to run against a mutant: first for its module's own tests, then again
            for other tests.
        is_own_only: whether to run only the module's own tests.
    """

    sample: int = 40
    seed: int = 0
    budget_s: float = 40.0
    is_own_only: bool = False


@dataclass(slots=True)
class ModuleResult:
    """The outcomes of a module's mutants that were tried.

    Attributes:
        num_mutants: number of the module's mutants, tried or not.
        killed: mutants that a test detected, each with that test.
        survivors: mutants that no test detected, each with the number of tests that were run.
        equivalent: mutants that do not change the behavior, with the reason.
        stale: entries of the list of equivalents that no longer match any mutant.
    """

    module: str
    num_mutants: int = 0
    killed: list[tuple[Mutant, str]] = field(default_factory=list)
    survivors: list[tuple[Mutant, int]] = field(default_factory=list)
    equivalent: list[tuple[Mutant, str]] = field(default_factory=list)
    stale: list[Equivalent] = field(default_factory=list)

    @property
    def num_tried(self) -> int:
        return len(self.killed) + len(self.survivors) + len(self.equivalent)


def record(copies: Sequence[Workspace], records: Records, files: Iterable[str]) -> None:
    """Record the lines that the tests in files run, unless known, and report tests that fail without a mutant."""
    left = [file for file in files if not records.has(file)]

    def start(copy: Workspace, file: str) -> Child:
        known = records.known(file)
        return Child(copy, lambda: record_tests(copy, file, known), _RECORDING)

    def end(child: Child, file: str) -> Sequence[str]:
        result = child.result()
        traces, status = result.get("traces"), result.get("status")
        if not isinstance(traces, dict) or status not in (0, 1, 5):
            print(f"{file}: not recorded: {child.given_up or child.log_tail()}", flush=True)
            return ()
        recorded: Mapping[str, Trace] = traces
        records.save(file, recorded)
        for test in records.failed(file):
            print(f"{test}: fails without a mutant, so it is left out", flush=True)
        return ()

    _in_parallel(copies, left, start, end)


def result_of(
    project: Path, module: str, options: Options, equivalents: Sequence[Equivalent], outcomes: Outcomes
) -> ModuleResult:
    """Return the known outcomes of one module's mutants in the sample."""
    mutants = mutants_of(module, (project / module).read_text(encoding="utf-8"))
    entries = [entry for entry in equivalents if entry.module == module]
    result = ModuleResult(module, len(mutants), stale=unmatched(mutants, entries))
    sample = _sample(mutants, options)
    while sample and outcomes.of(sample[-1]) is None:  # the run was stopped before it reached these
        sample.pop()
    for mutant in sample:
        if (reason := reason_for(mutant, entries)) is not None:
            result.equivalent.append((mutant, reason))
        elif (outcome := outcomes.of(mutant)) is None:
            continue
        elif outcome.killed_by:
            result.killed.append((mutant, outcome.killed_by))
        else:
            result.survivors.append((mutant, len(outcome.tests)))
    result.survivors.sort(key=lambda item: item[0].line)
    return result


def score(
    copies: Sequence[Workspace],
    records: Records,
    project: Path,
    module: str,
    options: Options,
    equivalents: Sequence[Equivalent],
    outcomes: Outcomes,
) -> None:
    """Run tests against the mutants of one module: first its own tests, then others that run the mutated line."""
    mutants = mutants_of(module, (project / module).read_text(encoding="utf-8"))
    own = own_tests(project, module)
    record(copies, records, own)
    left = [mutant for mutant in _sample(mutants, options) if reason_for(mutant, equivalents) is None]

    def try_all(files_of: Callable[[Mutant], Sequence[str]], prepared: Prepared | None = None) -> None:
        runs = []
        for mutant in left:
            outcome = outcomes.of(mutant)
            if outcome is None or not outcome.killed_by:
                passed = {} if outcome is None else outcome.tests
                chosen = records.candidates(mutant, files_of(mutant), options.budget_s)
                if tests := [candidate for candidate in chosen if candidate.test not in passed]:
                    is_prepared = prepared is not None and not records.runs_at_import(mutant, own)
                    runs.append(_Run(mutant, tests, prepared=prepared if is_prepared else None))
                elif outcome is None:
                    outcomes.save_passed(mutant, ())
        _run_all(copies, runs, outcomes)

    with Prepared(own) as prepared:
        try_all(lambda _mutant: own, prepared)
    if not options.is_own_only:
        try_all(lambda mutant: records.others(mutant, own))


def _sample(mutants: Iterable[Mutant], options: Options) -> list[Mutant]:
    return sorted(mutants, key=lambda mutant: mutant.order(options.seed))[: options.sample or None]


class Prepared:
    """A process in each workspace that has collected the tests of some files. Each is started when it is first needed.

    Leaving the context ends the processes.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._processes: dict[Workspace, Collected] = {}

    def process_in(self, copy: Workspace) -> Collected:
        if copy not in self._processes:
            self._processes[copy] = Collected(copy, self._files)
        return self._processes[copy]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        for collected in self._processes.values():
            collected.close()


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of tests against a mutant.

    Attributes:
        left: further tests, to run if these pass.
        prepared: processes that have collected the tests; ``None`` if the mutant cannot be put into an imported module.
    """

    mutant: Mutant
    tests: Sequence[Candidate]
    left: Sequence[Candidate] = ()
    prepared: Prepared | None = None

    def start(self, copy: Workspace) -> Child:
        collected = None
        if self.prepared is not None and self.mutant.is_in_function:
            collected = self.prepared.process_in(copy)  # before the file is changed, because it imports the module
        path = copy.root / self.mutant.module
        before = path.read_text(encoding="utf-8")
        copy.change(path, self.mutant.source)  # for processes that tests start
        files = list(dict.fromkeys(candidate.file for candidate in self.tests))
        names = [candidate.test for candidate in self.tests]
        limits = Limits(
            _START.cpu_s + _SLOWER * sum(candidate.cost_s for candidate in self.tests),
            _START.still_s + _SLOWER * sum(candidate.duration_s for candidate in self.tests),
            _START.wall_s + 10 * _SLOWER * sum(candidate.duration_s for candidate in self.tests),
        )
        if collected is not None and collected.is_usable:
            return ChildOfCollected(collected, path, (before, self.mutant.source), names, limits)
        return Child(copy, lambda: run_tests(copy, files, names), limits)


def _run_all(copies: Sequence[Workspace], runs: Sequence[_Run], outcomes: Outcomes) -> None:

    def end(child: Child, run: _Run) -> Sequence[_Run]:
        child.workspace.restore()
        if run.prepared is not None and not child.given_up and child.result().get("status") is None:
            return [replace(run, prepared=None)]  # the mutant could not be put into the imported module
        outcome = outcome_of(child)
        names = [candidate.test for candidate in run.tests]
        if outcome.is_lost:
            return ()  # the next run tries it again
        if outcome.is_passed:
            outcomes.save_passed(run.mutant, names)
            return [replace(run, tests=run.left, left=())] if run.left else ()
        doubtful = [
            candidate for candidate in run.tests if candidate.test == outcome.failed and candidate.duration_s > _LONG_S
        ]
        if doubtful and len(names) > 1:
            others = [candidate for candidate in run.tests if candidate not in doubtful]
            return [replace(run, tests=doubtful, left=others)]
        outcomes.save_killed(run.mutant, outcome.detail, names)
        return ()

    _in_parallel(copies, runs, lambda copy, run: run.start(copy), end)


def _in_parallel(
    copies: Sequence[Workspace],
    work: Iterable[T],
    start: Callable[[Workspace, T], Child],
    end: Callable[[Child, T], Sequence[T]],
) -> None:
    """Start a child for each piece of work, at most one per workspace at a time; ``end`` may return more work."""
    left, free = list(work)[::-1], list(copies)
    running: list[tuple[Child, T]] = []
    try:
        while left or running:
            while left and free:
                piece = left.pop()
                running.append((start(free.pop(), piece), piece))
            time.sleep(_POLL_S)
            for child, piece in [pair for pair in running if pair[0].has_ended()]:
                running.remove((child, piece))
                left.extend(end(child, piece))
                free.append(child.workspace)
    finally:
        for child, _piece in running:
            child.kill()
