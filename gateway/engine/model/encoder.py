"""The encoder of every model here: a tokenizer, a runtime for the transformer, and heads that read its states."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gateway.engine.model.base import Encoder
from gateway.engine.model.heads import DenseHead, MultiVectorHead, ScoreHead, SparseHead
from gateway.engine.model.items import Encoded, Item
from gateway.engine.model.runtimes.base import Runtime
from gateway.engine.model.states import TokenStates
from gateway.engine.model.tokenizer import Tokenizer
from gateway.types import Output, Truncate

# A forward costs about as much as this many tokens before it has computed any: what splitting a batch must save.
_FORWARD_OVERHEAD_TOKENS = 64
# At most this share of a padded batch may be padding once it is larger than the overhead.
_MAX_PADDING_SHARE = 0.10


@dataclass(frozen=True, slots=True)
class Heads:
    """What a model can be asked for; the one number of a cross-encoder takes the place of a vector."""

    dense: DenseHead | ScoreHead
    sparse: SparseHead | None = None
    multivector: MultiVectorHead | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that go into one forward.

    Attributes:
        rows: position of each text in the batch that was asked for.
        features: what the runtime made of them.
    """

    rows: list[int]
    items: list[Item]
    features: Any


class TextEncoder(Encoder):
    """Encodes texts with one transformer, whatever computes it.

    Args:
        tasks: instruction of each task.
        adapters: index of each task's adapter in the runtime; tasks without one use none.
        instruction: what is put before a text that has no task.
        width: dimensions of a dense vector.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        runtime: Runtime,
        heads: Heads,
        *,
        width: int,
        tasks: Mapping[str, str],
        adapters: Mapping[str, int],
        instruction: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.width = width
        self.runtime = runtime
        self.runtime_name = runtime.name
        self._heads = heads
        self._tasks = tasks
        self._adapters = adapters
        self._instruction = instruction

    def instruction(self, task: str | None) -> str:
        return self._instruction if task is None else self._tasks[task]

    def encode_pre(self, sentences: Sequence[str | Item]) -> list[Group]:
        """Group the texts as the runtime needs them, and put them where it reads them."""
        items = [
            Item(self.tokenize([item], None, Truncate.END)[0]) if isinstance(item, str) else item for item in sentences
        ]
        lengths = [len(item.tokens.ids) for item in items]
        groups = [list(range(len(items)))] if self.runtime.is_packed else group_by_length(lengths)
        return [self._prepare(rows, [items[row] for row in rows]) for rows in groups]

    def _prepare(self, rows: list[int], items: list[Item]) -> Group:
        adapters = [-1 if item.task is None else self._adapters.get(item.task, -1) for item in items]
        seconds = [item.tokens.second for item in items]
        return Group(rows, items, self.runtime.prepare([item.tokens.ids for item in items], adapters, seconds))

    @torch.inference_mode()
    def encode_core(self, features: list[Group]) -> list[tuple[Group, TokenStates]]:
        """Run the transformer on each group."""
        computed = []
        for group in features:
            computed.append((group, self.runtime.forward(group.features)))
            self.progressed_at = time.monotonic()
        self.num_padding += sum(states.num_padding for _group, states in computed)
        return computed

    @torch.inference_mode()
    def encode_post(  # type: ignore[override]
        self,
        embedding: list[tuple[Group, TokenStates]],
        skip_quanitzation: bool = True,  # Infinity's name
    ) -> list[Encoded]:
        """Read the outputs of each text off its states, in the order that was asked for."""
        encoded = {
            row: result
            for group, states in embedding
            for row, result in zip(group.rows, self._read(group.items, states), strict=True)
        }
        return [encoded[row] for row in range(len(encoded))]

    def _read(self, items: list[Item], states: TokenStates) -> list[Encoded]:
        dense = self._heads.dense(states, [item.tokens.spans for item in items]).to("cpu", torch.float32)
        rows = iter(dense.split([item.tokens.num_vectors for item in items]))
        wanted_sparse = [i for i, item in enumerate(items) if Output.SPARSE in item.outputs]
        wanted_multi = [i for i, item in enumerate(items) if Output.MULTIVECTOR in item.outputs]
        sparse, multi = {}, {}
        if wanted_sparse and self._heads.sparse is not None:
            ids = [item.tokens.ids for item in items]
            sparse = dict(zip(wanted_sparse, self._heads.sparse(states, ids, wanted_sparse), strict=True))
        if wanted_multi and self._heads.multivector is not None:
            multi = dict(zip(wanted_multi, self._heads.multivector(states, wanted_multi), strict=True))
        # Copies: a view would keep the states of the whole batch.
        whole = {
            i: text.to("cpu", torch.float32, copy=True).numpy()
            for i, text in enumerate(states.texts())
            if Output.STATES in items[i].outputs
        }
        return [Encoded(next(rows).numpy(), sparse.get(i), multi.get(i), whole.get(i)) for i in range(len(items))]


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split texts into groups of similar length, longest first, so that little of what is computed is padding.

    A group ends where the next text would make padding more than 10 % of it, unless that padding still costs less
    than another forward does.

    Returns:
        Positions in ``lengths``; each occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = padding = 0
    for i in order:
        padding += longest - lengths[i]
        if groups and padding <= max(_FORWARD_OVERHEAD_TOKENS, _MAX_PADDING_SHARE * longest * (len(groups[-1]) + 1)):
            groups[-1].append(i)
        else:
            groups.append([i])
            longest, padding = lengths[i], 0
    return groups
