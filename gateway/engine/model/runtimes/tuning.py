"""When a model is loaded, find out which of our kernels and graphs are faster on its card, and use those.

Cards differ, so each kernel is compiled, compared with torch's own functions on random numbers, and timed against them. If a
kernel is slower, wrong or unavailable, the model uses torch's functions instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import structlog
import torch
from torch.nn import functional

from gateway.engine.faults import is_card_lost, is_out_of_memory
from gateway.engine.model.runtimes.flash import Texts
from gateway.engine.model.runtimes.network import Network, Row, activated_product, rotate
from gateway.engine.model.runtimes.own_kernels import compile_normalize, compile_rotate
from gateway.engine.model.runtimes.short_attention import compile_attend

if TYPE_CHECKING:
    from gateway.engine.model.runtimes.packed import PackedRuntime

log = structlog.get_logger(__name__)

# Number of tokens in the comparison: enough that the card takes longer than a launch.
_TOKENS = 16_384
# Lengths of texts, in tokens, with which the kernel for short texts is tried.
_SHORT = (16, 32, 64)
# The number of repetitions per measurement, and the number of measurements.
_REPEATS, _ROUNDS = 10, 5
# The absolute tolerance for numbers up to 1, and the relative tolerance for larger ones: about one 16-bit rounding.
_TOLERANCE = {torch.float16: 0.004, torch.bfloat16: 0.03}
# The size of the batch whose tasks are computed together or separately, in texts of 64 tokens, and the tried sizes of parts.
_MIXED_TEXTS, _PART_TEXTS = 256, (16, 32, 64, 128)
_NEVER = 2**62


@torch.inference_mode()
def tune(packed: PackedRuntime, *, captures: bool) -> None:
    """Enable the kernels and graphs that are faster on a model's card.

    Args:
        captures: whether small rows may be computed as graphs.

    Raises:
        Exception: the card has failed permanently.
    """
    network = packed.network
    device = packed.device
    for name, measure in _TRIALS.items():
        try:
            ours, theirs = measure(network, device)
        except Exception as error:  # kernels are optional, and compiling may raise any error
            if is_card_lost(error, str(device)):
                raise
            setattr(network, name, None)
            log.info("kernel_not_used", kernel=name, reason=f"{type(error).__name__}: {error}")
        else:
            log.info("kernel_timed", kernel=name, ours_us=round(ours * 1e6), torch_us=round(theirs * 1e6))
            if ours >= theirs:
                setattr(network, name, None)
    if packed.extra_bytes:
        packed.least_part_tokens = _least_part_tokens(packed)
        log.info("tasks_timed", least_part_tokens=packed.least_part_tokens)
    if captures:
        packed.make_graphs()


def untune(packed: PackedRuntime) -> None:
    """Use only torch's functions, and split mixed batches as on a card that was not timed."""
    for name in _TRIALS:
        setattr(packed.network, name, None)
    packed.graphs = None
    packed.least_part_tokens = type(packed).least_part_tokens


def _try_rotate(network: Network, device: torch.device) -> tuple[float, float]:
    """Install the kernel for rotary positions; return its time and that of torch's functions, in seconds.

    Raises:
        Exception: the kernel cannot be compiled, or computes something else; then it is not installed.
    """
    table, heads = network.rotary_table, network.heads
    if table is None:
        raise ValueError("the model has no rotary positions")
    ours = compile_rotate(heads, table, device)
    qkv = _random_qkv(network, device)
    places = torch.arange(len(qkv), dtype=torch.int32, device=device) % len(table)

    def turn() -> torch.Tensor:
        return rotate(qkv[:, :2], *functional.embedding(places, table)[:, None, None].chunk(2, dim=-1))

    expected, turned = turn(), qkv.clone()
    ours(turned, places)
    _require_close(turned[:, :2], expected)
    _require_close(turned[:, 2], qkv[:, 2])
    network.rotate = ours
    return _seconds(lambda: ours(turned, places), device), _seconds(turn, device)


def _try_normalize(network: Network, device: torch.device) -> tuple[float, float]:
    """Install the kernel for layer norms; see :func:`_try_rotate` for the result and the errors."""
    norm = network.norm
    ours = compile_normalize(len(norm.weight), norm.weight.dtype, device)
    x = _random_rows(network, device)
    expected, actual = norm(x), x.clone()
    norm(actual, ours)
    _require_close(actual, expected)
    network.normalize = ours
    return _seconds(lambda: norm(actual, ours), device), _seconds(lambda: norm(x), device)


