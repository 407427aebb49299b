"""Additions to the schema of the routes for the page at `/docs`: working examples, keys, and the paths of other APIs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from gateway.api.json_body import RequestBody
from gateway.api.ollama import OllamaEmbedBody
from gateway.api.openai_schema import EmbeddingsBody
from gateway.api.tei_schema import DecodeBody, EmbedBody, PredictBody, SimilarityBody, TextsBody, TokenizeBody
from gateway.deployment import Deployment
from gateway.types import ModelInfo, ModelKind, Output

Schema = dict[str, Any]
"""JSON, as sent."""

_TEXT = "Hello, world"
_API_KEY, _OPERATOR_KEY = "API key", "Operator's key"
_SCHEMES: Schema = {
    _API_KEY: {"type": "http", "scheme": "bearer", "description": "The key of a client, where keys are required."},
    _OPERATOR_KEY: {"type": "http", "scheme": "bearer", "description": "`GATEWAY_ADMIN_KEY`."},
}
_OPERATORS = ("/admin", "/metrics")


@dataclass(frozen=True, slots=True)
class _Path:
    """A path of another API, with that API's answers."""

    path: str
    tag: str
    summary: str
    body: type[RequestBody] | None = None
    example: Mapping[str, object] | None = None

    def operation(self, model: str) -> Schema:
        answer = {"description": "In the form of that API.", "content": {"application/json": {}}}
        failure = {"description": "An error, in the form of that API.", "content": {"application/json": {}}}
        name = f"{self.path.strip('/').replace('/', '_').translate(_NO_BRACES)}_{self.tag.lower()}"
        operation: Schema = {
            "tags": [self.tag],
            "summary": self.summary,
            "operationId": name,
            "responses": {"200": answer, "default": failure},
        }
        if "{model}" in self.path:
            schema = {"type": "string", "example": model}
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": schema}]
        if self.body is not None:
            content: Schema = {"schema": self.body.model_json_schema()}
            if self.example is not None:
                content["example"] = dict(self.example)
            operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        return {"get" if self.body is None else "post": operation}


_NO_BRACES = str.maketrans("", "", "{}")
_SIMILAR = {"source_sentence": _TEXT, "sentences": ["Hi there", "Goodbye"]}
_OTHERS = (
    _Path("/tei/{model}/embed", "TEI", "Vectors. For the default model also at /embed.", EmbedBody, {"inputs": _TEXT}),
    _Path("/tei/{model}/embed_sparse", "TEI", "Sparse weights.", TextsBody, {"inputs": _TEXT}),
    _Path("/tei/{model}/embed_all", "TEI", "The states of all tokens.", TextsBody, {"inputs": _TEXT}),
    _Path("/tei/{model}/similarity", "TEI", "Cosines of one text with others.", SimilarityBody, {"inputs": _SIMILAR}),
    _Path("/tei/{model}/tokenize", "TEI", "The model's own tokens.", TokenizeBody, {"inputs": _TEXT}),
    _Path("/tei/{model}/decode", "TEI", "The text of tokens.", DecodeBody, {"ids": [101, 7592, 102]}),
    _Path("/tei/{model}/info", "TEI", "The model's properties."),
    _Path("/api/embed", "Ollama", "Vectors.", OllamaEmbedBody, {"input": _TEXT}),
    _Path("/api/tags", "Ollama", "The models that are ready."),
    _Path("/openai/deployments/{model}/embeddings", "Azure", "Vectors.", EmbeddingsBody, {"input": _TEXT}),
)


_PREDICT = _Path("/tei/{model}/predict", "TEI", "The labels of a text.", PredictBody, {"inputs": _TEXT})


def document(app: FastAPI, deployment: Deployment, *, needs_key: bool) -> None:
    """Extend an application's schema beyond its routes.

    Args:
        needs_key: whether clients need an API key.
    """
    routes_schema = app.openapi

    def openapi() -> Schema:
        schema = routes_schema()
        paths = {path: {**operations} for path, operations in schema["paths"].items()}
        if "/v1/embeddings" in paths:
            infos = [model.info for model in deployment.fleet if model.info and model.takes_requests]
            embedders = (info.id for info in infos if Output.DENSE in info.outputs and info.kind is ModelKind.EMBED)
            model = next(embedders, deployment.registry.models[0].id)
            paths |= {other.path: other.operation(model) for other in _OTHERS}
            paths["/v1/embeddings"] = _with_examples(paths["/v1/embeddings"], dict(_embed_examples(model, infos)))
            if labeler := next((info.id for info in infos if info.kind is ModelKind.CLASSIFY), None):
                paths[_PREDICT.path] = _PREDICT.operation(labeler)
            paths["/v1/classify"] = _with_examples(paths["/v1/classify"], _classify_examples(infos))
            paths["/v1/tokenize"] = _with_examples(paths["/v1/tokenize"], {model: {"model": model, "input": _TEXT}})
            for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
                paths[path] = _with_examples(paths[path], _rerank_examples(infos))
        for path, operations in paths.items():
            paths[path] = {
                method: {**operation, "security": _security(path, needs_key=needs_key)}
                for method, operation in operations.items()
            }
        components = {**schema.get("components", {}), "securitySchemes": _SCHEMES}
        return {**schema, "paths": paths, "components": components}

    app.openapi = openapi  # type: ignore[method-assign]


def _security(path: str, *, needs_key: bool) -> list[Schema]:
    if path.startswith(_OPERATORS):
        return [{_OPERATOR_KEY: []}] if path.startswith("/admin") or needs_key else []
    if path.startswith("/health"):
        return []
    return [{_API_KEY: []}] if needs_key else []


def _with_examples(operations: Schema, examples: Mapping[str, Schema]) -> Schema:
    """Return the operations of a path with examples of the posted body."""
    if not examples:
        return operations
    post = operations["post"]
    content = {**post["requestBody"]["content"]["application/json"]}
    content["examples"] = {name: {"value": value} for name, value in examples.items()}
    body = {**post["requestBody"], "content": {"application/json": content}}
    return {**operations, "post": {**post, "requestBody": body}}


def _embed_examples(model: str, infos: list[ModelInfo]) -> Iterator[tuple[str, Schema]]:
    """Yield bodies that the served models answer."""
    yield "one text", {"model": model, "input": _TEXT}
    yield "two texts, as base64", {"model": model, "input": [_TEXT, "Hi there"], "encoding_format": "base64"}
    for info in infos:
        small = info.dimensions[1:2]
        if info.tasks:
            more: Schema = {"dimensions": small[0]} if small else {}
            yield "a query", {"model": info.id, "input": _TEXT, "task": next(iter(info.tasks)), **more}
        if len(info.outputs) > 1 or Output.DENSE not in info.outputs:
            outputs = [output.value for output in info.outputs]
            yield f"outputs of {info.id}", {"model": info.id, "input": _TEXT, "outputs": outputs}


def _rerank_examples(infos: list[ModelInfo]) -> dict[str, Schema]:
    rankers = [info.id for info in infos if info.kind is ModelKind.RERANK or info.rerank]
    documents = ["Paris is the capital of France.", "A cat sat on a mat."]
    return {
        model: {"model": model, "query": "What is the capital of France?", "documents": documents} for model in rankers
    }


def _classify_examples(infos: list[ModelInfo]) -> dict[str, Schema]:
    classifiers = [info.id for info in infos if info.kind is ModelKind.CLASSIFY]
    return {model: {"model": model, "input": ["I like you.", "I hate pineapples."]} for model in classifiers}
