"""What the tests noticed, on the screen and in the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from bench.mutants.scoring import ModuleResult
from bench.processes import ROOT
from bench.report import table, update_page

PAGE = ROOT / "docs" / "testing.md"
_HEADER = ("module", "mutants", "killed", "survive", "equivalent", "score")


@dataclass(frozen=True, slots=True)
class Row:
    """The counts of one module, and its equivalent mutants as ``(before, after, reason)``."""

    module: str
    num_killed: int
    num_surviving: int
    equivalent: Sequence[tuple[str, str, str]]

    @classmethod
    def of(cls, result: ModuleResult) -> Row:
        equivalent = [(mutant.before, mutant.after, reason) for mutant, reason in result.equivalent]
        return cls(result.module, len(result.killed), len(result.survivors), equivalent)


def print_result(result: ModuleResult) -> None:
    """Print the mutants of a module that no test noticed, each as a diff."""
    print(
        f"\n## {result.module}: {len(result.killed)} of {result.num_mutants} killed, {len(result.equivalent)} equivalent"
    )
    for mutant, num_tests in result.survivors:
        tests = f"survives {num_tests} tests" if num_tests else "no test runs it"
        print(f"{mutant.module}:{mutant.line}: {mutant.operator}, {tests}\n  - {mutant.before}\n  + {mutant.after}")
    for entry in result.stale:
        print(f"equivalent.toml: no such change any more in {entry.module}\n  - {entry.before}\n  + {entry.after}")
    print(end="", flush=True)


def table_of(results: Iterable[ModuleResult]) -> str:
    """Return the scores: killed of those that can be."""
    return _table([Row.of(result) for result in results])


def _table(rows: Sequence[Row]) -> str:
    cells = [_cells(row.module, row.num_killed, row.num_surviving, len(row.equivalent)) for row in rows]
    if len(rows) > 1:
        sums = (
            sum(values)
            for values in zip(*((r.num_killed, r.num_surviving, len(r.equivalent)) for r in rows), strict=True)
        )
        cells.append(_cells("all", *sums))
    return table(_HEADER, cells)


def _cells(module: str, num_killed: int, num_surviving: int, num_equivalent: int) -> tuple[str, ...]:
    possible = num_killed + num_surviving
    score = f"{num_killed / possible:.0%}".replace("%", " %") if possible else "n/a"
    name = module.removeprefix("gateway/").removesuffix(".py")
    return (name, *(str(n) for n in (possible + num_equivalent, num_killed, num_surviving, num_equivalent)), score)


def save_result(folder: Path, result: ModuleResult) -> None:
    """Keep the counts of a module, so that the page can be written from several runs."""
    path = folder / "scores" / f"{result.module.replace('/', '+')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(Row.of(result)))


def load_results(folder: Path) -> list[Row]:
    """Return the counts that are kept, of modules that are still there, by name."""
    rows = [Row(**orjson.loads(path.read_bytes())) for path in sorted((folder / "scores").glob("*.json"))]
    return [row for row in rows if (ROOT / row.module).exists()]


def write_page(rows: Sequence[Row], page: Path = PAGE) -> None:
    """Write the table, and the equivalent mutants with their reasons, into the documentation."""
    parts = [_table(rows)]
    reasons = [
        (f"`{row.module.removeprefix('gateway/')}`", _code(before), _code(after), reason)
        for row in rows
        for before, after, reason in row.equivalent
    ]
    if reasons:
        parts.append("Equivalent, which means that the change makes no difference:")
        parts.append(table(("module", "line", "change", "why"), reasons))
    update_page("bench.mutants", "\n\n".join(parts), page)


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in text else f"`{escaped}`"
