"""What the batcher needs of an encoder, on top of what Infinity needs of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gateway.engine.infinity import BaseEmbedder
from gateway.engine.model.items import Encoded, Item, Tokens
from gateway.engine.model.pairs import PairTokenizer
from gateway.engine.model.tokenizer import Row, Steps, Tokenizer
from gateway.types import EmbedJob, Truncate


class Encoder(BaseEmbedder):
    """An embedder that takes tokens: ``encode_pre``, ``encode_core``, ``encode_post``, as Infinity calls them.

    Infinity's batch handler calls the three in three threads and tokenizes twice, once to sort by length and once in
    ``encode_pre``. Here the tokens of a text are made once, by :meth:`tokenize`, and ``encode_pre`` takes them; it
    still takes strings as well, so that everything of Infinity's that holds a ``BaseEmbedder`` works.
    """

    tokenizer: Tokenizer
    width: int
    runtime_name = ""
    """What computes the forward; empty where that is not one of ``engine/model/runtimes``."""
    num_padding = 0
    """Tokens of padding that have been computed so far."""
    progressed_at = 0.0
    """When a part of the batch in hand was last done, on ``time.monotonic()``: it is not hung then."""

    def tokenize(
        self, texts: Sequence[str], task: str | None, truncate: Truncate, first_index: int = 0
    ) -> list[Tokens]:
        """Tokenize texts for a task, its instruction included.

        Raises:
            ContextLengthExceeded: a text is too long, and ``truncate`` says to refuse.
        """
        return self.tokenizer.tokenize(texts, self.instruction(task), truncate, first_index)

    def tokenize_pairs(
        self,
        query: str,
        texts: Sequence[str],
        truncate: Truncate,
        *,
        first_index: int = 0,
        max_text_tokens: int | None = None,
    ) -> list[Tokens]:
        """Tokenize each text behind the query; see :meth:`gateway.engine.model.pairs.PairTokenizer.tokenize_pairs`.

        Raises:
            ContextLengthExceeded: a pair is too long, and ``truncate`` says to refuse.
            TypeError: the model scores no pairs.
        """
        return self._pairs.tokenize_pairs(
            query, texts, truncate, first_index=first_index, max_text_tokens=max_text_tokens
        )

    def read_query(self, query: str) -> Steps[Row]:
        """Tokenize the query of pairs; see :meth:`gateway.engine.model.pairs.PairTokenizer.read_query`.

        Raises:
            TypeError: the model scores no pairs.
        """
        return self._pairs.read_query(query)

    def read(self, job: EmbedJob, first: int, texts: Sequence[str], query: Row | None) -> Steps[list[Tokens]]:
        """Tokenize some of the texts of a job, step by step; see :mod:`gateway.engine.model.tokenizer`.

        Args:
            first: place of the first of the texts in the job.
            query: what :meth:`read_query` made of the job's query, if it has one.

        Raises:
            BadInput: a text is too long, and the job says to refuse, or a chunk is of no use.
            TypeError: the job has a query, and the model scores no pairs.
        """
        if query is not None:
            limit = job.max_text_tokens
            return self._pairs.read_pairs(query, texts, job.truncate, first_index=first, max_text_tokens=limit)
        if job.is_late_chunked:
            return self._read_document(texts, job.task)
        return self.tokenizer.read(texts, self.instruction(job.task), job.truncate, first)

    def _read_document(self, chunks: Sequence[str], task: str | None) -> Steps[list[Tokens]]:
        document = yield from self.tokenizer.read_chunks(chunks, self.instruction(task))
        return [document]

    @property
    def _pairs(self) -> PairTokenizer:
        if not isinstance(self.tokenizer, PairTokenizer):
            raise TypeError("this model scores no pairs")
        return self.tokenizer

    @abstractmethod
    def instruction(self, task: str | None) -> str:
        """Return what is put before a text of the task; empty if nothing is."""

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """Encode tokenized texts, in order. Runs in one thread at a time."""
        with torch.inference_mode():
            return self.encode_post(self.encode_core(self.encode_pre(list(items))))

    def embed(self, texts: Sequence[tuple[str, str | None]]) -> list[npt.NDArray[np.float32]]:
        """Return the vector of each text for its task, ``(width,)``, cut at the longest that the model reads."""
        items = [Item(self.tokenize([text], task, Truncate.END)[0], task) for text, task in texts]
        return [encoded.dense[0] for encoded in self.encode(items)]

    @abstractmethod
    def encode_post(self, embedding: Any, skip_quanitzation: bool = True) -> list[Encoded]:  # type: ignore[override]
        """Read the outputs off what ``encode_core`` returned, in the order that was asked for.

        Infinity's returns an array of vectors; there are outputs beside vectors here, and texts with several.
        """

    def tokenize_lengths(self, sentences: list[str]) -> list[int]:
        """Return the tokens of each sentence (Infinity's name and signature)."""
        return [len(row.ids) for row in self.tokenize(sentences, None, Truncate.END)]
