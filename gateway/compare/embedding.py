"""Embed the texts of a side with one arm: read cached vectors, request the others, and store them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.cache.files import WEIGHT, CacheFolder, Ragged, RowFile, weight_rows
from gateway.cache.keys import identity_of
from gateway.cli.client import EmbeddedTexts, GatewayClient, Refused
from gateway.compare.arms import PROBE, PlannedArm, Side
from gateway.compare.progress import Reporter, Step
from gateway.errors import CompareError
from gateway.precision import Precision
from gateway.routing.spaces import is_same_space
from gateway.types import Output, Vectors
from gateway.vectors import finish

_MAX_TEXTS = 64
# A request with long texts has fewer texts, so that an interruption loses little work.
_MAX_CHARACTERS = 100_000
_NUM_IN_FLIGHT = 3
# The note of a text in the cache that was longer than the model's limit.
_CUT = 1
# The body is too large for the gateway, or computing it takes too long; fewer texts may work.
_TOO_MUCH = (413, 504)


@dataclass(frozen=True, slots=True)
class Embedded:
    """The requested representations of texts, in order.

    Attributes:
        dense: ``(n, dimensions)`` float32, ready to be searched by dot product.
        sparse: rows of :data:`gateway.cache.files.WEIGHT`.
        multivectors: rows of float16 vectors.
        num_cut: the number of texts of which the model read only the beginning.
    """

    dense: Vectors | None = None
    sparse: Ragged | None = None
    multivectors: Ragged | None = None
    num_cut: int = 0


async def embed_side(
    client: GatewayClient,
    arm: PlannedArm,
    side: Side,
    outputs: Sequence[Output],
    texts: Sequence[str],
    cache: CacheFolder,
    reporter: Reporter,
    what: str,
) -> Embedded:
    """Return the representations of texts.

    The cache keeps native dense vectors, which are cut or reduced to their signs here. So one run over the texts gives all
    sizes of a model, and its binary vectors. The dot product of signs, 1 and -1, orders documents by their Hamming
    distance. int8 and uint8 vectors are requested as such, and their dot product uses the integers.

    Raises:
        CompareError: the model has changed in the meantime.
        StartError: the gateway does not answer.
    """
    stores = await _open_stores(client, arm, side, outputs, texts, cache)
    # Group texts by their missing outputs. Sort them by length, to limit padding, then by text, so that every run sends the
    # same batches.
    lacking_by_output = {output: stores[output].lacking(texts) for output in outputs}
    lacking = {text: tuple(output for output in outputs if text in lacking_by_output[output]) for text in texts}
    missing = sorted(
        (text for text, lacks in lacking.items() if lacks), key=lambda text: (lacking[text], len(text), text)
    )
    if missing:
        step = reporter.step(f"{arm.name.model}: {what}", len(missing))
        requests = [
            (wanted, batch)
            for wanted, alike in groupby(missing, key=lacking.__getitem__)
            for batch in _batches(list(alike), has_multivectors=Output.MULTIVECTOR in wanted)
        ]
        await _embed_missing(_Sender(client, arm, side, stores, step), requests)
    stored = {output: store.read(texts) for output, store in stores.items()}
    return Embedded(
        dense=_ready(arm, stored[Output.DENSE].firsts()) if Output.DENSE in stored else None,
        sparse=stored.get(Output.SPARSE),
        multivectors=stored.get(Output.MULTIVECTOR),
        num_cut=sum(_CUT in notes for notes in zip(*(store.notes(texts) for store in stores.values()), strict=True)),
    )


async def _open_stores(
    client: GatewayClient,
    arm: PlannedArm,
    side: Side,
    outputs: Sequence[Output],
    texts: Sequence[str],
    cache: CacheFolder,
) -> dict[Output, RowFile]:
    card = arm.card
    rows = {Output.DENSE: np.dtype(("<f4", (arm.width,))), Output.SPARSE: WEIGHT}
    if Output.MULTIVECTOR in outputs:
        rows[Output.MULTIVECTOR] = np.dtype(("<f2", (await _token_width(client, arm, side, texts),)))
    return {
        output: cache.rows(
            identity_of(
                side.native_space, side.task, output, dtype=card.dtype, device=card.device, max_tokens=card.max_tokens
            ),
            rows[output],
        )
        for output in outputs
    }


async def _token_width(client: GatewayClient, arm: PlannedArm, side: Side, texts: Sequence[str]) -> int:
    """Return the dimensions of a token's vector, which model cards do not state."""
    probe = [*sorted(text for text in texts if text.strip())[:1], PROBE]
    answer = await client.embed(arm.name.model, probe, side.asked_task, outputs=(Output.MULTIVECTOR,))
    return max(int(vectors.shape[1]) for vectors in answer.multivectors)


