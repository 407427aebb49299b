"""An entry's ``upstream``: its valid values, and the messages for wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.registry import load_registry
from gateway.config.upstream import Upstream
from gateway.errors import ConfigError

URL = "http://gpu:8000/v1"


def read(tmp_path: Path, lines: str, backend: str = "openai", more: str = "", **environ: str) -> Upstream:
    """Read a file whose only model has this ``upstream``, in YAML's short form."""
    path = tmp_path / "models.yaml"
    path.write_text(
        f"version: 1\nmodels:\n  - id: far\n    backend: {backend}\n    source: acme/embed\n    upstream: {lines}\n{more}"
    )
    upstream = load_registry(path, environ).model("far").upstream
    assert upstream is not None
    return upstream


def problem(tmp_path: Path, lines: str, backend: str = "openai", more: str = "", **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, lines, backend, more, **environ)
    [found] = caught.value.problems
    assert found.line >= 3
    return f"{found.key}: {found.message}"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (URL, URL),
        (f"{URL}/", URL),
        ("https://api.example.com", "https://api.example.com"),
        ("http://[::1]:8080/a/b", "http://[::1]:8080/a/b"),
        ("HTTP://gpu:8000", "HTTP://gpu:8000"),
        ("dns+http://bge.gpu.svc:8000/v1/", "dns+http://bge.gpu.svc:8000/v1"),
        ("dns+https://bge.gpu.svc", "dns+https://bge.gpu.svc"),
    ],
)
def test_a_base_url_is_kept_without_its_last_slash(tmp_path: Path, url: str, kept: str) -> None:
    assert read(tmp_path, f'{{urls: ["{url}"]}}').urls == (kept,)


@pytest.mark.parametrize(
    "url",
    [
        "gpu:8000",
        "gpu",
        "",
        "ftp://gpu",
        "dns+ftp://gpu",
        "dns+gpu:8000",
        "dns://gpu:8000",
        "dns+http://",
        "dns+dns+http://gpu",
        "http://",
        "http://:8000",
        "http://gpu:99999",
        "http://gpu:0",
        "http://gpu:x",
        "http://[::1",
        "http://gpu/v1?key=1",
        "http://gpu/v1#x",
        "http://g pu/v1",
        "http://gpu/v\u200b1",
    ],
)
def test_an_invalid_base_url_is_refused(tmp_path: Path, url: str) -> None:
    found = problem(tmp_path, f'{{urls: ["{url}"]}}')

    assert "must be a URL such as `http://gpu:8080` or `http://gpu:8000/v1`, got" in found
    assert found.startswith("models[0].upstream.urls[0]")


@pytest.mark.parametrize("address", ["10.0.0.1:8000", "[fd00::1]:8000"])
def test_an_address_has_no_others(tmp_path: Path, address: str) -> None:
    found = problem(tmp_path, f'{{urls: ["dns+http://{address}"]}}')

    assert found.endswith(f"`dns+` is for a name with several addresses, got `dns+http://{address}`: leave `dns+` out")


@pytest.mark.parametrize("interval", [0, 0.01, -1, ".inf", ".nan"])
def test_names_are_not_looked_up_all_the_time(tmp_path: Path, interval: object) -> None:
    assert "resolve_interval_s" in problem(tmp_path, f"{{urls: [{URL}], resolve_interval_s: {interval}}}")


@pytest.mark.parametrize("user", ["user:secret", "user", ":secret"])
def test_a_password_in_a_url_is_refused_and_not_shown(tmp_path: Path, user: str) -> None:
    found = problem(tmp_path, f'{{urls: ["http://{user}@gpu:8000"]}}')

    assert "must not contain a user name or password; use `api_key`" in found
    assert "secret" not in found


def test_unset_fields_have_their_defaults(tmp_path: Path) -> None:
    upstream = read(tmp_path, f"{{urls: [{URL}]}}")

    assert (upstream.timeout_s, upstream.connect_timeout_s, upstream.probe_interval_s) == (60.0, 2.0, 10.0)
    assert upstream.resolve_interval_s == 5.0
    assert (upstream.max_connections, upstream.max_retries, upstream.max_batch_texts) == (32, 2, None)
    assert (upstream.model, upstream.api_key, upstream.task_field) == (None, None, None)
    assert (dict(upstream.tasks), dict(upstream.extra_body)) == ({}, {})


def test_servers_are_distinct_and_at_least_one(tmp_path: Path) -> None:
    assert "at least one" in problem(tmp_path, "{urls: []}")
    assert "twice" in problem(tmp_path, f"{{urls: [{URL}, {URL}/]}}")


