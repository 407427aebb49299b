"""Embed the texts of a side with one arm: read the vectors in the cache, request the others, and store them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np

from gateway.cli.client import GatewayClient, Refused
from gateway.compare.arms import PlannedArm, Side
from gateway.compare.cache import VectorCache, VectorFile
from gateway.compare.progress import Reporter, Step
from gateway.errors import CompareError
from gateway.precision import Precision
from gateway.routing.spaces import is_same_space
from gateway.types import Vectors
from gateway.vectors import finish

_MAX_TEXTS = 64
# A request of long texts has fewer of them, so that an interruption loses little work.
_MAX_CHARACTERS = 100_000
_NUM_IN_FLIGHT = 3
# The body is too large for the gateway, or computing it takes too long; fewer texts may work.
_TOO_MUCH = (413, 504)


async def embed_side(
    client: GatewayClient,
    arm: PlannedArm,
    side: Side,
    texts: Sequence[str],
    cache: VectorCache,
    reporter: Reporter,
    what: str,
) -> Vectors:
    """Return the vectors of texts: ``(n, dimensions)`` float32, in their order, ready to be searched by dot product.

    The cache keeps native vectors, which are cut here, and reduced to their signs: one run over the texts gives all sizes
    of a model, and its binary vectors. The dot product of signs, 1 and -1, orders documents by the Hamming distance. int8
    and uint8 vectors are requested as such, and their dot product is that of the integers.

    Raises:
        CompareError: the model has changed meanwhile.
        StartError: the gateway does not answer.
    """
    card = arm.card
    identity = {
        "space": side.native_space,
        "task": side.task,
        "dtype": card.dtype,
        "device": (card.device or "").partition(":")[0],
        "max_tokens": card.max_tokens,
    }
    stored = cache.file(identity, arm.width)
    # By length, for little padding; then by text, so that every run sends the same batches.
    missing = sorted({text for text in texts if text not in stored}, key=lambda text: (len(text), text))
    if missing:
        step = reporter.step(f"{arm.name.model}: {what}", len(missing))
        await _embed_missing(client, arm, side, missing, stored, step)
    native = stored.read(texts)
    if arm.dimensions != arm.width:
        native = finish(native, (len(texts), arm.width), arm.dimensions, normalize=arm.is_normalized)
    if arm.precision in (Precision.BINARY, Precision.UBINARY):
        return np.where(native > 0, np.float32(1), np.float32(-1))
    return native


async def _embed_missing(
    client: GatewayClient, arm: PlannedArm, side: Side, texts: Sequence[str], stored: VectorFile, step: Step
) -> None:
    batches = iter(list(_batches(texts)))

    async def work() -> None:
        for batch in batches:  # shared: each worker takes the next one
            await _embed_batch(client, arm, side, batch, stored, step)

    workers = [asyncio.create_task(work()) for _ in range(_NUM_IN_FLIGHT)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _embed_batch(
    client: GatewayClient, arm: PlannedArm, side: Side, batch: Sequence[str], stored: VectorFile, step: Step
) -> None:
    try:
        embedded = await client.embed(
            arm.name.model,
            batch,
            side.asked_task,
            None if arm.asked_precision is Precision.FLOAT else arm.dimensions,
            expect_space=side.native_space,
            precision=arm.asked_precision,
        )
    except Refused as refused:
        if refused.status not in _TOO_MUCH or len(batch) == 1:
            raise
        middle = len(batch) // 2
        await _embed_batch(client, arm, side, batch[:middle], stored, step)
        await _embed_batch(client, arm, side, batch[middle:], stored, step)
        return
    if not is_same_space(embedded.space, side.native_space) or embedded.vectors.shape[1] != arm.width:
        raise CompareError(
            f"{arm.name.text} changed during the comparison: vectors of {embedded.vectors.shape[1]} dimensions in "
            f"space {embedded.space}, before {arm.width} in {side.native_space}"
        )
    stored.append(batch, embedded.vectors)
    step.advance(len(batch))


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts, sorted by length, into requests of bounded size."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == _MAX_TEXTS or size + len(text) > _MAX_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
