"""Compare the outputs of a newly loaded model with its description."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.model.items import Encoded
from gateway.errors import LoadError
from gateway.types import Output


def check_outputs(
    encoded: Encoded, num_tokens: int, checkpoint: Checkpoint, outputs: Sequence[Output], dtype: str
) -> None:
    """Check the outputs of a model for one text against its description.

    Raises:
        LoadError: an output has another shape, or is not finite.
    """
    folder, width = checkpoint.folder, checkpoint.width
    if encoded.dense.shape != (1, width):
        raise LoadError(f"{folder}: the model gives {encoded.dense.shape[-1]} numbers, expected {width}")
    found = {Output.DENSE: encoded.dense}
    if encoded.sparse is not None:
        found[Output.SPARSE] = encoded.sparse.values
    if encoded.multivector is not None:
        found[Output.MULTIVECTOR] = vectors = encoded.multivector
        # BGE-M3's rule leaves out the first token, ColBERT's the tokens of some words.
        is_right = len(vectors) <= num_tokens if checkpoint.colbert else len(vectors) == num_tokens - 1
        if not is_right or vectors.shape[1] != checkpoint.token_width:
            raise LoadError(
                f"{folder}: the model gives {len(vectors)} vectors of {vectors.shape[1]} numbers for {num_tokens} tokens, "
                f"expected {checkpoint.token_width}"
            )
    missing = [output for output in outputs if output not in found]
    if missing:
        raise LoadError(f"{folder}: the model gives no {', '.join(missing)}")
    for output, numbers in found.items():
        if not np.isfinite(numbers).all():
            what = "vectors" if output is Output.DENSE else f"{output} vectors"
            raise LoadError(f"{folder}: the model returns {what} that are not finite in {dtype}")
    if checkpoint.classifier is None and width and not encoded.dense.any():
        raise LoadError(f"{folder}: the model returns vectors of zeros: are its weights all zero?")
