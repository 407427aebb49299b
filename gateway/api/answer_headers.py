"""The headers of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from gateway.requests import Answer, EmbedAnswer
from gateway.types import Timings

# A header lists this many truncated inputs, and then the number of further ones: proxies limit headers to 8 KiB.
_MAX_LISTED_INDICES = 100


def answer_headers(answer: Answer, timings: Timings, elapsed_s: float) -> dict[str, str]:
    """Return the headers of the gateway: the model, space and arm that answered, and the time of each stage.

    Args:
        timings: with the time that writing the answer took, if it has been written.
        elapsed_s: seconds since the request began.
    """
    stages = {**timings.stages, "total": elapsed_s}
    headers = {
        "x-gateway-model": answer.model,
        "server-timing": ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in stages.items()),
    }
    if answer.space is not None:
        headers["x-gateway-space"] = answer.space
    if answer.task is not None:
        headers["x-gateway-task"] = quote(answer.task)  # a task may have any name in the registry
    if answer.assignment is not None:
        headers["x-gateway-experiment"] = answer.assignment.experiment
        headers["x-gateway-arm"] = answer.assignment.arm.label
        headers["x-gateway-assignment"] = answer.assignment.reason.value
    if isinstance(answer, EmbedAnswer) and answer.num_cached is not None:
        headers["x-gateway-cache"] = f"{answer.num_cached}/{answer.num_texts}"
    if answer.truncated:
        headers["x-gateway-truncated"] = _list_indices(answer.truncated)
    return headers


def tei_headers(num_characters: int, num_tokens: int, timings: Timings, elapsed_s: float) -> dict[str, str]:
    """Return TEI's headers: the size of a request, and the time of each stage in whole milliseconds.

    Args:
        num_characters: of all texts; a query counts once with each text.
        num_tokens: of all texts, after truncation.
        elapsed_s: seconds since the request began.
    """
    times = {
        "x-total-time": elapsed_s,
        "x-tokenization-time": timings.tokenize_s,
        "x-queue-time": timings.queue_s,
        "x-inference-time": timings.inference_s,
    }
    return {
        "x-compute-characters": str(num_characters),
        "x-compute-tokens": str(num_tokens),
        **{name: str(int(seconds * 1000)) for name, seconds in times.items()},
    }


def _list_indices(indices: Sequence[int]) -> str:
    listed = ",".join(str(i) for i in indices[:_MAX_LISTED_INDICES])
    more = len(indices) - _MAX_LISTED_INDICES
    return f"{listed},+{more}" if more > 0 else listed
