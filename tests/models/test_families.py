"""Each architecture gives the same vectors as sentence-transformers; others are refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint.classes import MODEL_TYPES
from gateway.engine.devices import CpuThreads, choose_dtype
from gateway.engine.loading import plan_load
from gateway.engine.model import build
from gateway.engine.model.runtimes.base import PACKED_MODEL_TYPES
from gateway.errors import BadInput, LoadError
from gateway.tasks import canonical_task
from gateway.types import Output, Truncate
from tests.models.checkpoints import FAMILIES, MAX_TOKENS, TEXTS, linear_head
from tests.models.family_layouts import PUBLISHED

Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
EditJson = Callable[..., None]
Copy = Callable[[Path], Path]
Reference = Callable[..., np.ndarray]

# Every text here, and one with a padding token in it.
PADDING = {
    **dict.fromkeys(("bert", "modernbert", "nomic_bert", "distilbert", "electra", "deberta-v2"), "[PAD]"),
    **dict.fromkeys(("qwen3", "qwen2", "lfm2", "eurobert"), "<|pad|>"),
}
RUNTIMES = [
    *((name, "torch") for name in FAMILIES),
    *((name, "packed") for name in FAMILIES if name in PACKED_MODEL_TYPES),
    *((name, "openvino") for name in FAMILIES),
]
needs_bfloat16 = pytest.mark.skipif(
    choose_dtype("auto", "cpu") != "bfloat16", reason="this processor does not compute in bfloat16"
)


def texts_of(name: str) -> list[str]:
    return [*TEXTS, f"near {PADDING.get(name, '<pad>')} vectors mean near texts"]


@pytest.fixture(scope="module")
def reference(make_family: MakeFamily) -> Reference:
    """Return the function that lets sentence-transformers embed the texts of a family."""
    models: dict[str, SentenceTransformer] = {}

    def vectors(name: str, prompt: str | None = None) -> np.ndarray:
        if name not in models:
            models[name] = SentenceTransformer(str(make_family(name)), device="cpu")
        return models[name].encode(texts_of(name), prompt_name=prompt, normalize_embeddings=True)

    return vectors


def test_every_architecture_has_a_test() -> None:
    assert {*FAMILIES, "jina_embeddings_v3"} == set(MODEL_TYPES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_texts_are_worth_comparing(name: str, reference: Reference, cosines: Cosines) -> None:
    vectors = reference(name)

    assert cosines(vectors[:-1], vectors[1:]).max() < 0.999


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
def test_vectors_are_sentence_transformers_own(
    name: str, runtime: str, make_family: MakeFamily, load: Load, reference: Reference, cosines: Cosines
) -> None:
    model = load(make_family(name), runtime)

    batched, alone = model.vectors(texts_of(name)), model.alone(texts_of(name))

    assert cosines(batched, reference(name)).min() > 0.99999
    assert cosines(alone, reference(name)).min() > 0.99999
    np.testing.assert_allclose(batched, alone, atol=1e-3)


@pytest.mark.parametrize(("name", "runtime"), RUNTIMES)
def test_states_are_sentence_transformers_own(name: str, runtime: str, make_family: MakeFamily, load: Load) -> None:
    folder, texts = make_family(name), texts_of(name)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, output_value="token_embeddings")
    model = load(folder, runtime)
    wanted = [[Output.STATES] if i % 4 else [Output.DENSE] for i in range(len(texts))]

    encoded = model.encode(texts, outputs=wanted)

    for one, right, outputs in zip(encoded, theirs, wanted, strict=True):
        assert (one.states is not None) == (Output.STATES in outputs)
        if one.states is not None:
            assert one.states.dtype == np.float32
            # Nothing but the text's own states is kept.
            assert torch.from_numpy(one.states).untyped_storage().nbytes() == one.states.nbytes
            np.testing.assert_allclose(one.states, right.numpy(), atol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_and_widths_are_sentence_transformers_own(name: str, make_family: MakeFamily) -> None:
    folder = make_family(name)
    theirs = SentenceTransformer(str(folder), device="cpu")

    info = plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu")).info

    assert info.max_tokens == theirs.max_seq_length == MAX_TOKENS
    assert info.width == theirs.get_embedding_dimension()
    assert info.is_normalized == FAMILIES[name].is_normalized


@pytest.mark.parametrize(
    ("name", "prompt"), [(name, prompt) for name, family in FAMILIES.items() for prompt in family.prompts]
)
def test_a_prompt_is_a_task(
    name: str, prompt: str, make_family: MakeFamily, load: Load, reference: Reference, cosines: Cosines
) -> None:
    model = load(make_family(name), "torch")
    texts = texts_of(name)

    vectors = model.vectors(texts, [canonical_task(prompt)] * len(texts))

    assert cosines(vectors, reference(name, prompt)).min() > 0.99999


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.prompts])
def test_a_model_without_prompts_has_no_tasks(name: str, make_family: MakeFamily) -> None:
    assert plan_load(ModelEntry(id="tiny", source=str(make_family(name)), device="cpu")).tasks == {}


def test_a_default_prompt_is_put_before_texts_without_a_task(
    make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load, reference: Reference, cosines: Cosines
) -> None:
    folder = copy(make_family("xlm-roberta"))
    edit_json(folder / "config_sentence_transformers.json", default_prompt_name="passage")

    vectors = load(folder, "torch").vectors(texts_of("xlm-roberta"))

    assert cosines(vectors, reference("xlm-roberta", "passage")).min() > 0.99999


# ---------------------------------------------------------------------------------------------------------- openvino


@needs_bfloat16
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PUBLISHED])
def test_openvino_in_bfloat16_stays_near(name: str, make_family: MakeFamily, load: Load, cosines: Cosines) -> None:
    """Two streams of one thread each end the process with SIGFPE where the feed-forward is gated, unless helped."""
    folder = make_family(name, initializer_range=0.08)  # else rounding alone moves the vectors
    model = load(folder, "openvino", "bfloat16", CpuThreads(2, 1))

    vectors = model.vectors(texts_of(name))

    assert cosines(vectors, load(folder, "torch").vectors(texts_of(name))).min() > 0.999


@needs_bfloat16
@pytest.mark.parametrize("name", ["nomic_bert", "gte", "qwen3"])
def test_a_single_thread_in_bfloat16_falls_back_to_torch(
    name: str, make_family: MakeFamily, load: Load, cosines: Cosines
) -> None:
    folder = make_family(name, initializer_range=0.08)
    with structlog.testing.capture_logs() as logs:
        model = load(folder, "auto", "bfloat16", CpuThreads(1, 1))

    assert [(log["event"], log["fallback"]) for log in logs] == [("openvino_failed", "torch")]
    assert "single thread" in logs[0]["error"]
    assert model.encoder.runtime.name == "torch"
    vectors = model.vectors(texts_of(name))
    assert cosines(vectors, load(folder, "torch").vectors(texts_of(name))).min() > 0.999
    with pytest.raises(LoadError, match="OpenVINO cannot run it: bfloat16 on a single thread"):
        load(folder, "openvino", "bfloat16", CpuThreads(1, 1))


@pytest.fixture
def wide_window(make_family: MakeFamily, copy: Copy, edit_json: EditJson) -> Path:
    """Make a ModernBERT whose layers look 64 tokens to either side, as the real one's do, and which reads longer texts."""
    folder = copy(make_family("modernbert"))
    edit_json(folder / "config.json", local_attention=128, sliding_window=64, max_position_embeddings=512)
    edit_json(folder / "tokenizer_config.json", model_max_length=512)
    return folder


