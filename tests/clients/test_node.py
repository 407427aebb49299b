"""OpenAI's client for Node, and Vercel's AI SDK."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.apart.environment import ENVIRONMENTS
from tests.clients.conftest import KEY
from tests.clients.gateway_process import HUB_NAME, MODEL, Gateway
from tests.peers import is_missing

Embed = Callable[..., np.ndarray]
AssertSame = Callable[..., None]
_FOLDER = ENVIRONMENTS / "node"
_SCRIPT = Path(__file__).with_name("node") / "ask.mjs"
TEXTS = ["hello world", "日本 😀", "two\nlines", ""]


def ask(gateway: Gateway, call: str, *, key: str = "any", **fields: object) -> Any:
    """Have Node do something; return its result, or the error that it threw as ``{"error": …}``."""
    if shutil.which("node") is None or not _FOLDER.exists():
        is_missing("Node and its clients are not installed: install Node, then make install-clients")
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", _SCRIPT.read_text()],
        input=json.dumps({"call": call, "baseURL": gateway.base_url, "apiKey": key, **fields}),
        cwd=_FOLDER,  # where the packages are looked for
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer.get("result", answer)


# It requests base64 silently, and would misread a list of numbers just as silently.
@pytest.mark.parametrize("fields", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_openai_node_embeds(
    gateway: Gateway, embed: Embed, assert_same_vectors: AssertSame, fields: dict[str, str]
) -> None:
    answer = ask(gateway, "embed", model=MODEL, input=TEXTS, **fields)

    assert answer["model"] == MODEL
    assert answer["usage"]["prompt_tokens"] > 0
    vectors = answer["vectors"]
    if fields.get("encoding_format") == "base64":  # then it forwards the answer
        vectors = [np.frombuffer(base64.b64decode("".join(characters)), "<f4") for characters in vectors]
    assert_same_vectors(vectors, embed(*TEXTS))


def test_openai_node_sends_half_a_character(gateway: Gateway, embed: Embed, assert_same_vectors: AssertSame) -> None:
    answer = ask(gateway, "embed", model=MODEL, input=["half \ud83d"])

    assert_same_vectors(answer["vectors"], embed("half \ufffd"))


def test_openai_node_lists_the_models(gateway: Gateway) -> None:
    assert MODEL in ask(gateway, "models")
    assert ask(gateway, "model", model=HUB_NAME) == MODEL


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": MODEL, "dimensions": 100}, {"status": 400, "param": "dimensions"}),
        ({"model": "nothing"}, {"status": 404, "code": "model_not_found"}),
    ],
)
def test_openai_node_shows_the_error(gateway: Gateway, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    error = ask(gateway, "embed", input="a", **fields)["error"]

    assert expected.items() <= error.items()
    assert "no body" not in error["message"]


def test_openai_node_shows_a_wrong_key(furnished_gateway: Gateway) -> None:
    assert ask(furnished_gateway, "embed", key="sk-wrong", model=MODEL, input="a")["error"]["status"] == 401
    assert len(ask(furnished_gateway, "embed", key=KEY, model=MODEL, input="a")["vectors"]) == 1


def test_the_ai_sdk_embeds_many(gateway: Gateway, embed: Embed, assert_same_vectors: AssertSame) -> None:
    texts = [f"text number {i}" for i in range(40)]

    answer = ask(gateway, "embedMany", model=MODEL, input=texts)

    assert_same_vectors(answer["vectors"], embed(*texts))
    assert answer["tokens"] > 0
