"""Wire types of text-embeddings-inference (TEI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, cast

from pydantic import Field

from gateway import __version__
from gateway.api.json_body import (
    DIRECTION,
    TRUNCATION,
    Direction,
    Flag,
    Json,
    ModelName,
    Name,
    PositiveInteger,
    RequestBody,
    Texts,
    Truncation,
    check_batch,
    wanted_truncation,
)
from gateway.config.settings import Settings
from gateway.errors import BadInput
from gateway.routing.router import Target
from gateway.types import ModelInfo, ModelKind, Truncate

_TEXTS = "a string or a list of strings"
_INPUTS = "a string, a list of token ids, or a list of such"
_SEQUENCES = "a string, a pair of strings, or a list of lists of one or two strings"
_IDS = "a list of token ids, or a list of such lists"
_BOOL = "true or false"
# Limits of all texts and of all ids of one request: their tokens are written one by one.
MAX_CHARACTERS = 250_000
MAX_IDS = 250_000


TokenId = Annotated[int, Field(ge=0, lt=2**32)]
# Validation ends at the first wrong item: of a million, each would be an error with a message.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Inputs = Annotated[
    str | Annotated[list[str | TokenIds], Field(fail_fast=True)] | TokenIds,
    Field(union_mode="left_to_right"),
]


class AboutModel(RequestBody):
    """A request at the root may name a model. TEI, which serves one, has no such field."""

    model: ModelName | None = Field(None, title="a string")


class Cutting(RequestBody):
    """The fields on texts that are too long, and on the prompt before each text; part of several requests."""

    truncate: Truncation = Field(None, title=TRUNCATION)
    truncation_direction: Direction = Field(None, title=DIRECTION)
    prompt_name: Name | None = Field(None, title="a string")

    @property
    def wanted_truncation(self) -> Truncate:
        return wanted_truncation(self.truncate, self.truncation_direction)


class TextsBody(Cutting, AboutModel):
    """``POST /embed_sparse`` and ``POST /embed_all``."""

    inputs: Inputs = Field(title=_INPUTS)

    @property
    def items(self) -> list[str | list[int]]:
        """The texts, or the model's own token ids of one. A single one counts as a list of one."""
        if isinstance(self.inputs, str):
            return [self.inputs]
        is_one = bool(self.inputs) and isinstance(self.inputs[0], int)
        return [cast(list[int], self.inputs)] if is_one else cast(list[str | list[int]], self.inputs)


class EmbedBody(TextsBody):
    """``POST /embed``."""

    normalize: Flag = Field(True, title=_BOOL)
    dimensions: PositiveInteger | None = Field(None, title="a positive integer")


class PredictBody(AboutModel):
    """``POST /predict``: a text, a pair of texts, or a batch of lists of one or two texts."""

    inputs: str | Texts | Annotated[list[Texts], Field(fail_fast=True)] = Field(title=_SEQUENCES)
    truncate: Truncation = Field(None, title=TRUNCATION)
    truncation_direction: Direction = Field(None, title=DIRECTION)
    raw_scores: Flag = Field(False, title=_BOOL)

    @property
    def wanted_truncation(self) -> Truncate:
        return wanted_truncation(self.truncate, self.truncation_direction)

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and (not self.inputs or isinstance(self.inputs[0], list))

    @property
    def sequences(self) -> list[list[str]]:
        """The texts of each item: one, or the two of a pair.

        Raises:
            BadInput: an item has no text, or more than two.
        """
        if isinstance(self.inputs, str):
            return [[self.inputs]]
        items = cast(list[list[str]], self.inputs if self.is_batch else [self.inputs])
        for item in items:
            if len(item) not in (1, 2):
                raise BadInput(f"`inputs` must be {_SEQUENCES}: an item has {len(item)} texts", param="inputs")
        return items


class SimilarityInputs(RequestBody):
    """A text, and the texts that it is compared with."""

    source_sentence: str = Field(title="a string")
    sentences: Texts = Field(title="a list of strings")


class SimilarityBody(AboutModel):
    """``POST /similarity``."""

    inputs: dict[str, Any] = Field(title="an object with `source_sentence` and `sentences`")
    parameters: dict[str, Any] = Field(default_factory=dict, title="an object")


class Similarity(NamedTuple):
    """A request to compare texts, with the parts of its body."""

    body: SimilarityBody
    inputs: SimilarityInputs
    parameters: Cutting

    @classmethod
    def parse(cls, content: dict[str, Json], max_inputs: int) -> Similarity:
        """Validate a request.

        Raises:
            BadInput: a field is wrong, or there are no texts or more than ``max_inputs``.
        """
        body = SimilarityBody.parse(content)
        inputs, parameters = SimilarityInputs.parse(body.inputs), Cutting.parse(body.parameters)
        # The source counts as well, as it does in TEI; alone it is an empty batch.
        num_texts = len(inputs.sentences) + 1 if inputs.sentences else 0
        check_batch(num_texts, max_inputs, "inputs.sentences")
        return cls(body, inputs, parameters)


class TokenizeBody(AboutModel):
    """``POST /tokenize``."""

    inputs: str | Texts = Field(title=_TEXTS)
    add_special_tokens: Flag = Field(True, title=_BOOL)
    prompt_name: Name | None = Field(None, title="a string")


class DecodeBody(AboutModel):
    """``POST /decode``."""

    ids: TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(title=_IDS)
    skip_special_tokens: Flag = Field(True, title=_BOOL)

    @property
    def rows(self) -> list[list[int]]:
        """The lists of ids; a single one counts as a list of one."""
        is_one = bool(self.ids) and isinstance(self.ids[0], int)
        return [cast(list[int], self.ids)] if is_one else cast(list[list[int]], self.ids)


def check_characters(texts: Sequence[str], field: str = "inputs") -> None:
    """Reject texts whose tokens would make the answer too long.

    Raises:
        BadInput: the texts have more than ``MAX_CHARACTERS`` together.
    """
    _check_size(sum(map(len, texts)), MAX_CHARACTERS, field, "characters")


def check_ids(rows: Sequence[Sequence[int]], field: str) -> None:
    """Reject token ids whose texts would make the answer too long.

    Raises:
        BadInput: there are more than ``MAX_IDS`` ids.
    """
    _check_size(sum(map(len, rows)), MAX_IDS, field, "token ids")


def _check_size(size: int, limit: int, field: str, unit: str) -> None:
    if size > limit:
        raise BadInput(f"`{field}` has {size} {unit}; the limit is {limit}: send several requests", param=field)


def describe_model(target: Target, settings: Settings) -> dict[str, Any]:
    """Return the answer of ``GET /info``."""
    info = target.info
    return {
        "model_id": info.source,
        "model_sha": target.model.entry.revision,
        "model_dtype": info.dtype,
        "served_model_name": info.id,
        "model_type": _model_type(info),
        "max_concurrent_requests": settings.max_queue_texts,
        "max_input_length": info.max_tokens,
        # Where the registry has no limit, it depends on the device, and is never less than the longest text.
        "max_batch_tokens": target.model.entry.max_batch_tokens or info.max_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": settings.max_inputs,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def _model_type(info: ModelInfo) -> dict[str, object]:
    if info.kind is ModelKind.RERANK:  # it has one label, which transformers calls this
        return {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    if info.kind is ModelKind.CLASSIFY:
        names = {str(i): label for i, label in enumerate(info.labels)}
        return {"classifier": {"id2label": names, "label2id": {label: int(i) for i, label in names.items()}}}
    return {"embedding": {"pooling": "last_token" if info.pooling == "lasttoken" else info.pooling}}
