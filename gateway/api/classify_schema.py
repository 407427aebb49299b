"""Wire types of classification. OpenAPI is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel, WithJsonSchema

from gateway.api.json_body import (
    DIRECTION,
    MAX_USER_CHARS,
    TRUNCATION,
    Direction,
    Flag,
    Json,
    ModelName,
    RequestBody,
    Truncation,
    User,
    describe,
    resolve_synonyms,
    wanted_truncation,
)
from gateway.api.wire import Usage
from gateway.errors import BadInput
from gateway.types import Truncate

_PAIR = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}
_INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, _PAIR]}},
    ]
}


class ClassifyBody(RequestBody):
    """Texts, or pairs of texts, to classify. Unknown fields are ignored, and `null` means absent.

    With `raw_scores`, true or false, the answer has Infinity's shape, otherwise vLLM's.
    """

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)] = Field(
        description="A text, or up to 2,048 (configurable): each a string, or a pair of strings.",
        title="a string, or a list of strings and of pairs of strings",
    )
    model: ModelName | None = Field(
        None,
        description="Model id, alias or source; may be left out if only one model classifies.",
        title="a string",
    )
    raw_scores: Flag | None = Field(
        None,
        description="`true`: the model's own numbers, not the function of them that `/v1/models` names. With this field, "
        "the answer has Infinity's shape.",
        title="true or false",
    )
    use_activation: Flag | None = Field(
        None, description="vLLM's field; `false` means `raw_scores: true`.", title="true or false"
    )
    activation: Flag | None = Field(None, description="Same as `use_activation`.", title="true or false")
    truncate: Truncation = Field(
        None,
        description="Handling of a text that is too long: cut its end (`true`, `END`, `right`; the default) or its "
        "start (`START`, `left`), or answer 400 (`false`, `NONE`).",
        title=TRUNCATION,
    )
    truncation_direction: Direction = Field(
        None,
        description="Side at which a text that is too long is cut: its end (`right`, the default) or its start.",
        title=DIRECTION,
    )
    user: User = Field(
        None,
        description="The end user: the unit of an experiment that is split by it, otherwise ignored.",
        title=f"of at most {MAX_USER_CHARS} characters",
    )

    @property
    def is_infinity(self) -> bool:
        return self.raw_scores is not None

    @property
    def wants_raw(self) -> bool:
        """Whether the answer has the model's own numbers.

        Raises:
            BadInput: the fields of the two APIs contradict each other.
        """
        applies = resolve_synonyms(use_activation=self.use_activation, activation=self.activation)
        if self.raw_scores is not None and applies is self.raw_scores:
            raise BadInput(
                f"`raw_scores` and `use_activation` are both {str(applies).lower()}, which contradict each other: leave one "
                "of them out",
                param="use_activation",
            )
        return self.raw_scores is True or applies is False

    @property
    def wanted_truncation(self) -> Truncate:
        return wanted_truncation(self.truncate, self.truncation_direction)

    def sequences(self, max_inputs: int) -> tuple[list[str], list[str | None] | None]:
        """Return the texts, and the first text of each pair; see :class:`gateway.requests.ClassifyRequest`.

        Raises:
            BadInput: texts are missing or more than ``max_inputs``, or an item is neither a text nor a pair.
        """
        given: Json = self.input
        items: list[Json] = given if isinstance(given, list) else [given]
        if not items:
            raise BadInput("`input` is an empty list; send at least one text", param="input")
        if len(items) > max_inputs:
            raise BadInput(
                f"`input` has {len(items)} items; the limit is {max_inputs}: send several requests", param="input"
            )
        pairs = [_pair(item, f"input[{i}]" if isinstance(given, list) else "input") for i, item in enumerate(items)]
        firsts = [first for first, _text in pairs]
        return [text for _first, text in pairs], None if all(first is None for first in firsts) else firsts


def _pair(item: Json, place: str) -> tuple[str | None, str]:
    match item:
        case str(text):
            return None, text
        case [str(first), str(text)]:
            return first, text
        case [_, _]:
            wrong = next(part for part in item if not isinstance(part, str))
            shown = f"a list with {describe(wrong)}"
        case _:
            shown = describe(item)
    raise BadInput(f"`{place}` must be a string, or a list of two strings, got {shown}", param="input")


class Classified(BaseModel):
    """The labels of one text, as vLLM writes them."""

    index: int = Field(description="Place of the text in the input.")
    label: str = Field(description="The label with the largest score.")
    probs: list[float] = Field(description="A score for each label, in the order of `labels` in `/v1/models`.")
    num_classes: int


class ClassifiedList(BaseModel):
    """Texts with their labels, in input order, as vLLM writes them."""

    id: str = Field(description="The request's id.")
    object: Literal["list"]
    created: int
    model: str = Field(description="The requested name; for an alias, the model that answered.")
    data: list[Classified]
    usage: Usage


class LabelScore(BaseModel):
    """One label and its score."""

    score: float
    label: str


class InfinityClassifiedList(BaseModel):
    """The labels of each text, the best first, as Infinity writes them."""

    object: Literal["classify"]
    id: str
    created: int
    model: str
    data: list[list[LabelScore]]
    usage: Usage


class ClassifyResult(RootModel[ClassifiedList | InfinityClassifiedList]):
    """The answer: Infinity's when the request has `raw_scores`."""
