"""Simulate a judge with a known bias: how often verdicts are false, by the judge alone and corrected by people.

::

    python -m bench.judging             half a minute; the rates
    python -m bench.judging --update    also writes them into docs/judge.md

Two arms are equally good. The difference of a query by people is 0 in 54 % of the queries and otherwise normal, as nDCG@10
with one relevant document is; a judge repeats it, but for noise, and favors one arm in some of the queries.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.processes import ROOT
from bench.report import update_page
from gateway.compare.judge.inference import corrected_difference, mean_of
from gateway.compare.statistics import ALPHA

PAGE: Final = ROOT / "docs" / "judge.md"

_TIED_SHARE, _SPREAD = 0.54, 0.35
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judge:
    """A simulated judge.

    Attributes:
        noise: share of the queries in which its grades have nothing to do with people's.
        bias_share: share of the queries in which it favors the arm, even against people's grades.
        bias: by this difference.
    """

    noise: float
    bias_share: float = 0.0
    bias: float = 0.5

    def grade(self, truth: Floats, random: np.random.Generator) -> Floats:
        """Return the differences by the judge, for those by people."""
        judged = truth.copy()
        is_noise = random.random(truth.size) < self.noise
        judged[is_noise] = differences(int(is_noise.sum()), 0.0, random)
        judged[random.random(truth.size) < self.bias_share] = self.bias
        return judged


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Rates over many comparisons.

    Attributes:
        false_by_judge, covered_by_judge: verdicts of the judge alone that are false, and intervals that hold the truth.
        false_verdicts, covered: the same corrected by people.
        width, width_by_people: of the interval corrected by people, and by people alone.
    """

    false_by_judge: float
    covered_by_judge: float
    false_verdicts: float
    covered: float
    width: float
    width_by_people: float


def differences(number: int, shift: float, random: np.random.Generator) -> Floats:
    """Return differences of queries whose mean is about ``shift``."""
    values = random.normal(shift / (1 - _TIED_SHARE), _SPREAD, number)
    values[random.random(number) < _TIED_SHARE] = 0.0
    return np.clip(values, -1.0, 1.0)


def simulate(judge: Judge, num_queries: int, num_checked: int, num_runs: int, seed: int) -> ErrorRates:
    """Simulate comparisons of two equally good arms."""
    random = np.random.default_rng(seed)
    counts = np.zeros(4)
    widths = np.zeros(2)
    for _ in range(num_runs):
        truth = differences(num_queries, 0.0, random)
        judged = judge.grade(truth, random)
        checked = random.permutation(num_queries)[:num_checked]
        by_people = {str(query): float(truth[query]) for query in checked}
        alone, people = mean_of(judged.tolist()), mean_of(list(by_people.values()))
        both = corrected_difference(by_people, {str(query): float(value) for query, value in enumerate(judged)})
        for place, one in enumerate((alone, both)):
            counts[2 * place] += one.p < ALPHA
            counts[2 * place + 1] += one.figure.low <= 0 <= one.figure.high
        widths += both.figure.high - both.figure.low, people.figure.high - people.figure.low
    return ErrorRates(*(float(value) for value in (*counts / num_runs, *widths / num_runs)))


def table(num_runs: int = 2000, seed: int = 1) -> str:
    """Return the rates of several judges in Markdown."""
    header = (
        "judge",
        "queries",
        "checked",
        "false, judge alone",
        "false, corrected",
        "covered",
        "width",
        "people alone",
    )
    rows = [header, ("---",) * len(header)]
    for name, judge in (
        ("noisy in 50 % of the queries", Judge(0.5)),
        ("noisy in 20 %, favors an arm in 10 %", Judge(0.2, 0.1)),
        ("noisy in 20 %, favors an arm in 30 %", Judge(0.2, 0.3)),
    ):
        for num_queries, num_checked in ((300, 60), (600, 60), (600, 120)):
            rates = simulate(judge, num_queries, num_checked, num_runs, seed)
            shares = (rates.false_by_judge, rates.false_verdicts, rates.covered)
            figures = (
                *(f"{100 * share:.1f} %" for share in shares),
                f"{rates.width:.3f}",
                f"{rates.width_by_people:.3f}",
            )
            rows.append((name, str(num_queries), str(num_checked), *figures))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table into docs/judge.md")
    options = parser.parse_args()
    markdown = table()
    print(markdown)
    if options.update:
        update_page("bench.judging", markdown, PAGE)


if __name__ == "__main__":
    main()
