"""The shortest soak: each thing that can go wrong, once, under load. `make soak` runs longer."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.simulated_cluster import Simulated
from loadtest import cluster_faults
from loadtest.batch import BatchOutcome, check
from loadtest.faults import FAULTS, Outcome, Victim, inflict
from loadtest.soak import Sample, Soak, as_table, loading, soak

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
def test_no_request_is_lost_or_wrong_after_any_fault() -> None:
    result = soak(seconds=10, peak=4)

    assert result.problems == []
    assert result.answered > 100
    assert len(result.outcomes) == len(FAULTS)
    assert [batch.answered + batch.failures.total() for batch in result.batches] == [
        batch.num_lines for batch in result.batches
    ]
    assert result.batches[0].answered > 100
    # Only commanded faults failed.
    allowed = {
        "503 model_recovering",
        "500 inference_failed",
        "500 out_of_memory",
        "429 overloaded",
        "504 deadline_exceeded",
    }
    assert result.failures.keys() <= allowed


def made(**changes: object) -> Soak:
    samples = [Sample(float(second), 1000.0, 20) for second in range(300)]
    fields = {
        "seconds": 300.0,
        "answered": 1000,
        "failures": Counter({"503 model_recovering": 3}),
        "outcomes": [Outcome("it fails", 1.0, 2.0)],
        "samples": samples,
        "exit_code": 0,
        "first_round_ended": 60.0,
    }
    return Soak(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"failures": Counter({"no answer: ConnectionResetError": 1})}, "1 requests had no answer"),
        ({"failures": Counter({"wrong answer: space": 2})}, "2 answers were wrong"),
        ({"outcomes": [Outcome("it fails", 1.0, float("nan"))]}, "not well again after: it fails"),
        ({"outcomes": [Outcome("it fails", 1.0, 2.0, "1 of 2 replicas after 120 s")]}, "it fails: 1 of 2 replicas"),
        ({"batches": [BatchOutcome(2, 1, Counter(), ["line-1 has no answer"])]}, "a batch: line-1 has no answer"),
        ({"exit_code": 1}, "exit code 1"),
        ({"samples": [Sample(float(s), 1000.0 + 3 * s, 20) for s in range(300)]}, "memory grew to 1.2"),
    ],
)
def test_violated_goals_are_reported(changes: dict[str, object], problem: str | None) -> None:
    problems = made(**changes).problems

    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)
    assert "| exit code after SIGTERM |" in as_table(made(**changes))


def test_a_fault_that_ends_badly_is_counted_and_the_others_have_their_turn() -> None:
    class Well(Victim):
        def recover(self) -> float:
            return 0.5

    def fail(_victim: Victim) -> None:
        """Something fails."""
        raise AssertionError("1 of 2 replicas after 120 s")

    outcome = inflict(Well(None, 0, Path("models.yaml")), fail)  # type: ignore[arg-type]

    assert (outcome.name, outcome.recovered_s) == ("Something fails", 0.5)
    assert outcome.problem == "1 of 2 replicas after 120 s"


@pytest.mark.parametrize(
    ("usable", "of_other", "missing"),
    [
        (["one"], ["one", "two"], "the gateway has 1 of 2 replicas after 0 s"),
        (["one", "two"], ["one"], "the other gateway has 1 of 2 replicas after 0 s"),
        ([], [], "the gateway has 0 of 2 replicas and the other gateway has 0 of 2 replicas after 0 s"),
    ],
)
def test_a_cluster_that_does_not_become_whole_says_what_it_lacks(
    usable: list[str], of_other: list[str], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_faults, "usable_on", lambda port, _model: of_other if port == 1 else usable)
    monkeypatch.setattr(cluster_faults, "_RETURN_S", 0.0)
    victim = cluster_faults.OnCluster(None, 0, Path("models.yaml"), other_port=1)  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match=f"^{missing}$"):
        victim.wait_until_whole()


class Machine:
    """A machine of a simulated cluster, with one process."""

    def __init__(self, node_id: str) -> None:
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self.node_id, self.process = node_id, process
        self.all_processes = {"raylet": [SimpleNamespace(process=process)]}


def test_the_machine_that_is_killed_has_a_replica_and_rather_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = machines = [Machine(name) for name in ("first", "second", "third")]
    simulated = Simulated("127.0.0.1:1", None, 1, list(machines))
    added: list[Machine] = []
    monkeypatch.setattr(simulated, "replace_machine", lambda: added.append(simulated.workers[-1]))
    monkeypatch.setattr(cluster_faults, "usable_on", lambda _port, _model: ["first", "first", "second"])
    monkeypatch.setattr(cluster_faults.time, "sleep", lambda _s: None)
    try:
        cluster_faults.kill_machine(cluster_faults.OnCluster(None, 0, Path("x"), simulated=simulated))  # type: ignore[arg-type]

        assert second.process.wait(30) == -signal.SIGKILL
        assert added == [second]
        assert (first.process.poll(), third.process.poll()) == (None, None)
    finally:
        for machine in machines:
            machine.process.kill()
            machine.process.communicate()


def test_the_load_ends_with_a_run_that_fails() -> None:
    with pytest.raises(RuntimeError, match="no load has come"), loading([sys.executable, "-c", "input()"]) as load:
        raise RuntimeError("no load has come")

    assert load.returncode is not None


def line(name: str, vector: list[float], status: int = 200) -> dict[str, object]:
    body = {"data": [{"index": 0, "embedding": vector}], "usage": {"total_tokens": 1}}
    failed = {"error": {"code": "inference_failed"}}
    return {"custom_id": name, "response": {"status_code": status, "body": body if status == 200 else failed}}


def test_a_line_that_is_lost_repeated_or_wrong_is_found() -> None:
    golden = {"x": np.array([1, 0], np.float32), "y": np.array([0, 1], np.float32)}
    texts = {"a": ["x"], "b": ["y"], "c": ["x"], "d": ["y"]}
    lines = [line("a", [1, 0]), line("b", [1, 0]), line("d", [0, 1]), line("d", [0, 1]), line("e", [], 500)]

    outcome = check(lines, texts, golden)

    assert [problem.partition(":")[0] for problem in outcome.problems] == [
        "c has no answer",
        "d has 2 answers",
        "e has 1 answers",
        "b",
    ]
    assert (outcome.answered, dict(outcome.failures)) == (3, {"500 inference_failed": 1})
