"""The tests of ``tests/api/test_tei.py`` that see the requests and answers of a model, behind connections to replicas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from gateway.fleet import Model
from tests.api.conftest import *  # noqa: F403  its fixtures
from tests.api.test_tei import (  # noqa: F401  its tests
    sparse_model,
    test_a_backend_that_cannot_tell_its_tokens,
    test_decode_is_the_way_back,
    test_embed,
    test_embed_all,
    test_embed_all_has_its_own_limit,
    test_embed_sparse,
    test_errors_of_the_backend,
    test_headers_have_the_time_and_tokens_of_a_request,
    test_many_at_a_time_each_get_their_own_tokens,
    test_similarity_is_the_cosine,
    test_states_are_in_their_own_space,
    test_token_ids_of_the_model_are_read_as_their_text,
    test_tokenize_returns_each_token_s_position,
    test_tokenize_with_a_prompt,
    test_tokenize_without_special_tokens,
    test_truncate_false_refuses_a_long_text,
)
from tests.cluster.wired import wired, wires  # noqa: F401  a fixture


@pytest.fixture
def make_model(make_model: Callable[..., Model], wires: AsyncExitStack) -> Callable[..., Model]:  # noqa: F811
    """Return a function that makes models behind connections."""
    return wired(make_model, wires)
