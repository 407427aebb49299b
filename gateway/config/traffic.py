"""The distribution of requests over the models of ``models.yaml``: aliases, experiments, shadows."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from gateway.config.capture import Capture
from gateway.config.fields import (
    Distinct,
    ExperimentName,
    Frozen,
    HeaderSource,
    Listed,
    Name,
    NonEmptyText,
    OutcomeName,
    Positive,
    RequestValue,
    Time,
    unwrap_sources,
)
from gateway.config.wording import quote

MAX_WEIGHT = 1_000_000
"""The largest weight of an arm."""


class Alias(Frozen):
    """Another name for a model, or for one of its tasks."""

    name: str = Field(exclude=True, description="Name of the alias: its key in `aliases`.")
    model: str = Field(description="The id of the model; not another alias.")
    task: NonEmptyText | None = Field(
        default=None, description="Task of requests under this name. By default the model's `default_task`."
    )
    allow_space_change: bool = Field(
        default=False,
        description="Whether a reload may move this name to another space. Only if nothing is stored in the old space.",
    )
    capture: Capture | None = Field(
        default=None,
        description="A sample of the queries under this name, kept for a comparison of models. By default none.",
    )


class Arm(Frozen):
    """One of the models that an experiment chooses from."""

    name: Name | None = Field(
        default=None,
        description="Name of the arm in headers, metrics and reports. By default its model's id. Renaming an arm reassigns "
        "its units.",
    )
    model: str = Field(description="The id of the model; not an alias.")
    task: NonEmptyText | None = Field(
        default=None, description="Task of requests in this arm. By default the task of the request."
    )
    weight: Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)] = Field(
        description="Share of the units that get this arm, in proportion to the sum of all weights. 0: none."
    )

    @property
    def label(self) -> str:
        """The name of the arm."""
        return self.name or self.model


Units: TypeAlias = Annotated[Distinct[RequestValue], BeforeValidator(unwrap_sources)]


class Outcome(Frozen):
    """The one outcome by which an experiment is decided."""

    name: OutcomeName = Field(description="Name under which the application posts it, such as `kept`.")
    per: Literal["unit", "mean", "ratio"] = Field(
        default="unit",
        description="`unit`: the sum of a unit's values, 0 without any (conversions). `mean`: the mean of each unit, "
        "`value` / `of`, of units with an outcome (ratings). `ratio`: all values / all chances `of` (clicks per search).",
    )
    better: Literal["more", "less"] = Field(default="more", description="Whether higher or lower values are better.")
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.01,
        description="The largest difference that does not matter, in the unit of the outcome: arms that differ by "
        "less are as good as each other. Fix it before the experiment begins.",
    )


class Experiment(Frozen):
    """A name under which requests are split between models."""

    id: ExperimentName = Field(
        description="Name that clients send as `model`. It must not be the name of a model or an alias."
    )
    kind: Literal["same_space", "cross_space"] = Field(
        description="`same_space`: the arms' vectors are in one space, and requests without a unit are split at random. "
        "`cross_space`: they are not, so each unit stays with one arm, and requests without a unit get the first "
        "arm."
    )
    unit: Units = Field(
        default=(),
        validate_default=True,
        description="The unit that is assigned to an arm, as `{from: [...]}`: the first of these that a request has: "
        "`model` (written after the id, as in `search/UNIT`), `header:NAME`, `body:user`, `api_key`.",
    )
    salt: NonEmptyText | None = Field(
        default=None,
        description="Text that assignments are derived from, together with the unit. By default the id. A different salt "
        "reshuffles all units.",
    )
    start: Time | None = Field(
        default=None,
        description="Start of the split, such as `2026-11-01T00:00:00Z`; before it, the first arm answers.",
    )
    end: Time | None = Field(default=None, description="End of the split; from then on, the first arm answers.")
    counts_from: Time | None = Field(
        default=None,
        description="Start of the counts: requests and outcomes before it are left out of all figures. Units stay in their "
        "arms. Set it after you repaired a fault that made the figures wrong.",
    )
    force: HeaderSource | None = Field(
        default=None,
        description="`header:NAME` of a header that names the arm to use, for testers. Such requests are not counted.",
    )
    exclude: Distinct[NonEmptyText] = Field(
        default=(), description="Units that get the first arm and are not counted, such as your own staff."
    )
    allow_space_change: bool = Field(
        default=False,
        description="Whether a reload may move an experiment of kind `same_space` to another space. Only if nothing is "
        "stored in the old space.",
    )
    capture: Capture | None = Field(
        default=None,
        description="A sample of the queries under this name, kept for a comparison of models. By default none.",
    )
    outcome: Outcome | None = Field(
        default=None, description="The outcome by which the arms are compared. Needs `GATEWAY_STATE_DIR`."
    )
    arms: Listed[Arm] = Field(description="Models to choose from, at least two. The first is the control.")

    @property
    def control(self) -> Arm:
        """The arm that answers requests outside the split."""
        return self.arms[0]

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if len(arms) < 2:
            raise ValueError("must have at least two arms, got one")
        labels = [arm.label for arm in arms]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"has two arms called {quote(label)}; give one of them another `name`")
        if not any(arm.weight > 0 for arm in arms):
            raise ValueError("has no arm with a weight above 0")
        return arms

    @field_validator("end")
    @classmethod
    def _check_end(cls, end: datetime | None, info: ValidationInfo) -> datetime | None:
        start: datetime | None = info.data.get("start")
        if start is not None and end is not None and end <= start:
            raise ValueError(f"must be later than `start`, which is {start.isoformat()}, got {end.isoformat()}")
        return end

    @field_validator("unit")
    @classmethod
    def _check_unit(cls, unit: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not unit and info.data.get("kind") == "cross_space":
            raise ValueError("is needed for `kind: cross_space`: without a unit, no client could stay with its arm")
        return unit


class Shadow(Frozen):
    """A copy of some traffic to a second model, whose vectors are discarded."""

    of: str = Field(
        description="Source of the traffic: a model's id, an alias or an experiment. A model's id covers every request that "
        "the model answers."
    )
    to: str = Field(description="Id of the model that receives the copies.")
    sample: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Fraction of the requests that is copied."
    )
    max_queue: Positive = Field(
        default=200, description="Maximum number of requests waiting for the second model; further ones are dropped."
    )
