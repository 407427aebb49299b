"""Describe the machine of a measurement, to print above every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "transformers", "infinity-emb", "uvicorn", "orjson")
_ROOT = Path(__file__).parents[1]


def describe_machine() -> str:
    """Return one line about the processor, the versions and the commit."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, {versions}; "
        f"commit {_commit()}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or "unknown"
