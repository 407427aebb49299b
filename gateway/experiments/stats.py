"""The stats of each experiment, arm by arm: the counts of this process, and of others that share its folder."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Literal

from gateway.config.registry import Experiment
from gateway.experiments.arms import ArmCounts, Generation, RequestRecord
from gateway.experiments.arrivals import Step
from gateway.experiments.exposures import Exposure, ExposureLog, now, read_exposures
from gateway.experiments.guardrails import guardrails
from gateway.experiments.report import (
    ArmReport,
    ExperimentReport,
    UnitsAtTime,
    UnitSource,
    UnitsOverTime,
    describe_experiment,
)
from gateway.experiments.sample_ratio import ArmCount, SampleRatio, check_sample_ratio, num_tests_of
from gateway.experiments.sequence import ALPHA
from gateway.experiments.units import MAX_UNITS

# About 30 MB. When this many exposures wait for a log that cannot be written, further exposures are lost.
_MAX_UNWRITTEN = 100_000
_MAX_WRITTEN_AT_ONCE = 100
# The stats of earlier weights are kept for a while: a reload may be reverted.
_MAX_GENERATIONS = 4
# With fewer requests, only a few of them would determine a percentile.
_LEAST_FOR_P95 = 200
_LEAST_FOR_P99 = 1_000
# A unit with a larger share of an arm's requests dominates the figures of the arm.
_LARGE_SHARE = 0.1
_LEAST_FOR_SHARE = 100


class ExperimentStats:
    """Counts the requests of experiments, and writes the exposure log.

    Args:
        log: the log for exposures; the units that it already has are counted.
        keep: called with each exposure, for a second place that keeps exposures. It must not wait.
        keep_request: called with each request, for a place that keeps the counts. It must not wait.
    """

    def __init__(
        self,
        log: ExposureLog | None,
        keep: Callable[[Exposure], None] = lambda _exposure: None,
        keep_request: Callable[[RequestRecord], None] = lambda _request: None,
    ) -> None:
        self._log = log
        self._keep = keep
        self._keep_request = keep_request
        # Exposures that could not be written yet, by experiment, generation, arm, unit and whether it was answered.
        self._unwritten: dict[tuple[str, str, str, str, bool], Exposure] = {}
        self._experiments: defaultdict[str, OrderedDict[str, Generation]] = defaultdict(OrderedDict)
        # When the first unit or request of each generation arrived.
        self._began: defaultdict[str, dict[str, str]] = defaultdict(dict)
        if log is not None:
            self.add(read_exposures(log.files()))

    def add(self, exposures: Iterable[Exposure]) -> None:
        """Count the units of a log."""
        for exposure in exposures:
            self.begin(exposure)
            self._generation(exposure.experiment, exposure.generation).expose(exposure)

    def begin(self, exposure: Exposure) -> None:
        """Note the generation of an exposure without counting its unit: a later generation is tested more strictly."""
        began = self._began[exposure.experiment]
        began[exposure.generation] = min(exposure.time, began.get(exposure.generation, exposure.time))

    def stored_version(self, experiment: str, generation: str) -> int:
        """Return the version of the stored counts that the counts of a generation include; -1 without them."""
        counted = self._experiments.get(experiment, OrderedDict()).get(generation)
        return -1 if counted is None else counted.stored_version

    def restore(self, experiment: Experiment, generation: str, counts: Generation, version: int) -> None:
        """Replace the counts of requests by those of all processes, which include the requests of this one."""
        total = sum(arm.weight for arm in experiment.arms)
        counted = self._generation(experiment.id, generation)
        counted.adopt(counts, {arm.label: arm.weight / total for arm in experiment.arms})
        counted.stored_version = version

    def record(self, request: RequestRecord) -> None:
        """Count one request, and log it if it is the first of its unit in an arm, or the first that is answered."""
        generation = self._generation(request.experiment, request.generation)
        if not request.is_counted:
            generation.uncounted[request.reason] += 1
            self._keep_request(request)
            return
        is_cut = generation.record(request)
        self._keep_request(replace(request, is_cut=is_cut))
        if request.unit is not None:
            self._expose(request, request.unit, generation)

    def _expose(self, request: RequestRecord, unit: str, generation: Generation) -> None:
        """Count a unit, and write it to the log if it is new or could not be written before."""
        key = (request.experiment, request.generation, request.arm, unit)
        arm, is_answered = generation.arms[request.arm], request.error_code is None
        exposure = None
        if int(unit, 16) not in arm.units or (is_answered and int(unit, 16) in arm.unanswered):
            exposure = Exposure(
                now(),
                *key,
                request.model,
                request.space,
                request.share,
                request.source,
                answered=is_answered,
                declared=request.declared,
            )
            if not generation.expose(exposure):
                return  # the set is full
            self._keep(exposure)
        elif self._unwritten:
            exposure = self._unwritten.pop((*key, False), None) or self._unwritten.pop((*key, True), None)
        if exposure is None or self._log is None:
            return
        if self._log.write(exposure):
            self._write_rest(self._log)
        elif len(self._unwritten) < _MAX_UNWRITTEN:
            self._unwritten[*key, exposure.answered] = exposure

    def _write_rest(self, log: ExposureLog, num_most: int = _MAX_WRITTEN_AT_ONCE) -> None:
        """Write exposures that could not be written before: only a few at a time, since a request waits."""
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
            since: when the experiment was first served with these weights; ``None`` for the time of its first counted
                request.
        """
        generations = self._experiments.get(experiment.id, OrderedDict())
        counted = generations.get(generation) or Generation(since or now())
        total = sum(arm.weight for arm in experiment.arms)
        arms = [
            _report(arm.label, arm.model, arm.weight, arm.weight / total, counted.arms.get(arm.label, ArmCounts()))
            for arm in experiment.arms
        ]
        began = self._began.get(experiment.id, {})
        number = 1 + sum(time < began.get(generation, "") for time in began.values())
        sample_ratio, request_ratio = _ratios(experiment, arms, counted, number)
        mismatch = sample_ratio.mismatch or (request_ratio is not None and request_ratio.mismatch)
        return ExperimentReport(
            **dict(describe_experiment(experiment)),
            generation=generation,
            since=min(since or counted.since, counted.since),
            units_since=counted.units_since,
            evidence=arms,
            guardrails=[
                guardrail.model_copy(update={"verdict": "not compared"}) if mismatch else guardrail
                for arm in arms[1:]
                if arm.share and arms[0].share
                for guardrail in guardrails(
                    arm.arm,
                    counted.arms.get(arms[0].arm, ArmCounts()),
                    counted.arms.get(arm.arm, ArmCounts()),
                    arm.share / (arm.share + arms[0].share),
                    ALPHA / (len(arms) - 1),
                )
            ],
            uncounted=dict(counted.uncounted),
            sources=[
                UnitSource(source=name, units=source.units, requests=source.requests)
                for name, source in counted.sources.items()
            ],
            sample_ratio=sample_ratio,
            request_ratio=request_ratio,
            outcomes=None,
            mismatch=mismatch,
            warnings=[
                *_warn_of_no_units(experiment, sum(arm.requests for arm in arms), counted.uncounted),
                *_warn_of_large_units(arms),
            ],
        )

    def units_over_time(self, experiment: Experiment, generation: str, step: Step) -> UnitsOverTime:
        """Return when the units arrived under the current weights."""
        counted = self._experiments.get(experiment.id, OrderedDict()).get(generation)
        arrived = {} if counted is None else counted.arrivals.by(step)
        labels = [arm.label for arm in experiment.arms]
        total = sum(arm.weight for arm in experiment.arms)
        return UnitsOverTime(
            experiment=experiment.id,
            generation=generation,
            step=step,
            arms=labels,
            expected=[arm.weight / total for arm in experiment.arms],
            data=[
                UnitsAtTime(time=time.isoformat(), units=[by_arm.get(label, 0) for label in labels])
                for time, by_arm in arrived.items()
            ],
        )

    def _generation(self, experiment: str, generation: str) -> Generation:
        generations = self._experiments[experiment]
        if generation not in generations:
            generations[generation] = Generation(now())
            self._began[experiment].setdefault(generation, generations[generation].since)
            if len(generations) > _MAX_GENERATIONS:
                generations.popitem(last=False)
        generations.move_to_end(generation)
        return generations[generation]


