"""Where a model runs that does not run in this process: an entry's ``upstream`` in ``models.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from gateway.config.fields import DistinctListed, Frozen, NonEmptyText, Positive
from gateway.config.wording import describe, quote


def _check_url(text: str) -> str:
    wrong = ValueError(f"must be a URL such as `http://gpu:8080` or `http://gpu:8000/v1`, got {quote(text)}")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # a port beyond 65535, brackets that do not close
        raise wrong from None
    if parts.username or parts.password:
        raise ValueError("must not hold a user or a password; use `api_key`")
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise wrong
    if not text.isprintable() or " " in text:
        raise wrong
    return text.rstrip("/")


def _hide(value: object) -> object:
    # In strict mode pydantic takes no text for a secret.
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be text, such as `${{VLLM_API_KEY}}`, got {describe(value) if value else 'nothing'}")
    key = value.strip()  # a secret that was mounted as a file often ends with a line break
    if not key.isascii() or not key.isprintable():
        raise ValueError("must be printable ASCII, as it is sent in a header; it holds another character")
    return SecretStr(key)


def _check_extra(value: object) -> object:
    if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError(f"must be text, a number, `true`, `false` or `null`, got {describe(value)}")
    return value


BaseUrl: TypeAlias = Annotated[str, AfterValidator(_check_url)]
Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_hide)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Extra: TypeAlias = Annotated[str | int | float | bool | None, BeforeValidator(_check_extra)]
"""The value of a further field of each request; ``None``: a field that is left out."""

# The gateway writes these itself.
_OWN_FIELDS = ("model", "input", "inputs")
_ENCODINGS = ("base64", "float", None)
# How vectors are written: by Voyage, by Jina and NVIDIA NIM, by vLLM.
_AS_FLOAT32 = {
    "encoding_format": _ENCODINGS,
    "output_dtype": ("float", None),
    "embedding_type": ("float", "base64", None),
    "embed_dtype": ("float32", None),
    "endianness": ("little", "native", None),
}


class Upstream(Frozen):
    """Servers that run a model, all the same one."""

    urls: DistinctListed[BaseUrl] = Field(
        description="Where the servers are. `backend: openai`: the base that an OpenAI client is given, "
        "`http://gpu:8000/v1`. `backend: tei`: the server's root. Requests go where the fewest texts are on their way."
    )
    model: NonEmptyText | None = Field(
        default=None,
        description="What the servers call the model; by default `source`. TEI serves one and is not told.",
    )
    api_key: Secret | None = Field(
        default=None, description="Sent as bearer token. Keep it out of the file: `${VLLM_API_KEY}`."
    )
    max_batch_texts: Positive | None = Field(
        default=None,
        description="The most texts in one request to a server; larger ones are split. By default what TEI says of itself, "
        "or 256.",
    )
    max_connections: Positive = Field(
        default=32, description="The most requests that are on their way to one server; others wait."
    )
    timeout_s: PositiveSeconds = Field(
        default=60.0,
        description="Seconds that a server may take for one request, within the time that the client's own has.",
    )
    connect_timeout_s: PositiveSeconds = Field(
        default=2.0, description="Seconds that a connection may take to be made."
    )
    max_retries: Annotated[int, Field(ge=0)] = Field(
        default=2,
        description="How often a request that a server did not answer, or was too busy for, is sent again, to another one "
        "where there is one; never what a server refused as wrong.",
    )
    tasks: Mapping[NonEmptyText, NonEmptyText] = Field(
        default_factory=dict,
        description="For each task that the servers know, what they call it. Checked at the start: two names that give the "
        "same vectors are refused. Queries and passages are taken in any case: without a name here, as texts without a "
        "task. For servers without tasks, give the instructions in the model's `prompts` instead.",
    )
    task_field: NonEmptyText | None = Field(
        default=None,
        description="The field in which the servers read the task: `input_type` for Cohere, Voyage and NVIDIA NIM. By "
        "default `task`; with `backend: tei`, `prompt_name`.",
    )
    extra_body: Mapping[NonEmptyText, Extra] = Field(
        default_factory=dict,
        description="Further fields of each request, for those that only some servers have: "
        "`{truncate_prompt_tokens: -1}` lets vLLM cut long texts. `null` leaves a field out that is sent otherwise: "
        "`{encoding_format: null}`.",
    )
    probe_interval_s: PositiveSeconds = Field(
        default=10.0, description="Seconds after which a server that does not work is asked whether it does again."
    )

    @model_validator(mode="after")
    def _check_fields(self) -> Upstream:
        for name in _OWN_FIELDS:
            if name in self.extra_body:
                raise ValueError(f"`extra_body` must not hold `{name}`, which the gateway sends itself")
            if name == self.task_field:
                raise ValueError(f"`task_field` must not be `{name}`, in which the gateway sends something else")
        if self.task_field is not None and not self.tasks:
            raise ValueError("`task_field` needs `tasks`: what the servers call each task")
        for name, allowed in _AS_FLOAT32.items():
            if (given := self.extra_body.get(name)) not in allowed:
                words = " or ".join([", ".join(f"`{one}`" for one in allowed[:-1]), "`null`"])
                raise ValueError(
                    f"`extra_body.{name}` must be {words}, got {describe(given)}: vectors are read as float32"
                )
        return self
