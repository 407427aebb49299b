"""One model of ``models.yaml``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, ValidationInfo, field_validator, model_validator

from gateway.config.cache import CacheConfig
from gateway.config.fields import (
    Device,
    Distinct,
    DistinctListed,
    Enabled,
    FileName,
    Frozen,
    Name,
    NonEmptyText,
    Positive,
    Sha256,
    Source,
    resolve,
)
from gateway.config.replicas import Replicas
from gateway.config.upstream import PositiveSeconds, Upstream
from gateway.config.wording import enumerate_names, quote
from gateway.types import Output

Weight = Annotated[float, Field(gt=0, le=1e6)]
Head = Literal[Output.DENSE, Output.SPARSE, Output.MULTIVECTOR]

_COMMIT = "40 lowercase hex digits such as `d18862d9a48706220815554fac3ebb4dfa46fc28`"


class ModelEntry(Frozen):
    """One model of the registry."""

    id: Name = Field(
        description="Public name of the model, which clients send as `model`. Letters, digits and `._-/`; unique, ignoring "
        "case."
    )
    backend: Literal["infinity", "openai", "tei"] = Field(
        default="infinity",
        description="Engine or API that computes the vectors. `infinity`: an engine in this process. `openai`: other "
        "servers with OpenAI's embeddings API (vLLM, Infinity, Ollama, llama.cpp, Jina, OpenAI, another gateway like "
        "this one). `tei`: Hugging Face's text-embeddings-inference.",
    )
    source: str = Field(
        description="Source of the checkpoint; for an upstream model, its name on the servers. A hub repo `owner/name`, a "
        "folder (starts with `/`, `./`, `../` or `~`; relative to this file), or `package:NAME/sub/folder` in an "
        "installed Python package."
    )
    revision: str | None = Field(
        default=None,
        validate_default=True,
        description="Commit of the hub repo, 40 hex digits. Required for a hub source, so that the weights cannot change "
        "under stored vectors; not allowed for other sources. For an upstream model, information only.",
    )
    sha256: Mapping[FileName, Sha256] = Field(
        default_factory=dict,
        description="Expected SHA-256 of checkpoint files, by file name. Checked on load; a file that differs is not "
        "loaded.",
    )
    license: NonEmptyText | None = Field(
        default=None,
        description="License of the weights, such as `MIT`, shown in `/v1/models`. By default the license on the "
        "hub's model card, which is read before a download.",
    )
    license_accepted: bool = Field(
        default=False,
        description="Accepts a license that forbids commercial use (CC BY-NC, for example). Without it, or `enabled: true`, "
        "such weights are not downloaded. Weights that are on this machine are served in any case.",
    )
    enabled: Enabled = Field(
        default="auto", description="Whether the model is loaded. `auto`: if an accelerator is present."
    )
    required: bool = Field(
        default=False,
        description="Whether the gateway stops if this model fails to load. Otherwise it serves the other models, and "
        "answers 503 for this one.",
    )
    load: Literal["eager", "on_demand"] = Field(
        default="eager",
        description="Time at which the model is loaded. `eager`: at the start, and then kept. `on_demand`: when a request "
        "needs it; it leaves the memory when another model needs the room. At the start, only its description is "
        "read.",
    )
    idle_unload_s: PositiveSeconds | None = Field(
        default=None,
        description="Seconds without requests after which a model with `load: on_demand` leaves the memory. By default it "
        "stays until another model needs the room.",
    )
    device: Device = Field(
        default="auto",
        description="Device of the model: `auto`, `cpu`, `cuda` or `cuda:N`, with the numbers of `nvidia-smi`. "
        "`auto`: every graphics card of compute capability 8.0 or more that has room, or the CPU without one. "
        "`cuda`: the same cards, or older cards, and never the CPU.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Precision of the computation. `auto`: `float16` on CUDA, but for language models, such as Qwen3 and "
        "Gemma, and for GTE, EuroBERT and T5, which overflow it, `bfloat16`, or "
        "`float32` on a card older than compute capability 8.0; `bfloat16` on a CPU that supports it, else `float32`.",
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        default="auto",
        description="Runtime of the forward pass. `auto`: OpenVINO on a CPU, and torch with packed texts on a card, if the "
        "vectors agree with those of padded texts in torch. `torch`: padded texts, everywhere.",
    )
    default_task: NonEmptyText | None = Field(
        default=None,
        description="Task of requests that name none. Use a symmetric one if clients search and store under one name.",
    )
    prompts: Mapping[NonEmptyText, str] = Field(
        default_factory=dict,
        description="Instruction put in front of the text, by task. Overrides the checkpoint's own instructions.",
    )
    instruction: NonEmptyText | None = Field(
        default=None,
        description="Instruction of an LLM that reranks, such as Qwen3-Reranker; by default its own. For a model that was "
        "trained from Qwen3-Reranker, it also says that the model reads pairs by that template.",
    )
    dimensions: Distinct[Positive] = Field(
        default=(),
        description="Sizes that clients may request with `dimensions`. The native width is always allowed; list smaller "
        "ones only for a model that was trained for them.",
    )
    max_tokens: Positive | None = Field(
        default=None,
        description="Maximum length of a text in tokens, special tokens included; longer texts are truncated. By default "
        "the checkpoint's own limit.",
    )
    max_batch_tokens: Positive | None = Field(
        default=None,
        description="Maximum number of tokens in a forward pass; bounds the memory. By default the engine's own limit.",
    )
    fp16_accumulation: bool = Field(
        default=False,
        description="Whether float16 matrix products accumulate in float16, except the longest sums, those of the "
        "feed-forward's second product: faster on GeForce cards, no gain on others, and less exact. Needs `golden`; refused "
        "if the golden vectors leave their tolerance. While a model without it computes, this one is also exact, and "
        "slower: set it for all float16 models or for none.",
    )
    merge_adapters: bool | None = Field(
        default=None,
        description="Whether a card holds a copy of the weights for each task, with the task's adapter merged into it: "
        "faster, and 2.9 GB more for Jina v3. By default if a quarter of the card's free memory is enough for that.",
    )
    golden: NonEmptyText | None = Field(
        default=None,
        description="File with the model's golden vectors, relative to this file; they are checked at every start. `gateway "
        "verify MODEL --record` writes it. For an upstream model, it verifies from one start to the next that the "
        "servers still run the same model.",
    )
    ranges: NonEmptyText | None = Field(
        default=None,
        description="File with the range of each dimension of the model's vectors, relative to this file, for `int8` and "
        "`uint8` vectors. `gateway calibrate MODEL --texts FILE` writes it. The ranges are part of the space of those "
        "vectors: with others, stored vectors can no longer be compared with new ones.",
    )
    outputs: DistinctListed[Head] = Field(
        default=(Output.DENSE,),
        description="Outputs that the model can return for a text. A model without dense vectors returns its own by "
        "default; `[sparse]` also says that a masked language model without `modules.json` is a SPLADE model.",
    )
    rerank: Mapping[Head, Weight] = Field(
        default_factory=dict,
        description="For a model that embeds: the outputs by which it answers `/v1/rerank`, with their weights, such as "
        "`{dense: 0.4, sparse: 0.2, multivector: 0.4}`. By default all of `outputs`, equally, if they are more than "
        "`dense`.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Whether Python code in the checkpoint may run. Only for a source that you have read.",
    )
    upstream: Upstream | None = Field(
        default=None, description="Servers that run the model, with `backend: openai` or `tei`."
    )
    replicas: Replicas | None = Field(
        default=None,
        description="Number of processes that run the model on a Ray cluster. Without `GATEWAY_CLUSTER`, ignored.",
    )
    same_space_as: Name | None = Field(
        default=None,
        description="Id of another model with the same weights; each may then be a fallback of the other. "
        "Checked: the vectors of both must agree, or this model is not served. For `backend: openai` and "
        "`tei`.",
    )
    cache: CacheConfig | None = Field(
        default=None,
        description="Keeps vectors for the next request with the same text, such as `{max_bytes: 1GiB}`. For models that "
        "embed. `disk` and `redis` need `golden` if the model is on other servers. By default no vectors are kept.",
    )
    _written_source: str | None = PrivateAttr(None)
    allow_space_change: bool = Field(
        default=False,
        description="Whether a reload may change the space of this id's vectors. Only if nothing is stored in the old "
        "space.",
    )

    @property
    def written_source(self) -> str:
        """``source`` as written in the file: a relative folder means the same on other machines."""
        return self._written_source or self.source

    @model_validator(mode="wrap")
    @classmethod
    def _keep_written_source(cls, value: object, read: ModelWrapValidatorHandler[Self]) -> Self:
        entry = read(value)
        if isinstance(value, Mapping) and isinstance(written := value.get("source"), str):
            entry._written_source = written
        return entry

    @property
    def parsed_source(self) -> Source:
        """``source``, parsed."""
        return Source.parse(self.source)

    @property
    def accepts_license(self) -> bool:
        """Whether weights may be downloaded even if their license forbids commercial use."""
        return self.license_accepted or self.enabled is True

    @property
    def is_pinned(self) -> bool:
        """Whether other weights behind the same name are noticed, also after a restart."""
        return not self.is_remote or self.golden is not None

    def loads_like(self, other: ModelEntry) -> bool:
        """Return whether a model that was loaded for this entry can serve another entry."""
        unloaded = {"cache", "required", "allow_space_change", "license", "license_accepted"}
        return self.model_dump(exclude=unloaded) == other.model_dump(exclude=unloaded)

    @field_validator("golden", "ranges")
    @classmethod
    def _resolve_file(cls, text: str | None, info: ValidationInfo) -> str | None:
        return None if text is None else resolve(text, info)

    @property
    def is_remote(self) -> bool:
        """Whether the model runs on upstream servers."""
        return self.upstream is not None

    @property
    def is_on_demand(self) -> bool:
        """Whether the model is loaded only when a request needs it."""
        return self.load == "on_demand"

    @model_validator(mode="after")
    def _check_backend(self) -> ModelEntry:
        if problems := [*_backend_problems(self), *_load_problems(self)]:
            raise ValueError(problems[0])
        return self

    @field_validator("source")
    @classmethod
    def _resolve_source(cls, text: str, info: ValidationInfo) -> str:
        if info.data.get("backend", "infinity") != "infinity":
            if not text:
                raise ValueError("must be the model's name on the servers, got nothing")
            return text
        source = Source.parse(text)
        if source.kind != "folder":
            return text
        return resolve(text, info, "folder")

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, revision: str | None, info: ValidationInfo) -> str | None:
        if "source" not in info.data:
            return revision  # `source` has its own problem, and this check depends on it
        source: str = info.data["source"]
        if info.data.get("backend", "infinity") != "infinity":
            if revision is None or re.fullmatch(r"[0-9a-f]{40}", revision):
                return revision
            raise ValueError(f"must be a commit, {_COMMIT}, got {quote(revision)}")
        if Source.parse(source).kind != "hub":
            if revision is not None:
                raise ValueError(
                    f"is only for hub repos, but {quote(source)} is not one; remove it, or pin with `sha256`"
                )
        elif revision is None:
            raise ValueError(
                f"is missing: {quote(source)} must be pinned to a commit, {_COMMIT}; otherwise the weights could "
                "change under the stored vectors"
            )
        elif not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(
                f"must be a commit, {_COMMIT}, got {quote(revision)}; branches and tags move, and vectors of other "
                "weights cannot be compared with the stored ones"
            )
        return revision


# Fields that control how a model is computed, which the servers decide for an upstream model.
_ENGINE_FIELDS = (
    "sha256",
    "license_accepted",
    "device",
    "dtype",
    "runtime",
    "load",
    "instruction",
    "rerank",
    "max_batch_tokens",
    "fp16_accumulation",
    "merge_adapters",
    "trust_remote_code",
    "replicas",
)


def _backend_problems(entry: ModelEntry) -> Iterator[str]:
    """Yield the problems of fields that do not fit the backend."""
    if entry.backend == "infinity":
        if entry.upstream is not None:
            yield "`upstream` is for models on other servers: set `backend: openai` or `backend: tei` as well"
        if entry.same_space_as is not None:
            yield "`same_space_as` is for models on other servers; the space of this model follows from its checkpoint"
        return
    if entry.upstream is None:
        yield f"`backend: {entry.backend}` needs `upstream` with the `urls` of the servers"
    if engine_fields := [name for name in _ENGINE_FIELDS if name in entry.model_fields_set]:
        yield f"{enumerate_names(engine_fields)} cannot be set here for `backend: {entry.backend}`: the servers decide that"
    if entry.outputs != (Output.DENSE,):
        yield f"`outputs` must be `[dense]` for `backend: {entry.backend}`"
    if entry.upstream is not None and entry.prompts and entry.upstream.tasks:
        yield "`prompts` are added to texts here and `upstream.tasks` are applied by the servers: set only one of them"


def _load_problems(entry: ModelEntry) -> Iterator[str]:
    """Yield the problems of fields that do not fit the time of loading."""
    if entry.is_on_demand and entry.required:
        yield "`required` is for models that are loaded at the start: remove it, or `load: on_demand`"
    if entry.idle_unload_s is not None and not entry.is_on_demand:
        yield "`idle_unload_s` needs `load: on_demand`: a model that is loaded at the start stays loaded"