def test_a_key_is_kept_from_sight(tmp_path: Path) -> None:
    upstream = read(tmp_path, f"{{urls: [{URL}], api_key: '${{KEY}}'}}", KEY="sk-secret\n")

    assert upstream.api_key is not None
    assert upstream.api_key.get_secret_value() == "sk-secret"  # a mounted secret ends with a line break
    assert "sk-secret" not in repr(upstream)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("''", "must be text, such as `${VLLM_API_KEY}`, got nothing"),
        ("'  '", "must be text"),
        ("17", "must be text, such as `${VLLM_API_KEY}`, got the number `17`"),
        ("[a]", "must be text"),
        ('"a\\nb"', "must be printable ASCII"),
        ("'schlüssel'", "must be printable ASCII"),
    ],
)
def test_impossible_keys_are_refused(tmp_path: Path, key: str, message: str) -> None:
    found = problem(tmp_path, f"{{urls: [{URL}], api_key: {key}}}")

    assert message in found
    assert "schlüssel" not in found
    assert found.startswith("models[0].upstream.api_key")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("extra_body: {model: x}", "`extra_body` must not contain `model`, which the gateway sends itself"),
        ("extra_body: {input: x}", "`extra_body` must not contain `input`"),
        ("extra_body: {inputs: x}", "`extra_body` must not contain `inputs`"),
        (
            "extra_body: {encoding_format: binary}",
            "`extra_body.encoding_format` must be `base64`, `float` or `null`, got",
        ),
        ("extra_body: {encoding_format: 8}", "got the number `8`"),
        (
            "extra_body: {output_dtype: int8}",
            "`extra_body.output_dtype` must be `float` or `null`, got the text `int8`",
        ),
        (
            "extra_body: {embedding_type: ubinary}",
            "`extra_body.embedding_type` must be `float`, `base64` or `null`, got",
        ),
        ("extra_body: {embed_dtype: float16}", "`extra_body.embed_dtype` must be `float32` or `null`, got"),
        ("extra_body: {endianness: big}", "`extra_body.endianness` must be `little`, `native` or `null`, got"),
        ("extra_body: {a: [1]}", "extra_body.a: must be text, a number, `true`, `false` or `null`, got a list"),
        (
            "extra_body: {a: .nan}",
            "extra_body.a: must be text, a number, `true`, `false` or `null`, got the number `nan`",
        ),
        ("extra_body: {seed: 18446744073709551616}", "extra_body.seed: must be a number of at most 64 bits, got the"),
        ("extra_body: {seed: -9223372036854775809}", "extra_body.seed: must be a number of at most 64 bits"),
        ("task_field: input_type", "`task_field` needs `tasks`"),
        ("task_field: input, tasks: {query: q}", "`task_field` must not be `input`"),
        ("task_field: '', tasks: {query: q}", "task_field"),
        ("timeout_s: 0", "timeout_s"),
        ("timeout_s: .inf", "timeout_s"),
        ("max_retries: -1", "max_retries"),
        ("max_batch_texts: 0", "max_batch_texts"),
        ("tasks: {query: ''}", "tasks"),
        ("retries: 3", "retries"),
    ],
)
@pytest.mark.parametrize("backend", ["openai", "tei"])
def test_values_that_cannot_be_sent_are_refused(tmp_path: Path, backend: str, lines: str, message: str) -> None:
    assert message in problem(tmp_path, f"{{urls: [{URL}], {lines}}}", backend)


def test_fields_may_be_set_left_out_and_named(tmp_path: Path) -> None:
    lines = (
        f"{{urls: [{URL}], task_field: input_type, tasks: {{query: q}}, "
        "extra_body: {encoding_format: null, truncate: true, dimensions: 256, input_type: passage}}"
    )
    upstream = read(tmp_path, lines)

    assert dict(upstream.extra_body) == {
        "encoding_format": None,
        "truncate": True,
        "dimensions": 256,
        "input_type": "passage",
    }
    assert (upstream.task_field, dict(upstream.tasks)) == ("input_type", {"query": "q"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "    prompts: {query: 'q: '}\n",
            "`prompts` are added to texts here and `upstream.tasks` are applied by",
        ),
        ("    device: cpu\n", "`device` cannot be set here for `backend: openai`: the servers decide that"),
        ("    outputs: [sparse]\n", "`outputs` must be `[dense]` for `backend: openai`"),
        ("    revision: main\n", "must be a commit, 40 lowercase hex digits"),
    ],
)
def test_settings_that_the_servers_decide_are_refused(tmp_path: Path, more: str, message: str) -> None:
    assert message in problem(tmp_path, f"{{urls: [{URL}], tasks: {{query: q}}}}", more=more)


def test_a_backend_and_its_upstream_belong_together(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    for lines, message in [
        ("backend: openai, source: acme/embed", "`backend: openai` needs `upstream` with the `urls` of the servers"),
        (f"source: ./near, upstream: {{urls: [{URL}]}}", "`upstream` is for models on other servers"),
        ("source: ./near, same_space_as: other", "`same_space_as` is for models on other servers"),
        (
            f"backend: tei, source: '', upstream: {{urls: [{URL}]}}",
            "must be the model's name on the servers",
        ),
    ]:
        path.write_text(f"version: 1\nmodels:\n  - {{id: far, {lines}}}\n  - {{id: other, source: ./other}}\n")
        with pytest.raises(ConfigError, match="models") as caught:
            load_registry(path, {})
        assert message in str(caught.value)
