"""An emulation of a graphics card on a CPU: devices, shapes and dtypes, and the attention kernel's own checks.

A fake tensor says that it is on ``cuda:0`` and computes nothing, so that a full-size model takes no memory. torch's build
for CPUs lacks one thing for that: a guard that makes a device the current one. The CPU's own, which does nothing, serves.
"""

# ruff: noqa: S101  asserts are the kernel's checks
from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from gateway.engine.model.adapters import AdaptedEmbedding, AdaptedLinear, AdapterMask
from gateway.engine.model.host_memory import HostMemory
from gateway.engine.model.runtimes import flash

_CPU, _CUDA = 0, 1  # torch's numbers of the device types
# c10::impl::device_guard_impl_registry
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
# Parts of the names of matrix products and of attention.
_PRODUCTS = ("mm", "linear", "attention")
# In evaluation mode they return their input; a fake tensor does not know that.
_NO_KERNEL = ("aten::dropout", "aten::detach", "aten::alias")


# ------------------------------------------------------------------------------------------------------- fake tensors


@contextlib.contextmanager
def fake_card() -> Iterator[None]:
    """Let all tensors be fake ones, and those on ``cuda`` possible."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, _GUARDS)
    before = guards[_CUDA]
    guards[_CUDA] = before or guards[_CPU]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _fake_transfers(), torch.inference_mode():
            yield
    finally:
        guards[_CUDA] = before


@contextlib.contextmanager
def _fake_transfers() -> Iterator[None]:
    """Replace the two calls that no fake tensor has: copying from page-locked memory, and sharing memory with NumPy.

    And keep no constants, which are a single number each: they are computed with, on a card that does not exist.
    """

    def from_numpy(array: np.ndarray) -> torch.Tensor:
        return torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))

    def send(_memory: HostMemory, numbers: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.empty(numbers.shape, dtype=getattr(torch, numbers.dtype.name), device=device)

    with (
        mock.patch.object(HostMemory, "send", send),
        mock.patch.object(torch, "from_numpy", from_numpy),
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0),
    ):
        yield


def fake_model(
    config: PreTrainedConfig, dtype: torch.dtype, num_adapters: int = 0, attention: str | None = "sdpa"
) -> tuple[PreTrainedModel, AdapterMask | None]:
    """Return a model on the fake card, and the mask of its adapters of rank 4; to be called within :func:`fake_card`."""
    with unset_fake_temporarily(), torch.inference_mode(mode=False), torch.device("meta"):
        loader: Any = AutoModel
        model: Any = loader.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.pooler = None
    model.config.use_cache = False
    to_card(model)
    return model, _add_adapters(model, num_adapters) if num_adapters else None


def to_card(model: nn.Module) -> None:
    """Replace the weights by fake ones on the card."""
    for module in model.modules():
        kept: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in kept:
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if tensors is module._parameters else fake


def _add_adapters(model: nn.Module, number: int) -> AdapterMask:
    mask = AdapterMask([4] * number)
    mask.table = nn.Buffer(torch.empty(mask.table.shape, device="cuda"), persistent=False)
    for name, layer in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(layer, nn.Linear):
            kind: type[nn.Module] = AdaptedLinear
            num_in, num_out = layer.in_features, layer.out_features
        elif isinstance(layer, nn.Embedding) and leaf != "position_embeddings":
            kind = AdaptedEmbedding
            num_in, num_out = layer.num_embeddings, layer.embedding_dim
        else:
            continue
        down, up = torch.empty(4 * number, num_in, device="cuda"), torch.empty(num_out, 4 * number, device="cuda")
        setattr(model.get_submodule(parent), leaf, kind(layer, mask, down, up))
    return mask


# ----------------------------------------------------------------------------------------------------------- counting


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernels that a card would launch: a call of torch that writes numbers is one.

    Attributes:
        kernels: by the name of the call.
        num_calls: of the dispatcher, views and allocations included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.num_calls = 0

    @property
    def total(self) -> int:
        return sum(self.kernels.values())

    def launch(self, _grid: tuple[int, int, int], _args: Sequence[torch.Tensor | int | float]) -> None:
        """Count one of the gateway's own kernels, which no call of torch launches."""
        self.kernels["own"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._flash_attention_forward.default:
            check_attention(*args, **kwargs or {})
        made = func(*args, **kwargs or {})
        self.num_calls += 1
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        is_new = any(tensor.untyped_storage()._cdata not in given for tensor in _tensors(made))
        is_allocation = "empty" in func.name()
        if (is_new or func._schema.is_mutable) and not is_allocation and func.name() not in _NO_KERNEL:
            self.kernels[func.name()] += 1
        return made


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of a batch's activations that kernels read and write, weights and tables not included.

    Args:
        sizes: first dimensions of activations; those of weights must be others.

    Attributes:
        elementwise_bytes: of all kernels but matrix products and attention.
    """

    def __init__(self, sizes: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes = frozenset(sizes)
        self.total_bytes = self.elementwise_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        read = _tensors((args, {name: value for name, value in (kwargs or {}).items() if name != "out"}))
        given = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = all(tensor.untyped_storage()._cdata in given for tensor in _tensors(made))
        if (is_view and not func._schema.is_mutable) or func.name() in _NO_KERNEL or "empty" in func.name():
            return made
        moved = sum(one.nbytes for one in [*read, *_tensors(made)] if one.ndim and one.shape[0] in self._sizes)
        self.total_bytes += moved
        if not any(word in func.name() for word in _PRODUCTS):
            self.elementwise_bytes += moved
        return made


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory of the tensors that are made on the card, as torch's allocator counts it.

    Attributes:
        peak_bytes: the maximum number of bytes that were allocated at the same time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage._cdata not in given:
                self._held[storage._cdata] = (
                    StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                    storage.nbytes(),
                )
        self.peak_bytes = max(self.peak_bytes, sum(size for _storage, size in self._held.values()))
        return made


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# ---------------------------------------------------------------------------------------------- the attention kernel


def check_attention(  # noqa: PLR0913, PLR0917  the operator's
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    is_causal: bool,
    return_mask: bool,
    *,
    scale: float,
) -> None:
    """Make the kernel's own checks (pytorch, aten/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    total, num_heads, width = query.shape
    assert query.dtype in (torch.float16, torch.bfloat16), (
        f"FlashAttention only supports fp16 and bf16, not {query.dtype}"
    )
    assert key.dtype == value.dtype == query.dtype, "query, key and value must have the same dtype"
    assert width % 8 == 0, "head_size must be a multiple of 8"
    assert width <= 256, "FlashAttention forward only supports head dimension at most 256"
    assert key.shape == value.shape == (len(key), num_heads, width)
    assert all(one.stride(-1) == 1 for one in (query, key, value)), "the last dimension must be contiguous"
    for ends, longest, count in ((query_ends, longest_query, total), (key_ends, longest_key, len(key))):
        assert ends.dtype == torch.int32, "cu_seqlens must have dtype int32"
        assert ends.is_contiguous()
        assert ends.device == query.device
        assert ends.shape == query_ends.shape
        assert type(longest) is int
        assert longest <= count
    assert (dropout, is_causal, return_mask) == (0.0, False, False)
    assert isinstance(scale, float)


def compute_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Compute the kernel's result, with its checks: each text separately, in float32, rounded at the end."""
    check_attention(*args, **kwargs)
    query, key, value, query_ends, key_ends, longest_query, longest_key = args[:7]
    for ends, longest, tensor in ((query_ends, longest_query, query), (key_ends, longest_key, key)):
        assert ends[0] == 0
        assert ends[-1] == len(tensor)
        assert ends.diff().max() <= longest, "max_q is at least the longest of the texts"
    out = torch.empty_like(query)
    for i in range(len(query_ends) - 1):
        rows, keys = slice(*query_ends[i : i + 2].tolist()), slice(*key_ends[i : i + 2].tolist())
        q, k, v = (one.transpose(0, 1).float() for one in (query[rows], key[keys], value[keys]))
        shares = (q @ k.transpose(1, 2) * kwargs["scale"]).softmax(dim=-1)
        out[rows] = (shares @ v).transpose(0, 1).to(out.dtype)
    none = torch.empty(0)
    return out, none, none, none, none


@contextlib.contextmanager
def kernel_on_the_cpu() -> Iterator[None]:
    """Let packed attention take the card's branch on the CPU, with the kernel replaced by :func:`compute_attention`."""
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.object(flash, "has_kernel", return_value=True),
    ):
        library.impl("_flash_attention_forward", compute_attention, "CPU")
        yield
