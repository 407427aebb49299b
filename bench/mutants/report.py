"""Report which changes the tests noticed, on the screen and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from bench.mutants.scoring import CORE, ModuleResult
from bench.processes import ROOT
from bench.report import read_section, table, update_page

_Cells: TypeAlias = tuple[str, ...]

PAGE = ROOT / "docs" / "testing.md"
_SECTION = "bench.mutants"
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
    rows = [_cells(_short(result), *_counts_of(result)) for result in results]
    if len(rows) > 1:
        rows.append(_total(rows))
    return table(_HEADER, rows)


def _total(rows: Sequence[_Cells]) -> _Cells:
    return _cells("all", *(sum(int(row[i]) for row in rows) for i in range(1, 6)))


def _cells(module: str, *counts: int) -> tuple[str, ...]:
    _mutants, _tried, num_killed, num_surviving, _equivalent = counts
    possible = num_killed + num_surviving
    score = f"{num_killed / possible:.0%}".replace("%", " %") if possible else "n/a"
    return (module, *map(str, counts), score)


def write_page(results: Sequence[ModuleResult], commit: str, page: Path = PAGE) -> None:
    """Write the table, what survives, and the equivalent mutants with their reasons, into the documentation.

    The rows of other modules of the core stay: their results may be on another machine.
    """
    tried = [result for result in results if result.num_tried]
    new_names = {_short(result) for result in tried}
    old_scores, old_survivors, old_reasons = _tables_of(read_section(_SECTION, page))
    scores = {row[0]: row for row in old_scores} | {
        _short(result): (*_cells(_short(result), *_counts_of(result)), commit) for result in tried
    }
    rows = [scores[name] for name in CORE if name in scores]
    parts = [
        "The mutants of each module that were tried are a random sample. The score is the share of the sample that a "
        "test noticed at the commit, without equivalent mutants. "
        f"{len(rows)} of {len(CORE)} modules have been tried.",
        table((*_HEADER, "commit"), [*rows, (*_total(rows), "")]),
    ]

    def add(title: str, header: Sequence[str], old: Sequence[_Cells], new: Sequence[_Cells]) -> None:
        by_module = {f"`{name}`": list[_Cells]() for name in CORE}
        for row in (*(row for row in old if row[0].strip("`") not in new_names), *new):
            by_module.get(row[0], []).append(row)
        if all_rows := [row for rows_of in by_module.values() for row in rows_of]:
            parts.extend((title, table(header, all_rows)))

    add(
        "No test notices yet:",
        ("module", "line", "change"),
        old_survivors,
        [(_name(one), _code(mutant.before), _code(mutant.after)) for one in tried for mutant, _ in one.survivors],
    )
    add(
        "Equivalent, which means that the change makes no difference:",
        ("module", "line", "change", "why"),
        old_reasons,
        [
            (_name(one), _code(mutant.before), _code(mutant.after), reason)
            for one in tried
            for mutant, reason in one.equivalent
        ],
    )
    update_page(_SECTION, "\n\n".join(parts), page)


def _tables_of(markdown: str) -> tuple[list[_Cells], list[_Cells], list[_Cells]]:
    """Return the rows of the three tables on the page: scores, survivors and equivalent mutants."""
    of_width: dict[int, list[_Cells]] = {len(_HEADER) + 1: [], 3: [], 4: []}
    for line in markdown.splitlines():
        cells = tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) if line.startswith("| ") else ()
        if cells and cells[0] not in ("module", "---", "all"):
            of_width[len(cells)].append(cells)
    scores, survivors, reasons = of_width.values()
    return scores, survivors, reasons


def _counts_of(result: ModuleResult) -> tuple[int, ...]:
    return (
        result.num_mutants,
        result.num_tried,
        len(result.killed),
        len(result.survivors),
        len(result.equivalent),
    )


def _short(result: ModuleResult) -> str:
    return result.module.removeprefix("gateway/").removesuffix(".py")


def _name(result: ModuleResult) -> str:
    return f"`{_short(result)}`"


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`` {escaped} ``" if "`" in text else f"`{escaped}`"
