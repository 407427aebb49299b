"""The tests of ``tests/api/test_contract.py`` that see the requests and answers of a model, behind connections to "
"replicas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from gateway.fleet import Model
from tests.api.conftest import *  # noqa: F403  its fixtures
from tests.api.test_contract import (  # noqa: F401  its tests
    test_a_task_of_any_name_fits_into_a_header,
    test_a_text_that_must_not_be_truncated_is_refused,
    test_an_answer_has_exactly_the_fields_of_openai,
    test_equal_requests_get_equal_bytes,
    test_every_form_of_truncate_reaches_the_model,
    test_every_text_that_json_can_hold_is_embedded,
    test_server_timing_has_every_stage_in_milliseconds,
    test_the_list_of_truncated_texts_fits_into_a_header,
    test_truncated_texts_are_counted_as_they_were_embedded_and_listed,
    test_without_a_task_the_default_of_the_model_is_used,
)
from tests.cluster.wired import wired, wires  # noqa: F401  a fixture


@pytest.fixture
def make_model(make_model: Callable[..., Model], wires: AsyncExitStack) -> Callable[..., Model]:  # noqa: F811
    """Return a function that makes models behind connections."""
    return wired(make_model, wires)
