"""Snippets to copy from the playground: a request with curl, a request with Python, and a configuration of Mem0."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.console.arms import QUERY_TASK
from gateway.console.trial import ArmResult
from gateway.precision import Precision
from gateway.types import Output

_KEY = "YOUR-KEY"


@dataclass(frozen=True, slots=True)
class Snippet:
    """A text to copy.

    Attributes:
        note: a remark about the snippet; may be empty.
    """

    kind: str
    text: str
    note: str = ""


def snippets(result: ArmResult, api: str, text: str, *, needs_key: bool) -> Sequence[Snippet]:
    """Return the snippets of an arm.

    Args:
        api: base URL of the API, with ``/v1``.
        text: the text to embed in the examples.
    """
    return (
        Snippet("curl", _curl(result, api, text, needs_key=needs_key)),
        Snippet("Python", _python(result, api, text, needs_key=needs_key)),
        _mem0(result, api, needs_key=needs_key),
    )


def _body(result: ArmResult, text: str) -> dict[str, object]:
    arm, plan = result.arm, result.plan
    body: dict[str, object] = {"model": plan.query_name, "input": text}
    if plan.query_task and plan.query_task not in plan.query_name:
        body["task"] = plan.query_task
    if arm.dimensions:
        body["dimensions"] = arm.dimensions
    if arm.precision is not Precision.FLOAT:
        body["encoding_format"] = arm.precision.value
    if arm.output is not Output.DENSE:
        body["outputs"] = [arm.output.value]
    return body


def _curl(result: ArmResult, api: str, text: str, *, needs_key: bool) -> str:
    body = json.dumps(_body(result, text), ensure_ascii=False).replace("'", "'\\''")
    key = f" \\\n  -H 'authorization: Bearer {_KEY}'" if needs_key else ""
    return f"curl {api}/embeddings -H 'content-type: application/json'{key} \\\n  -d '{body}'"


def _python(result: ArmResult, api: str, text: str, *, needs_key: bool) -> str:
    body = _body(result, text)
    own = {name: body.pop(name) for name in ("task", "outputs") if name in body}
    arguments = [f"{name}={value!r}" for name, value in body.items()]
    if own:  # OpenAI's client does not know these fields
        arguments.append(f"extra_body={own!r}")
    key = _KEY if needs_key else "any"
    return (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{api}", api_key="{key}")\n'
        f"client.embeddings.create({', '.join(arguments)})"
    )


def _mem0(result: ArmResult, api: str, *, needs_key: bool) -> Snippet:
    arm, info = result.arm, result.plan.target.info
    if arm.output is not Output.DENSE or arm.precision is not Precision.FLOAT:
        return Snippet("Mem0", "", "Mem0 stores dense float vectors only: leave out the precision and the output.")
    name, note = arm.name, "The collection is named after the space, so that two models never share one."
    space = info.space(result.plan.target.task, arm.dimensions)
    if result.plan.query_task == QUERY_TASK:
        # Mem0 embeds queries and memories under one name, so a task only for queries would be wrong for stored memories.
        symmetric = next((task for task in ("text-matching", info.default_task) if task in info.tasks), None)
        if symmetric is not None:
            name = f"{result.plan.target.model.id}:{symmetric}"
            space = info.space(symmetric, arm.dimensions)
            note = f"Mem0 sends queries and memories under one name, so this takes {symmetric} for both. {note}"
    dims = arm.dimensions or info.width
    collection = re.sub(r"\W", "_", f"memories_{space}")
    config = {
        "embedder": {
            "provider": "openai",
            "config": {
                "model": name,
                "openai_base_url": api,
                "api_key": _KEY if needs_key else "any",
                "embedding_dims": dims,
            },
        },
        "vector_store": {
            "provider": "qdrant",
            "config": {
                "path": f"/tmp/{collection}",  # noqa: S108  an example to change
                "on_disk": True,
                "collection_name": collection,
                "embedding_model_dims": dims,
            },
        },
    }
    text = json.dumps(config, indent=4, ensure_ascii=False).replace(": true", ": True")
    return Snippet("Mem0", f"config = {text}", note)
