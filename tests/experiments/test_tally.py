"""The counts of requests as values: they are added without a loss."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from gateway.config.registry import Experiment
from gateway.experiments.arms import Generation, RequestRecord
from gateway.experiments.stats import ExperimentStats
from gateway.experiments.tally import add_tally, tally_of

MakeExperiment = Callable[..., Experiment]
MakeRecord = Callable[..., RequestRecord]
GENERATION = "aaaaaaaa"


def requests(make_record: MakeRecord) -> list[RequestRecord]:
    """Return 400 requests of both arms, with units and without, of which some fail or are outside the split."""
    chosen = random.Random(3)
    found = []
    for i in range(400):
        fields: dict[str, object] = {"arm": chosen.choice("ab"), "elapsed_s": chosen.lognormvariate(-3, 1)}
        if i % 7 == 0:
            fields |= {"error_code": "overloaded", "is_server_error": True, "space": None, "elapsed_s": 1e-5}
        if i % 11 == 0:
            fields |= {"error_code": "deadline_exceeded", "is_server_error": True, "is_cut": True, "elapsed_s": 30.0}
        if i % 50 == 0:
            fields |= {"is_counted": False, "reason": "forced"}
        found.append(make_record(None if i % 5 == 0 else i % 90, **fields))
    return found


def test_counts_that_were_stored_in_parts_are_those_of_one_process(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    experiment = make_experiment(1, 1)
    whole, parts = ExperimentStats(None), [ExperimentStats(None), ExperimentStats(None)]
    for i, request in enumerate(requests(make_record)):
        whole.record(request)
        parts[i % 2].record(request)
    united = Generation("2027-01-01T00:00:00.000+00:00")
    for part in parts:
        add_tally(united, tally_of(part._generation("exp", GENERATION)))

    after = ExperimentStats(None)
    after.restore(experiment, GENERATION, united, 0)
    report, expected = (stats.report(experiment, GENERATION) for stats in (after, whole))

    assert report.since < "2027"
    for arm, other in zip(report.evidence, expected.evidence, strict=True):
        seen = arm.model_copy(update={"units": other.units, "unanswered_units": other.unanswered_units})
        assert seen == other.model_copy(update={"tokens_per_s": pytest.approx(other.tokens_per_s)})
    for guardrail, same in zip(report.guardrails, expected.guardrails, strict=True):
        assert guardrail.model_dump() == pytest.approx(same.model_dump())
    assert report.uncounted == expected.uncounted
    assert {one.source: one.requests for one in report.sources} == {
        one.source: one.requests for one in expected.sources
    }
    assert report.request_ratio is not None
    assert expected.request_ratio is not None
    assert report.request_ratio.chi2 == expected.request_ratio.chi2
    process, same_process = (stats._generation("exp", GENERATION).request_ratio for stats in (after, whole))
    assert process.counts == same_process.counts
    assert process.log_e == pytest.approx(same_process.log_e)


def test_counting_continues_after_counts_were_restored(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    before, after = ExperimentStats(None), ExperimentStats(None)
    before.record(make_record(1))
    counts = Generation("2026-01-01T00:00:00.000+00:00")
    add_tally(counts, tally_of(before._generation("exp", GENERATION)))
    after.restore(make_experiment(1, 1), GENERATION, counts, 0)
    for unit in (1, 2):
        after.record(make_record(unit, elapsed_s=0.4))

    arm, _ = after.report(make_experiment(1, 1), GENERATION).evidence
    sums = after._generation("exp", GENERATION).arms["a"].sums

    assert (arm.requests, arm.units, arm.largest_unit_share) == (3, 2, pytest.approx(2 / 3))
    assert sorted(sums.columns()[0]) == [1.0, 2.0]
    assert after.stored_version("exp", GENERATION) == 0
    assert after.stored_version("exp", "another") == -1
