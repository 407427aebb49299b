"""mteb, the benchmark of embedding models, runs against the unchanged gateway through its client for OpenAI's API."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import ir_measures
import numpy as np
import pytest

from tests.clients.gateway_process import MODEL, PROMPTED, Gateway
from tests.peers import is_missing

# Of mteb's own dependencies, at import.
pytestmark = [pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (Path(__file__).parents[2] / "docs" / "mteb.md").read_text(encoding="utf-8")
DOCUMENTS = {
    "paris": "Paris is the capital of France, on the Seine.",
    "berlin": "Berlin is the capital of Germany, on the Spree.",
    "bread": "Bread is baked from flour, water, salt and yeast.",
    "cheese": "Cheese is made from milk by curdling it.",
    "moon": "The Moon orbits the Earth once a month.",
    "sun": "The Sun is a star, around which the planets move.",
    "fox": "The quick brown fox jumps over the lazy dog.",
}
QUERIES = {
    "q1": "What is the largest city of France?",
    "q2": "How is a loaf made?",
    "q3": "What do planets move around?",
    "q4": "Which animal leaps over a dog?",
}
# Some as a reader would judge, some not, so that the measure is not simply 1.
JUDGMENTS = {"q1": {"paris": 1}, "q2": {"bread": 1, "cheese": 1}, "q3": {"sun": 1, "moon": 1}, "q4": {"cheese": 1}}


def local_task() -> Any:
    """Return a retrieval task of mteb whose data is here."""
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="LocalRetrieval",
            description="A few sentences.",
            reference=None,
            dataset={"path": "local", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, *args: object, **kwargs: object) -> None:
            data = {
                "corpus": Dataset.from_list([{"id": i, "text": text} for i, text in DOCUMENTS.items()]),
                "queries": Dataset.from_list([{"id": i, "text": text} for i, text in QUERIES.items()]),
                "relevant_docs": JUDGMENTS,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    return Local()


def vectors_of(gateway: Gateway, texts: dict[str, str], model: str = MODEL) -> np.ndarray:
    answer = httpx.post(f"{gateway.base_url}/embeddings", json={"model": model, "input": list(texts.values())})
    return np.array([item["embedding"] for item in answer.json()["data"]])


def ndcg(scores: np.ndarray) -> float:
    run = {
        query: dict(zip(DOCUMENTS, map(float, row), strict=True)) for query, row in zip(QUERIES, scores, strict=True)
    }
    [value] = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], JUDGMENTS, run).values()
    return float(value)


def test_mteb_evaluates_a_model_of_the_gateway(gateway: Gateway, tmp_path: Path) -> None:
    if find_spec("mteb") is None:
        is_missing("mteb is not installed: make install-dev")
    import mteb
    from mteb.models.openai_wrappers import OpenAIAPIEncodeWrapper

    model = OpenAIAPIEncodeWrapper(gateway.root_url, MODEL, modalities=["text"], use_chat_template=False)
    result = mteb.evaluate(model, local_task(), cache=None, prediction_folder=tmp_path)

    expected = ndcg(vectors_of(gateway, QUERIES) @ vectors_of(gateway, DOCUMENTS).T)
    found = result.task_results[0].scores["test"][0]
    assert 0.5 < expected < 1
    assert found["ndcg_at_10"] == pytest.approx(expected, abs=1e-4)
    assert model.max_length == 256


@pytest.mark.parametrize(("name", "by_task"), [(MODEL, False), (PROMPTED, False), (PROMPTED, True)])
def test_the_example_evaluates_with_and_without_tasks(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, by_task: bool
) -> None:
    """The second run takes the results of the first: mteb keeps them by task."""
    if find_spec("mteb") is None:
        is_missing("mteb is not installed: make install-dev")
    monkeypatch.syspath_prepend(EXAMPLES)
    from evaluate_mteb import GatewayModel, evaluate

    model = GatewayModel(gateway.root_url, name, None, by_task=by_task)
    scores = evaluate(model, [local_task()], tmp_path)

    sides = (f"{name}:retrieval.query", f"{name}:retrieval.passage") if by_task else (name, name)
    queries, documents = (
        vectors_of(gateway, texts, side) for texts, side in zip((QUERIES, DOCUMENTS), sides, strict=True)
    )
    assert scores == {"LocalRetrieval": pytest.approx(ndcg(queries @ documents.T), abs=1e-4), "mean": scores["mean"]}
    assert scores["mean"] == scores["LocalRetrieval"]
    assert evaluate(model, [local_task()], tmp_path) == scores


def test_results_with_tasks_are_not_taken_for_those_without(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder: or the second figure would be a copy of the first, and the tasks would seem to change nothing."""
    if find_spec("mteb") is None:
        is_missing("mteb is not installed: make install-dev")
    monkeypatch.syspath_prepend(EXAMPLES)
    from evaluate_mteb import GatewayModel, evaluate

    models = [GatewayModel(gateway.root_url, PROMPTED, None, by_task=by_task) for by_task in (False, True)]
    scores = [evaluate(model, [local_task()], tmp_path)["LocalRetrieval"] for model in models]

    expected = []
    for sides in ((PROMPTED, PROMPTED), (f"{PROMPTED}:retrieval.query", f"{PROMPTED}:retrieval.passage")):
        queries, documents = (
            vectors_of(gateway, texts, side) for texts, side in zip((QUERIES, DOCUMENTS), sides, strict=True)
        )
        expected.append(pytest.approx(ndcg(queries @ documents.T), abs=1e-4))
    assert scores == expected
    revisions = [model.mteb_model_meta.revision for model in models]
    space = httpx.get(f"{gateway.base_url}/models/{PROMPTED}").json()["space"]
    assert revisions == [space.partition("@")[2], f"{space.partition('@')[2]}-by-task"]
    assert sorted(path.parent.name for path in tmp_path.rglob("LocalRetrieval.json")) == sorted(revisions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "--tasks", "SciFact"], "The gateway refuses: "),
        ([MODEL, "--tasks", "SciFakt"], "mteb does not know it: "),
        ([MODEL, "--benchmark", "LMEP"], "mteb does not know it: "),
        ([MODEL, "--tasks", "SciFact", "--url", "http://127.0.0.1:1"], "No gateway answers at http://127.0.0.1:1: "),
    ],
)
def test_the_example_ends_with_a_reason(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    if find_spec("mteb") is None:
        is_missing("mteb is not installed: make install-dev")
    monkeypatch.syspath_prepend(EXAMPLES)
    import evaluate_mteb

    monkeypatch.setattr("sys.argv", ["evaluate_mteb.py", "--url", gateway.root_url, *arguments])
    with pytest.raises(SystemExit, match=said):
        evaluate_mteb.main()


def test_the_page_names_what_mteb_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version, and each benchmark and task in its commands; their data is not here."""
    if find_spec("mteb") is None:
        is_missing("mteb is not installed: make install-dev")
    monkeypatch.syspath_prepend(EXAMPLES)
    import evaluate_mteb

    ran: list[list[str]] = []
    monkeypatch.setattr(evaluate_mteb, "GatewayModel", lambda *_arguments, **_options: None)
    monkeypatch.setattr(
        evaluate_mteb, "evaluate", lambda _model, tasks, _folder: ran.append([t.metadata.name for t in tasks]) or {}
    )
    commands = re.findall(r"^mteb/bin/python examples/(evaluate_mteb\.py .*)", PAGE, re.MULTILINE)
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        evaluate_mteb.main()

    lmeb, chosen, english = ran
    assert f"Its {len(lmeb)} tasks include LoCoMo and LongMemEval" in PAGE
    assert {"LoCoMo", "LongMemEval"} <= set(lmeb)
    assert (chosen, len(english) > 30) == (["SciFact", "NFCorpus"], True)
    assert f"with mteb {version('mteb')} and a task" in PAGE


def test_the_program_of_the_page_runs(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_spec("mteb") is None:
        is_missing("mteb is not installed: make install-dev")
    import mteb

    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: [local_task()] if name == "LMEB" else [])
    names: dict[str, Any] = {}
    exec(program.replace("http://localhost:8000", gateway.root_url), names)  # noqa: S102  the page's own program

    [result] = names["results"].task_results
    assert 0.5 < result.get_score() < 1
