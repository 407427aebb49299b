"""Jina v5 as it was published: a model of transformers, and a LoRA adapter for each task. Does not import torch.

The repositories `jinaai/jina-embeddings-v5-text-small` and `-nano` have the type `jina_embeddings_v5`, whose code
(`JinaEmbeddingsV5Model`) puts PEFT's adapters over Qwen3 (small) or EuroBERT (nano). The vector of a text is the state of
its last token, normalized, and one of two instructions precedes every text (in the code's `encode`, and in `custom_st.py`
for sentence-transformers). The model requires a task. vLLM reads the same files, for one task at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json
from gateway.errors import LoadError

_MODEL_TYPE = "jina_embeddings_v5"
_CLASSES = {"qwen3": "Qwen3Model", "eurobert": "EuroBertModel"}
# The tasks of an adapter, by the name of its folder; queries and passages differ only in their instruction.
_TASKS = {"retrieval": ("retrieval.query", "retrieval.passage"), "clustering": ("separation",)}
_INSTRUCTIONS = {"query": "Query: ", "document": "Document: "}


def is_jina_v5_layout(config: Mapping[str, Json]) -> bool:
    """Return whether a ``config.json`` has this layout."""
    return config.get("model_type") == _MODEL_TYPE


def as_jina_v5_base(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the ``config.json`` of the model without adapters, in transformers' words.

    EuroBERT's configuration says that the model is not a decoder; Qwen3's does not. The weights must match.

    Raises:
        LoadError: the configuration names no tasks.
    """
    names = config.get("task_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise LoadError(f"{folder}/config.json: task_names must be a list of the adapters' names, got {names!r}")
    base = "eurobert" if config.get("is_decoder") is False else "qwen3"
    return {**config, "model_type": base, "architectures": [_CLASSES[base]]}


def find_jina_v5_adapters(folder: Path, config: Mapping[str, Json]) -> dict[str, Path]:
    """Return the folder of each task's adapter, by the task's canonical name; tasks may share one.

    Raises:
        LoadError: an adapter is missing.
    """
    names = config["task_names"]
    adapters = {}
    for name in map(str, names if isinstance(names, list) else []):
        adapter = folder / "adapters" / name
        if not (adapter / "adapter_config.json").exists():
            raise LoadError(f"{adapter}/adapter_config.json: no such file, but config.json names the task {name!r}")
        adapters.update(dict.fromkeys(_TASKS.get(name, (name,)), adapter))
    return adapters


def jina_v5_prompts(adapters: Collection[str], prompts: Mapping[str, str]) -> dict[str, str]:
    """Return the instruction of each task: the query instruction for queries, the document instruction for all other texts.

    Args:
        prompts: the checkpoint's own prompts ``query`` and ``document``.
    """
    texts = {name: prompts.get(name) or text for name, text in _INSTRUCTIONS.items()}
    return {task: texts["query" if task == "retrieval.query" else "document"] for task in adapters}
