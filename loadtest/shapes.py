"""Locust's load shapes: the number of users or turns of each target, second by second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from locust import LoadTestShape, User

from loadtest.knee import Limits, Search
from loadtest.plan import PAUSE_S, SETTLE_S, Plan, Slot, Target
from loadtest.recorder import Recorder
from loadtest.thresholds import HOPELESS_S, Thresholds, is_hopeless

log = logging.getLogger("loadtest")

# Users are started at once: a slot's first seconds are not counted.
_SPAWN_RATE = 100.0
# Workers send their records every three seconds.
_REPORT_LAG_S = 4.0
_LONGEST_PAUSE_S = 60.0

Tick = tuple[int, float, list[type[User]]]


@dataclass(frozen=True, slots=True)
class Window:
    """A time that is counted, for one target, in seconds since the epoch."""

    label: str
    round: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class Course:
    """The history of a shape, for the report.

    Attributes:
        given_up: why the run was ended early; empty if it was not.
        searches: of the knee, by label.
    """

    windows: list[Window] = field(default_factory=list)
    given_up: str = ""
    searches: dict[str, Search] = field(default_factory=dict)


class PlannedShape(LoadTestShape):
    """Follows a plan, and gives it up when a target is hopeless."""

    abstract = True

    def __init__(
        self,
        plan: Plan,
        classes: Mapping[str, type[User]],
        thresholds: Mapping[str, Thresholds],
        recorder: Recorder,
        course: Course,
    ) -> None:
        super().__init__()
        self._plan, self._classes, self._thresholds = plan, classes, thresholds
        self._recorder, self._course = recorder, course
        self._slot: Slot | None = None

    def tick(self) -> Tick | None:
        """Return the number of users that each target should have; ``None`` at the end."""
        now = self.get_run_time()
        slot = self._plan.slot_at(now)
        if slot is not None and slot is not self._slot:
            self._course.windows.append(self._window(slot, now))
        self._slot = slot or self._slot
        if now >= self._plan.seconds:
            return None
        if slot is None:
            last = self._slot or self._plan.slots[0]
            return 0, _SPAWN_RATE, [self._classes[last.target.label]]
        label = slot.target.label
        recent = self._recorder.between(label, time.time() - HOPELESS_S - 1, time.time())
        if now - slot.start_s > HOPELESS_S + _REPORT_LAG_S and is_hopeless(recent, self._thresholds[label]):
            self._course.given_up = f"{label} is far beyond its limits"
            self._course.windows[-1] = _cut(self._course.windows[-1], time.time())
            log.warning("%s: the run ends early", self._course.given_up)
            return None
        return self._plan.level_at(now), _SPAWN_RATE, [self._classes[label]]

    def _window(self, slot: Slot, now: float) -> Window:
        began = time.time() - (now - slot.start_s)
        settle = SETTLE_S if self._plan.profile.is_constant else 0.0
        return Window(slot.target.label, slot.round, began + settle, began + slot.end_s - slot.start_s)


class KneeShape(LoadTestShape):
    """Raises the rate of each target, one after the other, until it breaks, and then looks in between."""

    abstract = True

    def __init__(
        self,
        targets: list[Target],
        classes: Mapping[str, type[User]],
        limits: Mapping[str, Limits],
        recorder: Recorder,
        course: Course,
        first: int,
        step_s: float,
    ) -> None:
        super().__init__()
        self._targets, self._classes, self._limits = targets, classes, limits
        self._recorder, self._course = recorder, course
        self._first, self._step_s = first, step_s
        self._ticks = self._run()

    def tick(self) -> Tick | None:
        """Return the number of turns per second that each target should have; ``None`` at the end."""
        return next(self._ticks, None)

    def _run(self) -> Iterator[Tick]:
        for target in self._targets:
            label, classes = target.label, [self._classes[target.label]]
            search = self._course.searches[label] = Search(self._first, self._limits[label])
            while search.rate is not None:
                rate, began = search.rate, time.time()
                yield from _hold((rate, _SPAWN_RATE, classes), partial(self._is_on, began))
                window = Window(label, len(search.steps), began + SETTLE_S, began + self._step_s)
                self._course.windows.append(window)
                ended = time.time()
                # Until running requests have ended, or are known not to.
                yield from _hold((0, _SPAWN_RATE, classes), partial(self._is_busy, label, ended))
                tally = self._recorder.between(label, window.start, window.end + PAUSE_S)
                search.note(window.seconds, tally)
                log.info("%s: %d turns/s: %s", label, rate, search.steps[-1].broken_by or "sustained")

    def _is_on(self, began: float) -> bool:
        return time.time() - began < self._step_s

    def _is_busy(self, label: str, since: float) -> bool:
        """Return whether answers still come a while after the last request, for at most a minute."""
        waited = time.time() - since
        if waited < PAUSE_S + _REPORT_LAG_S:
            return True
        recent = self._recorder.between(label, time.time() - PAUSE_S - 1, time.time())
        return recent.answered > 0 and waited < _LONGEST_PAUSE_S


def _hold(tick: Tick, is_on: Callable[[], bool]) -> Iterator[Tick]:
    while is_on():
        yield tick


def _cut(window: Window, end: float) -> Window:
    return Window(window.label, window.round, window.start, end)
