"""Kernels for packed rows that replace torch's: rotary positions and layer norms. :mod:`.short_attention` has a third.

They are compiled when a model is loaded, with the compiler that comes with torch's build for CUDA (NVRTC). This needs
neither a toolkit nor its headers; torch's own function, ``torch.cuda._compile_kernel``, needs both in torch 2.13.
:mod:`.tuning` uses a kernel only if it computes the same as torch on this card, and is faster.

- torch needs four kernels per layer for rotary positions, which read and write query and key twice. Here one kernel rotates
  them in place.
- torch's layer norm reaches half of a card's memory bandwidth. Here each row is read once, and written in place.

The source is written in phases: all threads of a block end a phase before any begins the next, and only shared variables
outlive a phase. So the source can also be compiled for a CPU, which runs one thread after the other, as the tests do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gateway.engine.model.runtimes.nvrtc import Launch, compile_kernel

_ROTATE_THREADS = 256
_MOST_NORM_THREADS = 256
# Numbers that a thread reads at once: 16 bytes.
_PACK = 8

# A 16-bit number is read and written as an unsigned short, because the headers with its type come with the toolkit.
_DEVICE = r"""
#ifdef __CUDACC_RTC__
#define KERNEL(name, threads) extern "C" __global__ void __launch_bounds__(threads) name
#define SHARED __shared__
#define PHASE(t, threads) __syncthreads(); for (int t = threadIdx.x, phase = 1; phase; phase = 0)
__device__ float half_to_float(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ unsigned short float_to_half(float x) {
    unsigned short y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
}
__device__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ float float_of(unsigned x) { return __uint_as_float(x); }
#define FUNCTION __device__
// Returns the sum of the numbers that the block's threads have written to shared memory; all threads must call it.
__device__ float block_sum(const float* parts) {
    float sum = 0;
    for (int i = threadIdx.x % 32; i < THREADS; i += 32) sum += parts[i];
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}
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

# Neighboring numbers, which are read and written in one access.
_PACKED = r"""
struct alignas(2 * PACK) Pack { unsigned short at[PACK]; };
"""

# qkv: (tokens, 3, HEADS, WIDTH). turns: (positions, WIDTH), the cosines and then the sines of the WIDTH / 2 angles.
_ROTATE = r"""
#define PACKS (WIDTH / 2 / PACK)
KERNEL(rotate, THREADS)(unsigned short* qkv, const unsigned short* turns, const int* positions, int tokens) {
    PHASE(t, THREADS) {
        const unsigned pack = blockIdx.x * THREADS + t;
        const unsigned token = pack / (2 * HEADS * PACKS);  // half a width for each head of query and of key
        if (token < tokens) {
            const unsigned rest = pack % (2 * HEADS * PACKS), head = rest / PACKS, i = rest % PACKS;
            Pack* const first = (Pack*)(qkv + (unsigned long long)token * 3 * HEADS * WIDTH + head * WIDTH) + i;
            Pack* const second = first + PACKS;
            const Pack* const turn = (const Pack*)(turns + (unsigned long long)positions[token] * WIDTH) + i;
            const Pack cosines = turn[0], sines = turn[PACKS];
            Pack a = *first, b = *second;
            for (int j = 0; j < PACK; ++j) {
                const float cosine = read(cosines.at[j]), sine = read(sines.at[j]);
                const float x = read(a.at[j]), y = read(b.at[j]);
                a.at[j] = write(x * cosine - y * sine);
                b.at[j] = write(y * cosine + x * sine);
            }
            *first = a;
            *second = b;
        }
    }
}
"""

# One block for each row of x: (rows, WIDTH). The variance is the mean square of the deviations from the mean, as in torch.
_NORMALIZE = r"""
#define PACKS (WIDTH / PACK)
KERNEL(normalize, THREADS)(unsigned short* x, const unsigned short* weight, const unsigned short* bias, double eps) {
    SHARED float row[PACK][PACKS];  // neighboring threads use neighboring banks
    SHARED float sums[THREADS], squares[THREADS];
    Pack* const packs = (Pack*)(x + (unsigned long long)blockIdx.x * WIDTH);
    PHASE(t, THREADS) {
        float sum = 0;
        for (int i = t; i < PACKS; i += THREADS) {
            const Pack pack = packs[i];
            for (int j = 0; j < PACK; ++j) sum += row[j][i] = read(pack.at[j]);
        }
        sums[t] = sum;
    }
    PHASE(t, THREADS) {
        const float mean = block_sum(sums) / WIDTH;
        float sum = 0;
        for (int i = t; i < PACKS; i += THREADS)
            for (int j = 0; j < PACK; ++j) sum += (row[j][i] - mean) * (row[j][i] - mean);
        squares[t] = sum;
    }
    PHASE(t, THREADS) {
        const float mean = block_sum(sums) / WIDTH, factor = 1 / sqrtf(block_sum(squares) / WIDTH + (float)eps);
        for (int i = t; i < PACKS; i += THREADS) {
            const Pack factors = ((const Pack*)weight)[i], shifts = ((const Pack*)bias)[i];
            Pack pack;
            for (int j = 0; j < PACK; ++j)
                pack.at[j] = write((row[j][i] - mean) * factor * read(factors.at[j]) + read(shifts.at[j]));
            packs[i] = pack;
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
        packs = len(qkv) * self._heads.number * self._heads.width // _pack(self._heads.width // 2)
        self._launch((-(-packs // _ROTATE_THREADS), 1, 1), [qkv, self._table, positions, len(qkv)])


class Normalize:
    """A layer norm (Ba et al., 2016), in place."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        """Normalize each row of ``x``, ``(rows, width)``, contiguous."""
        self._launch((len(x), 1, 1), [x, weight, bias, eps])


def compile_rotate(heads: Heads, table: torch.Tensor, device: torch.device) -> Rotate:
    """Compile the kernel for rotary positions; :func:`compile_kernel` lists the errors."""
    return Rotate(heads, table, compile_kernel(rotate_source(heads), "rotate", _ROTATE_THREADS, device))


def compile_normalize(width: int, dtype: torch.dtype, device: torch.device) -> Normalize:
    """Compile the kernel for layer norms; :func:`compile_kernel` lists the errors."""
    source = normalize_source(width, dtype)
    return Normalize(compile_kernel(source, "normalize", _norm_threads(width), device))


def rotate_source(heads: Heads) -> str:
    """Return the CUDA source of the kernel for rotary positions."""
    sizes = {"HEADS": heads.number, "WIDTH": heads.width, "PACK": _pack(heads.width // 2)}
    return _source(_PACKED + _ROTATE, heads.dtype, {**sizes, "THREADS": _ROTATE_THREADS})


def normalize_source(width: int, dtype: torch.dtype) -> str:
    """Return the CUDA source of the kernel for layer norms of rows of a width."""
    sizes = {"WIDTH": width, "PACK": _pack(width), "THREADS": _norm_threads(width)}
    return _source(_PACKED + _NORMALIZE, dtype, sizes)


def _pack(width: int) -> int:
    """Return how many numbers of a row a thread can read at once."""
    return math.gcd(width, _PACK)


def _norm_threads(width: int) -> int:
    """Return a thread for each pack of a row, in whole warps."""
    return min(_MOST_NORM_THREADS, -(-width // _pack(width) // 32) * 32)


def _source(kernel: str, dtype: torch.dtype, sizes: Mapping[str, float]) -> str:
    constants = {"IS_BFLOAT16": int(dtype == torch.bfloat16), **sizes}
    return "".join([*(f"#define {name} {value}\n" for name, value in constants.items()), _DEVICE, kernel])
