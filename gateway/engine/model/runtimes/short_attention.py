"""Attention within short texts of a packed row, with rotary positions, in one kernel that uses tensor cores.

FlashAttention computes tiles of 128 queries, so for a text of 16 tokens it discards 63 of 64 numbers. Here a warp computes
16 queries of a text and a head, and skips keys beyond the text, 16 at a time. Most of the remaining time is spent on reading
the row.

All numbers are in registers, and each thread reads the numbers that it needs. Three properties make that possible. (The
terms are those of PTX's matrix instruction m16n8k16, whose 32 threads are 8 groups of 4 members.)

- Scores are sums over columns, whose order does not matter. A group has a row of query or key, and each member reads
  neighboring columns at once, instead of the columns that the instruction's layout specifies.
- The columns of an output can also be in any order, so each thread reads neighboring columns of a value's row, and writes
  neighboring columns.
- The instruction returns scores in the layout that it expects of the first factor of the next product, the softmax weights
  (``shares``).

Rows beyond the end of a text repeat its last row, so that nothing outside the text is read; their weights are 0.

The threads of a warp depend on each other only in ``multiply`` and ``across``. The tests compile the source for a CPU, where
each thread is a coroutine that waits there for the others.
"""

from __future__ import annotations

from math import e, gcd, log2

import torch

from gateway.engine.model.runtimes.nvrtc import Launch, compile_kernel
from gateway.engine.model.runtimes.own_kernels import Heads, _source

MOST_TOKENS = 64
"""The longest text that the kernel computes."""
WIDTH_STEP, MOST_WIDTH = 16, 128
WARPS = 4
THREADS = 32 * WARPS
NAME = "attend_short"
"""The kernel's name."""
# Up to this number of pairs of a text and a head, a card can run all of them at the same time, each in its own block.
_FEW = 512

# An unsigned holds two 16-bit numbers, the first in its lower half.
_WARP = r"""
#ifdef __CUDACC_RTC__
#if IS_BFLOAT16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif
// sums (16 x 8) += first (16 x 16) times second (16 x 8). A thread has 2 rows of the first factor, at 2 x 2 columns.
__device__ void multiply(float (&sums)[4], unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "r"(f));
}
// Returns x of the thread whose index in the warp differs in this bit.
__device__ float across(float x, int bit) { return __shfl_xor_sync(0xffffffffu, x, bit); }
__device__ unsigned pack(float first, float second) {
    unsigned y; asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first)); return y;
}
__device__ float exp2_of(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ float inverse_of(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#define HIDE(x) asm volatile("" : "+r"(x))  // hides the value of x from the compiler
// The compiler would split an assignment of several words into several stores.
__device__ void store(const unsigned (&x)[1], unsigned short* to) {
    asm volatile("st.global.b32 [%0], %1;" :: "l"(to), "r"(x[0]) : "memory");
}
__device__ void store(const unsigned (&x)[2], unsigned short* to) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(to), "r"(x[0]), "r"(x[1]) : "memory");
}
__device__ void store(const unsigned (&x)[4], unsigned short* to) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
        :: "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
#endif

#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)  // an index into registers must be a constant
FUNCTION float first_of(unsigned x) { return read((unsigned short)x); }
FUNCTION float second_of(unsigned x) { return read((unsigned short)(x >> 16)); }
FUNCTION unsigned firsts_of(unsigned x, unsigned y) { return __byte_perm(x, y, 0x5410); }
FUNCTION unsigned seconds_of(unsigned x, unsigned y) { return __byte_perm(x, y, 0x7632); }
"""

