"""Conclusions are wrong as rarely as promised, in small deterministic simulations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from bench.evidence import __main__ as evidence
from bench.evidence.registry import Case, Rate, Simulation, measure
from bench.evidence.values import DRAWS
from bench.report import read_section

KNOWN = {simulation.name: simulation for simulation in evidence.simulations()}


def happens(share: float, rng: np.random.Generator) -> bool:
    return rng.random() < share


def simulation_of(share: float, runs: int = 400) -> Simulation:
    case = Case("a row", "a column", partial(happens, share), runs, runs // 4)
    return Simulation("coins", "Coins", "heads", "<=", 0.05, [case])


def small(name: str, runs: int, *rows: str) -> list[Rate]:
    """Run a simulation this often, in these rows only."""
    simulation = KNOWN[name]
    cases = [replace(case, quick=runs) for case in simulation.cases if case.row in rows or not rows]
    assert cases
    return measure(replace(simulation, cases=cases), 0, is_quick=True, workers=1)


@pytest.mark.parametrize(
    ("name", "runs", "rows"),
    [
        ("verdict", 50, ["50 queries", "100 queries", "300 queries"]),
        ("arms", 20, ["3 arms, 50 queries", "6 arms, 100 queries"]),
        ("interval", 50, ["100 queries"]),
        ("margin", 50, ["300 queries"]),
        ("groups", 50, ["300 queries of 30 topics", "100 queries of 20 topics"]),
        ("unjudged", 4, ["its first 10"]),
        ("judged", 4, []),
        ("cost", 15, []),
        ("slower", 5, []),
        ("judge", 100, ["favors an arm in 10 %"]),
        ("ratio", 40, ["50/50", "40/30/30", "5, 10, 25 and 50 %, new units"]),
        ("lost", 10, []),
        ("outcome", 10, ["conversions of 1 %", "clicks per search"]),
        ("effect", 10, []),
        ("ramp", 10, []),
        ("ramped", 5, []),
        ("guardrail", 20, []),
        ("hung", 3, []),
        ("duel", 20, ["errs in 30 %", "favors the left list in 30 %"]),
        ("tastes", 20, ["5 voters", "15 voters"]),
        ("preferred", 50, []),
        ("share", 30, []),
        ("clicks", 10, []),
        ("clicked", 5, []),
    ],
)
def test_promises_are_kept(name: str, runs: int, rows: list[str]) -> None:
    broken = [(rate.case, rate.value) for rate in small(name, runs, *rows) if not rate.is_kept(KNOWN[name])]
    assert not broken


def test_every_simulation_is_tried_here() -> None:
    assert len(KNOWN) == len(list(evidence.simulations())), "a name is used twice"
    mark = next(mark for mark in test_promises_are_kept.pytestmark if mark.name == "parametrize")
    assert {name for name, *_ in mark.args[1]} == KNOWN.keys()


def test_a_broken_promise_shows() -> None:
    kept, broken = (measure(simulation_of(share), 0, is_quick=False, workers=1) for share in (0.05, 0.1))
    assert kept[0].is_kept(simulation_of(0.05))
    assert not broken[0].is_kept(simulation_of(0.1))
    text = evidence.markdown([(simulation_of(0.1), [*broken, *broken])])
    assert f"| {100 * broken[0].value:.1f} % (a row, a column) | **no** |" in text
    assert f"**{100 * broken[0].value:.1f} %**" in text
    assert "--quick" not in text
    assert evidence.markdown([(simulation_of(0.1), broken)], is_quick=True).startswith("From a run with `--quick`")


def test_counts_do_not_depend_on_the_workers() -> None:
    one, two = (measure(simulation_of(0.3), 0, is_quick=False, workers=workers) for workers in (1, 2))
    other = measure(simulation_of(0.3), 1, is_quick=False, workers=1)
    assert [rate.count for rate in one] == [rate.count for rate in two] != [rate.count for rate in other]


def test_arms_of_the_draws_are_equally_good_and_vary_as_they_do_in_reality() -> None:
    spread = {"single": 0.24, "binary": 0.4, "easy": 0.15, "multi": 0.15, "skew": 0.14, "slips": 0.12}
    for kind, draw in DRAWS.items():
        before, after = draw(np.random.default_rng(0), 2, 40_000)
        assert np.mean(after - before) == pytest.approx(0, abs=0.005)
        assert np.std(after - before) == pytest.approx(spread[kind], abs=0.02)


def test_the_command_prints_and_sets_its_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "simulations", lambda: [simulation_of(0.02), simulation_of(0.2)])
    assert evidence.main(["--quick", "--workers", "1"]) == 1
    assert capsys.readouterr().out.count("| Coins | heads | <= 5.0 % |") == 2


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_page_has_the_figures_of_every_simulation(name: str) -> None:
    """If a promise was changed, the figures of the earlier one say nothing about it."""
    simulation, section = KNOWN[name], read_section(evidence.SECTION, evidence.PAGE)
    promised = f"{simulation.sense} {100 * simulation.promised:.1f} %"
    assert f"| {simulation.title} | {simulation.counted} | {promised} |" in section
    evidence.merged(section, [(simulation, [Rate(case, 0, 1) for case in simulation.cases])])


def test_the_figures_of_one_simulation_are_replaced_on_the_page() -> None:
    def measured(count: int) -> list[tuple[Simulation, list[Rate]]]:
        case = Case("a row", "a column", partial(happens, 0.0), 100, 10)
        others = [
            Simulation(name, title, "heads", "<=", 0.05, [case])
            for name, title in (("a", "Coins"), ("b", "Coins of gold"))
        ]
        return [(one, [Rate(case, count, 100), Rate(replace(case, column="another"), 0, 100)]) for one in others]

    page = evidence.markdown(measured(1))

    assert evidence.merged(page, measured(3)) == evidence.markdown(measured(3))
    assert evidence.merged(page, measured(3)[:1]).count("3.0 %") == 2
    with pytest.raises(ValueError, match="0 times: Coins"):
        evidence.merged("nothing", measured(1))
