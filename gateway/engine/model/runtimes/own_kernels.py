"""Two kernels for packed rows that replace several of torch's: rotary positions, and attention within short texts.

They are compiled when a model is loaded, with the compiler that comes with torch's build for CUDA (NVRTC). This needs
neither a toolkit nor its headers; torch's own function, ``torch.cuda._compile_kernel``, needs both in torch 2.13.
:mod:`.tuning` uses a kernel only where it computes the same as torch on this card, and is faster.

- Rotary positions take torch four kernels per layer, which read and write query and key twice. Here one kernel does it in
  place.
- FlashAttention computes tiles of 128 queries: for a text of 16 tokens, 63 of 64 numbers are discarded. Here a block of
  threads computes a text and a head, in float32, from shared memory.

The source is written in phases: all threads of a block end a phase before any begins the next, and only shared variables
outlive a phase. So the source can also be compiled for a CPU, which runs one thread after the other, as the tests do.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

MOST_TOKENS = 32
"""The longest text that the kernel for short texts takes."""
# Query, key and value of a text and a head, and the scores, are in 48 KiB of shared memory.
_MOST_HEAD_WIDTH = 96
_ROTATE_THREADS, _ATTEND_THREADS = 256, 128

Launch: TypeAlias = Callable[[tuple[int, int, int], Sequence[torch.Tensor | int | float]], None]
"""Launches a kernel on the current stream: the blocks of its grid, and its arguments."""

# A 16-bit number is read and written as an unsigned short, because the headers with its type come with the toolkit.
_DEVICE = r"""
#ifdef __CUDACC_RTC__
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
#define SHARED __shared__
#define PHASE(t, threads) __syncthreads(); for (int t = threadIdx.x, phase = 1; phase; phase = 0)
#define EXP(x) __expf(x)
__device__ float half_to_float(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ unsigned short float_to_half(float x) {
    unsigned short y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
}
__device__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ float float_of(unsigned x) { return __uint_as_float(x); }
#define FUNCTION __device__
#endif

#if IS_BFLOAT16
FUNCTION float read(unsigned short x) { return float_of((unsigned)x << 16); }
FUNCTION unsigned short write(float x) {
    const unsigned bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN, which rounding could turn into 0
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
FUNCTION float read(unsigned short x) { return half_to_float(x); }
FUNCTION unsigned short write(float x) { return float_to_half(x); }
#endif
"""

# qkv: (tokens, 3, HEADS, WIDTH). turns: (positions, WIDTH), the cosines and then the sines of the WIDTH / 2 angles.
_ROTATE = r"""
KERNEL(rotate, THREADS)(unsigned short* qkv, const unsigned short* turns, const int* positions, int tokens) {
    PHASE(t, THREADS) {
        const long long pair = (long long)blockIdx.x * THREADS + t;
        const long long token = pair / (HEADS * WIDTH);  // half a width for each head of query and of key
        if (token < tokens) {
            const int rest = (int)(pair % (HEADS * WIDTH)), head = rest / (WIDTH / 2), i = rest % (WIDTH / 2);
            unsigned short* first = qkv + token * 3 * HEADS * WIDTH + head * WIDTH + i;
            unsigned short* second = first + WIDTH / 2;
            const unsigned short* turn = turns + (long long)positions[token] * WIDTH + i;
            const float cosine = read(turn[0]), sine = read(turn[WIDTH / 2]);
            const float a = read(*first), b = read(*second);
            *first = write(a * cosine - b * sine);
            *second = write(b * cosine + a * sine);
        }
    }
}
"""

# One block for each text and head. A text of more than MOST tokens is not computed, because it can only be padding.
_ATTEND = r"""
KERNEL(attend, THREADS)(const unsigned short* qkv, const int* boundaries, unsigned short* out, double scale) {
    SHARED float rows[3][MOST][WIDTH + 1];  // query, key and value; the odd stride keeps threads off each other's banks
    SHARED float shares[MOST][MOST + 1];
    const int begin = boundaries[blockIdx.x], found = boundaries[blockIdx.x + 1] - begin;
    const int length = found > MOST ? 0 : found, head = blockIdx.y;
    PHASE(t, THREADS) {
        for (int i = t; i < 3 * length * WIDTH; i += THREADS) {
            const int part = i / (length * WIDTH), row = i / WIDTH % length, column = i % WIDTH;
            rows[part][row][column] =
                read(qkv[((long long)(begin + row) * 3 + part) * HEADS * WIDTH + head * WIDTH + column]);
        }
    }
    PHASE(t, THREADS) {
        for (int i = t; i < length * length; i += THREADS) {
            const int row = i / length, other = i % length;
            float sum = 0;
            for (int column = 0; column < WIDTH; ++column) sum += rows[0][row][column] * rows[1][other][column];
            shares[row][other] = sum * (float)scale;
        }
    }
    PHASE(t, THREADS) {
        if (t < length) {
            float most = shares[t][0], sum = 0;
            for (int other = 1; other < length; ++other) most = shares[t][other] > most ? shares[t][other] : most;
            for (int other = 0; other < length; ++other) sum += shares[t][other] = EXP(shares[t][other] - most);
            for (int other = 0; other < length; ++other) shares[t][other] /= sum;
        }
    }
    PHASE(t, THREADS) {
        for (int i = t; i < length * WIDTH; i += THREADS) {
            const int row = i / WIDTH, column = i % WIDTH;
            float sum = 0;
            for (int other = 0; other < length; ++other) sum += shares[row][other] * rows[2][other][column];
            out[((long long)(begin + row) * HEADS + head) * WIDTH + column] = write(sum);
        }
    }
}
"""


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention sizes that a model's kernels are compiled for."""

    number: int
    width: int
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return float(self.width**-0.5)


class Rotate:
    """Rotary positions, in place.

    Args:
        table: ``(positions, width)``: cosines, then sines.
    """

    def __init__(self, heads: Heads, table: torch.Tensor, launch: Launch) -> None:
        self._heads = heads
        self._table = table
        self._launch = launch

    def __call__(self, qkv: torch.Tensor, positions: torch.Tensor) -> None:
        """Rotate query and key.

        Args:
            qkv: ``(tokens, 3, heads, width)``, contiguous.
            positions: ``(tokens,)`` int32.
        """
        pairs = len(qkv) * self._heads.number * self._heads.width
        self._launch((-(-pairs // _ROTATE_THREADS), 1, 1), [qkv, self._table, positions, len(qkv)])


class Attend:
    """Attention within texts of at most :data:`MOST_TOKENS` tokens; the result for longer texts is undefined."""

    def __init__(self, heads: Heads, launch: Launch) -> None:
        self._heads = heads
        self._launch = launch

    def __call__(self, qkv: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
        """Attend within each text.

        Args:
            qkv: ``(tokens, 3, heads, width)``, contiguous.
            boundaries: ``(texts + 1,)`` int32: where each text begins, and the end of the last.

        Returns:
            ``(tokens, heads * width)``.
        """
        out = qkv.new_empty(len(qkv), self._heads.number * self._heads.width)
        self._launch((len(boundaries) - 1, self._heads.number, 1), [qkv, boundaries, out, self._heads.scale])
        return out


def rotate_source(heads: Heads) -> str:
    """Return the CUDA source of the kernel for rotary positions."""
    return _source(_ROTATE, heads, _ROTATE_THREADS)


def attend_source(heads: Heads) -> str:
    """Return the CUDA source of the kernel for short texts.

    Raises:
        ValueError: the heads are too wide for shared memory.
    """
    if heads.width > _MOST_HEAD_WIDTH:
        raise ValueError(f"heads of {heads.width} numbers, at most {_MOST_HEAD_WIDTH} fit into shared memory")
    return _source(_ATTEND, heads, _ATTEND_THREADS)


def _source(kernel: str, heads: Heads, threads: int) -> str:
    constants = {
        "IS_BFLOAT16": int(heads.dtype == torch.bfloat16),
        "HEADS": heads.number,
        "WIDTH": heads.width,
        "THREADS": threads,
        "MOST": MOST_TOKENS,
    }
    return "".join([*(f"#define {name} {value}\n" for name, value in constants.items()), _DEVICE, kernel])


def compile_kernel(source: str, name: str, device: torch.device) -> Launch:
    """Compile a kernel for a card, and return its launcher.

    Raises:
        OSError: the compiler's library is not installed.
        RuntimeError: the compiler refuses the source, or the driver refuses the result.
    """
    from torch.cuda import _utils

    capability = torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        made = compile_source(load_compiler(), source, capability)
        kernel = _utils._cuda_load_module(made, [name])[name]  # type: ignore[index]
    threads = _ROTATE_THREADS if name == "rotate" else _ATTEND_THREADS

    def launch(grid: tuple[int, int, int], args: Sequence[torch.Tensor | int | float]) -> None:
        kernel(grid=grid, block=(threads, 1, 1), args=list(args))

    return launch


def load_compiler() -> ctypes.CDLL:
    """Return NVRTC's library, which comes with torch.

    Raises:
        OSError: the library is not installed.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    paths = [path for root in roots for path in sorted(Path(root).glob(f"*/lib/libnvrtc.so.{major}"))]
    return open_compiler(paths[0] if paths else Path(f"libnvrtc.so.{major}"))


def open_compiler(path: Path) -> ctypes.CDLL:
    """Return NVRTC's library from a file.

    Raises:
        OSError: the library cannot be loaded.
    """
    # NVRTC looks for its builtins only by name, and does not find them in a package's folder unless they are loaded.
    if path.is_absolute():
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


def compile_source(compiler: ctypes.CDLL, source: str, capability: tuple[int, int]) -> bytes:
    """Compile a source to machine code, which, unlike PTX, runs with every driver of the same major version of CUDA.

    Raises:
        RuntimeError: the compiler refuses the source; the message has the start of its log.
    """
    program = ctypes.c_void_p()
    _check(compiler.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gateway.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode())
        if compiler.nvrtcCompileProgram(program, 1, options):
            raise RuntimeError(f"NVRTC: {_read(compiler, program, 'ProgramLog').decode(errors='replace')[:300]}")
        return _read(compiler, program, "CUBIN")
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _read(compiler: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(compiler[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    made = ctypes.create_string_buffer(size.value)
    _check(compiler[f"nvrtcGet{what}"](program, made))
    return made.raw


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: error {code}")
