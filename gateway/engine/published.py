"""Jina's published numbers for Jina v3: the states that any float32 implementation must give for the real checkpoint.

From transformers' integration test (``tests/models/jina_embeddings_v3/test_modeling_jina_embeddings_v3.py``): numbers 1
to 4 of the second token's state, without an adapter and with each.
"""

from __future__ import annotations

import torch

from gateway.engine.model.runtimes.base import Runtime

SOURCE = "jinaai/jina-embeddings-v3-hf"
TEXT = "Jina Embeddings V3 is great for semantic search."
NUM_TOKENS = 17
TOLERANCE = 1e-4
"""The tolerance of the reference, in float32 with torch."""
SERVED_TOLERANCES = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.15}
"""The tolerance of a serving runtime, by its number format. The states are up to 3: rounding them once changes them by
0.001 or 0.008."""
STATES: dict[str | None, tuple[float, float, float, float]] = {
    None: (-3.1011, 0.8560, -0.2491, 0.9427),
    "retrieval.query": (-1.9765, 0.7356, -0.4414, 0.5823),
    "retrieval.passage": (-1.7028, 0.5688, -0.8541, 0.4696),
    "separation": (-3.0336, 1.4392, 0.2875, 0.7660),
    "classification": (-2.7150, 0.2485, 1.2297, 0.6988),
    "text-matching": (-1.5888, 1.0527, 0.1237, -0.0822),
}


def largest_deviation(runtime: Runtime, ids: list[int], adapters: dict[str | None, int]) -> dict[str | None, float]:
    """Return the largest deviation from the published states, by task; the text has no instruction.

    Args:
        ids: tokens of :data:`TEXT`.
        adapters: index of each task's adapter; -1 for none.
    """
    tasks = list(STATES)
    with torch.inference_mode():
        states = runtime.forward(runtime.prepare([ids] * len(tasks), [adapters[task] for task in tasks]))
    return {
        task: float((text[1, 1:5].float().cpu() - torch.tensor(STATES[task])).abs().max())
        for task, text in zip(tasks, states.texts(), strict=True)
    }
