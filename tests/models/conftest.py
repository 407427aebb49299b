"""Tiny checkpoints with the layout of the real ones and random weights, and encoders of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from gateway.config.registry import ModelEntry
from gateway.engine.devices import CpuThreads
from gateway.engine.loading import plan_load
from gateway.engine.model.build import build_encoders
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item
from gateway.types import Output, Truncate
from tests.models import plain
from tests.models.by_token import inference_free, make_base, make_masked_lm, stanford  # noqa: F401  fixtures
from tests.models.checkpoints import (
    FAMILIES,
    JINA_TASKS,
    MAX_TOKENS,
    SENTENCES,
    linear_head,
    make_transformer,
    save_adapters,
    unigram_tokenizer,
)
from tests.models.cross_encoders import make_cross_encoder
from tests.models.family_layouts import publish
from tests.models.in_process import Connect, connecting

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

ONE_THREAD = CpuThreads(1, 1)
# PEFT asks transformers for a property by the name that it had before 5.23.
_PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let PEFT work in the tests of this folder."""
    item.add_marker(pytest.mark.filterwarnings(_PEFT_WARNING))


@pytest.fixture(scope="session")
def jina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a Jina v3: the weights at the root, and in a folder for each task an adapter that PEFT has saved."""
    folder = tmp_path_factory.mktemp("jina")
    make_transformer(folder, "jina_embeddings_v3", unigram_tokenizer(), type_vocab_size=1)
    save_adapters(folder, JINA_TASKS)
    return folder


@pytest.fixture(scope="session")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a BGE-M3: sentence-transformers' files, and next to them the weights of the other two heads."""
    folder = tmp_path_factory.mktemp("m3")
    transformer = folder / "transformer"
    make_transformer(transformer, "xlm-roberta", unigram_tokenizer(), type_vocab_size=1)
    modules = [Transformer(str(transformer)), Pooling(64, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    shutil.rmtree(transformer)
    torch.manual_seed(3)
    sparse = linear_head(64, 1)
    ids = unigram_tokenizer()(" ".join(SENTENCES), return_tensors="pt", truncation=True).input_ids
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(ids).last_hidden_state[0]
    sparse["bias"] = -(sparse["weight"].float() @ states.mean(0)).half()  # about half of the tokens weigh something
    torch.save(sparse, folder / "sparse_linear.pt")
    torch.save(linear_head(64, 64), folder / "colbert_linear.pt")
    return folder


@pytest.fixture(scope="session")
def m3_bin(m3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same BGE-M3 with its weights as a pickled state dict, as the real one has them."""
    folder = tmp_path_factory.mktemp("m3-bin") / "m3"
    shutil.copytree(m3, folder)
    torch.save(AutoModel.from_pretrained(m3).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a checkpoint of an architecture, with sentence-transformers' own files."""

    @cache
    def make(model_type: str, **changes: object) -> Path:
        family = FAMILIES[model_type]
        folder = tmp_path_factory.mktemp(model_type)
        transformer = folder / "transformer"
        make_transformer(transformer, model_type, family.tokenizer(), **{**family.changes, **changes})
        modules = [Transformer(str(transformer)), Pooling(64, pooling_mode=family.pooling)]
        if family.activation is not None:
            modules.append(Dense(64, 48, activation_function=family.activation))
        widths = (64, *family.dense)
        modules += [Dense(width, out, bias=False, activation_function=nn.Identity()) for width, out in pairwise(widths)]
        modules += [Normalize()] if family.is_normalized else []
        model = SentenceTransformer(modules=modules, device="cpu", prompts=dict(family.prompts))
        model.save(str(folder), create_model_card=False)
        shutil.rmtree(transformer)
        publish(folder, family)
        return folder

    return make


@pytest.fixture(scope="session")
def plain_original(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a checkpoint of one of transformers' classes once, which no test may change."""

    @cache
    def make(model_type: str, head: str | None, changes: str) -> Path:
        folder = tmp_path_factory.mktemp(f"plain-{model_type}") / model_type
        return plain.make_plain(folder, model_type, head, **json.loads(changes))

    return make


@pytest.fixture
def make_plain(tmp_path: Path, plain_original: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that gives a checkpoint of one of transformers' classes, without sentence-transformers' files."""

    def make(model_type: str, head: str | None = None, **changes: object) -> Path:
        return Path(shutil.copytree(plain_original(model_type, head, json.dumps(changes)), tmp_path / model_type))

    return make


# ---------------------------------------------------------------------------------------------------------- encoders


@dataclass(frozen=True, slots=True)
class Loaded:
    """An encoder, with short methods for tests."""

    encoder: Encoder

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
                Item(self.encoder.tokenize([text], task, Truncate.END)[0], task, frozenset(wanted))
                for text, task, wanted in zip(texts, tasks, outputs, strict=True)
            ]
        )

    def vectors(self, texts: Sequence[str], tasks: Sequence[str | None] | None = None) -> np.ndarray:
        """Return the dense vectors of texts in one batch, not normalized."""
        return np.concatenate([one.dense for one in self.encode(texts, tasks)])

    def alone(self, texts: Sequence[str], tasks: Sequence[str | None] | None = None) -> np.ndarray:
        """Return the dense vectors of texts, each computed by itself."""
        tasks = tasks or [None] * len(texts)
        return np.concatenate([self.vectors([text], [task]) for text, task in zip(texts, tasks, strict=True)])


Load = Callable[..., Loaded]


def assert_outputs_agree(found: Sequence[Encoded], expected: Sequence[Encoded], least_cosine: float) -> None:
    """Compare all outputs of BGE-M3 in 16 bits with those in float32."""
    for one, other in zip(found, expected, strict=True):
        assert cosines_of(one.dense, other.dense).min() > least_cosine
        assert cosines_of(one.multivector, other.multivector).min() > 0.998
        shared = dict(zip(other.sparse.indices.tolist(), other.sparse.values.tolist(), strict=True))
        given = dict(zip(one.sparse.indices.tolist(), one.sparse.values.tolist(), strict=True))
        assert max((abs(given.get(id_, 0) - shared.get(id_, 0)) for id_ in {*given, *shared}), default=0) < 0.1


def cosines_of(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of one array to the same row of another."""
    assert one.shape == other.shape
    one, other = one.astype(np.float64), other.astype(np.float64)
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


@pytest.fixture(scope="session")
def load() -> Load:
    """Return a function that loads the encoder of a checkpoint with a runtime, in float32 by default."""

    @cache
    def load(folder: Path, runtime: str, dtype: str = "float32", threads: CpuThreads = ONE_THREAD) -> Loaded:
        plan = plan_load(ModelEntry(id="tiny", source=str(folder), device="cpu", enabled=True))
        options = replace(plan.build_options("cpu", threads), dtype=dtype, runtime=runtime)
        return Loaded(build_encoders(plan.checkpoint, options)[0])

    return load


@pytest.fixture(scope="session")
def peft_states(jina: Path) -> Callable[[Sequence[int], str | None], torch.Tensor]:
    """Return the function that computes the token states of one text as PEFT does: a base, and an adapter a folder."""
    model: PeftModel | None = None
    for folder, task in JINA_TASKS.items():
        if model is None:
            model = PeftModel.from_pretrained(
                AutoModel.from_pretrained(jina), jina, subfolder=folder, adapter_name=task.replace(".", "_")
            )
        else:
            model.load_adapter(jina, adapter_name=task.replace(".", "_"), subfolder=folder)
    assert model is not None
    loaded = model.eval()

    @torch.inference_mode()
    def states(ids: Sequence[int], task: str | None) -> torch.Tensor:
        if task is not None:
            loaded.set_adapter(task.replace(".", "_"))
        with loaded.disable_adapter() if task is None else contextlib.nullcontext():
            result: torch.Tensor = loaded(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
        return result

    return states


@pytest.fixture(scope="session")
def cosines() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the function that gives the cosine of each row of one array to the same row of another."""

    return cosines_of


@pytest.fixture(scope="session")
def tokenize() -> Callable[..., list[int]]:
    """Return the function that tokenizes as transformers does."""

    @cache
    def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(folder)

    def tokenize(folder: Path, text: str, **options: object) -> list[int]:
        ids: list[int] = tokenizer(folder)(text, truncation=True, max_length=MAX_TOKENS, **options).input_ids
        return ids

    return tokenize


@pytest.fixture(scope="session")
def make_reranker(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a cross-encoder with random weights, as transformers saves it."""

    @cache
    def make(model_type: str, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp(f"{model_type}-reranker")
        make_cross_encoder(folder, model_type, **changes)
        return folder

    return make


# -------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Return a function that starts a gateway with real engines in this process, and returns a client of it."""
    async with connecting() as connect:
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
def _one_thread() -> Iterator[None]:
    """Compute with one thread: for models of this size more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
