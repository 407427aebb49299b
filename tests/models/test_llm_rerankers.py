"""LLMs that rerank give the scores of Qwen's model cards and of sentence-transformers; other LLMs are refused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from gateway.engine.checkpoint.pair_template import QWEN3_INSTRUCTION, is_qwen3_reranker
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model.build import BuildOptions, build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item, Tokens
from gateway.engine.model.tokenizer import at_once
from gateway.errors import ContextLengthExceeded, LoadError
from gateway.types import EmbedJob, ModelKind, Truncate
from tests.models.checkpoints import SENTENCES, SIZES
from tests.models.plain import assert_same_logits, entry

Copy = Callable[[Path], Path]
EditJson = Callable[..., None]

MAX_TOKENS = 128
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ORDINARY = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
# In the form of the chat templates that rerankers have for sentence-transformers.
RERANKER = (
    "{%- set rules = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | default('"
    + QWEN3_INSTRUCTION
    + "') -%}\n{%- set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first -%}\n"
    "{%- set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first -%}\n"
    + PREFIX.replace("\n", "{{ '\\n' }}")
    + "<Instruct>: {{ rules }}{{ '\\n' }}<Query>: {{ query }}{{ '\\n' }}<Document>: {{ document }}"
    + SUFFIX.replace("\n", "{{ '\\n' }}")
)
QUERY = "What is the capital of Germany?"
DOCUMENTS = [
    "Berlin is the capital of Germany.",
    "",
    " fox ",
    "Grüße aus Köln: 東京 \U0001f98a\n",
    "near vectors mean near texts, again and again. " * 30,
    "The quick brown fox jumps over the lazy dog.",
]
LONG_QUERY = "What is the capital of Germany? " * 30


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Qwen's: bytes, no special tokens around a text, `yes` and `no` in the vocabulary."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        [*SENTENCES, PREFIX, QWEN3_INSTRUCTION, "<Query>: \n<Document>: ", *['"yes" "no"'] * 50], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def write(folder: Path, auto: Any, *, chat_template: str | None, **changes: object) -> Path:
    """Write a tiny Qwen3 with random weights."""
    own = tokenizer()
    own.chat_template = chat_template
    torch.manual_seed(3)
    sizes = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(
        "qwen3",
        **{
            **sizes,
            "vocab_size": len(own),
            "pad_token_id": own.pad_token_id,
            "eos_token_id": own.eos_token_id,
            "max_position_embeddings": MAX_TOKENS,
            **changes,
        },
    )
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Qwen3-Reranker as published: a causal LM, tied, with a chat template of ordinary roles."""
    folder = tmp_path_factory.mktemp("qwen3-reranker")
    return write(folder, AutoModelForCausalLM, chat_template=ORDINARY, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def modular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what sentence-transformers 6 saves of one, not tied."""
    plain = write(tmp_path_factory.mktemp("plain"), AutoModelForCausalLM, chat_template=RERANKER)
    folder = tmp_path_factory.mktemp("modular")
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a reranker that was converted to a classifier with one label, without a chat template for pairs."""
    folder = tmp_path_factory.mktemp("seq-cls")
    return write(folder, AutoModelForSequenceClassification, chat_template=ORDINARY, num_labels=1)


def load(folder: Path, runtime: str = "torch", **changes: object) -> Encoder:
    plan = plan_load(entry(folder, **changes))
    assert plan.info.kind is ModelKind.RERANK
    options = BuildOptions("cpu", "float32", runtime, plan.max_tokens, CpuThreads(1, 1), plan.tasks, plan.instruction)
    return build_encoders(plan.checkpoint, options)[0]


def tokens(
    encoder: Encoder, query: str, texts: Sequence[str], truncate: Truncate = Truncate.END, limit: int | None = None
) -> list[Tokens]:
    job = EmbedJob(texts, None, truncate, 0.0, caller="test", query=query, max_text_tokens=limit)
    return at_once(encoder.read(job, 0, texts, at_once(encoder.read_query(query))))  # type: ignore[arg-type]


def scores(encoder: Encoder, query: str, texts: Sequence[str]) -> np.ndarray:
    return np.concatenate([one.dense for one in encoder.encode([Item(row) for row in tokens(encoder, query, texts)])])


@torch.inference_mode()
def card_probabilities(folder: Path, query: str, texts: Sequence[str], instruction: str) -> np.ndarray:
    """Return the probability of `yes`, by the steps on Qwen's model card."""
    own = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefix, suffix = (own.encode(text, add_special_tokens=False) for text in (PREFIX, SUFFIX))
    room = MAX_TOKENS - len(prefix) - len(suffix)
    found = []
    for text in texts:
        middle = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {text}"
        ids = prefix + own(middle, truncation=True, max_length=room).input_ids + suffix
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        no, yes = (logits[own.convert_tokens_to_ids(word)] for word in ("no", "yes"))
        found.append(torch.log_softmax(torch.stack([no, yes]), dim=0)[1].exp())
    return torch.stack(found).numpy()


# ------------------------------------------------------------------------------------------------------- as published


ASKED = {
    "default": (QWEN3_INSTRUCTION, QUERY),
    "another": ("Berlin is near", QUERY),
    "empty": (QWEN3_INSTRUCTION, ""),
    "long": (QWEN3_INSTRUCTION, LONG_QUERY),
}


@pytest.mark.parametrize("case", list(ASKED))
def test_probabilities_are_those_of_the_model_card(case: str, published: Path) -> None:
    instruction, query = ASKED[case]
    encoder = load(published, instruction=instruction)
    expected = card_probabilities(published, query, DOCUMENTS, instruction)

    batched = scores(encoder, query, DOCUMENTS)
    alone = np.concatenate([scores(encoder, query, [text]) for text in DOCUMENTS])

    assert query == LONG_QUERY or np.ptp(expected) > 0.01  # otherwise, any two numbers would pass
    np.testing.assert_allclose(1 / (1 + np.exp(-batched[:, 0])), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(1 / (1 + np.exp(-alone[:, 0])), expected, rtol=0, atol=1e-5)


async def test_over_http_it_reranks(connect: Callable[..., Awaitable[httpx.AsyncClient]], published: Path) -> None:
    """Loaded and warmed up as the gateway does it."""
    client = await connect(entry(published, id="qwen", instruction=QWEN3_INSTRUCTION))

    response = await client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS})

    expected = card_probabilities(published, QUERY, DOCUMENTS, QWEN3_INSTRUCTION)
    found = {one["index"]: one["relevance_score"] for one in response.json()["results"]}
    assert [found[i] for i in range(len(DOCUMENTS))] == pytest.approx(expected.tolist(), abs=2e-3)
    assert response.headers["x-gateway-truncated"] == "4"


