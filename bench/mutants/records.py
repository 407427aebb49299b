"""Which test runs which lines, remembered from run to run in ``bench/results/mutants``.

A record is of one file of tests. Its data about a test stays valid while that test does not change: where the gateway has
changed since, lines are found again by their text, and so is a module that has moved.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import orjson

from bench.mutants.operators import Mutant
from bench.mutants.outcomes import test_hash
from bench.mutants.own_tests import all_tests
from bench.mutants.plugin import IMPORT, Trace

_VERSION = 2
# Of the time that a recorded test took by the clock, this share counts at least: it may only have waited.
_WAITING = 0.2
# A module that has this share of its lines from one that was removed or changed has moved, or was a part of it.
_MOVED = 0.5
# A line with fewer characters may be in any module.
_TELLING = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """A test that runs a line that is changed.

    Attributes:
        duration_s: seconds that it took by the clock when it was recorded.
        cost_s: seconds to plan for it, which hardly depend on what else the machine did then.
    """

    test: str
    file: str
    duration_s: float
    cost_s: float


class Records:
    """Records of files of tests.

    Args:
        project: the project's root.
        folder: where they are kept.
    """

    def __init__(self, project: Path, folder: Path) -> None:
        self._project = project
        self._folder = folder
        self._loaded: dict[str, _Record] = {}
        self._weights_of: dict[str, Mapping[str, float]] = {}
        self._hashes: dict[str, str] = {}

    def has(self, file: str) -> bool:
        """Whether the file has a record, and has not changed since."""
        return self._load(file).file == _hash((self._project / file).read_bytes())

    def known(self, file: str) -> frozenset[str]:
        """Return the tests of the file that are recorded, and have not changed since."""
        return frozenset(test for part in self._load(file).parts for test in part.tests if test != IMPORT)

    def save(self, file: str, traces: Mapping[str, Trace]) -> None:
        """Save the lines that tests ran, with the current sources, in addition to the records of the file's other tests."""
        sources = {name: (self._project / name).read_bytes() for trace in traces.values() for name in trace.lines}
        for source in sources.values():
            path = self._folder / "sources" / _hash(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
        rows = {
            test: _Row(
                trace.outcome,
                round(trace.duration_s, 3),
                round(trace.cpu_s, 3),
                {name: _bits(lines) for name, lines in trace.lines.items()},
                test_hash(self._project, test) if test != IMPORT else "",
            )
            for test, trace in traces.items()
        }
        part = _Part({name: _hash(source) for name, source in sources.items()}, rows)
        others = [
            _Part(old.sources, {t: row for t, row in old.tests.items() if t not in rows or t == IMPORT})
            for old in self._load(file).parts
        ]
        record = _Record(
            _hash((self._project / file).read_bytes()), [*(old for old in others if len(old.tests) > 1), part]
        )
        self._path(file).write_bytes(orjson.dumps({"version": _VERSION, **asdict(record)}))
        self._loaded.pop(file, None)
        self._weights_of.clear()

    def failed(self, file: str) -> list[str]:
        """Return the tests that fail without any change: they are left out."""
        rows = (item for part in self._load(file).parts for item in part.tests.items())
        return [test for test, row in rows if row.outcome == "failed"]

    def candidates(self, mutant: Mutant, files: Iterable[str], budget_s: float) -> list[Candidate]:
        """Return tests that run a changed line, as many as fit; first those that are most about its module.

        A test is about a module if it runs lines of it that few others run: each line counts ``1 / (tests that run it)``.
        The files of tests take turns: many tests of one file look at the same thing.
        """
        found = [candidate for file in files for candidate in self._candidates_in(file, mutant)]
        weights = self._weights(mutant.module)
        chosen: list[Candidate] = []
        left_s = budget_s
        turns: Counter[str] = Counter()
        ordered: list[tuple[int, Candidate]] = []
        for candidate in sorted(found, key=lambda one: -weights.get(one.test, 0.0)):
            ordered.append((turns[candidate.file], candidate))
            turns[candidate.file] += 1
        for _turn, candidate in sorted(ordered, key=lambda one: one[0]):
            if candidate.cost_s <= left_s or not chosen:
                left_s -= candidate.cost_s
                chosen.append(candidate)
        return chosen

    def _weights(self, module: str) -> Mapping[str, float]:
        """Return for each test how much it is about a module."""
        if module not in self._weights_of:
            lines_of: dict[str, list[int]] = {}
            for part in (part for file in all_tests(self._project) for part in self._load(file).parts):
                if (name := self._old_name(part, module)) is None:
                    continue
                for test, row in part.tests.items():
                    if test != IMPORT and (ran := int(row.lines.get(name, "0"), 16)):
                        lines_of[test] = [line for line in range(ran.bit_length()) if ran >> line & 1]
            counts = Counter(line for lines in lines_of.values() for line in lines)
            self._weights_of[module] = {
                test: sum(1 / counts[line] for line in lines) for test, lines in lines_of.items()
            }
        return self._weights_of[module]

    def runs_at_import(self, mutant: Mutant, files: Iterable[str]) -> bool:
        """Return whether a changed line runs while tests are collected, or is not known to run later only."""
        parts = [part for file in files for part in self._load(file).parts]
        return any(
            (module := self._old_name(part, mutant.module)) is not None and self._changed_lines(part, module, mutant)[1]
            for part in parts
        )

    def others(self, mutant: Mutant, own: Sequence[str]) -> list[str]:
        """Return the other test files that run a changed line."""
        return [file for file in all_tests(self._project) if file not in own and self._candidates_in(file, mutant)]

    def _candidates_in(self, file: str, mutant: Mutant) -> list[Candidate]:
        found = [candidate for part in self._load(file).parts for candidate in self._candidates_of(part, file, mutant)]
        return sorted(found, key=lambda candidate: candidate.cost_s)

    def _candidates_of(self, part: _Part, file: str, mutant: Mutant) -> Iterator[Candidate]:
        module = self._old_name(part, mutant.module)
        if module is None:
            return
        changed, is_of_import = self._changed_lines(part, module, mutant)
        for test, row in part.tests.items():
            ran = int(row.lines.get(module, "0"), 16)
            if row.outcome == "passed" and test != IMPORT and ran and (is_of_import or ran & changed):
                yield Candidate(test, file, row.duration_s, max(row.cpu_s, _WAITING * row.duration_s))

    def _changed_lines(self, part: _Part, module: str, mutant: Mutant) -> tuple[int, bool]:
        """Return the bits of the changed lines, and whether any of them runs at import or none is known.

        Any test that uses the module can notice a change in the lines that run at its import.
        """
        old = self._old_text(part, module)
        new = (self._project / mutant.module).read_text(encoding="utf-8")
        changed = int(_bits(old_lines(old, new, *mutant.lines)), 16)
        at_import = part.tests[IMPORT].lines.get(module, "0") if IMPORT in part.tests else "0"
        return changed, not changed or bool(int(at_import, 16) & changed)

    def _old_name(self, part: _Part, module: str) -> str | None:
        """Return a module's name at the time of a record; ``None`` if it did not exist or no test ran it."""
        if module in part.sources:
            return module
        new = (self._project / module).read_text(encoding="utf-8")
        changed = [name for name in part.sources if self._now(name) != part.sources[name]]
        likeness = {name: _likeness(self._old_text(part, name), new) for name in changed}
        best = max(likeness, key=lambda name: likeness[name], default=None)
        return best if best is not None and likeness[best] > _MOVED else None

    def _now(self, name: str) -> str:
        if name not in self._hashes:
            path = self._project / name
            self._hashes[name] = _hash(path.read_bytes()) if path.exists() else ""
        return self._hashes[name]

    def _old_text(self, part: _Part, module: str) -> str:
        return (self._folder / "sources" / part.sources[module]).read_text(encoding="utf-8")

    def _load(self, file: str) -> _Record:
        if file not in self._loaded:
            path = self._path(file)
            content = orjson.loads(path.read_bytes()) if path.exists() else {}
            parts = content["parts"] if content.get("version") == _VERSION else []
            self._loaded[file] = _Record(
                content.get("file", "") if parts else "",
                [_Part(part["sources"], {test: _Row(**row) for test, row in part["tests"].items()}) for part in parts],
            )
            for part in self._loaded[file].parts:
                for test in [
                    test for test, row in part.tests.items() if test and row.test != test_hash(self._project, test)
                ]:
                    del part.tests[test]
        return self._loaded[file]

    def _path(self, file: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{file.replace('/', '+')}.json"


@dataclass(frozen=True, slots=True)
class _Row:
    """One test.

    Attributes:
        lines: bits of the numbers of the lines that it ran, by file.
        test: hash of its source.
    """

    outcome: str
    duration_s: float
    cpu_s: float
    lines: Mapping[str, str]
    test: str


@dataclass(frozen=True, slots=True)
class _Part:
    """The tests of a file that were recorded with the same sources of the gateway."""

    sources: Mapping[str, str]
    tests: dict[str, _Row]


@dataclass(frozen=True, slots=True)
class _Record:
    file: str
    parts: Sequence[_Part]


@lru_cache(maxsize=4096)
def old_lines(old: str, new: str, first: int, last: int) -> frozenset[int]:
    """Return the numbers that lines ``first`` to ``last`` of ``new`` have in ``old``; empty if ``old`` lacks them."""
    if old == new:
        return frozenset(range(first, last + 1))
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    return frozenset(
        block.a + line - block.b
        for block in _blocks(matcher)
        for line in range(max(first, block.b + 1), min(last, block.b + block.size) + 1)
    )


@lru_cache(maxsize=4096)
def _likeness(old: str, new: str) -> float:
    """Return the share of the lines of ``new`` that are in ``old``, without imports and lines like those of any module."""
    lines = {
        line for line in new.splitlines() if len(line.strip()) > _TELLING and not line.startswith(("from ", "import "))
    }
    return len(lines & set(old.splitlines())) / max(1, len(lines))


def _blocks(matcher: difflib.SequenceMatcher[str]) -> list[difflib.Match]:
    return matcher.get_matching_blocks()


def _bits(lines: Iterable[int]) -> str:
    return f"{sum(1 << line for line in set(lines)):x}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