# qkv: (tokens, 3, HEADS, WIDTH). turns: (positions, WIDTH), the cosines and then the sines of the WIDTH / 2 angles.
_ATTEND = r"""
#define LIMITS THREADS, BLOCKS_PER_PROCESSOR
#define TOGETHER ((HEADS + WARPS - 1) / WARPS)  // blocks of a text, if they have several heads
#define STRIDE (3 * HEADS * WIDTH)    // numbers from one row of a text to the next
#define PIECES (WIDTH / 8 / PIECE)    // an eighth of a row, in pieces of PIECE numbers that are read and written at once
struct alignas(2 * PIECE) Piece { unsigned pairs[PIECE / 2]; };
struct Quarter { unsigned pairs[WIDTH / 8]; };

// Reads a member's quarter of a row of query or key: pieces of the first half, and the same pieces of the second.
FUNCTION Quarter read_quarter(const unsigned short* row, int member) {
    Quarter made;
    EACH(half, 2) EACH(i, PIECES) {
        const Piece piece = *(const Piece*)(row + half * (WIDTH / 2) + (i * 4 + member) * PIECE);
        EACH(j, PIECE / 2) made.pairs[(half * PIECES + i) * (PIECE / 2) + j] = piece.pairs[j];
    }
    return made;
}

FUNCTION Quarter read_turned(
    const unsigned short* text, int row, int member, const unsigned short* turns, const int* positions
) {
    Quarter x = read_quarter(text + row * STRIDE, member);
#if ROTATES
    const Quarter turn = read_quarter(turns + positions[row] * WIDTH, member);
    EACH(i, WIDTH / 16) {
        unsigned &a = x.pairs[i], &b = x.pairs[i + WIDTH / 16];
        const unsigned cosine = turn.pairs[i], sine = turn.pairs[i + WIDTH / 16];
        const unsigned turned = pack(first_of(a) * first_of(cosine) - first_of(b) * first_of(sine),
                                     second_of(a) * second_of(cosine) - second_of(b) * second_of(sine));
        b = pack(first_of(b) * first_of(cosine) + first_of(a) * first_of(sine),
                 second_of(b) * second_of(cosine) + second_of(a) * second_of(sine));
        a = turned;
    }
#endif
    return x;
}

// Replaces a thread's scores by their exponentials; multiplied by `scale`, they are the shares of each row's sum.
template <int TILES>
FUNCTION void exponentiate(float (&scores)[TILES][4], float (&scale)[2]) {
    EACH(half, 2) {
        float most = scores[0][2 * half], sum = 0;
        EACH(tile, TILES) most = fmaxf(most, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
        EACH(i, 2) most = fmaxf(most, across(most, 1 << i));
        EACH(tile, TILES) EACH(i, 2) {
            float& score = scores[tile][2 * half + i];
            sum += score = exp2_of((score - most) * (float)SCALE);  // subtract first: the difference is exact, or large
        }
        EACH(i, 2) sum += across(sum, 1 << i);
        scale[half] = inverse_of(sum);
    }
}

// Computes 16 queries of a text of at most 16 * BLOCKS tokens; a thread has scores and outputs of the rows `group` and
// `group + 8`. The pointers are at the text's first row and at the head.
template <int BLOCKS>
FUNCTION void attend_queries(
    const unsigned short* text, unsigned short* out, int begin, int length, int lane,
    const unsigned short* turns, const int* positions
) {
    const int group = lane / 4, member = lane % 4, last = length - 1;
    Quarter query[2];
    EACH(half, 2) query[half] = read_turned(text, min(begin + 8 * half + group, last), member, turns, positions);
    float scores[2 * BLOCKS][4] = {}, scale[2], sums[WIDTH / 8][4] = {};
    EACH(tile, 2 * BLOCKS) {
        int row = 8 * tile + group;
        if (tile / 2 == BLOCKS - 1) row = min(row, last);
        const Quarter key = read_turned(text + HEADS * WIDTH, row, member, turns, positions);
        EACH(i, WIDTH / 16)
            multiply(scores[tile], query[0].pairs[2 * i], query[1].pairs[2 * i], query[0].pairs[2 * i + 1],
                     query[1].pairs[2 * i + 1], key.pairs[2 * i], key.pairs[2 * i + 1]);
    }
    EACH(tile, 2) EACH(i, 4)
        if (16 * (BLOCKS - 1) + 8 * tile + 2 * member + i % 2 >= length)
            scores[2 * (BLOCKS - 1) + tile][i] = float_of(0xff800000u);  // minus infinity
    exponentiate<2 * BLOCKS>(scores, scale);
    EACH(block, BLOCKS) {
        unsigned shares[4];
        EACH(i, 4) shares[i] = pack(scores[2 * block + i / 2][i % 2 * 2], scores[2 * block + i / 2][i % 2 * 2 + 1]);
        EACH(i, PIECES) {
            Piece rows[4];
            EACH(j, 4) {
                int row = 16 * block + j / 2 * 8 + 2 * member + j % 2;
                if (block == BLOCKS - 1) row = min(row, last);
                rows[j] = *(const Piece*)(text + row * STRIDE + 2 * HEADS * WIDTH + (i * 8 + group) * PIECE);
            }
            EACH(j, PIECE / 2) {
                const unsigned a = rows[0].pairs[j], b = rows[1].pairs[j], c = rows[2].pairs[j], d = rows[3].pairs[j];
                float (&first)[4] = sums[i * PIECE + 2 * j], (&second)[4] = sums[i * PIECE + 2 * j + 1];
                multiply(first, shares[0], shares[1], shares[2], shares[3], firsts_of(a, b), firsts_of(c, d));
                multiply(second, shares[0], shares[1], shares[2], shares[3], seconds_of(a, b), seconds_of(c, d));
            }
        }
    }
    EACH(half, 2) {
        const int row = begin + 8 * half + group;
        if (row < length) EACH(i, PIECES) EACH(side, 2) {
            unsigned pairs[PIECE / 2];
            EACH(j, PIECE / 2)
                pairs[j] = pack(sums[i * PIECE + 2 * j][2 * half + side] * scale[half],
                                sums[i * PIECE + 2 * j + 1][2 * half + side] * scale[half]);
            store(pairs, out + row * HEADS * WIDTH + (i * 8 + 2 * member + side) * PIECE);
        }
    }
}

// Computes some heads of a text; the pointers are at the first.
template <int BLOCKS>
FUNCTION void attend_heads(
    const unsigned short* text, unsigned short* out, int heads, int length,
    const unsigned short* turns, const int* positions
) {
#pragma unroll 1
    for (int work = threadIdx.x / 32; work < heads * BLOCKS; work += WARPS) {
        const int head = work / BLOCKS, begin = work % BLOCKS * 16;
        int lane = threadIdx.x % 32;
        HIDE(lane);  // otherwise the compiler computes all addresses before the loop, and there are too few registers
        attend_queries<BLOCKS>(text + head * WIDTH, out + head * WIDTH, begin, length, lane, turns, positions);
    }
}

// A block computes one text, for one head or for as many heads as it has warps. Texts of more than MOST tokens are skipped,
// because they can only be padding.
KERNEL(attend_short, LIMITS)(
    const unsigned short* __restrict__ qkv, const int* __restrict__ boundaries, unsigned short* __restrict__ out,
    const unsigned short* __restrict__ turns, const int* __restrict__ positions, int are_together
) {
    const int block = blockIdx.x, place = are_together ? block / TOGETHER : block / HEADS;
    const int head = are_together ? block % TOGETHER * WARPS : block % HEADS;
    const int heads = are_together ? min(WARPS, HEADS - head) : 1;
    const int begin = boundaries[place], length = boundaries[place + 1] - begin;
    const unsigned short* text = qkv + (long long)begin * STRIDE + head * WIDTH;
    out += (long long)begin * HEADS * WIDTH + head * WIDTH;
    positions += begin;
    static_assert(MOST == 64, "a case for every 16 tokens");
    if (length <= MOST) switch ((length + 15) / 16) {
        case 1: attend_heads<1>(text, out, heads, length, turns, positions); break;
        case 2: attend_heads<2>(text, out, heads, length, turns, positions); break;
        case 3: attend_heads<3>(text, out, heads, length, turns, positions); break;
        case 4: attend_heads<4>(text, out, heads, length, turns, positions); break;
    }
}
"""


