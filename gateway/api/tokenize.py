"""Split a text into a model's tokens, and show where the model cuts a long one: ``POST /v1/tokenize``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gateway.api.endpoint import Endpoint
from gateway.api.json_body import Flag, ModelName, Name, RequestBody, Texts, as_list, check_batch
from gateway.api.pieces import dumps, nested_list
from gateway.api.tei_schema import check_characters
from gateway.api.wire import AnswerBody, request_body, responses
from gateway.errors import BadInput, ModelNotFound, ModelNotReady, UnsupportedOutput
from gateway.http.context import RequestContext
from gateway.routing.router import Target
from gateway.types import Token

BYTES_PER_TOKEN = 400
"""The memory of a token, as an object and in the tokenizer."""

_PIECE = 1_000  # so many tokens are written in a millisecond or two


class TokenizeBody(RequestBody):
    """``POST /v1/tokenize``."""

    model: ModelName | None = Field(
        None, title="a string", description="The model, as for embeddings; by default the default model."
    )
    input: str | Texts = Field(title="a string or a list of strings")
    task: Name | None = Field(
        None, title="a string", description="The task, as for embeddings; the tokens begin with its instruction."
    )
    add_special_tokens: Flag = Field(True, title="true or false", description="Whether to show the template's tokens.")


class TokenCard(BaseModel):
    """One token."""

    id: int
    text: str = Field(description="The part of the text that the token covers; the token's name if it covers none.")
    special: bool = Field(description="Whether the token comes from the model's template.")
    instruction: bool = Field(description="Whether the token comes from the instruction of the task.")
    start: int | None = Field(
        description="Position of the part in the text, in characters; `null` if `special` or `instruction`."
    )
    stop: int | None


class TokenizedText(BaseModel):
    """The tokens of one text."""

    index: int
    num_tokens: int = Field(description="Number of all tokens, including those after the cut.")
    read_tokens: int = Field(description="Number of tokens that the model reads.")
    cut_at: int | None = Field(
        description="Position of the cut in characters; the model does not read the rest. `null` without a cut."
    )
    tokens: list[TokenCard]


class TokenizedList(AnswerBody):
    """The tokens of every text, in the order of the request."""

    object: str = "list"
    model: str
    task: str | None
    max_tokens: int
    data: list[TokenizedText]


def instruction_of(target: Target, task: str | None) -> str:
    """Return the text that the model reads before each text."""
    return target.info.tasks.get(task or target.info.default_task or "", target.info.instruction)


def place_of_cut(tokens: Sequence[Token], limit: int, num_before: int) -> int | None:
    """Return where a text is cut, in characters; ``None`` if the model reads all of it.

    Args:
        limit: number of tokens that the model reads, including the template's.
        num_before: length of the instruction, which the tokens include.
    """
    if len(tokens) <= limit:
        return None
    plain = [token for token in tokens if not token.is_special]
    num_read = max(1, limit - (len(tokens) - len(plain)))
    return max(0, (plain[num_read - 1].stop or 0) - num_before) if num_read <= len(plain) else None


class Tokenizer:
    """The handler."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def tokenize(self, request: Request) -> Response:
        """Show how a model splits texts into tokens, and where it cuts those that are too long."""
        endpoint, context = self._endpoint, RequestContext.of(request)
        body = await endpoint.receive(request, TokenizeBody.parse)
        texts = as_list(body.input)
        check_batch(len(texts), endpoint.settings.max_inputs, "input")
        check_characters(texts, "input")
        endpoint.note_name(request, body.model)
        target = endpoint.service.target(body.model, body.task, context.client)
        context.model = target.model.id
        before = instruction_of(target, target.task)
        read = [before + text for text in texts]
        num_characters = sum(map(len, read))
        context.memory.resize(BYTES_PER_TOKEN * num_characters)
        async with endpoint.service.vocabulary(target, "tokenize") as vocabulary:
            # With the template's tokens, since they count toward the limit.
            split = partial(vocabulary.split, read, add_special_tokens=True)
            rows = await endpoint.in_turn(request, num_characters, split, endpoint.tokenizing)
        shows_special, limit = body.add_special_tokens, target.info.limit(target.task)
        head = {"object": "list", "model": target.model.id, "task": target.task, "max_tokens": limit}

        def parts() -> Iterator[bytes]:
            yield dumps(head)[:-1] + b',"data":'
            yield from nested_list(
                _write_text(index, row, limit, len(before), shows_special=shows_special)
                for index, row in enumerate(rows)
            )
            yield b"}"

        return await endpoint.stream(
            request, parts, BYTES_PER_TOKEN * sum(map(len, rows)), {"x-gateway-model": target.info.id}
        )


def _write_text(
    index: int, tokens: Sequence[Token], limit: int, num_before: int, *, shows_special: bool
) -> Iterator[bytes]:
    """Write a :class:`TokenizedText`, some tokens at a time."""
    facts = {
        "index": index,
        "num_tokens": len(tokens),
        "read_tokens": min(len(tokens), limit),
        "cut_at": place_of_cut(tokens, limit, num_before),
    }
    yield dumps(facts)[:-1] + b',"tokens":['
    shown = (_card(token, num_before) for token in tokens if shows_special or not token.is_special)
    separator = b""
    while some := list(islice(shown, _PIECE)):
        yield separator + dumps(some)[1:-1]
        separator = b","
    yield b"]}"


def _card(token: Token, num_before: int) -> dict[str, object]:
    """Return a token as it is written, with places in the text without the instruction."""
    # Field by field: `asdict` takes ten times as long, and there are a quarter of a million.
    stop = None if token.stop is None else token.stop - num_before
    is_instruction = stop is not None and num_before > 0 and stop <= 0
    is_placed = stop is not None and token.start is not None and not is_instruction
    text = token.text
    if is_placed and token.start is not None and token.start < num_before:
        text = text[num_before - token.start :]  # it begins in the instruction, often with its last blank
    return {
        "id": token.id,
        "text": text,
        "special": token.is_special,
        "instruction": is_instruction,
        "start": max(0, token.start - num_before) if is_placed and token.start is not None else None,
        "stop": stop if is_placed else None,
    }


def tokenize_router(endpoint: Endpoint) -> APIRouter:
    """Return the route. Only under ``/v1``: ``/tokenize`` is TEI's, with another form."""
    router = APIRouter(tags=["OpenAI"])
    router.add_api_route(
        "/v1/tokenize",
        Tokenizer(endpoint).tokenize,
        methods=["POST"],
        responses=responses(TokenizedList, BadInput, ModelNotFound, ModelNotReady, UnsupportedOutput),
        openapi_extra=request_body(TokenizeBody),
    )
    return router
