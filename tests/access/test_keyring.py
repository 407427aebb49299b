"""Clients are identified by the key of a request."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog

from gateway.access import keyring as keyring_module
from gateway.access.keyring import Client, Keyring, key_digest, make_key
from gateway.config.api_keys import KeyFile, load_key_file
from gateway.config.settings import Settings
from gateway.errors import ConfigError, Unauthorized
from gateway.telemetry import metrics


def write(path: Path, *entries: str) -> None:
    """Replace the file, as an editor or Kubernetes does."""
    new = path.with_suffix(".new")
    new.write_text("version: 1\nkeys:\n" + "".join(f"- {{{entry}}}\n" for entry in entries) if entries else "no file")
    new.replace(path)


def entry(name: str, key: str, more: str = "") -> str:
    return f"name: {name}, sha256: {key_digest(key)}{more}"


@pytest.fixture
def checks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the file a hundred times per second."""
    monkeypatch.setattr(keyring_module, "_CHECK_EVERY_S", 0.01)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110  the keyring announces nothing
            await asyncio.sleep(0.005)


async def knows(keyring: Keyring, key: str) -> bool:
    try:
        await keyring.identify(key_digest(key), "")
    except Unauthorized:
        return False
    return True


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
    keyring = Keyring(Settings(api_keys=["four", "five"], api_keys_file=path, tokens_per_minute=9))

    async def name_of(key: str) -> str:
        return (await keyring.identify(key_digest(key), "10.0.0.1")).name

    assert keyring
    assert await keyring.identify(key_digest("one"), "") == Client("search", frozenset({"bge-m3"}), 60, 9)
    assert [await name_of(key) for key in ("two", "three")] == ["ingest", "ingest"]
    assert [await name_of(key) for key in ("four", "five")] == [
        f"key-{key_digest(key)[:8]}" for key in ("four", "five")
    ]
    with pytest.raises(Unauthorized, match="not valid"):
        await name_of("six")
    with pytest.raises(Unauthorized, match="is required"):
        await keyring.identify(None, "10.0.0.1")


async def test_an_empty_file_accepts_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("version: 1\nkeys: []\n")

    with pytest.raises(Unauthorized):
        await Keyring(Settings(api_keys_file=path)).identify(key_digest("one"), "10.0.0.1")


async def test_a_key_ends_when_it_expires(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("old", "one", ", expires: 2026-01-01"), entry("new", "two", ", expires: 2999-01-01"))
    keyring = Keyring(Settings(api_keys_file=path))

    assert (await keyring.identify(key_digest("two"), "")).name == "new"
    with pytest.raises(Unauthorized, match="the API key of old expired on 2026-01-01"):
        await keyring.identify(key_digest("one"), "")


@pytest.mark.usefixtures("checks_often")
async def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    assert await knows(keyring, "one")

    write(path, entry("a", "two"))

    await until(lambda: knows(keyring, "two"))
    assert not await knows(keyring, "one")
    await keyring.close()


