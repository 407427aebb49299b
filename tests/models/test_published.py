"""Decoders that embed, EuroBERT and T5: their special properties, and similar models that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, processors
from transformers import T5Config, T5ForConditionalGeneration

from gateway.engine.checkpoint.classes import MODEL_TYPES
from gateway.engine.loading import plan_load
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.errors import LoadError
from gateway.types import Truncate
from tests.models.checkpoints import TEXTS
from tests.models.family_layouts import PUBLISHED
from tests.models.plain import add_tensor, entry, load_whole, save_modules

Copy = Callable[[Path], Path]
Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
EditJson = Callable[..., None]
Load = Callable[..., Any]
MakeFamily = Callable[..., Path]
MakePlain = Callable[..., Path]


def theirs(folder: Path) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS), normalize_embeddings=True)


def sees_later_tokens(model: Any, folder: Path) -> bool:
    """Return whether the state of a text's second token depends on its last one."""
    ids = model.encoder.tokenize(["near vectors mean near texts"], None, Truncate.END)[0].ids
    rows = [list(ids), [*ids[:-2], ids[1], ids[-1]]]
    runtime = model.encoder.runtime
    first, second = (runtime.forward(runtime.prepare([row], [-1])).flat[1] for row in rows)
    return not torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "is_two_way"),
    [
        ("gemma3_text", {}, True),
        ("gemma3_text", {"use_bidirectional_attention": False}, False),
        ("qwen2", {}, True),
        ("qwen2", {"is_causal": True}, False),
        ("mistral", {}, False),
        ("mistral", {"is_causal": False}, True),
        ("llama", {}, False),
        ("llama", {"is_causal": False}, True),
        ("gemma2", {}, False),
        ("lfm2", {}, False),
        ("eurobert", {}, True),
    ],
)
def test_attention_looks_where_the_configuration_says(
    model_type: str,
    changes: Mapping[str, object],
    is_two_way: bool,
    make_family: MakeFamily,
    load: Load,
    cosines: Cosines,
) -> None:
    folder = make_family(model_type, **changes)
    model = load(folder, "torch")

    assert sees_later_tokens(model, folder) == is_two_way
    assert cosines(model.alone(TEXTS), theirs(folder)).min() > 0.99999
    assert cosines(model.vectors(TEXTS), theirs(folder)).min() > 0.99999


# ----------------------------------------------------------------------------------------------------------- gemma 3


def test_harrier_is_a_one_way_gemma_3_pooled_by_its_last_token(
    make_plain: MakePlain, load: Load, cosines: Cosines
) -> None:
    """The layout of microsoft/harrier-oss-v1-270m."""
    folder = make_plain("gemma3_text", use_bidirectional_attention=False)
    save_modules(folder, pooling="lasttoken")

    model = load(folder, "torch")

    assert cosines(model.vectors(TEXTS), theirs(folder)).min() > 0.99999
    assert cosines(model.alone(TEXTS), theirs(folder)).min() > 0.99999


