"""Vectors are those of sentence-transformers, for the bundled model and for small checkpoints of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gateway.engine.devices import choose_dtype
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Item
from gateway.types import Truncate, Vectors

SAME = 0.99999

MakeCheckpoint = Callable[..., Path]
Load = Callable[..., Encoder]

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)


def text_of(num_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS.split(), k=num_words))


TEXTS = {
    "one word": "hello",
    "a sentence": "The quick brown fox jumps over the lazy dog.",
    "empty": "",
    "a space": " ",
    "white space": "\n\t \u00a0\u3000\r\n",
    "spaces around": "  hello   world \n",
    "upper case": "HELLO World, ÄÖÜ!",
    "accents": "café naïve résumé Ångström",
    "combining accents": "cafe\u0301 nai\u0308ve",
    "emoji": "I 💚 embeddings 👩🏽‍💻 🇨🇭",
    "chinese": "向量数据库中的语义搜索",
    "arabic and hebrew": "مرحبا بالعالم שלום עולם",
    "hindi": "नमस्ते दुनिया",
    "NUL and BOM": "\ufeffa\x00b",
    "zero width": "zero\u200bwidth\u200djoiner",
    "special tokens": "[CLS] hello [SEP] [PAD] [MASK] <s> </s>",
    "code": "def f(x: int) -> str:\n    return f'{x:>10}'",
    "numbers": "3.14159 1,000,000 0xdeadbeef 1e-9",
    "unknown symbols": "⟁ 𓀀 ꙮ",
    "a long word": "a" * 150,
    "no white space": "antidisestablishmentarianism" * 20,
    "20 words": text_of(20, 1),
    "100 words": text_of(100, 2),
    "253 words": text_of(253, 3),
    "254 words": text_of(254, 4),
    "255 words": text_of(255, 5),
    "300 words": text_of(300, 6),
    "2000 words": text_of(2000, 7),
}


def embed(encoder: Encoder, texts: Sequence[str], task: str | None = None) -> Vectors:
    items = [Item(tokens, task) for tokens in encoder.tokenize(texts, task, Truncate.END)]
    return np.concatenate([encoded.dense for encoded in encoder.encode(items)])


def cosines(a: Any, b: Any) -> Any:
    """Return the cosine of each row of ``a`` with that of ``b``."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (a, b))
    assert a.shape == b.shape
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# ------------------------------------------------------------------------------------------------- the bundled model


@pytest.fixture(scope="module")
def reference(bundled_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(bundled_folder), device="cpu")


