"""The only import of ``infinity_emb``: what the engine builds on, with the library's side effects kept out.

Infinity reads its environment when it is imported, reports usage to PostHog unless told not to, makes a cache folder in
the working directory where it is given no home, and clears the root logger's handlers.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

os.environ["DO_NOT_TRACK"] = "1"
os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
os.environ.setdefault("INFINITY_HOME", str(Path(tempfile.gettempdir()) / "embedding-gateway"))

_root = logging.getLogger()
_handlers, _level = list(_root.handlers), _root.level

from infinity_emb import AsyncEmbeddingEngine, EngineArgs  # noqa: E402  the environment has to be set first
from infinity_emb.primitives import Device, DeviceID, Dtype, InferenceEngine, OverloadStatus  # noqa: E402
from infinity_emb.transformer.abstract import BaseEmbedder  # noqa: E402

_root.handlers[:] = _handlers
_root.setLevel(_level)

__all__ = [
    "AsyncEmbeddingEngine",
    "BaseEmbedder",
    "Device",
    "DeviceID",
    "Dtype",
    "EngineArgs",
    "InferenceEngine",
    "OverloadStatus",
]
