"""The paths for TEI's clients take every request that TEI's contract allows, and answer as the contract requires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Alias, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet, Model
from gateway.types import LabelFunction, ModelKind, ModelState, Output
from tests.tei_contract import ANSWERS, REQUESTS, document, validate_answer


def make_app() -> FastAPI:
    """Return a gateway with a model that embeds in every way, one that reranks and one that classifies."""
    fields = {"outputs": (Output.DENSE, Output.SPARSE), "dimensions": (8, 4)}
    models = []
    labels = {"labels": ("a", "b"), "label_function": LabelFunction.SOFTMAX, "kind": ModelKind.CLASSIFY}
    for info in (
        fake_info("mini", **fields),
        fake_info("ranker", width=1, kind=ModelKind.RERANK),
        fake_info("labeler", width=2, **labels),
    ):
        backend = FakeBackend(info)
        asyncio.run(backend.start())
        entry = ModelEntry(id=info.id, source=info.source, revision="0" * 40, enabled=True)
        models.append(Model(entry, backend, ModelState.READY, info))
    fleet = Fleet(models)
    fleet.started.set()
    registry = Registry(
        path=Path("models.yaml"),
        version=1,
        models=tuple(model.entry for model in models),
        aliases={"default": Alias(name="default", model="mini")},
    )
    return create_app(Deployment(registry, Settings(), fleet))


APP = make_app()
OF_PATHS = {"/rerank": "ranker", "/predict": "labeler"}
PLACES: dict[str, Callable[[str], str]] = {
    "root": lambda path: path,
    "model": lambda path: f"/tei/{OF_PATHS.get(path, 'mini')}{path}",
}
MODES = schemathesis.GenerationMode
generation = GenerationConfig(modes=list(MODES), deterministic=True, database="none")
CONFIG = SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=generation)), seed=1)
# The routes at the root have the handlers of those of a model.
bounded = {
    where: settings(max_examples=num_examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for where, num_examples in {"root": 20, "model": 60}.items()
}


def operation(path: str, where: str) -> Any:
    schema = schemathesis.openapi.from_dict(document(PLACES[where]), config=CONFIG)
    schema.app = APP
    [found] = [one for result in schema.get_all_operations() if (one := result.ok()).path == PLACES[where](path)]
    return found


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("path", ANSWERS)
def test_requests_that_the_contract_allows_are_answered(path: str, where: str) -> None:
    """Or it is refused because of sizes and prompts that only the model determines."""
    statuses = set()

    @bounded[where]
    @given(case=operation(path, where).as_strategy(generation_mode=MODES.POSITIVE))
    def check(case: schemathesis.Case) -> None:
        response = case.call()
        statuses.add(response.status_code)
        validate_answer(path, response.status_code, response.json())
        # In JSON Schema, 1.0 is an integer; TEI and the gateway reject it.
        if response.status_code == 422 and not has_float(case.body):
            assert any(word in response.json()["error"] for word in ("`dimensions`", "task")), (
                case.body,
                response.text,
            )

    check()
    assert 200 in statuses
    assert statuses <= {200, 400, 422}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("path", REQUESTS)
def test_requests_that_the_contract_forbids_get_tei_s_errors(path: str, where: str) -> None:
    statuses = set()

    @bounded[where]
    @given(case=operation(path, where).as_strategy(generation_mode=MODES.NEGATIVE))
    def check(case: schemathesis.Case) -> None:
        response = case.call()
        if response.status_code == 405:
            return  # another method: no request of the contract
        if (where, path) == ("root", "/rerank") and "error_type" not in response.text:
            return  # without `texts` it may be from any client that reranks
        statuses.add(response.status_code)
        validate_answer(path, response.status_code, response.json())

    check()
    assert 422 in statuses
    # Bodies that only the contract forbids may be accepted: a direction in small letters, for example.
    assert statuses <= {200, 400, 422}


def has_float(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(has_float, value.values()))
    return any(map(has_float, value)) if isinstance(value, list) else isinstance(value, float)