def _ratios(
    experiment: Experiment, arms: list[ArmReport], counted: Generation, number: int
) -> tuple[SampleRatio, SampleRatio | None]:
    """Return the tests of the units, and of the requests without a unit if these are split too.

    Args:
        number: the number of the generation.
    """
    is_random = experiment.kind == "same_space"
    num_tests = (1 + is_random) * num_tests_of(number)
    units_by_arm = {arm.arm: arm.units for arm in arms}
    if counted.is_full and counted.is_ratio_known:
        units_by_arm |= counted.unit_ratio.counts  # the counts from before an arm was full
    units = check_sample_ratio(
        [ArmCount(arm.arm, units_by_arm[arm.arm], arm.share, arm.requests, arm.server_errors) for arm in arms],
        counted.unit_ratio.largest_log_e if counted.is_ratio_known else None,
        num_tests=num_tests,
        note=f"units are counted up to {MAX_UNITS:,} per arm" if counted.is_full else "",
    )
    if not is_random:
        return units, None
    counts = [
        ArmCount(arm.arm, counted.arms.get(arm.arm, ArmCounts()).random_requests, arm.share, arm.requests)
        for arm in arms
    ]
    requests = check_sample_ratio(counts, counted.request_ratio.largest_log_e, of="requests", num_tests=num_tests)
    return units, requests


