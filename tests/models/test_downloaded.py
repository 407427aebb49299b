"""A model from the hub is the same as in its publisher's folder, also at a later start without a network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoModelForCausalLM

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint.sources import find_download, is_whole
from gateway.engine.loading import LoadPlan, plan_load
from gateway.errors import LoadError
from tests.hub import COMMIT, Hub, Repo, files_of
from tests.models import plain
from tests.models.checkpoints import wordpiece_tokenizer
from tests.models.test_llm_rerankers import RERANKER, write
from tests.models.test_static import table

NAME = "owner/model"
CODE = (
    "from transformers import BertConfig, BertModel\n"
    "class OwnConfig(BertConfig): pass\n"
    "class OwnModel(BertModel): config_class = OwnConfig\n"
)


@pytest.fixture(scope="module")
def llm_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a language model that reranks, with the template of a pair in a separate file."""
    made = write(tmp_path_factory.mktemp("plain"), AutoModelForCausalLM, chat_template=RERANKER)
    folder = tmp_path_factory.mktemp("llm")
    CrossEncoder(str(made), device="cpu").save_pretrained(str(folder), create_model_card=False)
    assert (folder / "chat_template.jinja").exists()
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make static embeddings as published: the table is in the folder of its module."""
    folder = tmp_path_factory.mktemp("static")
    tokenizer = wordpiece_tokenizer()
    module = StaticEmbedding(tokenizer, embedding_weights=table(len(tokenizer)))
    SentenceTransformer(modules=[module], device="cpu").save(str(folder), create_model_card=False)
    place = folder / "0_StaticEmbedding"
    place.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(place / name)
    modules = folder / "modules.json"
    modules.write_text(modules.read_text().replace('"path": ""', '"path": "0_StaticEmbedding"'))
    return folder


def entry(**changes: object) -> ModelEntry:
    return plain.entry(Path(NAME), revision=COMMIT, **changes)


def identity(plan: LoadPlan) -> tuple[object, ...]:
    return plan.info.fingerprint, plan.info.kind, plan.outputs, plan.max_tokens, plan.checkpoint.pair_template


@pytest.mark.parametrize("layout", ["stanford", "inference_free", "llm_reranker", "static"])
def test_all_files_of_a_layout_are_fetched_and_found_again_without_the_hub(
    layout: str, empty_hub: Hub, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(layout)
    empty_hub.repos[NAME] = Repo(files_of(folder))
    expected = identity(plan_load(plain.entry(folder)))

    assert identity(plan_load(entry())) == expected

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    empty_hub.requests.clear()
    assert is_whole(entry())
    assert find_download(entry()) is None
    assert identity(plan_load(entry(), may_download=False)) == expected
    assert empty_hub.requests == []


def test_trusted_code_of_a_repository_runs(
    empty_hub: Hub,
    make_family: Callable[..., Path],
    copy: Callable[[Path], Path],
    edit_json: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = copy(make_family("bert"))
    edit_json(folder / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    (folder / "own.py").write_text(CODE)
    empty_hub.repos[NAME] = Repo(files_of(folder))

    with pytest.raises(LoadError, match="has its own code"):
        plan_load(entry(runtime="torch"))
    plain.load_whole(Path(NAME), revision=COMMIT, trust_remote_code=True)
