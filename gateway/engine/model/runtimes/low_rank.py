"""The stacked adapters of all tasks, laid out for the packed forward: each task's adapters are contiguous.

:mod:`gateway.engine.model.adapters` has the formula. Here the adapters of several products that read the same input are
combined, each task's part is a slice, and a batch of one task computes only that slice, without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch.nn import functional

from gateway.engine.model.adapters import AdaptedEmbedding, AdaptedLinear, AdapterMask

# Rows of 16 bytes: cuBLAS has no fast kernel for others.
_STEP = 8

Choice: TypeAlias = int | torch.Tensor | None
"""The adapter of all texts of a row, or, if they differ, ``(total, adapters, 1)``: 1 for each token's adapter, else 0.

``None`` if no text has an adapter.
"""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The adapters of one product.

    Attributes:
        down: ``(adapters * block, in)``: the ranks of an adapter, padded with zeros to a block.
        up: ``(adapters * block, out)``, with the scaling included.
        shift: ``(adapters * block,)``: added to the product with ``down``, or ``None`` for nothing.
        block: the padded rank of an adapter.
        parts: ``down``, ``up`` and ``shift`` of each adapter as views, kept because making a view takes as long as a small
            product.
    """

    down: torch.Tensor
    up: torch.Tensor
    shift: torch.Tensor | None
    block: int
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        downs, ups = torch.split(self.down, self.block), torch.split(self.up, self.block)
        shifts = [None] * len(downs) if self.shift is None else torch.split(self.shift, self.block)
        object.__setattr__(self, "parts", list(zip(downs, ups, shifts, strict=True)))

    def add(self, y: torch.Tensor, x: torch.Tensor, choice: int | torch.Tensor) -> None:
        """Add to ``y``, ``(total, out)``, the output of the chosen adapters for ``x``, ``(total, in)``."""
        if isinstance(choice, int):
            down, up, shift = self.parts[choice]
            y.addmm_(functional.linear(x, down, shift), up)
            return
        low = functional.linear(x, self.down, self.shift)
        low.view(len(choice), -1, self.block).mul_(choice)
        y.addmm_(low, self.up)

    def merged(self, weight: torch.Tensor, adapter: int) -> torch.Tensor:
        """Return ``weight``, ``(out, in)``, with an adapter merged into it; the sum is in float32."""
        down, up, _shift = self.parts[adapter]
        change = up.float().t() @ down.float()
        return (weight.float() + change).to(weight.dtype)

    def shifted(self, folded: torch.Tensor | None) -> LowRank:
        """Return the adapters for an input to which ``folded``, ``(in,)`` float32, has been added."""
        if folded is None:
            return self
        shift = -(self.down.float() @ folded)
        return LowRank(self.down, self.up, shift.to(self.down.dtype), self.block)


@dataclass(frozen=True, slots=True)
class TableAdapters:
    """The adapters of an embedding table.

    Attributes:
        rows: ``(adapters * vocabulary, block)``: a row for each adapter and id.
        up: ``(adapters * block, width)``.
    """

    rows: torch.Tensor
    up: torch.Tensor
    block: int

    def add(self, x: torch.Tensor, places: torch.Tensor, choice: int | torch.Tensor) -> None:
        """Add to ``x``, ``(total, width)``, the changes at ``places``, ``(total,)`` rows."""
        low = functional.embedding(places, self.rows)
        if isinstance(choice, int):
            x.addmm_(low, self.up[choice * self.block : (choice + 1) * self.block])
        else:
            x.addmm_((low[:, None] * choice).flatten(1), self.up)


def stack_layers(layers: Sequence[torch.nn.Module], mask: AdapterMask | None) -> LowRank | None:
    """Return the adapters of layers that read the same input, as one layer with all their outputs.

    ``None`` without adapters.
    """
    adapted = [layer if isinstance(layer, AdaptedLinear) else None for layer in layers]
    first = next((layer for layer in adapted if layer is not None), None)
    if mask is None or first is None:
        return None
    widths = [int(layer.get_parameter("weight").shape[0]) for layer in layers]
    block = _padded(max(mask.ranks) * len(layers))
    down = first.down.new_zeros(len(mask.ranks) * block, first.down.shape[1])
    up = first.up.new_zeros(len(mask.ranks) * block, sum(widths))
    for i, part in enumerate(mask.parts()):
        row, column = i * block, 0
        for layer, width in zip(adapted, widths, strict=True):
            rank = part.stop - part.start
            if layer is not None:
                down[row : row + rank] = layer.down[part]
                up[row : row + rank, column : column + width] = layer.up[:, part].t()
            row, column = row + rank, column + width
    return LowRank(down, up, None, block)


def stack_table(table: torch.nn.Module, mask: AdapterMask | None) -> TableAdapters | None:
    """Return the adapters of an embedding table; ``None`` without adapters."""
    if mask is None or not isinstance(table, AdaptedEmbedding):
        return None
    block, vocabulary = _padded(max(mask.ranks)), len(table.weight)
    rows = table.down.new_zeros(len(mask.ranks), vocabulary, block)
    up = table.up.new_zeros(len(mask.ranks) * block, table.up.shape[0])
    for i, part in enumerate(mask.parts()):
        rank = part.stop - part.start
        rows[i, :, :rank] = table.down[:, part]
        up[i * block : i * block + rank] = table.up[:, part].t()
    return TableAdapters(rows.flatten(0, 1), up, block)


def expand_table(table: torch.nn.Module, mask: AdapterMask | None) -> torch.Tensor:
    """Return a small embedding table without an adapter, then with each adapter: ``((adapters + 1) * rows, width)``."""
    weight = table.get_parameter("weight")
    if mask is None or not isinstance(table, AdaptedEmbedding):
        return weight
    changed = [weight.float() + table.down[:, part].float() @ table.up[:, part].float().t() for part in mask.parts()]
    return torch.cat([weight, *(part.to(weight.dtype) for part in changed)])


def _padded(rank: int) -> int:
    return -(-rank // _STEP) * _STEP
