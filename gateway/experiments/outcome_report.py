"""A gateway's reports on the outcomes of an experiment, which are also the JSON of its API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Report(BaseModel):
    # The schema says that a field with a default is always there.
    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)


class OutcomeArm(_Report):
    """One arm's outcome, over all weights that the experiment has had with this arm."""

    arm: str
    units: int = Field(description="Number of units in the arm, with or without outcomes.")
    units_with_outcome: int
    mean: float | None = Field(description="`per: unit`, `mean` or `ratio`, as declared; `null` without units.")
    low: float | None = Field(description="Ends of an interval that holds at any look; `null` with too few units.")
    high: float | None


class OutcomeComparison(_Report):
    """An arm against the control."""

    arm: str
    control: str
    estimate: float | None = Field(description="The arm minus the control; `null` with too few units.")
    low: float | None = Field(description="Ends of an interval that holds at any look.")
    high: float | None
    units: int = Field(description="Units of both arms that the comparison uses.")
    uses_before: bool = Field(description="Whether values from before the experiment make the interval narrower.")
    generations: int = Field(description="The number of sets of weights whose differences are combined.")
    verdict: Literal["better", "worse", "as good", "not yet"] | None = Field(
        description="Verdict of the first look that reached one; it is final. `null` without a verdict: see `reason`."
    )
    reason: str = Field(description="Reason for the verdict, or for its absence.")
    decided: str | None = Field(description="Time when the verdict was first reached.")
    units_needed: int | None = Field(
        description="Number of units in both arms that make the interval narrow enough for a difference of the margin."
    )
    look_again: str | None = Field(
        description="Time when that many units will have arrived, at the current rate. You can look earlier without harm."
    )


class OutcomeReport(_Report):
    """One outcome, arm by arm."""

    name: str
    primary: bool = Field(
        description="Whether the outcome is declared in `models.yaml`: only a declared outcome gets a verdict."
    )
    per: Literal["unit", "mean", "ratio"]
    better: Literal["more", "less"]
    margin: float | None
    outcomes: int = Field(description="Number of outcomes that were posted under this name.")
    unmatched: int = Field(
        description="Number of outcomes from units that were not in any arm before. They do not count."
    )
    arms: Sequence[OutcomeArm] = Field(description="The arms; the first is the control.")
    comparisons: Sequence[OutcomeComparison]


class OutcomesReport(_Report):
    """The outcomes of an experiment."""

    object: Literal["outcomes"] = "outcomes"
    experiment: str
    as_of: str = Field(description="Time when they were computed: at most every 10 s, and sooner for few units.")
    outcomes: Sequence[OutcomeReport] = Field(description="The outcomes, the primary one first.")
