"""Static embeddings give the vectors of the library that wrote them: sentence-transformers or model2vec."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from transformers import PreTrainedTokenizerFast

from gateway.cli.verify import verify
from gateway.config.settings import Settings
from gateway.engine.loading import load_engine, plan_load
from gateway.engine.model.encoder import Encoder
from gateway.errors import BadInput, ContextLengthExceeded, LoadError
from gateway.types import Truncate
from tests.models.checkpoints import TEXTS, unigram_tokenizer, wordpiece_tokenizer
from tests.models.in_process import Connect
from tests.models.plain import entry
from tests.peers import find_module

Vectors: TypeAlias = np.ndarray
WIDTH = 16
LENGTH = 12  # tokens; with words of some letters, a text is cut by tokens or by characters
WORDS = [text for text in TEXTS if text.strip()]
UNKNOWN = "狐"
Make: TypeAlias = Callable[..., Path]


def table(num_rows: int) -> Vectors:
    return np.random.default_rng(7).normal(size=(num_rows, WIDTH)).astype(np.float32)


def save_model2vec(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tensors: Mapping[str, Vectors] | None = None,
    **config: object,
) -> Path:
    """Write a checkpoint as ``StaticModel.save_pretrained`` of model2vec 0.10 does; ``tensors`` replace the table."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": table(len(tokenizer))} if tensors is None else dict(tensors), folder / "model.safetensors")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    written = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True, "hidden_dim": WIDTH}
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    modules = [{"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}]
    if config.get("normalize", True):
        modules.append({"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def shared_rows(num_tokens: int) -> dict[str, Vectors]:
    """Return the tensors of a model whose tokens share vectors, and have weights."""
    draw = np.random.default_rng(3)
    return {
        "embeddings": table(20).astype(np.float16),
        "mapping": draw.integers(0, 20, num_tokens),
        "weights": draw.uniform(0.1, 2.0, num_tokens),
    }


def model2vec_vectors(folder: Path, texts: list[str], max_length: int | None = 512) -> Vectors:
    """Compute vectors by the rules of ``StaticModel.encode``, model2vec 0.10, with its own tokenizer object."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tensors = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab()
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model["unk_id"] if model["type"] == "Unigram" else vocab[model["unk_token"]]
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
        texts = [text[: max_length * int(np.median([len(token) for token in vocab]))] for text in texts]
    rows = []
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids = np.array([id_ for id_ in encoding.ids if id_ != unknown])
        found = tensors["embeddings"][tensors["mapping"][ids] if "mapping" in tensors else ids]
        rows.append((found * tensors["weights"][ids][:, None] if "weights" in tensors else found).mean(axis=0))
    return np.array(rows)


def load(folder: Path, **changes: object) -> Encoder:
    [encoder] = load_engine(plan_load(entry(folder, **{"dtype": "auto", **changes})), Settings(cpu_threads=1)).encoders
    return encoder


def vectors_of(encoder: Encoder, texts: list[str]) -> Vectors:
    return np.array(encoder.embed([(text, None) for text in texts]))


TOKENIZERS = {"wordpiece": wordpiece_tokenizer, "unigram": unigram_tokenizer}
with_each_tokenizer = pytest.mark.parametrize("tokenizer_name", TOKENIZERS)


# ------------------------------------------------------------------------------------------------------------- vectors


@with_each_tokenizer
@pytest.mark.parametrize("place", ["", "0_StaticEmbedding"])
@pytest.mark.parametrize("is_normalized", [True, False])
def test_sentence_transformers_layout(tmp_path: Path, tokenizer_name: str, place: str, is_normalized: bool) -> None:
    tokenizer = TOKENIZERS[tokenizer_name]()
    module = StaticEmbedding(tokenizer, embedding_weights=table(len(tokenizer)))
    modules = [module, *[Normalize()] * is_normalized]
    theirs = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "near: "})
    theirs.save(str(tmp_path), create_model_card=False)
    if place:
        (tmp_path / place).mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name).rename(tmp_path / place / name)
        rows = json.loads((tmp_path / "modules.json").read_text())
        rows[0]["path"] = place
        (tmp_path / "modules.json").write_text(json.dumps(rows))
    texts = [*WORDS, f"fox {UNKNOWN} fox"]
    plan = plan_load(entry(tmp_path, dtype="auto"))

    ours = load(tmp_path)

    expected = SentenceTransformer(modules=[module], device="cpu").encode(texts)  # pooled, as an encoder returns them
    np.testing.assert_allclose(vectors_of(ours, texts), expected, rtol=1e-5, atol=1e-6)
    queries = SentenceTransformer(modules=[module], device="cpu", prompts={"query": "near: "}).encode_query(texts)
    np.testing.assert_allclose(
        np.array(ours.embed([(text, "retrieval.query") for text in texts])), queries, rtol=1e-5, atol=1e-6
    )
    assert plan.info.is_normalized == is_normalized
    assert (plan.info.width, plan.info.dtype, plan.info.device, plan.runtime) == (WIDTH, "float32", "cpu", "table")


@with_each_tokenizer
@pytest.mark.parametrize("has_shared_rows", [False, True])
@pytest.mark.parametrize("max_length", [512, LENGTH])
def test_model2vec_layout(tmp_path: Path, tokenizer_name: str, has_shared_rows: bool, max_length: int) -> None:
    tokenizer = TOKENIZERS[tokenizer_name]()
    tensors = shared_rows(len(tokenizer)) if has_shared_rows else None
    config = {} if max_length == 512 else {"max_length": max_length}
    save_model2vec(tmp_path, tokenizer, tensors=tensors, **config)
    texts = [*WORDS, f"fox {UNKNOWN} fox", "a " * 50, "inhabitants " * 20]

    ours = vectors_of(load(tmp_path), texts)

    np.testing.assert_allclose(ours, model2vec_vectors(tmp_path, texts, max_length), rtol=1e-3, atol=1e-5)
    info = plan_load(entry(tmp_path, dtype="auto")).info
    assert info.max_tokens == max_length
    assert info.is_normalized


@with_each_tokenizer
@pytest.mark.parametrize("has_shared_rows", [False, True])
@pytest.mark.parametrize("max_length", [512, LENGTH])
def test_model2vec_itself(tmp_path: Path, tokenizer_name: str, has_shared_rows: bool, max_length: int) -> None:
    tokenizer = TOKENIZERS[tokenizer_name]()
    model2vec = find_module("model2vec")
    tensors = shared_rows(len(tokenizer)) if has_shared_rows else None
    save_model2vec(tmp_path, tokenizer, tensors=tensors, max_length=max_length)
    texts = [*WORDS, f"fox {UNKNOWN} fox", "a " * 50, "inhabitants " * 20]

    ours = vectors_of(load(tmp_path), texts)

    theirs = model2vec.StaticModel.from_pretrained(str(tmp_path)).encode(texts, normalize=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(theirs, model2vec_vectors(tmp_path, texts, max_length), rtol=1e-3, atol=1e-5)


def test_sentence_transformers_reads_model2vecs_table_alike(tmp_path: Path) -> None:
    """The two differ only where a text has unknown tokens, or is too long."""
    save_model2vec(tmp_path, unigram_tokenizer(), tensors=shared_rows(len(unigram_tokenizer())), normalize=False)
    texts = ["fox", "Berlin is the capital of Germany.", "again and again"]
    theirs = SentenceTransformer(str(tmp_path), device="cpu")

    np.testing.assert_allclose(vectors_of(load(tmp_path), texts), theirs.encode(texts), rtol=1e-5, atol=1e-6)


def test_a_batch_gives_the_same_as_each_text_alone(tmp_path: Path) -> None:
    encoder = load(save_model2vec(tmp_path, wordpiece_tokenizer()))

    together, alone = vectors_of(encoder, WORDS), np.concatenate([vectors_of(encoder, [text]) for text in WORDS])

    np.testing.assert_allclose(together, alone, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("text", ["", "  \n", UNKNOWN])
def test_a_text_without_a_known_token_is_refused_by_its_index(tmp_path: Path, text: str) -> None:
    encoder = load(save_model2vec(tmp_path, wordpiece_tokenizer()))

    with pytest.raises(BadInput, match=r"input\[1\] has no token"):
        encoder.tokenize(["fox", text], None, Truncate.END)


def test_a_cut_text_is_reported(tmp_path: Path) -> None:
    encoder = load(save_model2vec(tmp_path, wordpiece_tokenizer(), max_length=LENGTH))
    texts = ["fox", "a " * 50, " " * 1000 + "fox", "inhabitants" * 100]

    assert [row.is_truncated for row in encoder.tokenize([*texts[:2], texts[3]], None, Truncate.END)] == [
        False,
        True,
        True,
    ]
    [from_end] = encoder.tokenize(["again " * 50 + "fox"], None, Truncate.START)
    [fox] = encoder.tokenize(["fox"], None, Truncate.START)
    assert from_end.ids[-len(fox.ids) :] == fox.ids
    assert len(from_end.ids) <= LENGTH
    for text in texts[1:]:
        with pytest.raises(ContextLengthExceeded):
            encoder.tokenize([text], None, Truncate.REFUSE)


def test_max_tokens_of_the_registry_counts(tmp_path: Path) -> None:
    encoder = load(save_model2vec(tmp_path, wordpiece_tokenizer()), max_tokens=3)

    assert len(encoder.tokenize(["a b a b a b"], None, Truncate.END)[0].ids) == 3


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda:0"}, "device cuda:0 is not supported for static embeddings"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 is not supported for static embeddings"),
        ({"runtime": "openvino"}, "runtime openvino is not supported for static embeddings"),
        ({"max_tokens": 40_000}, "max_tokens is 40000"),
    ],
)
def test_settings_that_a_table_cannot_follow_are_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(LoadError, match=reason):
        load(save_model2vec(tmp_path, wordpiece_tokenizer()), **changes)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"other": table(3)}, "holds no table of static embeddings, only other"),
        ({"embeddings": table(3), "projection": table(3)}, "holds projection in addition to the table"),
        ({"embeddings": table(3)[0]}, r"embeddings has the shape \[16\]"),
        ({"embeddings": table(3), "weights": np.ones(2)}, "there are 3 tokens"),
        ({"embeddings": table(3)}, "the tokenizer has token ids up to"),
        ({"embeddings": table(500) * np.nan}, "not finite"),
        ({"embeddings": table(500) * 0}, "vectors of zeros"),
        ({"embeddings": table(3), "mapping": np.full(500, 3)}, "static embeddings cannot be read"),
    ],
)
def test_weights_that_are_not_a_table_of_the_tokenizer_are_refused(
    tmp_path: Path, tensors: dict[str, Vectors], reason: str
) -> None:
    with pytest.raises(LoadError, match=reason):
        load(save_model2vec(tmp_path, wordpiece_tokenizer(), tensors=tensors))


def test_texts_that_lose_their_start_are_refused(tmp_path: Path) -> None:
    """sentence-transformers lets the tokenizer cut them as its file says."""
    tokenizer = unigram_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5, direction="left")
    module = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=table(len(tokenizer)))
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path), create_model_card=False)

    with pytest.raises(LoadError, match="truncation on a side other than the right is not supported"):
        load(tmp_path)


def test_modules_behind_the_table_are_refused(tmp_path: Path) -> None:
    save_model2vec(tmp_path, wordpiece_tokenizer())
    (tmp_path / "config.json").unlink()
    rows = json.loads((tmp_path / "modules.json").read_text())
    rows[1]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(rows))

    with pytest.raises(LoadError, match="static embeddings with further modules behind them"):
        plan_load(entry(tmp_path))


@pytest.mark.parametrize("length", ["long", 0, True])
def test_a_malformed_length_is_refused(tmp_path: Path, length: object) -> None:
    with pytest.raises(LoadError, match="max_length must be a positive number of tokens or null"):
        plan_load(entry(save_model2vec(tmp_path, wordpiece_tokenizer(), max_length=length)))


def test_another_rule_is_another_space(tmp_path: Path) -> None:
    theirs = save_model2vec(tmp_path / "model2vec", wordpiece_tokenizer())
    other = save_model2vec(tmp_path / "st", wordpiece_tokenizer())
    (other / "config.json").unlink()

    fingerprints = {plan_load(entry(folder)).checkpoint.fingerprint for folder in (theirs, other)}

    assert len(fingerprints) == 2


# ---------------------------------------------------------------------------------------------------------------- HTTP


async def test_it_is_served_like_any_other_model(tmp_path: Path, connect: Connect) -> None:
    folder = save_model2vec(tmp_path, wordpiece_tokenizer())
    client = await connect(entry(folder, dtype="auto"))
    texts = ["fox", "Berlin is the capital of Germany.", "again and again"] * 30

    answer = await client.post("/v1/embeddings", json={"model": "tiny", "input": texts})
    blank = await client.post("/v1/embeddings", json={"model": "tiny", "input": ["fox", ""]})
    late = await client.post("/v1/embeddings", json={"model": "tiny", "input": texts[:3], "late_chunking": True})

    expected = model2vec_vectors(folder, texts)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = np.array([item["embedding"] for item in answer.json()["data"]])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert blank.status_code == late.status_code == 400
    assert "input[1] has no token" in blank.json()["error"]["message"]
    assert "`late_chunking` is not supported" in late.json()["error"]["message"]


def test_a_table_has_nothing_to_be_compared_with_but_golden_vectors(tmp_path: Path) -> None:
    folder = save_model2vec(tmp_path / "table", wordpiece_tokenizer())

    assert verify(entry(folder), Settings()) == []
