"""Page-locked memory for copies: it is used again only when nothing reads it any more, and never freed."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch

from gateway.engine.model import host_memory
from gateway.engine.model.host_memory import HostMemory

CPU = torch.device("cpu")


class Event:
    """A card's event: it has happened once the card has reached it."""

    card_is_at = 0

    def __init__(self) -> None:
        self.at = 0

    def record(self, _stream: object) -> None:
        self.at = Event.card_is_at + 1

    def query(self) -> bool:
        if Event.card_is_at < 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Event.card_is_at >= self.at


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    def make(size: int) -> object:
        return host_memory._Buffer(torch.zeros(size, dtype=torch.uint8), Event())

    monkeypatch.setattr(host_memory, "_make_buffer", make)
    monkeypatch.setattr(Event, "card_is_at", 0)
    return HostMemory()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_what_is_sent_arrives(memory: HostMemory, dtype: type) -> None:
    for numbers in (np.arange(6, dtype=dtype).reshape(2, 3), np.arange(5000, dtype=dtype), np.empty(0, dtype)):
        sent = memory.send(numbers, CPU)
        np.testing.assert_array_equal(sent.numpy(), numbers)


def test_a_buffer_is_used_again_when_its_copy_has_ended(memory: HostMemory) -> None:
    for _ in range(3):
        memory.send(np.arange(4), CPU)
        Event.card_is_at += 1
    assert len(memory._all) == 1

    memory.send(np.arange(4), CPU)
    memory.send(np.arange(4), CPU)  # the card has not got the one before

    assert len(memory._all) == 2


def test_a_buffer_is_not_used_again_while_a_view_of_it_is_read(memory: HostMemory) -> None:
    received = memory.start_receiving(torch.arange(8.0).view(2, 4))
    view = received[1, 1:3]
    Event.card_is_at += 1
    del received
    gc.collect()

    memory.start_receiving(torch.full((2, 4), 9.0))
    assert view.tolist() == [5, 6]
    assert len(memory._all) == 2

    del view
    Event.card_is_at += 1
    memory.start_receiving(torch.full((2, 4), 9.0))
    assert len(memory._all) == 2


def test_a_buffer_whose_copy_could_not_be_made_is_used_again(
    memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (scripted)")

    with monkeypatch.context() as full:
        full.setattr(torch.Tensor, "to", fail)
        full.setattr(torch.Tensor, "copy_", fail)
        for _ in range(3):
            with pytest.raises(torch.OutOfMemoryError):
                memory.send(np.arange(4), CPU)
            Event.card_is_at += 1
            with pytest.raises(torch.OutOfMemoryError):
                memory.start_receiving(torch.arange(4.0))
            gc.collect()
    memory.send(np.arange(4), CPU)

    assert len(memory._all) == 1


def test_the_collector_may_give_a_buffer_back_while_another_one_is_taken(memory: HostMemory) -> None:
    """It runs in any thread, between any two steps."""

    class Device:
        def __hash__(self) -> int:
            gc.collect()
            return 0

    cycle: list[object] = [memory.start_receiving(torch.arange(4.0))]
    cycle.append(cycle)
    del cycle
    Event.card_is_at += 1

    thread = threading.Thread(target=memory._take, args=(4, Device()), daemon=True)
    thread.start()
    thread.join(10)

    assert not thread.is_alive()
    memory.send(np.arange(4), CPU)
    assert len(memory._all) == 2


def test_no_buffer_is_freed_after_a_failure(memory: HostMemory) -> None:
    memory.send(np.arange(4), CPU)
    buffers = [weakref.ref(one.memory) for one in memory._all]
    Event.card_is_at = -1

    with pytest.raises(RuntimeError, match="illegal memory access"):
        memory.send(np.arange(4), CPU)
    del memory
    gc.collect()

    assert all(one() is not None for one in buffers)
