"""All three outputs of a BGE-M3 go into Qdrant by `gateway embed`, and a hybrid search finds by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from typer.testing import CliRunner

from gateway.cli.main import app
from tests.models.tiny_tokenizers import SENTENCES


def test_a_hybrid_search_finds_each_text_by_all_outputs(
    m3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list(dict.fromkeys(SENTENCES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Path("models.yaml").write_text(
        f"version: 1\nmodels:\n  - {{id: m3, source: {m3}, outputs: [dense, sparse, multivector]}}\n"
    )
    Path("docs.jsonl").write_text("\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)))
    command = ["embed", "docs.jsonl", "--models", "models.yaml", "--model", "m3", "--to", "qdrant:./q#docs"]
    result = CliRunner().invoke(app, [*command, "--outputs", "dense,sparse,multivector"])
    assert result.exit_code == 0, result.output
    qdrant = QdrantClient(path="q")
    points = qdrant.scroll("docs", limit=100, with_vectors=True)[0]
    assert [point.payload for point in points] == [{"text": text} for text in texts]
    for point in points:
        assert isinstance(point.vector, dict)
        dense, sparse, tokens = (point.vector[name] for name in ("dense", "sparse", "multivector"))
        assert np.linalg.norm(dense) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, atol=1e-5)
        assert isinstance(sparse, models.SparseVector)
        found = qdrant.query_points(
            "docs",
            prefetch=[
                models.Prefetch(query=dense, using="dense", limit=3),
                *([models.Prefetch(query=sparse, using="sparse", limit=3)] if sparse.indices else []),
            ],
            query=tokens,
            using="multivector",
            limit=3,
        )
        assert found.points[0].id == point.id
        assert found.points[0].score == pytest.approx(len(tokens), rel=1e-3)
    assert any(point.vector["sparse"].indices for point in points)  # type: ignore[call-overload,index,union-attr]
    qdrant.close()
