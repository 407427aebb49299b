"""Matrix products accumulate in float16 only in forward passes that allow it, next to any other work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.accumulation import ACCUMULATION, Accumulation


def is_on() -> bool:
    return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    assert not is_on()


def test_the_switch_is_on_only_during_a_forward_that_may_have_it() -> None:
    assert not is_on()
    with ACCUMULATION.forward(in_float16=True):
        assert is_on()
        with ACCUMULATION.forward(in_float16=False):  # of another model, or the same text again
            assert not is_on()
            with ACCUMULATION.forward(in_float16=True):
                assert not is_on()
        assert is_on()
    assert not is_on()


def test_a_forward_that_raises_leaves_nothing_on() -> None:
    with pytest.raises(KeyError), ACCUMULATION.forward(in_float16=True):
        raise KeyError

    assert not is_on()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=12))
def test_no_forward_has_it_that_must_not(steps: list[tuple[bool, int]]) -> None:
    """Forwards begin, and end in any order."""
    accumulation, running = Accumulation(), list[tuple[bool, ExitStack]]()
    for in_float16, ending in steps:
        stack = ExitStack()
        stack.enter_context(accumulation.forward(in_float16=in_float16))
        running.append((in_float16, stack))
        if ending < len(running):
            running.pop(ending)[1].close()
        kinds = {kind for kind, _stack in running}
        assert is_on() == (kinds == {True})
    for _kind, stack in running:
        stack.close()
    assert not is_on()


def test_threads_do_not_lose_count() -> None:
    gate = threading.Barrier(4)

    def run(in_float16: bool) -> bool:
        gate.wait()
        seen = []
        for _ in range(500):
            with ACCUMULATION.forward(in_float16=in_float16):
                seen.append(is_on())
        return not in_float16 and any(seen)

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(run, [True, True, False, False]))
