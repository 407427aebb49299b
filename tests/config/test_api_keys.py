"""The file of API keys: its valid values, and the messages for wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.access.keyring import key_digest
from gateway.config.api_keys import load_key_file, unknown_models
from gateway.errors import ConfigError

ONE, OTHER = key_digest("one"), key_digest("other")


def write(folder: Path, text: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_key_file(path, {})
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def test_a_whole_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
version: 1
keys:
  - name: search
    sha256: {ONE}
  - name: ingest
    sha256: [{OTHER}, "{key_digest("third")}"]
    models: [bge-m3, default]
    requests_per_minute: 60
    tokens_per_minute: 100000
    expires: 2027-01-01
""",
    )

    search, ingest = load_key_file(path, {}).keys

    assert (search.name, search.sha256, search.models) == ("search", (ONE,), None)
    assert (search.requests_per_minute, search.tokens_per_minute, search.expires) == (None, None, None)
    assert (ingest.sha256, ingest.models) == ((OTHER, key_digest("third")), ("bge-m3", "default"))
    assert (ingest.requests_per_minute, ingest.tokens_per_minute) == (60, 100_000)
    assert ingest.expires is not None
    assert ingest.expires.isoformat() == "2027-01-01T00:00:00+00:00"


def test_all_problems_are_reported_at_once_with_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
version: 1
keys:
  - name: search team
    sha256: sk-this-is-a-key
  - name: ingest
    model: [bge-m3]
    requests_per_minute: 0
    tokens_per_minute: many
    expires: 2027-01-01T00:00:00
""",
    )

    problems = problems_of(path)

    assert [problem.split(": ")[:2] for problem in problems] == [
        ["4:11", "keys[0].name"],
        ["5:13", "keys[0].sha256[0]"] if "sha256[0]" in problems[1] else ["5:13", "keys[0].sha256"],
        ["6:5", "keys[1]"] if "keys[1]: " in problems[2] else ["6:5", "keys[1].sha256"],
        ["7:5", "keys[1].model"],
        ["8:26", "keys[1].requests_per_minute"],
        ["9:24", "keys[1].tokens_per_minute"],
        ["10:14", "keys[1].expires"],
    ]


@pytest.mark.parametrize("text", ["", "[]", "keys", "version: 1", "version: 2\nkeys: []", "version: 1\nkeys: {}", "{"])
def test_text_that_is_not_a_key_file_is_refused(tmp_path: Path, text: str) -> None:
    assert problems_of(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_key_file(tmp_path / "keys.yaml", {})


def test_names_and_keys_are_unique(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"version: 1\nkeys:\n- {{name: a, sha256: {ONE}}}\n- {{name: A, sha256: {OTHER}}}\n- {{name: b, sha256: {ONE}}}",
    )

    assert problems_of(path) == [
        "4:10: keys[1].name: `a` appears twice",
        f"5:21: keys[2].sha256: `{ONE[:57]}...` appears twice",
    ]


def test_unknown_models_are_found(tmp_path: Path) -> None:
    path = write(tmp_path, f"version: 1\nkeys: [{{name: a, sha256: {ONE}, models: [bge-m3, bge-m4]}}]")

    assert unknown_models(load_key_file(path, {}), ["bge-m3", "default"]) == [
        "key a: the model `bge-m4` does not exist; did you mean `bge-m3`?"
    ]
