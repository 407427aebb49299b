"""Wire types of the OpenAI dialect. OpenAPI is generated from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, RootModel, WithJsonSchema

from gateway.api.json_body import (
    DIRECTION,
    IN_ANY_CASE,
    MAX_USER_CHARS,
    TRUNCATION,
    Direction,
    Flag,
    Json,
    ModelName,
    Name,
    PositiveInteger,
    RequestBody,
    Truncation,
    User,
    resolve_synonyms,
    wanted_truncation,
)
from gateway.api.wire import AnswerBody, Usage
from gateway.precision import Precision
from gateway.tasks import canonical_task
from gateway.types import Output, Truncate
from gateway.vectors import Encoding

_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 100_276}, "minItems": 1}
_INPUT_SCHEMA = {
    "description": "The text to embed, or a list of up to 2,048 (configurable). Token ids (a list of integers, or such "
    "lists) are read as cl100k_base, as LangChain sends them.",
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
                    _TOKEN_IDS,
                ]
            },
        },
        _TOKEN_IDS,
    ],
}

_ENCODING = "`float`, `base64`, `int8`, `uint8`, `binary` or `ubinary`"
EncodingName = Annotated[Literal["float", "base64", "int8", "uint8", "binary", "ubinary"], IN_ANY_CASE]
OutputName = Annotated[Literal["dense", "sparse", "multivector"], IN_ANY_CASE]
OutputNames = Annotated[list[OutputName], Field(min_length=1, max_length=16, fail_fast=True)]


def _listed(value: Json) -> Json:
    """Read a single name as a list of one."""
    return [value] if isinstance(value, str) else value


class EmbeddingsBody(RequestBody):
    """A request for embeddings. Unknown fields are ignored, and `null` means absent."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    model: ModelName | None = Field(
        None, description="Model id, alias, the source's own name, or `id:task`.", title="a string"
    )
    dimensions: PositiveInteger | None = Field(
        None, description="Size of the vectors, from the model's list.", title="a positive integer"
    )
    output_dimension: PositiveInteger | None = Field(
        None, description="Same as `dimensions`.", title="a positive integer"
    )
    encoding_format: EncodingName | None = Field(
        None,
        description="Type and encoding of the numbers; `float` by default. `base64` and one of `int8`, "
        "`uint8`, `binary`, `ubinary`, in two of these fields, means base64 of those numbers' bytes.",
        title=_ENCODING,
    )
    embedding_type: EncodingName | None = Field(None, description="Same as `encoding_format`.", title=_ENCODING)
    encoding_type: EncodingName | None = Field(None, description="Same as `encoding_format`.", title=_ENCODING)
    output_dtype: EncodingName | None = Field(None, description="Same as `encoding_format`.", title=_ENCODING)
    task: Name | None = Field(
        None,
        description="The purpose of the vectors, such as `retrieval.query`; ignored by models without tasks.",
        title="a string",
    )
    input_type: Name | None = Field(None, description="Same as `task`.", title="a string")
    prompt_name: Name | None = Field(None, description="Same as `task`.", title="a string")
    task_type: Name | None = Field(None, description="Same as `task`; Google's name.", title="a string")
    normalized: Flag | None = Field(
        None, description="Whether vectors have L2 norm 1; the default is the model's.", title="true or false"
    )
    normalize: Flag | None = Field(None, description="Same as `normalized`.", title="true or false")
    truncate: Truncation = Field(
        None,
        description="Handling of texts that are too long: keep the start (`true`, `END`, `right`; the default), keep "
        "the end (`START`, `left`), or answer 400 (`false`, `NONE`).",
        title=TRUNCATION,
    )
    truncation: Truncation = Field(None, description="Same as `truncate`; Voyage's name.", title=TRUNCATION)
    truncation_direction: Direction = Field(
        None,
        description="Side at which texts that are too long are cut: their end (`right`, the default) or their start.",
        title=DIRECTION,
    )
    late_chunking: Flag | None = Field(
        None, description="Embed the inputs as chunks of one document.", title="true or false"
    )
    outputs: Annotated[OutputNames, BeforeValidator(_listed)] | None = Field(
        None,
        description="Outputs to return for each text; `dense` by default.",
        title="a list of `dense`, `sparse`, `multivector`",
    )
    user: User = Field(
        None,
        description="The end user: the unit of an experiment that is split by it, otherwise ignored.",
        title=f"of at most {MAX_USER_CHARS} characters",
    )

    @property
    def wanted_dimensions(self) -> int | None:
        return resolve_synonyms(dimensions=self.dimensions, output_dimension=self.output_dimension)

    @property
    def wanted_encoding(self) -> Encoding:
        return Encoding.BASE64 if "base64" in self._formats.values() else Encoding.LIST

    @property
    def wanted_precision(self) -> Precision:
        """The kind of numbers. If one field has a quantized kind, `base64` in another field only says how it is written."""
        formats = self._formats
        if not {"float", "base64"}.issuperset(name for name in formats.values() if name):
            formats = {field: name for field, name in formats.items() if name != "base64"}
        name = resolve_synonyms(**formats)
        return Precision.FLOAT if name in ("base64", None) else Precision(name)

    @property
    def _formats(self) -> dict[str, str | None]:
        return {
            "encoding_format": self.encoding_format,
            "embedding_type": self.embedding_type,
            "encoding_type": self.encoding_type,
            "output_dtype": self.output_dtype,
        }

    @property
    def wanted_task(self) -> str | None:
        fields = {
            "task": self.task,
            "input_type": self.input_type,
            "prompt_name": self.prompt_name,
            "task_type": self.task_type,
        }
        written = {field: name for field, name in fields.items() if name}  # "" means absent
        if len({canonical_task(name.lower()) for name in written.values()}) == 1:
            return next(iter(written.values()))
        return resolve_synonyms(**written)

    @property
    def wants_normalized(self) -> bool | None:
        return resolve_synonyms(normalized=self.normalized, normalize=self.normalize)

    @property
    def wanted_truncation(self) -> Truncate:
        values = {"truncate": self.truncate, "truncation": self.truncation}
        name = resolve_synonyms(**{field: value and value.value for field, value in values.items()})
        return wanted_truncation(Truncate(name) if name else None, self.truncation_direction)

    @property
    def wanted_outputs(self) -> tuple[Output, ...]:
        return tuple(Output(name) for name in self.outputs or ("dense",))