def test_openvino_gives_the_same(published: Path) -> None:
    encoder = load(published, "openvino", instruction=QWEN3_INSTRUCTION)
    expected = scores(load(published, instruction=QWEN3_INSTRUCTION), QUERY, DOCUMENTS)

    np.testing.assert_allclose(scores(encoder, QUERY, DOCUMENTS), expected, rtol=0, atol=1e-4)


def test_an_llm_of_which_nothing_says_that_it_reranks_is_refused(published: Path) -> None:
    with pytest.raises(LoadError, match="Qwen3ForCausalLM is not a model that embeds: writes text: an LLM reranker"):
        plan_load(entry(published))


@pytest.mark.parametrize(
    ("source", "is_known"),
    [
        ("Qwen/Qwen3-Reranker-0.6B", True),
        ("Qwen/Qwen3-Reranker-8B", True),
        ("tomaarsen/Qwen3-Reranker-4B-seq-cls", True),
        ("Qwen/Qwen3-0.6B", False),
        ("Qwen/Qwen3-Embedding-0.6B", False),
        ("somewhere/Qwen3-Reranker-0.6B", False),
        ("/models/Qwen3-Reranker-0.6B", False),
    ],
)
def test_only_the_repositories_whose_cards_have_the_template_are_known(source: str, is_known: bool) -> None:
    assert is_qwen3_reranker(source) == is_known


def test_the_vocabulary_must_have_the_answers(published: Path, copy: Copy) -> None:
    folder = copy(published)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "yes"]
    del content["model"]["vocab"]["yes"]
    (folder / "tokenizer.json").write_text(json.dumps(content))

    with pytest.raises(LoadError, match="no tokens 'yes' and 'no'"):
        plan_load(entry(folder, instruction="any"))


# ------------------------------------------------------------------------------------------- by sentence-transformers