def _try_attend(network: Network, device: torch.device) -> tuple[float, float]:
    """Install the kernel for short texts, up to the longest for which it is faster; see :func:`_try_rotate`.

    It is compared with FlashAttention after the rotary positions, computed by the installed kernel or by torch.
    """
    ours = compile_attend(network.heads, device, network.rotary_table)
    qkv = _random_qkv(network, device)
    positions = torch.arange(len(qkv), dtype=torch.int32, device=device) % _SHORT[0]
    times: list[tuple[float, float]] = []
    for length in _SHORT:
        boundaries = torch.arange(0, len(qkv) + 1, length, dtype=torch.int32, device=device)
        texts = Texts(boundaries, [length] * (len(qkv) // length))
        row = Row(ids=positions, kinds=None, positions=positions, places=None, choice=None, texts=texts)
        short, flash = partial(ours, qkv, boundaries, positions), partial(network.attend, row=row)
        turns = network.turns(positions)
        _require_close(short(), flash(qkv.clone(), turns=turns))
        times.append((_seconds(short, device), _seconds(partial(flash, qkv, turns=turns), device)))
        if times[-1][0] >= times[-1][1]:
            break
        ours.most = length
    network.attend_short = ours
    return times[0]


def _try_activate(network: Network, device: torch.device) -> tuple[float, float]:
    """Let cuBLASLt compute GELU together with the product before it; see :func:`_try_rotate` for result and errors."""
    up = network.first_up
    if up.bias is None or not network.has_gelu:
        raise ValueError("the model's activation is not GELU after a product with a bias")
    weight, bias = up.weight, up.bias
    x = _random_rows(network, device)

    def ours() -> torch.Tensor:
        return activated_product(x, weight, bias)

    def theirs() -> torch.Tensor:
        return functional.gelu(functional.linear(x, weight, bias))

    _require_close(ours(), theirs())
    network.activate = activated_product
    return _seconds(ours, device), _seconds(theirs, device)


# By the names of the network's attributes.
_TRIALS = {
    "rotate": _try_rotate,
    "normalize": _try_normalize,
    "attend_short": _try_attend,
    "activate": _try_activate,
}


def _least_part_tokens(packed: PackedRuntime) -> int:
    """Return how many tokens a task must have in a mixed batch to get a separate forward with its merged weights.

    Adapters cost arithmetic. A separate forward costs launches, which on a slow host take longer than the computation.
    """
    try:
        tasks = [i % (packed.num_adapters + 1) - 1 for i in range(_MIXED_TEXTS)]  # -1 is no adapter
        budget = _forward_seconds(packed, tasks) / _MIXED_TEXTS  # of a text in a mixed batch
        sizes = (size for size in _PART_TEXTS if _forward_seconds(packed, [0] * size) <= size * budget)
        return 64 * next(sizes, _NEVER // 64)
    except Exception as error:
        if not is_out_of_memory(error):  # this batch may be too large for a card that other programs use too
            raise
        return packed.least_part_tokens


def _forward_seconds(packed: PackedRuntime, adapters: Sequence[int]) -> float:
    features = packed.prepare([[5] * 64] * len(adapters), adapters)
    return _seconds(lambda: packed.forward(features), packed.device, repeats=1)


def _random_qkv(network: Network, device: torch.device) -> torch.Tensor:
    heads = network.heads
    return _random((_TOKENS, 3, heads.number, heads.width), heads.dtype, device)


def _random_rows(network: Network, device: torch.device) -> torch.Tensor:
    return _random((_TOKENS, len(network.norm.weight)), network.norm.weight.dtype, device)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)


def _require_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    worst = float(((actual.float() - expected.float()).abs() / expected.float().abs().clamp(min=1)).max())
    if not worst <= _TOLERANCE[expected.dtype]:  # it may be NaN
        raise ValueError(f"it differs from torch by {worst:.4f}")


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Return the median time of some work on the card."""

    def once() -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        _synchronize(device)
        return (time.perf_counter() - began) / repeats

    once()
    return median(once() for _ in range(_ROUNDS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # only this stream: waiting for the card fails while another thread captures a graph
        torch.cuda.current_stream(device).synchronize()