@pytest.fixture(scope="module")
def expected(reference: SentenceTransformer) -> dict[str, Any]:
    """sentence-transformers' vector of each text, each computed alone."""
    return {name: reference.encode([text])[0] for name, text in TEXTS.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_alone_has_the_vector_of_sentence_transformers(
    bundled_encoder: Encoder, expected: dict[str, Any], name: str
) -> None:
    assert cosines(embed(bundled_encoder, [TEXTS[name]])[0], expected[name]) >= SAME


@pytest.mark.parametrize("seed", range(3))
def test_a_text_has_the_same_vector_in_every_batch(
    bundled_encoder: Encoder, expected: dict[str, Any], seed: int
) -> None:
    names = list(TEXTS)
    random.Random(seed).shuffle(names)

    vectors = embed(bundled_encoder, [TEXTS[name] for name in names])

    assert dict(zip(names, cosines(vectors, [expected[name] for name in names]), strict=True)) == {
        name: pytest.approx(1, abs=1 - SAME) for name in names
    }


def test_a_batch_of_mixed_lengths_has_the_vectors_of_sentence_transformers(
    bundled_encoder: Encoder, reference: SentenceTransformer
) -> None:
    rng = random.Random(3)
    texts = [text_of(rng.choice([1, 2, 5, 10, 50, 150, 300]), seed) for seed in range(20)]

    assert cosines(embed(bundled_encoder, texts), reference.encode(texts)).min() >= SAME


def test_bfloat16_stays_close(load_checkpoint: Load, bundled_folder: Path, expected: dict[str, Any]) -> None:
    if choose_dtype("auto", "cpu") != "bfloat16":
        pytest.skip("this CPU has no bfloat16")
    encoder = load_checkpoint(bundled_folder, dtype="bfloat16")

    found = cosines(embed(encoder, list(TEXTS.values())), list(expected.values()))

    assert found.min() >= 0.999
    assert np.median(found) >= 0.9999


SIMILAR = [
    ("A man is playing a guitar.", "A man plays the guitar."),
    ("The girl is slicing an onion.", "A woman is cutting an onion."),
    ("How do I reset my password?", "I forgot my password and cannot log in."),
    ("The stock market fell sharply on Monday.", "Shares dropped steeply at the start of the week."),
    ("A plane is taking off.", "An air plane is leaving the ground."),
    ("The recipe needs two eggs and flour.", "You need flour and a couple of eggs to bake it."),
    ("Heavy rain flooded the streets of the city.", "The town's roads were under water after the storm."),
    ("The patient was given antibiotics.", "The doctor prescribed medicine against the infection."),
    ("A dog runs through the snow.", "A puppy is playing in a snowy field."),
    ("The central bank raised interest rates.", "Borrowing became more expensive after the bank's decision."),
    ("He won the chess tournament.", "He finished first in the chess competition."),
    ("Solar panels turn sunlight into electricity.", "Photovoltaic cells generate power from the sun."),
]


@pytest.mark.parametrize("number", range(len(SIMILAR)), ids=[a for a, _b in SIMILAR])
def test_a_sentence_is_nearer_to_its_paraphrase_than_to_any_other(bundled_encoder: Encoder, number: int) -> None:
    vectors = embed(bundled_encoder, [SIMILAR[number][0], *[b for _a, b in SIMILAR]])

    assert np.argmax(cosines(np.repeat(vectors[:1], len(SIMILAR), 0), vectors[1:])) == number


# ---------------------------------------------------------------------------------------------- every kind of checkpoint

SMALL_TEXTS = [
    "A cat sits on the mat.",
    "the old garden",
    "",
    "  Café Straße  ",
    "1234567890",
    "猫が座っている。",
    "The QUICK brown fox jumps over the lazy dog and looks at the birds in the old garden, " * 3,
    "unknown: ⟁ 𓀀",
]


def assert_same_as_sentence_transformers(encoder: Encoder, folder: Path, **prompt: str) -> None:
    reference = SentenceTransformer(str(folder), device="cpu")
    wanted = reference.encode(SMALL_TEXTS, **prompt)

    vectors = embed(encoder, SMALL_TEXTS, prompt.get("prompt_name"))

    assert cosines(vectors, wanted).min() >= SAME
    assert cosines(vectors[0], vectors[1]) < 0.99, "the checkpoint tells no texts apart: the test could not fail"


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet"]
)
def test_every_architecture_is_that_of_sentence_transformers(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load, model_type: str
) -> None:
    folder = make_checkpoint(model_type, transformer={"max_seq_length": 38})

    assert_same_as_sentence_transformers(load_checkpoint(folder), folder)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_two_positions_of_the_roberta_family_take_no_text(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load, model_type: str
) -> None:
    folder = make_checkpoint(model_type)  # 40 positions, and no file names another limit

    encoder = load_checkpoint(folder)

    assert encoder.tokenizer.max_tokens == 38
    assert np.isfinite(embed(encoder, SMALL_TEXTS)).all()


OLD_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@pytest.mark.parametrize("form", ["flags", "mode"])
@pytest.mark.parametrize("pooling", OLD_FLAGS)
def test_every_pooling_is_that_of_sentence_transformers(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load, pooling: str, form: str
) -> None:
    flags = {flag: name == pooling for name, flag in OLD_FLAGS.items()}
    folder = make_checkpoint("bert", pooling=flags if form == "flags" else {"pooling_mode": pooling})

    assert_same_as_sentence_transformers(load_checkpoint(folder), folder)


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta"])
def test_a_checkpoint_that_sentence_transformers_saved_itself(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load, tmp_path: Path, model_type: str
) -> None:
    source = SentenceTransformer(str(make_checkpoint(model_type, transformer={"max_seq_length": 20})), device="cpu")
    source.prompts = {"query": "query: ", "document": ""}
    folder = tmp_path / "saved"
    source.save_pretrained(str(folder))

    encoder = load_checkpoint(folder)

    assert encoder.tokenizer.max_tokens == 20
    assert_same_as_sentence_transformers(encoder, folder)


