"""Infinity's server with its debug engine, whose vectors have 13 equal numbers, made to give 1,024 different ones.

Runs in Infinity's own environment, with the arguments of ``infinity_emb``; nothing else of it is changed.
"""

from unittest.mock import patch

import numpy as np
from infinity_emb.cli import cli
from infinity_emb.transformer.embedder.dummytransformer import DummyTransformer

_VECTORS = np.random.default_rng(0).standard_normal((4096, 1024), dtype=np.float32)


def _encode_core(_self: DummyTransformer, features: np.ndarray) -> np.ndarray:
    return _VECTORS[: len(features)]


if __name__ == "__main__":
    with patch.object(DummyTransformer, "encode_core", _encode_core):
        cli()  # type: ignore[no-untyped-call]
