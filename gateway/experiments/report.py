"""What a gateway reports on its experiments: values, and at the same time the JSON of its API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.config.registry import Experiment
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
    """One arm in figures: of the requests that were counted, since this process started."""

    arm: str
    model: str
    weight: float
    share: float = Field(description="The share of the units that the weight asks for.")
    units: int = Field(description="Distinct units, with those of the exposure log.")
    requests: int = Field(description="Requests that were counted for the experiment, errors included.")
    errors: int
    error_rate: float
    texts: int
    tokens: int
    tokens_per_s: float | None = Field(
        description="Mean tokens of a request divided by its mean time: the rate that a single client would see."
    )
    p50_s: float | None = Field(description="Of requests without an error, like the other times; `null` without any.")
    p95_s: float | None
    p99_s: float | None
    queue_p95_s: float | None


class ExperimentReport(ExperimentCard):
    """An experiment, and the figures of its arms under their present weights."""

    generation: str = Field(description="Identifies salt, arms and weights; counts begin again with each.")
    since: str = Field(description="When this process began to count requests under these arms and weights.")
    units_since: str | None = Field(
        description="When the first of the units was seen: earlier, if there is an exposure log."
    )
    evidence: Sequence[ArmReport]
    uncounted: Mapping[str, int] = Field(description="Requests outside the split, by reason.")
    sample_ratio: SampleRatio
    warning: str | None = Field(
        description="Why the figures are meaningless, if a reason is known: for example, that no request has a unit."
    )


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
