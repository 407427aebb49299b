"""Settings of the process: the environment variables ``GATEWAY_*``.

What models there are stands in ``models.yaml`` instead. The table in ``docs/configuration.md`` is generated from the
field descriptions.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gateway.config.wording import did_you_mean, explain, quote
from gateway.errors import ConfigError, Problem

ENV_PREFIX: Final = "GATEWAY_"

# Kubernetes sets these in every pod of a namespace that has a Service named `gateway`.
_SERVICE_LINK = re.compile(r"GATEWAY_(SERVICE_(HOST|PORT.*)|PORT_\d+_(TCP|UDP|SCTP).*)")
_LEAST_KEY: Final = 8
PREFIX: Final = re.compile(r"(/[A-Za-z0-9._~-]+)*", re.ASCII)
"""A path that a proxy serves the gateway under; empty for none."""

_ORIGIN = re.compile(r"https?://[^/\s]+")
_SERVICE_LINK_HINT = (
    "; Kubernetes sets it for a Service named `gateway`: rename it, or set `enableServiceLinks: false` in the pod"
)


def _split_keys(value: object) -> object:
    """Split comma-separated keys; the message of a problem must not show one."""
    if not isinstance(value, str):
        return value
    keys = tuple(key.strip() for key in value.split(","))
    if not all(keys):
        raise ValueError("has an empty key before, between or after its commas; leave it unset to turn keys off")
    for number, key in enumerate(keys, start=1):
        if len(key) < _LEAST_KEY:
            raise ValueError(f"key {number} must have {_LEAST_KEY} characters or more, got {len(key)}")
    return keys


def _split_origins(value: object) -> object:
    if not isinstance(value, str):
        return value
    origins = tuple(origin.strip().rstrip("/") for origin in value.split(","))
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"must be origins such as `https://app.example.com`, or `*`, got {quote(origin)}")
    return origins


def _split_networks(value: object) -> object:
    if not isinstance(value, str):
        return value
    networks = tuple(network.strip() for network in value.split(","))
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise ValueError(f"must be addresses or networks such as `10.0.0.0/8`, got {quote(network)}") from None
    return networks


def _check_prefix(prefix: str) -> str:
    prefix = prefix.rstrip("/")
    if not PREFIX.fullmatch(prefix):
        raise ValueError(f"must be a path such as `/embeddings-gateway`, got {quote(prefix)}")
    return prefix


def _check_admin_key(key: SecretStr) -> SecretStr:
    if len(key.get_secret_value()) < _LEAST_KEY:
        raise ValueError(f"must have {_LEAST_KEY} characters or more, got {len(key.get_secret_value())}")
    return key


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Settings(BaseSettings):
    """Settings of one gateway process.

    Made by :func:`load_settings`. The constructor reads no environment, so that a test, or a program that embeds the
    gateway, gets exactly what it passes.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="ignore")

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on; `0.0.0.0` for all.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 for any that is free.")
    models: Path = Field(default=Path("models.yaml"), description="The registry of models.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)] = Field(
        default=(),
        description="Keys that clients may send, comma-separated, of 8 characters or more. Empty: no key is asked for.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of API keys, with the models and the requests and tokens per minute of each; read again within a "
        "second of a change. `gateway key NAME --file FILE` makes a key and adds its entry.",
    )
    requests_per_minute: int = Field(
        default=0,
        ge=0,
        description="Requests a minute of each key that the file says nothing else of, or of each network address where "
        "no keys are asked for; 429 beyond. 0: no limit.",
    )
    tokens_per_minute: int = Field(
        default=0, ge=0, description="Tokens a minute, as `GATEWAY_REQUESTS_PER_MINUTE`; 429 beyond. 0: no limit."
    )
    quota_storage: str = Field(
        default="memory://",
        min_length=1,
        description="Where requests and tokens a minute are counted: `memory://`, or `redis://HOST:PORT/DB` for several "
        "replicas together.",
    )
    admin_key: Annotated[SecretStr, AfterValidator(_check_admin_key)] | None = Field(
        default=None,
        description="Key of the operator, for the paths under `/admin`, and for `/metrics` where API keys are set. "
        "Without it `/admin` answers 403.",
    )
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of `/metrics`, `/admin` and `/health`, so that clients cannot reach them; `/metrics` asks for no "
        "key there. Must differ from `GATEWAY_PORT`. Without it they are on the port of the clients.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_origins)] = Field(
        default=(),
        description="Web pages that may send requests from a browser, by origin, comma-separated: "
        "`https://app.example.com`; `*` for all. Empty: none.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_networks)] = Field(
        default=(),
        description="Addresses or networks of proxies, comma-separated, whose `X-Forwarded-For` is believed, in logs and in "
        "quotas by address: `10.0.0.0/8`. Empty: a client's address is that of its connection.",
    )
    root_path: Annotated[str, AfterValidator(_check_prefix)] = Field(
        default="",
        description="Path under which a proxy serves the gateway, `/ai/embed` say, for the documentation's links and the "
        "OpenAPI document. Requests may come with it or without. By default what `X-Forwarded-Prefix` says.",
    )
    max_header_bytes: int = Field(
        default=64 * 1024, ge=1024, description="The largest headers of a request in bytes; 431 beyond."
    )
    header_timeout_s: float = Field(
        default=10.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request's headers may take to come; the connection is closed then.",
    )
    keep_alive_s: float = Field(
        default=75.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds for which an idle connection is kept. Set it longer than the load balancer in front does (60 s "
        "for most): otherwise the balancer may send a request just as the gateway closes the connection.",
    )
    body_timeout_s: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request's body may take to come; 400 beyond.",
    )
    send_timeout_s: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds in which a client must take something of an answer that waits; the connection is cut then.",
    )
    max_body_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1, description="The largest request body in bytes; 413 beyond."
    )
    memory_budget_bytes: int = Field(
        default=512 * 1024 * 1024,
        ge=64 * 1024 * 1024,
        description="Bytes that all requests together may hold: bodies being received, texts and tokens that wait, answers "
        "not yet read; 503 beyond that. A single request may use half of it; 413 beyond that.",
    )
    max_inputs: int = Field(default=2048, ge=1, description="The most texts in one request; 400 beyond.")
    max_token_vectors: int = Field(
        default=32_768,
        ge=1,
        description="The most tokens in one request that wants a vector of each: multi-vectors, or TEI's `/embed_all`; "
        "400 beyond.",
    )
    max_queue_texts: int = Field(
        default=16_384, ge=1, description="The most texts that wait in the queue of one model; 429 beyond."
    )
    max_queue_tokens: int = Field(
        default=4_000_000, ge=1, description="The most tokens that wait in the queue of one model; 429 beyond."
    )
    request_timeout_s: float = Field(
        default=300.0, gt=0, allow_inf_nan=False, description="Seconds that a request may take; 504 beyond."
    )
    shutdown_grace_s: float = Field(
        default=30.0, ge=0, allow_inf_nan=False, description="Seconds that running requests get to end when stopping."
    )
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which new requests are still answered when stopping, while `/health/ready` says 503: as "
        "long as load balancers take to notice.",
    )
    forward_timeout_s: float = Field(
        default=120.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds after which a batch counts as hung: its callers get 503, and the model is loaded anew.",
    )
    golden_interval_s: float = Field(
        default=3600.0,
        gt=0,
        description="Seconds after which a model that serves is held against its golden vectors again; where they are no "
        "longer right, it is loaded anew.",
    )
    cpu_threads: int = Field(
        default=0, ge=0, description="Threads of a model that runs on the CPU; 0: chosen by the engine."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="info", description="The least severe events that are logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto",
        description="`json`: one object per line. `console`: a short line for people, in color on a terminal unless "
        "`NO_COLOR` is set. `auto`: `console` on a terminal, else `json`.",
    )
    exposure_log: Path | None = Field(
        default=None,
        description="File with a line for the first request of each unit in each arm of an experiment. Units are counted "
        "from it after a restart. Without it none is written.",
    )
    exposure_log_max_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1024, description="Size in bytes at which the exposure log is rotated."
    )
    exposure_log_backups: int = Field(
        default=5, ge=1, description="How many rotated exposure logs are kept; all of them are read at the start."
    )

    @field_validator("admin_port")
    @classmethod
    def _check_admin_port(cls, admin_port: int | None, info: ValidationInfo) -> int | None:
        if admin_port and admin_port == info.data.get("port"):
            raise ValueError(
                f"must differ from the port of the clients ({variable('port')}), got {admin_port} for both; "
                "leave it unset to have the operator's paths on that port"
            )
        return admin_port

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor only."""
        return (init_settings,)


class _GivenEnvironment(EnvSettingsSource):
    """The environment that is passed in, where pydantic-settings reads ``os.environ``."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in self._environ.items() if value}


