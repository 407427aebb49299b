"""The tests of ``tests/api/test_rerank.py`` that see the requests and answers of a model, behind connections to replicas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from gateway.fleet import Model
from tests.api.conftest import *  # noqa: F403  its fixtures
from tests.api.test_rerank import (  # noqa: F401  its tests
    client,
    jobs,
    make_ranker,
    test_a_failure_of_the_model_is_reported_and_counted,
    test_a_limit_for_each_document_reaches_the_model,
    test_huge_scores_do_not_overflow,
    test_long_texts_are_cut_unless_truncate_is_false,
    test_models_and_spaces_distinguish_the_kinds,
    test_quotas_count_the_tokens_of_all_pairs,
    test_the_answer_has_the_fields_of_every_client,
    test_the_cut_texts_reach_the_model,
)
from tests.cluster.wired import wired, wires  # noqa: F401  a fixture


@pytest.fixture
def make_model(make_model: Callable[..., Model], wires: AsyncExitStack) -> Callable[..., Model]:  # noqa: F811
    """Return a function that makes models behind connections."""
    return wired(make_model, wires)
