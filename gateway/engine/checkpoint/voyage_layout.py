"""voyage-4-nano as it was published, read as transformers' own Qwen3 followed by a layer. Does not import torch.

`voyageai/voyage-4-nano` says `model_type: qwen3`, and has code (`Qwen3BidirectionalModel`) that changes two things. Each
token also attends to the tokens after it, and a linear layer without bias widens every token's state from `hidden_size` to
`num_labels` before the pooling. transformers does the first for `is_causal: false`. The second is in
`gateway.engine.model.projection`. vLLM's `VoyageQwen3BidirectionalEmbedModel` describes the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gateway.engine.checkpoint.classifier import own_class
from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError

PROJECTION = "linear.weight"
"""Name of the layer's only tensor, ``(num_labels, hidden_size)``."""

_CLASS = "Qwen3BidirectionalModel"


def is_voyage_layout(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has this layout."""
    return config.get("model_type") == "qwen3" and own_class(config, "AutoModel") == _CLASS


def as_two_way_qwen3(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of the same model, without the layer, in transformers' words.

    Raises:
        LoadError: the model differs from transformers', or its layer has no width.
    """
    path = folder / "config.json"
    if config.get("use_sliding_window"):
        raise LoadError(f"{path}: {_CLASS} with use_sliding_window {config['use_sliding_window']!r} is not supported")
    width = config.get("num_labels")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise LoadError(
            f"{path}: num_labels, the width of {_CLASS}'s vectors, must be a positive integer, got {width!r}"
        )
    return {**config, "is_causal": False}