@pytest.mark.parametrize("query", [QUERY, LONG_QUERY])
def test_what_sentence_transformers_saves_gives_its_scores(query: str, modular: Path) -> None:
    theirs = CrossEncoder(str(modular), device="cpu")
    assert isinstance(theirs[1], LogitScore)
    expected = np.stack([theirs.predict([(query, text)], activation_fn=nn.Identity())[0] for text in DOCUMENTS])

    found = scores(load(modular), query, DOCUMENTS)[:, 0]

    assert_same_logits(found, expected)


def test_an_instruction_is_a_message_of_the_system(modular: Path, copy: Copy, edit_json: EditJson) -> None:
    theirs = CrossEncoder(str(modular), device="cpu")
    expected = theirs.predict([(QUERY, DOCUMENTS[0])], prompt="Berlin is near", activation_fn=nn.Identity())
    prompted = copy(modular)
    edit_json(prompted / "config_sentence_transformers.json", prompts={"q": "Berlin is near"}, default_prompt_name="q")

    for encoder in (load(modular, instruction="Berlin is near"), load(prompted)):
        assert scores(encoder, QUERY, DOCUMENTS[:1])[0, 0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
    assert scores(load(modular), QUERY, DOCUMENTS[:1])[0, 0] != pytest.approx(expected[0], abs=1e-3)
    fingerprints = {plan_load(entry(modular, **changes)).info.fingerprint for changes in ({}, {"instruction": "a"})}
    assert len(fingerprints) == 2


def test_a_template_for_pairs_is_enough(modular: Path, copy: Copy) -> None:
    """Without modules too: that is how sentence-transformers reads such a model."""
    folder = copy(modular)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()

    np.testing.assert_allclose(
        scores(load(folder), QUERY, DOCUMENTS), scores(load(modular), QUERY, DOCUMENTS), rtol=0, atol=1e-6
    )


def test_a_score_may_be_the_logit_of_one_token(modular: Path, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(modular)
    edit_json(folder / "1_LogitScore" / "config.json", false_token_id=None)
    theirs = CrossEncoder(str(folder), device="cpu")
    expected = theirs.predict([(QUERY, DOCUMENTS[0])], activation_fn=nn.Identity())

    assert scores(load(folder), QUERY, DOCUMENTS[:1])[0, 0] == pytest.approx(expected[0], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML, "is not a model that embeds"),
        (RERANKER.replace("{{ document }}", "{{ document | trim }}"), "changes the given texts"),
        (
            RERANKER.replace("{{ query }}", "{{ 0 }}").replace("{{ document }}", "{{ document }}{{ query }}"),
            "puts the document before the query",
        ),
        (RERANKER.replace("{{ query }}", "{{ query }}{{ query }}"), "is not a model that embeds"),
        (
            RERANKER.replace("<|im_end|>{{ '\\n' }}<|im_start|>assistant", "assistant"),
            "end does not begin with a special token",
        ),
    ],
)
def test_a_template_of_another_form_is_refused(template: str, reason: str, modular: Path, copy: Copy) -> None:
    folder = copy(modular)
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    (folder / "chat_template.jinja").write_text(template)

    with pytest.raises(LoadError, match=reason):
        load(folder)


def test_a_template_without_a_place_for_an_instruction_is_refused(modular: Path, copy: Copy) -> None:
    folder = copy(modular)
    (folder / "chat_template.jinja").write_text(RERANKER.replace("{{ rules }}", "none"))

    with pytest.raises(LoadError, match="no place for an instruction"):
        plan_load(entry(folder, instruction="Berlin is near"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"true_token_id": 100_000}, "are not in a vocabulary of"),
        ({"true_token_id": "yes"}, "must be ids of tokens"),
        ({"module_input_name": "logits"}, "module_input_name is not supported"),
        ({"bias": 1.0}, "bias is not supported"),
    ],
)
def test_settings_of_the_module_that_are_not_known_are_refused(
    changes: dict[str, object], reason: str, modular: Path, copy: Copy, edit_json: EditJson
) -> None:
    folder = copy(modular)
    edit_json(folder / "1_LogitScore" / "config.json", **changes)

    with pytest.raises(LoadError, match=reason):
        plan_load(entry(folder))


def test_weights_without_a_head_are_refused(modular: Path, copy: Copy) -> None:
    folder = copy(modular)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(LoadError, match=r"cannot read a head of Qwen3ForCausalLM: KeyError: 'lm_head.weight'"):
        load(folder)


