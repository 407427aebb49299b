"""deploy/versions.py finds every pinned version, and reports those that are no longer supported."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from deploy import versions


def test_every_pin_is_in_the_table_and_nothing_else_is() -> None:
    assert {pin for pin, _ in versions.pins()} == versions.KNOWN.keys()
    files = {file for _, file in versions.pins()}
    assert {"Dockerfile", "deploy/compose/compose.yaml", ".github/workflows/ci.yml"} <= files


def test_everything_was_supported_when_it_was_pinned() -> None:
    for known in versions.KNOWN.values():
        assert known.source.startswith("https://")
        if known.supported_until:
            assert known.released < known.supported_until


@pytest.mark.parametrize(("today", "is_supported"), [(date(2027, 7, 31), True), (date(2027, 8, 1), False)])
def test_the_end_of_support_is_reported(today: date, is_supported: bool) -> None:
    found = {line.split()[0]: (line, good) for line, good in versions.lines(today)}
    line, is_good = found["prom/prometheus:v3.13.3"]

    assert is_good == is_supported
    assert ("NOT SUPPORTED" in line) != is_supported
    assert "days old" in line


def test_a_version_without_a_named_end_is_reported_after_a_year() -> None:
    (pin,) = [pin for pin in versions.KNOWN if pin.startswith("ray:")]
    released = versions.KNOWN[pin].released

    for num_days, is_good in ((versions.MAX_DAYS, True), (versions.MAX_DAYS + 1, False)):
        found = {line.split()[0]: (line, good) for line, good in versions.lines(released + timedelta(days=num_days))}
        assert found[pin][1] == is_good
        assert ("OLD, and no end named" in found[pin][0]) != is_good


def test_a_pin_without_dates_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "KNOWN", {})

    assert [good for _, good in versions.lines(date(2026, 11, 26))] == [False] * len(
        {pin for pin, _ in versions.pins()}
    )


def test_only_what_is_recorded_is_stated() -> None:
    found = {line.split()[0]: line for line, _ in versions.lines(date(2026, 11, 26))}

    assert "the newest is supported" not in str(found)
    for pin, known in versions.KNOWN.items():
        assert f"{(date(2026, 11, 26) - known.released).days} days old" in found[pin]
        assert ("newest not checked" in found[pin]) == (known.supported_until is None and not known.newer)


def test_a_version_that_is_not_the_newest_known_is_flagged() -> None:
    (pin,) = [pin for pin in versions.KNOWN if pin.startswith("milvusdb/milvus:")]
    flagged = [line for line, _ in versions.lines(date(2026, 11, 26)) if "NOT THE NEWEST" in line]
    (reason,) = [
        line
        for line in (versions.ROOT / "deploy" / "compose" / "compose.yaml").read_text().splitlines()
        if f"{versions.KNOWN[pin].newer} runs as" in line
    ]

    assert [line.split()[0] for line in flagged] == [pin]
    assert f"there is {versions.KNOWN[pin].newer}" in flagged[0]
    assert reason.strip().startswith("#")
