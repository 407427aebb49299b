"""Cards of models, as a gateway sends them."""

from __future__ import annotations

from typing import Any

from gateway.api.openai_schema import ModelCard


def make_card(model_id: str, **fields: Any) -> ModelCard:
    """Return the card of a model that is ready, without tasks and of 8 dimensions unless ``fields`` say otherwise."""
    absent = ("source", "revision", "reason", "default_task", "space")
    card: dict[str, Any] = dict.fromkeys(absent) | {
        "id": model_id,
        "object": "model",
        "kind": "embed",
        "created": 0,
        "owned_by": "infinity",
        "stats": {},
        "state": "ready",
        "aliases": [],
        "width": 8,
        "dimensions": [8, 4],
        "max_tokens": 8,
        "tasks": [],
        "outputs": ["dense"],
        "normalized": True,
        "spaces": {},
        "device": "cpu",
        "dtype": "float32",
    }
    return ModelCard.model_validate(card | fields)
