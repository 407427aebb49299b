"""Read tensors from a checkpoint's weights files, without running any code in them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open


def read_tensors(files: Sequence[Path], names: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors from wherever in the weights files they are, and nothing else of the files.

    Args:
        files: safetensors, or pickled state dicts.
        names: the tensors that are wanted, those that are there; ``None`` for all.

    Raises:
        OSError, RuntimeError, SafetensorError, UnpicklingError: a file cannot be read, or holds more than weights.
    """
    found: dict[str, torch.Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                wanted = (name for name in tensors.keys() if names is None or name in names)  # noqa: SIM118  # it is no dictionary
                found |= {name: tensors.get_tensor(name) for name in wanted}
        else:
            # The format before torch 1.6 is no zip file, and cannot be mapped.
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            found |= {name: whole[name].clone() for name in whole if names is None or name in names}
    return found
