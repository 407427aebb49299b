"""ColBERT: a vector for each token, as sentence-transformers' MultiVectorEncoder gives it, in every layout."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from torch import nn
from transformers import AutoModel, AutoTokenizer

from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model.agreement import MIN_COSINE, least_cosine
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.load_model import load_model
from gateway.engine.model.load_tokenizer import load_tokenizers
from gateway.engine.model.runtimes.attention import attention_rule
from gateway.engine.model.runtimes.openvino import OpenVinoRuntime, TracedModel
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.errors import ContextLengthExceeded, LoadError
from gateway.types import Output, Truncate
from tests.models.by_token import write
from tests.models.checkpoints import SENTENCES
from tests.models.plain import entry, load_whole

Load = Callable[..., Any]
Copy = Callable[[Path], Path]
EditJson = Callable[..., None]
Tokenize = Callable[..., list[int]]
MakeColbert = Callable[..., Path]

RUNTIMES = ("reference", "packed", "openvino")
MULTI = (Output.MULTIVECTOR,)
QUERY, DOCUMENT = "retrieval.query", "retrieval.passage"
TEXTS = (
    "fox",
    "",
    "Berlin is the capital of Germany; it has 3.85 million inhabitants.",
    "Embeddings, near: vectors! mean (near) texts.",
    "near vectors " * 60,
)
LAYOUTS = ("native", "pylate", "stanford")


@pytest.fixture(scope="module")
def make_native(make_base: MakeColbert, tmp_path_factory: pytest.TempPathFactory) -> MakeColbert:
    """Return a function that has sentence-transformers save a multi-vector model."""

    def make(
        model_type: str = "bert",
        *,
        transformer: dict[str, Any] | None = None,
        dense: Sequence[nn.Module] | None = None,
        mask: dict[str, Any] | None = None,
        tail: Sequence[nn.Module] = (),
        is_normalized: bool = True,
        **options: Any,
    ) -> Path:
        torch.manual_seed(6)
        settings = {"query_expansion": {"strategy": "fixed", "length": 16}, "document_length": 20}
        modules = [Transformer(str(make_base(model_type)), **(settings if transformer is None else transformer))]
        modules += dense or [token_dense(64, 24)]
        mask = {"skiplist_words": [",", ".", ";", "fox"]} if mask is None else mask
        modules += [MultiVectorMask(**mask)] if mask else []
        modules += [Normalize(module_input_name="token_embeddings")] * is_normalized
        prompts = {"query": "a query: ", "document": "a text: "}
        model = MultiVectorEncoder(modules=[*modules, *tail], device="cpu", **{"prompts": prompts, **options})
        folder = tmp_path_factory.mktemp("native") / "native"
        model.save(str(folder), create_model_card=False)
        return folder

    return make


def token_dense(num_in: int, num_out: int, **options: Any) -> Dense:
    options = {"bias": False, "activation_function": nn.Identity(), **options}
    return Dense(num_in, num_out, module_input_name="token_embeddings", **options)


@pytest.fixture(scope="module")
def native(make_native: MakeColbert) -> Path:
    return make_native()


@pytest.fixture(scope="module")
def pylate(make_base: MakeColbert, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint as PyLate 1.x saves it: two modules, and the settings next to them."""
    folder = tmp_path_factory.mktemp("pylate") / "pylate"
    base = make_base("bert")
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(7)
    dense = folder / "1_Dense"
    dense.mkdir()
    save_file({"linear.weight": torch.randn(24, 64) * 0.3}, dense / "model.safetensors")
    write(
        dense / "config.json",
        in_features=64,
        out_features=24,
        bias=False,
        activation_function="torch.nn.modules.linear.Identity",
    )
    rows = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": type_} for i, (path, type_) in enumerate(rows)]
    (folder / "modules.json").write_text(json.dumps(modules))
    write(folder / "sentence_bert_config.json", max_seq_length=63, do_lower_case=False)
    write(
        folder / "config_sentence_transformers.json",
        model_type="ColBERT",
        prompts={},
        default_prompt_name=None,
        similarity_fn_name="MaxSim",
        query_prefix="[Q] ",
        document_prefix="[D] ",
        query_length=16,
        document_length=30,
        attend_to_expansion_tokens=False,
        skiplist_words=list(string.punctuation),
    )
    return folder


