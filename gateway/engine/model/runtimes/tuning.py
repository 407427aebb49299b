"""Find out which of our kernels and graphs pay off on this card when a model is loaded, and use those.

Cards differ, so each kernel is compiled, compared with torch's own functions on random numbers, and timed against them. A
kernel that is slower, wrong or unavailable is left out, and the model is then as fast as torch's functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import structlog
import torch

from gateway.engine.faults import is_card_lost
from gateway.engine.model.runtimes.flash import Texts, attend
from gateway.engine.model.runtimes.network import Network, rotate
from gateway.engine.model.runtimes.own_kernels import (
    Attend,
    Rotate,
    attend_source,
    compile_kernel,
    rotate_source,
)

if TYPE_CHECKING:
    from gateway.engine.model.runtimes.packed import PackedRuntime

log = structlog.get_logger(__name__)

# Texts and their tokens in the comparison.
_NUM_TEXTS, _LENGTH = 256, 16
_ROUNDS = 7
# The tolerance for numbers up to about 3, after one 16-bit rounding more or less.
_TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.06}


@torch.inference_mode()
def tune(packed: PackedRuntime, *, captures: bool) -> None:
    """Enable the kernels and graphs that are faster on a model's card.

    Args:
        captures: small rows may be computed as graphs.

    Raises:
        Exception: the card was lost in the meantime.
    """
    network = packed.network
    device = packed.device
    for name, try_it in (("rotate", _try_rotate), ("attend_short", _try_attend)):
        try:
            ours, theirs = try_it(network, device)
        except Exception as error:  # neither kernel is required, and compiling may raise any error
            if is_card_lost(error, str(device)):
                raise
            log.info("kernel_not_used", kernel=name, reason=f"{type(error).__name__}: {error}")
        else:
            log.info("kernel_timed", kernel=name, ours_us=round(ours * 1e6), torch_us=round(theirs * 1e6))
            if ours >= theirs:
                setattr(network, name, None)
    if captures:
        packed.make_graphs()


def untune(packed: PackedRuntime) -> None:
    """Use only torch's functions."""
    packed.network.rotate = packed.network.attend_short = packed.graphs = None


def _try_rotate(network: Network, device: torch.device) -> tuple[float, float]:
    """Install the kernel for rotary positions; return its time and that of torch's functions, in seconds.

    Raises:
        Exception: the kernel cannot be compiled, or computes something else; it is then not installed.
    """
    table, heads = network.rotary_table, network.heads
    if table is None:
        raise ValueError("the model has no rotary positions")
    ours = Rotate(heads, table, compile_kernel(rotate_source(heads), "rotate", device))
    qkv = _random_qkv(network, device)
    places = torch.arange(len(qkv), dtype=torch.int32, device=device) % len(table)

    def turn() -> torch.Tensor:
        return rotate(qkv[:, :2], *torch.nn.functional.embedding(places, table)[:, None, None].chunk(2, dim=-1))

    expected, turned = turn(), qkv.clone()
    ours(turned, places)
    _require_close(turned[:, :2], expected)
    _require_close(turned[:, 2], qkv[:, 2])
    network.rotate = ours
    return _seconds(lambda: ours(turned, places), device), _seconds(turn, device)


def _try_attend(network: Network, device: torch.device) -> tuple[float, float]:
    """Install the kernel for short texts; see :func:`_try_rotate` for the result and the errors."""
    heads = network.heads
    ours = Attend(heads, compile_kernel(attend_source(heads), "attend", device))
    qkv = _random_qkv(network, device)
    lengths = [_LENGTH] * _NUM_TEXTS
    boundaries = torch.arange(0, len(qkv) + 1, _LENGTH, dtype=torch.int32, device=device)
    texts = Texts(boundaries, lengths)

    def theirs() -> torch.Tensor:
        query, key, value = qkv.unbind(1)
        return attend(query, key, value, texts, texts, heads.scale).flatten(1)

    _require_close(ours(qkv, boundaries), theirs())
    network.attend_short = ours
    return _seconds(lambda: ours(qkv, boundaries), device), _seconds(theirs, device)


def _random_qkv(network: Network, device: torch.device) -> torch.Tensor:
    heads = network.heads
    shape = _NUM_TEXTS * _LENGTH, 3, heads.number, heads.width
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(heads.dtype)


def _require_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    worst = float((found.float() - expected.float()).abs().max())
    if not worst <= _TOLERANCE[expected.dtype]:  # it may be NaN
        raise ValueError(f"it differs from torch by {worst:.4f}")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of some work on the card."""

    def once() -> float:
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        return time.perf_counter() - began

    once()
    return median(once() for _ in range(_ROUNDS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":  # not the whole card, which is an error while another model's thread captures a graph
        torch.cuda.current_stream(device).synchronize()
