"""Runs the tests against the changes of a module and counts those that they notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.mutants.equivalents import Equivalent, reason_for, unmatched
from bench.mutants.operators import Mutant, mutants_of
from bench.mutants.plugin import Trace
from bench.mutants.records import Candidate, Records, own_tests
from bench.mutants.running import Child, Workspace, outcome_of, record_tests, run_tests

_CORE = """
vectors service requests observation deployment cli/lock http/head http/protocol http/middleware
http/body access/keyring access/quotas
api/endpoint api/openai api/openai_schema api/token_ids
fleet backends/infinity backends/same_space
backends/upstream/backend backends/upstream/breaker backends/upstream/dialects
backends/upstream/probe backends/upstream/server
cache/files compare/comparison compare/cost compare/quality compare/search compare/statistics
engine/batcher golden engine/memory engine/model/adapters engine/model/heads engine/model/pairs
engine/model/states engine/model/tokenizer engine/scheduler engine/worker
experiments/exposures experiments/sample_ratio experiments/split experiments/stats experiments/units
routing/names routing/router routing/rules routing/shadow routing/spaces
"""
CORE = tuple(_CORE.split())

T = TypeVar("T")

# A change may make a test wait for something that never comes; a machine may be busy.
_START_S = 60.0
_SLOWER = 5.0
_RECORDING_S = 1800.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Options:
    """How much to try.

    Attributes:
        sample: mutants of a module; 0 for all.
        budget_s: recorded seconds of the tests to run against a mutant, once for its module's tests and once for others.
        is_own_only: leave out the others.
    """

    sample: int = 40
    seed: int = 0
    budget_s: float = 40.0
    is_own_only: bool = False


@dataclass(slots=True)
class ModuleResult:
    """The outcomes of a module's mutants.

    Attributes:
        killed: the mutants that were noticed, with the test that did.
        survivors: those that were not, each with the number of tests that were run.
        equivalent: those that change nothing, with the reason.
        stale: entries of the list of equivalents that fit no mutant any more.
    """

    module: str
    killed: list[tuple[Mutant, str]] = field(default_factory=list)
    survivors: list[tuple[Mutant, int]] = field(default_factory=list)
    equivalent: list[tuple[Mutant, str]] = field(default_factory=list)
    stale: list[Equivalent] = field(default_factory=list)

    @property
    def num_mutants(self) -> int:
        return len(self.killed) + len(self.survivors) + len(self.equivalent)


def record(copies: Sequence[Workspace], records: Records, files: Iterable[str], *, is_forced: bool = False) -> None:
    """Record the lines that the tests in files run, unless known, and report the tests that fail without any change."""
    left = [file for file in files if is_forced or not records.has(file)]

    def start(copy: Workspace, file: str) -> Child:
        return Child(copy, lambda: record_tests(copy, file), _RECORDING_S)

    def end(child: Child, file: str) -> None:
        traces = child.result().get("traces")
        if not isinstance(traces, dict) or len(traces) < 2:  # one is of what runs at the import
            print(f"{file}: not recorded: {child.log_tail()}", flush=True)
            return
        known: Mapping[str, Trace] = traces
        records.save(file, known)
        for test in records.failed(file):
            print(f"{test}: fails without any change, left out", flush=True)

    _in_parallel(copies, left, start, end)


def score(
    copies: Sequence[Workspace],
    records: Records,
    project: Path,
    module: str,
    options: Options,
    equivalents: Sequence[Equivalent],
) -> ModuleResult:
    """Run the tests against the mutants of one module: first its own, then others that run the changed line."""
    source = (project / module).read_text(encoding="utf-8")
    mutants = mutants_of(module, source)
    of_module = [entry for entry in equivalents if entry.module == module]
    result = ModuleResult(module, stale=unmatched(mutants, of_module))
    own = own_tests(project, module)
    record(copies, records, own)
    left = sorted(mutants, key=lambda mutant: mutant.order(options.seed))[: options.sample or None]
    for mutant in left:
        if (reason := reason_for(mutant, of_module)) is not None:
            result.equivalent.append((mutant, reason))
    tried = dict.fromkeys((mutant for mutant in left if reason_for(mutant, of_module) is None), 0)

    def try_all(files_of: Callable[[Mutant], Sequence[str]]) -> None:
        runs = []
        for mutant in tried:
            if chosen := records.candidates(mutant, files_of(mutant), options.budget_s):
                runs.append(_Run(mutant, chosen))
                tried[mutant] += len(chosen)
        for run, detail in _killed(copies, runs):
            result.killed.append((run.mutant, detail))
            del tried[run.mutant]

    try_all(lambda _mutant: own)
    if not options.is_own_only:
        try_all(lambda mutant: records.others(mutant, own))
    result.survivors = sorted(tried.items(), key=lambda item: item[0].line)
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    mutant: Mutant
    tests: Sequence[Candidate]

    def start(self, copy: Workspace) -> Child:
        copy.change(copy.root / self.mutant.module, self.mutant.source)
        files = list(dict.fromkeys(candidate.file for candidate in self.tests))
        names = [candidate.test for candidate in self.tests]
        timeout_s = _START_S + _SLOWER * sum(candidate.duration_s for candidate in self.tests)
        return Child(copy, lambda: run_tests(copy, files, names), timeout_s)


def _killed(copies: Sequence[Workspace], runs: Sequence[_Run]) -> list[tuple[_Run, str]]:
    killed = []

    def end(child: Child, run: _Run) -> None:
        child.workspace.restore()
        outcome = outcome_of(child)
        if outcome.status not in (0, 5):
            killed.append((run, outcome.detail))

    _in_parallel(copies, runs, lambda copy, run: run.start(copy), end)
    return killed


def _in_parallel(
    copies: Sequence[Workspace],
    work: Iterable[T],
    start: Callable[[Workspace, T], Child],
    end: Callable[[Child, T], None],
) -> None:
    """Start a child for each piece of work, as many side by side as there are workspaces."""
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
                end(child, piece)
                free.append(child.workspace)
    finally:
        for child, _piece in running:
            child.kill()
