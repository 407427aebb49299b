"""A model that follows commands in its texts, on the real engine, and clients for it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from gateway.backends.base import Report, unreported
from gateway.backends.fake import fake_info
from gateway.backends.infinity import InfinityBackend
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.batcher import Limits
from gateway.engine.infinity import Engine, EngineArgs
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item
from gateway.engine.model.tokenizer import Tokenizer
from gateway.fleet import Fleet
from gateway.types import ModelInfo

WIDTH = 4
PATIENCE_S = 20.0
COMMANDS = ("raise", "nan", "narrow", "hang", "slow")
VOCABULARY = {"[UNK]": 0, **{word: number for number, word in enumerate(COMMANDS, start=1)}}


class _NoRuntime:
    """Has no weights."""


class ScriptedEncoder(Encoder):
    """Embeds a text as (number of tokens, 1, 2, 3), unless a word of it says to fail.

    ``raise``: the forward raises. ``nan``: a vector that is not finite. ``narrow``: one of the wrong width. ``hang``: the
    forward does not come back while :attr:`is_hanging`. ``slow``: it takes a tenth of a second.

    Attributes:
        memory_tokens: a forward of more tokens than this is out of memory.
        is_broken: every forward raises.
        num_forwards: forwards that were begun.
        num_items: texts in them.
    """

    def __init__(self) -> None:
        fast = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
        fast.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = Tokenizer(fast, max_tokens=64)
        self.width = WIDTH
        self.runtime: Any = _NoRuntime()
        self.memory_tokens = 1000
        self.is_broken = False
        self.is_hanging = threading.Event()
        self.let_go = threading.Event()
        self.num_forwards = self.num_items = 0

    def instruction(self, task: str | None) -> str:
        return ""

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        self.num_forwards += 1
        self.num_items += len(items)
        words = {word for item in items for word, number in VOCABULARY.items() if number in item.tokens.ids}
        if self.is_broken or "raise" in words:
            raise RuntimeError("the forward pass failed (scripted)")
        if sum(item.num_tokens for item in items) > self.memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (scripted)")
        if "hang" in words and self.is_hanging.is_set():
            self.let_go.wait(PATIENCE_S)
        if "slow" in words:
            time.sleep(0.1)
        return [Encoded(self._vector(item)) for item in items]

    def _vector(self, item: Item) -> np.ndarray:
        vector = np.array([[item.num_tokens, 1, 2, 3]], dtype=np.float32)
        if VOCABULARY["nan"] in item.tokens.ids:
            vector[0, 2] = np.nan
        return vector[:, :2] if VOCABULARY["narrow"] in item.tokens.ids else vector


_INFO = fake_info("scripted", width=WIDTH, dimensions=(WIDTH,), max_tokens=64)


class ScriptedBackend(InfinityBackend):
    """The real backend, with a scripted model instead of a checkpoint.

    Attributes:
        encoder: the one that runs, or did last.
        num_loads: how often the model was loaded.
        failing_loads: how many of the next loads raise.
    """

    def __init__(self, entry: ModelEntry, settings: Settings) -> None:
        super().__init__(entry, settings)
        self.encoder = ScriptedEncoder()
        self.num_loads = 0
        self.failing_loads = 0

    async def plan(self, report: Report = unreported) -> ModelInfo:
        return _INFO

    def _load(self) -> tuple[Engine, ModelInfo]:
        self.num_loads += 1
        if self.failing_loads:
            self.failing_loads -= 1
            raise RuntimeError("the device is still busy")
        if self.num_loads > 1:
            self.encoder = ScriptedEncoder()
        args = EngineArgs(model_name_or_path="scripted", served_model_name="scripted", model_warmup=False)
        return Engine(args, [self.encoder], Limits(256, 4096, 100_000)), _INFO


class Gateway:
    """A running gateway: its models, and a client for it."""

    def __init__(self, fleet: Fleet, backend: ScriptedBackend, base_url: str) -> None:
        self.fleet = fleet
        self.backend = backend
        self.base_url = base_url
        self.client = httpx.Client(base_url=base_url, timeout=PATIENCE_S)

    def embed(self, *texts: str) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"input": list(texts)})

    def state(self) -> str:
        return str(self.client.get("/health/ready").json()["models"][0]["state"])

    def wait_for(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_true():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.02)


class Bystanders:
    """Clients that keep embedding during a fault.

    Attributes:
        statuses: of every answer so far.
        wrong: answers of 200 whose vector was not the text's own.
    """

    def __init__(self, base_url: str, number: int) -> None:
        self.statuses: list[int] = []
        self.wrong: list[str] = []
        self._base_url = base_url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(number)]

    def __enter__(self) -> Bystanders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _run(self, seed: int) -> None:
        with httpx.Client(base_url=self._base_url, timeout=PATIENCE_S) as client:
            for number in range(100_000):
                if self._is_over.is_set():
                    return
                num_words = 1 + (seed + number) % 20
                text = " ".join(f"w{seed}x{number}" for _ in range(num_words))
                with contextlib.suppress(httpx.TransportError):
                    answer = client.post("/v1/embeddings", json={"input": text, "normalized": False})
                    self.statuses.append(answer.status_code)
                    if answer.status_code == 200:
                        vector = answer.json()["data"][0]["embedding"]
                        if vector != [num_words, 1, 2, 3]:
                            self.wrong.append(text)
