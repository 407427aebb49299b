"""Read tensors from a checkpoint's weights files, without running any code in them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open

from gateway.engine.checkpoint.colbert import STANFORD_PROJECTION
from gateway.engine.checkpoint.layouts import Layout
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.voyage_layout import PROJECTION


def read_tensors(files: Sequence[Path], names: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors from the weights files, and nothing else.

    Args:
        files: safetensors, or pickled state dicts.
        names: names of the tensors to read, if they exist; ``None`` for all.

    Raises:
        OSError, RuntimeError, SafetensorError, UnpicklingError: a file cannot be read, or holds more than weights.
    """
    found: dict[str, torch.Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                wanted = (name for name in tensors.keys() if names is None or name in names)  # noqa: SIM118  # it is not a dictionary
                found |= {name: tensors.get_tensor(name) for name in wanted}
        else:
            # The format before torch 1.6 is not a zip file, and cannot be mapped.
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            found |= {name: whole[name].clone() for name in whole if names is None or name in names}
    return found


def read_rows(files: Sequence[Path], matrix: str, rows: Sequence[int]) -> torch.Tensor:
    """Read some rows of a matrix, and nothing else if the files are safetensors: ``(rows, width)``.

    Args:
        matrix: the end of the matrix's name, without ``.weight``; in a model without a head, the name has no prefix.

    Raises:
        KeyError: no file holds the matrix, or the matrix has fewer rows.
        OSError, RuntimeError, SafetensorError, UnpicklingError: as :func:`read_tensors`.
    """
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is not a dictionary
                    if _is_called(name, matrix):
                        slices = tensors.get_slice(name)
                        return torch.stack([slices[row] for row in rows])
        else:
            found = [tensor for name, tensor in read_tensors([path]).items() if _is_called(name, matrix)]
            if found:
                return found[0][list(rows)].clone()
    raise KeyError(f"{matrix}.weight")


def _is_called(name: str, matrix: str) -> bool:
    return f".{name}".endswith(f".{matrix}.weight")


# Tensors that no embedding needs: the pooler over the first token, and tables of constants that older releases of
# transformers wrote.
_UNUSED = re.compile(r"(?:^|\.)pooler\.|(?:^|\.)(?:position_ids|token_type_ids|inv_freq|masked_bias)$")
# The heads of pretraining. If nothing else describes the model, these heads do: it predicts words.
_PRETRAINING = re.compile(
    r"(?:^|\.)(?:lm_head|mlm_head|cls|generator_predictions|generator_lm_head|discriminator_predictions"
    r"|vocab_transform|vocab_layer_norm|vocab_projector)\."
)
_MODERNBERT_UNUSED = re.compile(r"^(?:head|decoder)\.")
# Heads of transformers' classes, which are left out if sentence-transformers' modules pool the states.
_TASK_HEADS = re.compile(r"^(?:classifier|score|qa_outputs|pre_classifier)\.")


def unknown_tensors(unexpected: Iterable[str], checkpoint: Checkpoint) -> list[str]:
    """Return the names of the tensors that transformers does not use, except harmless ones.

    The remaining tensors change vectors: for example, a projection after the transformer, or layers that the configuration
        does not mention.
    """
    classifier = checkpoint.classifier
    known = frozenset() if classifier is None else classifier.tensors
    if checkpoint.layout is Layout.VOYAGE:
        known |= {PROJECTION}
    if checkpoint.colbert is not None and checkpoint.colbert.has_projection:
        known |= {f"{STANFORD_PROJECTION}.weight"}
    patterns = [_UNUSED]
    if classifier is None and checkpoint.has_pooling_module:
        patterns.append(_TASK_HEADS)
    if checkpoint.has_pooling_module or checkpoint.is_named or checkpoint.splade is not None:
        patterns.append(_PRETRAINING)
        if checkpoint.model_type == "modernbert":
            patterns.append(_MODERNBERT_UNUSED)
    return sorted(
        name for name in unexpected if name not in known and not any(pattern.search(name) for pattern in patterns)
    )
