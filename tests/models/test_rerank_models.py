"""A cross-encoder gives the scores that transformers' own class gives, however its pairs are batched and cut."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gateway.cli.verify import record_golden, verify
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import load_engine, plan_load
from gateway.engine.model import build
from gateway.engine.model.build import BuildOptions, build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.errors import ContextLengthExceeded, LoadError
from gateway.types import EmbedJob, ModelKind, Output, Truncate
from tests.engine.model.reading import tokenize_pairs
from tests.models.checkpoints import FAMILIES, MAX_TOKENS, SENTENCES
from tests.models.cross_encoders import PAIRS
from tests.models.plain import assert_same_logits

EditJson = Callable[..., None]
Copy = Callable[[Path], Path]
MakeReranker = Callable[..., Path]
Load = Callable[..., Encoder]
Reference = Callable[[Path, str, Sequence[str]], np.ndarray]

QUERY = "What is the capital of Germany?"
LONG = "near vectors mean near texts, again and again. " * 20
DOCUMENTS = [
    "Berlin is the capital of Germany.",
    "",
    "fox",
    LONG,
    "The quick brown fox jumps over the lazy dog, again and again. Embeddings map a text to a vector!",
    *SENTENCES,
]
TYPES = list(PAIRS)
FLASH_RUNTIMES = ["torch", "packed", "openvino"]
RUNTIMES = [
    *((name, "torch") for name in TYPES),
    ("xlm-roberta", "packed"),
    ("bert", "packed"),
    ("xlm-roberta", "openvino"),
    ("bert", "openvino"),
    ("modernbert", "openvino"),
]
# Of a score, to sentence-transformers' in float32.
TOLERANCES = {"torch": 2e-5, "packed": 2e-5, "openvino": 1e-4}


@pytest.fixture(scope="session")
def load() -> Load:
    """Return a function that loads the encoder of a cross-encoder with a runtime, in float32 by default."""

    @cache
    def load(folder: Path, runtime: str, dtype: str = "float32") -> Encoder:
        plan = plan_load(entry(folder))
        options = BuildOptions("cpu", dtype, runtime, plan.max_tokens, CpuThreads(1, 1), plan.tasks, plan.instruction)
        return build_encoders(plan.checkpoint, options)[0]

    return load


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Return the function that has sentence-transformers score each pair by itself, before any sigmoid."""

    @cache
    def encoder(folder: Path) -> CrossEncoder:
        return CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})

    def scores(folder: Path, query: str, texts: Sequence[str]) -> np.ndarray:
        rows = [encoder(folder).predict([(query, text)], activation_fn=nn.Identity()) for text in texts]
        return np.stack(rows)

    return scores


def entry(folder: Path, **changes: object) -> ModelEntry:
    fields = {"id": "tiny", "source": str(folder), "device": "cpu", "dtype": "float32", "enabled": True, **changes}
    return ModelEntry(**fields)


def score(encoder: Encoder, query: str, texts: Sequence[str]) -> np.ndarray:
    """Return the scores of texts in one batch."""
    tokens = tokenize_pairs(encoder.tokenizer, query, texts, Truncate.END)
    return np.concatenate([one.dense for one in encoder.encode([Item(row) for row in tokens])])


# ----------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("model_type", "runtime"), RUNTIMES)
def test_scores_are_sentence_transformers_own(
    model_type: str, runtime: str, make_reranker: MakeReranker, load: Load, reference: Reference
) -> None:
    folder = make_reranker(model_type)
    encoder = load(folder, runtime)
    expected = reference(folder, QUERY, DOCUMENTS)

    batched = score(encoder, QUERY, DOCUMENTS)
    alone = np.concatenate([score(encoder, QUERY, [text]) for text in DOCUMENTS])

    assert encoder.width == 1
    assert np.ptp(expected) > 0.1  # otherwise, any two numbers would pass
    np.testing.assert_allclose(batched, expected, rtol=0, atol=TOLERANCES[runtime])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=TOLERANCES[runtime])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_query_counts(model_type: str, make_reranker: MakeReranker, load: Load) -> None:
    encoder = load(make_reranker(model_type), "torch")

    one, other = (score(encoder, query, DOCUMENTS[:3]) for query in (QUERY, "a query"))

    assert np.abs(one - other).min() > 1e-4


