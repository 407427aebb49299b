"""What this process has seen of each experiment: the arms side by side."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from gateway.config.registry import Experiment
from gateway.experiments.exposures import Exposure, ExposureLog, now, read_exposures
from gateway.experiments.sample_ratio import SampleRatio, check_sample_ratio
from gateway.experiments.units import LatencyHistogram, UnitSet

# Where the log cannot be written for long, further exposures are lost: about 30 MB.
_MAX_UNWRITTEN = 100_000
_MAX_WRITTEN_AT_ONCE = 100
# What was counted under earlier weights is kept for a while: a reload may be taken back.
_MAX_GENERATIONS = 4


@dataclass(frozen=True, slots=True)
class ArmReport:
    """One arm in figures.

    Attributes:
        share: the share of the units that its weight asks for.
        units: distinct units.
        requests: those that were counted for the experiment, errors included.
        tokens_per_s: tokens of an average request by its average time: what one client at a time would get.
        p50_s: of requests without an error, as are the other times; ``None`` where there were none.
    """

    arm: str
    model: str
    weight: float
    share: float
    units: int
    requests: int
    errors: int
    error_rate: float
    texts: int
    tokens: int
    tokens_per_s: float | None
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    queue_p95_s: float | None


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """An experiment in figures.

    Attributes:
        since: when this process began to count requests under the present weights, ISO 8601.
        units_since: when the first unit was seen: earlier, if there is an exposure log; ``None`` before the first one.
        uncounted: requests that were not part of the split, by reason.
        warning: what keeps the experiment from telling anything; ``None`` where nothing is known to.
    """

    experiment: str
    kind: str
    generation: str
    since: str
    units_since: str | None
    arms: Sequence[ArmReport]
    uncounted: Mapping[str, int]
    sample_ratio: SampleRatio
    warning: str | None


@dataclass(frozen=True, slots=True)
class Observation:
    """One request of an experiment.

    Attributes:
        is_counted: the request is part of the split.
        unit: hashed, 16 hex digits; ``None`` where the request has none.
        space: of the vectors; ``None`` for a request that failed, which exposed its unit to nothing.
        queue_s: the wait of the text that waited longest.
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
    num_texts: int = 0
    num_tokens: int = 0
    queue_s: float = 0.0
    error_code: str | None = None


@dataclass(slots=True)
class _Arm:
    units: UnitSet = field(default_factory=UnitSet)
    requests: int = 0
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    queue: LatencyHistogram = field(default_factory=LatencyHistogram)


@dataclass(slots=True)
class _Generation:
    since: str
    arms: defaultdict[str, _Arm] = field(default_factory=lambda: defaultdict(_Arm))
    uncounted: Counter[str] = field(default_factory=Counter)
    units_since: str | None = None

    def expose(self, exposure: Exposure) -> None:
        """Take note of a unit in an arm. The logs of several replicas come in any order."""
        self.units_since = min(self.units_since or exposure.time, exposure.time)
        self.arms[exposure.arm].units.add(int(exposure.unit, 16))


