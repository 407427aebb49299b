"""Launch a batch while a card still computes the one before it: what is on its way, and when the next one is launched.

A card that is launched batch after batch would be idle from the end of one batch until its thread has read it, delivered
it, and prepared and launched the next. So the thread launches the next batch ahead, but late: texts that arrive after that
must wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.engine.model.in_flight import InFlight
from gateway.engine.model.items import Encoded, Item
from gateway.engine.scheduler import TokenSequence

# A batch may end sooner than expected, by a time that does not depend on it, and by a part of the time that it takes.
_SLACK_S = 0.003
_SLACK_PART = 0.05
# How much the newest batch counts.
_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt at a batch, without the error, whose traceback holds the memory of the forward.

    Attributes:
        is_lost: the card can no longer compute.
        is_memory: the device had too little memory.
        reason: the first line of the error's message.
    """

    is_lost: bool
    is_memory: bool
    reason: str


@dataclass(slots=True)
class Launched:
    """A batch that was launched on a card, unless that failed.

    Attributes:
        started: when its thread began to prepare it (``time.monotonic()``, as all times here).
        begun: when the card could begin it: at the launch, or when it was done with the batch before.
        launch_s: how long preparing and launching took.
        num_padding: number of padding tokens computed so far.
        in_flight: what the card computes; ``None`` if the launch failed.
        failure: the failed attempt, if it has failed.
        was_crowded: another batch was on the card when it failed.
        done: when the card was done.
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
        """Whether waiting for the card would end at once, with or without an error."""
        try:
            return self.in_flight is None or self.in_flight.is_done
        except RuntimeError:  # the wait raises it again, where it is handled
            return True


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a batch is launched behind another one.

    Attributes:
        first: before this, texts that arrive later would wait for no reason.
        last: after this, the launch would delay the results of the running batch by more than it saves.
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
        """Learn from a batch; a small batch says little."""
        rate = num_tokens / max(device_s, 1e-6)
        if self._tokens_per_s is None:
            self._tokens_per_s, self._launch_s, self._read_s = rate, launch_s, read_s
            return
        self._tokens_per_s += _WEIGHT * (rate - self._tokens_per_s)
        self._launch_s += _WEIGHT * (launch_s - self._launch_s)
        self._read_s += _WEIGHT * (read_s - self._read_s)

    def window(self, num_tokens: int, begun: float) -> Window | None:
        """Return when to launch a batch behind one that is running; ``None`` while nothing is known.

        Args:
            num_tokens: the tokens of the running batch.
            begun: when the card began it.
        """
        if self._tokens_per_s is None:
            return None
        device_s = num_tokens / self._tokens_per_s
        margin = self._launch_s + max(_SLACK_S, _SLACK_PART * device_s)
        # The card reaches the next batch sooner by the time in which the running one is read, as far as the card takes
        # longer than a launch. Even without that, the thread may come a little late.
        saved = max(margin / 2, min(self._read_s, device_s - self._launch_s))
        end = begun + device_s
        return Window(end - margin, end - margin + saved, end)
