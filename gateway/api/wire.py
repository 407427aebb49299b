"""The wire types that all dialects share. OpenAPI is generated from them."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict

from gateway.errors import BadInput, InternalError, RequestError, Unauthorized


class AnswerBody(BaseModel):
    """The base of response models: in the schema, a field with a default is always present."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class Usage(BaseModel):
    """The model's own tokens, after truncation."""

    prompt_tokens: int
    total_tokens: int


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error has this body: three forms of one message, so that each kind of client shows it."""

    error: ErrorDetail
    detail: str
    message: str


# ------------------------------------------------------------------------------------------------------------ routes

Responses: TypeAlias = "dict[int | str, dict[str, Any]]"


def _header(description: str, *, is_required: bool = True, **schema: object) -> dict[str, Any]:
    return {"description": description, "required": is_required, "schema": {"type": "string", **schema}}


_REQUEST_ID = {"x-request-id": _header("The id that was sent, or a new one; also in the log.", minLength=1)}
_RETRY_AFTER = _header("Seconds after which a retry makes sense.", is_required=False, pattern=r"^\d{1,3}$")
_ERROR_HEADERS = {
    401: {"www-authenticate": _header("`Bearer`.", const="Bearer")},
    429: {"retry-after": _RETRY_AFTER},
    500: {"x-should-retry": _header("`false`: a retry cannot help.", is_required=False, const="false")},
    503: {
        "retry-after": _RETRY_AFTER,
        "x-should-retry": _header("`false`: a retry cannot help.", is_required=False, const="false"),
    },
}

RERANK_HEADERS = {
    "x-gateway-model": _header("Id of the model that answered."),
    "x-gateway-experiment": _header("The experiment, if one was requested.", is_required=False),
    "x-gateway-arm": _header("The arm of the experiment that answered.", is_required=False),
    "x-gateway-assignment": _header(
        "The reason for the arm: `unit`, `random`, `forced`, `excluded`, `no_unit`, `not_started` or `ended`.",
        is_required=False,
    ),
    "x-gateway-truncated": _header(
        "Indices of the texts that were cut, such as `0,3`; beyond 100, how many more there are.",
        is_required=False,
        pattern=r"^\d+(,\d+)*(,\+\d+)?$",
    ),
    "server-timing": _header("Milliseconds of tokenize, queue, inference and total."),
}

EMBEDDINGS_HEADERS = {
    **RERANK_HEADERS,
    "x-gateway-space": _header("Identity of the vectors' space.", pattern="^[A-Za-z0-9._-]+@[0-9a-f]{12}$"),
    "x-gateway-cache": _header(
        "How many of the texts had been embedded before, such as `3/32`, for a model with a cache.",
        is_required=False,
        pattern=r"^\d+/\d+$",
    ),
    "x-gateway-task": _header("The task, if the model has any.", is_required=False),
}

EXPECT_SPACE = {
    "name": "x-gateway-expect-space",
    "in": "header",
    "required": False,
    "description": "Return a 412 instead of vectors of another space.",
    "schema": {"type": "string"},
}


@cache
def request_body(body: type[BaseModel]) -> dict[str, Any]:
    """Describe the body of an operation whose handler reads the body."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


def responses(
    model: type[BaseModel],
    *errors: type[RequestError],
    headers: dict[str, dict[str, Any]] | None = None,
) -> Responses:
    """Describe the responses of an operation: 200, and each possible error."""
    described = error_responses(*errors)
    return {200: {"model": model, "headers": {**_REQUEST_ID, **(headers or {})}}, **described}


def error_responses(*errors: type[RequestError]) -> Responses:
    """Describe the errors of an operation, including those of every operation."""
    # Any operation refuses a request with a header that cannot be valid, such as an unknown priority.
    possible: tuple[type[RequestError], ...] = (BadInput, *errors, Unauthorized, InternalError)
    return {
        error.status: {
            "model": ErrorBody,
            "description": (error.__doc__ or "").partition("\n")[0],
            "headers": {**_REQUEST_ID, **_ERROR_HEADERS.get(error.status, {})},
        }
        for error in possible
    }
