"""The memory of a job does not grow with the number of rows."""

from __future__ import annotations

from bench.embed import Flatness, Speed, measure_memory, show


def test_memory_stays_flat_over_many_rows() -> None:
    memory = measure_memory("fake", 200_000, shard_rows=1024)
    # If it kept anything of a row, that would take at least 400 bytes: 40 MB from one of these quarters to the other. The
    # allocator's own growth ends with the first few seconds.
    assert memory.median_mib(0.75, 1) - memory.median_mib(0.25, 0.5) < 25


def test_the_bench_prints_its_goals_and_figures() -> None:
    flat = Flatness("fake", 100, 2.0, [(i, 100.0 + i // 50) for i in range(100)])
    shown = show(Speed([95, 96, 97], [100, 100, 100], "float32, 2 threads"), [flat])
    assert "| >= 95.0 % | 96.0 % | yes |" in shown
    assert "| <= 1.05x | 1.01x | yes |" in shown
    assert "| 100 | fake | 50.0 | 100 | 100 | 101 | 101 | 101 |" in shown
