"""Experiments and requests of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from gateway.config.registry import Arm, Experiment
from gateway.experiments.arms import RequestRecord

MakeExperiment = Callable[..., Experiment]
MakeRecord = Callable[..., RequestRecord]

_RECORD = RequestRecord(
    experiment="exp",
    generation="aaaaaaaa",
    arm="a",
    reason="unit",
    is_counted=True,
    unit=None,
    model="model-a",
    space="model-a@0123456789ab",
    elapsed_s=0.1,
    share=0.5,
    source="header:x-unit",
    num_texts=2,
    num_characters=40,
    num_tokens=10,
    queue_s=0.01,
)


@pytest.fixture
def make_experiment() -> MakeExperiment:
    """Return a function that makes an experiment with arms `a`, `b`, … of some weights."""

    def make(*weights: float, **fields: Any) -> Experiment:
        arms = tuple(Arm(name=name, model=f"model-{name}", weight=w) for name, w in zip("abc", weights, strict=False))
        return Experiment(**{"id": "exp", "kind": "same_space", "unit": ("header:x-unit",), "arms": arms, **fields})

    return make


@pytest.fixture
def make_record() -> MakeRecord:
    """Return a function that makes a request that was answered; `unit` is a number."""

    def make(unit: int | None = None, **fields: object) -> RequestRecord:
        return dataclasses.replace(_RECORD, unit=None if unit is None else f"{unit:016x}", **fields)

    return make
