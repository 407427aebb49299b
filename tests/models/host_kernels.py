"""The gateway's CUDA kernels on a CPU: the same source, compiled by a C++ compiler, block by block and thread by thread.

And a graph as a card keeps it: the calls that were made while it was captured, with the tensors and numbers of that time.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gateway.engine.model.runtimes.nvrtc import Launch

COMPILER = shutil.which("g++") or shutil.which("c++")

_PRELUDE = r"""
#include <cmath>
#include <cstring>
struct Place { int x, y, z; };
static Place blockIdx;
#define FUNCTION static
#define KERNEL(name, threads) static void name
#define SHARED
#define PHASE(t, threads) for (int t = 0; t < threads; ++t)
#define EXP(x) expf(x)
static float half_to_float(unsigned short x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
static unsigned short float_to_half(float x) { _Float16 y = (_Float16)x; unsigned short z; memcpy(&z, &y, 2); return z; }
static unsigned bits_of(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static float float_of(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static float sum_of(const float* parts, int number) {
    float sum = 0;
    for (int i = 0; i < number; ++i) sum += parts[i];
    return sum;
}
#define block_sum(parts) sum_of(parts, THREADS)
"""
_ENTRIES = {
    "rotate": "unsigned short* a, const unsigned short* b, const int* c, int d",
    "normalize": "unsigned short* a, const unsigned short* b, const unsigned short* c, double d",
    "attend": "const unsigned short* a, const int* b, unsigned short* c, double d",
}
_ENTRY = """
extern "C" void run(int x, int y, {arguments}) {{
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
        for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {name}(a, b, c, d);
}}
"""


@cache
def _library(source: str, name: str) -> ctypes.CDLL:
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="kernels-"))
    path = folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    path.with_suffix(".cpp").write_text(_PRELUDE + source + _ENTRY.format(name=name, arguments=_ENTRIES[name]))
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".cpp"))]
    subprocess.run(command, check=True, timeout=60)
    library = ctypes.CDLL(str(path))
    shutil.rmtree(folder)
    return library


def compile_on_host(source: str, name: str, _threads: int, _device: torch.device) -> Launch:
    """Take the place of ``nvrtc.compile_kernel``."""
    library = _library(source, name)

    def launch(grid: tuple[int, int, int], args: Sequence[torch.Tensor | int | float]) -> None:
        for recorder in _RECORDERS:
            recorder.calls.append((launch, (grid, args), {}, []))
        given: list[Any] = []
        for one in args:
            if isinstance(one, torch.Tensor):
                assert one.is_contiguous()
                assert one.dtype in (torch.float16, torch.bfloat16, torch.int32)
                given.append(ctypes.c_void_p(one.data_ptr()))
            else:
                given.append(ctypes.c_int(one) if isinstance(one, int) else ctypes.c_double(one))
        library.run(*grid[:2], *given)

    return launch


_RECORDERS: list[_Recorder] = []


class _Recorder(TorchDispatchMode):
    """Writes down each call of torch, and plays them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        outputs = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        assert "_local_scalar_dense" not in func.name(), "a graph cannot wait for a number"
        self.calls.append((func, args, kwargs or {}, outputs))
        return made

    def play(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view, or computed in place
                    old.copy_(new)


class HostCapturer:
    """Takes the place of ``graphs.Capturer``. The gateway's own kernels, which torch does not see, record themselves."""

    def __init__(self, _device: torch.device) -> None:
        pass

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        work()
        recorder = _Recorder()
        _RECORDERS.append(recorder)
        try:
            with recorder:
                made = work()
        finally:
            _RECORDERS.remove(recorder)
        return made, recorder.play
