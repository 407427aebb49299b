"""The result of each change, kept in ``bench/results/mutants``, so that a stopped run continues.

An outcome is good while the changed function and the tests that were run are the same, wherever they are in their files.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import orjson

from bench.mutants.operators import Mutant


@dataclass(slots=True)
class Outcome:
    """The results of the tests of a change so far.

    Attributes:
        killed_by: the test that failed, or why the run was given up; empty if none noticed the change.
        tests: hashes of the sources of the tests that were run: of that one, or of all that passed.
    """

    killed_by: str = ""
    tests: dict[str, str] = field(default_factory=dict)


class Outcomes:
    """The outcomes of the changes of one module.

    Args:
        project: the project's root.
        folder: where they are kept.
    """

    def __init__(self, project: Path, folder: Path, module: str) -> None:
        self._project = project
        self._path = folder / "outcomes" / f"{module.replace('/', '+')}.json"
        self._outcomes = self._read()

    def _read(self) -> dict[str, Outcome]:
        rows = orjson.loads(self._path.read_bytes()) if self._path.exists() else {}
        return {key: Outcome(**row) for key, row in rows.items()}

    def of(self, mutant: Mutant) -> Outcome | None:
        """Return the outcome of a change; ``None`` if it was not tried, or if all that was said of it is out of date."""
        outcome = self._outcomes.get(mutant.key)
        if outcome is None:
            return None
        good = {test: known for test, known in outcome.tests.items() if known == test_hash(self._project, test)}
        if outcome.killed_by and len(good) < len(outcome.tests):
            return None
        return Outcome(outcome.killed_by, good) if outcome.killed_by or good or not outcome.tests else None

    def save_killed(self, mutant: Mutant, detail: str, tests: Iterable[str]) -> None:
        """Keep that a test failed; ``detail`` is its id, or why the run of ``tests`` was given up."""
        shown = [test for test in tests if test == detail] or list(tests)
        self._save(mutant, Outcome(detail, {test: test_hash(self._project, test) for test in shown}))

    def save_passed(self, mutant: Mutant, tests: Iterable[str]) -> None:
        """Keep that tests passed, besides those of which it is known."""
        before = self.of(mutant) or Outcome()
        hashes = {test: test_hash(self._project, test) for test in tests}
        self._save(mutant, Outcome("", {**({} if before.killed_by else before.tests), **hashes}))

    def _save(self, mutant: Mutant, outcome: Outcome) -> None:
        # Another run may have written in the meantime.
        self._outcomes = {**self._read(), mutant.key: outcome}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_bytes(orjson.dumps({key: asdict(one) for key, one in self._outcomes.items()}))
        beside.replace(self._path)


def test_hash(project: Path, test: str) -> str:
    """Return a hash of the source of a test, by its id; of its whole file where the function is not written in it."""
    file, _, name = test.partition("[")[0].partition("::")
    path = project / file
    if not path.is_file():
        return ""
    stamp = path.stat()
    hashes = _hashes_of(path, stamp.st_mtime_ns, stamp.st_size)
    return hashes.get(name, hashes[""])


@lru_cache(maxsize=512)
def _hashes_of(path: Path, _modified_ns: int, _size: int) -> Mapping[str, str]:
    source = path.read_bytes()
    lines = source.splitlines(keepends=True)
    hashes = {"": _hash(source)}

    def walk(body: Iterable[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}::")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                hashes[prefix + node.name] = _hash(b"".join(lines[first - 1 : node.end_lineno]))

    walk(ast.parse(source).body, "")
    return hashes


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
