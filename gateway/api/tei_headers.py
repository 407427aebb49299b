"""The headers in which text-embeddings-inference (TEI) tells what a request took."""

from __future__ import annotations

from gateway.api.endpoint import DescribeTimes
from gateway.types import Timings


def describe_work(num_characters: int, num_tokens: int) -> DescribeTimes:
    """Return what makes TEI's headers of the stages' times.

    Args:
        num_characters: of all texts; of pairs, the query counts once with each text.
        num_tokens: of all texts, after truncation.
    """

    def describe_times(timings: Timings, elapsed_s: float) -> dict[str, str]:
        return {
            "x-compute-characters": str(num_characters),
            "x-compute-tokens": str(num_tokens),
            "x-total-time": _ms(elapsed_s),
            "x-tokenization-time": _ms(timings.tokenize_s),
            "x-queue-time": _ms(timings.queue_s),
            "x-inference-time": _ms(timings.inference_s),
        }

    return describe_times


def _ms(seconds: float) -> str:
    """Write a time as TEI does: whole milliseconds."""
    return str(int(seconds * 1000))
