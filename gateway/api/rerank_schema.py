"""Wire types of rerank. OpenAPI is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, RootModel, WithJsonSchema

from gateway.api.json_body import (
    DIRECTION,
    MAX_USER_CHARS,
    TRUNCATION,
    Direction,
    Flag,
    Json,
    ModelName,
    PositiveInteger,
    RequestBody,
    Truncation,
    User,
    describe,
    number,
    resolve_synonyms,
    wanted_truncation,
)
from gateway.api.wire import ErrorBody, Responses, Usage, responses
from gateway.errors import BadInput, EmptyInput, RequestError
from gateway.types import Output, Truncate

_TEXTS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {"type": "string"},
            {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        ]
    },
}


_SCORE_BY = [Output.DENSE.value, Output.SPARSE.value, Output.MULTIVECTOR.value]
_SCORE_BY_TITLE = "one or more of `dense`, `sparse`, `multivector`, or an object of weights above 0 by these names"
_MAX_WEIGHT = 1e6
_SCORE_BY_SCHEMA = {
    "anyOf": [
        {"type": "string", "enum": _SCORE_BY},
        {"type": "array", "minItems": 1, "items": {"type": "string", "enum": _SCORE_BY}},
        {
            "type": "object",
            "minProperties": 1,
            "propertyNames": {"enum": _SCORE_BY},
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_WEIGHT},
        },
    ]
}


def _text_of(value: Json) -> Json:
    """Read ``{"text": "…"}`` as its text: NVIDIA's clients write the query like a document."""
    match value:
        case {"text": str(text)}:
            return text
        case _:
            return value


class RerankBody(RequestBody):
    """Texts to score against a query. Unknown fields are ignored, and `null` means absent.

    One of `documents` and `texts` is required; with `texts`, the answer has TEI's shape.
    """

    query: Annotated[str, BeforeValidator(_text_of)] = Field(
        description="The query that the documents are scored against.", title="a string"
    )
    documents: Annotated[Any, WithJsonSchema(_TEXTS_SCHEMA)] = Field(
        None, description='Up to 2,048 (configurable), each a string or `{"text": "…"}`.'
    )
    texts: Annotated[Any, WithJsonSchema(_TEXTS_SCHEMA)] = Field(
        None, description="Same as `documents`, for an answer in TEI's shape."
    )
    model: ModelName | None = Field(
        None, description="Model id, alias or source; may be left out if only one model reranks.", title="a string"
    )
    top_n: PositiveInteger | None = Field(
        None, description="Number of results to return, the best first; all by default.", title="a positive integer"
    )
    return_documents: Flag | None = Field(
        None,
        description="Whether a result has its text; by default on `/v1/rerank` only, and not with `texts`.",
        title="true or false",
    )
    return_text: Flag | None = Field(None, description="Same as `return_documents`.", title="true or false")
    raw_scores: Flag | None = Field(
        None, description="Return the model's own scores, and not their sigmoid.", title="true or false"
    )
    truncate: Truncation = Field(
        None,
        description="Handling of a pair that is too long: cut the end of the document (`true`, `END`, `right`; the "
        "default) or its start (`START`, `left`), or answer 400 (`false`, `NONE`).",
        title=TRUNCATION,
    )
    truncation_direction: Direction = Field(
        None,
        description="Side at which a document that is too long is cut: its end (`right`, the default) or its start.",
        title=DIRECTION,
    )
    max_tokens_per_doc: PositiveInteger | None = Field(
        None, description="Length in tokens at which each document is always cut.", title="a positive integer"
    )
    score_by: Annotated[Any, WithJsonSchema(_SCORE_BY_SCHEMA)] = Field(
        None,
        description="For models that embed: the output to score documents by, or several, or several with "
        "weights; by default as the model's `rerank` in `/v1/models` says.",
    )
    user: User = Field(
        None,
        description="The end user: the unit of an experiment that is split by it, otherwise ignored.",
        title=f"of at most {MAX_USER_CHARS} characters",
    )

    @property
    def wanted_scores(self) -> dict[Output, float] | None:
        """The outputs to score by, with their weights; ``None`` if the request names none.

        Raises:
            BadInput: an output is not known, a weight is not a number above 0, or the value is empty.
        """
        given: Json = self.score_by
        if given is None:
            return None
        names = given if isinstance(given, dict | list) else [given]
        rows = list(names.items()) if isinstance(names, dict) else [(name, 1.0) for name in names]
        weights: dict[Output, float] = {}
        for name, weight in ((name, number(given)) for name, given in rows):
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= _MAX_WEIGHT:
                continue
            if isinstance(name, str) and (output := name.strip().lower()) in _SCORE_BY:
                weights[Output(output)] = float(weight)
        if not weights or len(weights) < len(rows):
            raise BadInput(f"`score_by` must be {_SCORE_BY_TITLE}, got {describe(given)}", param="score_by")
        return weights

    @property
    def is_tei(self) -> bool:
        return self.texts is not None

    @property
    def wanted_truncation(self) -> Truncate:
        return wanted_truncation(self.truncate, self.truncation_direction)

    @property
    def wants_texts(self) -> bool | None:
        """Whether the results repeat their texts; ``None`` if the request leaves this open."""
        return resolve_synonyms(return_documents=self.return_documents, return_text=self.return_text)

    def wanted_documents(self, max_inputs: int) -> list[str]:
        """Return the texts to score.

        Raises:
            BadInput: texts are missing, more than ``max_inputs``, or under both names, or an item is not a text.
        """
        if self.documents is not None and self.texts is not None:
            raise BadInput("`documents` and `texts` mean the same: leave one out", param="texts")
        name = "texts" if self.is_tei else "documents"
        given: Json = self.texts if self.is_tei else self.documents
        if given is None:
            raise BadInput("`documents` is required", param="documents")
        if not isinstance(given, list):
            raise BadInput(f"`{name}` must be a list of strings, got {describe(given)}", param=name)
        if not given:
            error = EmptyInput if self.is_tei else BadInput
            raise error(f"`{name}` is an empty list; send at least one text", param=name)
        if len(given) > max_inputs:
            raise BadInput(
                f"`{name}` has {len(given)} items; the limit is {max_inputs}: send several requests", param=name
            )
        return [_text(item, name, i) for i, item in enumerate(given)]