def _report(label: str, model: str, weight: float, share: float, arm: ArmCounts) -> ArmReport:
    num_errors = arm.errors.total()
    latency = arm.latency
    shown: dict[Literal["p50_s", "p95_s", "p99_s"], float] = {"p50_s": 0.5}
    shown |= {"p95_s": 0.95} if len(latency) >= _LEAST_FOR_P95 else {}
    shown |= {"p99_s": 0.99} if len(latency) >= _LEAST_FOR_P99 else {}
    return ArmReport(
        arm=label,
        model=model,
        weight=weight,
        share=share,
        units=len(arm.units),
        unanswered_units=len(arm.unanswered),
        requests=arm.requests,
        errors=num_errors,
        error_rate=num_errors / arm.requests if arm.requests else 0.0,
        server_errors=arm.server_errors,
        client_errors=num_errors - arm.server_errors,
        errors_by_code=dict(arm.errors.most_common()),
        texts=arm.texts,
        tokens=arm.tokens,
        tokens_per_s=arm.tokens / arm.seconds if arm.seconds else None,
        p50_s=latency.quantile(0.5),
        p95_s=latency.quantile(0.95) if "p95_s" in shown else None,
        p99_s=latency.quantile(0.99) if "p99_s" in shown else None,
        at_least=[name for name, share in shown.items() if latency.is_least(share)],
        queue_p95_s=arm.queue.quantile(0.95) if len(arm.queue) >= _LEAST_FOR_P95 else None,
        largest_unit_share=arm.largest / arm.requests if arm.largest else None,
    )


def _warn_of_no_units(experiment: Experiment, num_counted: int, uncounted: Mapping[str, int]) -> Iterator[str]:
    """Warn if most requests have no unit: the control arm answers them, and nothing is split."""
    num_without = uncounted.get("no_unit", 0)
    if not num_without or num_without < num_counted:
        return
    how_many = f"all {num_without:,}" if not num_counted else f"{num_without:,} of {num_without + num_counted:,}"
    sources = ", ".join(f"`{source}`" for source in experiment.unit)
    yield (
        f"{how_many} requests had no unit, so the control arm {experiment.control.label!r} answered them and they are not "
        f"counted: a unit is made from {sources}, and these requests have none of them"
    )


def _warn_of_large_units(arms: list[ArmReport]) -> Iterator[str]:
    """Warn of a unit that dominates an arm's figures, such as a service's key that all of its users share."""
    for arm in arms:
        if arm.requests >= _LEAST_FOR_SHARE and (arm.largest_unit_share or 0) > _LARGE_SHARE:
            yield (
                f"a single unit sent {arm.largest_unit_share:.0%} of the {arm.requests:,} requests of arm {arm.arm!r}, and "
                f"decides its latency and errors: if many users share it, such as a service's key, send the id of each "
                "user"
            )
