"""What cannot stand together: models that embed and models that rerank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gateway.backends.fleet import Fleet, Model
from gateway.config.registry import Arm, Experiment, Registry, Shadow
from gateway.embedding import ModelKind
from gateway.routing.rules import broken_rules, name_spaces

MakeModel = Callable[..., Model]
Put = Callable[..., tuple[Registry, Fleet]]


@pytest.fixture
def put(make_model: MakeModel) -> Put:
    """Return a function that puts two models of each kind together with what refers to them."""
    ranks = {"kind": ModelKind.RERANK, "width": 1, "dimensions": (1,), "is_normalised": False}
    models = [make_model("mini"), make_model("other"), make_model("ranker", **ranks), make_model("better", **ranks)]

    def put(
        arms: Sequence[str] = (), shadows: Sequence[Shadow] = (), fallbacks: dict[str, tuple[str, ...]] | None = None
    ) -> tuple[Registry, Fleet]:
        experiments = []
        if arms:
            known = tuple(Arm(model=model, weight=1) for model in arms)
            unit = {"from": ("api_key",)}
            experiments.append(Experiment(id="exp", kind="cross_space", unit=unit, salt="s", arms=known))
        registry = Registry(
            path=Path("models.yaml"),
            version=1,
            models=tuple(model.entry for model in models),
            experiments=tuple(experiments),
            shadows=tuple(shadows),
            fallbacks=fallbacks or {},
        )
        return registry, Fleet(models)

    return put


@pytest.mark.parametrize("arms", [("mini", "other"), ("ranker", "better")])
def test_arms_of_one_kind_are_fine(put: Put, arms: tuple[str, ...]) -> None:
    assert broken_rules(*put(arms)) == []


def test_arms_of_two_kinds_are_not(put: Put) -> None:
    assert broken_rules(*put(("mini", "ranker"))) == [
        "the arms of experiment 'exp' compute different things: 'mini' is for embed, 'ranker' is for rerank"
    ]


def test_a_reranker_shadows_nobody(put: Put) -> None:
    shadow = Shadow(of="mini", to="ranker", sample=1.0)

    assert broken_rules(*put(shadows=[shadow])) == [
        "'ranker' cannot be a shadow of 'mini': it reranks, and only embeddings are copied"
    ]


def test_a_model_of_the_other_kind_is_no_fallback(put: Put) -> None:
    [problem] = broken_rules(*put(fallbacks={"ranker": ("mini",)}))

    assert problem.startswith("'mini' cannot be a fallback of 'ranker': ")


def test_a_reranker_has_no_space_to_keep(put: Put) -> None:
    spaces = name_spaces(*put())

    assert {name for name in spaces if "/" not in name} == {"mini", "other"}
