"""Launch a batch while a card still computes the previous one: the launched batches, and the time to launch the next.

If a thread launched each batch after the previous one, its card would be idle from the end of a batch until the thread has
read and delivered the results, and has prepared and launched the next batch. So the thread launches the next batch ahead of
time, but as late as possible, because texts that arrive after the launch must wait for that batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.engine.model.in_flight import InFlight
from gateway.engine.model.items import Encoded, Item
from gateway.engine.scheduler import TokenSequence

# A batch may end earlier than expected: by a constant time, and by a fraction of its duration.
_SLACK_S = 0.003
_SLACK_PART = 0.05
# The weight of the newest batch in the moving averages.
_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt at a batch, without the error, whose traceback would hold the memory of the forward.

    Attributes:
        is_lost: whether the card can no longer compute.
        is_memory: whether the device had too little memory.
        reason: the first line of the error's message.
    """

    is_lost: bool
    is_memory: bool
    reason: str


@dataclass(slots=True)
class Launched:
    """A batch that was launched on a card, or whose launch failed.

    Attributes:
        started: when its thread began to prepare it (``time.monotonic()``, like all times here).
        begun: when the card could begin it: at the launch, or when the card finished the previous batch.
        launch_s: how long preparing and launching took.
        num_padding: number of padding tokens computed so far.
        in_flight: the texts that the card computes; ``None`` if the launch failed.
        failure: the failed attempt; ``None`` if none has failed.
        was_crowded: whether another batch was on the card when this one failed.
        done: when the card finished.
        encoded: the results, once they have been read.
    """

    sequences: Sequence[TokenSequence]
    started: float
    begun: float = 0.0
    launch_s: float = 0.0
    num_padding: int = 0
    in_flight: InFlight | None = None
    failure: Failure | None = None
    was_crowded: bool = False
    done: float = 0.0
    encoded: Sequence[Encoded] = ()

    @property
    def items(self) -> list[Item]:
        return [sequence.item for sequence in self.sequences]

    @property
    def num_tokens(self) -> int:
        return sum(sequence.item.num_tokens for sequence in self.sequences)

    @property
    def is_done(self) -> bool:
        """Whether waiting for the card would return immediately, with or without an error."""
        try:
            return self.in_flight is None or self.in_flight.is_done
        except RuntimeError:  # the wait raises it again, and its caller handles it
            return True


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a batch is launched while another one runs.

    Attributes:
        first: the earliest time. If the batch were launched earlier, texts that arrive later would wait for no reason.
        last: the latest time. After that, the launch would delay the results of the running batch by more than it saves.
        end: when the running batch is expected to end.
    """

    first: float
    last: float
    end: float


class Pace:
    """Learns how long a card computes, and how long its thread takes to launch a batch and to read one."""

    def __init__(self) -> None:
        self._tokens_per_s: float | None = None
        self._launch_s = 0.0
        self._read_s = 0.0

    def note(self, num_tokens: int, *, launch_s: float, device_s: float, read_s: float) -> None:
        """Learn from a batch. Pass only large ones, because a forward has a fixed cost."""
        rate = num_tokens / max(device_s, 1e-6)
        if self._tokens_per_s is None:
            self._tokens_per_s, self._launch_s, self._read_s = rate, launch_s, read_s
            return
        self._tokens_per_s += _WEIGHT * (rate - self._tokens_per_s)
        self._launch_s += _WEIGHT * (launch_s - self._launch_s)
        self._read_s += _WEIGHT * (read_s - self._read_s)

    def window(self, num_tokens: int, begun: float) -> Window | None:
        """Return when to launch a batch while another one runs; ``None`` before the first batch was measured.

        Args:
            num_tokens: number of tokens of the running batch.
            begun: when the card began it.
        """
        if self._tokens_per_s is None:
            return None
        device_s = num_tokens / self._tokens_per_s
        margin = self._launch_s + max(_SLACK_S, _SLACK_PART * device_s)
        # A launch ahead saves the time in which the running batch is read, but at most as much as the card's time exceeds
        # a launch. Even if it saves nothing, the thread may launch a little later than planned.
        saved = max(margin / 2, min(self._read_s, device_s - self._launch_s))
        end = begun + device_s
        return Window(end - margin, end - margin + saved, end)
