"""GATEWAY_* variables become Settings, or a list of every problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway.config.settings import Settings, load_settings, variable
from gateway.errors import ConfigError, Problem


def problems_of(environ: dict[str, str], **overrides: object) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ, **overrides)
    return caught.value.problems


MIB = 1024 * 1024
PATHS = ("models", "api_keys_file", "runs_dir", "cache_dir", "exposure_log", "state_dir", "batch_dir")

# Defaults and bounds are promises to operators, as the documentation lists them.
DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "models": Path("models.yaml"),
    "api_keys": (),
    "api_keys_file": None,
    "requests_per_minute": 0,
    "tokens_per_minute": 0,
    "quota_storage": "memory://",
    "admin_key": None,
    "admin_port": None,
    "console": "admin",
    "runs_dir": None,
    "cors_origins": (),
    "trusted_proxies": (),
    "root_path": "",
    "max_header_bytes": 64 * 1024,
    "header_timeout_s": 10.0,
    "keep_alive_s": 75.0,
    "body_timeout_s": 60.0,
    "send_timeout_s": 60.0,
    "max_body_bytes": 16 * MIB,
    "memory_budget_bytes": 512 * MIB,
    "max_inputs": 2048,
    "max_token_vectors": 32_768,
    "max_queue_texts": 16_384,
    "max_queue_tokens": 4_000_000,
    "request_timeout_s": 300.0,
    "shutdown_grace_s": 30.0,
    "drain_delay_s": 0.0,
    "forward_timeout_s": 120.0,
    "golden_interval_s": 3600.0,
    "cluster": None,
    "cpu_threads": 0,
    "cache_dir": None,
    "log_level": "info",
    "log_format": "auto",
    "exposure_log": None,
    "exposure_log_max_bytes": 16 * MIB,
    "exposure_log_backups": 5,
    "state_dir": None,
    "state_max_bytes": 2 * 1024**3,
    "batch_dir": None,
    "batch_max_bytes": 20 * 1024**3,
    "batch_max_open": 10,
}
LEAST = {
    "port": 0,
    "requests_per_minute": 0,
    "tokens_per_minute": 0,
    "admin_port": 0,
    "max_header_bytes": 1024,
    "max_body_bytes": 1,
    "memory_budget_bytes": 64 * MIB,
    "max_inputs": 1,
    "max_token_vectors": 1,
    "max_queue_texts": 1,
    "max_queue_tokens": 1,
    "cpu_threads": 0,
    "exposure_log_max_bytes": 1024,
    "exposure_log_backups": 1,
}
MAY_BE_ZERO = {"shutdown_grace_s", "drain_delay_s"}
SECONDS = [name for name in DEFAULTS if name.endswith("_s")]


def test_the_defaults_are_as_documented() -> None:
    assert load_settings({}).model_dump() == DEFAULTS


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_a_whole_number_has_a_least_value(name: str, least: int) -> None:
    assert getattr(load_settings({variable(name): str(least)}), name) == least

    (problem,) = problems_of({variable(name): str(least - 1)})
    assert problem.message.startswith(f"must be at least {least}, got ")


@pytest.mark.parametrize("name", ["port", "admin_port"])
def test_a_port_has_a_largest_value(name: str) -> None:
    assert getattr(load_settings({variable(name): "65535"}), name) == 65535

    (problem,) = problems_of({variable(name): "65536"})
    assert problem.message.startswith("must be at most 65535, got ")


@pytest.mark.parametrize(("name", "most"), {"cpu_threads": 4096, "exposure_log_backups": 1000}.items())
def test_a_number_that_is_counted_through_has_a_largest_value(name: str, most: int) -> None:
    (problem,) = problems_of({variable(name): str(most + 1)})

    assert problem.message.startswith(f"must be at most {most}, got ")


@pytest.mark.parametrize("name", SECONDS)
def test_seconds_may_be_a_fraction_and_must_be_more_than_zero(name: str) -> None:
    assert getattr(load_settings({variable(name): "0.001"}), name) == 0.001
    if name in MAY_BE_ZERO:
        assert getattr(load_settings({variable(name): "0"}), name) == 0.0
        (problem,) = problems_of({variable(name): "-0.001"})
        assert problem.message.startswith("must be at least 0, got ")
    else:
        (problem,) = problems_of({variable(name): "0"})
        assert problem.message.startswith("must be more than 0, got ")


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("cors_origins", "https://a.example, http://b:8080/ ,*", ("https://a.example", "http://b:8080", "*")),
        ("trusted_proxies", "10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
    ],
)
def test_a_list_is_split_at_commas(name: str, text: str, values: tuple[str, ...]) -> None:
    assert getattr(load_settings({variable(name): text}), name) == values


@pytest.mark.parametrize("text", ["app.example.com", "ftp://a", "https://a.example/path", "https://a,", "**"])
def test_an_invalid_origin_is_refused(text: str) -> None:
    (problem,) = problems_of({"GATEWAY_CORS_ORIGINS": text})

    assert problem.message.startswith("must be origins such as `https://app.example.com`, or `*`, got ")


@pytest.mark.parametrize(
    ("text", "prefix"), [("/ai/embed", "/ai/embed"), ("/ai/", "/ai"), ("/", ""), ("/a.b_c~d-1", "/a.b_c~d-1")]
)
def test_a_root_path_is_kept_without_its_last_slash(text: str, prefix: str) -> None:
    assert load_settings({"GATEWAY_ROOT_PATH": text}).root_path == prefix


@pytest.mark.parametrize("text", ["ai", "/a//b", "/a b", "https://a/b", "/ü", "/a/../b", "/.."])
def test_an_invalid_root_path_is_refused(text: str) -> None:
    (problem,) = problems_of({"GATEWAY_ROOT_PATH": text})

    assert problem.message.startswith("must be a path such as `/embeddings-gateway`, got ")


def test_keys_of_eight_characters_are_enough() -> None:
    settings = load_settings({"GATEWAY_API_KEYS": "12345678", "GATEWAY_ADMIN_KEY": "abcdefgh"})

    assert settings.admin_key is not None
    assert (len(settings.api_keys), settings.admin_key.get_secret_value()) == (1, "abcdefgh")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("host", "0.0.0.0", "0.0.0.0"),  # noqa: S104 - a value, nothing listens on it
        ("port", "0", 0),
        ("port", "65535", 65535),
        ("models", "/etc/gateway/models.yaml", Path("/etc/gateway/models.yaml")),
        ("max_body_bytes", "1024", 1024),
        ("max_inputs", "1", 1),
        ("max_queue_texts", "7", 7),
        ("max_queue_tokens", "9", 9),
        ("request_timeout_s", "2.5", 2.5),
        ("shutdown_grace_s", "0", 0.0),
        ("cpu_threads", "4", 4),
        ("log_level", "DEBUG", "debug"),
        ("log_format", "JSON", "json"),
        ("cache_dir", "OFF", "off"),
        ("cpu_threads", "4096", 4096),
        ("exposure_log_backups", "1000", 1000),
        # As a file with line breaks of Windows, or with blanks at its ends, gives them.
        ("host", " 0.0.0.0\r", "0.0.0.0"),  # noqa: S104 - a value, nothing listens on it
        ("models", "models.yaml\r\n", Path("models.yaml")),
        ("state_dir", " ", None),
        # As an environment file, which no shell reads, gives them.
        *((name, "~/place", Path.home() / "place") for name in PATHS),
        ("cache_dir", "~", Path.home()),
    ],
)
def test_a_variable_sets_its_field(name: str, text: str, value: object) -> None:
    assert getattr(load_settings({variable(name): text}), name) == value


@pytest.mark.parametrize("name", PATHS)
def test_a_home_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{variable(name)}.* cannot be resolved, `~missing-user/x`: .*home"):
        load_settings({variable(name): "~missing-user/x"})


def test_api_keys_are_split_at_commas_and_not_shown() -> None:
    settings = load_settings({"GATEWAY_API_KEYS": "alpha-alpha, beta-beta"})

    assert [key.get_secret_value() for key in settings.api_keys] == ["alpha-alpha", "beta-beta"]
    assert "alpha" not in repr(settings)


def test_an_empty_variable_counts_as_unset() -> None:
    settings = load_settings({"GATEWAY_PORT": "", "GATEWAY_API_KEYS": ""})

    assert (settings.port, settings.api_keys) == (8000, ())


def test_an_override_wins_and_none_is_not_an_override() -> None:
    settings = load_settings({"GATEWAY_PORT": "9000", "GATEWAY_HOST": "::1"}, port=9001, host=None)

    assert (settings.port, settings.host) == (9001, "::1")


def test_the_environment_of_the_process_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "9000")

    assert load_settings({}).port == 8000
    assert Settings().port == 8000


def test_other_variables_are_ignored() -> None:
    assert load_settings({"PORT": "x", "GATEWAYS": "x", "PATH": "/bin"}) == Settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings({}).port = 1


@pytest.mark.parametrize(
    ("key", "text", "part"),
    [
        ("GATEWAY_PORT", "80a", "must be a whole number, got the text `80a`"),
        ("GATEWAY_PORT", "65536", "must be at most 65535, got `65536`"),
        ("GATEWAY_PORT", "-1", "must be at least 0, got `-1`"),
        ("GATEWAY_MAX_BODY_BYTES", "16MiB", "must be a whole number, got the text `16MiB`"),
        ("GATEWAY_MAX_INPUTS", "0", "must be at least 1, got `0`"),
        ("GATEWAY_MAX_QUEUE_TEXTS", "1.5", "must be a whole number, got the text `1.5`"),
        ("GATEWAY_MAX_QUEUE_TOKENS", "9" * 5000, "must be a whole number"),
        ("GATEWAY_REQUEST_TIMEOUT_S", "0", "must be more than 0, got `0`"),
        ("GATEWAY_REQUEST_TIMEOUT_S", "inf", "must be a finite number, got the text `inf`"),
        ("GATEWAY_SHUTDOWN_GRACE_S", "30s", "must be a number, got the text `30s`"),
        ("GATEWAY_ADMIN_KEY", "secret", "must have at least 8 characters, got 6"),
        (
            "GATEWAY_TRUSTED_PROXIES",
            "proxy.local",
            "must be addresses or networks such as `10.0.0.0/8`, got `proxy.local`",
        ),
        ("GATEWAY_CPU_THREADS", "-1", "must be at least 0"),
        (
            "GATEWAY_LOG_LEVEL",
            "warn",
            "must be one of `debug`, `info`, `warning`, `error`, got the text `warn`; did you",
        ),
        ("GATEWAY_LOG_FORMAT", "xml", "must be one of `auto`, `json`, `console`"),
        ("HF_HUB_ETAG_TIMEOUT", "10s", "must be a whole number of seconds, got `10s`"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5", "must be a whole number of seconds, got `1.5`"),
        ("HF_ENDPOINT", "http://user:secret@[::1", "must be the URL of a model hub: Invalid IPv6 URL"),
        ("HF_ENDPOINT", "http://user:secret@hub:x", "must be the URL of a model hub: "),
        ("GATEWAY_PRT", "1", "is not a setting; did you mean `GATEWAY_PORT`?"),
        ("GATEWAY_QQQQQQ", "1", "is not a setting"),
        ("GATEWAY_PORT", "tcp://10.0.0.1:80", "set `enableServiceLinks: false`"),
        ("GATEWAY_SERVICE_HOST", "10.0.0.1", "set `enableServiceLinks: false`"),
        ("GATEWAY_PORT_80_TCP_ADDR", "10.0.0.1", "set `enableServiceLinks: false`"),
    ],
)
def test_a_wrong_variable_gets_a_plain_message(key: str, text: str, part: str) -> None:
    (problem,) = problems_of({key: text})

    assert (problem.file, problem.line, problem.column, problem.key) == ("environment", 0, 0, key)
    assert part in problem.message
    assert "Input should" not in problem.message
    assert "secret" not in problem.message


@pytest.mark.parametrize("text", [",", "secret,", ",secret", "secret,,secret", "secret, ,secret"])
def test_an_empty_api_key_is_refused_without_showing_the_others(text: str) -> None:
    (problem,) = problems_of({"GATEWAY_API_KEYS": text})

    assert problem.key == "GATEWAY_API_KEYS"
    assert "has an empty key" in problem.message
    assert "secret" not in problem.message


def test_a_short_api_key_is_refused_without_showing_it() -> None:
    (problem,) = problems_of({"GATEWAY_API_KEYS": "long-enough,short"})

    assert problem.message == "key 2 must have at least 8 characters, got 5"


@pytest.mark.parametrize(
    ("environ", "overrides"),
    [
        ({"GATEWAY_PORT": "9000", "GATEWAY_ADMIN_PORT": "9000"}, {}),
        ({"GATEWAY_ADMIN_PORT": "8000"}, {}),
        ({"GATEWAY_ADMIN_PORT": "9001"}, {"port": 9001}),
    ],
)
def test_the_operators_port_must_be_another_one(environ: dict[str, str], overrides: dict[str, int]) -> None:
    """The gateway would listen on both, and the clients' port would answer everything."""
    (problem,) = problems_of(environ, **overrides)

    assert problem.key == "GATEWAY_ADMIN_PORT"
    assert "must differ from the port of the clients (GATEWAY_PORT), got " in problem.message


