"""The split of an experiment: a salted hash of a request's unit chooses its arm, the same arm everywhere and forever.

Nothing is stored: every replica, before and after a restart, assigns a unit to the same arm.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TypeAlias

from gateway.config.registry import Arm, Experiment
from gateway.config.wording import cut
from gateway.errors import BadInput

MAX_UNIT_BYTES = 1_024
"""The longest unit, in bytes of UTF-8."""

_SALT_DIGITS, _WEIGHT_DIGITS = 4, 8

UnitSource: TypeAlias = Callable[[str], "str | bytes | None"]
"""Looks up a value of a request by its source, ``header:NAME`` (bytes), ``body:user`` or ``api_key``; ``None`` if absent."""


def no_unit_source(_source: str) -> None:
    """Look up a value of a request that has none."""


def read_unit(value: str | bytes | None) -> str | None:
    """Return the unit in a value, in one spelling, whichever part of a request the value comes from.

    Args:
        value: text, or the bytes of a header, read as UTF-8 or else as Latin-1.

    Returns:
        The text in Unicode's normal form C, without white space around it; ``None`` if nothing is left.
    """
    if isinstance(value, bytes):
        value = _decode(value)
    return unicodedata.normalize("NFC", value or "").strip() or None


def _decode(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


class Reason(StrEnum):
    """Why a request got its arm."""

    UNIT = "unit"
    """Its unit's hash chose the arm."""
    RANDOM = "random"
    """It has no unit, and the arms share a space: any arm."""
    FORCED = "forced"
    """A tester requested this arm."""
    EXCLUDED = "excluded"
    """Its unit is excluded: the control arm."""
    NO_UNIT = "no_unit"
    """It has no unit, and the arms have different spaces: the control arm."""
    NOT_STARTED = "not_started"
    """The experiment has not started: the control arm."""
    ENDED = "ended"
    """The experiment has ended: the control arm."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The arm of an experiment that answers a request.

    Attributes:
        experiment: id of the experiment.
        generation: 8 hex digits, a hash of the salt, the arms, their weights and `counts_from`. If the salt is not the id, 4
            hex digits of the salt's hash come first. Stats of different generations are not comparable.
        share: the share of the units that the weights give to the arm.
        unit: 16 hex digits, a salted hash: a unit cannot be recognized in the log of another experiment.
        source: where the unit comes from, such as ``header:x-unit``.
        declared: hash of the declared outcome, see :func:`hash_of_declaration`.
    """

    experiment: str
    generation: str
    arm: Arm
    reason: Reason
    share: float
    unit: str | None = None
    source: str | None = None
    declared: str = ""

    @property
    def is_counted(self) -> bool:
        """Whether the request is part of the split, rather than forced or outside it."""
        return self.reason in (Reason.UNIT, Reason.RANDOM)


