"""A gateway's reports on its experiments, which are also the JSON of its API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.config.registry import Experiment
from gateway.experiments.outcome_report import OutcomesReport
from gateway.experiments.sample_ratio import SampleRatio


class _Report(BaseModel):
    # The schema says that a field with a default is always there.
    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)


class ArmCard(_Report):
    """One arm as the registry has it."""

    arm: str
    model: str
    task: str | None
    weight: float


class ExperimentCard(_Report):
    """One experiment as the registry has it."""

    id: str
    object: Literal["experiment"] = "experiment"
    kind: str
    start: str | None
    end: str | None
    running: bool = Field(description="Whether requests are split now; otherwise the first arm answers all.")
    arms: Sequence[ArmCard] = Field(description="The first is the control.")


class ExperimentList(_Report):
    """Every experiment of the registry."""

    object: Literal["list"] = "list"
    data: Sequence[ExperimentCard]


class ArmReport(_Report):
    """One arm in figures: of the requests that were counted since `since`."""

    arm: str
    model: str
    weight: float
    share: float = Field(description="The share of the units that the weight gives to the arm.")
    units: int = Field(description="Number of distinct units, including those of the exposure log.")
    requests: int = Field(description="Number of requests that were counted for the experiment, errors included.")
    unanswered_units: int = Field(description="Number of units that have only had errors.")
    errors: int
    error_rate: float
    server_errors: int = Field(
        description="Errors through no fault of the client: 5xx, a full queue, and clients that hung up."
    )
    client_errors: int = Field(description="Other errors: 4xx, which a client's mistake causes in any arm.")
    errors_by_code: Mapping[str, int]
    texts: int
    tokens: int
    tokens_per_s: float | None = Field(
        description="Mean tokens of a request divided by its mean time: the rate that a single client would see."
    )
    p50_s: float | None = Field(
        description="Latency of answered requests, and of requests that timed out, that failed on the server after more "
        "than the median latency, or that their client gave up: these would have taken longer. Percentiles describe the "
        "requests of the arm; to compare arms, see `guardrails`."
    )
    p95_s: float | None = Field(description="`null` below 200 requests.")
    p99_s: float | None = Field(description="`null` below 1,000 requests.")
    at_least: Sequence[Literal["p50_s", "p95_s", "p99_s"]] = Field(
        description="The percentiles that would be longer if no request had ended early."
    )
    queue_p95_s: float | None
    largest_unit_share: float | None = Field(description="The largest share of the requests that a single unit has.")


class Guardrail(_Report):
    """The difference of an arm from the control in something that should not suffer."""

    metric: Literal["latency", "errors"]
    arm: str
    estimate: float | None = Field(
        description="`latency`: time in this arm divided by that in the control, for texts of equal length. `errors`: "
        "difference of the share of requests with a server error. Each unit counts once. `null` with too few units."
    )
    low: float | None = Field(description="Ends of an interval that holds at any look.")
    high: float | None
    units: int = Field(description="Units of both arms; requests without a unit count as one each. The first 200,000.")
    least_units: int = Field(description="Minimum number of units in each arm for a verdict.")
    verdict: Literal["worse", "better", "no difference found", "not yet", "not compared"] = Field(
        description="`not compared`: there is a sample ratio mismatch, so the arms may have different kinds of units."
    )


class UnitSource(_Report):
    """One of the places that units come from."""

    source: str
    units: int
    requests: int


class ExperimentReport(ExperimentCard):
    """An experiment, and the figures of its arms under their present weights."""

    generation: str = Field(description="Hash of salt, arms and weights; counts begin again when it changes.")
    since: str = Field(
        description="Time when the count of requests, latencies and errors under these arms and weights began. With "
        "`GATEWAY_STATE_DIR`, they include those of earlier runs and of all processes that share the folder; without it, "
        "only those of this process."
    )
    units_since: str | None = Field(
        description="Time when the first unit was seen: earlier, if there is an exposure log."
    )
    evidence: Sequence[ArmReport]
    guardrails: Sequence[Guardrail] = Field(description="Two guardrails for each arm except the control.")
    uncounted: Mapping[str, int] = Field(description="Number of requests outside the split, by reason.")
    sources: Sequence[UnitSource]
    sample_ratio: SampleRatio
    request_ratio: SampleRatio | None = Field(
        description="The test of the requests without a unit, which a `same_space` experiment splits at random; `null` for "
        "`cross_space`."
    )
    outcomes: OutcomesReport | None = Field(
        description="The outcomes of the units; `null` if the gateway keeps no outcomes (`GATEWAY_STATE_DIR`)."
    )
    mismatch: bool = Field(
        description="Whether one of the two found a mismatch: no comparison of the arms can be trusted."
    )
    warnings: Sequence[str] = Field(
        description="Reasons why the figures may be meaningless: no request has a unit, or one unit has most of the "
        "requests."
    )


class UnitsAtTime(_Report):
    """The units that arrived in an hour or a day."""

    time: str = Field(description="Start of the hour or day, in UTC. Times without a new unit are left out.")
    units: Sequence[int] = Field(description="New units of each arm, in the order of `arms`.")


class UnitsOverTime(_Report):
    """When the units of an experiment arrived, under its present weights."""

    object: Literal["units"] = "units"
    experiment: str
    generation: str
    step: Literal["hour", "day"]
    arms: Sequence[str]
    expected: Sequence[float] = Field(description="The share of the units that the weights give to each arm.")
    data: Sequence[UnitsAtTime] = Field(description="The last 92 days, earliest first.")


def describe_experiment(experiment: Experiment) -> ExperimentCard:
    """Return the card of an experiment."""
    return ExperimentCard(
        id=experiment.id,
        kind=experiment.kind,
        start=experiment.start.isoformat() if experiment.start else None,
        end=experiment.end.isoformat() if experiment.end else None,
        running=is_running(experiment),
        arms=[ArmCard(arm=arm.label, model=arm.model, task=arm.task, weight=arm.weight) for arm in experiment.arms],
    )


def is_running(experiment: Experiment) -> bool:
    """Return whether an experiment splits its requests now, rather than answering all with the control arm."""
    time = datetime.now(UTC)
    has_started = experiment.start is None or time >= experiment.start
    return has_started and (experiment.end is None or time < experiment.end)
