"""Tiny checkpoints with the layout of the real ones and random weights, and encoders of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from gateway.app import create_app
from gateway.backends.fleet import Fleet
from gateway.config.registry import Alias, ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.embedding import Output, Truncate
from gateway.engine.devices import CpuThreads
from gateway.engine.encoders.build import BuildOptions, build_encoders
from gateway.engine.encoders.text import TextEncoder
from gateway.engine.items import Encoded, Item
from gateway.engine.loading import plan_load

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Represent the query for retrieving evidence documents: ",
    "Represent the document for retrieval: ",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query Query:",
    "Berlin is the capital of Germany; it has 3.85 million inhabitants.",
    "Embeddings map a text to a vector, and near vectors mean near texts!",
    "Grüße aus Köln: 東京 is far away.",
)
TEXTS = (
    "fox",
    "",
    "Berlin is the capital of Germany.",
    "  near   vectors mean\tnear texts  ",
    "The quick brown fox jumps over the lazy dog, again and again. Embeddings map a text to a vector!",
    "Grüße aus Köln: 東京 \U0001f98a",
    "a query",
    "near vectors " * 60,  # over the longest text of every model here
    "again and again " * 9,
)
MAX_TOKENS = 64
JINA_TASKS = {
    "retrieval_query": "retrieval.query",
    "retrieval_passage": "retrieval.passage",
    "separation": "separation",
    "classification": "classification",
    "text_matching": "text-matching",
}
RUNTIMES = ("reference", "packed", "openvino")

# transformers' encoders are nearly blind to what surrounds a token with their usual first weights: larger ones are not.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": 0.25,
}


# -------------------------------------------------------------------------------------------------------- tokenizers


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Return an XLM-RoBERTa-like tokenizer: Unigram over text whose spaces are written as `▁`."""
    pieces = sorted({f"▁{word}" for sentence in SENTENCES for word in sentence.split()} | set("".join(SENTENCES)))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(piece, 0.0) for piece in special] + [("▁", -4.0)]
    vocab += [(piece, -2.0 - 0.01 * i) for i, piece in enumerate(piece for piece in pieces if piece != " ")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, "<s>", "</s>", "<pad>", "<unk>")


def wordpiece_tokenizer(cls: str = "[CLS]", sep: str = "[SEP]", pad: str = "[PAD]") -> PreTrainedTokenizerFast:
    """Return a BERT-like tokenizer."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [pad, cls, sep, "[UNK]"] if pad == "[PAD]" else [cls, pad, sep, "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _wrap(tokenizer, cls, sep, pad, "[UNK]")


def bpe_tokenizer(cls: str | None = "<s>", sep: str = "</s>", pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Return a RoBERTa-like tokenizer over bytes; without ``cls`` a Qwen-like one, which only puts ``sep`` behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (cls, pad, sep, "<unk>") if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _wrap(tokenizer, cls, sep, pad, "<unk>")


def _wrap(tokenizer: Tokenizer, cls: str | None, sep: str, pad: str, unk: str) -> PreTrainedTokenizerFast:
    names = [name for name in (cls, sep) if name is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}" if cls is not None else f"$A {sep}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=cls,
        bos_token=cls,
        sep_token=sep,
        eos_token=sep,
        pad_token=pad,
        unk_token=unk,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


# ------------------------------------------------------------------------------------------------------- checkpoints


def make_transformer(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, **changes: object) -> None:
    """Write a transformer with random weights, and its tokenizer."""
    torch.manual_seed(17)
    config = AutoConfig.for_model(
        model_type,
        **{
            **SIZES,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": MAX_TOKENS + 2,
            **changes,
        },
    )
    model = AutoModel.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():  # what is always 0 or 1 at first would hide mistakes
        if weight.ndim == 1:
            nn.init.normal_(weight, float("norm" in name.lower() and name.endswith("weight")), 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def jina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Jina v3: the weights at the root, and in a folder for each task an adapter that PEFT has saved."""
    folder = tmp_path_factory.mktemp("jina")
    make_transformer(folder, "jina_embeddings_v3", unigram_tokenizer(), type_vocab_size=1)
    save_adapters(folder, JINA_TASKS)
    return folder


