"""The stats of an experiment, and which of them survive a restart."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from gateway.config.registry import Experiment
from gateway.experiments.exposures import Exposure, ExposureLog, read_exposures
from gateway.experiments.report import ArmReport, ExperimentReport, is_running
from gateway.experiments.stats import ExperimentStats, RequestRecord

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
        requests=0,
        errors=0,
        error_rate=0.0,
        texts=0,
        tokens=0,
        tokens_per_s=None,
        p50_s=None,
        p95_s=None,
        p99_s=None,
        queue_p95_s=None,
    )
    assert report.units_since is None
    assert report.uncounted == {}
    assert report.sample_ratio.verdict == "too few units to tell: 0"


def test_the_requests_of_an_arm_are_summed_up(make_experiment: MakeExperiment, make_record: MakeRecord) -> None:
    stats = ExperimentStats(None)
    for i in range(100):
        stats.record(make_record(i % 7, elapsed_s=(i + 1) / 100, queue_s=(i + 1) / 1000))
    stats.record(make_record(99, arm="b", model="model-b"))

    arm, other = stats.report(make_experiment(1, 1), GENERATION).evidence

    assert (arm.units, arm.requests, arm.errors, arm.texts, arm.tokens) == (7, 100, 0, 200, 1000)
    assert arm.tokens_per_s == pytest.approx(1000 / 50.5)
    assert [arm.p50_s, arm.p95_s, arm.p99_s, arm.queue_p95_s] == pytest.approx([0.5, 0.95, 0.99, 0.095], rel=0.02)
    assert (other.units, other.requests) == (1, 1)


def test_errors_count_as_requests_and_for_nothing_else(
    make_experiment: MakeExperiment, make_record: MakeRecord
) -> None:
    stats = ExperimentStats(None)
    stats.record(make_record(1))
    for code in ("overloaded", "overloaded", "deadline_exceeded"):
        stats.record(make_record(2, space=None, error_code=code, elapsed_s=300.0, num_texts=0, num_tokens=0))

    arm = stats.report(make_experiment(1, 1), GENERATION).evidence[0]

    assert (arm.requests, arm.errors, arm.error_rate, arm.units, arm.texts) == (4, 3, 0.75, 1, 2)
    assert arm.p99_s == pytest.approx(0.1, rel=0.02)


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


def test_the_first_answer_of_a_unit_in_an_arm_is_logged(tmp_path: Path, make_record: MakeRecord) -> None:
    log = open_log(tmp_path)
    stats = ExperimentStats(log)
    stats.record(make_record(1, space=None, error_code="overloaded"))  # exposed to nothing
    for unit, arm in ((1, "a"), (1, "a"), (2, "a"), (1, "b"), (1, "a")):
        stats.record(make_record(unit, arm=arm))
    stats.record(make_record(1, generation="bbbbbbbb"))

    assert [(one.unit[-1], one.arm, one.generation, one.model, one.space) for one in read_exposures(log.files())] == [
        ("1", "a", GENERATION, "model-a", "model-a@0123456789ab"),
        ("2", "a", GENERATION, "model-a", "model-a@0123456789ab"),
        ("1", "b", GENERATION, "model-a", "model-a@0123456789ab"),
        ("1", "a", "bbbbbbbb", "model-a", "model-a@0123456789ab"),
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


def test_the_earliest_exposure_counts_in_whatever_order_they_come(make_experiment: MakeExperiment) -> None:
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

    assert not stats.report(make_experiment(50, 50), GENERATION).sample_ratio.mismatch
    assert stats.report(make_experiment(60, 40), GENERATION).sample_ratio.mismatch
    assert stats.report(make_experiment(1, 0), GENERATION).sample_ratio.mismatch


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
    assert stats.report(experiment, "q", "t9").since == "t2"  # a reload was taken back: the counts went on
    assert stats.report(experiment, "never asked", "t8").since == "t8"


@pytest.mark.parametrize(
    ("num_without", "num_with", "warning"),
    [
        (0, 0, None),
        (0, 5, None),
        (3, 4, None),
        (1000, 0, "all 1,000 requests had no unit, so the control arm 'a' answered them and they are not counted: a unit is "
                  "made from `header:x-unit`, and these requests have none of them"),
        (4, 4, "4 of 8 requests had no unit, so the control arm 'a' answered them and they are not counted: a unit is made "
               "from `header:x-unit`, and these requests have none of them"),
    ],
)  # fmt: skip
def test_an_experiment_whose_requests_have_no_unit_gets_a_warning(
    make_experiment: MakeExperiment,
    make_record: MakeRecord,
    num_without: int,
    num_with: int,
    warning: str | None,
) -> None:
    stats = ExperimentStats(None)
    for _ in range(num_without):
        stats.record(make_record(None, reason="no_unit", is_counted=False))
    for unit in range(num_with):
        stats.record(make_record(unit))

    assert stats.report(make_experiment(1, 1), GENERATION).warning == warning


def test_at_the_end_the_log_is_closed(tmp_path: Path, make_record: MakeRecord) -> None:
    stats = ExperimentStats(open_log(tmp_path))
    stats.record(make_record(1))

    stats.close()

    assert [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))] == []


# ------------------------------------------------------------------------------------------------------------ a full disk

FULL_DISK = Path("/dev/full")


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("who", ["a unit that was not written", "another unit", "the end"])
def test_what_a_full_disk_did_not_take_is_written_when_there_is_room(
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
