"""Run transformers' own model on texts of any length packed into one row: nothing is padded (CUDA).

transformers' encoders take a packed row as it is: an attention function and a mask function are registered,
and the boundaries of the texts reach the attention through the forward's keyword arguments. torch's built-in
``varlen_attn`` needs no flash-attn package to compile. On a CPU, where it does not exist, each text is attended to by
itself: slow, but the same function, so that everything around it can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.runtimes.attention import positions, uncounted_id
from gateway.engine.model.runtimes.padded import pad_segments
from gateway.engine.model.states import TokenStates

ATTENTION = "gateway_packed"


@dataclass(frozen=True, slots=True)
class PackedFeatures:
    """Texts one after the other, on the device.

    Attributes:
        input_ids: ``(1, total)`` int64.
        position_ids: ``(1, total)`` int64, from the architecture's first position for each text.
        boundaries: ``(b + 1,)`` int32: where each text begins, and the end of the last.
        adapter_mask: ``(1, total, sum of ranks)``, or ``None`` for a model without adapters.
        segments: ``(1, total)`` int64, 1 for the tokens of a pair's second text, or ``None`` for a batch without any.
        keys: what is attended to, if that is not every token.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    boundaries: torch.Tensor
    adapter_mask: torch.Tensor | None
    segments: torch.Tensor | None
    lengths: Sequence[int]
    keys: AttendedKeys | None = None


@dataclass(frozen=True, slots=True)
class AttendedKeys:
    """The tokens of a packed row that are attended to, where those of some texts are not all of them.

    Attributes:
        positions: ``(k,)`` int64: their places in the row.
        boundaries: ``(b + 1,)`` int32: where those of each text begin, and the end of the last.
        lengths: how many each text has.
    """

    positions: torch.Tensor
    boundaries: torch.Tensor
    lengths: Sequence[int]


class PackedRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that packs."""

    name = "torch-packed"

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None) -> None:
        self._model = model
        self._mask = mask
        self._uncounted_id = uncounted_id(model.config)
        model.set_attn_implementation(ATTENTION)

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        return [range(len(lengths))]

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> PackedFeatures:
        lengths = [len(row) for row in rows]
        position_ids = np.concatenate([positions(row, self._uncounted_id) for row in rows])
        adapter_mask = None
        if self._mask is not None:
            adapter_mask = self._mask.rows(adapters).repeat_interleave(
                self._to_device(torch.tensor(lengths)), dim=0, output_size=sum(lengths)
            )[None]
        segments = pad_segments(rows, seconds, max(lengths))
        if segments is not None:
            segments = torch.cat([row[:length] for row, length in zip(segments, lengths, strict=True)])[None]
        return PackedFeatures(
            input_ids=self._to_device(torch.tensor([[token for row in rows for token in row]])),
            position_ids=self._to_device(torch.from_numpy(position_ids)[None]),
            boundaries=self._to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)),
            adapter_mask=adapter_mask,
            segments=None if segments is None else self._to_device(segments),
            lengths=lengths,
            keys=None if attended is None else self._keys(lengths, attended),
        )

    def _keys(self, lengths: Sequence[int], attended: Sequence[int]) -> AttendedKeys:
        starts = [0, *accumulate(lengths)]
        positions = [torch.arange(start, start + n) for start, n in zip(starts, attended, strict=False)]
        return AttendedKeys(
            positions=self._to_device(torch.cat(positions)),
            boundaries=self._to_device(torch.tensor([0, *accumulate(attended)], dtype=torch.int32)),
            lengths=attended,
        )

    def forward(self, features: PackedFeatures) -> TokenStates:
        if self._mask is not None and features.adapter_mask is not None:
            self._mask.value = features.adapter_mask.to(self._model.dtype)
        states = self._model(
            input_ids=features.input_ids,
            position_ids=features.position_ids,
            **({} if features.segments is None else {"token_type_ids": features.segments}),
            packed_boundaries=features.boundaries,
            packed_lengths=features.lengths,
            packed_keys=features.keys,
        ).last_hidden_state
        return TokenStates(states[0], features.lengths)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy from pinned memory, so that the copy overlaps with the forward before it."""
        device = self._model.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each text of a packed row: ``(1, heads, total, d)`` each, to ``(1, total, heads, d)``."""
    lengths: Sequence[int] = kwargs["packed_lengths"]
    boundaries = kwargs["packed_boundaries"]
    keys: AttendedKeys | None = kwargs["packed_keys"]
    key_lengths, key_boundaries = lengths, boundaries
    if keys is not None:
        key, value = key[:, :, keys.positions], value[:, :, keys.positions]
        key_lengths, key_boundaries = keys.lengths, keys.boundaries
    if query.is_cuda:
        packed = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            boundaries,
            key_boundaries,
            max(lengths),
            max(key_lengths),
            scale=scaling,
        )
        assert isinstance(packed, torch.Tensor)  # noqa: S101  it returns a pair only when asked to
        return packed[None], None
    counts = ((query, lengths), (key, key_lengths), (value, key_lengths))
    pieces = zip(*(torch.split(tensor, list(numbers), dim=2) for tensor, numbers in counts), strict=True)
    attended = [functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in pieces]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
