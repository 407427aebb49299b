"""The shortest abuse: the worst attacks for two seconds each. `python -m loadtest.abuse` runs longer."""

from __future__ import annotations

from collections import Counter

import pytest

from loadtest.abuse import QUICK, Abuse, Latencies, Outcome, abuse, as_table
from loadtest.attacks import ATTACKS, MIB

pytestmark = pytest.mark.slow


@pytest.mark.timeout(300)
def test_the_worst_attacks_take_no_memory_and_no_answer_from_another_client() -> None:
    result = abuse(QUICK, seconds=2)

    assert result.problems(has_goals_of_time=False) == []
    assert [outcome.name for outcome in result.outcomes] == list(QUICK)
    for outcome in result.outcomes:
        assert outcome.victim.seconds, outcome.name
        assert outcome.victim.quantile(0.5) < 10, outcome.name


def made(**changes: object) -> Abuse:
    fields = {
        "name": "bodies",
        "above_ready_bytes": 100 * MIB,
        "victim": Latencies([0.01] * 100),
        "health": Latencies([0.001] * 100),
        "statuses": Counter({"503": 40}),
    }
    outcome = Outcome(**{**fields, **changes})  # type: ignore[arg-type]
    return Abuse("a cgroup", 800 * MIB, Latencies([0.005] * 100), [outcome])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"above_ready_bytes": 1025 * MIB}, "bodies: 1025 MiB above ready"),
        ({"victim": Latencies([0.01] * 100, Counter({"503": 1}))}, "bodies: not answered: {'503': 1}"),
        ({"health": Latencies([0.01] * 100, Counter({"ConnectionResetError": 2}))}, "{'ConnectionResetError': 2}"),
        ({"victim": Latencies([0.026] * 100)}, "p50 is 5.2 times its value without an attack"),
        ({"victim": Latencies([0.01] * 90 + [0.6] * 10)}, "p99 is 0.60 s"),
        ({"victim": Latencies()}, "nan times"),
        ({"health": Latencies([0.001] * 90 + [0.2] * 10)}, "p99 of /health/live is 0.20 s"),
    ],
)
def test_a_missed_goal_is_a_problem(changes: dict[str, object], problem: str | None) -> None:
    problems = made(**changes).problems()

    if problem is None:
        assert problems == []
    else:
        assert any(problem in found for found in problems)
    assert set(made(**changes).problems(has_goals_of_time=False)) <= set(problems)


def test_the_table_has_a_row_for_each_attack() -> None:
    table = as_table(made())

    assert f"| {ATTACKS['bodies'][0]} | 100 | 10 (2.0) | 10 | 10 | 0 | 1 | 1 |" in table
    assert "memory limited to 3072 MiB by a cgroup; ready with 800 MiB; the other client alone: p50 5 ms" in table
