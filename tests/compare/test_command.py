"""``gateway compare`` at the command line: how it finds a gateway, and its errors when it cannot compare."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gateway.cli.in_process import in_process_client
from gateway.cli.main import app
from gateway.compare.command import default_cache
from gateway.config.registry import load_registry
from gateway.config.settings import Settings
from gateway.errors import StartError
from tests.compare.conftest import WriteData

REGISTRY = """
version: 1
models:
  - {id: one, source: ./one, prompts: {query: "find: "}, enabled: true}
  - {id: other, source: ./other, enabled: true}
aliases: {searcher: {model: one, task: query}}
experiments:
  - id: ab
    kind: cross_space
    unit: {from: [api_key]}
    arms: [{model: one, weight: 1}, {model: other, weight: 1}]
"""


def compare(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments], env=environ)


def test_wrong_data_is_reported_before_anything_loads(tmp_path: Path, write_data: WriteData) -> None:
    """The models of the registry could not be loaded: they are not used."""
    registry = tmp_path / "models.yaml"
    registry.write_text(REGISTRY)
    data = write_data()
    (data / "queries.jsonl").write_text('{"_id": "q0", "text": "a"}\n{"_id": "q1"}\n')
    result = compare("one", "other", "--data", str(data), "--models", str(registry))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"{data}/queries.jsonl:2: has no text; its keys: _id\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "a comparison needs at least two models: the baseline, and another one"),
        (["a", "a"], "'a' is named twice"),
        (
            ["a", "b", "--url", "localhost:8000"],
            "--url localhost:8000: must be an address such as http://127.0.0.1:8000",
        ),
        (["a", "b", "--url", "http://127.0.0.1:99999"], "must be an address such as http://127.0.0.1:8000"),
        (["a", "b", "--url", "http://host\n"], "--url http://host\n: Invalid non-printable ASCII character in URL"),
        (["a", "b", "--url", "http://127.0.0.1:1"], "no gateway answers at http://127.0.0.1:1: "),
        (["a", "b", "--models", "nowhere.yaml"], "nowhere.yaml: "),
        (["a", "b", "--split", "dev"], "the splits are: test"),
    ],
)
def test_an_error_is_one_line(write_data: WriteData, arguments: list[str], message: str) -> None:
    if "--models" not in arguments and "--url" not in arguments:
        arguments = [*arguments, "--url", "http://127.0.0.1:1"]
    result = compare(*arguments, "--data", str(write_data()), "--no-cost")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_captured_queries_are_read_before_anything_loads(tmp_path: Path, write_data: WriteData) -> None:
    folder = write_data()

    result = compare("one", "two", "--data", str(folder), "--queries", str(tmp_path / "kept" / "queries.jsonl"))

    assert result.exit_code == 1
    assert "queries.jsonl: there is no such file, and no file of a day" in result.output.replace("\n", " ")


def test_results_of_another_comparison_are_not_replaced(tmp_path: Path, write_data: WriteData) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("of before")

    result = compare("a", "b", "--data", str(write_data()), "--url", "http://127.0.0.1:1", "--out", str(out))

    assert result.exit_code == 1
    assert result.stderr == (
        f"--out {out}: holds the results of another comparison; choose another folder, or remove this one\n"
    )
    assert (out / "results.json").read_text() == "of before"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("gateway.compare.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    result = compare("a", "b", "--data", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == "ir_measures is not installed: pip install 'embedding-gateway[compare]'\n"


Asked = list[tuple[str, str | None]]


@pytest.fixture
def closed_gateway() -> Iterator[tuple[str, Asked]]:
    """Serve what asks for a key and takes none; yield its address, and the path and key of every request."""
    asked: Asked = []

    class Closed(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            content = json.dumps({"error": {"message": "another API key is required"}}).encode()
            self.send_response(401)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Closed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_key_is_sent_and_the_address_may_end_as_that_of_the_api(
    closed_gateway: tuple[str, Asked], write_data: WriteData, suffix: str
) -> None:
    url, asked = closed_gateway
    data = str(write_data())
    result = compare("a", "b", "--data", data, "--url", url + suffix, "--api-key-env", "MY_KEY", MY_KEY="secret\n")
    assert result.exit_code == 1
    assert result.stderr == (
        f"the gateway ({url}) answers 401: another API key is required; "
        "--api-key-env names the environment variable with the key\n"
    )
    assert asked == [("/v1/embeddings", "Bearer secret")]


def test_without_a_key_none_is_sent(closed_gateway: tuple[str, Asked], write_data: WriteData) -> None:
    url, asked = closed_gateway
    compare("a", "b", "--data", str(write_data()), "--url", url, "--api-key-env", "MY_KEY")
    assert asked == [("/v1/embeddings", None)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "absent"], "models.yaml: no model is called 'absent'; available: one, other, searcher, ab"),
        (["one", ""], "models.yaml: no model is called ''"),
        (["searcher:passage", "one"], "already means the task 'query': remove `:passage`"),
        (["one", "ab"], "ab is an experiment, which uses several models: name those"),
        (["ab:query", "one"], "ab:query is an experiment"),
        (["searcher", "other"], "one: failed to load: "),
    ],
)
async def test_models_that_cannot_be_loaded_here(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "models.yaml").write_text(REGISTRY)
    registry = load_registry(tmp_path / "models.yaml", {})
    with pytest.raises(StartError, match=re.escape(message)):
        async with in_process_client(registry, Settings(), names):
            pass


def test_vectors_are_kept_where_the_system_keeps_such_things() -> None:
    assert default_cache({"XDG_CACHE_HOME": "/var/cache/me"}) == Path("/var/cache/me/embedding-gateway/compare")
    assert default_cache({}) == Path("~/.cache/embedding-gateway/compare").expanduser()
    assert default_cache({"XDG_CACHE_HOME": "relative"}) == default_cache({})


@pytest.mark.parametrize("name", ["long", "link"])
def test_a_folder_for_results_that_cannot_be_made_is_reported_first(
    tmp_path: Path, write_data: WriteData, name: str
) -> None:
    out = tmp_path / ("o" * 300)
    if name == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "nowhere")
    result = compare("a", "b", "--data", str(write_data()), "--url", "http://127.0.0.1:1", "--out", str(out))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"--out {out}: ")
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTP_PROXY", "ftp://proxy"), ("HTTP_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/nowhere.pem")],
)
def test_a_proxy_or_certificate_of_the_environment_that_is_wrong_is_reported(
    write_data: WriteData, variable: str, value: str
) -> None:
    result = compare("a", "b", "--data", str(write_data()), "--url", "http://gateway.invalid", **{variable: value})
    assert result.exit_code == 1
    assert result.stderr.startswith("cannot create an HTTP client; check HTTPS_PROXY, HTTP_PROXY")
