"""The stats of each experiment: what this process counted, arm by arm."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from gateway.config.registry import Experiment
from gateway.experiments.exposures import Exposure, ExposureLog, now, read_exposures
from gateway.experiments.report import ArmReport, ExperimentReport, describe_experiment
from gateway.experiments.sample_ratio import check_sample_ratio
from gateway.experiments.units import LatencyHistogram, UnitSet

# About 30 MB. If the log cannot be written for longer than this lasts, further exposures are lost.
_MAX_UNWRITTEN = 100_000
_MAX_WRITTEN_AT_ONCE = 100
# The stats of earlier weights are kept for a while: a reload may be reverted.
_MAX_GENERATIONS = 4


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of an experiment.

    Attributes:
        is_counted: the request is part of the split.
        unit: hashed, 16 hex digits; ``None`` where the request has none.
        space: of the vectors; ``None`` for a request that failed, which exposed its unit to nothing.
        queue_s: the longest wait of its texts in the queue.
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
        """Count a unit in an arm. The logs of several replicas come in any order."""
        self.units_since = min(self.units_since or exposure.time, exposure.time)
        self.arms[exposure.arm].units.add(int(exposure.unit, 16))


class ExperimentStats:
    """Counts the requests of experiments, and writes the exposure log.

    Args:
        log: where to write exposures. The units that it already has are counted.
    """

    def __init__(self, log: ExposureLog | None) -> None:
        self._log = log
        # Exposures that could not be written yet, by experiment, generation, arm and unit.
        self._unwritten: dict[tuple[str, str, str, str], Exposure] = {}
        self._experiments: defaultdict[str, OrderedDict[str, _Generation]] = defaultdict(OrderedDict)
        if log is not None:
            self.add(read_exposures(log.files()))

    def add(self, exposures: Iterable[Exposure]) -> None:
        """Count the units of a log."""
        for exposure in exposures:
            self._generation(exposure.experiment, exposure.generation).expose(exposure)

    def record(self, request: RequestRecord) -> None:
        """Count one request, and log it if it is the first of its unit in an arm."""
        generation = self._generation(request.experiment, request.generation)
        if not request.is_counted:
            generation.uncounted[request.reason] += 1
            return
        arm = generation.arms[request.arm]
        arm.requests += 1
        if request.error_code is not None:
            arm.errors[request.error_code] += 1
        else:
            arm.texts += request.num_texts
            arm.tokens += request.num_tokens
            arm.seconds += request.elapsed_s
            arm.latency.observe(request.elapsed_s)
            arm.queue.observe(request.queue_s)
        if request.unit is not None and request.space is not None:
            self._expose(request, request.unit, request.space, generation, is_new=arm.units.add(int(request.unit, 16)))

    def _expose(self, request: RequestRecord, unit: str, space: str, generation: _Generation, *, is_new: bool) -> None:
        """Write the first answer of a unit to the log, or retry if that failed before."""
        key = (request.experiment, request.generation, request.arm, unit)
        if is_new:
            time = now()
            generation.units_since = generation.units_since or time
            exposure = Exposure(time, request.experiment, request.generation, request.arm, unit, request.model, space)
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
        """Write what could not be written before. A request waits for it, so only a few at a time."""
        for key in list(islice(self._unwritten, num_most)):
            if not log.write(self._unwritten[key]):
                return
            del self._unwritten[key]

    def close(self) -> None:
        """Write the rest to the log if possible, and close it."""
        if self._log is not None:
            self._write_rest(self._log, len(self._unwritten))
            self._log.close()

    def report(self, experiment: Experiment, generation: str, since: str | None = None) -> ExperimentReport:
        """Report the stats of an experiment under its current weights.

        Args:
            since: when it was first served with them; ``None`` for when its first request was counted.
        """
        generations = self._experiments.get(experiment.id, OrderedDict())
        counted = generations.get(generation) or _Generation(since or now())
        total = sum(arm.weight for arm in experiment.arms)
        arms = [
            _report(arm.label, arm.model, arm.weight, arm.weight / total, counted.arms.get(arm.label, _Arm()))
            for arm in experiment.arms
        ]
        return ExperimentReport(
            **dict(describe_experiment(experiment)),
            generation=generation,
            since=min(since or counted.since, counted.since),
            units_since=counted.units_since,
            evidence=arms,
            uncounted=dict(counted.uncounted),
            sample_ratio=check_sample_ratio([arm.units for arm in arms], [arm.share for arm in arms]),
            warning=_warning(experiment, sum(arm.requests for arm in arms), counted.uncounted),
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
    """Warn if most requests have no unit: the control arm answers them, and nothing is split."""
    num_without = uncounted.get("no_unit", 0)
    if not num_without or num_without < num_counted:
        return None
    how_many = f"all {num_without:,}" if not num_counted else f"{num_without:,} of {num_without + num_counted:,}"
    sources = ", ".join(f"`{source}`" for source in experiment.unit)
    return (
        f"{how_many} requests had no unit, so the control arm {experiment.control.label!r} answered them and they are not "
        f"counted: a unit is made from {sources}, and these requests have none of them"
    )
