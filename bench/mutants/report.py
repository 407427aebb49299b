"""Report which changes the tests noticed, on the screen and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.mutants.scoring import ModuleResult
from bench.processes import ROOT
from bench.report import table, update_page

PAGE = ROOT / "docs" / "testing.md"
_HEADER = ("module", "mutants", "tried", "killed", "survive", "equivalent", "score")


def print_result(result: ModuleResult) -> None:
    """Print the mutants of a module that no test noticed, each as a diff."""
    print(
        f"\n## {result.module}: {len(result.killed)} of {result.num_tried} killed, {len(result.equivalent)} equivalent"
    )
    for mutant, num_tests in result.survivors:
        tests = f"survives {num_tests} tests" if num_tests else "no test runs it"
        print(f"{mutant.module}:{mutant.line}: {mutant.operator}, {tests}\n  - {mutant.before}\n  + {mutant.after}")
    for entry in result.stale:
        print(f"equivalent.toml: no such change any more in {entry.module}\n  - {entry.before}\n  + {entry.after}")
    print(end="", flush=True)


def table_of(results: Sequence[ModuleResult]) -> str:
    """Return the scores: killed of those that can be."""
    rows = [(r.module, r.num_mutants, r.num_tried, len(r.killed), len(r.survivors), len(r.equivalent)) for r in results]
    if len(rows) > 1:
        rows.append(("all", *(sum(counts) for counts in list(zip(*rows, strict=True))[1:])))
    return table(_HEADER, [_cells(*row) for row in rows])


def _cells(module: str, *counts: int) -> tuple[str, ...]:
    _mutants, _tried, num_killed, num_surviving, _equivalent = counts
    possible = num_killed + num_surviving
    score = f"{num_killed / possible:.0%}".replace("%", " %") if possible else "n/a"
    return (module.removeprefix("gateway/").removesuffix(".py"), *map(str, counts), score)


def write_page(results: Sequence[ModuleResult], commit: str, page: Path = PAGE) -> None:
    """Write the table, what survives, and the equivalent mutants with their reasons, into the documentation."""
    tried = [result for result in results if result.num_tried]
    parts = [
        f"At commit {commit}. The mutants of each module that were tried are a random sample. The score is the share of "
        f"the sample that a test noticed, without equivalent mutants. "
        f"{len(tried)} of {len(results)} modules have been tried.",
        table_of(tried),
    ]
    if survivors := [
        (_name(result), _code(mutant.before), _code(mutant.after)) for result in tried for mutant, _ in result.survivors
    ]:
        parts.append("No test notices yet:")
        parts.append(table(("module", "line", "change"), survivors))
    if reasons := [
        (_name(result), _code(mutant.before), _code(mutant.after), reason)
        for result in tried
        for mutant, reason in result.equivalent
    ]:
        parts.append("Equivalent, which means that the change makes no difference:")
        parts.append(table(("module", "line", "change", "why"), reasons))
    update_page("bench.mutants", "\n\n".join(parts), page)


def _name(result: ModuleResult) -> str:
    return f"`{result.module.removeprefix('gateway/').removesuffix('.py')}`"


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in text else f"`{escaped}`"
