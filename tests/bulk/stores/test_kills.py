"""Jobs into stores and out of them: killed at random moments, they lose and duplicate nothing."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import orjson
import pytest
from qdrant_client import QdrantClient

from tests.bulk.stores.killed import work
from tests.bulk.stores.rows import by_id

ROOT = Path(__file__).parents[3]
NUM_ROWS = 150


def expected() -> dict[int, tuple[str, dict[str, object]]]:
    return {i: (f"text {i} " * (i % 4 + 1), {"n": i, "tag": f"t{i % 3}"}) for i in range(NUM_ROWS)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "docs.jsonl"
    lines = [orjson.dumps({"id": i, "text": text, **payload}) for i, (text, payload) in expected().items()]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("qdrant", "dense,sparse,multivector"),
        ("lancedb", "dense,sparse,multivector"),
        ("chroma", "dense"),
        ("pgvector", "dense"),
        ("milvus", "dense,sparse"),
    ],
)
def test_a_job_that_is_killed_at_random_moments_writes_each_row_once(
    kind: str, outputs: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"{kind}:{tmp_path / ('store.db' if kind == 'milvus' else 'store')}#docs"
    if kind == "pgvector":
        socket = parse_qs(urlsplit(request.getfixturevalue("postgres")).query)["host"][0]
        url = f"pgvector://postgres@{quote(socket, safe='')}/postgres/killed"
    arguments = [str(source), url, str(tmp_path / "state"), outputs]
    command = [sys.executable, "-m", "tests.bulk.stores.killed", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
    assert by_id(url) == expected()
    if kind == "qdrant":
        qdrant = QdrantClient(path=str(tmp_path / "store"))
        for point in qdrant.scroll("docs", limit=NUM_ROWS, with_vectors=True)[0]:
            assert isinstance(point.vector, dict)
            assert point.payload is not None
            assert point.vector["dense"] == [len(point.payload["text"]), 1, 0, 0, 0, 0, 0, 0]
            assert np.shape(point.vector["multivector"]) == (3, 2)
        qdrant.close()


def test_rows_go_from_store_to_store(source: Path, tmp_path: Path) -> None:
    urls = [f"{kind}:{tmp_path / kind}#docs" for kind in ("qdrant", "lancedb", "chroma")]
    urls.append(f"qdrant:{tmp_path / 'qdrant'}#copy")
    work(str(source), urls[0], tmp_path / "first", ["dense"])
    for number, (before, after) in enumerate(pairwise(urls)):
        work(before, after, tmp_path / str(number), ["dense"])
        assert by_id(after) == expected()
