"""Names and shapes of the tensors in a weights file, without reading any tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeAlias

from gateway.errors import LoadError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_MIN_BYTES = 2
# safetensors' names of the types that are at least that wide.
_WIDE = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U64", "U32", "U16", "C64"})


def read_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, by name.

    Raises:
        LoadError: a file is corrupt or truncated, or holds more than weights, or holds weights in fewer than 16 bits.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return shapes


def _read_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  not a dict
            narrow = {name: str(part.get_dtype()) for name, part in slices.items() if part.get_dtype() not in _WIDE}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: corrupt or cut short: {error}") from error
    _require_wide(path, narrow)
    return shapes


def _read_pickle(path: Path) -> dict[str, tuple[int, ...]]:
    """Unpickle on a device without memory, so that the storages are skipped."""
    import torch  # slow to import

    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        tensors = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    except UnpicklingError as error:  # torch's own message explains at length how to run the code after all
        raise LoadError(
            f"{path}: the weights cannot be loaded: the file holds more than weights, and could run code"
        ) from error
    except Exception as error:  # a pickle can be broken in as many ways as there are classes of errors
        raise LoadError(f"{path}: corrupt or cut short: {type(error).__name__}: {error}") from error
    _require_wide(
        path, {name: str(tensor.dtype) for name, tensor in tensors.items() if tensor.dtype.itemsize < _MIN_BYTES}
    )
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _require_wide(path: Path, narrow: Mapping[str, str]) -> None:
    """Refuse quantized weights: without their scales, they would be read as wrong numbers.

    Args:
        narrow: the type of each tensor of fewer than 16 bits.
    """
    for name, dtype in narrow.items():
        if name.endswith("weight"):  # a table of constants may have such a type
            raise LoadError(
                f"{path}: {name} is quantized ({dtype}), which is not supported: use the repository with the weights in "
                "float16, bfloat16 or float32"
            )