@pytest.fixture(scope="module")
def layout(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def reference(folder: Path, texts: Sequence[str], task: str) -> list[np.ndarray]:
    model = MultiVectorEncoder(str(folder), device="cpu")
    encode = model.encode_query if task == QUERY else model.encode_document
    return [vectors.numpy() for vectors in encode(list(texts))]


def check_all(folder: Path, load: Load, task: str, runtime: str = "torch", tolerance: float = 2e-5) -> None:
    """Compare the vectors of texts, together and each alone."""
    model, right = load(folder, runtime), reference(folder, TEXTS, task)
    together = model.encode(TEXTS, [task] * len(TEXTS), [MULTI] * len(TEXTS))
    alone = [one for text in TEXTS for one in model.encode([text], [task], [MULTI])]
    for one, by_itself, vectors in zip(together, alone, right, strict=True):
        assert one.multivector.dtype == np.float32
        np.testing.assert_allclose(one.multivector, vectors, atol=tolerance)
        np.testing.assert_allclose(by_itself.multivector, vectors, atol=tolerance)
        assert one.dense.shape == (1, 0)


# ------------------------------------------------------------------------------------------------------------ vectors


@pytest.mark.parametrize("task", [QUERY, DOCUMENT])
@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_vectors_are_sentence_transformers_own(layout: Path, load: Load, task: str) -> None:
    check_all(layout, load, task)


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
@pytest.mark.parametrize("task", [QUERY, DOCUMENT])
def test_every_runtime_gives_the_same_vectors(native: Path, load: Load, task: str, runtime: str) -> None:
    check_all(native, load, task, runtime, tolerance=2e-4)


@pytest.mark.parametrize("task", [QUERY, DOCUMENT])
@pytest.mark.parametrize("model_type", ["xlm-roberta", "modernbert", "lfm2"])
def test_other_architectures(make_native: MakeColbert, load: Load, model_type: str, task: str) -> None:
    check_all(make_native(model_type), load, task)


@pytest.mark.parametrize("model_type", ["modernbert", "mistral"])
def test_an_appended_token_may_see_nothing_within_its_window(
    make_native: MakeColbert, load: Load, model_type: str
) -> None:
    """Behind a short query, a window has only tokens that are not attended to: attention gives 0 there."""
    folder = make_native(model_type, transformer={"query_expansion": {"strategy": "fixed", "length": 40}})

    check_all(folder, load, QUERY, "openvino", tolerance=2e-4)


def test_the_check_on_load_compares_tokens_that_are_not_attended_to(make_native: MakeColbert) -> None:
    """OpenVINO's own attention gives NaN to a token that sees nothing."""
    folder = make_native("modernbert", transformer={"query_expansion": {"strategy": "fixed", "length": 40}})
    plan = plan_load(entry(folder))
    model, _mask = load_model(plan.checkpoint, "cpu", "float32", trust_remote_code=False)
    tokenizer = load_tokenizers(plan.checkpoint, 60, 40, trust_remote_code=False).texts
    cosines = []
    for length in (40, 0):
        traced = TracedModel.trace(
            model, None, attention_rule(model.config), has_segments=False, unattended_length=length
        )
        [runtime] = OpenVinoRuntime.compile(traced, "float32", CpuThreads(1, 1))
        cosines.append(least_cosine(runtime, PaddedRuntime(model, None), plan.checkpoint, tokenizer))

    assert cosines[0] > MIN_COSINE["float32"]
    assert not cosines[1] > MIN_COSINE["float32"]


EXPANSIONS = {
    "attended": {"query_expansion": {"strategy": "fixed", "length": 16, "attend": True}},
    "at least": {"query_expansion": {"strategy": "min", "length": 12}},
    "at least, and no more than": {"query_expansion": {"strategy": "min", "length": 12}, "query_length": 18},
    "another token": {"query_expansion": {"strategy": "fixed", "length": 16, "token": "[unused1]"}},
    "none": {},
    "none, and no more than": {"query_length": 10, "document_length": 12},
}


@pytest.mark.parametrize("settings", EXPANSIONS.values(), ids=EXPANSIONS)
def test_queries_are_expanded_as_the_checkpoint_says(
    make_native: MakeColbert, load: Load, settings: dict[str, Any]
) -> None:
    folder = make_native(transformer=settings)

    check_all(folder, load, QUERY)
    check_all(folder, load, DOCUMENT)


@pytest.mark.parametrize(
    "mask",
    [
        {"skiplist_words": [",", "near"], "skiplist_tasks": ["query", "document"]},
        {"skiplist_words": [",", "near"], "skiplist_tasks": ["query"]},
        {"skiplist_words": ["no such word", "[UNK]"]},
        {"skiplist_words": []},
    ],
    ids=["both", "queries", "unknown", "none"],
)
def test_words_without_vectors_are_the_checkpoints(make_native: MakeColbert, load: Load, mask: dict[str, Any]) -> None:
    folder = make_native(mask=mask)

    check_all(folder, load, QUERY)
    check_all(folder, load, DOCUMENT)


def test_vectors_may_not_be_normalized(make_native: MakeColbert, load: Load) -> None:
    folder = make_native(transformer={"document_length": 20}, mask={}, is_normalized=False)

    check_all(folder, load, DOCUMENT, tolerance=2e-4)


def test_several_layers_with_residuals(make_native: MakeColbert, load: Load) -> None:
    torch.manual_seed(4)
    layers = [
        token_dense(64, 40, bias=True, activation_function=nn.Tanh(), use_residual=True),
        token_dense(40, 40, activation_function=nn.GELU(), use_residual=True),
        token_dense(40, 12),
    ]

    check_all(make_native(dense=layers), load, DOCUMENT)


def test_a_pylate_model_without_expansion(pylate: Path, copy: Copy, edit_json: EditJson, load: Load) -> None:
    folder = copy(pylate)
    edit_json(folder / "config_sentence_transformers.json", do_query_expansion=False, skiplist_words=None)

    check_all(folder, load, QUERY)
    check_all(folder, load, DOCUMENT)


def test_a_setting_that_is_null_means_the_same_as_in_sentence_transformers(
    pylate: Path, copy: Copy, edit_json: EditJson, load: Load
) -> None:
    folder = copy(pylate)
    settings = {"do_query_expansion": None, "attend_to_expansion_tokens": None, "attend_to_mask_tokens": True}
    edit_json(folder / "config_sentence_transformers.json", **settings)

    check_all(folder, load, QUERY)


@pytest.mark.parametrize("masks", [False, None])
def test_stanfords_settings(masks: bool | None, stanford: Path, copy: Copy, load: Load) -> None:
    folder = copy(stanford)
    write(folder / "artifact.metadata", mask_punctuation=masks, attend_to_mask_tokens=True)

    check_all(folder, load, QUERY)
    check_all(folder, load, DOCUMENT)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_tokens_are_counted_as_the_model_reads_them(layout: Path, load: Load) -> None:
    encoder, model = load(layout, "torch").encoder, MultiVectorEncoder(str(layout), device="cpu")
    for task, side in ((QUERY, "query"), (DOCUMENT, "document")):
        for text in TEXTS:
            prompt = model.prompts[side]
            features = model.preprocess([text], prompt=prompt, task=side)
            [tokens] = encoder.tokenize([text], task, Truncate.END)
            assert tokens.ids == features["input_ids"][0].tolist()
            assert tokens.num_attended in (None, int(features["attention_mask"].sum()))


def test_markers_stay_whole(stanford: Path, load: Load) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stanford)

    [tokens] = load(stanford, "torch").encoder.tokenize(["fox"], DOCUMENT, Truncate.END)

    assert tokens.ids[1] == tokenizer.convert_tokens_to_ids("[unused1]")


