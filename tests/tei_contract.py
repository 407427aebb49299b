"""TEI's HTTP contract, written by hand from the OpenAPI document of its release 1.9.3.

It checks both sides of the gateway: its paths for TEI's clients, and the messages that it sends to a TEI that runs a
model, and reads from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

COUNT: Schema = {"type": "integer", "minimum": 0}
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _record(required: Schema, **optional: Any) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


IDS = _list({**COUNT, "maximum": 2**31 - 1})
TEXTS: Schema = {"anyOf": [STRING, _list(STRING)]}
INPUTS: Schema = {"anyOf": [STRING, IDS, _list({"anyOf": [STRING, IDS]})]}
_SEQUENCE: Schema = {**_list(STRING), "minItems": 1, "maxItems": 2}
SEQUENCES: Schema = {"anyOf": [STRING, _SEQUENCE, _list(_SEQUENCE)]}
LABELED = _list(_record({"score": NUMBER, "label": STRING}))
DIRECTION: Schema = {"enum": ["Left", "Right"]}
CUTTING: Schema = {"truncate": _nullable(FLAG), "truncation_direction": DIRECTION}
PROMPT: Schema = {"prompt_name": _nullable(STRING)}
LABELS = _record({"id2label": {"type": "object"}, "label2id": {"type": "object"}})

REQUESTS: dict[str, Schema] = {
    "/embed": _record({"inputs": INPUTS}, normalize=FLAG, dimensions=_nullable(COUNT), **CUTTING, **PROMPT),
    "/embed_all": _record({"inputs": INPUTS}, **CUTTING, **PROMPT),
    "/embed_sparse": _record({"inputs": INPUTS}, **CUTTING, **PROMPT),
    "/rerank": _record({"query": STRING, "texts": _list(STRING)}, raw_scores=FLAG, return_text=FLAG, **CUTTING),
    "/predict": _record({"inputs": SEQUENCES}, raw_scores=FLAG, **CUTTING),
    "/similarity": _record(
        {"inputs": _record({"source_sentence": STRING, "sentences": _list(STRING)})},
        parameters=_nullable(_record({}, **CUTTING, **PROMPT)),
    ),
    "/tokenize": _record({"inputs": TEXTS}, add_special_tokens=FLAG, **PROMPT),
    "/decode": _record({"ids": {"anyOf": [IDS, _list(IDS)]}}, skip_special_tokens=FLAG),
}

ANSWERS: dict[str, Schema] = {
    "/embed": _list(_list(NUMBER)),
    "/embed_all": _list(_list(_list(NUMBER))),
    "/embed_sparse": _list(_list(_record({"index": COUNT, "value": NUMBER}))),
    "/rerank": _list(_record({"index": COUNT, "score": NUMBER}, text=_nullable(STRING))),
    "/predict": {"anyOf": [LABELED, _list(LABELED)]},
    "/similarity": _list(NUMBER),
    "/tokenize": _list(
        _list(_record({"id": COUNT, "text": STRING, "special": FLAG}, start=_nullable(COUNT), stop=_nullable(COUNT)))
    ),
    "/decode": _list(STRING),
    "/info": _record(
        {
            "model_id": STRING,
            "model_dtype": STRING,
            "served_model_name": STRING,
            "model_type": {
                "anyOf": [
                    _record({"classifier": LABELS}),
                    _record({"embedding": _record({"pooling": STRING})}),
                    _record({"reranker": LABELS}),
                ]
            },
            "max_concurrent_requests": COUNT,
            "max_input_length": COUNT,
            "max_batch_tokens": COUNT,
            "max_client_batch_size": COUNT,
            "auto_truncate": FLAG,
            "tokenization_workers": COUNT,
            "version": STRING,
        },
        model_sha=_nullable(STRING),
        max_batch_requests=_nullable(COUNT),
        sha=_nullable(STRING),
        docker_label=_nullable(STRING),
    ),
}

ERROR = _record(
    {
        "error": STRING,
        "error_type": {"enum": ["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]},
    }
)
# As its router maps them; a 413 for a batch that is too large is documented and never sent.
ERROR_TYPES = {
    400: {"Empty"},
    413: {"Validation"},
    422: {"Validation", "Tokenizer"},
    424: {"Backend"},
    429: {"Overloaded"},
    503: {"Unhealthy"},
}
_OF_WORDS = {"400", "413", "422"}  # the errors of paths that compute nothing
_OF_MODELS = {*_OF_WORDS, "424", "429"}
ERRORS: dict[str, set[str]] = dict.fromkeys(REQUESTS, _OF_MODELS) | {
    "/tokenize": _OF_WORDS,
    "/decode": _OF_WORDS,
    "/info": set(),
}


def validate(schema: Schema, value: object) -> None:
    """Raise ``jsonschema.ValidationError`` if a value does not have the shape of a schema."""
    Draft202012Validator(schema).validate(value)


def validate_answer(path: str, status: int, body: object) -> None:
    """Validate an answer, or an error, against TEI's contract for the path.

    Raises:
        jsonschema.ValidationError: it has another shape.
        AssertionError: the status does not belong to that kind of error.
    """
    if status == 200:
        validate(ANSWERS[path], body)
        return
    validate(ERROR, body)
    assert isinstance(body, dict)
    assert body["error"]
    assert body["error_type"] in ERROR_TYPES.get(status, {"Validation", "Backend"}), (status, body)


def document(place: Callable[[str], str] = lambda path: path) -> Schema:
    """Return the contract as an OpenAPI document, to make requests from.

    Args:
        place: says where the server has a path of TEI's.
    """
    paths = {}
    for path, answer in ANSWERS.items():
        responses = {"200": answer, **dict.fromkeys(sorted(ERRORS[path]), ERROR)}
        operation: Schema = {
            "operationId": path,
            "responses": {
                status: {"description": status, "content": {"application/json": {"schema": schema}}}
                for status, schema in responses.items()
            },
        }
        if path in REQUESTS:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": REQUESTS[path]}},
            }
        paths[place(path)] = {"post" if path in REQUESTS else "get": operation}
    return {"openapi": "3.1.0", "info": {"title": "TEI", "version": "1.9.3"}, "paths": paths}