def _text(item: Json, name: str, index: int) -> str:
    match item:
        case str(text) | {"text": str(text)}:
            return text
        case _:
            raise BadInput(
                f'`{name}[{index}]` must be a string or {{"text": string}}, got {describe(item)}', param=name
            )


class DocumentText(BaseModel):
    """The text of a result, as Cohere and Jina write it."""

    text: str


class Reranked(BaseModel):
    """One text and its score."""

    index: int = Field(description="Place of the text in the request.")
    relevance_score: float = Field(
        description="A larger score means a better answer; 0 to 1 unless `raw_scores`. For a model that embeds: the "
        "similarity of the vectors."
    )
    document: DocumentText | str | None = Field(
        None, description="The text, if requested; a plain string on `/rerank`, which Infinity's clients use."
    )


class ApiVersion(BaseModel):
    """Cohere's."""

    version: Literal["2"]


class BilledUnits(BaseModel):
    """Cohere's."""

    search_units: int


class RerankMeta(BaseModel):
    """The fields that Cohere's clients read."""

    api_version: ApiVersion
    billed_units: BilledUnits


class RerankedList(BaseModel):
    """Texts by score, the best first."""

    id: str = Field(description="The request's id.")
    object: Literal["rerank"]
    model: str = Field(description="The requested name; for an alias, the model that answered.")
    results: list[Reranked]
    usage: Usage = Field(description="The model's own tokens: the query counts once with each text.")
    meta: RerankMeta


class TeiRanked(BaseModel):
    """One text and its score, as TEI writes it."""

    index: int
    score: float
    text: str | None = None


class RerankResult(RootModel[RerankedList | list[TeiRanked]]):
    """The answer: a list alone when the request has `texts`."""


class TeiErrorBody(BaseModel):
    """An error, as TEI writes it, with two further fields of the gateway."""

    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty"]
    message: str
    detail: str


class RerankError(RootModel[ErrorBody | TeiErrorBody]):
    """An error: TEI's when the request has `texts`."""


def rerank_responses(*errors: type[RequestError], headers: dict[str, dict[str, Any]]) -> Responses:
    """Describe the answers of a path that reranks: 200, and each error that it can end in, in either form."""
    described = responses(RerankResult, *errors, headers=headers)
    for status, answer in described.items():
        if status != 200:
            answer["model"] = RerankError
    described[422] = {"model": RerankError, "description": "With `texts`: the errors that are a 400 without."}
    described[424] = {"model": RerankError, "description": "With `texts`: the model does not rerank, or failed."}
    return described
