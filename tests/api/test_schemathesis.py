"""The gateway follows its own OpenAPI schema, for all kinds of requests that the schema allows."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.config import (
    ChecksConfig,
    GenerationConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.specs.openapi.checks import negative_data_rejection

from gateway.app import create_app
from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import Alias, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.fleet import Fleet, Model
from gateway.types import ModelKind, ModelState


def make_app() -> FastAPI:
    """Return a gateway with a model of each kind that is ready, and token ids that can be decoded."""
    entry = ModelEntry(id="mini", source="owner/mini", revision="0" * 40, enabled=True)
    info = fake_info("mini", dimensions=(8, 4, 2), tasks={"retrieval.query": ""}, default_task="retrieval.query")
    backend = FakeBackend(info)
    asyncio.run(backend.start())
    ranker_entry = ModelEntry(id="ranker", source="owner/ranker", revision="0" * 40, enabled=True)
    ranker_info = fake_info("ranker", width=1, kind=ModelKind.RERANK)
    ranker = FakeBackend(ranker_info)
    asyncio.run(ranker.start())
    fleet = Fleet(
        [Model(entry, backend, ModelState.READY, info), Model(ranker_entry, ranker, ModelState.READY, ranker_info)]
    )
    fleet.started.set()
    registry = Registry(
        path=Path("models.yaml"),
        version=1,
        models=(entry, ranker_entry),
        aliases={"default": Alias(name="default", model="mini")},
    )
    return create_app(Deployment(registry, Settings(), fleet))


def configure(*modes: schemathesis.GenerationMode, expected_statuses: list[str]) -> SchemathesisConfig:
    generation = GenerationConfig(modes=list(modes), deterministic=True, database="none")
    checks = ChecksConfig(positive_data_acceptance=PositiveDataAcceptanceConfig(expected_statuses=expected_statuses))
    return SchemathesisConfig(
        projects=ProjectsConfig(default=ProjectConfig(generation=generation, checks=checks)), seed=1
    )


def narrowed(app: FastAPI) -> dict[str, Any]:
    """Return the schema with the names, tasks and dimensions that only the registry knows."""
    content = copy.deepcopy(app.openapi())
    content["paths"] = {"/v1/embeddings": content["paths"]["/v1/embeddings"]}
    operation = content["paths"]["/v1/embeddings"]["post"]
    del operation["parameters"]  # the expected space: any other is refused
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    fields = body["properties"]
    for synonym in (
        "output_dimension",
        "embedding_type",
        "encoding_type",
        "output_dtype",
        "input_type",
        "prompt_name",
        "task_type",
        "normalize",
        "truncation_direction",
        "truncation",
    ):
        del fields[synonym]  # two that differ are refused
    fields["model"] = {"enum": ["mini", "default", "owner/mini", "mini:query", "", None]}
    fields["task"] = {"enum": ["retrieval.query", "query", "search_query", "", None]}
    fields["dimensions"] = {"enum": [8, 4, 2, 8.0, None]}
    fields["encoding_format"] = {"enum": ["float", "base64", "binary", "ubinary", None]}  # int8 needs measured ranges
    fields["late_chunking"] = {"enum": [False, None]}
    fields["outputs"] = {"enum": [["dense"], None]}
    _token_ids, token_id_list = fields["input"]["anyOf"][1]["items"]["anyOf"][2], fields["input"]["anyOf"][2]
    for ids in (_token_ids, token_id_list):
        ids["items"]["maximum"] = 100_255  # above it, some are missing
    return content


APP = make_app()
# The registry determines the models, tasks and dimensions: the schema allows more.
ANYTHING = configure(*schemathesis.GenerationMode, expected_statuses=["2xx", "400", "403", "404", "412", "422", "424"])
whole = schemathesis.openapi.from_asgi("/openapi.json", APP, config=ANYTHING)
RIGHT = configure(schemathesis.GenerationMode.POSITIVE, expected_statuses=["2xx"])
right = schemathesis.openapi.from_dict(narrowed(APP), config=RIGHT)
right.app = APP

# The gateway accepts more than the schema, such as "true" for true: test_lax_bodies.py and test_contract.py test that.
TOO_STRICT = [negative_data_rejection]
bounded = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def operations(schema: schemathesis.BaseSchema, *modes: schemathesis.GenerationMode) -> list[object]:
    """Return the operations of a schema with the requests to send, each a parameter with its own name.

    The names of schemathesis's own parametrization are all the same, and a test that runs next to others needs a name.
    """
    found = [result.ok() for result in schema.get_all_operations()]
    return [
        pytest.param(st.one_of(operation.as_strategy(generation_mode=mode) for mode in modes), id=operation.label)
        for operation in found
    ]


@pytest.mark.parametrize("cases", operations(whole, *schemathesis.GenerationMode))
def test_every_answer_is_as_the_schema_says(cases: st.SearchStrategy[schemathesis.Case]) -> None:
    check_answers(cases)


@pytest.mark.parametrize("cases", operations(right, schemathesis.GenerationMode.POSITIVE))
def test_every_request_that_the_schema_allows_is_embedded(cases: st.SearchStrategy[schemathesis.Case]) -> None:
    check_answers(cases)


def check_answers(cases: st.SearchStrategy[schemathesis.Case]) -> None:
    @bounded
    @given(case=cases)
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=TOO_STRICT)

    check()
