"""Evaluate a model of the gateway with mteb, the benchmark behind the public leaderboards.

    python3 -m venv mteb && mteb/bin/pip install mteb          # not into the gateway's .venv: 64 packages
    mteb/bin/python examples/evaluate_mteb.py bge-m3 --benchmark LMEB
    mteb/bin/python examples/evaluate_mteb.py bge-m3 --tasks SciFact LongMemEval

The data of the tasks is downloaded from the hub once, and results are kept: a stopped run continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import mteb
    import requests
    from mteb.models.openai_wrappers import OpenAIAPIEncodeWrapper
    from mteb.types import PromptType
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed: pip install mteb")


class GatewayModel(OpenAIAPIEncodeWrapper):
    """mteb's client of OpenAI's API, which can also name the task: mteb knows which texts are queries.

    Args:
        by_task: send ``MODEL:retrieval.query`` and ``MODEL:retrieval.passage`` for the texts of retrieval. Without it, all
            texts get the model's default task, as with Mem0.
    """

    def __init__(self, url: str, model: str, api_key: str | None, *, by_task: bool) -> None:
        space = space_of(url, model, api_key)
        super().__init__(url, model, api_key, modalities=["text"], use_chat_template=False)
        self._id, self._by_task = model, by_task
        # mteb keeps results by name and revision: another space, or another use of the tasks, is another model.
        revision = space.rpartition("@")[2] + ("-by-task" if by_task else "")
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update={"revision": revision})

    def encode(self, inputs: Any, *, prompt_type: PromptType | None = None, **about: Any) -> Any:
        """Embed the texts of one side of a task."""
        sides = {PromptType.query: ":retrieval.query", PromptType.document: ":retrieval.passage"}
        side = sides.get(prompt_type, "") if self._by_task and prompt_type is not None else ""
        self.model_name = f"{self._id}{side}"
        try:
            return super().encode(inputs, prompt_type=prompt_type, **about)
        finally:
            self.model_name = self._id


def space_of(url: str, model: str, api_key: str | None) -> str:
    """Return the space of a model's vectors; end with the reason if the gateway has no such vectors."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = requests.get(f"{url.rstrip('/')}/v1/models/{model}", headers=headers, timeout=60)
        card = answer.json()
    except requests.RequestException as error:  # also if the answer is not JSON
        sys.exit(f"No gateway answers at {url}: {error}")
    if not answer.ok:
        sys.exit(f"The gateway refuses: {card.get('message', card)}")
    if card.get("kind") != "embed" or not card.get("space"):
        reason = card.get("reason") or card.get("state") or "no state"
        sys.exit(f"{model} has no vectors of one space to evaluate: it is of kind {card.get('kind')} ({reason})")
    return str(card["space"])


def main() -> None:
    """Evaluate, and print the main score of each task and their mean."""
    parser = argparse.ArgumentParser(description="Evaluate a model of the gateway with mteb.")
    parser.add_argument("model", help="a name that the gateway knows")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--benchmark", help="such as LMEB (memory retrieval), or MTEB(eng, v2)")
    what.add_argument("--tasks", nargs="+", help="such as SciFact LoCoMo LongMemEval")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway, without /v1")
    parser.add_argument(
        "--api-key-env", default="EMBEDDINGS_API_KEY", help="environment variable with a key of the gateway"
    )
    parser.add_argument("--by-task", action="store_true", help="embed queries and passages with their tasks")
    parser.add_argument("--out", type=Path, default=Path("mteb-results"), help="folder for the results")
    options = parser.parse_args()
    try:
        named = options.benchmark
        tasks = mteb.get_benchmark(named).tasks if named else mteb.get_tasks(tasks=options.tasks)
    except (KeyError, ValueError) as error:
        sys.exit(f"mteb does not know it: {error}")
    model = GatewayModel(options.url, options.model, os.environ.get(options.api_key_env), by_task=options.by_task)
    for name, score in evaluate(model, tasks, options.out).items():
        print(f"{name:<28} {score:.4f}")


def evaluate(model: GatewayModel, tasks: Sequence[Any], folder: Path) -> dict[str, float]:
    """Return the main score of each task, and their mean; tasks whose results are in the folder are not run again.

    The folder has the results of each space of each model, with and without ``by_task``.
    """
    results = mteb.evaluate(model, tasks, cache=mteb.ResultCache(folder))
    scores = {result.task_name: float(result.get_score()) for result in results.task_results}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


if __name__ == "__main__":
    main()
