"""The only import of ``openvino``, with its telemetry kept out: it reports each import and each conversion."""

from __future__ import annotations

import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO then uses its own stub, which sends nothing

import openvino  # type: ignore[import-untyped]  # noqa: E402

__all__ = ["openvino"]