class Attend:
    """Attention within texts of at most :data:`MOST_TOKENS` tokens; the result for longer texts is undefined.

    Args:
        table: ``(positions, width)``: cosines, then sines, if the kernel also rotates query and key.

    Attributes:
        most: the longest text for which the kernel is used.
    """

    most = MOST_TOKENS

    def __init__(self, heads: Heads, launch: Launch, table: torch.Tensor | None = None) -> None:
        self._heads = heads
        self._launch = launch
        self._table = table

    def __call__(
        self, qkv: torch.Tensor, boundaries: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend within each text.

        Args:
            qkv: ``(tokens, 3, heads, width)``, contiguous.
            boundaries: ``(texts + 1,)`` int32: where each text begins, and the end of the last.
            positions: ``(tokens,)`` int32, rows of the table; needed only with a table.

        Returns:
            ``(tokens, heads * width)``.
        """
        number, texts = self._heads.number, len(boundaries) - 1
        out = qkv.new_empty(len(qkv), number * self._heads.width)
        # With several heads per block, even a text of 16 tokens has work for all warps of its block.
        are_together = texts * number > _FEW
        unused = qkv, boundaries  # instead of the table and the positions
        turns = unused if self._table is None or positions is None else (self._table, positions)
        blocks = texts * (-(-number // WARPS) if are_together else number)
        self._launch((blocks, 1, 1), [qkv, boundaries, out, *turns, int(are_together)])
        return out


def compile_attend(heads: Heads, device: torch.device, table: torch.Tensor | None = None) -> Attend:
    """Compile the kernel; :func:`compile_kernel` and :func:`attend_source` list the errors.

    Args:
        table: for a kernel that also rotates query and key; see :class:`Attend`.
    """
    source = attend_source(heads, rotates=table is not None)
    return Attend(heads, compile_kernel(source, NAME, THREADS, device), table)


def attend_source(heads: Heads, *, rotates: bool = False, blocks_per_processor: int | None = None) -> str:
    """Return the CUDA source of the kernel.

    Args:
        rotates: whether the kernel also rotates query and key.
        blocks_per_processor: number of blocks on a multiprocessor at the same time, which limits the registers of a thread.

    Raises:
        ValueError: the kernel does not support heads of this width.
    """
    if heads.width % WIDTH_STEP or not 0 < heads.width <= MOST_WIDTH:
        raise ValueError(
            f"heads of {heads.width} numbers; the kernel supports multiples of {WIDTH_STEP} up to {MOST_WIDTH}"
        )
    sizes = {
        "HEADS": heads.number,
        "WIDTH": heads.width,
        "PIECE": gcd(heads.width // 8, 8),
        "ROTATES": int(rotates),
        "SCALE": heads.scale * log2(e),
        "WARPS": WARPS,
        "THREADS": THREADS,
        "BLOCKS_PER_PROCESSOR": blocks_per_processor or (2 if heads.width > 64 else 3 if rotates else 4),
        "MOST": MOST_TOKENS,
    }
    return _source(_WARP + _ATTEND, heads.dtype, sizes)
