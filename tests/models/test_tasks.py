"""Tasks of models with few prompts, and the runtime of a model, as clients see them over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from gateway.engine.model import build
from tests.models.plain import entry

Connect = Callable[..., Any]
Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
MakeFamily = Callable[..., Path]

TEXT = "Berlin is the capital of Germany."


@pytest.fixture
def one_prompt(make_family: MakeFamily, copy: Copy, edit_json: EditJson) -> Path:
    """Return a checkpoint with a prompt for queries alone, as arctic-embed has it."""
    folder = copy(make_family("bert"))
    edit_json(folder / "config_sentence_transformers.json", prompts={"query": "near: "})
    return folder


@pytest.mark.parametrize("field", ["task", "input_type"])
async def test_a_model_with_a_prompt_for_queries_alone_takes_documents_as_they_are(
    field: str, one_prompt: Path, connect: Connect, cosines: Cosines
) -> None:
    client = await connect(entry(one_prompt, runtime="torch"))
    theirs = SentenceTransformer(str(one_prompt), device="cpu")
    expected = {
        "query": theirs.encode_query([TEXT]),
        "document": theirs.encode_document([TEXT]),
        "passage": theirs.encode_document([TEXT]),
        "search_document": theirs.encode([TEXT]),
    }
    spaces = set()

    for task, right in expected.items():
        answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": TEXT, field: task})

        assert answer.status_code == 200
        vector = np.array([answer.json()["data"][0]["embedding"]])
        assert cosines(vector, right).min() > 0.99999
        spaces.add(answer.headers["x-gateway-space"])
    assert cosines(expected["query"], expected["document"]).max() < 0.9999
    assert len(spaces) == 1


@pytest.mark.parametrize("task", ["nonsense", "classification", "text-matching", "clustering"])
async def test_a_task_that_the_model_has_no_prompt_for_is_refused_with_the_list(
    task: str, one_prompt: Path, connect: Connect
) -> None:
    client = await connect(entry(one_prompt, runtime="torch"))

    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": TEXT, "task": task})

    assert answer.status_code == 400
    assert f"unknown task '{task}'" in answer.json()["detail"]
    assert "retrieval.query, retrieval.passage" in answer.json()["detail"]


async def test_the_runtime_that_took_over_is_the_one_that_is_reported(
    make_family: MakeFamily, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO computes ModernBERT wrongly with the model's own masks: torch takes over when the model is loaded."""
    rule = build.attention_rule
    monkeypatch.setattr(build, "attention_rule", lambda one: None if one.model_type == "modernbert" else rule(one))
    client = await connect(
        entry(make_family("modernbert"), id="fallen-back"),
        entry(make_family("bert"), id="compiled", runtime="openvino"),
    )

    metrics = (await client.get("/metrics")).text

    rows = [line for line in metrics.splitlines() if line.startswith("gateway_model_info{")]
    runtimes = {name: [row for row in rows if f'model="{name}"' in row] for name in ("fallen-back", "compiled")}
    assert ['runtime="infinity/torch"' in row for row in runtimes["fallen-back"]] == [True]
    assert ['runtime="infinity/openvino"' in row for row in runtimes["compiled"]] == [True]
