"""Separate the texts of a row, by family: the masks and positions that transformers' forward receives.

A forward that takes masks as inputs can compute several texts in one row. The masks from here also avoid a fault of a
model's own masks in a compiled copy: padding that sees nothing within its window gives NaN.

**A family is added here** by an entry in ``_RULES``. It may be added if its forward takes ``position_ids``, passes a
four-dimensional ``attention_mask`` unchanged to its attention (as everything built on ``transformers.masking_utils`` does),
and mixes the tokens of a row only in its attention. Relative positions need nothing, because within a text they do not
depend on the text's place in the row. Without an entry, each text has a separate row, and the model makes its masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gateway.engine.checkpoint.sizes import OFFSET_BY_PADDING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A constant in MPNet's code (``transformers.models.mpnet.modeling_mpnet.MPNetEmbeddings``).
_MPNET_PADDING_ID = 1
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """The tokens that a token sees, by family; never beyond its own text.

    Attributes:
        is_causal: a token does not see later tokens.
        window: in layers of the type ``sliding_attention``, a token sees only tokens within this distance.
        layer_types: the types of layers with separate masks in the forward, by name; empty if it takes one mask.
        every_layer: the type of all layers, if the forward takes one mask.
    """

    is_causal: bool = False
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    every_layer: str = FULL

    @property
    def mask_names(self) -> tuple[str, ...]:
        """The masks that the forward takes."""
        return self.layer_types or (self.every_layer,)


def _two_way(_config: PreTrainedConfig) -> AttentionRule:
    return AttentionRule()


def _two_way_with_windows(config: PreTrainedConfig) -> AttentionRule:
    # ``transformers.masking_utils.sliding_window_bidirectional_overlay``: the last is included.
    return AttentionRule(window=config.sliding_window, layer_types=_layer_types(config))


def _decoder(config: PreTrainedConfig) -> AttentionRule:
    """Return the rule of a decoder whose layers take masks by their type."""
    layer_types = _layer_types(config)
    return AttentionRule(_is_causal(config), _window(config) if SLIDING in layer_types else None, layer_types)


def _gemma3(config: PreTrainedConfig) -> AttentionRule:
    rule = _decoder(config)
    return replace(rule, is_causal=False) if config.use_bidirectional_attention else rule


def _llama(config: PreTrainedConfig) -> AttentionRule:
    # Ignore a ``sliding_window``, which a configuration that was converted from Mistral may have.
    return AttentionRule(_is_causal(config))


def _mistral(config: PreTrainedConfig) -> AttentionRule:
    """Return the rule of a decoder whose layers take one mask, with a window if the configuration has one."""
    if config.sliding_window is None:
        return AttentionRule(_is_causal(config))
    return AttentionRule(_is_causal(config), _window(config), every_layer=SLIDING)


def _window(config: PreTrainedConfig) -> int:
    """Return the largest distance at which a token is seen.

    A decoder's window counts the token itself (``transformers.masking_utils.sliding_window_overlay``, and Gemma 3's own
    bidirectional one), unless ``is_causal: false`` makes it bidirectional
    (``transformers.masking_utils.sliding_window_bidirectional_overlay``).
    """
    window: int = config.sliding_window
    return window - 1 if _is_causal(config) else window


def _layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    return tuple(sorted(set(config.layer_types)))


def _is_causal(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_causal", True))


_RULES: Mapping[str, Callable[[PreTrainedConfig], AttentionRule]] = {
    "albert": _two_way,
    "bert": _two_way,
    "camembert": _two_way,
    "distilbert": _two_way,
    "electra": _two_way,
    "eurobert": _two_way,
    "gemma2": _decoder,
    "gemma3_text": _gemma3,
    "gte": _two_way,
    "jina_embeddings_v3": _two_way,
    "llama": _llama,
    "mistral": _mistral,
    "modernbert": _two_way_with_windows,
    "mpnet": _two_way,
    "nomic_bert": _two_way,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "roberta": _two_way,
    "xlm-roberta": _two_way,
}


def attention_rule(config: PreTrainedConfig) -> AttentionRule | None:
    """Return the rule of a model; ``None`` if its texts cannot share a row."""
    rule = _RULES.get(config.model_type)
    if rule is None or getattr(config, "is_decoder", False):  # a BERT that was made a decoder
        return None
    return rule(config)


def uncounted_id(config: PreTrainedConfig) -> int | None:
    """Return the token id that positions do not count, and after which they begin; ``None`` if they begin with 0."""
    if config.model_type in OFFSET_BY_PADDING:
        return int(config.pad_token_id)
    return _MPNET_PADDING_ID if config.model_type == "mpnet" else None


def positions(ids: Sequence[int], uncounted: int | None) -> npt.NDArray[np.int64]:
    """Return the position of each token of a text, ``(t,)``.

    RoBERTa and related models count from the padding id, and skip padding tokens that a text contains
    (``transformers.models.mpnet.modeling_mpnet.create_position_ids_from_input_ids``).
    """
    if uncounted is None:
        return np.arange(len(ids))
    is_counted = np.array(ids) != uncounted
    numbers: npt.NDArray[np.int64] = is_counted.cumsum() * is_counted + uncounted
    return numbers


def packed_positions(
    ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int_], uncounted: int | None
) -> npt.NDArray[np.int32]:
    """Return :func:`positions` of all tokens of consecutive texts, ``(total,)``.

    Args:
        lengths: ``(b,)`` tokens of each text, at least 1.
    """
    starts = lengths.cumsum() - lengths
    if uncounted is None:
        numbers: npt.NDArray[np.int32] = np.arange(len(ids), dtype=np.int32) - np.repeat(starts, lengths).astype(
            np.int32
        )
        return numbers
    is_counted = (ids != uncounted).astype(np.int32)
    counted = is_counted.cumsum(dtype=np.int32)
    before = np.repeat(counted[starts] - is_counted[starts], lengths)
    offsets: npt.NDArray[np.int32] = (counted - before) * is_counted + np.int32(uncounted)
    return offsets


def make_masks(
    owners: npt.NDArray[np.intp], is_key: npt.NDArray[np.bool_] | None, rule: AttentionRule
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return, by mask, the tokens that each token of a row sees: ``(b, 1, t, t)``, or ``(b, 1, 1, t)`` if all are alike.

    Args:
        owners: ``(b, t)``: the text of each token, -1 for padding.
        is_key: ``(b, t)``: whether other tokens see it; ``None`` for all tokens.
    """
    is_padding = owners < 0
    is_relative = rule.is_causal or rule.window is not None
    if not is_relative and ((owners == owners[:, :1]) | is_padding).all():  # each row has one text
        seen = ~is_padding if is_key is None else is_key
        return dict.fromkeys(rule.mask_names, seen[:, None, None, :])
    # Padding is a text too: a token that sees nothing would give NaN.
    full = owners[:, None, :, None] == owners[:, None, None, :]
    if is_key is not None:
        full &= (is_key | is_padding)[:, None, None, :]
    masks = {FULL: full}
    if is_relative:
        # Compare positions instead of subtracting them: for a text of 32,768 tokens, the distances would take 8 GiB.
        place, other = np.arange(owners.shape[1])[:, None], np.arange(owners.shape[1])[None, :]
        if rule.is_causal:
            full &= other <= place
        if rule.window is not None:
            masks[SLIDING] = full & (other >= place - rule.window)
            masks[SLIDING] &= other <= place + rule.window
    return {name: masks[name] for name in rule.mask_names}
