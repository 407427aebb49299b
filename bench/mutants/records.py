"""Which test runs which lines, remembered from run to run in ``bench/results/mutants``.

A record is of one file of tests. It stays good while that file is the same: where the gateway has changed since, lines are
found again by their text, and so is a module that has moved.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import orjson

from bench.mutants.operators import Mutant
from bench.mutants.plugin import IMPORT, Trace

# They run for minutes, run in separate environments, or do not test code.
NOT_RECORDED = ("tests/clients", "tests/loadtest", "tests/deploy", "tests/test_bench.py", "tests/test_imports.py")
# A module that has this share of its lines in common with a removed one is taken for the same module.
_MOVED = 0.5

# The tests of modules whose tests are not in the file or folder named after them.
_TESTS_OF = {
    "gateway/engine/model/heads.py": ("engine/model/test_heads", "models/test_m3", "models/test_modules"),
    "gateway/engine/model/tokenizer.py": ("engine/model/test_tokenizer", "models/test_late_chunking"),
    "gateway/engine/worker.py": ("engine/test_worker", "engine/test_batcher"),
    "gateway/http/head.py": ("api/test_connections", "api/test_limits"),
    "gateway/http/middleware.py": (
        "api/test_behind_a_proxy",
        "api/test_contract",
        "api/test_errors",
        "api/test_experiment_requests",
        "api/test_limits",
        "api/test_models_and_health",
        "api/test_request_log",
        "telemetry/test_tracing",
    ),
    "gateway/http/protocol.py": ("api/test_connections", "api/test_limits", "test_drain"),
    "gateway/requests.py": ("test_service", "api/test_rerank"),
    "gateway/observation.py": ("test_service", "test_observation"),
    "gateway/routing/router.py": (
        "routing/test_router",
        "api/test_experiment_cards",
        "api/test_experiment_requests",
        "api/test_rerank",
        "test_fallbacks",
    ),
    "gateway/service.py": ("test_service", "api/test_contract", "api/test_rerank", "api/test_tei"),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A test that runs a line that is changed."""

    test: str
    file: str
    duration_s: float


def own_tests(project: Path, module: str) -> list[str]:
    """Return the test files that are named after a module, or else all tests of the folder named after the module's."""
    if module in _TESTS_OF:
        return [f"tests/{name}.py" for name in _TESTS_OF[module] if (project / f"tests/{name}.py").is_file()]
    path = Path(module)
    folder = Path("tests", *path.parts[1:-1])
    stem = path.parent.name if path.stem == "__init__" else path.stem
    named = [file for file in all_tests(project) if Path(file).stem.removeprefix("test_").startswith(stem)]
    if same_folder := [file for file in named if Path(file).parent == folder]:
        return same_folder
    return named or [
        file for file in all_tests(project) if Path(file).is_relative_to(folder) and folder.name != "tests"
    ]


def all_tests(project: Path) -> list[str]:
    """Return the files of tests that are recorded."""
    files = sorted(str(path.relative_to(project)) for path in project.glob("tests/**/test_*.py"))
    return [file for file in files if not file.startswith(NOT_RECORDED)]