def test_a_gemma_3_for_images_is_refused(make_family: MakeFamily, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(make_family("gemma3_text"))
    text = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", model_type="gemma3", text_config=text, vision_config={"hidden_size": 8})

    with pytest.raises(LoadError, match=r"model_type 'gemma3' is not supported; .* with its part for images"):
        plan_load(entry(folder))


def test_weights_for_images_are_refused(make_family: MakeFamily, copy: Copy) -> None:
    folder = copy(make_family("gemma3_text"))
    add_tensor(folder, "vision_tower.embeddings.weight", torch.ones(8, 8))

    with pytest.raises(LoadError, match=r"the weights hold \['vision_tower\.embeddings\.weight'\]"):
        load_whole(folder)


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama"])
def test_soft_capping_that_transformers_would_not_compute_is_refused(
    model_type: str, make_family: MakeFamily, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_family(model_type))
    edit_json(folder / "config.json", attn_logit_softcapping=50.0)

    with pytest.raises(LoadError, match=r"attn_logit_softcapping 50\.0 is not supported: .* does not compute it"):
        plan_load(entry(folder))


def test_soft_capping_of_gemma_2_is_computed(make_family: MakeFamily, load: Load, cosines: Cosines) -> None:
    capped, plain = (load(make_family("gemma2", attn_logit_softcapping=cap), "torch") for cap in (0.5, None))

    assert cosines(capped.vectors(TEXTS), plain.vectors(TEXTS)).min() < 0.999
    assert cosines(capped.vectors(TEXTS), theirs(make_family("gemma2", attn_logit_softcapping=0.5))).min() > 0.99999


# ------------------------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "eurobert"])
def test_positions_that_depend_on_the_batch_are_refused_in_the_old_form_too(
    model_type: str, make_family: MakeFamily, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_family(model_type))
    edit_json(folder / "config.json", rope_scaling={"type": "dynamic", "factor": 4.0})

    with pytest.raises(LoadError, match="depend on the other texts"):
        load_whole(folder)


def test_positions_of_one_kind_of_layer_that_depend_on_the_batch_are_refused(
    make_family: MakeFamily, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_family("gemma3_text"))
    edit_json(folder / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 4.0})

    with pytest.raises(LoadError, match="depend on the other texts"):
        load_whole(folder)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_scaled_positions_are_transformers_own(
    scaling: Mapping[str, object],
    make_family: MakeFamily,
    copy: Copy,
    edit_json: EditJson,
    load: Load,
    cosines: Cosines,
) -> None:
    folder = copy(make_family("llama"))
    plain = theirs(folder)
    edit_json(folder / "config.json", rope_scaling=scaling)

    vectors = load(folder, "torch").vectors(TEXTS)

    assert cosines(vectors, theirs(folder)).min() > 0.99999
    assert cosines(vectors, plain).min() < 0.9999


# --------------------------------------------------------------------------------------------------------- own code


@pytest.mark.parametrize("is_causal", [None, "no"])
def test_code_for_two_way_attention_is_refused_where_the_configuration_does_not_say_it(
    is_causal: object, make_family: MakeFamily, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_family("qwen2"))
    edit_json(folder / "config.json", is_causal=is_causal)

    with pytest.raises(LoadError, match=r"its own code \(Qwen2Model, in auto_map\)"):
        plan_load(entry(folder))


OWN_TOKENIZER = {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]}


@pytest.mark.parametrize("processor", [None, processors.ByteLevel(trim_offsets=False)], ids=["none", "bytes"])
def test_the_end_token_of_a_tokenizers_own_code_is_put_behind_each_text(
    processor: object, make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load, cosines: Cosines
) -> None:
    """gte-Qwen2's tokenizer does that in code; transformers' own class ignores ``add_eos_token``."""
    right = make_family("qwen2")
    folder = copy(right)
    edit_json(folder / "tokenizer_config.json", add_eos_token=True, auto_map=OWN_TOKENIZER)
    content = json.loads((folder / "tokenizer.json").read_text())
    whole = Tokenizer.from_str(json.dumps({**content, "post_processor": None}))
    if processor is not None:
        whole.post_processor = processor
    whole.save(str(folder / "tokenizer.json"))

    model = load(folder, "torch")

    assert cosines(model.vectors(TEXTS), theirs(right)).min() > 0.99999
    before, after = (load(path, "torch").encoder.tokenize(TEXTS, None, Truncate.END) for path in (right, folder))
    assert [tokens.ids for tokens in before] == [tokens.ids for tokens in after]


