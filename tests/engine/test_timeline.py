"""The stages of a request add up to its time, even if they overlap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.timeline import Stage, Timeline, covered_s

MOMENTS = st.integers(0, 1000).map(lambda moment: moment / 8)  # exact in binary
SPANS = st.lists(st.tuples(st.sampled_from(Stage), MOMENTS, MOMENTS), max_size=40)


def timeline_of(*spans: tuple[Stage, float, float]) -> Timeline:
    timeline = Timeline()
    for stage, start, end in spans:
        timeline.add(stage, start, end)
    return timeline


@given(SPANS)
def test_each_moment_in_which_something_happened_counts_once(spans: list[tuple[Stage, float, float]]) -> None:
    timings = timeline_of(*spans).timings()

    happening = [(start, end) for _stage, start, end in spans if end > start]
    moments = [step / 8 for step in range(1000)]
    total_s = sum(any(start <= moment < end for start, end in happening) for moment in moments) / 8
    assert sum(timings.stages.values()) == total_s
    assert min(timings.stages.values()) >= 0
    assert timings.inference_s == covered_s(
        (start, end) for stage, start, end in spans if stage is Stage.INFERENCE and end > start
    )


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        pytest.param([], (0, 0, 0), id="nothing"),
        pytest.param(
            [(Stage.TURN, 0, 3), (Stage.TOKENIZE, 1, 3), (Stage.QUEUE, 3, 7), (Stage.INFERENCE, 7, 12)],
            (2, 5, 5),
            id="one after the other",
        ),
        pytest.param([(Stage.INFERENCE, 0, 10), (Stage.INFERENCE, 2, 12)], (0, 0, 12), id="two devices at once"),
        pytest.param([(Stage.QUEUE, 0, 10), (Stage.INFERENCE, 2, 5)], (0, 7, 3), id="waits while others are computed"),
        pytest.param([(Stage.TOKENIZE, 0, 10), (Stage.QUEUE, 2, 5)], (7, 3, 0), id="waits while the rest is tokenized"),
        pytest.param([(Stage.QUEUE, 5, 2)], (0, 0, 0), id="what ended before it began"),
    ],
)
def test_the_first_stage_counts_where_stages_overlap(
    spans: list[tuple[Stage, float, float]], expected: tuple[float, float, float]
) -> None:
    timings = timeline_of(*spans).timings()

    assert (timings.tokenize_s, timings.queue_s, timings.inference_s) == expected
