"""The changes that are known to change nothing, from ``equivalent.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.mutants.operators import Mutant

FILE = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True, slots=True)
class Equivalent:
    """A change that changes no behavior.

    Attributes:
        after: the changed lines; ``*`` for any change of ``before``.
    """

    module: str
    before: str
    after: str
    reason: str

    def is_of(self, mutant: Mutant) -> bool:
        return (self.module, self.before) == (mutant.module, mutant.before) and self.after in ("*", mutant.after)


def read_equivalents(path: Path = FILE) -> list[Equivalent]:
    """Return the entries of the file.

    Raises:
        TypeError: an entry has other keys than ``module``, ``before``, ``after``, ``reason``.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Equivalent(**entry) for entry in content.get("equivalent", [])]


def reason_for(mutant: Mutant, equivalents: Iterable[Equivalent]) -> str | None:
    """Return the reason why a mutant does not change the behavior; ``None`` for any other mutant."""
    return next((entry.reason for entry in equivalents if entry.is_of(mutant)), None)


def unmatched(mutants: Iterable[Mutant], equivalents: Iterable[Equivalent]) -> list[Equivalent]:
    """Return the entries that are of none of the mutants."""
    all_of_them = list(mutants)
    return [entry for entry in equivalents if not any(entry.is_of(mutant) for mutant in all_of_them)]
