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
# The threads of a warp are coroutines: each runs until it must meet the others, and the last to come computes for all.
_WARP = r"""
#include <functional>
#include <ucontext.h>
#define HIDE(x)
static Place threadIdx;
static float read(unsigned short x);
static unsigned short write(float x);
static std::function<void()> work;
static ucontext_t contexts[32], outside;
static struct { int meetings; float given, found; unsigned factors[6]; float sums[4]; } threads[32];
static bool have_parted;

static void meet(const std::function<void()>& compute) {
    const int number = threadIdx.x, own = number % 32;
    ++threads[own].meetings;
    if (own == 31) {
        for (auto& one : threads) have_parted |= one.meetings != threads[31].meetings;
        if (have_parted) setcontext(&outside);  // some ended, or are at another place
        compute();
    }
    swapcontext(&contexts[own], &contexts[(own + 1) % 32]);
    threadIdx.x = number;
}
// The layouts are those of mma.m16n8k16 in the PTX manual.
static void multiply_all() {
    float first[16][16], second[16][8];
    for (int t = 0; t < 32; ++t) for (int i = 0; i < 4; ++i) for (int j = 0; j < 2; ++j) {
        const int column = t % 4 * 2 + j + i / 2 * 8;
        first[t / 4 + i % 2 * 8][column] = read((unsigned short)(threads[t].factors[i] >> 16 * j));
        if (i % 2 == 0) second[column][t / 4] = read((unsigned short)(threads[t].factors[4 + i / 2] >> 16 * j));
    }
    for (int t = 0; t < 32; ++t) for (int i = 0; i < 4; ++i) for (int k = 0; k < 16; ++k)
        threads[t].sums[i] += first[t / 4 + i / 2 * 8][k] * second[k][t % 4 * 2 + i % 2];
}
static void multiply(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
    auto& own = threads[threadIdx.x % 32];
    const unsigned factors[] = {a, b, c, d, e, f};
    memcpy(own.factors, factors, sizeof factors);
    memcpy(own.sums, sums, sizeof sums);
    meet(multiply_all);
    memcpy(sums, own.sums, sizeof sums);
}
static float across(float x, int bit) {
    auto& own = threads[threadIdx.x % 32];
    own.given = x;
    meet([=] { for (int t = 0; t < 32; ++t) threads[t].found = threads[t ^ bit].given; });
    return own.found;
}
static unsigned __byte_perm(unsigned x, unsigned y, unsigned places) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned made = 0;
    for (int i = 0; i < 4; ++i) made |= (unsigned)(both >> (places >> 4 * i & 7) * 8 & 255) << 8 * i;
    return made;
}
static int min(int a, int b) { return a < b ? a : b; }
static float exp2_of(float x) { return exp2f(x); }
static float inverse_of(float x) { return 1 / x; }
static unsigned pack(float first, float second) { return write(first) | (unsigned)write(second) << 16; }
template <int N> static void store(const unsigned (&x)[N], unsigned short* to) { memcpy(to, x, sizeof x); }

static void run_warp(int number) {
    static char stacks[32][1 << 16];
    static int first, ended;
    static void (*const begin)(int) = [](int own) { threadIdx.x = first + own; work(); ++ended; };
    first = number * 32, ended = 0;
    for (int t = 0; t < 32; ++t) {
        threads[t].meetings = 0;
        getcontext(&contexts[t]);
        contexts[t].uc_stack.ss_sp = stacks[t];
        contexts[t].uc_stack.ss_size = sizeof stacks[t];
        contexts[t].uc_link = t < 31 ? &contexts[t + 1] : &outside;
        makecontext(&contexts[t], (void (*)())begin, 1, t);
    }
    swapcontext(&outside, &contexts[0]);
    have_parted |= ended < 32;
}
"""
_WARP_ENTRY = """
extern "C" int run(int x, int, {arguments}) {{
    have_parted = false;
    work = [=] {{ {name}(a, b, c, d, e, f); }};
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
        for (int warp = 0; warp < THREADS / 32; ++warp) run_warp(warp);
    return have_parted;
}}
"""
_ENTRIES = {
    "rotate": "unsigned short* a, const unsigned short* b, const int* c, int d",
    "normalize": "unsigned short* a, const unsigned short* b, const unsigned short* c, double d",
    "attend_short": "const unsigned short* a, const int* b, unsigned short* c, const unsigned short* d, const int* e, int f",
}
_ENTRY = """
extern "C" int run(int x, int y, {arguments}) {{
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
        for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y) {name}(a, b, c, d);
    return 0;
}}
"""


@cache
def _library(source: str, name: str) -> ctypes.CDLL:
    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp(prefix="kernels-"))
    path = folder / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    warp, entry = (_WARP, _WARP_ENTRY) if name == "attend_short" else ("", _ENTRY)
    path.with_suffix(".cpp").write_text(_PRELUDE + warp + source + entry.format(name=name, arguments=_ENTRIES[name]))
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(path.with_suffix(".cpp"))]
    subprocess.run(command, check=True, timeout=60)
    library = ctypes.CDLL(str(path))
    shutil.rmtree(folder)
    return library


def compile_on_host(source: str, name: str, _threads: int, _device: torch.device) -> Launch:
    """Replaces ``nvrtc.compile_kernel``."""
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
        assert library.run(*grid[:2], *given) == 0, "threads of a warp parted where they must meet"

    return launch


_RECORDERS: list[_Recorder] = []


class _Recorder(TorchDispatchMode):
    """Records each call of torch, and replays them on the same tensors."""

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
    """Replaces ``graphs.Capturer``. The gateway's own kernels, which torch does not see, record themselves."""

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
