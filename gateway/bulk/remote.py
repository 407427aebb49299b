"""Embed through a running gateway, as a low-priority client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from gateway.api.openai_schema import ModelCard
from gateway.bulk.chunking import ModelTokens
from gateway.bulk.embedder import TextRefused, TextVectors
from gateway.bulk.model_spec import PASSAGE_TASK, PROBE, ModelSpec, without_place
from gateway.bulk.rows import BulkError, SpaceNote
from gateway.cli.client import EmbeddedTexts, GatewayClient, Refused, connect
from gateway.errors import StartError
from gateway.types import Output, Token

# Longer than the gateway's own default timeout for a request.
_TIMEOUT_S = 330.0
_PATIENCE_S = 600.0
_HEADERS = {"x-gateway-priority": "low"}
_NUM_CALLS = 8
_MAX_TEXTS = 128
_MAX_CHARACTERS = 200_000
# A vector per token makes an answer hundreds of times larger.
_MULTIVECTOR_SHARE = 16
_BLOCK_TEXTS = 2048
_OF_A_TEXT = ("context_length_exceeded", "invalid_vectors", "out_of_memory")
_TOO_MUCH = (413, 504)
_FAILED = (500, 502)
_PAUSE_S = 5.0


@asynccontextmanager
async def remote_embedder(
    url: str, api_key: str | None, spec: ModelSpec, patience_s: float = _PATIENCE_S
) -> AsyncIterator[RemoteEmbedder]:
    """Yield an embedder that sends requests to a running gateway.

    Args:
        patience_s: the seconds to wait for a gateway that is busy, restarting or loading the model.

    Raises:
        BulkError: the gateway does not answer or rejects the key or the model, or the name belongs to an experiment.
    """
    try:
        async with connect(url, api_key, timeout_s=_TIMEOUT_S, patience_s=patience_s, headers=_HEADERS) as client:
            yield await _prepare(client, spec)
    except BulkError:
        raise
    except StartError as error:
        raise BulkError(str(error)) from error


async def _prepare(client: GatewayClient, spec: ModelSpec) -> RemoteEmbedder:
    probe, task = await _probe(client, spec)
    if probe.is_experiment:
        raise BulkError(f"--model {spec.name} is an experiment, which uses several models: name one of those models")
    card = await client.card(probe.model)
    note = SpaceNote(
        space=probe.space,
        model=probe.model,
        task=probe.task,
        dimensions=probe.vectors.shape[1] if Output.DENSE in spec.outputs else 0,
        is_normalized=bool(card.normalized),
        token_width=probe.multivectors[0].shape[1] if Output.MULTIVECTOR in spec.outputs else 0,
        has_sparse=Output.SPARSE in spec.outputs,
    )
    return RemoteEmbedder(client, spec, task, note, card)


async def _probe(client: GatewayClient, spec: ModelSpec) -> tuple[EmbeddedTexts, str | None]:
    """Find the task to request, and wait while the model loads."""
    first = await _embed(client, spec, [PROBE], None, None)
    card: ModelCard = await client.card(first.model)
    if not spec.prefers_passages or PASSAGE_TASK not in card.tasks or first.task == PASSAGE_TASK:
        return first, None
    try:
        return await _embed(client, spec, [PROBE], PASSAGE_TASK, None), PASSAGE_TASK
    except Refused as refused:
        if refused.param != "task":
            raise
        return first, None  # the name already includes a task


async def _embed(
    client: GatewayClient,
    spec: ModelSpec,
    texts: Sequence[str],
    task: str | None,
    space: str | None,
    *,
    is_late: bool = False,
) -> EmbeddedTexts:
    return await client.embed(
        spec.name,
        texts,
        task,
        spec.dimensions,
        expect_space=space,
        outputs=spec.outputs,
        truncate=spec.truncate,
        is_late=is_late,
    )


class RemoteEmbedder:
    """An :class:`~gateway.bulk.embedder.Embedder` that sends requests, several at once."""

    def __init__(
        self, client: GatewayClient, spec: ModelSpec, task: str | None, note: SpaceNote, card: ModelCard
    ) -> None:
        self._client = client
        self._card = card
        self._spec = spec
        self._task = task
        self.note = note
        share = _MULTIVECTOR_SHARE if note.token_width else 1
        self.max_texts = _MAX_TEXTS // share
        self.max_characters = _MAX_CHARACTERS // share
        self.num_calls = _NUM_CALLS
        self.block_texts = _BLOCK_TEXTS // share

    async def tokens(self) -> ModelTokens:
        """Return the model's tokenizer, which uses the gateway's ``/tokenize``.

        Its functions may be called in any thread except the event loop's.
        """
        loop, card = asyncio.get_running_loop(), self._card
        # `/tokenize` would reject a space in the name. Each request for vectors checks the space anyway.
        name = self._spec.name.partition("@")[0]

        async def split(texts: Sequence[str], *, as_embedded: bool) -> list[list[Token]]:
            task = self.note.task if as_embedded else None
            return await self._client.tokenize(name, texts, task, add_special_tokens=as_embedded)

        def wait(texts: Sequence[str], *, as_embedded: bool) -> list[list[Token]]:
            try:
                return asyncio.run_coroutine_threadsafe(split(texts, as_embedded=as_embedded), loop).result()
            except StartError as error:
                raise BulkError(f"--chunk needs the model's tokens: {error}") from error

        try:
            [probe] = await split([PROBE], as_embedded=True)
            counted = (await _embed(self._client, self._spec, [PROBE], self._task, self.note.space)).num_tokens
        except StartError as error:
            raise BulkError(f"--chunk needs the model's tokens: {error}") from error
        # The instruction of a model without tasks, which `/tokenize` does not include.
        more = max(0, counted - len(probe))

        def count(texts: Sequence[str]) -> list[int]:
            return [more + len(row) for row in wait(texts, as_embedded=True)]

        can_chunk_late = True  # unknown until the first document
        return ModelTokens(partial(wait, as_embedded=False), count, card.max_tokens or 0, can_chunk_late)

    async def embed(self, texts: Sequence[str], *, is_late: bool = False) -> TextVectors:
        try:
            answer = await self._embed_with_retries(texts, is_late=is_late)
        except Refused as refused:
            message = without_place(refused.reason)
            if refused.code in _OF_A_TEXT or (refused.status in _TOO_MUCH and len(texts) > 1):
                raise TextRefused(message) from refused
            if refused.status == 413:  # even alone, the text exceeds the gateway's limit for a request
                raise TextRefused(message) from refused
            if refused.status in _FAILED and await self._works():
                raise TextRefused(message) from refused
            raise BulkError(str(refused)) from refused
        except StartError as error:
            raise BulkError(str(error)) from error
        return TextVectors(
            answer.vectors if self.note.dimensions else None,
            answer.num_tokens,
            answer.num_truncated,
            answer.sparse if self.note.has_sparse else None,
            answer.multivectors if self.note.token_width else None,
        )

    async def _embed_with_retries(self, texts: Sequence[str], *, is_late: bool = False) -> EmbeddedTexts:
        """Send a request; try again once after an error that the texts may not have caused."""
        try:
            return await _embed(self._client, self._spec, texts, self._task, self.note.space, is_late=is_late)
        except Refused as refused:
            if refused.status not in _FAILED or refused.code in _OF_A_TEXT:
                raise
        await asyncio.sleep(_PAUSE_S)
        return await _embed(self._client, self._spec, texts, self._task, self.note.space, is_late=is_late)

    async def _works(self) -> bool:
        """Return whether the gateway can embed another text, which means that the texts caused the failure."""
        try:
            await _embed(self._client, self._spec, [PROBE], self._task, self.note.space)
        except StartError:
            return False
        return True
