"""Compute texts of any length packed into one row, without padding (CUDA). :mod:`.network` has the forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.host_memory import send
from gateway.engine.model.runtimes.attention import packed_positions, uncounted_id
from gateway.engine.model.runtimes.flash import Texts
from gateway.engine.model.runtimes.graphs import MIXED, Graphs, Indices, Shape, boundaries_of, find_shape
from gateway.engine.model.runtimes.low_rank import Choice
from gateway.engine.model.runtimes.network import Network, Row
from gateway.engine.model.states import TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The default of `least_part_tokens`: smaller parts would not keep a card busy.
_PART_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class PackedFeatures:
    """Packed texts on the device.

    Attributes:
        row: the packed row; ``None`` if a graph computes it.
        together: the arrays of the row.
        shape: the shape of the graph.
    """

    row: Row | None
    lengths: Sequence[int]
    together: torch.Tensor
    shape: Shape | None = None


class PackedRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that packs.

    Args:
        model: transformers' model, which keeps views of the weights.

    Attributes:
        extra_bytes: memory of the weights that :meth:`merge` has added.
        device: the device of the model.
        network: computes the forward.
        graphs: the graphs for small forwards; ``None`` without graphs.
        least_part_tokens: a part of a batch with one task and at least this many tokens is a separate forward: with the
            task's merged weights, it costs less than the adapters of a mixed forward.
    """

    name = "torch-packed"
    extra_bytes = 0
    least_part_tokens = _PART_TOKENS

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None) -> None:
        self._model = model
        self.device = model.device
        self._uncounted_id = uncounted_id(model.config)
        self.network = Network(model, mask)
        self.graphs: Graphs | None = None
        num_adapters = 0 if mask is None else len(mask.ranks)
        # Row 0 means no adapter.
        self._choices = torch.eye(num_adapters + 1, num_adapters, dtype=model.dtype).roll(1, 0).to(self.device)

    @property
    def num_adapters(self) -> int:
        return int(self._choices.shape[1])

    @property
    def merged_bytes(self) -> int:
        """The memory that :meth:`merge` would take."""
        return self.network.merged_bytes * self.num_adapters

    def merge(self) -> None:
        """Merge weights for each adapter, for batches with one task."""
        self.network.merge(range(self.num_adapters))
        self.extra_bytes = self.merged_bytes

    def groups(self, lengths: Sequence[int], adapters: Sequence[int] | None = None) -> Sequence[Sequence[int]]:
        """Return all texts as one forward, except tasks with merged weights and enough tokens to keep a card busy."""
        if not self.extra_bytes or adapters is None or len(set(adapters)) < 2:
            return [range(len(lengths))]
        texts: dict[int, list[int]] = {}
        for text, adapter in enumerate(adapters):
            texts.setdefault(adapter, []).append(text)
        large = [part for part in texts.values() if sum(lengths[i] for i in part) >= self.least_part_tokens]
        taken = set(chain.from_iterable(large))
        mixed = [text for text in range(len(lengths)) if text not in taken]
        return [*large, mixed] if mixed else large

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> PackedFeatures:
        lengths = [len(row) for row in rows]
        parts = self._parts(rows, lengths, adapters, seconds)
        choice = None
        if self._is_adapted(adapters):
            choice = MIXED if "choices" in parts else int(adapters[0])
        shape = None
        if attended is not None:
            parts["keys"] = _is_among_first(lengths, attended).nonzero()[0].astype(np.int32)
            parts["key_boundaries"] = boundaries_of(attended)
        elif self.graphs is not None:
            short = self.network.attend_short
            shape = find_shape(lengths, tuple(parts), choice, None if short is None else short.most)
        if shape is not None:
            return PackedFeatures(None, lengths, self._to_device(shape.fill(parts, lengths)), shape)
        together = self._to_device(parts)
        tensors = dict(zip(parts, torch.split(together, [len(part) for part in parts.values()]), strict=True))
        return PackedFeatures(self._row(tensors, choice, lengths, attended), lengths, together)

    def _parts(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None,
    ) -> dict[str, Indices]:
        """Return the arrays of a row by their names in :class:`Row`, and ``choices``: rows of the choice table."""
        counts = np.array(lengths)
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum()))
        parts = {"ids": ids, "boundaries": boundaries_of(lengths)}
        parts["positions"] = packed_positions(ids, counts, self._uncounted_id)
        is_adapted = self._is_adapted(adapters)
        owners = np.repeat(np.array(adapters, np.int32), counts)
        if is_adapted and self.network.has_word_adapters:
            # A token without an adapter may read any row, because its mask is 0.
            parts["places"] = np.maximum(owners, 0) * np.int32(self.network.num_words) + ids
        if is_adapted and len(set(adapters)) > 1:
            parts["choices"] = owners + np.int32(1)
        kinds = _segments(lengths, seconds)
        step = self.network.kinds_step if is_adapted else 0
        if step or kinds is not None:
            parts["kinds"] = (owners + 1) * np.int32(step) + (np.zeros_like(ids) if kinds is None else kinds)
        return parts

    def _is_adapted(self, adapters: Sequence[int]) -> bool:
        return self.num_adapters > 0 and any(adapter >= 0 for adapter in adapters)

    def _row(
        self,
        tensors: Mapping[str, torch.Tensor],
        choice: int | None,
        lengths: Sequence[int],
        attended: Sequence[int] | None,
    ) -> Row:
        chosen: Choice = choice
        if choice == MIXED:
            chosen = self._choices.index_select(0, tensors["choices"])[:, :, None]
        return Row(
            ids=tensors["ids"],
            kinds=tensors.get("kinds"),
            positions=tensors["positions"],
            places=tensors.get("places"),
            choice=chosen,
            texts=Texts(tensors["boundaries"], lengths),
            keys=None if attended is None else (tensors["keys"], Texts(tensors["key_boundaries"], attended)),
        )

    def forward(self, features: PackedFeatures) -> TokenStates:
        if features.row is not None:
            return TokenStates(self.network(features.row), features.lengths)
        shape, graphs = features.shape, self.graphs
        assert shape is not None  # noqa: S101  without a row
        states = (self._compute if graphs is None else graphs.run)(shape, features.together)
        return TokenStates(states[: sum(features.lengths)].clone(), features.lengths)

    def make_graphs(self) -> None:
        """Compute small rows as graphs from now on."""
        self.graphs = Graphs(self.device, self._compute)

    def _compute(self, shape: Shape, together: torch.Tensor) -> torch.Tensor:
        """Return the states of a row that has a shape, ``(shape.tokens, width)``."""
        tensors = dict(zip(shape.parts, torch.split(together, shape.sizes), strict=True))
        return self.network(self._row(tensors, shape.choice, [shape.longest], None))

    def _to_device(self, parts: Mapping[str, Indices]) -> torch.Tensor:
        """Copy arrays in one transfer; the host does not wait for it."""
        return send(np.concatenate([*parts.values()], dtype=np.int32), self.device)


def _is_among_first(lengths: Sequence[int], counts: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return whether each token is among the first ``counts`` tokens of its text, ``(total,)``."""
    starts = np.array([0, *accumulate(lengths)][:-1])
    is_first: npt.NDArray[np.bool_] = np.arange(sum(lengths)) < np.repeat(starts + np.array(counts), lengths)
    return is_first


def _segments(lengths: Sequence[int], seconds: Sequence[int | None] | None) -> Indices | None:
    """Return 1 for each token of a pair's second text and 0 for all others, ``(total,)``; ``None`` without pairs."""
    if seconds is None or all(second is None for second in seconds):
        return None
    firsts = [n if second is None else second for n, second in zip(lengths, seconds, strict=True)]
    return (~_is_among_first(lengths, firsts)).astype(np.int32)
