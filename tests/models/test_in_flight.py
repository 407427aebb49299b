"""An encoder launches a batch, and reads it later: with the same results, and nothing is read before it is done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gateway.config.registry import ModelEntry
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model import encoder as encoder_module
from gateway.engine.model import heads
from gateway.engine.model.build import build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item
from gateway.types import Output, Truncate
from tests.models.checkpoints import TEXTS
from tests.models.conftest import Load

ALL = frozenset({Output.DENSE, Output.SPARSE, Output.MULTIVECTOR, Output.STATES})


class Copies:
    """Emulates copies from a card: the host has their numbers only when the card is done."""

    def __init__(self) -> None:
        self.hosts: list[np.ndarray] = []
        self._tensors: list[torch.Tensor] = []

    def start(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        host = np.full(tensor.shape, np.nan, np.float32)
        self.hosts.append(host)
        self._tensors.append(tensor)
        return lambda: host

    def end(self) -> None:
        for host, tensor in zip(self.hosts, self._tensors, strict=True):
            host[...] = tensor.numpy()


def items_of(encoder: Encoder) -> list[Item]:
    """Return texts, a third of which want each output in addition."""
    rows = encoder.tokenize(TEXTS, None, Truncate.END)
    wanted = [ALL, frozenset({Output.DENSE}), frozenset({Output.DENSE, Output.SPARSE})]
    return [Item(row, None, wanted[i % 3]) for i, row in enumerate(rows)]


def require_equal(ones: Sequence[Encoded], others: Sequence[Encoded]) -> None:
    for one, other in zip(ones, others, strict=True):
        np.testing.assert_array_equal(one.dense, other.dense)
        for name in ("multivector", "states"):
            assert (getattr(one, name) is None) == (getattr(other, name) is None)
            if getattr(one, name) is not None:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.sparse is None) == (other.sparse is None)
        if one.sparse is not None and other.sparse is not None:
            np.testing.assert_array_equal(one.sparse.indices, other.sparse.indices)
            np.testing.assert_array_equal(one.sparse.values, other.sparse.values)


@pytest.mark.parametrize("runtime", ["reference", "packed"])
def test_what_is_read_later_is_what_would_be_read_at_once(
    m3: Path, load: Load, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, copies = load(m3, runtime).encoder, Copies()
    items = items_of(encoder)
    expected, expected_of_two = encoder.encode(items), encoder.encode(items[:2])
    require_equal(encoder.begin(items).finish(), expected)

    for module in (encoder_module, heads):
        monkeypatch.setattr(module, "start_copy", copies.start)
    first = encoder.begin(items)
    second = encoder.begin(items[:2])
    copies.end()

    require_equal(first.read(), expected)
    require_equal(second.read(), expected_of_two)
    kept = [one.sparse.values for one in first.read() if one.sparse] + [
        array for one in first.read() for array in (one.multivector, one.states) if array is not None
    ]
    assert not any(np.shares_memory(array, host) for array in kept for host in copies.hosts)


def test_products_accumulate_in_float16_only_while_a_batch_is_launched(
    m3: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = copy.copy(load(m3, "packed").encoder)
    encoder.device, encoder.accumulates_in_float16 = "cuda:0", True
    seen: list[bool] = []

    def forward(groups: object) -> object:
        seen.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
        return Encoder.forward(encoder, groups)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "forward", forward)
    items = items_of(encoder)[:2]

    flight = encoder.begin(items)
    assert (seen, torch.backends.cuda.matmul.allow_fp16_accumulation) == ([True], False)
    assert len(flight.finish()) == 2
    encoder.encode_exactly(items)
    encoder.encode(items)
    assert seen == [True, False, True]


def test_only_a_card_that_need_not_wait_works_ahead(m3: Path, load: Load) -> None:
    assert not load(m3, "packed").encoder.works_ahead


class Products(TorchDispatchMode):
    """Notes for each product how many numbers its sums have, and whether they may accumulate in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, bool]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("linear", "mm", "addmm", "addmm_"):
            rows = args[name.startswith("addmm")]
            self.seen.add((rows.shape[-1], torch.backends.cuda.matmul.allow_fp16_accumulation))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("runtime", ["packed", "torch"])
@pytest.mark.parametrize("model", ["m3", "jina"])
def test_the_longest_sums_never_accumulate_in_float16(request: pytest.FixtureRequest, model: str, runtime: str) -> None:
    """Those of the feed-forward's second products: of 96 numbers in these models, whose states have 64."""
    plan = plan_load(ModelEntry(id="tiny", source=str(request.getfixturevalue(model)), device="cpu", enabled=True))
    options = plan.build_options("cpu", CpuThreads(1, 1))
    options = replace(options, dtype="float32", runtime=runtime, accumulates_in_float16=True)
    [encoder] = build_encoders(plan.checkpoint, options)
    encoder.device = "cuda:0"
    items = [Item(row) for row in encoder.tokenize(TEXTS, None, Truncate.END)]

    with Products() as products:
        encoder.encode(items)
    found, products.seen = products.seen, set()
    with products:
        encoder.encode_exactly(items)

    assert {(64, True), (96, False)} <= found
    assert (96, True) not in found
    assert not any(is_in_float16 for _length, is_in_float16 in products.seen)