def variable(field_name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{ENV_PREFIX}{field_name.upper()}"


def load_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read and check the settings.

    Args:
        environ: the environment; an empty variable counts as unset.
        overrides: values by field name that win over the environment, such as command-line options; ``None`` is none.

    Raises:
        ConfigError: a value is wrong or a ``GATEWAY_*`` variable is not known; lists every problem.
        TypeError: an override is not a setting.
    """
    unknown = overrides.keys() - Settings.model_fields.keys()
    if unknown:
        raise TypeError(f"not settings: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in overrides.items() if value is not None}
    problems = _unknown_variables(environ)
    settings = None
    try:
        settings = Settings.model_validate({**_GivenEnvironment(environ)(), **given})
    except ValidationError as error:
        problems += _value_problems(error, overridden=set(given))
    if settings is None or problems:
        raise ConfigError(problems)
    return settings


def _unknown_variables(environ: Mapping[str, str]) -> list[Problem]:
    known = [variable(name) for name in Settings.model_fields]
    problems = []
    for name in environ:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            hint = _SERVICE_LINK_HINT if _SERVICE_LINK.fullmatch(name) else did_you_mean(name, known)
            problems.append(Problem("environment", 0, 0, name, f"is not a setting{hint}"))
    return problems


def _value_problems(error: ValidationError, overridden: set[str]) -> list[Problem]:
    problems = []
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        message = explain(detail, Settings.model_fields)
        if name in overridden:
            problems.append(Problem("command line", 0, 0, f"--{name.replace('_', '-')}", message))
            continue
        if name == "port" and str(detail["input"]).startswith("tcp://"):
            message += _SERVICE_LINK_HINT
        problems.append(Problem("environment", 0, 0, variable(name), message))
    return problems
