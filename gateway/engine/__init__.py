"""The engine: Infinity's, with its scheduling and its embedders replaced. No other package imports torch.

``checkpoint`` finds and reads a model, ``loading`` builds it with ``model``, ``batcher`` takes requests, ``scheduler``
chooses the next batch, ``worker`` computes it, and ``infinity`` holds them together.
"""

import os

# Turn off the usage reports of the libraries below. huggingface_hub, transformers and Infinity read these variables when
# they are imported, which happens after this line. (OpenVINO has no such variable: see ``model/runtimes/openvino``.)
os.environ["DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
# CUDA, which reads this when it starts, then numbers the cards as the driver and `nvidia-smi` do, not by speed.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
