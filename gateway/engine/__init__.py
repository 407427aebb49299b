"""The engine: Infinity's, with its scheduling replaced and encoders of our own.

Modules in the order in which a text meets them: ``sources`` and ``checkpoint`` find and read a model, ``encoders`` run
it, ``scheduler`` decides what runs next, ``batcher`` runs it, ``infinity`` is the engine that holds them together.

Only ``encoders``, ``devices`` and ``infinity`` import torch; the rest is importable without it.
"""

import os

# No library below sends home what it does: huggingface_hub and transformers, and Infinity, read these when they are
# imported, which is after this. (OpenVINO has no such variable: see ``openvino_library``.)
os.environ["DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
