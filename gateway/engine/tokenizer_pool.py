"""The threads that tokenize for one model, and the fair queues in front of them.

Work is distributed as the scheduler distributes the device, but by characters instead of tokens: first between callers,
then between the requests of one caller. A text is read in steps (:mod:`gateway.engine.model.tokenizer`). After each step a
request waits for its turn again, and a low-priority request waits until nothing else waits. So a short text waits only
for the current step, no matter how many long texts others have sent. Steps of many characters have a separate thread,
because they cannot be interrupted. One or two sentences do not wait for a turn: they are read on the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.engine.model.tokenizer import SHORT_CHARS, Steps
from gateway.engine.scheduler import Lanes, RequestHandle

T = TypeVar("T")

# A step of more characters than this goes to the thread for long steps. A step of this size takes about 20 ms.
LONG_STEP_CHARS = 20_000


@dataclass(eq=False, slots=True)
class TokenizeTask:
    """One text, or a few short ones, to be tokenized.

    Attributes:
        done: receives the result of the steps, or their error.
        num_tokens: number of characters of the next step (the queue's name for an amount of work).
        spans: when the steps ran, as (start, end) on ``time.monotonic()``.
    """

    handle: RequestHandle
    steps: Steps[Any]
    done: asyncio.Future[Any]
    num_tokens: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)


class _TokenizerThread:
    """A thread with fair queues in front of it."""

    def __init__(self, name: str, read: Callable[[TokenizeTask], None]) -> None:
        self._read = read
        self._lanes: Lanes[TokenizeTask] = Lanes()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, task: TokenizeTask) -> None:
        with self._changed:
            self._lanes.add((task,))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_empty(self) -> bool:
        with self._changed:
            return not self._lanes

    def _run(self) -> None:
        while (task := self._next()) is not None:
            self._read(task)
            del task  # otherwise its texts would stay in memory until the next task

    def _next(self) -> TokenizeTask | None:
        with self._changed:
            while not self._is_closed:
                if (task := self._lanes.pop(time.monotonic())) is not None:
                    return task
                self._changed.wait()
        return None


class TokenizerPool:
    """Runs the steps of tokenizing in two threads, in fair order.

    Args:
        loop: the event loop that waits for the results.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._short = _TokenizerThread(f"{name}-tokenize", self._read)
        self._long = _TokenizerThread(f"{name}-tokenize-long", self._read)

    def start(self) -> None:
        for desk in (self._short, self._long):
            desk.start()

    def begin(self, handle: RequestHandle, steps: Steps[Any], *, may_be_now: bool = False) -> TokenizeTask:
        """Run steps when it is their turn. Call this on the event loop.

        A task that is still queued when its handle ends is dropped, and its ``done`` is never set.

        Args:
            may_be_now: run the steps before returning if they are short. Do not set it for every part of a long request,
                because the event loop waits.
        """
        task = TokenizeTask(handle, steps, self._loop.create_future())
        started = time.monotonic()
        num_chars, outcome = 0, self._step(task)
        while outcome is None and may_be_now and (num_chars := num_chars + task.num_tokens) <= SHORT_CHARS:
            outcome = self._step(task)
        if outcome is None:
            self._queue(task)
        else:
            task.spans.append((started, time.monotonic()))
            _finish(task.done, *outcome)
        return task

    def close(self) -> None:
        """End the threads after their current step; waiting tasks are dropped."""
        for desk in (self._short, self._long):
            desk.close()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end, and return whether they did."""
        have_ended = [desk.join(timeout_s) for desk in (self._short, self._long)]
        return all(have_ended)

    @property
    def is_empty(self) -> bool:
        """Whether no task waits for its turn, even one that is no longer needed."""
        return self._short.is_empty and self._long.is_empty

    def _queue(self, task: TokenizeTask) -> None:
        (self._long if task.num_tokens > LONG_STEP_CHARS else self._short).add(task)

    def _read(self, task: TokenizeTask) -> None:
        started = time.monotonic()
        outcome = self._step(task)
        task.spans.append((started, time.monotonic()))
        if outcome is None:
            self._queue(task)
            return
        with suppress(RuntimeError):  # when the process ends, the loop may close before a thread does
            self._loop.call_soon_threadsafe(_finish, task.done, *outcome)

    @staticmethod
    def _step(task: TokenizeTask) -> tuple[object, BaseException | None] | None:
        """Run the next step, up to the point where the size of the following step is known.

        Returns:
            The result of the steps and their error, once they have ended.
        """
        try:
            task.num_tokens = next(task.steps)
        except StopIteration as end:
            return end.value, None
        except BaseException as error:  # a tokenizer may raise any error, and its caller must get an answer
            return None, error
        return None


def _finish(done: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if done.done():  # its caller has gone
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
