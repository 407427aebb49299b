"""Ranges are measured for each size of the vectors, and a file belongs to one checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gateway.errors import LoadError, StartError
from gateway.precision import Ranges
from gateway.ranges import Meter, between, read, write
from gateway.vectors import finish

VECTORS = finish(np.random.default_rng(5).normal(size=(40, 8)).astype(np.float32), (40, 8), 8, normalize=True)
SIZES = (8, 4)


@pytest.fixture
def measured() -> dict[int, Ranges]:
    meter = Meter(SIZES, is_normalized=True)
    meter.add(VECTORS[:25])
    meter.add(VECTORS[25:])
    return meter.ranges()


@pytest.fixture
def file(measured: dict[int, Ranges], tmp_path: Path) -> Path:
    path = tmp_path / "ranges" / "mini.json"
    write(path, "abc", measured, is_normalized=True, num_texts=40)
    return path


def test_the_ends_are_the_smallest_and_the_largest_number_of_a_dimension(measured: dict[int, Ranges]) -> None:
    cut = finish(VECTORS, (40, 8), 4, normalize=True)

    for size, vectors in ((8, VECTORS), (4, cut)):
        np.testing.assert_allclose(measured[size].low, vectors.min(axis=0), rtol=1e-6)
        np.testing.assert_allclose(measured[size].high, vectors.max(axis=0), rtol=1e-6)


def test_vectors_that_are_not_normalized_are_only_cut() -> None:
    meter = Meter((4,), is_normalized=False)
    meter.add(5 * VECTORS)

    np.testing.assert_array_equal(meter.ranges()[4].high, (5 * VECTORS)[:, :4].max(axis=0))


def test_written_ranges_are_read(file: Path, measured: dict[int, Ranges]) -> None:
    found = read(str(file), "abc", SIZES, is_normalized=True)

    assert found == measured
    np.testing.assert_array_equal(found[8].low, measured[8].low)
    assert read(str(file), "abc", (4,), is_normalized=True) == {4: measured[4]}


@pytest.mark.parametrize("place", ["file/mini.json", "folder"])
def test_a_place_that_cannot_be_written_is_named(measured: dict[int, Ranges], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()

    with pytest.raises(StartError, match=f"{place}: ranges cannot be written: "):
        write(tmp_path / place, "abc", measured, is_normalized=True, num_texts=40)


def test_a_model_without_a_file_has_no_ranges() -> None:
    assert read(None, "abc", SIZES, is_normalized=True) == {}


def test_other_ends_are_other_ranges(measured: dict[int, Ranges]) -> None:
    low, high = measured[8].low, measured[8].high

    assert between(low, high) == measured[8]
    assert between(low, np.nextafter(high, np.float32(9))) != measured[8]


@pytest.mark.parametrize(
    ("fingerprint", "sizes", "is_normalized", "reason"),
    [
        ("xyz", SIZES, True, "measured on another checkpoint (fingerprint abc, this one has xyz)"),
        ("abc", SIZES, False, "measured on vectors that were normalized"),
        ("abc", (8, 6, 2), True, "has no ranges for vectors of 6, 2 dimensions"),
    ],
)
def test_ranges_of_other_vectors_are_refused(
    file: Path, fingerprint: str, sizes: tuple[int, ...], is_normalized: bool, reason: str
) -> None:
    with pytest.raises(LoadError, match=re.escape(reason)) as refused:
        read(str(file), fingerprint, sizes, is_normalized=is_normalized)

    assert "gateway calibrate MODEL --texts FILE" in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"ranges": {"8": {"low": "AAAA"}}},
        {"ranges": {"8": {"low": "AAAAAA==", "high": "AAAAAA=="}}},
        {"ranges": {"1": {"low": "AACAPw==", "high": "AAAAAA=="}}},  # 1 to 0
        {"ranges": {"1": {"low": "AAAAAA==", "high": "AADAfw=="}}},  # 0 to NaN
        {"ranges": {"1": {"low": "//9//w==", "high": "//9/fw=="}}},  # the largest number, on both sides of 0
        {"ranges": {"1": {"low": "?", "high": "?"}}},
        {"ranges": {"eight": {}}},
        {"ranges": None},
    ],
)
def test_a_malformed_file_is_refused(file: Path, changes: dict[str, object]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    with pytest.raises(LoadError, match="not ranges that can be read"):
        read(str(file), "abc", SIZES, is_normalized=True)


def test_a_file_that_is_nested_too_deep_is_refused(file: Path) -> None:
    file.write_text("[" * 100_000)

    with pytest.raises(LoadError, match="not ranges that can be read"):
        read(str(file), "abc", SIZES, is_normalized=True)


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"there is no such file. Measure them with `gateway calibrate"):
        read(str(tmp_path / "none.json"), "abc", SIZES, is_normalized=True)
    with pytest.raises(LoadError, match="ranges cannot be read: must be a regular file"):
        read(str(tmp_path), "abc", SIZES, is_normalized=True)
