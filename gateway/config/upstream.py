"""The servers of a model that does not run in this process: an entry's ``upstream`` in ``models.yaml``."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Annotated, Final, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from gateway.config.fields import DistinctListed, Frozen, NonEmptyText, Positive
from gateway.config.wording import describe, quote

DNS: Final = "dns+"
"""The prefix of a URL whose name is looked up repeatedly; each of its addresses is a server."""


def _check_url(text: str) -> str:
    wrong = ValueError(f"must be a URL such as `http://gpu:8080` or `http://gpu:8000/v1`, got {quote(text)}")
    try:
        parts = urlsplit(text.removeprefix(DNS))
        port = parts.port
    except ValueError:  # a port above 65535, or an unclosed bracket
        raise wrong from None
    if parts.username or parts.password:
        raise ValueError("must not contain a user name or password; use `api_key`")
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise wrong
    if not text.isprintable() or " " in text:
        raise wrong
    if text.startswith(DNS) and _is_address(parts.hostname):
        raise ValueError(f"`dns+` is for a name with several addresses, got {quote(text)}: leave `dns+` out")
    return text.rstrip("/")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _hide(value: object) -> object:
    # In strict mode, pydantic does not accept text for a secret.
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be text, such as `${{VLLM_API_KEY}}`, got {describe(value) if value else 'nothing'}")
    key = value.strip()  # a secret mounted as a file often ends with a line break
    if not key.isascii() or not key.isprintable():
        raise ValueError("must be printable ASCII, as it is sent in a header; it has another character")
    return SecretStr(key)


def _check_extra(value: object) -> object:
    if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not isfinite(value)):
        raise ValueError(f"must be text, a number, `true`, `false` or `null`, got {describe(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError(f"must be a number of at most 64 bits, got {describe(value)}")
    return value


BaseUrl: TypeAlias = Annotated[str, AfterValidator(_check_url)]
Secret: TypeAlias = Annotated[SecretStr, BeforeValidator(_hide)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Extra: TypeAlias = Annotated[str | int | float | bool | None, BeforeValidator(_check_extra)]
"""The value of an extra field of each request; ``None`` omits the field."""

# The gateway writes these itself.
_OWN_FIELDS = ("model", "input", "inputs")
_ENCODINGS = ("base64", "float", None)
# The fields of Voyage, Jina, NVIDIA NIM and vLLM that select the format of vectors.
_AS_FLOAT32 = {
    "encoding_format": _ENCODINGS,
    "output_dtype": ("float", None),
    "embedding_type": ("float", "base64", None),
    "embed_dtype": ("float32", None),
    "endianness": ("little", "native", None),
}


class Upstream(Frozen):
    """Servers that all run the same model."""

    urls: DistinctListed[BaseUrl] = Field(
        description="URLs of the servers. `backend: openai`: the base URL for an OpenAI client, `http://gpu:8000/v1`. "
        "`backend: tei`: the server's root. A request goes to the server with the fewest texts in flight. "
        "`dns+http://NAME:PORT/…` or `dns+https://…`: each address of the name is a server, such as the pods of a headless "
        "Service in Kubernetes."
    )
    model: NonEmptyText | None = Field(
        default=None,
        description="Name of the model on the servers; by default `source`. Not sent to TEI, which serves one model.",
    )
    api_key: Secret | None = Field(
        default=None, description="Key, sent as a bearer token. Keep it out of the file: `${VLLM_API_KEY}`."
    )
    max_batch_texts: Positive | None = Field(
        default=None,
        description="Maximum number of texts per request to a server; larger requests are split. By default the limit that "
        "TEI reports, or 256.",
    )
    max_connections: Positive = Field(
        default=32, description="Maximum number of concurrent requests to one server; others wait."
    )
    timeout_s: PositiveSeconds = Field(
        default=60.0,
        description="Seconds that a server may take for one request, within the client's own timeout.",
    )
    connect_timeout_s: PositiveSeconds = Field(default=2.0, description="Seconds for establishing a connection.")
    max_retries: Annotated[int, Field(ge=0)] = Field(
        default=2,
        description="Number of retries of a request if a server did not respond or was too busy, on another server if "
        "possible. A request that a server rejected as wrong is never retried.",
    )
    tasks: Mapping[NonEmptyText, NonEmptyText] = Field(
        default_factory=dict,
        description="Tasks that the servers know, with the servers' name for each. Checked at the start: two names that "
        "give the same vectors are refused. Queries and passages are always accepted: without a name here, as "
        "texts without a task. For servers without tasks, put the instructions into the model's `prompts` "
        "instead.",
    )
    task_field: NonEmptyText | None = Field(
        default=None,
        description="Field in which the servers read the task: `input_type` for Cohere, Voyage and NVIDIA NIM. By default "
        "`task`; with `backend: tei`, `prompt_name`.",
    )
    extra_body: Mapping[NonEmptyText, Extra] = Field(
        default_factory=dict,
        description="Extra fields of each request, for those that only some servers support: `{truncate_prompt_tokens: -1}` "
        "makes vLLM truncate long texts. `null` omits a field that is sent otherwise: `{encoding_format: null}`.",
    )
    resolve_interval_s: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] = Field(
        default=5.0, description="Seconds between look-ups of the names in `dns+http://` URLs."
    )
    probe_interval_s: PositiveSeconds = Field(
        default=10.0, description="Seconds between probes of a server that does not work."
    )

    @model_validator(mode="after")
    def _check_fields(self) -> Upstream:
        for name in _OWN_FIELDS:
            if name in self.extra_body:
                raise ValueError(f"`extra_body` must not contain `{name}`, which the gateway sends itself")
            if name == self.task_field:
                raise ValueError(f"`task_field` must not be `{name}`, which the gateway uses for something else")
        if self.task_field is not None and not self.tasks:
            raise ValueError("`task_field` needs `tasks`: the servers' name for each task")
        for name, allowed in _AS_FLOAT32.items():
            if (given := self.extra_body.get(name)) not in allowed:
                words = " or ".join([", ".join(f"`{value}`" for value in allowed[:-1]), "`null`"])
                raise ValueError(
                    f"`extra_body.{name}` must be {words}, got {describe(given)}: vectors are read as float32"
                )
        return self


def server_names(urls: Sequence[str]) -> list[str]:
    """Return a name for each server: host and port, with the path where several share those."""
    hosts = [urlsplit(url).netloc for url in urls]
    return [
        host if hosts.count(host) == 1 else host + urlsplit(url).path for host, url in zip(hosts, urls, strict=True)
    ]
