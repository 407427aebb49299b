"""Names and shapes of the tensors in a weights file, without reading any tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeAlias

from gateway.errors import LoadError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name.

    Raises:
        LoadError: a file is corrupt or cut short, or holds more than weights.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return shapes


def _read_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: corrupt or cut short: {error}") from error


def _read_pickle(path: Path) -> dict[str, tuple[int, ...]]:
    """Unpickle on a device that has no memory: the storages are passed over."""
    import torch  # slow to import

    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        return {str(name): tuple(tensor.shape) for name, tensor in tensors.items() if hasattr(tensor, "shape")}
    except UnpicklingError as error:  # torch's own message explains at length how to run the code after all
        raise LoadError(
            f"{path}: the weights cannot be loaded: the file holds more than weights, and could run code"
        ) from error
    except Exception as error:  # a pickle can be broken in as many ways as there are classes of errors
        raise LoadError(f"{path}: corrupt or cut short: {type(error).__name__}: {error}") from error