async def test_a_change_is_noticed_within_about_a_second(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    keyring.watch()

    write(path, entry("a", "two"))

    async with asyncio.timeout(15):  # on a busy machine
        await until(lambda: knows(keyring, "two"))
    await keyring.close()


def reloads(outcome: str) -> float:
    return metrics.values(metrics.KEY_RELOADS).get((outcome,), 0)


@pytest.mark.usefixtures("checks_often")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (write, "the file must be a mapping"),
        (lambda path: path.unlink(), "the file does not exist"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "the file must be a regular file, but is a named pipe"),
        (lambda path: (path.unlink(), path.mkdir()), "the file must be a regular file, but is a folder"),
        (lambda path: path.write_bytes(b"#" * 2_000_000), "the file has 2,000,000 bytes; the limit is 1,048,576"),
    ],
    ids=["wrong", "gone", "named pipe", "folder", "huge"],
)
async def test_a_file_that_became_wrong_changes_nothing_and_is_logged_once_without_a_request(
    tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    refused, read = reloads("refused"), reloads("ok")

    async def is_refused() -> bool:
        return reloads("refused") > refused

    with structlog.testing.capture_logs() as logged:
        keyring.watch()
        spoil(path)
        await until(is_refused)
        await asyncio.sleep(0.1)  # several more checks
    assert reloads("refused") == refused + 1
    (line,) = [one for one in logged if one["event"] == "api_keys_refused"]
    assert reason in line["reason"]
    assert "GATEWAY_API_KEYS_FILE" in line["reason"] or reason == "the file must be a mapping"
    assert await knows(keyring, "one")

    if path.is_dir():
        path.rmdir()
    write(path, entry("b", "two"))
    await until(lambda: knows(keyring, "two"))
    assert reloads("ok") == read + 1
    await keyring.close()


@pytest.mark.usefixtures("checks_often")
async def test_a_file_that_could_not_be_read_is_read_once_it_can_be(tmp_path: Path) -> None:
    """The file does not change when a descriptor is free again, or when it gets the right owner."""
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    refused = reloads("refused")
    write(path, entry("a", "two"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def is_refused() -> bool:
        return reloads("refused") > refused

    with structlog.testing.capture_logs() as logged:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            keyring.watch()
            await until(is_refused)
            await asyncio.sleep(0.1)  # several more checks
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert await knows(keyring, "one")
    (line,) = [one for one in logged if one["event"] == "api_keys_refused"]
    assert "Too many open files" in line["reason"]

    await until(lambda: knows(keyring, "two"))
    assert not await knows(keyring, "one")
    assert reloads("refused") == refused + 1
    await keyring.close()


async def test_a_named_pipe_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    os.mkfifo(path)

    with pytest.raises(ConfigError, match="must be a regular file, but is a named pipe; GATEWAY_API_KEYS_FILE"):
        Keyring(Settings(api_keys_file=path))


@pytest.mark.usefixtures("checks_often")
async def test_the_file_is_still_checked_after_a_check_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a revoked key would work until a restart."""
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    has_failed = asyncio.Event()

    async def fail(_path: Path) -> None:
        has_failed.set()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context, structlog.testing.capture_logs() as logged:
        context.setattr(keyring, "_read_if_changed", fail)
        keyring.watch()
        await has_failed.wait()
        await asyncio.sleep(0)
    write(path, entry("a", "two"))

    await until(lambda: knows(keyring, "two"))
    assert "api_keys_not_looked_at" in {one["event"] for one in logged}
    await keyring.close()


def test_a_wrong_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Keyring(Settings(api_keys_file=tmp_path / "keys.yaml"))


def test_a_client_has_no_limits_unless_it_is_given_some() -> None:
    client = Client("a")

    assert (client.models, client.requests_per_minute, client.tokens_per_minute, client.expires) == (None, 0, 0, None)


def test_keys_are_long_and_differ() -> None:
    keys = {make_key() for _ in range(100)}

    assert len(keys) == 100
    assert set(map(len, keys)) == {47}


def test_a_client_may_use_a_model_by_any_of_its_names() -> None:
    assert Client("a").may_use("anything")
    assert Client("a", frozenset({"bge-m3", "mem0"})).may_use("default", "bge-m3")
    assert not Client("a", frozenset({"mem0"})).may_use("default", "bge-m3")


@pytest.mark.usefixtures("checks_often")
async def test_no_request_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    begun, may_end = threading.Event(), threading.Event()

    def read_slowly(*arguments: object) -> KeyFile:
        begun.set()
        assert may_end.wait(30)
        return load_key_file(path, {})

    monkeypatch.setattr(keyring_module, "load_key_file", read_slowly)
    write(path, entry("b", "two"))
    assert await knows(keyring, "one")  # which starts the checks
    assert await asyncio.to_thread(begun.wait, 30)

    assert await knows(keyring, "one")
    assert not await knows(keyring, "two")
    may_end.set()
    await until(lambda: knows(keyring, "two"))
    await keyring.close()


async def test_a_key_has_expired_at_the_moment_of_its_expiry(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    moment = datetime.now(UTC)
    write(path, entry("old", "one", f", expires: '{moment.isoformat()}'"))
    keyring = Keyring(Settings(api_keys_file=path))

    assert not await knows(keyring, "one")
    await keyring.close()


async def test_one_task_checks_the_file_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    write(path, entry("a", "one"))
    keyring = Keyring(Settings(api_keys_file=path))
    before = asyncio.all_tasks()

    keyring.watch()
    keyring.watch()
    assert await knows(keyring, "one")

    (watching,) = asyncio.all_tasks() - before
    await keyring.close()
    assert watching.cancelled()


async def test_without_a_file_nothing_is_checked() -> None:
    keyring = Keyring(Settings(api_keys=["one"]))
    before = asyncio.all_tasks()

    keyring.watch()
    assert await knows(keyring, "one")

    assert asyncio.all_tasks() == before
    await keyring.close()


async def test_a_client_is_found_by_its_name_while_its_key_is_valid(tmp_path: Path, checks_often: None) -> None:
    """A batch does this: after a restart, it may continue before any request arrives."""
    path = tmp_path / "keys.yaml"
    old = entry("old", "two", ", expires: 2020-01-01")
    write(path, old, entry("first", "one"), entry("other", "three", ", expires: 2999-01-01"))
    keyring = Keyring(Settings(api_keys_file=path))

    def found(name: str) -> str | None:
        client = keyring.named(name)
        return None if client is None else client.name

    assert [found(name) for name in ("first", "other", "old", "unknown")] == ["first", "other", None, None]
    anyone = Keyring(Settings()).named("anyone")
    assert anyone is not None
    assert anyone.name == "anyone"

    write(path, old, entry("second", "five"))

    async def is_noticed() -> bool:
        return found("first") is None

    await until(is_noticed)
    assert [found(name) for name in ("old", "second")] == [None, "second"]
    await keyring.close()


@pytest.mark.parametrize("settings", [{}, {"api_keys": "client-key"}])
async def test_a_lent_key_is_invalid_after_it_is_taken_back(settings: dict[str, str]) -> None:
    keyring = Keyring(Settings(**settings))
    key, take_back = keyring.lend("comparison")

    lent = await keyring.identify(key_digest(key), "address")
    take_back()
    take_back()

    assert (lent.name, lent.models) == ("comparison" if settings else "address", None)
    if settings:
        with pytest.raises(Unauthorized):
            await keyring.identify(key_digest(key), "address")
