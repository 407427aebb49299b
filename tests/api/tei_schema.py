"""The shapes of TEI's answers, written by hand after its published OpenAPI document: what its clients can rely on."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator

_COUNT = {"type": "integer", "minimum": 0}
_NUMBERS = {"type": "array", "items": {"type": "number"}}


def _table(row: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "array", "items": row}}


def _record(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


_OR_NULL_COUNT = {"type": ["integer", "null"], "minimum": 0}
_OR_NULL_STRING = {"type": ["string", "null"]}
_LABELS = _record({"id2label": {"type": "object"}, "label2id": {"type": "object"}})
_MODEL_TYPE = {
    "oneOf": [
        _record({"embedding": _record({"pooling": {"enum": ["cls", "mean", "splade", "last_token"]}})}),
        _record({"reranker": _LABELS}),
    ]
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "embed": _table({"type": "number"}),
    "embed_all": {"type": "array", "items": _table({"type": "number"})},
    "embed_sparse": _table(_record({"index": _COUNT, "value": {"type": "number"}})),
    "rerank": {
        "type": "array",
        "items": _record({"index": _COUNT, "score": {"type": "number"}}, text=_OR_NULL_STRING),
    },
    "similarity": _NUMBERS,
    "tokenize": _table(
        _record(
            {"id": _COUNT, "text": {"type": "string"}, "special": {"type": "boolean"}},
            start=_OR_NULL_COUNT,
            stop=_OR_NULL_COUNT,
        )
    ),
    "decode": {"type": "array", "items": {"type": "string"}},
    "info": _record(
        {
            "model_id": {"type": "string"},
            "model_dtype": {"type": "string"},
            "served_model_name": {"type": "string"},
            "model_type": _MODEL_TYPE,
            "max_concurrent_requests": _COUNT,
            "max_input_length": _COUNT,
            "max_batch_tokens": _COUNT,
            "max_client_batch_size": _COUNT,
            "auto_truncate": {"type": "boolean"},
            "tokenization_workers": _COUNT,
            "version": {"type": "string"},
        },
        model_sha=_OR_NULL_STRING,
        max_batch_requests=_OR_NULL_COUNT,
        sha=_OR_NULL_STRING,
        docker_label=_OR_NULL_STRING,
    ),
    "error": _record(
        {
            "error": {"type": "string", "minLength": 1},
            "error_type": {"enum": ["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]},
        }
    ),
}


def validate(name: str, answer: object) -> None:
    """Raise ``jsonschema.ValidationError`` if an answer does not have the shape of that name."""
    Draft202012Validator(SCHEMAS[name]).validate(answer)
