"""Who a request is from, by the key that it carries."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from gateway.access import keyring as keyring_module
from gateway.access.keyring import Client, Keyring, key_digest, make_key
from gateway.config.api_keys import KeyFile, load_key_file
from gateway.config.settings import Settings
from gateway.errors import ConfigError, Unauthorized


def write(path: Path, *entries: str) -> None:
    """Put another file in its place, as an editor or Kubernetes does."""
    new = path.with_suffix(".new")
    new.write_text("version: 1\nkeys:\n" + "".join(f"- {{{entry}}}\n" for entry in entries) if entries else "no file")
    new.replace(path)


def entry(name: str, key: str, more: str = "") -> str:
    return f"name: {name}, sha256: {key_digest(key)}{more}"


@pytest.fixture
def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file be looked at with every request."""
    monkeypatch.setattr(keyring_module, "_LOOK_EVERY_S", 0.0)


async def test_without_keys_a_client_is_its_address() -> None:
    keyring = Keyring(Settings(requests_per_minute=5, tokens_per_minute=7))

    assert not keyring
    assert await keyring.identify(None, "10.0.0.1") == Client("10.0.0.1", None, 5, 7)
    assert (await keyring.identify(key_digest("any"), "10.0.0.1")).name == "10.0.0.1"


async def test_several_keys_of_the_environment_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(
        path,
        entry("search", "one", ", models: [bge-m3], requests_per_minute: 60"),
        f"name: ingest, sha256: [{key_digest('two')}, {key_digest('three')}]",
    )
    keyring = Keyring(Settings(api_keys="four,five", api_keys_file=path, tokens_per_minute=9))

    async def name_of(key: str) -> str:
        return (await keyring.identify(key_digest(key), "10.0.0.1")).name

    assert keyring
    assert await keyring.identify(key_digest("one"), "") == Client("search", frozenset({"bge-m3"}), 60, 9)
    assert [await name_of(key) for key in ("two", "three")] == ["ingest", "ingest"]
    assert [await name_of(key) for key in ("four", "five")] == [
        f"key-{key_digest(key)[:8]}" for key in ("four", "five")
    ]
    with pytest.raises(Unauthorized, match="not known"):
        await name_of("six")
    with pytest.raises(Unauthorized, match="is required"):
        await keyring.identify(None, "10.0.0.1")


async def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("version: 1\nkeys: []\n")

    with pytest.raises(Unauthorized):
        await Keyring(Settings(api_keys_file=path)).identify(key_digest("one"), "10.0.0.1")


async def test_a_key_ends_when_it_expires(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("old", "one", ", expires: 2026-01-01"), entry("new", "two", ", expires: 2999-01-01"))
    keyring = Keyring(Settings(api_keys_file=path))

    assert (await keyring.identify(key_digest("two"), "")).name == "new"
    with pytest.raises(Unauthorized, match="the API key of old has expired on 2026-01-01"):
        await keyring.identify(key_digest("one"), "")


@pytest.mark.usefixtures("look_at_once")
async def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))

    write(path, entry("a", "two"))

    assert (await keyring.identify(key_digest("two"), "")).name == "a"
    with pytest.raises(Unauthorized):
        await keyring.identify(key_digest("one"), "")


@pytest.mark.usefixtures("look_at_once")
async def test_a_file_that_became_wrong_or_went_away_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))

    write(path)
    assert (await keyring.identify(key_digest("one"), "")).name == "a"
    path.unlink()
    assert (await keyring.identify(key_digest("one"), "")).name == "a"
    write(path, entry("b", "two"))
    assert (await keyring.identify(key_digest("two"), "")).name == "b"


def test_a_wrong_file_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Keyring(Settings(api_keys_file=tmp_path / "keys.yaml"))


def test_keys_are_long_and_differ() -> None:
    keys = {make_key() for _ in range(100)}

    assert len(keys) == 100
    assert min(map(len, keys)) == 46


def test_what_a_client_may_use() -> None:
    assert Client("a").may_use("anything")
    assert Client("a", frozenset({"bge-m3", "mem0"})).may_use("default", "bge-m3")
    assert not Client("a", frozenset({"mem0"})).may_use("default", "bge-m3")


@pytest.mark.usefixtures("look_at_once")
async def test_others_go_on_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    write(path, entry("b", "two"))
    begun, may_end = threading.Event(), threading.Event()

    def read_slowly(*arguments: object) -> KeyFile:
        begun.set()
        assert may_end.wait(10)
        return load_key_file(path, {})

    monkeypatch.setattr(keyring_module, "load_key_file", read_slowly)
    reader = asyncio.create_task(keyring.identify(key_digest("two"), ""))
    await asyncio.to_thread(begun.wait, 10)

    assert (await keyring.identify(key_digest("one"), "")).name == "a"
    may_end.set()
    assert (await reader).name == "b"
