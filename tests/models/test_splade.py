"""SPLADE: the sparse vectors that sentence-transformers' SparseEncoder gives, in every layout of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from gateway.engine.loading import plan_load
from gateway.engine.model.splade import LOGITS_AT_ONCE, SpladeHead
from gateway.engine.model.states import TokenStates
from gateway.errors import LoadError
from gateway.types import Output, SparseVector, Truncate
from tests.models.by_token import save
from tests.models.checkpoints import MAX_TOKENS, TEXTS
from tests.models.plain import entry, load_whole

Load = Callable[..., Any]
Copy = Callable[[Path], Path]
EditJson = Callable[..., None]
MakeSplade = Callable[..., Path]

TYPES = ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "mpnet", "electra", "modernbert", "gte")
SPARSE = (Output.SPARSE,)
QUERIES = ("fox", "", "Berlin, Berlin, the capital of Germany?", "near vectors " * 60)


@pytest.fixture(scope="module")
def make_splade(make_masked_lm: MakeSplade, tmp_path_factory: pytest.TempPathFactory) -> MakeSplade:
    """Return a function that makes a sparse encoder, as sentence-transformers saves it."""

    @cache
    def make(model_type: str, strategy: str = "max", activation: str = "relu", **options: object) -> Path:
        transformer = Transformer(str(make_masked_lm(model_type)), transformer_task="fill-mask")
        modules = [transformer, SpladePooling(strategy, activation_function=activation)]
        model = SparseEncoder(modules=modules, device="cpu", **options)
        return save(model, tmp_path_factory.mktemp("splade") / "splade")

    return make


def check(found: SparseVector, right: np.ndarray, tolerance: float = 2e-5) -> None:
    """Compare a sparse vector with a row of sentence-transformers' dense form of it.

    Processors sum float32 values in different orders: on some, a weight of 2 differs by 1.1e-5.
    """
    assert found.indices.dtype == np.int64
    assert found.values.dtype == np.float32
    assert found.indices.tolist() == sorted(set(found.indices.tolist()))
    ours = np.zeros(len(right))
    ours[found.indices] = found.values
    np.testing.assert_allclose(ours, right, atol=tolerance, rtol=tolerance)
    assert np.all(found.values != 0)


def check_all(model: Any, rows: np.ndarray, texts: Sequence[str], task: str | None = None, **tolerance: float) -> None:
    """Compare the vectors of texts, together and each alone."""
    tasks, outputs = [task] * len(texts), [SPARSE] * len(texts)
    together = model.encode(texts, tasks, outputs)
    alone = [one for text in texts for one in model.encode([text], [task], [SPARSE])]
    for one, by_itself, right in zip(together, alone, rows, strict=True):
        check(one.sparse, right, **tolerance)
        check(by_itself.sparse, right, **tolerance)
        assert one.dense.shape == (1, 0)


def reference(folder: Path, texts: Sequence[str], method: str = "encode", **options: Any) -> np.ndarray:
    model = SparseEncoder(str(folder), device="cpu", **options)
    return getattr(model, method)(list(texts), convert_to_sparse_tensor=False).numpy()


# ------------------------------------------------------------------------------------------------------------ vectors


@pytest.mark.parametrize("model_type", TYPES)
def test_vectors_are_sentence_transformers_own(make_splade: MakeSplade, load: Load, model_type: str) -> None:
    folder = make_splade(model_type)

    rows = reference(folder, TEXTS)

    assert 0.05 < (rows > 0).mean() < 0.95
    check_all(load(folder, "torch"), rows, TEXTS)


@pytest.mark.parametrize("runtime", ["packed", "openvino"])
def test_every_runtime_gives_the_same_vectors(make_splade: MakeSplade, load: Load, runtime: str) -> None:
    folder = make_splade("bert")

    check_all(load(folder, runtime), reference(folder, TEXTS), TEXTS, tolerance=2e-4)


@pytest.mark.parametrize(("strategy", "activation"), [("max", "log1p_relu"), ("sum", "relu"), ("sum", "log1p_relu")])
def test_the_pooling_is_the_checkpoints(make_splade: MakeSplade, load: Load, strategy: str, activation: str) -> None:
    folder = make_splade("bert", strategy, activation)

    check_all(load(folder, "torch"), reference(folder, TEXTS), TEXTS, tolerance=3e-5)


@pytest.fixture(params=["max", "sum"])
def head(request: pytest.FixtureRequest, make_splade: MakeSplade) -> SpladeHead:
    checkpoint = plan_load(entry(make_splade("bert", request.param))).checkpoint
    assert checkpoint.splade is not None
    return SpladeHead(checkpoint, checkpoint.splade, torch.float32)


def test_logits_are_computed_in_pieces(head: SpladeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 20, 1, 7, 14, 2]
    states = TokenStates(torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(1)), lengths)
    whole = head(states, [], range(len(lengths)))
    sizes: list[int] = []
    logits = head.logits
    monkeypatch.setattr(head, "step", 7)
    monkeypatch.setattr(head, "logits", lambda part: sizes.append(len(part)) or logits(part))

    pieces = head(states, [], range(len(lengths)))

    assert sizes == [7] * 6 + [5]
    for one, other in zip(pieces, whole, strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        np.testing.assert_allclose(one.values, other.values, rtol=1e-5)


def test_no_more_logits_than_a_limit_are_held_at_once(head: SpladeHead) -> None:
    assert head.step == LOGITS_AT_ONCE // len(head.table)


def test_the_largest_weights_are_kept_where_the_checkpoint_says_how_many(make_splade: MakeSplade, load: Load) -> None:
    folder = make_splade("bert", max_active_dims=5)

    rows = reference(folder, TEXTS)

    assert (rows > 0).sum(axis=1).max() == 5
    check_all(load(folder, "torch"), rows, TEXTS)


def test_prompts_are_the_checkpoints(make_splade: MakeSplade, load: Load) -> None:
    folder = make_splade("bert", prompts=json_key({"query": "a query ", "document": ""}))

    check_all(load(folder, "torch"), reference(folder, TEXTS, "encode_query"), TEXTS, "retrieval.query")


def json_key(prompts: dict[str, str]) -> Any:
    """Return a dictionary that can be a key of a cache."""
    return type("Prompts", (dict,), {"__hash__": lambda self: hash(json.dumps(self))})(prompts)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_a_reduced_precision_stays_near(make_splade: MakeSplade, load: Load, dtype: str) -> None:
    folder = make_splade("bert")
    rows = reference(folder, TEXTS)

    for one, right in zip(load(folder, "torch", dtype).encode(TEXTS, outputs=[SPARSE] * len(TEXTS)), rows, strict=True):
        ours = np.zeros(len(right))
        ours[one.sparse.indices] = one.sparse.values
        assert ours @ right / np.linalg.norm(ours) / np.linalg.norm(right) > 0.999


# ------------------------------------------------------------------------------------------------- queries by a table


def test_documents_of_an_inference_free_model(inference_free: Path, load: Load) -> None:
    rows = reference(inference_free, TEXTS, "encode_document")

    check_all(load(inference_free, "torch"), rows, TEXTS, "retrieval.passage")


def test_queries_of_an_inference_free_model(inference_free: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(inference_free, "torch")
    texts = [text for text in QUERIES if text]  # without tokens, sentence-transformers fails
    rows = reference(inference_free, texts, "encode_query")
    monkeypatch.setattr(model.encoder.runtime, "forward", lambda _features: pytest.fail("the transformer has run"))

    check_all(model, rows, texts, "retrieval.query")

    [empty] = model.encode([""], ["retrieval.query"], [SPARSE])
    assert empty.sparse.indices.tolist() == []


def test_queries_and_documents_in_one_batch(inference_free: Path, load: Load) -> None:
    texts = ["fox", "fox", "Berlin is near", "Berlin is near"]
    tasks = ["retrieval.query", "retrieval.passage", "retrieval.passage", "retrieval.query"]
    queries, documents = (reference(inference_free, texts, f"encode_{side}") for side in ("query", "document"))

    encoded = load(inference_free, "torch").encode(texts, tasks, [SPARSE] * 4)

    for i, one in enumerate(encoded):
        check(one.sparse, (queries if tasks[i] == "retrieval.query" else documents)[i])


def test_tokens_of_queries_have_no_template_and_are_cut_at_the_tokenizers_limit(
    inference_free: Path, load: Load
) -> None:
    encoder = load(inference_free, "torch").encoder
    tokenizer = SparseEncoder(str(inference_free), device="cpu")[0].sub_modules["query"][0].tokenizer

    for text in QUERIES:
        ids = tokenizer(text, add_special_tokens=False, truncation=True).input_ids
        assert encoder.tokenize([text], "retrieval.query", Truncate.END)[0].ids == ids
    assert len(ids) == MAX_TOKENS


def test_the_default_route_is_the_default_task(inference_free: Path, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(inference_free)
    edit_json(folder / "router_config.json", parameters={"default_route": "document"})

    assert plan_load(entry(inference_free)).info.default_task == "retrieval.query"
    assert plan_load(entry(folder)).info.default_task == "retrieval.passage"
    assert plan_load(entry(folder, default_task="query")).info.default_task == "retrieval.query"


def test_weights_of_queries_by_token(inference_free: Path, copy: Copy, load: Load) -> None:
    folder = copy(inference_free)
    queries = folder / "query_0_SparseStaticEmbedding"
    (queries / "model.safetensors").unlink()
    (queries / "config.json").write_text(json.dumps({"path": "idf.json", "frozen": True}))
    (folder / "idf.json").write_text(json.dumps({"fox": 2.5, "berlin": 1.5, "[CLS]": 9.0}))

    [one] = load(folder, "torch").encode(["Berlin: a fox, the fox"], ["retrieval.query"], [SPARSE])

    assert sorted(one.sparse.values.tolist()) == [1.5, 2.5]


# ------------------------------------------------------------------------------------------------- without modules.json


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_the_registry_says_that_a_masked_language_model_is_a_sparse_encoder(
    make_masked_lm: MakeSplade, load: Load, copy: Copy, model_type: str
) -> None:
    folder = make_masked_lm(model_type)

    rows = reference(folder, TEXTS)

    model = load_as_sparse(folder)
    for one, right in zip(model.encode(TEXTS, outputs=[SPARSE] * len(TEXTS)), rows, strict=True):
        check(one.sparse, right)


def load_as_sparse(folder: Path) -> Any:
    from gateway.engine.loading import load_reference
    from tests.models.conftest import Loaded

    return Loaded(load_reference(plan_load(entry(folder, outputs=("sparse",)))))


def test_without_the_registrys_word_it_is_refused(make_masked_lm: MakeSplade) -> None:
    with pytest.raises(LoadError, match=r"BertForMaskedLM is not a model that embeds: .* `outputs: \[sparse\]`"):
        plan_load(entry(make_masked_lm("bert")))


def test_weights_of_queries_without_modules_are_refused(make_masked_lm: MakeSplade, copy: Copy) -> None:
    folder = copy(make_masked_lm("bert"))
    (folder / "idf.json").write_text("{}")

    with pytest.raises(LoadError, match=r"has weights for queries \(idf\.json\) and no modules\.json"):
        plan_load(entry(folder, outputs=("sparse",)))


# ------------------------------------------------------------------------------------------------------- descriptions


def test_a_model_without_dense_vectors_says_so(make_splade: MakeSplade) -> None:
    info = plan_load(entry(make_splade("bert"))).info

    assert (info.outputs, info.width, info.dimensions, info.has_states) == ((Output.SPARSE,), 0, (), False)
    assert info.pooling == "splade"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": ("dense", "sparse")}, "outputs dense: the checkpoint has no such head, only sparse"),
        ({"dimensions": (32,)}, "dimensions cannot be set: this model has no dense vectors, only sparse"),
        ({"golden": "golden.json"}, "golden cannot be set: this model has no dense vectors, only sparse"),
    ],
    ids=["outputs", "dimensions", "golden"],
)
def test_settings_for_dense_vectors_are_refused(
    make_splade: MakeSplade, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        plan_load(entry(make_splade("bert"), **fields))


def test_the_pooling_belongs_to_the_fingerprint(make_splade: MakeSplade) -> None:
    kinds = [("max", "relu"), ("sum", "relu"), ("max", "log1p_relu")]
    prints = {plan_load(entry(make_splade("bert", *kind))).checkpoint.fingerprint for kind in kinds}

    assert len(prints) == 3


def change_modules(folder: Path, kinds: Sequence[str]) -> None:
    rows = json.loads((folder / "modules.json").read_text())
    for row, kind in zip(rows, kinds, strict=False):
        row["type"] = kind
    (folder / "modules.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["sentence_transformers.models.Pooling"], "a sparse encoder of the modules Pooling, SpladePooling is not"),
        (["sentence_transformers.models.Transformer", "my.SpladePooling"], r"the checkpoint's own code \(my\.Splade"),
    ],
    ids=["modules", "code"],
)
def test_other_modules_are_refused(make_splade: MakeSplade, copy: Copy, kinds: list[str], message: str) -> None:
    folder = copy(make_splade("bert"))
    change_modules(folder, kinds)

    with pytest.raises(LoadError, match=message):
        plan_load(entry(folder))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "1_SpladePooling/config.json",
            {"pooling_strategy": "mean"},
            "pooling_strategy 'mean' with activation_function",
        ),
        ("1_SpladePooling/config.json", {"top_k": 3}, "top_k is not supported"),
        ("sentence_bert_config.json", {"transformer_task": None}, "the transformer_task None in sentence_bert_config"),
        (
            "config_sentence_transformers.json",
            {"max_active_dims": 0},
            "max_active_dims must be a positive integer, got 0",
        ),
        (
            "config.json",
            {"tie_word_embeddings": False},
            r"no cls\.predictions\.decoder\.weight, and tie_word_embeddings",
        ),
    ],
    ids=["pooling", "unknown", "task", "limit", "untied"],
)
def test_other_settings_are_refused(
    make_splade: MakeSplade, copy: Copy, edit_json: EditJson, file: str, changes: dict[str, object], message: str
) -> None:
    folder = copy(make_splade("bert"))
    edit_json(folder / file, **changes)

    with pytest.raises(LoadError, match=message):
        load_whole(folder)


def test_a_checkpoint_without_the_head_is_refused(make_splade: MakeSplade, copy: Copy) -> None:
    folder = copy(make_splade("bert"))
    path = folder / "model.safetensors"
    save_file({name: part for name, part in load_file(path).items() if "transform" not in name}, path, {"format": "pt"})

    with pytest.raises(LoadError, match=r"cannot read the head of a masked language model: .*transform\.dense"):
        load_whole(folder)


def test_the_decoder_of_the_file_counts(make_splade: MakeSplade, copy: Copy, load: Load) -> None:
    folder = copy(make_splade("bert"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(1)
    decoder = torch.randn_like(tensors["bert.embeddings.word_embeddings.weight"]) * 0.3
    save_file({**tensors, "cls.predictions.decoder.weight": decoder}, path, {"format": "pt"})

    check_all(load(folder, "torch"), reference(folder, TEXTS), TEXTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"structure": {"query": ["query_0_SparseStaticEmbedding"]}},
            "of the routes query: SparseStaticEmbedding is not",
        ),
        ({"parameters": {"default_route": "other"}}, "a default_route 'other' other than query and document"),
        ({"parameters": {"route_mappings": {"a": "query"}}}, "route_mappings"),
        ({"structure": {"query": "x", "document": []}}, "a route must list modules that are in types"),
        ({"types": []}, "must have the objects types, structure and parameters"),
    ],
    ids=["routes", "default", "mappings", "list", "types"],
)
def test_other_routers_are_refused(
    inference_free: Path, copy: Copy, edit_json: EditJson, changes: dict[str, object], message: str
) -> None:
    folder = copy(inference_free)
    edit_json(folder / "router_config.json", **changes)

    with pytest.raises(LoadError, match=message):
        plan_load(entry(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights[:3].clone(), "has 3 weights, for a tokenizer with ids up to"),
        (lambda weights: weights * torch.nan, "holds weights that are not finite"),
    ],
    ids=["few", "nan"],
)
def test_weights_of_queries_that_do_not_fit_are_refused(
    inference_free: Path, copy: Copy, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    folder = copy(inference_free)
    path = folder / "query_0_SparseStaticEmbedding" / "model.safetensors"
    save_file({"weight": change(load_file(path)["weight"])}, path)

    with pytest.raises(LoadError, match=message):
        load_whole(folder)


def test_a_router_without_weights_of_queries_is_refused(inference_free: Path, copy: Copy) -> None:
    folder = copy(inference_free)
    (folder / "query_0_SparseStaticEmbedding" / "model.safetensors").unlink()

    with pytest.raises(LoadError, match="no weights of queries: none of"):
        plan_load(entry(folder))


def test_an_architecture_whose_head_is_not_known_is_refused(
    make_splade: MakeSplade, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_splade("bert"))
    edit_json(folder / "config.json", model_type="nomic_bert")

    with pytest.raises(
        LoadError, match="a sparse encoder of model_type 'nomic_bert' is not supported; supported: bert,"
    ):
        plan_load(entry(folder))