def test_an_end_token_is_not_added_twice(make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load) -> None:
    folder = copy(make_family("qwen2"))
    before = load(folder, "torch").encoder.tokenize(TEXTS, None, Truncate.END)
    edit_json(folder / "tokenizer_config.json", add_eos_token=True, auto_map=OWN_TOKENIZER)
    load.cache_clear()

    assert load(folder, "torch").encoder.tokenize(TEXTS, None, Truncate.END) == before


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2", {"auto_map": OWN_TOKENIZER}),
        ("qwen2", {"auto_map": {"AutoTokenizer": ["tokenization.Another", None]}, "add_eos_token": True}),
        ("llama", {"auto_map": OWN_TOKENIZER, "add_eos_token": True}),
    ],
)
def test_a_tokenizer_whose_code_is_not_known_is_refused(
    model_type: str, changes: Mapping[str, object], make_family: MakeFamily, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(make_family(model_type))
    edit_json(folder / "tokenizer_config.json", **changes)

    with pytest.raises(LoadError, match="its tokenizer has its own code"):
        plan_load(entry(folder))


# --------------------------------------------------------------------------------------------------------------- T5


def test_the_decoder_of_a_whole_t5_is_left_out_as_sentence_transformers_does(
    make_family: MakeFamily, copy: Copy, load: Load, cosines: Cosines
) -> None:
    folder = copy(make_family("t5"))
    config = T5Config.from_pretrained(folder)
    encoder = load_file(folder / "model.safetensors")
    whole = T5ForConditionalGeneration(config).state_dict()
    decoder = {name: tensor for name, tensor in whole.items() if name.startswith("decoder.block")}
    assert decoder
    save_file({**encoder, **decoder}, folder / "model.safetensors", {"format": "pt"})
    load_whole(folder)

    assert cosines(load(folder, "torch").vectors(TEXTS), theirs(make_family("t5"))).min() > 0.99999


def test_a_t5_that_writes_text_is_refused_without_a_pooling(make_plain: MakePlain, edit_json: EditJson) -> None:
    folder = make_plain("t5")
    edit_json(folder / "config.json", architectures=["T5ForConditionalGeneration"])

    with pytest.raises(LoadError, match="T5ForConditionalGeneration is not a model that embeds: writes text"):
        plan_load(entry(folder))


def test_t5_takes_texts_of_the_length_that_its_files_name(
    make_family: MakeFamily, copy: Copy, edit_json: EditJson, load: Load, cosines: Cosines
) -> None:
    """Its positions are relative: there is no table that ends."""
    folder = copy(make_family("t5"))
    edit_json(folder / "sentence_bert_config.json", max_seq_length=700)
    edit_json(folder / "tokenizer_config.json", model_max_length=512)
    texts = ["near vectors mean near texts " * 120, "again and again"]
    right = SentenceTransformer(str(folder), device="cpu")

    plan = plan_load(entry(folder))

    assert plan.max_tokens == right.max_seq_length == 700
    assert cosines(load(folder, "torch").vectors(texts), right.encode(texts)).min() > 0.99999


# ------------------------------------------------------------------------------------------------------ long texts


def test_a_model_for_long_texts_is_warmed_up_with_shorter_ones(
    make_plain: MakePlain, edit_json: EditJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text of 32,768 tokens would take Qwen3-Embedding minutes on a CPU."""
    folder = make_plain("qwen3", max_position_embeddings=32_768)
    edit_json(folder / "tokenizer_config.json", model_max_length=32_768)
    seen: list[int] = []
    prepare = PaddedRuntime.prepare

    def spy(self: PaddedRuntime, rows: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        seen.append(sum(map(len, rows)))
        return prepare(self, rows, *args, **kwargs)

    monkeypatch.setattr(PaddedRuntime, "prepare", spy)

    load_whole(folder)

    assert plan_load(entry(folder)).max_tokens == 32_768
    assert max(seen) == 2048


# ------------------------------------------------------------------------------------------------------------ prompts


def test_every_family_that_is_published_with_its_own_configuration_is_a_model_type() -> None:
    assert set(PUBLISHED) <= set(MODEL_TYPES)


def test_embedding_gemmas_prompts_are_its_tasks(make_family: MakeFamily) -> None:
    tasks = plan_load(entry(make_family("gemma3_text"))).tasks

    assert tasks["retrieval.query"] == "task: search result | query: "
    assert tasks["retrieval.passage"] == "title: none | text: "
    assert {"Clustering", "Retrieval-query"} <= set(tasks)
