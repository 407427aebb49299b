"""The engine: Infinity's, with its scheduling replaced and an encoder of our own. Only here is torch imported.

``checkpoint`` finds and reads a model, ``loading`` builds it with ``model``, ``batcher`` takes requests, ``scheduler``
decides what is next, ``worker`` computes it, and ``infinity`` holds them together. What needs no torch imports none.
"""

import os

# No library below sends home what it does: huggingface_hub and transformers, and Infinity, read these when they are
# imported, which is after this. (OpenVINO has no such variable: see ``model/runtimes/openvino``.)
os.environ["DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