def save_adapters(folder: Path, names: Sequence[str] | Mapping[str, str], **changes: object) -> None:
    """Let PEFT write an adapter with random weights for each name."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"]
    config = {"r": 4, "lora_alpha": 1, "lora_dropout": 0.0, **changes}
    config.setdefault("target_modules", [*modules, "word_embeddings", "token_type_embeddings"])
    model: PeftModel | None = None
    for name in names:
        lora = LoraConfig(**config)
        if model is None:
            model = get_peft_model(AutoModel.from_pretrained(folder), lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    assert model is not None
    torch.manual_seed(4)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a BGE-M3: sentence-transformers' files, and beside them the weights of the two further heads."""
    folder = tmp_path_factory.mktemp("m3")
    transformer = folder / "transformer"
    make_transformer(transformer, "xlm-roberta", unigram_tokenizer(), type_vocab_size=1)
    modules = [Transformer(str(transformer)), Pooling(64, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    shutil.rmtree(transformer)
    torch.manual_seed(3)
    torch.save(_head(64, 1), folder / "sparse_linear.pt")
    torch.save(_head(64, 64), folder / "colbert_linear.pt")
    return folder


def _head(num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    layer = nn.Linear(num_in, num_out)
    nn.init.normal_(layer.weight, std=0.3)
    return {name: tensor.half() for name, tensor in layer.state_dict().items()}


@pytest.fixture(scope="session")
def m3_bin(m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same BGE-M3 with its weights as a pickled state dict, as the real one has them."""
    folder = tmp_path_factory.mktemp("m3-bin") / "m3"
    shutil.copytree(m3, folder)
    torch.save(AutoModel.from_pretrained(m3).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@dataclass(frozen=True, slots=True)
class Family:
    """How a checkpoint of an architecture is made."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    pooling: str
    changes: Mapping[str, object] = field(default_factory=dict)
    activation: nn.Module | None = None
    is_normalised: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


NO_OFFSET = {"max_position_embeddings": MAX_TOKENS}
FAMILIES = {
    "bert": Family(wordpiece_tokenizer, "mean", NO_OFFSET),
    "roberta": Family(bpe_tokenizer, "mean"),
    "xlm-roberta": Family(unigram_tokenizer, "mean", prompts={"query": "query: ", "passage": "passage: "}),
    "camembert": Family(unigram_tokenizer, "max"),
    "mpnet": Family(lambda: wordpiece_tokenizer("<s>", "</s>", "<pad>"), "mean"),
    "distilbert": Family(wordpiece_tokenizer, "mean", NO_OFFSET, activation=nn.Tanh(), is_normalised=False),
    "electra": Family(wordpiece_tokenizer, "cls", {**NO_OFFSET, "embedding_size": 32}),
    "modernbert": Family(
        lambda: bpe_tokenizer("[CLS]", "[SEP]", "[PAD]"),
        "mean",
        {**NO_OFFSET, "local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 0, "sep_token_id": 2},
    ),
    "nomic_bert": Family(
        wordpiece_tokenizer,
        "mean",
        NO_OFFSET,
        is_normalised=False,
        prompts={"query": "search_query: ", "document": "search_document: ", "clustering": "clustering: "},
    ),
    "gte": Family(unigram_tokenizer, "cls", NO_OFFSET, activation=nn.Identity()),
    "qwen3": Family(
        lambda: bpe_tokenizer(None, "<|endoftext|>", "<|pad|>"),
        "lasttoken",
        {**NO_OFFSET, "num_key_value_heads": 2, "head_dim": 16},
        prompts={
            "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
            "document": "",
        },
    ),
}


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a checkpoint of an architecture, with sentence-transformers' own files."""

    @cache
    def make(model_type: str) -> Path:
        family = FAMILIES[model_type]
        folder = tmp_path_factory.mktemp(model_type)
        transformer = folder / "transformer"
        make_transformer(transformer, model_type, family.tokenizer(), **family.changes)
        modules = [Transformer(str(transformer)), Pooling(64, pooling_mode=family.pooling)]
        if family.activation is not None:
            modules.append(Dense(64, 48, activation_function=family.activation))
        modules += [Normalize()] if family.is_normalised else []
        model = SentenceTransformer(modules=modules, device="cpu", prompts=dict(family.prompts))
        model.save(str(folder), create_model_card=False)
        shutil.rmtree(transformer)
        return folder

    return make


# ---------------------------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True, slots=True)
class Loaded:
    """An encoder, and what can be asked of it in one line."""

    encoder: TextEncoder

    def encode(
        self,
        texts: Sequence[str],
        tasks: Sequence[str | None] | None = None,
        outputs: Sequence[Sequence[Output]] | None = None,
    ) -> list[Encoded]:
        """Encode texts in one batch."""
        tasks = tasks or [None] * len(texts)
        outputs = outputs or [[Output.DENSE]] * len(texts)
        return self.encoder.encode(
            [
                Item(self.encoder.tokenise([text], task, Truncate.END)[0], task, frozenset(wanted))
                for text, task, wanted in zip(texts, tasks, outputs, strict=True)
            ]
        )

    def vectors(self, texts: Sequence[str], tasks: Sequence[str | None] | None = None) -> np.ndarray:
        """Return the dense vectors of texts in one batch, not normalised."""
        return np.concatenate([one.dense for one in self.encode(texts, tasks)])

    def alone(self, texts: Sequence[str], tasks: Sequence[str | None] | None = None) -> np.ndarray:
        """Return the dense vectors of texts, each computed by itself."""
        tasks = tasks or [None] * len(texts)
        return np.concatenate([self.vectors([text], [task]) for text, task in zip(texts, tasks, strict=True)])


Load = Callable[..., Loaded]


@pytest.fixture(scope="session")
def load() -> Load:
    """Return a function that loads the encoder of a checkpoint with a runtime, in float32."""

    @cache
    def load(folder: Path, runtime: str, dtype: str = "float32") -> Loaded:
        plan = plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu", enabled=True))
        options = BuildOptions(
            device="cpu",
            dtype=dtype,
            runtime=runtime,
            max_tokens=plan.max_tokens,
            threads=CpuThreads(1, 1),
            tasks=plan.tasks,
            instruction=plan.instruction,
        )
        return Loaded(build_encoders(plan.checkpoint, options)[0])

    return load


@pytest.fixture(scope="session")
def cosines() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the function that gives the cosine of each row of one array to the same row of another."""

    def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        assert one.shape == other.shape
        one, other = one.astype(np.float64), other.astype(np.float64)
        return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)

    return cosines


@pytest.fixture(scope="session")
def hidden_states() -> Callable[..., torch.Tensor]:
    """Return the function that computes the token states of one text, as plainly as can be."""

    @torch.inference_mode()
    def states(model: PreTrainedModel | PeftModel, ids: Sequence[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]

    return states


@pytest.fixture(scope="session")
def tokenise() -> Callable[..., list[int]]:
    """Return the function that tokenises as transformers does."""

    @cache
    def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(folder)

    def tokenise(folder: Path, text: str, **options: object) -> list[int]:
        ids: list[int] = tokenizer(folder)(text, truncation=True, max_length=MAX_TOKENS, **options).input_ids
        return ids

    return tokenise


# -------------------------------------------------------------------------------------------------------------- HTTP


Connect = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Return a function that starts a gateway with real engines in this process, and returns a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def connect(*entries: ModelEntry, aliases: Mapping[str, tuple[str, str | None]] | None = None):
            registry = Registry(
                path=Path("models.yaml"),
                version=1,
                models=entries,
                aliases={
                    name: Alias(name=name, model=model, task=task) for name, (model, task) in (aliases or {}).items()
                },
            )
            settings = Settings(cpu_threads=1)
            fleet = Fleet.from_registry(registry, settings)
            stack.push_async_callback(fleet.stop)
            await fleet.start()
            assert {model.id: model.reason for model in fleet if model.reason} == {}
            transport = httpx.ASGITransport(create_app(registry, settings, fleet))
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))

        yield connect


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a checkpoint, so that a test may change it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Return a function that changes keys of a JSON file."""

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Keep torch's thread count, which loading a model sets for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
