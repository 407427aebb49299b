"""The linear layer over every token's state in voyage-4-nano, as a part of the model that every runtime computes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.voyage_layout import PROJECTION
from gateway.engine.checkpoint.weights import read_tensors
from gateway.errors import LoadError


def install_projection(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Append the layer to the last normalization of ``model``, so that the token states include it.

    Raises:
        LoadError: the weights hold no such layer, or its shape is wrong.
    """
    weight = read_tensors(checkpoint.weights, {PROJECTION}).get(PROJECTION)
    shape = (checkpoint.hidden_width, model.config.hidden_size)
    if weight is None or tuple(weight.shape) != shape:
        what = "is missing" if weight is None else f"has the shape {list(weight.shape)}"
        raise LoadError(f"{checkpoint.folder}: {PROJECTION} {what}, its configuration says {list(shape)}")
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=model.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    model.norm = nn.Sequential(model.get_submodule("norm"), layer)
