"""Make the inputs of a compiled model: token ids, masks, positions, adapters and segments, in NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.engine.model.runtimes.attention import AttentionRule, make_masks, positions, uncounted_id
from gateway.engine.model.runtimes.padded import group_by_length, padding_id
from gateway.engine.model.runtimes.rows import Layout, lay_out, plan_forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gateway.engine.model.adapters import AdapterMask

AdapterTable: TypeAlias = npt.NDArray[np.float32]
Inputs: TypeAlias = dict[str, npt.NDArray[np.generic]]

# The first batch of a new shape takes 5 to 10 ms longer, as much as a hundred tokens or more. If each text has a separate
# row, several texts are padded to a multiple of this, so that shapes recur. Computing the padding costs less.
_LENGTH_STEP = 8
# The value of a closed place in a mask that is added to the attention's scores. A smaller number may overflow in sums.
_CLOSED = np.float32(-1e9)
_FIELDS, _TABLE = "inputs.json", "adapters.npy"


@dataclass(frozen=True, slots=True)
class CompiledFeatures:
    """The inputs of the compiled model by name, and the positions of the texts' tokens.

    Attributes:
        places: positions of each text's tokens among the tokens of all rows, one text after the other.
        lengths: tokens of each text.
    """

    inputs: Inputs
    places: npt.NDArray[np.intp]
    lengths: Sequence[int]


@dataclass(frozen=True, slots=True)
class InputMaker:
    """Makes the inputs of a compiled model from the texts of a forward.

    Attributes:
        model_type: transformers' name of the architecture.
        pad_id: token id of padding.
        width: dimensions of the model's states.
        rule: the rule that separates texts in a row; ``None`` if each text has a separate row, and the model makes its
            masks.
        uncounted_id: see :func:`~gateway.engine.model.runtimes.attention.uncounted_id`.
        adds_mask: whether the attention adds its mask to the scores; torch's own attention takes a boolean mask.
        has_segments: whether the model takes segment ids, which mark the tokens of a pair's second text.
        adapter_table: a row for each adapter, and a last row for no adapter; ``None`` for a model without adapters.
    """

    model_type: str
    pad_id: int
    width: int
    rule: AttentionRule | None
    uncounted_id: int | None
    adds_mask: bool
    has_segments: bool
    adapter_table: AdapterTable | None

    @classmethod
    def of(
        cls, model: PreTrainedModel, mask: AdapterMask | None, rule: AttentionRule | None, *, has_segments: bool
    ) -> InputMaker:
        """Return the maker of inputs for a compiled copy of a torch model."""
        config = model.config
        return cls(
            model_type=config.model_type,
            pad_id=padding_id(config),
            width=config.hidden_size,
            rule=rule,
            uncounted_id=uncounted_id(config),
            adds_mask=config._attn_implementation != "sdpa",
            has_segments=has_segments,
            adapter_table=None if mask is None else mask.table.float().numpy(),
        )

    def save(self, folder: Path) -> None:
        """Write everything into files of a folder, for :meth:`read`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "adapter_table"}
        values["rule"] = None if self.rule is None else asdict(self.rule)
        (folder / _FIELDS).write_text(json.dumps(values), encoding="utf-8")
        if self.adapter_table is not None:
            np.save(folder / _TABLE, self.adapter_table)

    @classmethod
    def read(cls, folder: Path) -> InputMaker:
        """Read the files that :meth:`save` has written.

        Raises:
            OSError, ValueError, TypeError: the files were changed after they were written.
        """
        values = json.loads((folder / _FIELDS).read_bytes())
        rule = values.pop("rule")
        if rule is not None:
            rule = AttentionRule(**{**rule, "layer_types": tuple(rule["layer_types"])})
        table = np.load(folder / _TABLE) if (folder / _TABLE).exists() else None
        return cls(**values, rule=rule, adapter_table=table)

    def groups(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return the texts of each forward."""
        return group_by_length(lengths) if self.rule is None else plan_forwards(lengths, self.width)

    def make(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> CompiledFeatures:
        """Make the inputs; the arguments are those of :meth:`gateway.engine.model.runtimes.base.Runtime.prepare`."""
        lengths = [len(row) for row in rows]
        layout = self._lay_out(lengths)
        shape = (len(layout.rows), layout.length)
        owners = np.full(shape, -1)
        ids = np.full(shape, self.pad_id)
        position_ids = np.zeros(shape, np.int64)
        segments = np.zeros(shape, np.int64)
        is_key = None if attended is None else np.zeros(shape, bool)
        starts = [0] * len(rows)
        for i, row in enumerate(layout.rows):
            start = 0
            for text in row:
                end = start + lengths[text]
                starts[text] = i * layout.length + start
                owners[i, start:end] = text
                ids[i, start:end] = rows[text]
                position_ids[i, start:end] = positions(rows[text], self.uncounted_id)
                if seconds is not None and (second := seconds[text]) is not None:
                    segments[i, start + second : end] = 1
                if is_key is not None and attended is not None:
                    is_key[i, start : start + attended[text]] = True
                start = end
        inputs: Inputs = {"input_ids": ids, **self._masks(owners, is_key)}
        if self.rule is not None:
            inputs["position_ids"] = position_ids
        if self.adapter_table is not None:
            inputs["adapter_mask"] = self.adapter_table[np.array([*adapters, -1])[owners]]
        if self.has_segments:
            inputs["token_type_ids"] = segments
        places = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        return CompiledFeatures(inputs, places, lengths)

    def _lay_out(self, lengths: Sequence[int]) -> Layout:
        if self.rule is not None:
            return lay_out(lengths, self.width)
        step = _LENGTH_STEP if len(lengths) > 1 else 1
        return Layout([[i] for i in range(len(lengths))], -(-max(lengths) // step) * step)

    def _masks(self, owners: npt.NDArray[np.intp], is_key: npt.NDArray[np.bool_] | None) -> Inputs:
        if self.rule is None:
            return {"attention_mask": (owners >= 0 if is_key is None else is_key).astype(np.int64)}
        masks = make_masks(owners, is_key, self.rule)
        return {
            name: np.where(mask, np.float32(0), _CLOSED) if self.adds_mask else mask for name, mask in masks.items()
        }