@pytest.mark.parametrize("pooling", ["bos", "mean"])
def test_eurobert_pools_as_its_configuration_says(
    pooling: str, make_reranker: MakeReranker, load: Load, reference: Reference
) -> None:
    """By default it averages the scores of all tokens, which the tests above hold."""
    folder = make_reranker("eurobert", classifier_pooling=pooling)

    scores = score(load(folder, "torch"), QUERY, DOCUMENTS)

    assert_same_logits(scores, reference(folder, QUERY, DOCUMENTS))


def test_modernbert_may_average(make_reranker: MakeReranker, load: Load, reference: Reference) -> None:
    folder = make_reranker("modernbert", classifier_pooling="mean", classifier_bias=True, norm_bias=True)

    scores = score(load(folder, "torch"), QUERY, DOCUMENTS)

    np.testing.assert_allclose(scores, reference(folder, QUERY, DOCUMENTS), atol=1e-4)


def test_a_wrong_result_of_openvino_is_noticed(
    make_reranker: MakeReranker, load: Load, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO computes ModernBERT wrongly with the model's own masks."""
    monkeypatch.setattr(build, "attention_rule", lambda _config: None)
    folder = make_reranker("modernbert")

    encoder = load(folder, "auto")

    assert encoder.runtime.name == "torch"
    np.testing.assert_allclose(score(encoder, QUERY, DOCUMENTS), reference(folder, QUERY, DOCUMENTS), atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_what_sentence_transformers_saves_gives_its_scores(
    model_type: str, make_reranker: MakeReranker, load: Load, tmp_path: Path
) -> None:
    theirs = CrossEncoder(str(make_reranker(model_type)), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    short = [text for text in DOCUMENTS if text is not LONG]
    expected = theirs.predict([(QUERY, text) for text in short], activation_fn=nn.Identity())

    scores = score(load(tmp_path / "saved", "torch"), QUERY, short)

    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-4)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickled_weights_give_the_same(
    is_zip: bool, make_reranker: MakeReranker, copy: Copy, load: Load, reference: Reference
) -> None:
    folder = copy(make_reranker("xlm-roberta"))
    expected = reference(folder, QUERY, DOCUMENTS)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (folder / "model.safetensors").unlink()

    np.testing.assert_allclose(score(load(folder, "torch"), QUERY, DOCUMENTS), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------ Jina's own layout


def to_flash(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a tensor of transformers' XLM-RoBERTa as Jina's files have it; query, key and value together."""
    part = re.fullmatch(r"(roberta\.encoder\.)layer(\.\d+\.)(.+)\.(weight|bias)", name)
    if part is None:
        return {name.replace("embeddings.LayerNorm", "emb_ln"): tensors[name]}
    names = {
        "attention.self.query": "mixer.Wqkv",
        "attention.output.dense": "mixer.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "output.LayerNorm": "norm2",
    }
    if part[3] not in names:  # key and value come with the query
        return {}
    new = f"{part[1]}layers{part[2]}{names[part[3]]}.{part[4]}"
    if part[3] != "attention.self.query":
        return {new: tensors[name]}
    return {new: torch.cat([tensors[name.replace("query", role)] for role in ("query", "key", "value")])}


@pytest.fixture(scope="session")
def flash(make_reranker: MakeReranker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cross-encoder in the layout of jina-reranker-v2; see ``make_reranker("xlm-roberta")`` for the same one."""
    folder = tmp_path_factory.mktemp("flash") / "checkpoint"
    shutil.copytree(make_reranker("xlm-roberta"), folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {new: tensor for name in tensors for new, tensor in to_flash(name, tensors).items()}
    assert len(renamed) < len(tensors)
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    classes = {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModelForSequenceClassification": "modeling_xlm_roberta.XLMRobertaForSequenceClassification",
    }
    flash = {"auto_map": classes, "position_embedding_type": "absolute", "emb_pooler": None, "use_flash_attn": True}
    (folder / "config.json").write_text(json.dumps({**kept, **flash}))
    return folder


@pytest.mark.parametrize("runtime", FLASH_RUNTIMES)
def test_jina_s_layout_gives_the_scores_of_transformers_own(
    runtime: str, flash: Path, make_reranker: MakeReranker, load: Load, reference: Reference
) -> None:
    expected = reference(make_reranker("xlm-roberta"), QUERY, DOCUMENTS)

    scores = score(load(flash, runtime), QUERY, DOCUMENTS)

    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_jina_s_layout_may_be_pickled(
    flash: Path, copy: Copy, make_reranker: MakeReranker, load: Load, reference: Reference
) -> None:
    folder = copy(flash)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    scores = score(load(folder, "torch"), QUERY, DOCUMENTS)

    np.testing.assert_allclose(scores, reference(make_reranker("xlm-roberta"), QUERY, DOCUMENTS), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "rotary"}, "position_embedding_type 'rotary'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"lora_adaptations": ["retrieval.query"]}, "lora_adaptations"),
    ],
)
def test_another_model_in_jina_s_layout_is_refused(
    flash: Path, copy: Copy, edit_json: EditJson, changes: dict[str, object], message: str
) -> None:
    folder = copy(flash)
    edit_json(folder / "config.json", **changes)

    with pytest.raises(LoadError, match=message):
        plan_load(entry(folder))


def test_a_layer_that_is_missing_in_jina_s_layout_is_noticed(flash: Path, copy: Copy, load: Load) -> None:
    folder = copy(flash)
    tensors = load_file(folder / "model.safetensors")
    del tensors["roberta.encoder.layers.0.mixer.Wqkv.weight"]
    save_file(tensors, folder / "model.safetensors")

    with pytest.raises(LoadError, match=r"missing .*attention\.self"):
        load(folder, "torch")


# -------------------------------------------------------------------------------------------------------- truncation


@pytest.fixture
def encoder(make_reranker: MakeReranker, load: Load) -> Encoder:
    return load(make_reranker("bert"), "torch")


@pytest.mark.parametrize(("truncate", "side"), [(Truncate.END, "right"), (Truncate.START, "left")])
def test_pairs_are_the_tokenizers_own(
    make_reranker: MakeReranker, encoder: Encoder, truncate: Truncate, side: str
) -> None:
    theirs = AutoTokenizer.from_pretrained(make_reranker("bert"), truncation_side=side)

    tokens = tokenize_pairs(encoder.tokenizer, QUERY, DOCUMENTS, truncate)

    for row, text in zip(tokens, DOCUMENTS, strict=True):
        expected = theirs([QUERY], [text], truncation="only_second", max_length=MAX_TOKENS)
        assert row.ids == expected.input_ids[0]
        assert row.second == expected.token_type_ids[0].index(1)
    assert [i for i, row in enumerate(tokens) if row.is_truncated] == [3]
    assert max(len(row.ids) for row in tokens) == MAX_TOKENS


@pytest.mark.parametrize(("runtime", "is_causal"), [("torch", False), ("torch", True), ("openvino", True)])
def test_a_decoder_that_pads_with_the_token_that_ends_a_text_reads_the_state_before_it(
    runtime: str,
    is_causal: bool,
    make_reranker: MakeReranker,
    copy: Copy,
    edit_json: EditJson,
    load: Load,
    reference: Reference,
) -> None:
    folder = copy(make_reranker("qwen3"))
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    edit_json(folder / "config.json", pad_token_id=end, is_causal=is_causal)
    texts = [*DOCUMENTS, "", "fox <|endoftext|>"]

    scores = score(load(folder, runtime), QUERY, texts)

    np.testing.assert_allclose(scores, reference(folder, QUERY, texts), rtol=0, atol=TOLERANCES[runtime])


@pytest.mark.parametrize("model_type", ["bert", "qwen3"])
@pytest.mark.parametrize("query", [LONG, "fox " * (MAX_TOKENS - 4), "fox " * (MAX_TOKENS // 2)])
def test_a_long_query_is_cut_as_sentence_transformers_does_it(
    query: str, model_type: str, make_reranker: MakeReranker, load: Load, reference: Reference
) -> None:
    folder, texts = make_reranker(model_type), ["", "fox", LONG]
    encoder = load(folder, "torch")

    tokens = tokenize_pairs(encoder.tokenizer, query, texts, Truncate.END)

    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs([query] * 3, texts, truncation="longest_first", max_length=MAX_TOKENS).input_ids
    assert [row.ids for row in tokens] == expected
    assert_same_logits(score(encoder, query, texts), reference(folder, query, texts))


def test_a_very_long_text_is_cut_as_if_it_were_whole(encoder: Encoder) -> None:
    """A text far over the limit is tokenized only in part."""
    text = "The quick brown fox jumps over the lazy dog. " * 3_000

    [long, short] = tokenize_pairs(encoder.tokenizer, QUERY, [text, text[:2_000]], Truncate.END)

    assert long.ids == short.ids
    assert long.is_truncated


def test_a_limit_for_each_text_cuts_it(encoder: Encoder) -> None:
    [whole, cut] = (
        tokenize_pairs(encoder.tokenizer, QUERY, [SENTENCES[0]], Truncate.END, max_text_tokens=limit)[0]
        for limit in (None, 3)
    )

    assert cut.ids == [*whole.ids[: (whole.second or 0) + 3], whole.ids[-1]]
    assert (whole.is_truncated, cut.is_truncated) == (False, True)

    [end] = tokenize_pairs(encoder.tokenizer, QUERY, [SENTENCES[0]], Truncate.START, max_text_tokens=3)
    assert end.ids == [*whole.ids[: whole.second], *whole.ids[-4:]]


def test_too_long_is_refused_if_asked(encoder: Encoder) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"maximum context length is {MAX_TOKENS} tokens.* and text 7 have"):
        tokenize_pairs(encoder.tokenizer, QUERY, ["fox", "fox", LONG], Truncate.REFUSE, first_index=5)
    assert len(tokenize_pairs(encoder.tokenizer, QUERY, [LONG], Truncate.REFUSE, max_text_tokens=3)) == 1


def test_a_template_without_pairs_is_refused(make_reranker: MakeReranker, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(make_reranker("xlm-roberta"))
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 1}}],
        "special_tokens": {},
    }
    edit_json(folder / "tokenizer.json", post_processor=template)

    with pytest.raises(LoadError, match="no query before a text"):
        load_engine(plan_load(entry(folder, runtime="torch")), Settings(cpu_threads=1))


# ---------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() & PAIRS.keys()))
def test_the_plan_describes_the_reranker(
    model_type: str, make_reranker: MakeReranker, make_family: Callable[..., Path]
) -> None:
    info = plan_load(entry(make_reranker(model_type))).info

    assert (info.kind, info.width, info.dimensions, info.max_tokens) == (ModelKind.RERANK, 1, (1,), MAX_TOKENS)
    assert not info.can_chunk_late
    assert plan_load(entry(make_family(model_type))).info.kind is ModelKind.EMBED


def test_the_head_is_part_of_the_fingerprint(make_reranker: MakeReranker, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(make_reranker("modernbert"))
    before = plan_load(entry(folder)).info.fingerprint
    edit_json(folder / "config.json", classifier_activation="relu")

    assert plan_load(entry(folder)).info.fingerprint != before


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"prompts": {"query": "query: "}}, "prompts"),
        ({"default_task": "query"}, "default_task"),
        ({"dimensions": (1,)}, "dimensions"),
        ({"golden": "golden.json"}, "golden"),
        ({"outputs": (Output.DENSE, Output.SPARSE)}, "outputs"),
    ],
)
def test_what_only_embedding_models_have_is_refused(
    changes: dict[str, object], key: str, make_reranker: MakeReranker
) -> None:
    with pytest.raises(LoadError, match=f"^{key} cannot be set: this model scores texts"):
        plan_load(entry(make_reranker("bert"), **changes))


