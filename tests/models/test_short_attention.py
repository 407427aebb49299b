"""The kernel that attends within short texts: its numbers on a CPU, and what it reads and writes."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
from collections.abc import Sequence

import pytest
import torch

from gateway.engine.model.runtimes import graphs, own_kernels, short_attention
from gateway.engine.model.runtimes.nvrtc import compile_source, open_compiler
from gateway.engine.model.runtimes.own_kernels import Heads, compile_rotate
from gateway.engine.model.runtimes.short_attention import MOST_TOKENS, NAME, THREADS, Attend, attend_source
from tests.models.host_kernels import compile_on_host
from tests.models.test_tuning import CPU, DTYPES, TOLERANCE, compilers, guarded, needs_compiler

LENGTHS = [1, 64, 7, 0, 5, 80, 16, 17, 33, 48]
HEADS = [
    Heads(number, width, dtype)
    for dtype, shapes in (
        (torch.float16, [(4, 16), (3, 32), (1, 48), (5, 64), (2, 96), (1, 128)]),
        (torch.bfloat16, [(1, 32), (5, 64)]),
    )
    for number, width in shapes
]


@pytest.fixture(params=[True, False], ids=["together", "alone"])
def heads_in_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put several heads into a block, as for many texts, or one."""
    monkeypatch.setattr(short_attention, "_FEW", 0 if request.param else 10**9)


def random_qkv(heads: Heads, lengths: Sequence[int]) -> torch.Tensor:
    """Return random numbers, and NaN for the texts that are too long, which no other text may read."""
    qkv = torch.randn(sum(lengths), 3, heads.number, heads.width).to(heads.dtype)
    for text, length in zip(qkv.split(list(lengths)), lengths, strict=True):
        if length > MOST_TOKENS:
            text.fill_(float("nan"))
    return qkv


def attend(
    heads: Heads,
    qkv: torch.Tensor,
    lengths: Sequence[int],
    table: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the kernel's result; what it has not written is NaN."""
    launch = compile_on_host(attend_source(heads, rotates=table is not None), NAME, THREADS, CPU)

    def launch_on_nan(grid: tuple[int, int, int], args: Sequence[torch.Tensor | int | float]) -> None:
        args[2].fill_(float("nan"))  # type: ignore[union-attr]
        launch(grid, args)

    return Attend(heads, launch_on_nan, table)(qkv, torch.tensor(graphs.boundaries_of(lengths)), positions)


def assert_attends(heads: Heads, qkv: torch.Tensor, lengths: Sequence[int], out: torch.Tensor) -> None:
    """Compare with float32, text by text."""
    for text, found in zip(qkv.split(list(lengths)), out.split(list(lengths)), strict=True):
        if len(text) > MOST_TOKENS:  # what only fills a row up may be longer
            assert found.isnan().all()
        elif len(text) > 0:
            query, key, value = text.float().permute(1, 2, 0, 3)
            expected = ((query @ key.mT * heads.scale).softmax(-1) @ value).transpose(0, 1).flatten(1)
            torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[heads.dtype], rtol=0.01)


@needs_compiler
@pytest.mark.usefixtures("heads_in_blocks")
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_attends_within_each_text_and_reads_nothing_else(heads: Heads) -> None:
    for lengths in (LENGTHS, [*range(1, 65), 65]):
        qkv, is_untouched = guarded(random_qkv(heads, lengths))

        assert_attends(heads, qkv, lengths, attend(heads, qkv, lengths))

        assert is_untouched()


@needs_compiler
@pytest.mark.parametrize("heads", [HEADS[0], HEADS[4], HEADS[5], HEADS[-1]], ids=str)
def test_it_rotates_as_the_kernel_for_rotary_positions_does(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_kernels, "compile_kernel", compile_on_host)
    angles = torch.rand(50, heads.width // 2) * 6
    table, is_table_untouched = guarded(torch.cat((angles.cos(), angles.sin()), dim=-1).to(heads.dtype))
    qkv = random_qkv(heads, LENGTHS)
    positions = torch.randint(0, 50, (len(qkv),), dtype=torch.int32)
    turned = qkv.clone()
    compile_rotate(heads, table, CPU)(turned, positions)

    out = attend(heads, qkv, LENGTHS, table, positions)

    assert torch.equal(out.nan_to_num(9), attend(heads, turned, LENGTHS).nan_to_num(9))
    assert_attends(heads, turned, LENGTHS, out)
    assert is_table_untouched()


def before_forbidden_memory(values: torch.Tensor) -> torch.Tensor:
    """Return a copy behind whose end a process that reads is ended."""
    room, forbidden = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, 2**20
    memory = mmap.mmap(-1, room + forbidden)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(forbidden), no_access) == 0
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=room - values.nbytes)
    return flat.view(values.shape).copy_(values)


@needs_compiler
@pytest.mark.parametrize("rotates", [False, True])
def test_it_reads_nothing_behind_the_last_text(rotates: bool) -> None:
    """Not even numbers that it would not use."""
    heads, lengths = HEADS[3], [16, 1]
    qkv = before_forbidden_memory(random_qkv(heads, lengths))
    table = before_forbidden_memory(torch.ones(1, heads.width, dtype=heads.dtype)) if rotates else None
    positions = before_forbidden_memory(torch.zeros(len(qkv), dtype=torch.int32))

    worker = multiprocessing.get_context("fork").Process(target=attend, args=(heads, qkv, lengths, table, positions))
    worker.start()
    worker.join()

    assert worker.exitcode == 0


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_give_numbers(dtype: torch.dtype) -> None:
    """Sums of 64 products of powers of two, which are exact; a query then sees one key, or those of the same score."""
    heads, lengths = Heads(5, 64, dtype), [3, 40]
    qkv = random_qkv(heads, lengths)
    qkv[:, :2] = qkv[:, :2].sign() * 2**15
    qkv[-1, 1] = qkv[-2, 1]

    out = attend(heads, qkv, lengths)

    assert out.isfinite().all()
    assert_attends(heads, qkv, lengths, out)


@needs_compiler
@pytest.mark.parametrize("tokens", [16, 96, 512])
def test_a_row_may_be_padded_with_a_text_of_any_length_and_empty_ones(tokens: int) -> None:
    """As :class:`graphs.Shape` pads it."""
    heads, lengths = Heads(5, 64, torch.float16), [9, 0, 3]
    lengths = [*lengths, tokens - sum(lengths), 0, 0, 0]
    qkv, is_untouched = guarded(random_qkv(heads, lengths))

    assert_attends(heads, qkv, lengths, attend(heads, qkv, lengths))

    assert is_untouched()


@pytest.mark.parametrize("width", [0, 24, 144])
def test_heads_of_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"heads of {width} numbers; the kernel supports multiples of 16 up to 128"):
        attend_source(Heads(8, width, torch.float16))


@pytest.mark.skipif(not compilers(), reason="NVIDIA's compiler (NVRTC) is not here")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("heads", [Heads(16, 64, torch.float16), Heads(12, 32, torch.bfloat16)], ids=str)
def test_nvidia_s_compiler_takes_it(heads: Heads, capability: tuple[int, int]) -> None:
    for path in compilers():
        if capability[0] > 9 and path.suffix == ".12":
            continue  # CUDA 12.6 does not know them
        for rotates in (False, True):
            source = attend_source(heads, rotates=rotates)
            assert compile_source(open_compiler(path), source, capability).startswith(b"\x7fELF")
