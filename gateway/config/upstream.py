"""Where a model runs that does not run in this process: an entry's ``upstream`` in ``models.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from gateway.config.fields import DistinctListed, NonEmptyText, Positive
from gateway.config.wording import describe, quote


def _check_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"must be a URL such as `http://gpu:8080` or `http://gpu:8000/v1`, got {quote(text)}")
    if parts.username or parts.password:
        raise ValueError("must not hold a user or a password; use `api_key`")
    return text.rstrip("/")


def _hide(value: object) -> object:
    # In strict mode pydantic takes no text for a secret.
    if not isinstance(value, str) or not value:
        raise ValueError(f"must be text, such as `${{VLLM_API_KEY}}`, got {describe(value) if value else 'nothing'}")
    return SecretStr(value)


BaseUrl: TypeAlias = Annotated[str, AfterValidator(_check_url)]
Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_hide)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Upstream(BaseModel):
    """Servers that run a model, all the same one."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

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
        description="For each task that the servers know, what they call it. It is sent as `task` (TEI: `prompt_name`). For "
        "servers without tasks, give the instructions in the model's `prompts` instead.",
    )
    extra_body: Mapping[NonEmptyText, str | int | float | bool] = Field(
        default_factory=dict,
        description="Further fields of each request, for what a server has of its own: "
        "`{truncate_prompt_tokens: -1}` lets vLLM cut long texts.",
    )
    probe_interval_s: PositiveSeconds = Field(
        default=10.0, description="Seconds after which a server that does not work is asked whether it does again."
    )
