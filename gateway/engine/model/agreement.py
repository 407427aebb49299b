"""Compare a model's runtime with transformers' own code on padded texts, before it serves any request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch.nn import functional

from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.model.runtimes.base import Runtime
from gateway.engine.model.tokenizer import Tokenizer

MIN_COSINE = {"float32": 0.99999, "float16": 0.9995, "bfloat16": 0.999}
"""The minimum cosine between each sample and the reference, by the precision of the computation."""

# Tokens of the texts of each forward: texts that can share one row, texts that need two rows, and a single text.
_LENGTHS = ((60, 24, 7, 2), (300, 40, 30, 20), (17,))
_SHORT = (60, 24)
# A short query, to which other tokens are appended.
_QUERY_TOKENS = 5
# Long enough to use another variant of the attention kernel, and positions far from the first.
_LONG = (2000,)
# More texts than attention computes at a time, and texts of a single token.
_MANY = tuple(1 + i % 7 for i in range(70))


@dataclass(frozen=True, slots=True)
class _Batch:
    """A forward: for each text its tokens, its adapter, and the number of attended tokens (``None`` for all)."""

    lengths: Sequence[int]
    adapters: Sequence[int]
    attended: Sequence[int] | None = None


@torch.inference_mode()
def least_cosine(
    runtime: Runtime, reference: Runtime, checkpoint: Checkpoint, tokenizer: Tokenizer, *, is_packed: bool = False
) -> float:
    """Return the smallest cosine between two runtimes, over texts of several lengths in several forwards; may be NaN.

    One text is longer than the attention window of some architectures, because a model traced with a short text may fail
    there. If queries of the checkpoint have tokens that are not attended to, a query with many of them is compared as well.

    Args:
        is_packed: whether to compare more: a long text and many short ones; each adapter in a batch of only its texts,
            which takes another code path than a mixed batch; texts whose last tokens are not attended to; and the means
            over all tokens.
    """
    ids = tokenizer.sample_ids()
    cosines: list[torch.Tensor] = []
    for batch in _batches(checkpoint, is_packed=is_packed):
        lengths = [min(length, tokenizer.max_tokens) for length in batch.lengths]
        rows = [(ids * length)[:length] for length in lengths]
        seconds = [length // 2 if tokenizer.has_segments else None for length in lengths]
        attended = None
        if batch.attended is not None:
            attended = [min(number, length) for number, length in zip(batch.attended, lengths, strict=True)]
        ours, theirs = (
            part.forward(part.prepare(rows, batch.adapters, seconds, attended)) for part in (runtime, reference)
        )
        poolings = {checkpoint.pooling}
        if is_packed or attended is not None:
            poolings.add(Pooling.MEAN)
        # The reference may be on another device.
        cosines += [functional.cosine_similarity(ours.pool(part).cpu(), theirs.pool(part).cpu()) for part in poolings]
    return float(torch.cat(cosines).min())


def _batches(checkpoint: Checkpoint, *, is_packed: bool) -> Iterator[_Batch]:
    num_adapters = len(checkpoint.adapter_folders)
    adapter = cycle(range(-1, num_adapters))
    for lengths in (*_LENGTHS, _LONG, _MANY) if is_packed else _LENGTHS:
        yield _Batch(lengths, [next(adapter) for _ in lengths])
    if checkpoint.unattended_length:
        yield _Batch((checkpoint.unattended_length,), [-1], [_QUERY_TOKENS])
    if is_packed:
        yield _Batch(_SHORT, [-1, -1], [length // 2 for length in _SHORT])
        for index in range(num_adapters):
            yield _Batch(_SHORT, [index, index])
