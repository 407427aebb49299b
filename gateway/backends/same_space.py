"""Check the registry's claim that a model that runs elsewhere has the same weights as another model."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gateway import golden
from gateway.backends.base import Backend
from gateway.errors import LoadError, RequestError
from gateway.golden import SAME_MODEL_COSINE, TEXTS, GoldenVector
from gateway.types import Embeddings, EmbedJob, ModelInfo, ModelState, Truncate

_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Reference:
    """The model whose space another model claims to share.

    Attributes:
        golden: the file with its golden vectors, which are used while the model is not ready.
        embed: embeds the texts of a job.
    """

    info: ModelInfo
    state: ModelState
    golden: Path | None
    embed: Callable[[EmbedJob], Awaitable[Embeddings]]


async def verify_same_space(info: ModelInfo, backend: Backend, reference: Reference | None) -> ModelInfo:
    """Return a model's info in the space of another model, if both give the same vectors for a few texts.

    Args:
        backend: runs the model, which has been started.
        reference: the model that it must equal, if that model has been read.

    Raises:
        LoadError: the models differ, or cannot be compared.
    """
    if reference is None:
        raise LoadError("the model it refers to has not been loaded, so there is nothing to compare with")
    theirs = reference.info
    if problem := _difference(info, theirs):
        raise LoadError(problem)
    try:
        expected = await _expected(reference, info.tasks)
        given = await _ask(backend.embed, [None, *info.tasks])
    except RequestError as error:
        raise LoadError(f"that could not be checked: {error.message}") from error
    for comparison in golden.compare_recorded(expected, given):
        if comparison.cosine < SAME_MODEL_COSINE:
            raise LoadError(
                f"its vectors are not those of {theirs.id}: {comparison}; the minimum is {SAME_MODEL_COSINE}"
            )
    return replace(
        info,
        fingerprint=theirs.fingerprint,
        is_normalized=theirs.is_normalized,
        tasks={task: theirs.tasks[task] for task in info.tasks},
        instruction=theirs.instruction,
        # Equal vectors have equal ranges. The ranges for sizes that the other model does not have are unknown.
        ranges=info.ranges or (theirs.ranges if set(info.dimensions) <= theirs.ranges.keys() else {}),
    )


def _difference(info: ModelInfo, theirs: ModelInfo) -> str:
    if unknown := [task for task in info.tasks if task not in theirs.tasks]:
        return f"{theirs.id} has no task {unknown[0]!r}"
    if info.default_task != theirs.default_task:
        return f"its default task is {info.default_task}, but that of {theirs.id} is {theirs.default_task}"
    if info.width != theirs.width:
        return f"its vectors have {info.width} dimensions, but those of {theirs.id} have {theirs.width}"
    if not theirs.is_normalized and not info.has_raw:
        return f"{theirs.id} does not normalize its vectors, but this model does"
    return ""


async def _expected(reference: Reference, tasks: Iterable[str]) -> Sequence[GoldenVector]:
    """Return the reference's vectors, computed now or recorded earlier.

    Raises:
        LoadError: the reference is not ready and has no recorded vectors.
    """
    info, state = reference.info, reference.state
    if state is ModelState.READY:
        return await _ask(reference.embed, [None, *tasks])
    if reference.golden is None:
        raise LoadError(f"{info.id} is {state.value} and has no golden vectors: there is nothing to compare with")
    return golden.read(reference.golden, info.fingerprint, info.tasks)


async def _ask(embed: Callable[[EmbedJob], Awaitable[Embeddings]], tasks: Iterable[str | None]) -> list[GoldenVector]:
    vectors: list[GoldenVector] = []
    for task in tasks:
        job = EmbedJob(TEXTS, task, Truncate.END, time.monotonic() + _PATIENCE_S, caller="same space")
        vectors += golden.golden_vectors(TEXTS, task, (await embed(job)).vectors)
    return vectors