def test_a_query_that_is_too_long_is_cut_or_refused(stanford: Path, load: Load) -> None:
    encoder = load(stanford, "torch").encoder

    [tokens] = encoder.tokenize([" ".join(SENTENCES)], QUERY, Truncate.END)

    assert (len(tokens.ids), tokens.is_truncated, tokens.num_attended) == (12, True, None)
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 12 tokens"):
        encoder.tokenize([" ".join(SENTENCES)], QUERY, Truncate.REFUSE)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_that_are_not_attended_to_get_states_and_change_no_other(
    m3: Path, load: Load, tokenize: Tokenize, runtime: str
) -> None:
    model = AutoModel.from_pretrained(m3).eval()
    rows = [tokenize(m3, text) for text in ("a fox is near", "Berlin", "near vectors mean near texts")]
    attended = [len(rows[0]), len(rows[1]) - 2, len(rows[2]) - 3]
    items = [Item(Tokens(ids, num_attended=n)) for ids, n in zip(rows, attended, strict=True)]
    items[0] = Item(Tokens(rows[0]))  # of this one all are
    encoder = load(m3, runtime).encoder

    computed = encoder.forward(encoder.prepare(items))

    found = {row: text for group, states in computed for row, text in zip(group.rows, states.texts(), strict=True)}
    for row, (ids, n) in enumerate(zip(rows, attended, strict=True)):
        mask = (torch.arange(len(ids)) < n).long()[None]
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
        np.testing.assert_allclose(found[row].numpy(), right.numpy(), atol=2e-4)


# ------------------------------------------------------------------------------------------------------- descriptions


def test_a_model_without_dense_vectors_says_so(stanford: Path) -> None:
    info = plan_load(entry(stanford)).info

    assert (info.outputs, info.width, info.token_width, info.dimensions) == (MULTI, 0, 24, ())
    assert (info.default_task, list(info.tasks), info.max_tokens) == (DOCUMENT, [QUERY, DOCUMENT], 28)
    assert not info.has_states


