"""The schedule of a run, known before it begins: targets, times and rates. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

Loop: TypeAlias = Literal["closed", "open"]

SETTLE_S: Final = 2.0
"""Seconds at the start of a slot that are not counted: users are still being started."""

PAUSE_S: Final = 2.0
"""Seconds between two slots, in which nothing is sent, so that running requests end."""


@dataclass(frozen=True, slots=True)
class Target:
    """A model behind an endpoint.

    Attributes:
        label: its name in tables and plots.
        url: the server's, without a path.
        path: where embeddings are asked for.
        model: the value of ``model`` in requests.
    """

    label: str
    url: str
    path: str
    model: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A course of load over one slot.

    Attributes:
        level: share of the peak at a share of the slot's time, both 0 to 1.
        slot_s: how long a slot is unless something else is asked for, in seconds.
        rounds: how often every target is loaded.
        peak: users, or requests per second if arrivals are open.
        is_constant: whether the first seconds of a slot are left out, as the load is still growing there.
    """

    level: Callable[[float], float]
    slot_s: float
    rounds: int
    peak: int
    is_constant: bool = True


PROFILES: Final[Mapping[str, Profile]] = {
    "smoke": Profile(lambda _: 1.0, slot_s=8, rounds=1, peak=4),
    "steady": Profile(lambda _: 1.0, slot_s=30, rounds=3, peak=16),
    "ramp": Profile(lambda share: share, slot_s=120, rounds=1, peak=64, is_constant=False),
    "spike": Profile(
        lambda share: 1.0 if 0.4 <= share < 0.6 else 0.1, slot_s=60, rounds=2, peak=100, is_constant=False
    ),
    "soak": Profile(
        lambda share: 0.6 + 0.4 * math.sin(8 * math.pi * share), slot_s=600, rounds=6, peak=16, is_constant=False
    ),
}
"""``knee`` is not among them: its course depends on the answers, see :mod:`loadtest.knee`."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A time in which one target is loaded.

    Attributes:
        start_s: since the run's start; so is ``end_s``.
    """

    target: Target
    round: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The slots of a run, in order, and the course of load within each."""

    profile: Profile
    peak: int
    slots: Sequence[Slot]

    @property
    def seconds(self) -> float:
        return self.slots[-1].end_s

    def slot_at(self, time_s: float) -> Slot | None:
        """Return the slot at a time since the start; ``None`` in a pause."""
        return next((slot for slot in self.slots if slot.start_s <= time_s < slot.end_s), None)

    def level_at(self, time_s: float) -> int:
        """Return the number of users, or of requests per second: 0 in a pause, at least 1 in a slot."""
        slot = self.slot_at(time_s)
        if slot is None:
            return 0
        share = (time_s - slot.start_s) / (slot.end_s - slot.start_s)
        return max(1, round(self.peak * self.profile.level(share)))


def make_plan(
    targets: Sequence[Target], profile: Profile, *, peak: int = 0, slot_s: float = 0.0, rounds: int = 0
) -> Plan:
    """Lay the slots out: A B, B A, A B, …, so that a machine that grows slower favors none.

    Args:
        peak: 0 for the profile's own; so for the others.
    """
    length = slot_s or profile.slot_s
    slots: list[Slot] = []
    for number in range(rounds or profile.rounds):
        for target in targets if number % 2 == 0 else reversed(targets):
            start = slots[-1].end_s + PAUSE_S if slots else 0.0
            slots.append(Slot(target, number, start, start + length))
    return Plan(profile, peak or profile.peak, slots)


def parse_targets(models: str, host: str, extra: Sequence[str] = ()) -> list[Target]:
    """Read ``--models`` and ``--target``.

    Args:
        models: names, comma-separated, of models behind ``host``.
        extra: each ``LABEL=URL#MODEL``: a model behind another server; its URL may have the path of the endpoint.

    Raises:
        ValueError: the plan is not valid; the message gives the reason.
    """
    targets = [_target(name.strip(), f"{host}#{name.strip()}") for name in models.split(",") if name.strip()]
    for text in extra:
        label, equals, rest = text.partition("=")
        if not (label and equals and rest):
            raise ValueError(f"a target is LABEL=URL#MODEL, got {text!r}")
        targets.append(_target(label, rest))
    if not targets:
        raise ValueError("name at least one model: --models MODEL,MODEL or --target LABEL=URL#MODEL")
    labels = [target.label for target in targets]
    if len(set(labels)) < len(labels):
        raise ValueError(f"each target needs a distinct label, got {', '.join(labels)}")
    return targets


def _target(label: str, address: str) -> Target:
    url, _, model = address.partition("#")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{label} needs a server, http://HOST:PORT, got {url or 'nothing'!r}")
    if not model:
        raise ValueError(f"{label} needs a model: {url}#MODEL")
    path = parts.path.rstrip("/") or "/v1/embeddings"
    return Target(label, f"{parts.scheme}://{parts.netloc}", path, model)
