"""The stats of an experiment, and which of them survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from gateway.config.registry import Experiment
from gateway.experiments.arms import RequestRecord
from gateway.experiments.exposures import Exposure, ExposureLog, read_exposures
from gateway.experiments.report import ArmReport, ExperimentReport, is_running
from gateway.experiments.stats import ExperimentStats

MakeExperiment = Callable[..., Experiment]
MakeRecord = Callable[..., RequestRecord]
GENERATION = "aaaaaaaa"


def open_log(tmp_path: Path) -> ExposureLog:
    return ExposureLog(tmp_path / "exposures.jsonl", 10**6, 3)


def units(report: ExperimentReport) -> list[int]:
    return [arm.units for arm in report.evidence]


def test_before_any_request_all_is_zero(make_experiment: MakeExperiment) -> None:
    report = ExperimentStats(None).report(make_experiment(90, 10), GENERATION)

    assert report.evidence[1] == ArmReport(
        arm="b",
        model="model-b",
        weight=10,
        share=0.1,
        units=0,
        unanswered_units=0,
        requests=0,
        errors=0,
        error_rate=0.0,
        server_errors=0,
        client_errors=0,
        errors_by_code={},
        texts=0,
        tokens=0,
        tokens_per_s=None,
        p50_s=None,
        p95_s=None,
        p99_s=None,
        at_least=[],
        queue_p95_s=None,
        largest_unit_share=None,
    )
    assert report.units_since is None
    assert report.uncounted == {}
    assert report.sample_ratio.verdict == "no units yet"


def test_the_requests_of_an_arm_are_summed_up(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for i in range(1_000):
        stats.record(make_record(i % 7, elapsed_s=(i + 1) / 1_000, queue_s=(i + 1) / 10_000))
    stats.record(make_record(99, arm="b", model="model-b"))

    arm, other = stats.report(make_experiment(1, 1), GENERATION).evidence

    assert (arm.units, arm.requests, arm.errors, arm.texts, arm.tokens) == (7, 1_000, 0, 2_000, 10_000)
    assert arm.tokens_per_s == pytest.approx(10_000 / 500.5)
    assert [arm.p50_s, arm.p95_s, arm.p99_s, arm.queue_p95_s] == pytest.approx([0.5, 0.95, 0.99, 0.095], rel=0.02)
    assert arm.at_least == []
    assert arm.largest_unit_share == pytest.approx(143 / 1_000)
    assert (other.units, other.requests) == (1, 1)


@pytest.mark.parametrize(("num", "has_p95", "has_p99"), [(199, False, False), (200, True, False), (1_000, True, True)])
def test_a_percentile_needs_enough_requests(
    make_experiment: MakeExperiment, make_record: MakeRecord, num: int, has_p95: bool, has_p99: bool
) -> None:
    stats = ExperimentStats(None)
    for i in range(num):
        stats.record(make_record(i))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert arm.p50_s is not None
    assert ((arm.p95_s is not None), (arm.p99_s is not None)) == (has_p95, has_p99)
    assert (arm.queue_p95_s is not None) == has_p95


def test_errors_of_the_server_and_of_clients_are_counted_apart(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    stats = ExperimentStats(None)
    stats.record(make_record(1))
    failed = {"space": None, "num_texts": 0, "num_tokens": 0, "elapsed_s": 0.00001}
    for code in ("overloaded", "overloaded", "inference_failed"):
        stats.record(make_record(2, error_code=code, is_server_error=True, **failed))
    stats.record(make_record(3, error_code="invalid_input", **failed))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert (arm.requests, arm.errors, arm.error_rate, arm.texts) == (5, 4, 0.8, 2)
    assert (arm.server_errors, arm.client_errors) == (3, 1)
    assert arm.errors_by_code == {"overloaded": 2, "inference_failed": 1, "invalid_input": 1}
    assert arm.p50_s == pytest.approx(0.1, rel=0.02)  # refusals take microseconds and do not count as latencies


def test_units_whose_requests_fail_stay_in_their_arm(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for unit in range(4):
        stats.record(make_record(unit, space=None, error_code="deadline_exceeded", is_server_error=True, is_cut=True))
    stats.record(make_record(3))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert (arm.units, arm.unanswered_units) == (4, 3)


def test_time_outs_and_hang_ups_count_as_latencies_of_at_least_their_time(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    """Without them an arm that answers 5 % of its requests never has the p95 of one that answers all."""
    stats = ExperimentStats(None)
    for i in range(1_000):
        is_cut = i % 20 == 0
        fields = {"space": None, "error_code": "deadline_exceeded", "is_cut": True, "elapsed_s": 30.0} if is_cut else {}
        stats.record(make_record(i, **fields))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert [arm.p50_s, arm.p95_s, arm.p99_s] == pytest.approx([0.1, 0.1, 30.0], rel=0.02)
    assert arm.at_least == ["p99_s"]
    assert arm.tokens_per_s == pytest.approx(100)  # of answered requests


@pytest.mark.parametrize("code", ["upstream_failed", "upstream_unavailable", "model_recovering", "deadline_exceeded"])
def test_a_server_error_after_a_long_time_counts_as_a_latency_of_at_least_that_time(
    make_experiment: MakeExperiment, make_record: MakeRecord, code: str
) -> None:
    """The time limit of another server, or of a forward pass, is shorter than that of the request."""
    stats = ExperimentStats(None)
    for i in range(1_000):
        is_hung = i % 10 == 0
        failed = {"space": None, "error_code": code, "is_server_error": True, "is_cut": code == "deadline_exceeded"}
        stats.record(make_record(i, **(failed | {"elapsed_s": 60.0} if is_hung else {})))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert [arm.p50_s, arm.p95_s] == pytest.approx([0.1, 60.0], rel=0.02)
    assert arm.at_least == ["p95_s", "p99_s"]


def test_an_arm_that_only_fails_late_has_a_latency(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for seconds in (0.001, 60.0, 60.0):
        stats.record(make_record(1, space=None, error_code="upstream_failed", is_server_error=True, elapsed_s=seconds))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert arm.p50_s == pytest.approx(60.0, rel=0.02)
    assert arm.at_least == ["p50_s"]


def test_requests_outside_the_split_are_counted_by_reason(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    log = open_log(tmp_path)
    stats = ExperimentStats(log)
    for reason in ("forced", "excluded", "forced"):
        stats.record(make_record(1, reason=reason, is_counted=False))

    report = stats.report(make_experiment(1, 1), GENERATION)

    assert report.uncounted == {"forced": 2, "excluded": 1}
    assert (report.evidence[0].requests, report.evidence[0].units) == (0, 0)
    assert list(read_exposures(log.files())) == []


def test_requests_without_a_unit_are_counted_without_one(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    stats = ExperimentStats(None)
    stats.record(make_record(None, reason="random"))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert (arm.requests, arm.units) == (1, 0)


def test_the_first_request_of_a_unit_in_an_arm_is_logged_and_its_first_answer(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    log = open_log(tmp_path)
    stats = ExperimentStats(log)
    for _ in range(3):
        stats.record(make_record(1, space=None, error_code="overloaded"))
    for unit, arm in ((1, "a"), (1, "a"), (2, "a"), (1, "b"), (1, "a")):
        stats.record(make_record(unit, arm=arm))
    stats.record(make_record(2, space=None, error_code="overloaded"))
    stats.record(make_record(1, generation="bbbbbbbb"))

    assert [
        (one.unit[-1], one.arm, one.generation, one.space, one.answered) for one in read_exposures(log.files())
    ] == [
        ("1", "a", GENERATION, None, False),
        ("1", "a", GENERATION, "model-a@0123456789ab", True),
        ("2", "a", GENERATION, "model-a@0123456789ab", True),
        ("1", "b", GENERATION, "model-a@0123456789ab", True),
        ("1", "a", "bbbbbbbb", "model-a@0123456789ab", True),
    ]
    assert {(one.share, one.source) for one in read_exposures(log.files())} == {(0.5, "header:x-unit")}


def test_scores_are_in_no_space_and_their_units_are_counted(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    log = open_log(tmp_path)
    stats = ExperimentStats(log)
    stats.record(make_record(1, space=None))

    assert units(stats.report(make_experiment(1, 1), GENERATION)) == [1, 0]
    assert [exposure.space for exposure in read_exposures(log.files())] == [None]


def test_who_was_never_answered_is_known_after_a_restart(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    before = ExperimentStats(open_log(tmp_path))
    for unit in (1, 2):
        before.record(make_record(unit, space=None, error_code="overloaded"))
    before.record(make_record(2))

    log = open_log(tmp_path)
    after = ExperimentStats(log)
    assert after.report(make_experiment(1, 1), GENERATION).evidence[0].unanswered_units == 1
    after.record(make_record(1))

    assert after.report(make_experiment(1, 1), GENERATION).evidence[0].unanswered_units == 0
    assert [(one.unit[-1], one.answered) for one in read_exposures(log.files())] == [
        ("1", False),
        ("2", False),
        ("2", True),
        ("1", True),
    ]


def test_units_survive_a_restart_and_requests_do_not(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    experiment = make_experiment(1, 1)
    before = ExperimentStats(open_log(tmp_path))
    for unit in range(5):
        before.record(make_record(unit))
    since = before.report(experiment, GENERATION).units_since

    log = open_log(tmp_path)
    after = ExperimentStats(log)
    for unit in (3, 4, 5):
        after.record(make_record(unit))
    report = after.report(experiment, GENERATION)

    assert units(report) == [6, 0]
    assert report.evidence[0].requests == 3
    assert report.units_since == since
    assert since is not None
    assert since <= report.since
    assert len(list(read_exposures(log.files()))) == 6


def test_the_first_unit_is_since_when_they_are_counted(
    monkeypatch: pytest.MonkeyPatch, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    times = iter(["the start", "first", "second"])
    monkeypatch.setattr("gateway.experiments.stats.now", lambda: next(times))
    stats = ExperimentStats(None)
    for unit in (1, 2):
        stats.record(make_record(unit))

    report = stats.report(make_experiment(1, 1), GENERATION)

    assert (report.since, report.units_since) == ("the start", "first")


def test_units_are_hashes_of_sixty_four_bits(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    log = open_log(tmp_path)
    stats = ExperimentStats(log)
    for unit in (0, 2**64 - 1, 0xFEDCBA9876543210, 2**64 - 1):
        stats.record(make_record(unit))

    assert units(stats.report(make_experiment(1, 1), GENERATION)) == [3, 0]
    assert units(ExperimentStats(log).report(make_experiment(1, 1), GENERATION)) == [3, 0]


def test_the_units_of_several_logs_are_united(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    logs = [open_log(tmp_path / name) for name in ("first", "second")]
    for log, numbers in zip(logs, (range(6), range(4, 10)), strict=True):
        replica = ExperimentStats(log)
        for unit in numbers:
            replica.record(make_record(unit))
    earliest = next(read_exposures(logs[0].files())).time

    united = ExperimentStats(None)
    for log in reversed(logs):  # in any order
        united.add(read_exposures(log.files()))
    report = united.report(make_experiment(1, 1), GENERATION)

    assert units(report) == [10, 0]
    assert report.units_since == earliest


def test_the_earliest_exposure_counts_in_any_order(make_experiment: MakeExperiment) -> None:
    stats = ExperimentStats(None)
    times = [f"2026-01-0{day}T00:00:00.000+00:00" for day in (2, 1, 3)]

    stats.add(Exposure(time, "exp", GENERATION, "a", f"{i:016x}", "m", "s") for i, time in enumerate(times))

    assert stats.report(make_experiment(1, 1), GENERATION).units_since == times[1]


def test_other_weights_have_their_own_stats_and_the_last_four_are_kept(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    experiment = make_experiment(1, 1)
    stats = ExperimentStats(None)
    for generation in "pqrs":
        stats.record(make_record(1, generation=generation))
    assert units(stats.report(experiment, "t")) == [0, 0]

    stats.record(make_record(2, generation="p"))  # a reload was taken back
    stats.record(make_record(1, generation="t"))

    kept = {generation: units(stats.report(experiment, generation))[0] for generation in "pqrst"}
    assert kept == {"p": 2, "q": 0, "r": 1, "s": 1, "t": 1}


def test_a_wrong_split_is_reported(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for unit in range(1_000):
        stats.record(make_record(unit, arm="ab"[unit % 2]))

    assert not stats.report(make_experiment(50, 50), GENERATION).mismatch
    assert stats.report(make_experiment(60, 40), GENERATION).mismatch
    assert stats.report(make_experiment(1, 0), GENERATION).mismatch


def test_after_a_change_of_weights_the_split_is_tested_more_strictly(
    make_experiment: MakeExperiment, make_record: MakeRecord, tmp_path: Path
) -> None:
    stats = ExperimentStats(open_log(tmp_path))
    for unit in range(500):
        stats.record(make_record(unit, arm="ab"[unit % 5 > 1]))
    p = stats.report(make_experiment(50, 50), GENERATION).sample_ratio.p
    for unit in range(500):
        stats.record(make_record(unit, arm="ab"[unit % 5 > 1], generation="later"))

    assert p is not None
    for one in (stats, ExperimentStats(open_log(tmp_path))):
        assert one.report(make_experiment(50, 50), GENERATION).sample_ratio.p == pytest.approx(p)
        assert one.report(make_experiment(50, 50), "later").sample_ratio.p == pytest.approx(3 * p)


def test_no_arm_is_called_better_or_worse_under_a_mismatch(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    """The arm that lost its slow units looks fast."""
    stats = ExperimentStats(None)
    for unit in range(1_000):
        seconds = (0.2 if unit % 2 else 0.1) * (1 + unit % 7 / 10)
        stats.record(make_record(unit, arm="ab"[unit % 2], elapsed_s=seconds))

    sound = stats.report(make_experiment(50, 50), GENERATION).guardrails
    wrong = stats.report(make_experiment(60, 40), GENERATION).guardrails

    assert [(one.metric, one.verdict) for one in sound] == [("latency", "worse"), ("errors", "not yet")]
    assert [one.verdict for one in wrong] == ["not compared", "not compared"]


def test_a_mismatch_is_found_again_after_a_restart(
    tmp_path: Path, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    """Though the units that came later have evened out the counts."""
    log = open_log(tmp_path)
    stats = ExperimentStats(log)
    for unit in range(1_400):
        stats.record(make_record(unit, arm="a" if unit < 700 else "b"))

    for one in (stats, ExperimentStats(log)):
        report = one.report(make_experiment(50, 50), GENERATION)
        assert units(report) == [700, 700]
        assert report.sample_ratio.mismatch


def test_an_arm_that_is_full_is_not_a_mismatch(
    make_experiment: MakeExperiment, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other arms would catch up with it, so units are tested up to then."""
    for module in ("arms", "units"):
        monkeypatch.setattr(f"gateway.experiments.{module}.MAX_UNITS", 300)
    stats = ExperimentStats(None)
    for unit in range(600):
        stats.record(make_record(unit, arm="b" if unit % 4 == 0 else "a", share=0.25 if unit % 4 == 0 else 0.75))

    report = stats.report(make_experiment(3, 1), GENERATION)

    assert units(report) == [300, 150]
    assert not report.mismatch
    assert report.sample_ratio.verdict.endswith("; units are counted up to 8,000,000 per arm")