def test_a_limit_of_the_registry_counts_for_documents_and_queries(stanford: Path) -> None:
    for limit, expected in ((20, (20, 12)), (40, (40, 12)), (8, (8, 8))):
        plan = plan_load(entry(stanford, max_tokens=limit))

        assert (plan.info.max_tokens, plan.build_options("cpu", None).max_query_tokens) == expected
        assert (plan.info.limit(DOCUMENT), plan.info.limit(QUERY)) == expected


def test_another_task_is_refused(native: Path) -> None:
    with pytest.raises(
        LoadError, match="the task 'separation' is not supported: this model has only queries and documents"
    ):
        plan_load(entry(native, prompts={"clustering": "x"}))


def test_settings_belong_to_the_fingerprint(stanford: Path, copy: Copy) -> None:
    folder = copy(stanford)
    prints = set()
    for changes in ({}, {"query_maxlen": 13}, {"doc_maxlen": 20}, {"mask_punctuation": False}):
        metadata = json.loads((stanford / "artifact.metadata").read_text())
        write(folder / "artifact.metadata", **{**metadata, **changes})
        prints.add(plan_load(entry(folder)).checkpoint.fingerprint)

    assert len(prints) == 4


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("2_MultiVectorMask/config.json", {"keep_only_token_ids": [3]}, "for images as documents"),
        ("2_MultiVectorMask/config.json", {"skiplist_tasks": ["title"]}, "must be of query and document"),
        ("2_MultiVectorMask/config.json", {"skiplist_words": "x"}, "skiplist_words must be a list of words"),
        ("2_MultiVectorMask/config.json", {"other": 1}, "other is not supported"),
        ("3_Normalize/config.json", {"module_input_name": "sentence_embedding"}, "must normalize token_embeddings"),
        ("1_Dense/config.json", {"module_input_name": "sentence_embedding"}, "must read and write token_embeddings"),
        ("1_Dense/config.json", {"out_features": 23}, "have 24 dimensions, expected 23"),
        (
            "sentence_bert_config.json",
            {"query_expansion": {"strategy": "other"}},
            "query_expansion must be an object of",
        ),
        ("sentence_bert_config.json", {"query_expansion": {"strategy": "min"}}, "query_expansion must have a length"),
        (
            "sentence_bert_config.json",
            {"query_expansion": {"strategy": "min", "length": 9, "token": "[no]"}},
            r"no token to append to a query: the tokenizer has no \[no\]",
        ),
        ("sentence_bert_config.json", {"query_length": "long"}, "query_length must be a positive number of tokens"),
        ("config_sentence_transformers.json", {"prompts": ["x"]}, "prompts must be an object of texts by name"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_other_settings_are_refused(
    native: Path, copy: Copy, edit_json: EditJson, file: str, changes: dict[str, object], message: str
) -> None:
    folder = copy(native)
    edit_json(folder / file, **changes)

    with pytest.raises(LoadError, match=message):
        load_whole(folder)


def test_mask_tokens_without_a_mask_are_refused(native: Path, copy: Copy) -> None:
    folder = copy(native)
    rows = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([row for row in rows if "Mask" not in row["type"]]))

    with pytest.raises(LoadError, match="query_expansion without a MultiVectorMask"):
        plan_load(entry(folder))


def test_other_modules_are_refused(make_native: MakeColbert) -> None:
    folder = make_native(tail=[HierarchicalTokenPooling(2)])

    with pytest.raises(
        LoadError, match=r"of the modules .*, HierarchicalTokenPooling is not supported; supported: Tran"
    ):
        plan_load(entry(folder))


@pytest.mark.parametrize("model_type", ["MultiVectorEncoder", "ColBERT"])
def test_modules_of_an_embedder_are_refused(
    make_family: Callable[..., Path], copy: Copy, edit_json: EditJson, model_type: str
) -> None:
    folder = copy(make_family("bert"))
    edit_json(folder / "config_sentence_transformers.json", model_type=model_type)

    with pytest.raises(
        LoadError, match=r"a multi-vector model \(ColBERT\) of the modules Transformer, Pooling, Normalize"
    ):
        plan_load(entry(folder))


def test_a_stanford_checkpoint_without_its_settings_is_refused(stanford: Path, copy: Copy) -> None:
    folder = copy(stanford)
    (folder / "artifact.metadata").unlink()

    with pytest.raises(LoadError, match=r"artifact\.metadata: no such file, and it defines the lengths"):
        plan_load(entry(folder))


def test_a_stanford_checkpoint_without_its_projection_is_refused(stanford: Path, copy: Copy) -> None:
    folder = copy(stanford)
    path = folder / "model.safetensors"
    save_file({name: part for name, part in load_file(path).items() if name != "linear.weight"}, path, {"format": "pt"})

    with pytest.raises(LoadError, match=r"HF_ColBERT without its projection, the tensor linear\.weight"):
        plan_load(entry(folder))
