"""Wire types of TEI's dialect: what is accepted, what is returned. OpenAPI is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel, WithJsonSchema

from gateway.api.json_body import Json, describe
from gateway.api.schema import PositiveInteger, RequestBody
from gateway.embedding import Truncate
from gateway.errors import BadInput

_INPUTS_SCHEMA = {
    "description": "The text to embed, or a list of them.",
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}],
}
_DIRECTION = Literal["left", "Left", "right", "Right"]


def texts_of(inputs: Json, name: str, max_inputs: int) -> list[str]:
    """Read what TEI calls inputs: a text or texts.

    Raises:
        BadInput: it is something else, empty, or has more than ``max_inputs`` items.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list):
        raise BadInput(f"`{name}` must be a string or a list of strings, got {describe(inputs)}", param=name)
    if not texts:
        raise BadInput(f"`{name}` cannot be empty", param=name)
    if len(texts) > max_inputs:
        raise BadInput(f"batch size {len(texts)} > maximum allowed batch size {max_inputs}", param=name)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            # Token ids are a model's own; taken for those of another model they would give a vector that looks right.
            raise BadInput(f"`{name}[{i}]` must be a string, got {describe(text)}; token ids are not taken", param=name)
    return [text for text in texts if isinstance(text, str)]


class _Truncated(RequestBody):
    """What requests have in common that say how long texts are cut, and what they are for."""

    truncate: bool | None = Field(
        None,
        description="Whether texts that are too long are cut (the default) or refused.",
        title="true or false",
    )
    truncation_direction: _DIRECTION | None = Field(
        None, description="The end that is cut, `right` by default.", title="`left` or `right`"
    )
    prompt_name: str | None = Field(
        None, description="A task of the model, such as `retrieval.query` or `query`.", title="a string"
    )

    @property
    def wanted_truncation(self) -> Truncate:
        if self.truncate is False:
            return Truncate.REFUSE
        return Truncate.START if (self.truncation_direction or "").lower() == "left" else Truncate.END


class TeiEmbedBody(_Truncated):
    """Texts to embed. Unknown fields are ignored, and `null` means absent."""

    inputs: Annotated[Any, WithJsonSchema(_INPUTS_SCHEMA)]
    normalize: bool | None = Field(
        None, description="Whether vectors have L2 norm 1, as they do by default.", title="true or false"
    )
    dimensions: PositiveInteger | None = Field(
        None, description="Size of the vectors, from the model's list.", title="a positive integer"
    )


class TeiSparseBody(_Truncated):
    """Texts to give token weights for. Unknown fields are ignored, and `null` means absent."""

    inputs: Annotated[Any, WithJsonSchema(_INPUTS_SCHEMA)]


class SimilarityInputs(RequestBody):
    """A sentence, and those that it is compared with."""

    source_sentence: str = Field(title="a string")
    sentences: Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": {"type": "string"}})]


class SimilarityBody(RequestBody):
    """A sentence to compare with others. Unknown fields are ignored, and `null` means absent."""

    inputs: Annotated[Any, WithJsonSchema(SimilarityInputs.model_json_schema())]
    parameters: Annotated[Any, WithJsonSchema(_Truncated.model_json_schema())] = None

    def sentences(self, max_inputs: int) -> list[str]:
        """Return the sentence and then all others.

        Raises:
            BadInput: one of them is missing or not a string.
        """
        if not isinstance(self.inputs, dict):
            raise BadInput(f"`inputs` must be an object, got {describe(self.inputs)}", param="inputs")
        inputs = SimilarityInputs.parse(self.inputs)
        return [inputs.source_sentence, *texts_of(inputs.sentences, "sentences", max_inputs)]

    def wanted(self) -> _Truncated:
        """Return the parameters.

        Raises:
            BadInput: one has a value that is not accepted.
        """
        parameters = {} if self.parameters is None else self.parameters
        if not isinstance(parameters, dict):
            raise BadInput(f"`parameters` must be an object, got {describe(parameters)}", param="parameters")
        return _Truncated.parse(parameters)


class Vectors(RootModel[list[list[float]]]):
    """A vector for each text, in order."""


class SparseValue(BaseModel):
    """A token and its weight."""

    index: int
    value: float


class SparseVectors(RootModel[list[list[SparseValue]]]):
    """Token weights for each text, in order."""


class Similarities(RootModel[list[float]]):
    """The cosine to each sentence, in order."""


class TeiInfo(BaseModel):
    """What a model is, in TEI's words."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, dict[str, Any]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