def test_a_checkpoint_without_modules_is_pooled_by_the_mean(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load
) -> None:
    folder = make_checkpoint("bert", has_modules=False)

    assert_same_as_sentence_transformers(load_checkpoint(folder), folder)


def test_weights_in_a_bin_file(make_checkpoint: MakeCheckpoint, load_checkpoint: Load) -> None:
    from safetensors.torch import load_file

    folder = make_checkpoint("bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    assert_same_as_sentence_transformers(load_checkpoint(folder), folder)


def test_prompts_are_tasks(make_checkpoint: MakeCheckpoint, load_checkpoint: Load) -> None:
    prompts = {"retrieval.query": "query: ", "retrieval.passage": "passage: ", "classification": ""}
    folder = make_checkpoint("xlm-roberta", sentence={"prompts": prompts}, transformer={"max_seq_length": 38})
    encoder = load_checkpoint(folder)

    for task in prompts:
        assert_same_as_sentence_transformers(encoder, folder, prompt_name=task)
    plain, query = (embed(encoder, SMALL_TEXTS[:1], task) for task in (None, "retrieval.query"))
    assert cosines(plain, query)[0] < SAME


def test_the_default_prompt_is_put_before_a_text_without_a_task(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load
) -> None:
    sentence = {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": "document"}
    folder = make_checkpoint("bert", sentence=sentence)

    assert_same_as_sentence_transformers(load_checkpoint(folder), folder)


def test_prompts_of_the_registry_win(make_checkpoint: MakeCheckpoint, load_checkpoint: Load) -> None:
    folder = make_checkpoint("bert", sentence={"prompts": {"query": "query: "}})
    encoder = load_checkpoint(folder, prompts={"query": "search the documents: "})

    vectors = embed(encoder, ["cat"], "retrieval.query")

    assert cosines(vectors, embed(encoder, ["search the documents: cat"]))[0] >= SAME


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
def test_texts_are_lower_cased_where_the_checkpoint_says(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load, model_type: str
) -> None:
    folder = make_checkpoint(model_type, transformer={"do_lower_case": True, "max_seq_length": 38})
    encoder = load_checkpoint(folder)

    assert_same_as_sentence_transformers(encoder, folder)
    upper, lower = embed(encoder, ["THE OLD GARDEN", "the old garden"])
    assert cosines(upper, lower) >= SAME


@pytest.mark.parametrize(
    ("files", "max_tokens"),
    [
        pytest.param({}, 40, id="positions alone"),
        pytest.param({"transformer": {"max_seq_length": 12}}, 12, id="sentence-transformers' file"),
        pytest.param({"tokenizer": {"model_max_length": 12}}, 12, id="the tokenizer's file"),
        pytest.param(
            {"transformer": {"max_seq_length": 30}, "tokenizer": {"model_max_length": 12}}, 30, id="the former wins"
        ),
        pytest.param({"tokenizer": {"model_max_length": 1e30}}, 40, id="no limit"),
    ],
)
def test_a_text_is_cut_where_sentence_transformers_cuts_it(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load, files: dict[str, Any], max_tokens: int
) -> None:
    folder = make_checkpoint("bert", **files)

    encoder = load_checkpoint(folder)

    assert encoder.tokenizer.max_tokens == max_tokens
    assert_same_as_sentence_transformers(encoder, folder)


def test_a_length_in_a_file_of_the_first_releases_counts(
    make_checkpoint: MakeCheckpoint, load_checkpoint: Load
) -> None:
    folder = make_checkpoint("roberta")
    (folder / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 12}')

    encoder = load_checkpoint(folder)

    assert encoder.tokenizer.max_tokens == 12
    assert_same_as_sentence_transformers(encoder, folder)