class Evidence:
    """Counts the requests of experiments, and writes the exposure log.

    Args:
        log: where exposures are written, and were written before: the units in it are counted.
    """

    def __init__(self, log: ExposureLog | None) -> None:
        self._log = log
        # What could not be written when it was due, by all that an exposure is known by.
        self._unwritten: dict[tuple[str, str, str, str], Exposure] = {}
        self._experiments: defaultdict[str, OrderedDict[str, _Generation]] = defaultdict(OrderedDict)
        if log is not None:
            self.add(read_exposures(log.files()))

    def add(self, exposures: Iterable[Exposure]) -> None:
        """Count the units of a log."""
        for one in exposures:
            self._generation(one.experiment, one.generation).expose(one)

    def record(self, seen: Observation) -> None:
        """Count one request; the first one of a unit in an arm is written to the log."""
        generation = self._generation(seen.experiment, seen.generation)
        if not seen.is_counted:
            generation.uncounted[seen.reason] += 1
            return
        arm = generation.arms[seen.arm]
        arm.requests += 1
        if seen.error_code is not None:
            arm.errors[seen.error_code] += 1
        else:
            arm.texts += seen.num_texts
            arm.tokens += seen.num_tokens
            arm.seconds += seen.elapsed_s
            arm.latency.observe(seen.elapsed_s)
            arm.queue.observe(seen.queue_s)
        if seen.unit is not None and seen.space is not None:
            self._expose(seen, seen.unit, seen.space, generation, is_new=arm.units.add(int(seen.unit, 16)))

    def _expose(self, seen: Observation, unit: str, space: str, generation: _Generation, *, is_new: bool) -> None:
        """Write the first answer of a unit to the log; if that failed before, try again."""
        key = (seen.experiment, seen.generation, seen.arm, unit)
        if is_new:
            time = now()
            generation.units_since = generation.units_since or time
            exposure = Exposure(time, seen.experiment, seen.generation, seen.arm, unit, seen.model, space)
        elif key in self._unwritten:
            exposure = self._unwritten.pop(key)
        else:
            return
        if self._log is None:
            return
        if self._log.write(exposure):
            self._write_rest(self._log)
        elif len(self._unwritten) < _MAX_UNWRITTEN:
            self._unwritten[key] = exposure

    def _write_rest(self, log: ExposureLog, num_most: int = _MAX_WRITTEN_AT_ONCE) -> None:
        """Write what could not be written before; beside a request, which waits for it, a few at a time."""
        for key in list(islice(self._unwritten, num_most)):
            if not log.write(self._unwritten[key]):
                return
            del self._unwritten[key]

    def close(self) -> None:
        """Write what still can be written to the log, and close it."""
        if self._log is not None:
            self._write_rest(self._log, len(self._unwritten))
            self._log.close()

    def report(self, experiment: Experiment, generation: str, since: str | None = None) -> ExperimentReport:
        """Return what has been seen of an experiment under its present weights.

        Args:
            since: when it was first served with them; ``None`` for the first time that it was counted.
        """
        generations = self._experiments.get(experiment.id, OrderedDict())
        seen = generations.get(generation) or _Generation(since or now())
        total = sum(arm.weight for arm in experiment.arms)
        arms = [
            _report(arm.label, arm.model, arm.weight, arm.weight / total, seen.arms.get(arm.label, _Arm()))
            for arm in experiment.arms
        ]
        return ExperimentReport(
            experiment=experiment.id,
            kind=experiment.kind,
            generation=generation,
            since=min(since or seen.since, seen.since),
            units_since=seen.units_since,
            arms=arms,
            uncounted=dict(seen.uncounted),
            sample_ratio=check_sample_ratio([arm.units for arm in arms], [arm.share for arm in arms]),
            warning=_warning(experiment, sum(arm.requests for arm in arms), seen.uncounted),
        )

    def _generation(self, experiment: str, generation: str) -> _Generation:
        generations = self._experiments[experiment]
        if generation not in generations:
            generations[generation] = _Generation(now())
            if len(generations) > _MAX_GENERATIONS:
                generations.popitem(last=False)
        generations.move_to_end(generation)
        return generations[generation]


def _report(label: str, model: str, weight: float, share: float, arm: _Arm) -> ArmReport:
    num_errors = arm.errors.total()
    return ArmReport(
        arm=label,
        model=model,
        weight=weight,
        share=share,
        units=len(arm.units),
        requests=arm.requests,
        errors=num_errors,
        error_rate=num_errors / arm.requests if arm.requests else 0.0,
        texts=arm.texts,
        tokens=arm.tokens,
        tokens_per_s=arm.tokens / arm.seconds if arm.seconds else None,
        p50_s=arm.latency.quantile(0.5),
        p95_s=arm.latency.quantile(0.95),
        p99_s=arm.latency.quantile(0.99),
        queue_p95_s=arm.queue.quantile(0.95),
    )


def _warning(experiment: Experiment, num_counted: int, uncounted: Mapping[str, int]) -> str | None:
    """Say that requests bring no unit, where that is so of most: the control arm answers them, and nothing is split."""
    num_without = uncounted.get("no_unit", 0)
    if not num_without or num_without < num_counted:
        return None
    how_many = f"all {num_without:,}" if not num_counted else f"{num_without:,} of {num_without + num_counted:,}"
    sources = ", ".join(f"`{source}`" for source in experiment.unit)
    return (
        f"{how_many} requests had no unit, so the control arm {experiment.control.label!r} answered them and they are not "
        f"counted: a unit is made from {sources}, and they have none of these"
    )


def is_running(experiment: Experiment) -> bool:
    """Tell whether an experiment splits its requests now, rather than answering all with the control arm."""
    time = datetime.now(UTC)
    has_begun = experiment.start is None or time >= experiment.start
    return has_begun and (experiment.end is None or time < experiment.end)