# --------------------------------------------------------------------------------------- converted to a classifier


def test_a_converted_reranker_gives_the_scores_of_its_card(converted: Path, copy: Copy) -> None:
    bare = copy(converted)
    (bare / "chat_template.jinja").unlink()
    theirs = CrossEncoder(str(bare), device="cpu")
    short = [text for text in DOCUMENTS if len(text) < 100]
    pairs = [
        (f"{PREFIX}<Instruct>: {QWEN3_INSTRUCTION}\n<Query>: {QUERY}\n", f"<Document>: {text}{SUFFIX}")
        for text in short
    ]
    expected = theirs.predict(pairs, activation_fn=nn.Identity(), batch_size=1)

    found = scores(load(converted, instruction=QWEN3_INSTRUCTION), QUERY, short)[:, 0]

    assert_same_logits(found, expected)


def test_a_converted_reranker_with_a_template_for_pairs_gives_sentence_transformers_scores(
    converted: Path, copy: Copy
) -> None:
    folder = copy(converted)
    (folder / "chat_template.jinja").write_text(RERANKER)
    theirs = CrossEncoder(str(folder), device="cpu")
    expected = np.stack([theirs.predict([(QUERY, text)], activation_fn=nn.Identity())[0] for text in DOCUMENTS])

    assert_same_logits(scores(load(folder), QUERY, DOCUMENTS)[:, 0], expected)


def test_without_a_template_a_converted_reranker_is_refused(converted: Path) -> None:
    with pytest.raises(LoadError, match="For a model that was trained from Qwen3-Reranker, set `instruction`"):
        plan_load(entry(converted))


def test_an_instruction_is_for_no_other_model(
    make_reranker: Callable[..., Path], make_family: Callable[..., Path]
) -> None:
    for folder, hint in (
        (make_reranker("bert"), "does not$"),
        (make_family("bert"), "for a model that embeds, use `prompts`"),
    ):
        with pytest.raises(LoadError, match=hint):
            plan_load(entry(folder, instruction="any"))


# ------------------------------------------------------------------------------------------------------------- limits


def test_long_pairs_are_cut_or_refused(modular: Path) -> None:
    encoder = load(modular)
    [whole] = tokens(encoder, QUERY, [DOCUMENTS[0]])
    [cut, start] = (tokens(encoder, QUERY, [DOCUMENTS[4]], truncate)[0] for truncate in (Truncate.END, Truncate.START))
    [few] = tokens(encoder, QUERY, [DOCUMENTS[0]], limit=2)
    [last] = tokens(encoder, QUERY, [DOCUMENTS[0]], Truncate.START, limit=2)

    assert (whole.is_truncated, cut.is_truncated, start.is_truncated, few.is_truncated) == (False, True, True, True)
    assert len(cut.ids) == len(start.ids) == MAX_TOKENS
    tail = AutoTokenizer.from_pretrained(modular).encode(SUFFIX)
    assert all(row.ids[-len(tail) :] == tail for row in (whole, cut, start, few, last))
    body = whole.ids[: -len(tail)]
    assert few.ids[: -len(tail)] == body[: len(few.ids) - len(tail)]
    assert last.ids[-len(tail) - 2 : -len(tail)] == body[-2:]
    with pytest.raises(ContextLengthExceeded, match=r"the query and text 0 have .* with the template around them"):
        tokens(encoder, QUERY, [DOCUMENTS[4]], Truncate.REFUSE)


def test_a_limit_that_the_template_alone_fills_is_refused(modular: Path) -> None:
    with pytest.raises(LoadError, match="the template alone takes all 20 tokens"):
        load(modular, max_tokens=20)


def test_the_rows_are_read_from_pickled_weights_too(modular: Path, copy: Copy) -> None:
    folder = copy(modular)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    np.testing.assert_allclose(
        scores(load(folder), QUERY, DOCUMENTS), scores(load(modular), QUERY, DOCUMENTS), rtol=0, atol=1e-6
    )


def test_the_config_of_the_modules_is_that_of_sentence_transformers(modular: Path) -> None:
    """The layout that the tests above rest on."""
    config = json.loads((modular / "sentence_bert_config.json").read_text())

    assert config["transformer_task"] == "text-generation"
    assert "message" in config["modality_config"]
