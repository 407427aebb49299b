"""Measure how often conclusions are wrong, next to the promised rates.

python -m bench.evidence                 all simulations, in minutes
python -m bench.evidence --quick         a look in under a minute
python -m bench.evidence --only verdict  one of them
python -m bench.evidence --update        write the tables into docs/testing.md; with --only, those of one
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence

from bench.evidence.registry import Rate, Simulation, measure
from bench.processes import ROOT
from bench.report import note, read_section, table, update_page

MODULES = ("comparing", "costs", "experimenting", "judges", "duels", "clicks")
"""The modules of this package with a tuple ``SIMULATIONS``."""

_HEADER = ("", "how often", "promised", "worst", "kept")
PAGE = ROOT / "docs" / "testing.md"
SECTION = "bench.evidence"
_QUICK = (
    "From a run with `--quick`: with so few runs, rates are rough, the worst of many cells exceeds its promise by chance, "
    "and only gross errors show."
)


def simulations() -> Iterator[Simulation]:
    """Yield every simulation."""
    for module in MODULES:
        yield from importlib.import_module(f"bench.evidence.{module}").SIMULATIONS


def markdown(found: Sequence[tuple[Simulation, Sequence[Rate]]], *, is_quick: bool = False) -> str:
    """Return a summary, and a table for each simulation."""
    rows = [_summary(simulation, rates) for simulation, rates in found]
    parts = [_QUICK] if is_quick else []
    parts += [table(_HEADER, rows)]
    parts += [_details(simulation, rates) for simulation, rates in found if len(rates) > 1]
    return "\n\n".join(parts)


def merged(section: str, found: Sequence[tuple[Simulation, Sequence[Rate]]]) -> str:
    """Return the text of the page with the figures of some simulations replaced.

    Raises:
        ValueError: the text has none of a simulation.
    """
    for simulation, rates in found:
        title = re.escape(simulation.title)
        pieces = [(rf"^\| {title} \|[^\n]*", table(_HEADER, [_summary(simulation, rates)]).splitlines()[-1])]
        if len(rates) > 1:
            pieces.append((rf"^\*\*{title}: .*?(?=\n\n\*\*|\Z)", _details(simulation, rates)))
        for pattern, piece in pieces:
            escaped = piece.replace("\\", "\\\\")
            section, count = re.subn(pattern, escaped, section, flags=re.MULTILINE | re.DOTALL)
            if count != 1:
                raise ValueError(f"the page has {count} times: {simulation.title}")
    return section


def _summary(simulation: Simulation, rates: Sequence[Rate]) -> tuple[str, ...]:
    worst = (max if simulation.sense == "<=" else min)(rates, key=lambda rate: rate.value)
    is_kept = all(rate.is_kept(simulation) for rate in rates)
    return (
        simulation.title,
        simulation.counted,
        f"{simulation.sense} {_percent(simulation.promised)}",
        f"{_percent(worst.value)} ({worst.case.row}, {worst.case.column})",
        "yes" if is_kept else "**no**",
    )


def _details(simulation: Simulation, rates: Sequence[Rate]) -> str:
    columns = list(dict.fromkeys(rate.case.column for rate in rates))
    cells = {(rate.case.row, rate.case.column): rate for rate in rates}
    rows = [
        [row, *(_cell(simulation, cells[row, column]) for column in columns)]
        for row in dict.fromkeys(rate.case.row for rate in rates)
    ]
    runs = sorted({rate.runs for rate in rates})
    drawn = f"{runs[0]:,} runs each" if len(runs) == 1 else f"{runs[0]:,} to {runs[-1]:,} runs each"
    notes = f"\n\n{simulation.notes}" if simulation.notes else ""
    return f"**{simulation.title}: {simulation.counted}** ({drawn}){notes}\n\n{table(['', *columns], rows)}"


def _cell(simulation: Simulation, rate: Rate) -> str:
    text = _percent(rate.value)
    return text if rate.is_kept(simulation) else f"**{text}**"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulations; the exit status says whether every promise is kept."""
    known = list(simulations())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--only", choices=[one.name for one in known], action="append", help="only this simulation")
    parser.add_argument("--update", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    found = []
    for simulation in known:
        if options.only and simulation.name not in options.only:
            continue
        note(simulation.title)
        found.append((simulation, measure(simulation, options.seed, is_quick=options.quick, workers=options.workers)))
    text = markdown(found, is_quick=options.quick)
    print(text)
    if options.update:
        update_page(SECTION, merged(read_section(SECTION, PAGE), found) if options.only else text, PAGE)
    return 0 if all(rate.is_kept(simulation) for simulation, rates in found for rate in rates) else 1


if __name__ == "__main__":
    sys.exit(main())
