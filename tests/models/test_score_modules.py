"""Cross-encoders that are a list of modules, as Ettin's rerankers are, give sentence-transformers' scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling, Transformer
from torch import nn

from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model.build import BuildOptions, build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.errors import LoadError
from gateway.types import LabelFunction, ModelKind, Truncate
from tests.engine.model.reading import tokenize_pairs
from tests.models.checkpoints import FAMILIES, SENTENCES, make_transformer
from tests.models.cross_encoders import with_pairs
from tests.models.plain import assert_same_logits, entry

Copy = Callable[[Path], Path]
EditJson = Callable[..., None]

QUERY = "What is the capital of Germany?"
DOCUMENTS = ["Berlin is the capital of Germany.", "", "fox", "near vectors mean near texts. " * 20, *SENTENCES]


def make(folder: Path, model_type: str, num_labels: int, pooling: str = "cls") -> Path:
    """Let sentence-transformers save an Ettin: Transformer, Pooling, Dense, LayerNorm, Dense."""
    family = FAMILIES[model_type]
    make_transformer(folder / "transformer", model_type, with_pairs(family.tokenizer(), model_type), **family.changes)
    torch.manual_seed(7)
    norm = LayerNorm(48)
    nn.init.normal_(norm.norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.norm.bias, 0.0, 0.2)
    modules = [
        Transformer(str(folder / "transformer")),
        Pooling(64, pooling_mode=pooling),
        Dense(64, 48, bias=False, activation_function=nn.GELU()),
        norm,
        Dense(48, num_labels, activation_function=nn.Identity(), module_output_name="scores"),
    ]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


@pytest.fixture(scope="module")
def ettin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ettin"), "modernbert", 1)


def load(folder: Path) -> Encoder:
    plan = plan_load(entry(folder))
    options = BuildOptions("cpu", "float32", "torch", plan.max_tokens, CpuThreads(1, 1), plan.tasks, plan.instruction)
    return build_encoders(plan.checkpoint, options)[0]


def scores(folder: Path) -> np.ndarray:
    encoder = load(folder)
    tokens = tokenize_pairs(encoder.tokenizer, QUERY, DOCUMENTS, Truncate.END)
    batched = np.concatenate([one.dense for one in encoder.encode([Item(row) for row in tokens])])
    alone = np.concatenate([encoder.encode([Item(row)])[0].dense for row in tokens])
    assert_same_logits(alone, batched)
    return batched


def test_ettin_gives_sentence_transformers_scores(ettin: Path) -> None:
    theirs = CrossEncoder(str(ettin), device="cpu")
    expected = theirs.predict([(QUERY, text) for text in DOCUMENTS], activation_fn=nn.Identity())

    found = scores(ettin)

    assert np.ptp(expected) > 0.1  # otherwise, any two numbers would pass
    assert_same_logits(found[:, 0], expected.reshape(-1))
    info = plan_load(entry(ettin)).info
    assert (info.kind, info.width, info.labels) == (ModelKind.RERANK, 1, ())


def test_several_labels_classify(tmp_path: Path) -> None:
    folder = make(tmp_path, "bert", 3, "mean")
    theirs = CrossEncoder(str(folder), device="cpu")
    expected = theirs.predict([(QUERY, text) for text in DOCUMENTS], activation_fn=nn.Identity())

    assert_same_logits(scores(folder), expected)
    info = plan_load(entry(folder)).info
    assert (info.kind, info.labels) == (ModelKind.CLASSIFY, ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert info.label_function is LabelFunction.SOFTMAX


def test_the_modules_are_part_of_the_fingerprint(ettin: Path, copy: Copy) -> None:
    folder = copy(ettin)
    before = plan_load(entry(folder)).info.fingerprint
    file = next(path for path in folder.glob("*_LayerNorm/model.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)

    assert plan_load(entry(folder)).info.fingerprint != before


@pytest.mark.parametrize(
    ("module", "changes", "reason"),
    [
        (
            "2_Dense",
            {"activation_function": "torch.nn.modules.activation.Hardtanh"},
            "activation Hardtanh is not supported",
        ),
        ("2_Dense", {"use_residual": True}, "no use_residual"),
        ("4_Dense", {"module_input_name": "token_embeddings"}, "only a plain layer behind the pooling"),
        (
            "4_Dense",
            {"module_output_name": None},
            "modules Transformer, Pooling, Dense, LayerNorm, Dense are not supported",
        ),
        ("4_Dense", {"out_features": 2}, "the head gives 1 numbers, expected 2 for its labels"),
    ],
)
def test_modules_that_compute_something_else_are_refused(
    module: str, changes: dict[str, object], reason: str, ettin: Path, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(ettin)
    edit_json(folder / module / "config.json", **changes)

    with pytest.raises(LoadError, match=reason):
        load(folder)


def test_a_missing_tensor_is_named(ettin: Path, copy: Copy) -> None:
    folder = copy(ettin)
    file = folder / "2_Dense" / "model.safetensors"
    save_file({"other.weight": load_file(file)["linear.weight"]}, file)

    with pytest.raises(LoadError, match=r"cannot read a head of CrossEncoder: KeyError: 'linear\.weight'"):
        load(folder)


def test_the_layout_is_that_of_sentence_transformers(ettin: Path) -> None:
    rows = json.loads((ettin / "modules.json").read_text())

    assert [row["type"].rsplit(".", 1)[-1] for row in rows] == ["Transformer", "Pooling", "Dense", "LayerNorm", "Dense"]
