"""Jina's models v3 and v5, which have an adapter for each task: the folders of the adapters, and the pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.engine.checkpoint.jina_v5_layout import find_jina_v5_adapters, jina_v5_prompts
from gateway.engine.checkpoint.json_files import Json, is_present
from gateway.engine.checkpoint.layouts import Layout
from gateway.engine.checkpoint.modules import Modules, Pooling
from gateway.engine.checkpoint.prompts import jina_prompts
from gateway.errors import LoadError

# v3's folders, each next to the weights.
_V3_TASKS = {
    "retrieval_query": "retrieval.query",
    "retrieval_passage": "retrieval.passage",
    "separation": "separation",
    "classification": "classification",
    "text_matching": "text-matching",
}


@dataclass(frozen=True, slots=True)
class JinaTasks:
    """The tasks of a checkpoint that have adapters.

    Attributes:
        is_jina: whether the model is one of Jina's, whose code normalizes the vectors.
        adapters: folder of each task's adapter; tasks may share one.
        pooling: the pooling, if the model's code determines it.
    """

    is_jina: bool
    adapters: Mapping[str, Path]
    pooling: Pooling | None = None

    def prompts(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Return the instruction of each task; ``own`` holds the instructions in the checkpoint's files."""
        if not self.is_jina:
            return own
        return jina_prompts(self.adapters, own) if self.pooling is None else jina_v5_prompts(self.adapters, own)


def read_jina_tasks(
    folder: Path, config: Mapping[str, Json], layout: Layout | None, modules: Modules | None
) -> JinaTasks:
    """Find the adapters of a checkpoint; most checkpoints have none.

    Raises:
        LoadError: an adapter is missing, or more modules follow a model whose code already makes the vectors.
    """
    if layout is Layout.JINA_V5:
        if modules is not None and (modules.pooling is not None or modules.dense or modules.is_normalized):
            raise LoadError(
                f"{folder}/modules.json: lists more than the Transformer, which in Jina v5 makes the vectors"
            )
        return JinaTasks(is_jina=True, adapters=find_jina_v5_adapters(folder, config), pooling=Pooling.LAST)
    found = {
        task: folder / name for name, task in _V3_TASKS.items() if is_present(folder / name / "adapter_config.json")
    }
    return JinaTasks(is_jina=config.get("model_type") == "jina_embeddings_v3", adapters=found)
