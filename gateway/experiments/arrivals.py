"""When the units of an experiment arrived: counts by hour and arm, in little memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, Literal

MAX_HOURS: Final = 24 * 92
"""The number of latest hours that are kept: about 400 bytes for each."""

_LENGTHS: Final = {"hour": 13, "day": 10}
Step = Literal["hour", "day"]


class Arrivals:
    """Counts units by the hour of their first request."""

    def __init__(self) -> None:
        self._hours: dict[str, Counter[str]] = {}

    def add(self, time: str, arm: str) -> None:
        """Count a unit.

        Args:
            time: its first request, in ISO 8601 and UTC, as the exposure log has it.
        """
        hour = time[: _LENGTHS["hour"]]
        if hour not in self._hours:
            self._hours[hour] = Counter()
            if len(self._hours) > MAX_HOURS:
                del self._hours[min(self._hours)]
        if hour in self._hours:
            self._hours[hour][arm] += 1

    def by(self, step: Step) -> dict[datetime, Mapping[str, int]]:
        """Return the counts by arm of each hour or day with a unit, earliest first."""
        found: dict[datetime, Counter[str]] = {}
        for hour in sorted(self._hours):
            try:
                start = datetime.fromisoformat(hour[: _LENGTHS[step]]).replace(tzinfo=UTC)
            except ValueError:  # a log that another program wrote
                continue
            found.setdefault(start, Counter()).update(self._hours[hour])
        return dict(found)