class Split:
    """Assigns the requests of one experiment to its arms.

    The arms with a weight run a race: the time of an arm is ``-ln(u) / weight``, where ``u`` is a hash of salt, arm and
    unit, uniform between 0 and 1. The fastest arm wins: arm i gets a share of ``weight_i / sum(weights)`` of the units.
    This is rendezvous hashing (Thaler & Ravishankar 1998) with logarithmic weights (Schindelhauer & Schomaker 2005):
    when a weight is raised, units move from the other arms into that arm. No unit leaves it, and no unit moves between
    two other arms. The more common split of a line into ranges moves units between arms whose weights did not change.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._salt = experiment.salt or experiment.id
        weighted = _digest(
            experiment.kind,
            self._salt,
            *(f"{arm.label} {arm.model} {arm.task or ''} {arm.weight!r}" for arm in experiment.arms),
            # Only the counts depend on this, not the arms of the units.
            *([] if experiment.counts_from is None else [experiment.counts_from.isoformat()]),
        )
        salt = "" if self._salt == experiment.id else _digest("salt", self._salt)[:_SALT_DIGITS]
        self.generation = salt + weighted[:_WEIGHT_DIGITS]
        self._declared = hash_of_declaration(*declaration_of(experiment))
        self._arms = {arm.label: arm for arm in experiment.arms}
        self._force_header = experiment.force
        self._excluded = frozenset(map(read_unit, experiment.exclude))
        self._total = sum(arm.weight for arm in experiment.arms)

    def assign(self, unit_source: UnitSource, now: datetime) -> Assignment:
        """Choose the arm of a request.

        Raises:
            BadInput: the header that forces an arm names an unknown one, or the unit is too long.
        """
        forced = read_unit(unit_source(self._force_header)) if self._force_header else None
        if forced:
            if forced not in self._arms:
                raise BadInput(
                    f"the header `{(self._force_header or '').removeprefix('header:')}` requests arm "
                    f"{cut(forced)!r} of experiment {self.experiment.id!r}; its arms: {', '.join(self._arms)}"
                )
            return self._assignment(self._arms[forced], Reason.FORCED)
        found = ((source, read_unit(unit_source(source))) for source in self.experiment.unit)
        source, unit = next((pair for pair in found if pair[1]), (None, None))
        if reason := self._why_outside(unit, now):
            return self._assignment(self.experiment.control, reason)
        if unit is None:
            return self._assignment(self.arm_of(secrets.token_hex(8)), Reason.RANDOM)
        if (num_bytes := len(unit.encode(errors="replace"))) > MAX_UNIT_BYTES:
            raise BadInput(
                f"the unit in `{source}` of experiment {self.experiment.id!r} has {num_bytes:,} bytes; the limit is "
                f"{MAX_UNIT_BYTES:,}: send a hash of it, here and with its outcomes"
            )
        return self._assignment(self.arm_of(unit), Reason.UNIT, self.hash_of(unit), source)

    def _why_outside(self, unit: str | None, now: datetime) -> Reason | None:
        """Return the reason why a request is outside the split, if it is."""
        experiment = self.experiment
        if experiment.start is not None and now < experiment.start:
            return Reason.NOT_STARTED
        if experiment.end is not None and now >= experiment.end:
            return Reason.ENDED
        if unit is None:
            return Reason.NO_UNIT if experiment.kind == "cross_space" else None
        return Reason.EXCLUDED if self.excludes(unit) else None

    def arm_of(self, unit: str) -> Arm:
        """Return the arm of a unit."""
        racing = (arm for arm in self.experiment.arms if arm.weight > 0)
        return min(racing, key=lambda arm: -math.log(_uniform(self._salt, arm.label, unit)) / arm.weight)

    def excludes(self, unit: str) -> bool:
        """Return whether a unit is excluded: it gets the control arm and is not counted."""
        return unit in self._excluded

    def hash_of(self, unit: str) -> str:
        """Return the salted hash under which a unit is stored and logged, 16 hex digits."""
        return _digest("unit", self._salt, unit)[:16]

    def share_of(self, arm: Arm) -> float:
        """Return the share of the units that an arm gets."""
        return arm.weight / self._total

    def _assignment(self, arm: Arm, reason: Reason, unit: str | None = None, source: str | None = None) -> Assignment:
        share = self.share_of(arm)
        return Assignment(self.experiment.id, self.generation, arm, reason, share, unit, source, self._declared)


def has_same_salt(generation: str, other: str) -> bool:
    """Return whether two generations have the same salt, and so the same hashes of units."""
    return generation[:-_WEIGHT_DIGITS] == other[:-_WEIGHT_DIGITS]


def declaration_of(experiment: Experiment) -> tuple[str, str]:
    """Return a text that identifies all declarations of an experiment's outcome, and one that identifies this one."""
    since = experiment.counts_from and experiment.counts_from.isoformat()
    declared = experiment.outcome and experiment.outcome.model_dump()
    return json.dumps(["declarations", experiment.salt or experiment.id, since]), json.dumps(declared, sort_keys=True)


def hash_of_declaration(every: str, this: str) -> str:
    """Return a declaration as the exposure log has it: hashes, of 8 hex digits, of all declarations and of this one."""
    return f"{_digest(every)[:8]}.{_digest(this)[:8]}"


def _uniform(*parts: str) -> float:
    """Hash texts to a number above 0 and up to 1."""
    return (int(_digest(*parts)[:16], 16) + 0.5) / 2**64


def _digest(*parts: str) -> str:
    # As JSON, so that no two lists of texts hash the same bytes.
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