def test_requests_without_a_unit_are_tested_too(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for number in range(4_000):
        stats.record(make_record(None, reason="random", arm="b" if number % 10 == 0 else "a"))

    report = stats.report(make_experiment(50, 50), GENERATION)

    assert (report.sample_ratio.verdict, report.sample_ratio.mismatch) == ("no units yet", False)
    assert report.request_ratio is not None
    assert report.request_ratio.mismatch
    assert report.request_ratio.arm == "b"
    assert "arm 'b' has 400 requests, and 2,000 are expected" in report.request_ratio.verdict
    assert report.mismatch
    assert stats.report(make_experiment(50, 50, kind="cross_space"), GENERATION).request_ratio is None


def test_units_are_counted_by_their_source(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for unit in range(300):
        stats.record(make_record(unit))
    for _ in range(100):
        stats.record(make_record(1_000, source="api_key"))

    report = stats.report(make_experiment(50, 50), GENERATION)

    assert [(one.source, one.units, one.requests) for one in report.sources] == [
        ("header:x-unit", 300, 300),
        ("api_key", 1, 100),
    ]
    (warning,) = report.warnings
    assert warning.startswith(
        "a single unit sent 25% of the 400 requests of arm 'a', and decides its latency and errors: "
    )


@pytest.mark.parametrize(("num_of_one", "num_others", "is_warned"), [(10, 89, False), (11, 89, True), (10, 90, False)])
def test_a_unit_is_called_large_above_a_tenth_of_at_least_100_requests(
    make_experiment: MakeExperiment, make_record: MakeRecord, num_of_one: int, num_others: int, is_warned: bool
) -> None:
    stats = ExperimentStats(None)
    for unit in [0] * num_of_one + list(range(1, num_others + 1)):
        stats.record(make_record(unit))

    assert bool(stats.report(make_experiment(50, 50), GENERATION).warnings) is is_warned


NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("start", "end", "runs"),
    [
        (None, None, True),
        (NOW - HOUR, None, True),
        (NOW + HOUR, None, False),
        (None, NOW + HOUR, True),
        (None, NOW - HOUR, False),
        (NOW - HOUR, NOW + HOUR, True),
    ],
)
def test_an_experiment_runs_between_start_and_end(
    make_experiment: MakeExperiment, start: datetime | None, end: datetime | None, runs: bool
) -> None:
    assert is_running(make_experiment(1, 1, start=start, end=end)) is runs


# ------------------------------------------------------------------------------------------------- since when, and for what


def test_each_set_of_weights_is_counted_since_it_came(
    monkeypatch: pytest.MonkeyPatch, make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    times = iter(["t1", "t2", "t3", "t4", "t5"])
    monkeypatch.setattr("gateway.experiments.stats.now", lambda: next(times))
    experiment = make_experiment(1, 1)
    stats = ExperimentStats(None)
    stats.record(make_record(None, generation="p"))
    stats.record(make_record(None, generation="q"))

    assert stats.report(experiment, "p", "t0").since == "t0"  # served before the first request came
    assert stats.report(experiment, "q", "t9").since == "t2"  # a reload was undone: the counts continued
    assert stats.report(experiment, "never asked", "t8").since == "t8"


@pytest.mark.parametrize(
    ("num_without", "num_with", "warnings"),
    [
        (0, 0, []),
        (0, 5, []),
        (3, 4, []),
        (1000, 0, ["all 1,000 requests had no unit, so the control arm 'a' answered them and they are not counted: a unit "
                  "is made from `header:x-unit`, and these requests have none of them"]),
        (4, 4, ["4 of 8 requests had no unit, so the control arm 'a' answered them and they are not counted: a unit is made "
               "from `header:x-unit`, and these requests have none of them"]),
    ],
)  # fmt: skip
def test_an_experiment_whose_requests_have_no_unit_gets_a_warning(
    make_experiment: MakeExperiment,
    make_record: MakeRecord,
    num_without: int,
    num_with: int,
    warnings: list[str],
) -> None:
    stats = ExperimentStats(None)
    for _ in range(num_without):
        stats.record(make_record(None, reason="no_unit", is_counted=False))
    for unit in range(num_with):
        stats.record(make_record(unit))

    assert stats.report(make_experiment(1, 1), GENERATION).warnings == warnings


def test_at_the_end_the_log_is_closed(tmp_path: Path, make_record: MakeRecord) -> None:
    stats = ExperimentStats(open_log(tmp_path))
    stats.record(make_record(1))

    stats.close()

    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []


@pytest.mark.parametrize(("weights", "compared"), [((1, 1), {"b"}), ((0, 1), set()), ((1, 0), set())])
def test_only_arms_that_get_traffic_have_guard_rails(
    make_experiment: MakeExperiment, make_record: MakeRecord, weights: tuple[int, int], compared: set[str]
) -> None:
    stats = ExperimentStats(None)
    for unit in range(100):
        stats.record(make_record(unit, arm="ab"[unit % 2], elapsed_s=0.1 + unit / 1_000))

    report = stats.report(make_experiment(*weights), GENERATION)

    assert {guardrail.arm for guardrail in report.guardrails} == compared


# ------------------------------------------------------------------------------------------------------------ a full disk

FULL_DISK = Path("/dev/full")


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("who", ["a unit that was not written", "another unit", "the end"])
def test_lines_that_a_full_disk_rejected_are_written_when_there_is_room(
    tmp_path: Path, make_record: MakeRecord, who: str
) -> None:
    path = tmp_path / "exposures.jsonl"
    path.symlink_to(FULL_DISK)
    stats = ExperimentStats(open_log(tmp_path))
    with capture_logs():
        for unit in (1, 2, 1):
            stats.record(make_record(unit))
    path.unlink()

    if who == "the end":
        stats.close()
    else:
        stats.record(make_record(1 if who == "a unit that was not written" else 3))

    written = [int(exposure.unit, 16) for exposure in read_exposures([path])]
    assert sorted(written) == ([1, 2] if who != "another unit" else [1, 2, 3])
    stats.record(make_record(2))
    assert len(list(read_exposures([path]))) == len(written)


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
def test_what_waits_for_room_has_a_limit(
    tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.experiments.stats._MAX_UNWRITTEN", 3)
    path = tmp_path / "exposures.jsonl"
    path.symlink_to(FULL_DISK)
    stats = ExperimentStats(open_log(tmp_path))
    with capture_logs():
        for unit in range(10):
            stats.record(make_record(unit))
    path.unlink()

    stats.close()

    assert len(list(read_exposures([path]))) == 3