def _ready(arm: PlannedArm, native: Vectors) -> Vectors:
    """Cut native vectors to the arm's size, and reduce them to signs if the arm is binary."""
    if arm.dimensions not in {
        0,
        arm.width,
    }:  # 0 if dense vectors only select documents for a comparison of token vectors
        native = finish(native, (len(native), arm.width), arm.dimensions, normalize=arm.is_normalized)
    if arm.precision in (Precision.BINARY, Precision.UBINARY):
        return np.where(native > 0, np.float32(1), np.float32(-1))
    return native


async def _embed_missing(sender: _Sender, requests: Sequence[tuple[Sequence[Output], Sequence[str]]]) -> None:
    remaining = iter(requests)

    async def work() -> None:
        for outputs, batch in remaining:  # shared: each worker takes the next one
            await sender.send(outputs, batch)

    workers = [asyncio.create_task(work()) for _ in range(_NUM_IN_FLIGHT)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Sender:
    """Requests vectors, and stores them."""

    client: GatewayClient
    arm: PlannedArm
    side: Side
    stores: Mapping[Output, RowFile]
    step: Step

    async def send(self, outputs: Sequence[Output], batch: Sequence[str]) -> None:
        arm, side = self.arm, self.side
        try:
            embedded = await self.client.embed(
                arm.name.model,
                batch,
                side.asked_task,
                None if arm.asked_precision is Precision.FLOAT else arm.dimensions,
                expect_space=side.native_space,
                precision=arm.asked_precision,
                outputs=outputs,
            )
        except Refused as refused:
            if refused.status not in _TOO_MUCH or len(batch) == 1:
                raise
            middle = len(batch) // 2
            await self.send(outputs, batch[:middle])
            await self.send(outputs, batch[middle:])
            return
        self._check(outputs, embedded)
        notes = [_CUT if place in embedded.truncated else 0 for place in range(len(batch))]
        for output in outputs:
            self.stores[output].append(batch, _rows(output, embedded), notes)
        self.step.advance(len(batch))

    def _check(self, outputs: Sequence[Output], embedded: EmbeddedTexts) -> None:
        arm, side = self.arm, self.side
        is_width_right = Output.DENSE not in outputs or embedded.vectors.shape[1] == arm.width
        if not is_same_space(embedded.space, side.native_space) or not is_width_right:
            raise CompareError(
                f"{arm.name.text} changed during the comparison: vectors of {embedded.vectors.shape[1]} dimensions in "
                f"space {embedded.space}, before {arm.width} in {side.native_space}"
            )


def _rows(output: Output, embedded: EmbeddedTexts) -> Sequence[npt.NDArray[Any]]:
    """Return the rows of each text in the cache."""
    match output:
        case Output.SPARSE:
            return [weight_rows(weights) for weights in embedded.sparse]
        case Output.MULTIVECTOR:
            return embedded.multivectors
        case _:
            return [vector[np.newaxis] for vector in embedded.vectors]


def _batches(texts: Sequence[str], *, has_multivectors: bool) -> Iterator[list[str]]:
    """Group texts, sorted by length, into requests of bounded size."""
    max_texts, max_characters = _MAX_TEXTS, _MAX_CHARACTERS
    if has_multivectors:  # the answer is about a hundred times as large
        max_texts, max_characters = max_texts // 8, max_characters // 8
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == max_texts or size + len(text) > max_characters):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch
