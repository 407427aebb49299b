"""The encoder of a model: a tokenizer, a runtime for the transformer, and heads that read its states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gateway.engine.accumulation import ACCUMULATION
from gateway.engine.model.chat_pairs import ChatPairTokenizer
from gateway.engine.model.heads import DenseHead, OutputHead, ScoreHead
from gateway.engine.model.in_flight import InFlight, in_order, start_copy
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.engine.model.pairs import PairTokenizer
from gateway.engine.model.runtimes.base import Runtime
from gateway.engine.model.states import TokenStates
from gateway.engine.model.tokenizer import Row, Steps, Tokenizer
from gateway.types import EmbedJob, MultiVector, Output, SparseVector, Truncate

T = TypeVar("T")

# A smaller forward says little about the speed, because a forward has a fixed cost.
_MIN_TIMED_TOKENS = 64
# In a text of t tokens, attention needs 2 t d products per token, and everything else 12 d^2 with a width of d: as many at
# t = 6 d, which is 2,304 for a small model.
_COSTLY_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a model, one for each output; a cross-encoder's score takes the place of a vector.

    Attributes:
        unread_id: a token id whose states are skipped at the end of a text.
    """

    dense: DenseHead | ScoreHead | None
    sparse: OutputHead[SparseVector] | None = None
    multivector: OutputHead[MultiVector] | None = None
    unread_id: int | None = None

    def spans(self, tokens: Tokens) -> Sequence[tuple[int, int]] | None:
        """Return the parts of a text whose states are read; ``None`` for all of it, by the model's pooling."""
        ids = tokens.ids
        if self.unread_id is None or ids[-1] != self.unread_id:
            return tokens.spans
        last = next((i for i in reversed(range(len(ids))) if ids[i] != self.unread_id), 0)
        return [(last, last + 1)]


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that go into one forward.

    Attributes:
        rows: position of each text in the requested batch.
        features: the texts in the form that the runtime's forward takes.
    """

    rows: Sequence[int]
    items: list[Item]
    features: Any


def effort(lengths: Sequence[int]) -> float:
    """Return a rough measure of a forward's work: the number of short texts' tokens that take as long.

    Args:
        lengths: tokens of each text.
    """
    return sum(lengths) * (1 + max(lengths, default=0) / _COSTLY_LENGTH)


class Encoder:
    """Encodes texts with one transformer, on any runtime.

    Args:
        tasks: instruction of each task.
        adapters: index of each task's adapter in the runtime; tasks may have no adapter.
        instruction: the instruction for a text without a task.
        width: dimensions of a dense vector; 0 for a model without dense vectors.
        query_tokenizer: the tokenizer for texts of ``retrieval.query``, if they need a separate one.

    Attributes:
        num_padding: number of padding tokens computed so far.
        progressed_at: when a part of the running batch was last finished, on ``time.monotonic()``, as proof that it does
            not hang; if the encoder works ahead, when the part was launched.
        s_per_token: seconds of the last forward on a CPU that was not small, per token of its :func:`effort`; 0 on a card,
            where a forward returns before it is computed.
        device: torch device of the computation.
        accumulates_in_float16: whether matrix products on a card may accumulate in float16.
        works_ahead: whether :meth:`begin` returns without waiting for the device, so that the next batch can be launched
            while it computes.
    """

    num_padding = 0
    progressed_at = 0.0
    s_per_token = 0.0
    device = "cpu"
    accumulates_in_float16 = False
    works_ahead = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        runtime: Runtime,
        heads: Heads,
        *,
        width: int,
        tasks: Mapping[str, str],
        adapters: Mapping[str, int],
        instruction: str = "",
        query_tokenizer: Tokenizer | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._query_tokenizer = query_tokenizer or tokenizer
        self.width = width
        self.runtime = runtime
        self._heads = heads
        self._tasks = tasks
        self._adapters = adapters
        self._instruction = instruction

    # ------------------------------------------------------------------------------------------- texts to tokens

    def instruction(self, task: str | None) -> str:
        """Return the instruction for a text of the task, which may be empty."""
        return self._instruction if task is None else self._tasks[task]

    def limits(self, task: str | None) -> tuple[int, int]:
        """Return the longest text of a task in tokens, and how many of them are left for the text itself."""
        reader = self._reader(task)
        return reader.max_tokens, reader.room(self.instruction(task))

    def tokenize(self, texts: Sequence[str], task: str | None, truncate: Truncate) -> list[Tokens]:
        """Tokenize texts for a task, its instruction included.

        Raises:
            ContextLengthExceeded: a text is too long, and ``truncate`` asks to refuse such texts.
        """
        return self._reader(task).tokenize(texts, self.instruction(task), truncate)

    def _reader(self, task: str | None) -> Tokenizer:
        return self._query_tokenizer if task == "retrieval.query" else self.tokenizer

    def read_query(self, query: str) -> Steps[Row] | Steps[str]:
        """Tokenize the query of pairs; see :meth:`gateway.engine.model.pairs.PairTokenizer.read_query`.

        Raises:
            TypeError: the model scores no pairs.
        """
        if isinstance(self.tokenizer, ChatPairTokenizer):
            return self.tokenizer.read_query(query)
        return self._pairs.read_query(query)

    def read(self, job: EmbedJob, first: int, texts: Sequence[str], query: Row | str | None) -> Steps[list[Tokens]]:
        """Tokenize some of the texts of a job, step by step; see :mod:`gateway.engine.model.tokenizer`.

        Args:
            first: index of the first text in the job.
            query: the result of :meth:`read_query` for the job's query, if it has one.

        Raises:
            BadInput: a text is too long, and the job asks to refuse such texts, or a chunk has no tokens.
            TypeError: the job has pairs, and the model scores no pairs.
        """
        if job.firsts is not None:
            return self._read_firsts(job.firsts[first : first + len(texts)], texts, job.truncate, first)
        if query is not None:
            limit = job.max_text_tokens
            if isinstance(query, str):
                chat = self._chat_pairs
                return chat.read_pairs(query, texts, job.truncate, first_index=first, max_text_tokens=limit)
            return self._pairs.read_pairs(query, texts, job.truncate, first_index=first, max_text_tokens=limit)
        if job.is_late_chunked:
            return self._read_document(texts, job.task)
        reader, name = self._reader(job.task), job.text_name
        return reader.read(texts, self.instruction(job.task), job.truncate, first, name, job.max_text_tokens)

    def _read_document(self, chunks: Sequence[str], task: str | None) -> Steps[list[Tokens]]:
        document = yield from self.tokenizer.read_chunks(chunks, self.instruction(task))
        return [document]

    def _read_firsts(
        self, firsts: Sequence[str | None], texts: Sequence[str], truncate: Truncate, first_index: int
    ) -> Steps[list[Tokens]]:
        """Tokenize pairs of texts; a text without a first text is tokenized alone."""
        rows: list[Tokens] = []
        for has_first, group in groupby(range(len(texts)), key=lambda i: firsts[i] is not None):
            places = list(group)
            index, some = first_index + places[0], [texts[i] for i in places]
            if has_first:
                first_texts = [firsts[i] or "" for i in places]
                rows += yield from self._pairs.read_each(first_texts, some, truncate, first_index=index)
            else:
                rows += yield from self.tokenizer.read(some, self._instruction, truncate, index)
        return rows

    @property
    def _chat_pairs(self) -> ChatPairTokenizer:
        if not isinstance(self.tokenizer, ChatPairTokenizer):
            raise TypeError("this model does not read pairs by a template")
        return self.tokenizer

    @property
    def _pairs(self) -> PairTokenizer:
        if not isinstance(self.tokenizer, PairTokenizer):
            raise TypeError("this model does not score pairs")
        return self.tokenizer

    # ----------------------------------------------------------------------------------------- tokens to vectors

    @torch.inference_mode()
    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """Encode tokenized texts, in order. Runs in one thread at a time."""
        return self._encode(items, in_float16=self.accumulates_in_float16)

    @torch.inference_mode()
    def encode_exactly(self, items: Sequence[Item]) -> list[Encoded]:
        """Encode tokenized texts with products that accumulate in float32, regardless of the model's entry."""
        return self._encode(items, in_float16=False)

    def _encode(self, items: Sequence[Item], *, in_float16: bool) -> list[Encoded]:
        if self.device == "cpu":
            return self.outputs(self.forward(self.prepare(items)))
        return self._begin(items, in_float16=in_float16).finish()

    @torch.inference_mode()
    def begin(self, items: Sequence[Item]) -> InFlight:
        """Launch all of the device's work for tokenized texts, including the copies of its results to the host.

        Like :meth:`encode`, but the host does not wait for the device if the encoder works ahead. Runs in one thread at a
        time. A device computes in the order of the calls.
        """
        return self._begin(items, in_float16=self.accumulates_in_float16)

    def _begin(self, items: Sequence[Item], *, in_float16: bool) -> InFlight:
        with ACCUMULATION.forward(in_float16=in_float16):  # a product reads the switch when it is launched
            return self._in_flight(self.forward(self.prepare(items)))

    def embed(self, texts: Sequence[tuple[str, str | None]]) -> list[npt.NDArray[np.float32]]:
        """Return the vector of each text for its task, ``(width,)``; longer texts are cut at the model's limit."""
        items = [Item(self.tokenize([text], task, Truncate.END)[0], task) for text, task in texts]
        return [encoded.dense[0] for encoded in self.encode(items)]

    def prepare(self, items: Sequence[Item]) -> list[Group]:
        """Group the texts for the runtime, and prepare its inputs."""
        groups = self.runtime.groups([item.num_tokens for item in items], [self._adapter(item) for item in items])
        return [self._prepare(rows, [items[row] for row in rows]) for rows in groups]

    def _prepare(self, rows: Sequence[int], items: list[Item]) -> Group:
        adapters = [self._adapter(item) for item in items]
        seconds = [item.tokens.second for item in items]
        attended = None
        if any(item.tokens.num_attended is not None for item in items):
            attended = [item.tokens.num_attended or item.num_tokens for item in items]
        ids = [item.tokens.ids for item in items]
        return Group(rows, items, self.runtime.prepare(ids, adapters, seconds, attended))

    def _adapter(self, item: Item) -> int:
        return -1 if item.task is None else self._adapters.get(item.task, -1)

    @torch.inference_mode()
    def forward(self, groups: Sequence[Group]) -> list[tuple[Group, TokenStates]]:
        """Run the transformer on each group."""
        computed = []
        for group in groups:
            started = time.monotonic()
            computed.append((group, self.runtime.forward(group.features)))
            self.progressed_at = time.monotonic()
            work = effort([item.num_tokens for item in group.items])
            if self.device == "cpu" and work >= _MIN_TIMED_TOKENS:
                # A process that was stopped in the meantime has not become that slow.
                s_per_token = (self.progressed_at - started) / work
                self.s_per_token = min(s_per_token, 2 * self.s_per_token or s_per_token)
        self.num_padding += sum(states.num_padding for _group, states in computed)
        return computed

    @torch.inference_mode()
    def outputs(self, computed: Sequence[tuple[Group, TokenStates]]) -> list[Encoded]:
        """Compute the outputs of each text from its states, in the order of the items."""
        if any(states.flat.is_cuda for _group, states in computed):
            return self._in_flight(computed).finish()
        return in_order([(group.rows, self._begin_outputs(group.items, states)()) for group, states in computed])

    def _in_flight(self, computed: Sequence[tuple[Group, TokenStates]]) -> InFlight:
        parts = [(group.rows, self._begin_outputs(group.items, states)) for group, states in computed]
        device = computed[0][1].flat.device if computed else torch.device("cpu")
        return InFlight(lambda: in_order([(rows, read()) for rows, read in parts]), device)

    def _begin_outputs(self, items: list[Item], states: TokenStates) -> Callable[[], list[Encoded]]:
        """Launch the heads, and return a function that returns the outputs of each text once the device is done."""
        dense: torch.Tensor = torch.zeros(len(items), 0)
        if self._heads.dense is not None:
            dense = self._heads.dense(states, [self._heads.spans(item.tokens) for item in items])
        is_pinned = dense.is_cuda
        vectors = start_copy(dense.float())
        sparse = _begin_head(self._heads.sparse, Output.SPARSE, states, items)
        multi = _begin_head(self._heads.multivector, Output.MULTIVECTOR, states, items)
        whole = {
            i: start_copy(text.float()) for i, text in enumerate(states.texts()) if Output.STATES in items[i].outputs
        }

        def read() -> list[Encoded]:
            rows = vectors().copy() if is_pinned else vectors()
            ends = list(accumulate(item.tokens.num_vectors for item in items))
            parts = [rows[first:end] for first, end in pairwise([0, *ends])]
            weights, vectors_of = sparse(), multi()
            # Copies: a view would keep the states of the whole batch.
            texts = {i: text().copy() for i, text in whole.items()}
            return [Encoded(parts[i], weights.get(i), vectors_of.get(i), texts.get(i)) for i in range(len(items))]

        return read


def _begin_head(
    head: OutputHead[T] | None, output: Output, states: TokenStates, items: Sequence[Item]
) -> Callable[[], dict[int, T]]:
    """Launch a head for the texts that want its output, and return a function that returns their outputs by position."""
    rows = [i for i, item in enumerate(items) if output in item.outputs]
    if head is None or not rows:
        return dict
    read = head.begin(states, items, rows)
    return lambda: dict(zip(rows, read(), strict=True))
