"""Compute texts of any length packed into one row: nothing is padded (CUDA). :mod:`.network` has the forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.runtimes.attention import packed_positions, uncounted_id
from gateway.engine.model.runtimes.flash import Texts
from gateway.engine.model.runtimes.low_rank import Choice
from gateway.engine.model.runtimes.network import Network, Row
from gateway.engine.model.states import TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A part of a batch that has one task and so many tokens is a separate forward: with the task's merged weights, it costs
# less than the adapters of a mixed one do. Smaller parts would not keep a card busy.
_MIN_PART_TOKENS = 2048

_Indices: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedFeatures:
    """Texts one after the other, on the device."""

    row: Row
    lengths: Sequence[int]


class PackedRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that packs.

    Args:
        model: transformers' model, which keeps views of the weights.

    Attributes:
        extra_bytes: memory of the weights that :meth:`merge` has made.
    """

    name = "torch-packed"
    extra_bytes = 0

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None) -> None:
        self._model = model
        self._device = model.device
        self._uncounted_id = uncounted_id(model.config)
        self._network = Network(model, mask)
        num_adapters = 0 if mask is None else len(mask.ranks)
        # Row 0 is no adapter.
        self._choices = torch.eye(num_adapters + 1, num_adapters, dtype=model.dtype).roll(1, 0).to(self._device)

    @property
    def merged_bytes(self) -> int:
        """Memory that :meth:`merge` would take."""
        return self._network.merged_bytes * self._choices.shape[1]

    def merge(self) -> None:
        """Make weights for each adapter, for batches that have one task."""
        self._network.merge(range(self._choices.shape[1]))
        self.extra_bytes = self.merged_bytes

    def groups(self, lengths: Sequence[int], adapters: Sequence[int] | None = None) -> Sequence[Sequence[int]]:
        """Return all texts as one forward, but for the tasks with merged weights and enough tokens to keep a card busy."""
        if not self.extra_bytes or adapters is None or len(set(adapters)) < 2:
            return [range(len(lengths))]
        texts: dict[int, list[int]] = {}
        for text, adapter in enumerate(adapters):
            texts.setdefault(adapter, []).append(text)
        large = [part for part in texts.values() if sum(lengths[i] for i in part) >= _MIN_PART_TOKENS]
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
        counts = np.array(lengths)
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum()))
        boundaries = _boundaries(lengths)
        parts = {"ids": ids, "boundaries": boundaries}
        parts["positions"] = packed_positions(ids, counts, self._uncounted_id)
        is_adapted = self._choices.shape[1] > 0 and any(adapter >= 0 for adapter in adapters)
        is_mixed = is_adapted and len(set(adapters)) > 1
        owners = np.repeat(np.array(adapters, np.int32), counts)
        if is_adapted and self._network.has_word_adapters:
            # A token without an adapter reads any row: its mask is 0.
            parts["places"] = np.maximum(owners, 0) * np.int32(self._network.num_words) + ids
        if is_mixed:
            parts["choices"] = owners + np.int32(1)
        kinds = _segments(lengths, seconds)
        step = self._network.kinds_step if is_adapted else 0
        if step or kinds is not None:
            parts["kinds"] = (owners + 1) * np.int32(step) + (np.zeros_like(ids) if kinds is None else kinds)
        if attended is not None:
            parts["keys"] = _within(lengths, attended).nonzero()[0].astype(np.int32)
            parts["key_boundaries"] = _boundaries(attended)
        tensors = self._to_device(parts)
        choice: Choice = None
        if is_adapted:
            choice = self._choices.index_select(0, tensors["choices"]) if is_mixed else int(adapters[0])
        row = Row(
            ids=tensors["ids"],
            kinds=tensors.get("kinds"),
            positions=tensors["positions"],
            places=tensors.get("places"),
            choice=choice,
            texts=Texts(tensors["boundaries"], lengths),
            keys=None if attended is None else (tensors["keys"], Texts(tensors["key_boundaries"], attended)),
        )
        return PackedFeatures(row, lengths)

    def forward(self, features: PackedFeatures) -> TokenStates:
        return TokenStates(self._network(features.row), features.lengths)

    def _to_device(self, parts: Mapping[str, _Indices]) -> Mapping[str, torch.Tensor]:
        """Copy arrays in one transfer, from pinned memory: the host does not wait for it."""
        together = torch.from_numpy(np.concatenate([*parts.values()], dtype=np.int32))
        if self._device.type == "cuda":
            together = together.pin_memory()
        split = torch.split(together.to(self._device, non_blocking=True), [len(part) for part in parts.values()])
        return dict(zip(parts, split, strict=True))


def _boundaries(lengths: Sequence[int]) -> _Indices:
    return np.array([0, *accumulate(lengths)], np.int32)


def _within(lengths: Sequence[int], counts: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return whether a token is among the first of its text, ``(total,)``; ``counts`` says how many those are."""
    starts = np.array([0, *accumulate(lengths)][:-1])
    is_first: npt.NDArray[np.bool_] = np.arange(sum(lengths)) < np.repeat(starts + np.array(counts), lengths)
    return is_first


def _segments(lengths: Sequence[int], seconds: Sequence[int | None] | None) -> _Indices | None:
    """Return 1 for each token of a pair's second text and 0 for all others, ``(total,)``; ``None`` without any."""
    if seconds is None or all(second is None for second in seconds):
        return None
    firsts = [n if second is None else second for n, second in zip(lengths, seconds, strict=True)]
    return (~_within(lengths, firsts)).astype(np.int32)