def test_a_window_is_kept_in_rows_of_several_texts(wide_window: Path, load: Load, cosines: Cosines) -> None:
    texts = [" ".join(texts_of("modernbert") * n) for n in (1, 2, 3, 12)]

    vectors = load(wide_window, "openvino").vectors(texts)

    assert cosines(vectors, load(wide_window, "torch").vectors(texts)).min() > 0.99999


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"sliding_window": 16}),  # which Llama does not have
        ("llama", {"use_bidirectional_attention": True}),  # nor that
        ("mistral", {"sliding_window": 16, "is_causal": False}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
)
def test_a_compiled_model_sees_what_transformers_own_sees(
    name: str, changes: dict[str, object], make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load
) -> None:
    """If it did not, this would be refused; with a window longer than the texts of the comparison on load, the "
    "difference would go unnoticed."""
    folder = copy(make_family(name))
    edit_json(folder / "config.json", **changes)

    assert load(folder, "openvino").encoder.runtime.name == "openvino"


def test_a_padding_id_that_is_not_a_token_does_not_matter(
    make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load, reference: Reference, cosines: Cosines
) -> None:
    folder = copy(make_family("llama"))
    edit_json(folder / "config.json", pad_token_id=-1)

    for runtime in ("torch", "openvino"):
        assert cosines(load(folder, runtime).vectors(texts_of("llama")), reference("llama")).min() > 0.99999