class SparseEmbedding(BaseModel):
    """Weights of the tokens of one text; all others are 0."""

    indices: list[int] = Field(description="The model's token ids, ascending.")
    values: list[float]


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int = Field(description="Place of the text in the input.")
    embedding: list[float] | str | None = Field(
        None,
        description="A list of numbers, or base64 of their bytes: little-endian float32, or single bytes of a quantized "
        "vector. Left out when `outputs` is without `dense`.",
    )
    sparse: SparseEmbedding | None = Field(None, description="When `outputs` has `sparse`.")
    multivector: list[list[float]] | None = Field(
        None, description="One vector per token, when `outputs` has `multivector`."
    )


class EmbeddingsAnswer(BaseModel):
    """Vectors in input order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str = Field(description="The requested name; for an alias, the model that answered.")
    usage: Usage


class ReplicaCard(AnswerBody):
    """A server, or a process of a cluster, that runs a model together with others."""

    name: str = Field(description="Name in the metrics; for a server, its address and port.")
    state: Literal["disabled", "unloaded", "downloading", "loading", "ready", "recovering", "failed", "stopped"]
    reason: str | None = Field(default=None, description="Reason why it gets no requests.")
    node: str | None = Field(default=None, description="Its machine, if known.")
    device: str | None = Field(default=None, description="Its graphics card, if known.")


class ModelCard(AnswerBody):
    """The properties of a model. Sizes and tasks are known once its checkpoint has been read."""

    id: str
    object: Literal["model"] = "model"
    kind: Literal["embed", "rerank", "classify", "experiment"] | None = Field(
        default=None,
        description="Kind of results: embeddings, or scores of pairs or labels. An experiment returns those of its arms.",
    )
    created: int = Field(description="Unix time at which the model became ready; 0 before.")
    owned_by: str
    stats: dict[str, float] = Field(default_factory=dict, description="Always empty; clients of Infinity ask for it.")
    source: str | None = Field(default=None, description="Source of the weights; `null` for an experiment.")
    revision: str | None = None
    state: Literal["disabled", "unloaded", "downloading", "loading", "ready", "recovering", "failed", "stopped"]
    reason: str | None = Field(
        default=None, description="Reason why the model is not ready, or the progress of its download."
    )
    license: str | None = Field(default=None, description="License of the weights, as `models.yaml` states it.")
    aliases: list[str] = Field(default_factory=list, description="Other names of the model that a request may send.")
    width: int | None = Field(
        default=None, description="Native dimensions of a dense vector; `null` for a model without dense vectors."
    )
    dimensions: list[int] = Field(default_factory=list, description="Accepted values of `dimensions`.")
    max_tokens: int | None = None
    max_model_len: int | None = Field(default=None, description="Same as `max_tokens`; vLLM's name, which mteb reads.")
    tasks: list[str] = Field(default_factory=list)
    default_task: str | None = None
    outputs: list[str] = Field(default_factory=list)
    rerank: dict[str, float] = Field(
        default_factory=dict,
        description="For a model that embeds: the outputs that `/v1/rerank` scores documents by, and their weights.",
    )
    normalized: bool | None = Field(default=None, description="Whether vectors have L2 norm 1 by default.")
    labels: list[str] = Field(default_factory=list, description="The labels of a model that classifies.")
    label_function: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None,
        description="Function from its numbers to scores: `softmax` if one label applies, `sigmoid` if several may apply.",
    )
    space: str | None = Field(
        default=None,
        description="Space of vectors with the default task and native dimensions; `null` for an experiment between spaces.",
    )
    spaces: dict[str, str] = Field(default_factory=dict, description="Space of each task, with native dimensions.")
    device: str | None = None
    dtype: str | None = None
    cache: bool = Field(
        default=False,
        description="Whether vectors are kept for the next request with the same text; see `x-gateway-cache`.",
    )
    notes: list[str] = Field(
        default_factory=list,
        description="Remarks on the device, such as a graphics card that is not used, with the reason.",
    )
    replicas: list[ReplicaCard] = Field(
        default_factory=list, description="The servers or processes of a model that runs elsewhere."
    )


class ArmModelCard(AnswerBody):
    """One arm of an experiment: the model that answers its requests."""

    arm: str
    model: str
    task: str | None = Field(description="Task of a request that names none.")
    weight: float
    state: str
    width: int | None = None
    max_tokens: int | None = None
    space: str | None = Field(default=None, description="Space of the arm's vectors with native dimensions.")


class ExperimentModelCard(ModelCard):
    """An experiment under the name that requests send as `model`. It has only properties that all its arms share."""

    kind: Literal["experiment"] = "experiment"
    experiment: Literal["same_space", "cross_space"] = Field(description="Whether its arms share a space.")
    arms: list[ArmModelCard] = Field(description="The models that answer; the first is the control.")


class AnyModelCard(RootModel[ExperimentModelCard | ModelCard]):
    """A model, or an experiment."""


class ModelList(AnswerBody):
    """Every model and experiment that the key may use; those that are ready come first."""

    object: Literal["list"] = "list"
    data: list[ExperimentModelCard | ModelCard]
