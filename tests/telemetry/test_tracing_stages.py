"""Where the spans of the stages are put, given only how long each took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry import tracing
from gateway.types import Timings

SECONDS = st.floats(0, 100)


@given(st.integers(0, 100_000_000_000), SECONDS, SECONDS, SECONDS)
def test_stages_stay_within_the_embedding(
    length_ns: int, tokenize_s: float, queue_s: float, inference_s: float
) -> None:
    begun_ns, ended_ns = 10, 10 + length_ns
    tokenize, queue, inference = tracing.stages(begun_ns, ended_ns, Timings(tokenize_s, queue_s, inference_s))

    assert begun_ns <= tokenize.begun_ns <= tokenize.ended_ns == queue.begun_ns <= queue.ended_ns <= ended_ns
    assert tokenize.ended_ns <= inference.begun_ns <= inference.ended_ns == ended_ns
    assert [stage.seconds for stage in (tokenize, queue, inference)] == [tokenize_s, queue_s, inference_s]
    if round((tokenize_s + queue_s + inference_s) * 1e9) < length_ns - 3:
        assert queue.ended_ns == inference.begun_ns
        for stage in (tokenize, queue, inference):
            assert abs(stage.ended_ns - stage.begun_ns - stage.seconds * 1e9) <= 1


def test_of_several_batches_the_queue_and_the_inference_overlap() -> None:
    """Two batches of 3 s: the texts of the second wait while the first is computed."""
    second = 1_000_000_000
    _, queue, inference = tracing.stages(0, 7 * second, Timings(1, 3, 6))

    assert (queue.begun_ns, queue.ended_ns) == (1 * second, 4 * second)
    assert (inference.begun_ns, inference.ended_ns) == (1 * second, 7 * second)