def test_what_openvino_computes_wrongly_falls_back_to_torch(
    wide_window: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModernBERT's own masks let padding attend to nothing outside its window: NaN in OpenVINO 2026.4, which spreads.

    The window is as wide as the real one's: only texts beyond it show the difference.
    """
    monkeypatch.setattr(build, "attention_rule", lambda _config: None)
    with structlog.testing.capture_logs() as logs:
        model = load(wide_window, "auto")

    assert [(log["event"], log["fallback"]) for log in logs] == [("openvino_differs", "torch")]
    assert model.encoder.runtime.name == "torch"
    with pytest.raises(LoadError, match="OpenVINO's vectors have a cosine of nan to torch's"):
        load(copytree(wide_window, wide_window.with_name("again")), "openvino")


def test_only_some_architectures_can_be_packed(make_family: MakeFamily, load: Load) -> None:
    with pytest.raises(LoadError, match="model_type 'mpnet' cannot be packed"):
        load(make_family("mpnet"), "packed")


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert"])
def test_one_way_attention_is_computed_but_not_packed(
    name: str, make_family: MakeFamily, load: Load, cosines: Cosines
) -> None:
    """In one row each token would see those behind it, and no shape would be wrong."""
    folder = make_family(name, is_decoder=True)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts_of(name), normalize_embeddings=True)

    assert cosines(load(folder, "torch").vectors(texts_of(name)), theirs).min() > 0.99999
    with pytest.raises(LoadError, match=r"one-way attention \(is_decoder: true\) cannot be packed"):
        load(folder, "packed")


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.fixture
def distilbert(make_family: MakeFamily, copy: Copy) -> Iterator[Path]:
    """Return a copy of the checkpoint with a Dense layer, for a test to change."""
    return copy(make_family("distilbert"))


def fingerprint(folder: Path) -> str:
    return plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu")).checkpoint.fingerprint


def test_another_activation_is_another_model(distilbert: Path, edit_json: EditJson) -> None:
    before = fingerprint(distilbert)
    edit_json(distilbert / "2_Dense" / "config.json", activation_function="torch.nn.modules.linear.Identity")

    assert fingerprint(distilbert) != before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_residual": True}, "only a plain layer"),
        ({"module_input_name": "token_embeddings"}, "only a plain layer"),
        ({"module_output_name": "other"}, "only a plain layer"),
        ({"activation_function": "torch.nn.modules.activation.Softsign"}, "activation Softsign is not supported"),
        ({"out_features": 32}, "the vectors have 48 dimensions, expected 32"),
    ],
)
def test_a_dense_layer_that_computes_something_else_is_refused(
    distilbert: Path, edit_json: EditJson, load: Load, change: dict[str, object], reason: str
) -> None:
    edit_json(distilbert / "2_Dense" / "config.json", **change)

    with pytest.raises(LoadError, match=reason):
        load(distilbert, "torch")


def test_a_pickled_dense_layer_gives_the_same(
    distilbert: Path, load: Load, reference: Reference, cosines: Cosines
) -> None:
    path = distilbert / "2_Dense" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()

    vectors = load(distilbert, "torch").vectors(texts_of("distilbert"))

    assert cosines(vectors, reference("distilbert")).min() > 0.99999


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_dense_layer_that_cannot_be_read_is_refused(distilbert: Path, load: Load, content: bytes) -> None:
    (distilbert / "2_Dense" / "model.safetensors").unlink()
    (distilbert / "2_Dense" / "pytorch_model.bin").write_bytes(content)

    with pytest.raises(LoadError, match="cannot read a Dense layer"):
        load(distilbert, "torch")


def test_a_dense_layer_for_another_width_is_refused(distilbert: Path, load: Load) -> None:
    (distilbert / "2_Dense" / "model.safetensors").unlink()
    layer = {f"linear.{name}": tensor for name, tensor in linear_head(32, 48).items()}
    torch.save(layer, distilbert / "2_Dense" / "pytorch_model.bin")

    with pytest.raises(LoadError, match="expects 32 numbers, but its input has 64"):
        load(distilbert, "torch")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
            "method_output_name 'pooler_output' is not supported",
        ),
        ({"processing_kwargs": {"text": {"truncation": False}}}, "processing_kwargs is not supported"),
    ],
)
def test_a_transformer_that_is_called_in_another_way_is_refused(
    distilbert: Path, edit_json: EditJson, change: dict[str, object], reason: str
) -> None:
    edit_json(distilbert / "sentence_bert_config.json", **change)

    with pytest.raises(LoadError, match=reason):
        plan_load(ModelEntry(id="tiny", source=str(distilbert), device="cpu"))


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_without_special_tokens_a_text_without_tokens_fails_alone(
    name: str, make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load, cosines: Cosines
) -> None:
    """In a batch its vector would be read off the state of the text before it, or the one behind it."""
    folder = copy(make_family(name))
    edit_json(folder / "tokenizer.json", post_processor=None)
    texts = ["near vectors mean near texts", "again and again"]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    model = load(folder, "torch")

    assert cosines(model.vectors(texts), theirs).min() > 0.99999
    for empty in ("", "  " * 40_000 if name == "bert" else ""):  # the longer one is more than is read at once
        with pytest.raises(BadInput, match=r"input\[5\] has no tokens, so it has no vector"):
            model.encoder.tokenizer.tokenize(["fox", empty], "", Truncate.END, first_index=4)
    if name == "qwen3":
        assert len(model.vectors([""], ["retrieval.query"])) == 1


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("eurobert", {"is_causal": True}, "is_causal True is not supported for 'eurobert'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "names sliding_attention, but no sliding_window is set"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "names linear_attention, which qwen3 does not have"),
    ],
)
def test_layers_that_see_what_transformers_does_not_compute_are_refused(
    name: str, changes: dict[str, object], reason: str, make_family: MakeFamily, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_family(name))
    edit_json(folder / "config.json", **changes)

    with pytest.raises(LoadError, match=reason):
        plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu"))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_company_are_refused(
    rope_type: str, make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load
) -> None:
    folder = copy(make_family("qwen3"))
    factors = {"factor": 4.0, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    edit_json(
        folder / "config.json",
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
            **(factors if rope_type == "longrope" else {"factor": 4.0}),
        },
    )

    with pytest.raises(LoadError, match="depend on the other texts"):
        load(folder, "torch")
