"""An encoder without a model, and helpers to delay it, to wait, and to send requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import numpy as np

from gateway.engine.batcher import Batcher
from gateway.engine.model.encoder import Encoder
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.engine.model.tokenizer import Steps
from gateway.errors import ContextLengthExceeded, RequestError
from gateway.types import Embeddings, EmbedJob, Truncate

MakeJob = Callable[..., EmbedJob]
StartBatcher = Callable[..., Awaitable[Batcher]]
PATIENCE_S = 10.0


class NumberTokenizer:
    """Interprets a text as a list of numbers, and each number as a token."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.on_tokenize: Callable[[Sequence[str]], None] = lambda _texts: None

    def read(
        self,
        texts: Sequence[str],
        instruction: str,
        truncate: Truncate,
        first_index: int = 0,
        name: str = "input",
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        yield sum(map(len, texts))
        self.on_tokenize(texts)
        rows = [[int(word) for word in (instruction + text).split()] for text in texts]
        if truncate is Truncate.REFUSE and any(len(ids) > self.max_tokens for ids in rows):
            raise ContextLengthExceeded(f"maximum context length is {self.max_tokens} tokens", param="input")
        return [Tokens(ids[: self.max_tokens], len(ids) > self.max_tokens) for ids in rows]


class NumberEncoder(Encoder):
    """Embeds a text as ``[its first number, how many numbers it has]``.

    Attributes:
        on_forward: called with the numbers of each batch before it is computed; may wait or raise.
        batches: the numbers of each batch that was begun.
    """

    width = 2

    def __init__(self, max_tokens: int = 64) -> None:
        self.numbers = NumberTokenizer(max_tokens)
        self.tokenizer = self.numbers  # type: ignore[assignment]
        self.on_forward: Callable[[list[list[int]]], None] = lambda _batch: None
        self.batches: list[list[list[int]]] = []

    @property
    def computed(self) -> list[int]:
        """The first number of every text that was begun, in order."""
        return [ids[0] for batch in self.batches for ids in batch]

    def instruction(self, task: str | None) -> str:
        return "" if task is None else f"{task} "

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        batch = [item.tokens.ids for item in items]
        self.batches.append(batch)
        self.on_forward(batch)
        return self.vectors(batch)

    def vectors(self, batch: list[list[int]]) -> list[Encoded]:
        return [Encoded(np.array([[ids[0], len(ids)]], dtype=np.float32)) for ids in batch]


def raise_for(number: int, error: BaseException) -> Callable[[list[list[int]]], None]:
    def on_forward(batch: list[list[int]]) -> None:
        if any(number in ids for ids in batch):
            raise error

    return on_forward


class Gate:
    """Holds forwards, or tokenizing, until it is opened."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._was_reached = threading.Event()

    def __call__(self, _what: object) -> None:
        self._was_reached.set()
        assert self._is_open.wait(PATIENCE_S)

    def open(self) -> None:
        self._is_open.set()

    def wait_reached(self) -> bool:
        return self._was_reached.wait(PATIENCE_S)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.wait_reached)


def threads_of(model: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(f"{model}-")]


async def becomes(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:  # noqa: ASYNC110  a thread makes it hold, without an event
        await asyncio.sleep(0.005)
    return condition()


async def answer(awaitable: Awaitable[Embeddings]) -> Embeddings | RequestError:
    """Return the answer or the error of a request; neither may take forever."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await awaitable
    except RequestError as error:
        return error


def texts_of(numbers: Iterable[int], length: int = 1) -> list[str]:
    return [" ".join([str(number)] * length) for number in numbers]
