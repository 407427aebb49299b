"""Settings of the process: the environment variables ``GATEWAY_*``.

The models are configured in ``models.yaml`` instead. The table in ``docs/configuration.md`` is generated from the field
descriptions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gateway.config.files import user_folder
from gateway.config.hub import hub_problems
from gateway.config.setting_values import (
    check_admin_key,
    check_cluster,
    check_prefix,
    lower,
    lower_off,
    split_keys,
    split_networks,
    split_origins,
)
from gateway.config.wording import did_you_mean, explain, quote
from gateway.errors import ConfigError, Problem, StartError

ENV_PREFIX: Final = "GATEWAY_"

# Kubernetes sets these variables in every pod of a namespace that has a Service named `gateway`.
_SERVICE_LINK = re.compile(r"GATEWAY_(SERVICE_(HOST|PORT.*)|PORT_\d+_(TCP|UDP|SCTP).*)")
_SERVICE_LINK_HINT = (
    "; Kubernetes sets it for a Service named `gateway`: rename it, or set `enableServiceLinks: false` in the pod"
)


class Settings(BaseSettings):
    """Settings of one gateway process.

    Created by :func:`load_settings`. The constructor does not read the environment, so a test, or a program that embeds the
    gateway, gets exactly the values that it passes.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", allow_inf_nan=False
    )

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on; `0.0.0.0` for all interfaces."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    models: Path = Field(default=Path("models.yaml"), description="Path of the model registry.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_keys)] = Field(
        default=(),
        description="API keys that clients may send, comma-separated, at least 8 characters each. Empty: no key is "
        "required.",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of API keys, each with its models and its requests and tokens per minute; reloaded within a "
        "second of a change. `gateway key NAME --file FILE` creates a key and adds its entry.",
    )
    requests_per_minute: int = Field(
        default=0,
        ge=0,
        description="Requests per minute for each key without a limit in the file, or for each network address if no keys "
        "are required; 429 beyond. 0: no limit.",
    )
    tokens_per_minute: int = Field(
        default=0,
        ge=0,
        description="Tokens per minute, for the same keys and addresses as `GATEWAY_REQUESTS_PER_MINUTE`; 429 beyond. 0: no "
        "limit.",
    )
    quota_storage: str = Field(
        default="memory://",
        min_length=1,
        description="Storage for the counts of requests and tokens per minute: `memory://`, or "
        "`redis://HOST:PORT/DB` for replicas that count together.",
    )
    admin_key: Annotated[SecretStr, AfterValidator(check_admin_key)] | None = Field(
        default=None,
        description="The operator's key for the paths under `/admin`, and for `/metrics` if API keys are set. Without it, "
        "`/admin` answers 403.",
    )
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Separate port for `/metrics`, `/admin` and `/health`, so that clients cannot reach them; `/metrics` "
        "needs no key there. Must differ from `GATEWAY_PORT`. Without it, these paths are on the clients' port.",
    )
    console: Annotated[Literal["off", "admin", "public"], BeforeValidator(lower)] = Field(
        default="admin",
        description="Pages for people, at `/console`. `admin`: for the operator, on `GATEWAY_ADMIN_PORT` if that is set, "
        "else on the clients' port; they ask for `GATEWAY_ADMIN_KEY` if any key is set. `public`: for all clients, on "
        "their port, with the rights of their keys. `off`: no pages.",
    )
    runs_dir: Path | None = Field(
        default=None,
        description="Folder with the results of `gateway compare --out FOLDER/NAME`, which the console shows to the "
        "operator. Comparisons that are started in the console, and duels, are written there as well; `FOLDER/data` holds "
        "the data sets.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_origins)] = Field(
        default=(),
        description="Origins of web pages that may send requests from a browser, comma-separated: "
        "`https://app.example.com`; `*` for all. Empty: none.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_networks)] = Field(
        default=(),
        description="Addresses or networks of proxies whose `X-Forwarded-For` is trusted, in logs and in quotas by address, "
        "comma-separated: `10.0.0.0/8`. Empty: a client's address is the address of its connection.",
    )
    root_path: Annotated[str, AfterValidator(check_prefix)] = Field(
        default="",
        description="Path under which a proxy serves the gateway, such as `/ai/embed`, for the links in the documentation "
        "and the OpenAPI document. Requests may include it or not. By default taken from "
        "`X-Forwarded-Prefix`.",
    )
    max_header_bytes: int = Field(
        default=64 * 1024, ge=1024, description="Maximum size of a request's headers in bytes; 431 beyond."
    )
    header_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds in which a request's headers must arrive; then the connection is closed.",
    )
    keep_alive_s: float = Field(
        default=75.0,
        gt=0,
        description="Seconds that an idle connection is kept open. Set it higher than the idle timeout of the load "
        "balancer in front (60 s for most): otherwise the balancer may send a request just as the gateway closes "
        "the connection.",
    )
    body_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds in which a request's body must arrive; 400 beyond.",
    )
    send_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds a client may go without reading any of a pending response; then the connection is closed.",
    )
    max_body_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1, description="Maximum size of a request body in bytes; 413 beyond."
    )
    memory_budget_bytes: int = Field(
        default=512 * 1024 * 1024,
        ge=64 * 1024 * 1024,
        description="Bytes that all requests together may hold: bodies being received, waiting texts and tokens, unread "
        "responses; 503 beyond. A single request may use half of it; 413 beyond that.",
    )
    max_inputs: int = Field(default=2048, ge=1, description="Maximum number of texts per request; 400 beyond.")
    max_token_vectors: int = Field(
        default=32_768,
        ge=1,
        description="Maximum number of tokens in a request for one vector per token (multi-vectors, or TEI's `/embed_all`); "
        "400 beyond.",
    )
    max_queue_texts: int = Field(
        default=16_384, ge=1, description="Maximum number of texts in the queue of a model; 429 beyond."
    )
    max_queue_tokens: int = Field(
        default=4_000_000, ge=1, description="Maximum number of tokens in the queue of a model; 429 beyond."
    )
    request_timeout_s: float = Field(default=300.0, gt=0, description="Seconds that a request may take; 504 beyond.")
    shutdown_grace_s: float = Field(
        default=30.0, ge=0, description="Seconds that running requests get to finish on shutdown."
    )
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds that new requests are still accepted on shutdown, while `/health/ready` answers 503: as "
        "long as load balancers need to notice.",
    )
    forward_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds after which a batch counts as hung: its requests get 503, and the model is reloaded. On a CPU, "
        "a long text gets three times the seconds that it should take at the model's speed, if that is more.",
    )
    golden_interval_s: float = Field(
        default=3600.0,
        gt=0,
        description="Seconds between checks of a serving model against its golden vectors; a model that fails the check is "
        "reloaded.",
    )
    cluster: Annotated[str, AfterValidator(check_cluster)] | None = Field(
        default=None,
        description="Run the models as replicas on a Ray cluster, one process and one card each. `local`: a cluster that "
        "starts and ends with this process, for several cards in one machine. `auto`: the cluster that this machine is part "
        "of. `HOST:PORT`: the one with this head. Needs the extra `cluster`. By default models run in this process.",
    )
    cpu_threads: int = Field(
        default=0, ge=0, le=4096, description="Number of threads for models on the CPU; 0: chosen by the engine."
    )
    cache_dir: Annotated[Literal["off"] | Path | None, BeforeValidator(lower_off)] = Field(
        default=None,
        description="Folder for compiled copies of the models on the CPU, with their tokenizers, which make later starts "
        "faster: as large as the weights in float32. `off`: no copies are kept. By default `embedding-gateway/compiled` in "
        "`$XDG_CACHE_HOME` or `~/.cache`.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = Field(
        default="info", description="Minimum severity of the events that are logged."
    )
    log_format: Annotated[Literal["auto", "json", "console"], BeforeValidator(lower)] = Field(
        default="auto",
        description="`json`: one object per line. `console`: a short line for people, in color on a terminal unless "
        "`NO_COLOR` is set. `auto`: `console` on a terminal, else `json`.",
    )
    exposure_log: Path | None = Field(
        default=None,
        description="File that gets a line for the first request of each unit in each arm of an experiment. After a "
        "restart, units are counted from it. By default no log is written.",
    )
    exposure_log_max_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1024, description="Size in bytes at which the exposure log is rotated."
    )
    exposure_log_backups: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Number of rotated exposure logs to keep; all of them are read at the start.",
    )

    state_dir: Path | None = Field(
        default=None,
        description="Folder on a local disk for `experiments.sqlite3`, the units, requests and outcomes of experiments. "
        "Replicas on one machine may share it. By default none are kept.",
    )
    state_max_bytes: int = Field(
        default=2 * 1024**3,
        ge=1024**2,
        description="Maximum size of that file in bytes, about 200 per outcome; beyond it, outcomes are refused.",
    )
    batch_dir: Path | None = Field(
        default=None,
        description="Folder on a local disk for OpenAI's Files and Batches (`/v1/files`, `/v1/batches`), for this process "
        "alone. Without it, these paths answer 404.",
    )
    batch_max_bytes: int = Field(
        default=20 * 1024**3,
        ge=1024**2,
        description="Maximum size of all files in that folder in bytes, each at least 4,096; beyond it, uploads are "
        "refused with 507, and batches wait.",
    )
    batch_max_open: int = Field(
        default=10,
        ge=1,
        description="Maximum number of batches that a key may have queued or in progress; 429 beyond. They run one "
        "after the other.",
    )

    @property
    def is_console_for_clients(self) -> bool:
        """Whether the console, if it is on, is on the clients' port."""
        return self.console == "public" or self.admin_port is None

    @property
    def compiled_folder(self) -> Path | None:
        """The folder of ``cache_dir``, by default one in the user's cache; ``None`` for ``off`` or a user without a home."""
        if self.cache_dir == "off":
            return None
        if self.cache_dir is not None:
            return self.cache_dir
        with suppress(StartError):
            return user_folder(os.environ, "XDG_CACHE_HOME", "~/.cache") / "compiled"
        return None

    @field_validator("models", "api_keys_file", "runs_dir", "cache_dir", "exposure_log", "state_dir", "batch_dir")
    @classmethod
    def _expand_home(cls, path: Path | str | None) -> Path | str | None:
        """Expand ``~``, as a shell does: services and containers set their variables without one."""
        try:
            return path.expanduser() if isinstance(path, Path) else path
        except RuntimeError as error:  # `~name` of a user that does not exist
            raise ValueError(f"is a path that cannot be resolved, {quote(str(path))}: {error}") from None

    @field_validator("admin_port")
    @classmethod
    def _check_admin_port(cls, admin_port: int | None, info: ValidationInfo) -> int | None:
        if admin_port and admin_port == info.data.get("port"):
            raise ValueError(
                f"must differ from the port of the clients ({variable('port')}), got {admin_port} for both; "
                "leave it unset to serve the operator's paths on that port"
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


class _PassedEnvironment(EnvSettingsSource):
    """Reads the environment that is passed in, rather than ``os.environ``."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        # Blanks around a value, and the carriage return of a file from Windows, are never meant.
        return {name.lower(): text for name, value in self._environ.items() if (text := value.strip())}


def variable(field_name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{ENV_PREFIX}{field_name.upper()}"


def load_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read and check the settings.

    Args:
        environ: the environment; an empty variable counts as unset.
        overrides: values by field name that override the environment, such as command-line options; ``None`` is ignored.

    Raises:
        ConfigError: a value is wrong, a ``GATEWAY_*`` variable is unknown, or the library of the model hub cannot read a
            variable; the error lists every problem.
        TypeError: an override is not a setting.
    """
    unknown = overrides.keys() - Settings.model_fields.keys()
    if unknown:
        raise TypeError(f"not settings: {', '.join(sorted(unknown))}")
    options = {name: value for name, value in overrides.items() if value is not None}
    problems = [*_unknown_variables(environ), *hub_problems(environ)]
    settings = None
    try:
        settings = Settings.model_validate({**_PassedEnvironment(environ)(), **options})
    except ValidationError as error:
        problems += _value_problems(error, overridden=set(options))
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
