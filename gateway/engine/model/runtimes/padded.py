"""Run transformers' own model on padded texts: the reference, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.states import TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# The fixed cost of a forward, in tokens. Splitting a batch must save at least this much.
_FORWARD_OVERHEAD_TOKENS = 64
# At most this share of a padded batch may be padding once it is larger than the overhead.
_MAX_PADDING_SHARE = 0.10


@dataclass(frozen=True, slots=True)
class PaddedFeatures:
    """Right-padded texts on the device.

    Attributes:
        input_ids: ``(b, t)`` int64.
        attention_mask: ``(b, t)`` int64, or ``None`` when every token of the batch is attended to: attention without a
            mask is faster.
        adapter_mask: ``(b, 1, sum of ranks)``, or ``None`` for a model without adapters.
        segments: ``(b, t)`` int64, 1 for the tokens of a pair's second text, or ``None`` for a batch without pairs.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    adapter_mask: torch.Tensor | None
    segments: torch.Tensor | None
    lengths: Sequence[int]


class PaddedRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` that pads."""

    name = "torch"
    extra_bytes = 0

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None) -> None:
        self._model = model
        self._mask = mask
        self._pad_id = padding_id(model.config)

    def groups(self, lengths: Sequence[int], adapters: Sequence[int] | None = None) -> Sequence[Sequence[int]]:
        return group_by_length(lengths)

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> PaddedFeatures:
        lengths = [len(row) for row in rows]
        input_ids, attention_mask = pad(rows, self._pad_id, attended=attended)
        segments = pad_segments(rows, seconds, input_ids.shape[1])
        device = self._model.device
        return PaddedFeatures(
            input_ids=input_ids.to(device),
            attention_mask=None if min(attended or lengths) == max(lengths) else attention_mask.to(device),
            adapter_mask=None if self._mask is None else self._mask.rows(adapters)[:, None, :],
            segments=None if segments is None else segments.to(device),
            lengths=lengths,
        )

    def forward(self, features: PaddedFeatures) -> TokenStates:
        if self._mask is not None and features.adapter_mask is not None:
            self._mask.value = features.adapter_mask.to(self._model.dtype)
        segments = {} if features.segments is None else {"token_type_ids": features.segments}
        states = self._model(
            input_ids=features.input_ids, attention_mask=features.attention_mask, **segments
        ).last_hidden_state
        return TokenStates.from_padded(states, features.lengths)


def padding_id(config: PreTrainedConfig) -> int:
    """Return a token id for padding; old Llama files say -1, which is not a row of the word table."""
    id_ = config.pad_token_id
    return id_ if id_ is not None and id_ > 0 else 0


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, multiple: int = 1, attended: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right: ids and mask, each ``(b, t)`` int64; ``t`` is a multiple of ``multiple``.

    Args:
        attended: for each text the number of first tokens that are attended to; ``None`` for all.
    """
    longest = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    counts = [len(row) for row in rows] if attended is None else list(attended)
    mask = (torch.arange(longest) < torch.tensor(counts)[:, None]).long()
    return ids, mask


def pad_segments(
    rows: Sequence[Sequence[int]], seconds: Sequence[int | None] | None, num_positions: int
) -> torch.Tensor | None:
    """Return 1 for each token of a pair's second text and 0 for all others, ``(b, num_positions)`` int64.

    ``None`` for a batch without marked second texts.
    """
    if seconds is None or all(second is None for second in seconds):
        return None
    ends = [len(row) for row in rows]
    starts = [end if second is None else second for end, second in zip(ends, seconds, strict=True)]
    positions = torch.arange(num_positions)
    return ((positions >= torch.tensor(starts)[:, None]) & (positions < torch.tensor(ends)[:, None])).long()


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split texts into groups of similar length, longest first, so that little padding is computed.

    A group ends where the next text would raise its padding above 10 %, unless that padding still costs less than another
    forward.

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