class Records:
    """Records of files of tests.

    Args:
        project: the project's root.
        folder: where they are kept.
    """

    def __init__(self, project: Path, folder: Path) -> None:
        self._project = project
        self._folder = folder
        self._loaded: dict[str, _Record | None] = {}
        self._weights_of: dict[str, Mapping[str, float]] = {}

    def has(self, file: str) -> bool:
        """Whether the file has a record, and has not changed since."""
        return self._load(file) is not None

    def save(self, file: str, traces: Mapping[str, Trace]) -> None:
        """Save the lines that tests ran, with the current sources."""
        sources = {name: (self._project / name).read_bytes() for trace in traces.values() for name in trace.lines}
        for source in sources.values():
            path = self._folder / "sources" / _hash(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source)
        rows = {
            test: (
                trace.outcome,
                round(trace.duration_s, 3),
                {name: _bits(lines) for name, lines in trace.lines.items()},
            )
            for test, trace in traces.items()
        }
        content = {
            "file": _hash((self._project / file).read_bytes()),
            "sources": {name: _hash(source) for name, source in sources.items()},
            "tests": rows,
        }
        self._path(file).write_bytes(orjson.dumps(content))
        self._loaded.pop(file, None)

    def failed(self, file: str) -> list[str]:
        """Return the tests that fail without any change: they are left out."""
        record = self._load(file)
        return [] if record is None else [test for test, (outcome, *_) in record.tests.items() if outcome == "failed"]

    def candidates(self, mutant: Mutant, files: Iterable[str], budget_s: float) -> list[Candidate]:
        """Return tests that run a changed line, as many as fit; first those that are most about its module.

        A test is about a module if it runs lines of it that few others run: each line counts ``1 / (tests that run it)``.
        """
        found = [candidate for file in files for candidate in self._candidates_in(file, mutant)]
        weights = self._weights(mutant.module)
        chosen: list[Candidate] = []
        left_s = budget_s
        for candidate in sorted(found, key=lambda one: -weights.get(one.test, 0.0)):
            if candidate.duration_s <= left_s or not chosen:
                left_s -= candidate.duration_s
                chosen.append(candidate)
        return chosen

    def _weights(self, module: str) -> Mapping[str, float]:
        """Return for each test how much it is about a module."""
        if module not in self._weights_of:
            lines_of: dict[str, list[int]] = {}
            for file in all_tests(self._project):
                record = self._load(file)
                if record is None or (name := self._old_name(record, module)) is None:
                    continue
                for test, (_, _, lines) in record.tests.items():
                    if test != IMPORT and (ran := int(lines.get(name, "0"), 16)):
                        lines_of[test] = [line for line in range(ran.bit_length()) if ran >> line & 1]
            counts = Counter(line for lines in lines_of.values() for line in lines)
            self._weights_of[module] = {
                test: sum(1 / counts[line] for line in lines) for test, lines in lines_of.items()
            }
        return self._weights_of[module]

    def others(self, mutant: Mutant, own: Sequence[str]) -> list[str]:
        """Return the other test files that run a changed line."""
        counts = {file: len(self._candidates_in(file, mutant)) for file in all_tests(self._project) if file not in own}
        return [file for file, count in counts.items() if count]

    def _candidates_in(self, file: str, mutant: Mutant) -> list[Candidate]:
        record = self._load(file)
        module = None if record is None else self._old_name(record, mutant.module)
        if record is None or module is None:
            return []
        old = self._old_text(record, module)
        new = (self._project / mutant.module).read_text(encoding="utf-8")
        wanted = _bits(old_lines(old, new, *mutant.lines))
        at_import = record.tests.get(IMPORT, ("", 0.0, {}))[2].get(module, "0")
        # Any test that uses the module can notice a change in the lines that run at its import.
        is_of_import = not int(wanted, 16) or bool(int(at_import, 16) & int(wanted, 16))
        found = [
            Candidate(test, file, duration_s)
            for test, (outcome, duration_s, lines) in record.tests.items()
            if outcome == "passed"
            and test != IMPORT
            and (ran := int(lines.get(module, "0"), 16))
            and (is_of_import or ran & int(wanted, 16))
        ]
        return sorted(found, key=lambda candidate: candidate.duration_s)

    def _old_name(self, record: _Record, module: str) -> str | None:
        """Return a module's name at the time of a record; ``None`` if it did not exist or no test ran it."""
        if module in record.sources:
            return module
        new = (self._project / module).read_text(encoding="utf-8")
        gone = [name for name in record.sources if not (self._project / name).exists()]
        likeness = {name: _likeness(self._old_text(record, name), new) for name in gone}
        best = max(likeness, key=lambda name: likeness[name], default=None)
        return best if best is not None and likeness[best] > _MOVED else None

    def _old_text(self, record: _Record, module: str) -> str:
        return (self._folder / "sources" / record.sources[module]).read_text(encoding="utf-8")

    def _load(self, file: str) -> _Record | None:
        if file not in self._loaded:
            path = self._path(file)
            record = None
            if path.exists():
                content = orjson.loads(path.read_bytes())
                if content["file"] == _hash((self._project / file).read_bytes()):
                    record = _Record(content["sources"], content["tests"])
            self._loaded[file] = record
        return self._loaded[file]

    def _path(self, file: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{file.replace('/', '+')}.json"


@dataclass(frozen=True, slots=True)
class _Record:
    sources: Mapping[str, str]
    tests: Mapping[str, tuple[str, float, Mapping[str, str]]]


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
    """Return the share of their lines that two texts have in common."""
    lines, other_lines = set(old.splitlines()), set(new.splitlines())
    return len(lines & other_lines) / max(1, len(lines | other_lines))


def _blocks(matcher: difflib.SequenceMatcher[str]) -> list[difflib.Match]:
    return matcher.get_matching_blocks()


def _bits(lines: Iterable[int]) -> str:
    return f"{sum(1 << line for line in set(lines)):x}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
