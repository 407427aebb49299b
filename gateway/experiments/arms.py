"""The counts of one arm of an experiment, and of all arms under one set of weights."""

from __future__ import annotations

import math
import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.experiments.arrivals import Arrivals
from gateway.experiments.exposures import Exposure
from gateway.experiments.sample_ratio import RatioProcess, process_of
from gateway.experiments.units import MAX_UNITS, LatencyHistogram, UnitSet, UnitSums

MAX_SUMS = 200_000
"""The maximum number of units with sums in all arms of a generation: 10 MB, enough for an interval of 1 % of a latency."""

# The columns of an arm's sums.
REQUESTS, SERVER_ERRORS, TIMED, LOG_SECONDS, LOG_CHARACTERS = range(5)
NUM_SUMS = 5
TOTALS = ("requests", "random_requests", "texts", "tokens", "seconds", "server_errors")
"""The numbers of :class:`ArmCounts` that add up."""
_TRAFFIC = (*TOTALS, "errors", "latency", "queue", "sums", "largest")
_LEAST_S = 1e-4
# A server's error after this time is late if the arm has not answered any request yet.
_LATE_S = 1.0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of an experiment.

    Attributes:
        is_counted: the request is part of the split.
        share: the share of the units that the weights give to the arm.
        unit: the hashed unit, 16 hex digits; ``None`` for a request without a unit.
        source: where the unit comes from, such as ``header:x-unit``.
        declared: the declared outcome, as the exposure log has it.
        space: the space of the vectors; ``None`` for a request that failed, and for scores.
        num_characters: characters of the texts. Unlike tokens, they are known even if the request failed, and are the
            same in each arm.
        queue_s: the longest wait of its texts in the queue.
        is_server_error: the request failed through no fault of the client; a client that hung up had waited too long.
        is_cut: the deadline or the client ended the request after ``elapsed_s``; it would have taken longer. For other
            errors see :meth:`ArmCounts.is_late`.
    """

    experiment: str
    generation: str
    arm: str
    reason: str
    is_counted: bool
    unit: str | None
    model: str
    space: str | None
    elapsed_s: float
    share: float = 0.0
    source: str | None = None
    declared: str | None = None
    num_texts: int = 0
    num_characters: int = 0
    num_tokens: int = 0
    queue_s: float = 0.0
    error_code: str | None = None
    is_server_error: bool = False
    is_cut: bool = False


@dataclass(slots=True)
class ArmCounts:
    """The counts of one arm.

    Attributes:
        unanswered: the units that have only had errors so far.
        seconds: total duration of the answered requests.
        latency: latencies of the answered requests, and of the requests that were cut or failed late.
        sums: the sums of each unit, or of each request without a unit; see the columns above.
        largest: the number of requests of the unit with the most.
    """

    units: UnitSet = field(default_factory=UnitSet)
    unanswered: UnitSet = field(default_factory=UnitSet)
    requests: int = 0
    random_requests: int = 0
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    server_errors: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    queue: LatencyHistogram = field(default_factory=LatencyHistogram)
    sums: UnitSums = field(default_factory=lambda: UnitSums(NUM_SUMS))
    largest: int = 0

    def record(self, request: RequestRecord, *, may_grow: bool, is_cut: bool | None = None) -> bool:
        """Count a request, but not its unit, and return whether its latency is only a lower bound.

        Args:
            may_grow: whether a new unit gets sums.
            is_cut: whether the latency is only a lower bound, if other counts of the arm have decided that.
        """
        self.requests += 1
        is_cut = request.is_cut or self.is_late(request) if is_cut is None else is_cut
        if request.error_code is None:
            self.texts += request.num_texts
            self.tokens += request.num_tokens
            self.seconds += request.elapsed_s
            self.queue.observe(request.queue_s)
        else:
            self.errors[request.error_code] += 1
            self.server_errors += request.is_server_error
        sums = [1.0, float(request.is_server_error), 0.0, 0.0, 0.0]
        if request.error_code is None or is_cut:
            self.latency.observe(request.elapsed_s, is_cut=is_cut)
            characters = math.log(1 + request.num_characters)
            sums[TIMED:] = 1.0, math.log(max(request.elapsed_s, _LEAST_S)), characters
        # Each request without a unit was assigned to its arm independently.
        unit = int(request.unit, 16) if request.unit else secrets.randbits(64)
        num_requests = self.sums.add(unit, sums, may_grow=may_grow)
        if request.unit:
            self.largest = max(self.largest, int(num_requests))
        return is_cut

    def is_late(self, request: RequestRecord) -> bool:
        """Return whether the server failed after more time than half of the arm's answers took.

        There are many time limits: of another server, of a forward pass, of retries. Whichever ended the request, its client
        has waited that long without an answer. A refusal within microseconds says nothing about the latency.
        """
        if not request.is_server_error or request.elapsed_s <= _LEAST_S:
            return False
        median_s = self.latency.median_finished()
        return request.elapsed_s > (_LATE_S if median_s is None else median_s)


@dataclass(slots=True)
class Source:
    """Counts of the units that come from one place of a request, and of their requests."""

    units: int = 0
    requests: int = 0


@dataclass(slots=True)
class Generation:
    """The counts under one set of arms and weights.

    Attributes:
        stored_version: the version of the counts in the file of experiments that these include; -1 without them.
    """

    since: str
    stored_version: int = -1
    arms: defaultdict[str, ArmCounts] = field(default_factory=lambda: defaultdict(ArmCounts))
    uncounted: Counter[str] = field(default_factory=Counter)
    sources: defaultdict[str, Source] = field(default_factory=lambda: defaultdict(Source))
    units_since: str | None = None
    unit_ratio: RatioProcess = field(default_factory=RatioProcess)
    request_ratio: RatioProcess = field(default_factory=RatioProcess)
    is_ratio_known: bool = True
    arrivals: Arrivals = field(default_factory=Arrivals)

    def record(self, request: RequestRecord, *, is_cut: bool | None = None) -> bool:
        """Count a request, but not its unit, and return whether its latency is only a lower bound.

        Args:
            is_cut: as in :meth:`ArmCounts.record`.
        """
        arm = self.arms[request.arm]
        may_grow = sum(len(other.sums) for other in self.arms.values()) < MAX_SUMS
        is_cut = arm.record(request, may_grow=may_grow, is_cut=is_cut)
        if request.unit is not None:
            self.sources[request.source or "unknown"].requests += 1
            return is_cut
        arm.random_requests += 1
        if request.share:
            self.request_ratio.add(request.arm, request.share)
        return is_cut

    def adopt(self, other: Generation, shares: Mapping[str, float]) -> None:
        """Replace the counts of requests by those of another generation; the units stay.

        Args:
            shares: the share of the requests that the weights give to each arm.
        """
        for label in {*self.arms, *other.arms}:
            for name in _TRAFFIC:
                setattr(self.arms[label], name, getattr(other.arms[label], name))
        self.uncounted = other.uncounted
        for name in {*self.sources, *other.sources}:
            self.sources[name].requests = other.sources[name].requests
        self.since = min(self.since, other.since)
        random = {label: arm.random_requests for label, arm in self.arms.items() if shares.get(label)}
        self.request_ratio = process_of(random, shares, self.request_ratio.largest_log_e)

    def expose(self, exposure: Exposure) -> bool:
        """Count a unit in an arm, and return whether the unit, or its first answer, is new.

        The logs of several replicas may be read in any order.
        """
        arm, unit = self.arms[exposure.arm], int(exposure.unit, 16)
        if not arm.units.add(unit):
            return exposure.answered and arm.unanswered.discard(unit)
        if not exposure.answered:
            arm.unanswered.add(unit)
        self.arrivals.add(exposure.time, exposure.arm)
        self.units_since = min(self.units_since or exposure.time, exposure.time)
        self.sources[exposure.source or "unknown"].units += 1
        if exposure.share is None:
            self.is_ratio_known = False  # a log of an earlier version, which has no shares
        elif exposure.share and not self.is_full:
            self.unit_ratio.add(exposure.arm, exposure.share)
        return True

    @property
    def is_full(self) -> bool:
        """Whether an arm has reached the maximum of counted units, so that the other arms would catch up with it."""
        return any(len(arm.units) >= MAX_UNITS for arm in self.arms.values())
