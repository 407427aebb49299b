"""The only import of ``infinity_emb``: what the engine builds on, with the library's side effects kept out.

Infinity reads its environment when it is imported, makes a cache folder in its home, or else in the working directory,
and clears the root logger's handlers. That it reports no usage to PostHog is seen to in ``gateway.engine``.
"""

from __future__ import annotations

import logging
import os
import tempfile

_root = logging.getLogger()
_handlers, _level = list(_root.handlers), _root.level
_home = os.environ.get("INFINITY_HOME")

with tempfile.TemporaryDirectory() as _folder:  # the cache that it makes there is for vectors, and is not used here
    os.environ["INFINITY_HOME"] = _folder
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs
    from infinity_emb.primitives import Device, DeviceID, Dtype, InferenceEngine, OverloadStatus
    from infinity_emb.transformer.abstract import BaseEmbedder

os.environ.pop("INFINITY_HOME")
if _home is not None:
    os.environ["INFINITY_HOME"] = _home
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