def test_two_ports_that_are_any_free_ones_differ() -> None:
    settings = load_settings({"GATEWAY_PORT": "0", "GATEWAY_ADMIN_PORT": "0"})

    assert (settings.port, settings.admin_port) == (0, 0)


def test_every_problem_is_reported_at_once() -> None:
    problems = problems_of({"GATEWAY_PORT": "x", "GATEWAY_MODLES": "y", "GATEWAY_MAX_INPUTS": "z"})

    assert [problem.key for problem in problems] == ["GATEWAY_MAX_INPUTS", "GATEWAY_MODLES", "GATEWAY_PORT"]


def test_a_wrong_override_is_reported_as_an_option() -> None:
    (problem,) = problems_of({"GATEWAY_MAX_INPUTS": "1"}, max_inputs="x")

    assert (problem.file, problem.key) == ("command line", "--max-inputs")


def test_an_override_of_an_unknown_setting_is_a_bug() -> None:
    with pytest.raises(TypeError, match="not settings: prot"):
        load_settings({}, prot=1)


def test_every_setting_has_a_meaning() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("text", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if field.annotation is float])
def test_every_number_must_be_finite(name: str, text: str) -> None:
    (problem,) = problems_of({f"GATEWAY_{name.upper()}": text})

    assert problem.message.startswith("must be")


def test_compiled_models_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert Settings().compiled_folder == Path("/cache/embedding-gateway/compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Settings().compiled_folder == Path.home() / ".cache/embedding-gateway/compiled"


def test_a_relative_place_for_caches_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for relative in ("", " ", "cache", "./cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert Settings().compiled_folder == Path.home() / ".cache/embedding-gateway/compiled"


def test_a_user_without_a_home_keeps_no_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that no user has."""

    def fail(_uid: int) -> None:
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", fail)

    assert Settings().compiled_folder is None
    assert load_settings({"GATEWAY_CACHE_DIR": "/var/lib/gateway"}).compiled_folder == Path("/var/lib/gateway")


def test_compiled_models_are_kept_elsewhere_or_not_at_all() -> None:
    assert load_settings({"GATEWAY_CACHE_DIR": "/var/lib/gateway"}).compiled_folder == Path("/var/lib/gateway")
    assert load_settings({"GATEWAY_CACHE_DIR": "off"}).compiled_folder is None