def test_a_reranker_has_no_golden_vectors_to_record(make_reranker: MakeReranker, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="tiny scores texts"):
        record_golden(entry(make_reranker("bert")), tmp_path / "golden.json")
    [check] = verify(entry(make_reranker("bert")), Settings(cpu_threads=1))
    assert (check.quantity, check.is_passed) == ("lowest cosine", True)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("classifier.weight", None, "cannot read a head of .*: KeyError: 'classifier.weight'"),
        ("bert.pooler.dense.weight", None, "cannot read a head of .*: KeyError: 'bert.pooler.dense.weight'"),
        ("classifier.weight", (1, 32), "expects 32 numbers, but its input has 64"),
    ],
)
def test_a_head_that_does_not_belong_is_refused(
    name: str, shape: tuple[int, int] | None, reason: str, make_reranker: MakeReranker, copy: Copy
) -> None:
    folder = copy(make_reranker("bert"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(LoadError, match=reason):
        load_engine(plan_load(entry(folder, runtime="torch")), Settings(cpu_threads=1))


def test_an_embedding_model_that_was_a_classifier_still_embeds(
    make_family: Callable[..., Path], copy: Copy, edit_json: EditJson
) -> None:
    """With a Pooling in sentence-transformers' files, a model embeds, for weights of any class."""
    folder = copy(make_family("bert"))
    edit_json(folder / "config.json", architectures=["BertForSequenceClassification"])

    assert plan_load(entry(folder)).info.kind is ModelKind.EMBED


# --------------------------------------------------------------------------------------------- the engine and HTTP


async def test_an_engine_scores_mixed_requests(make_reranker: MakeReranker, reference: Reference) -> None:
    """Loaded and warmed up as the gateway does it; a plain text, which the watchdog sends, does no harm."""
    folder = make_reranker("bert")
    engine = load_engine(plan_load(entry(folder)), Settings(cpu_threads=1))
    await engine.astart()
    try:
        deadline = time.monotonic() + 60
        job = EmbedJob(DOCUMENTS, None, Truncate.END, deadline, caller="someone", query=QUERY)
        answer = await engine.submit(job)
        plain = await engine.submit(EmbedJob(["Does it still work?"], None, Truncate.END, deadline, caller="watchdog"))
    finally:
        await engine.astop()

    np.testing.assert_allclose(answer.vectors, reference(folder, QUERY, DOCUMENTS), atol=1e-3)
    assert answer.truncated == [3]
    assert answer.num_tokens[3] == MAX_TOKENS
    assert plain.vectors.shape == (1, 1)


async def test_over_http_the_scores_are_transformers_own(
    connect: Callable[..., Awaitable[httpx.AsyncClient]],
    make_reranker: MakeReranker,
    make_family: Callable[..., Path],
    reference: Reference,
) -> None:
    folder = make_reranker("xlm-roberta")
    embedder = entry(make_family("bert")).model_copy(update={"id": "embedder"})
    client = await connect(entry(folder, id="ranker"), embedder)
    expected = reference(folder, QUERY, DOCUMENTS)[:, 0]

    response = await client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, "raw_scores": True})
    refused = await client.post("/rerank", json={"query": QUERY, "documents": ["fox", LONG], "truncate": False})
    embedded = await client.post("/v1/embeddings", json={"input": QUERY, "model": "ranker"})

    results = response.json()["results"]
    assert [result["index"] for result in results] == list(np.argsort(-expected, kind="stable"))
    for result in results:
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-3)
    assert response.headers["x-gateway-truncated"] == "3"
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "the query and text 1 have" in refused.json()["detail"]
    assert embedded.status_code == 400
    assert "models that embed: embedder" in embedded.json()["detail"]


async def test_pairs_of_the_same_tokens_are_not_mixed_up(make_reranker: MakeReranker) -> None:
    """Identical work in flight is done once: pairs are identical if their tokens and the start of their text are."""
    engine = load_engine(plan_load(entry(make_reranker("bert"), runtime="torch")), Settings(cpu_threads=1))
    await engine.astart()
    try:
        jobs = [
            EmbedJob([text], None, Truncate.END, time.monotonic() + 60, caller="someone", query=query)
            for query, text in [("fox", "dog"), ("fox", "dog"), ("fox [SEP] dog", "fox"), ("fox", "dog [SEP] fox")]
        ]
        answers = await asyncio.gather(*(engine.submit(job) for job in jobs))
    finally:
        await engine.astop()

    scores = [float(answer.vectors[0, 0]) for answer in answers]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert abs(scores[2] - scores[3]) > 1e-4
    assert answers[2].num_tokens == answers[3].num_tokens
