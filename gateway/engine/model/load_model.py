"""Load a checkpoint's model into transformers' class, with its adapters. Slow to import."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, T5EncoderModel, XLMRobertaModel
from transformers.utils import logging as transformers_logging

from gateway.engine.checkpoint.flash_layout import rename_tensors
from gateway.engine.checkpoint.layouts import Layout
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import load_config
from gateway.engine.checkpoint.weights import read_tensors, unknown_tensors
from gateway.engine.model.adapters import AdapterMask, install_adapters
from gateway.engine.model.nomic_moe import NomicMoeModel
from gateway.engine.model.projection import install_projection
from gateway.errors import LoadError


def load_model(
    checkpoint: Checkpoint, device: str, dtype: str, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, AdapterMask | None]:
    """Return the model in evaluation mode, and the mask that selects its adapters, if it has any.

    Args:
        device: torch device.
        dtype: name of the torch dtype of its weights.

    Raises:
        LoadError: the weights are corrupt, incomplete, or do not belong to the configuration.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # what matters is checked below
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would write over our own lines
    try:
        model, report = _read_model(checkpoint, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    except UnpicklingError as error:  # torch's own message explains at length how to run the code after all
        raise LoadError(
            f"{checkpoint.folder}: the weights cannot be loaded: the file holds more than weights, and could run code"
        ) from error
    except Exception as error:  # a configuration that makes no sense can make transformers raise anything
        reason = f"{type(error).__name__}: {error}"
        raise LoadError(f"{checkpoint.folder}: the weights cannot be loaded: {reason}") from error
    # transformers fills missing tensors with random numbers and only warns. The pooler is not used here.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise LoadError(
            f"{checkpoint.folder}: the weights do not belong to this configuration: missing "
            f"{missing[:3] or 'none'} ({len(missing)} in all), of the wrong shape: {len(report['mismatched_keys'])}"
        )
    if unknown := unknown_tensors(report["unexpected_keys"], checkpoint):
        raise LoadError(
            f"{checkpoint.folder}: the weights hold {unknown[:3]} ({len(unknown)} in all), which {type(model).__name__} "
            "does not use: the checkpoint computes something different or additional"
        )
    if _has_growing_rope(model.config):
        raise LoadError(
            f"{checkpoint.folder}: rotary positions that change with the longest text of a batch (rope_type dynamic or "
            "longrope) are not supported: a text's vector would depend on the other texts"
        )
    model.config.use_cache = False
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's pooler is a layer over the first token, which embeddings do not use
    if checkpoint.layout is Layout.VOYAGE:
        install_projection(model, checkpoint)
    mask = install_adapters(model, checkpoint.adapter_folders) if checkpoint.adapters else None
    if mask is not None:
        mask.to(device)
    model.eval().requires_grad_(False)
    model.to(torch.device(device))
    loaded: PreTrainedModel = model
    return loaded, mask


def _read_model(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """Return the transformer, and transformers' report about the loaded weights."""
    if checkpoint.layout is Layout.FLASH:
        flash: Any = XLMRobertaModel.from_pretrained(
            None,
            config=load_config(checkpoint.transformer),
            state_dict=rename_tensors(read_tensors(checkpoint.weights)),
            dtype=dtype,
            output_loading_info=True,
        )
        model, report = flash
    else:
        loader: Any = NomicMoeModel if checkpoint.layout is Layout.NOMIC_MIXTURE else AutoModel
        if checkpoint.model_type == "t5":  # the whole model has a decoder
            loader = T5EncoderModel
        model, report = loader.from_pretrained(
            checkpoint.transformer,
            config=None if checkpoint.has_own_code else load_config(checkpoint.transformer),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            output_loading_info=True,
        )
    return model, report


def _has_growing_rope(config: PreTrainedConfig) -> bool:
    """Return whether rotary positions depend on the longest text of a batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    rows = [parameters, *(row for row in parameters.values() if isinstance(row, dict))]  # or one per layer type
    return any(row.get("rope_type") in ("dynamic", "longrope") for row in rows)
