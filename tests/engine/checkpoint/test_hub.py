"""Repositories of the hub are described, fetched and resumed; a small hub on this machine answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants
from structlog.testing import capture_logs

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint import fetch as fetching
from gateway.engine.checkpoint import hub as hub_files
from gateway.engine.checkpoint.fetch import Progress, fetch
from gateway.engine.checkpoint.hub import Repository, describe, format_size, mark_begun
from gateway.engine.checkpoint.sources import is_cached, is_whole, locate
from gateway.errors import LicenseNotAccepted, LoadError
from tests.hub import COMMIT, LARGE, Hub, Repo

WEIGHTS = os.urandom(5 * LARGE)
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}" * LARGE,
    "model.safetensors": WEIGHTS,
    "1_Pooling/config.json": b"{}",
    # Files that the gateway does not read.
    "pytorch_model.bin": WEIGHTS[:LARGE],
    "onnx/model.onnx": WEIGHTS[LARGE:],
    "README.md": b"# A model",
}
NEEDED = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
NUM_BYTES = sum(len(FILES[name]) for name in NEEDED)
NAME = "owner/model"


@pytest.fixture
def hub(empty_hub: Hub) -> Hub:
    """Give an empty cache, and a hub with one repository."""
    empty_hub.repos[NAME] = Repo(FILES, {"license": "mit"})
    return empty_hub


def entry(**more: object) -> ModelEntry:
    return ModelEntry.model_validate({"id": "m", "source": NAME, "revision": COMMIT, **more})


class Stopped(BaseException):
    """Ends a download as Ctrl-C does."""


def stop_after(num_bytes: int) -> Progress:
    def report(done: int, _total: int) -> None:
        if done > num_bytes:
            raise Stopped

    return report


def partial_file(cache: Path) -> Path:
    [found] = cache.glob("models--owner--model/blobs/*.gateway-partial")
    return found


# ---------------------------------------------------------------------------------------------------------- a download


def test_the_files_that_are_read_are_fetched_and_no_others(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []

    repository = describe(NAME, COMMIT)
    folder = fetch(repository, lambda done, total: seen.append((done, total)))

    assert (repository.num_bytes, repository.license) == (NUM_BYTES, "mit")
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        **{name: FILES[name] for name in NEEDED},
        ".gateway-complete": "\n".join((*hub_files._FILES, "", *hub_files.IGNORED)).encode(),
    }
    assert hub.fetched() == NEEDED
    assert describe(NAME, COMMIT).missing_bytes == 0
    assert seen[-1] == (NUM_BYTES, NUM_BYTES)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_downloaded_files_are_found_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files of the repository are missing, but the gateway does not read them."""
    assert not is_cached(entry())
    folder = locate(entry())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()

    assert is_cached(entry())
    assert locate(entry(), may_download=False) == folder
    assert locate(entry()) == folder
    assert hub.requests == []


def test_files_that_an_earlier_release_did_not_read_are_fetched_if_the_hub_answers(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME] = Repo({**FILES, "chat_template.jinja": b"{{ messages }}"})
    with monkeypatch.context() as patch:
        patch.setattr(hub_files, "_FORM", "")
        patch.setattr(hub_files, "_FILES", tuple(name for name in hub_files._FILES if name != "*.jinja"))
        folder = locate(entry())
    assert not (folder / "chat_template.jinja").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(entry()) == locate(entry(), may_download=False) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.requests.clear()

    assert locate(entry()) == folder
    assert hub.fetched() == ["chat_template.jinja"]
    hub.requests.clear()
    assert locate(entry()) == folder
    assert hub.requests == []


def copied(cache: Path, *names: str, absent: Sequence[str] = ()) -> Path:
    """Put files of the repository into the cache as another program does, which notes the files that do not exist."""
    repository = cache / "models--owner--model"
    folder = repository / "snapshots" / COMMIT
    places = [folder / name for name in ("config.json", "model.safetensors", *names)]
    for path in (*places, *(repository / ".no_exist" / COMMIT / name for name in absent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES.get(path.name, b""))
    return folder


BY_ST = ("modules.json", "config_sentence_transformers.json")


@pytest.mark.parametrize(
    ("names", "absent", "lacking"),
    [
        pytest.param([], [], "modules.json", id="by transformers"),
        pytest.param(["modules.json"], [], "config_sentence_transformers.json", id="interrupted"),
        pytest.param([*BY_ST, ".gateway-begun"], [], "a file that was still to be downloaded", id="interrupted here"),
        pytest.param(BY_ST, [], "", id="by sentence-transformers"),
        pytest.param([], BY_ST, "", id="by sentence-transformers, of a plain model"),
        pytest.param([".gitattributes"], [], "", id="the whole repository"),
    ],
)
def test_a_copy_of_another_program_is_taken_without_the_hub_if_it_can_lack_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: Sequence[str], absent: Sequence[str], lacking: str
) -> None:
    """Without `modules.json`, a model that pools the first token would get vectors that are averages."""
    folder = copied(tmp_path / "cache", *names, absent=absent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert is_cached(entry())
    assert is_whole(entry()) is not bool(lacking)
    if not lacking:
        assert locate(entry()) == locate(entry(), may_download=False) == folder
        return
    with pytest.raises(LoadError, match=f"HF_HUB_OFFLINE is set.* may lack {lacking}, on which the vectors depend"):
        locate(entry())
    with pytest.raises(LoadError, match=f"downloaded only in part.* may lack {lacking}"):
        locate(entry(), may_download=False)


def test_what_a_copy_of_another_program_lacks_is_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = copied(tmp_path / "cache")

    assert locate(entry()) == folder

    assert is_whole(entry())
    assert (folder / "1_Pooling" / "config.json").read_bytes() == FILES["1_Pooling/config.json"]
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize("absent", [[], BY_ST])
def test_a_whole_copy_stays_usable_if_the_hub_fails_while_it_is_completed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: Sequence[str]
) -> None:
    folder = copied(tmp_path / "cache", "tokenizer.json", *([] if absent else [".gitattributes"]), absent=absent)

    def fail(repository: Repository, report: Progress) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return fetch(repository, report)

    monkeypatch.setattr("gateway.engine.checkpoint.sources.fetch", fail)

    assert locate(entry()) == folder
    assert not (folder / "1_Pooling").exists()
    assert is_whole(entry())
    assert locate(entry(), may_download=False) == folder


def test_a_copy_with_all_files_is_taken_from_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    folder = copied(tmp_path / "cache", *NEEDED)
    for name in (".gateway-begun", ".gateway-complete"):
        (folder / name).symlink_to(tmp_path / "absent" / name)  # so that even root cannot make it

    assert locate(entry()) == folder
    assert hub.fetched() == []


def test_a_download_whose_end_does_not_arrive_is_not_complete(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network fails between the weights and the small files."""

    def begin(folder: Path) -> None:
        mark_begun(folder)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with monkeypatch.context() as patch:
        patch.setattr("gateway.engine.checkpoint.fetch.mark_begun", begin)
        with pytest.raises(LoadError, match=r"was not downloaded|HF_HUB_OFFLINE"):
            fetch(describe(NAME, COMMIT))

    assert not is_whole(entry())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert locate(entry())
    assert is_whole(entry())


def test_weights_in_parts_are_found_without_the_hub_once_all_exist(hub: Hub) -> None:
    parts = {f"model-0000{number}-of-00002.safetensors": os.urandom(LARGE) for number in (1, 2)}
    hub.repos[NAME] = Repo({"config.json": b"{}", "model.safetensors.index.json": b"{}", **parts})

    folder = locate(entry())
    hub.repos.clear()

    assert locate(entry()) == folder


def test_a_stopped_download_continues_where_it_ended(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fetch(describe(NAME, COMMIT), stop_after(len(FILES["tokenizer.json"]) + LARGE))
    arrived = partial_file(tmp_path / "cache").stat().st_size
    hub.requests.clear()

    repository = describe(NAME, COMMIT)
    folder = fetch(repository)

    assert 0 < arrived < len(WEIGHTS)
    assert hub.ranges() == [f"bytes={arrived}-"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not list((tmp_path / "cache").rglob("*.gateway-partial"))


def test_a_connection_that_breaks_is_taken_up_again_in_the_same_download(hub: Hub) -> None:
    hub.cuts = [LARGE // 2, LARGE // 4]  # of the first file, twice

    folder = fetch(describe(NAME, COMMIT))

    assert hub.ranges() == ["", f"bytes={LARGE // 2}-", "bytes=70000-", ""]  # whole pieces are kept
    assert (folder / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]


def test_the_size_of_a_resumed_download_is_the_announced_rest(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fetch(describe(NAME, COMMIT), stop_after(LARGE))

    rest = describe(NAME, COMMIT).missing_bytes

    assert rest == NUM_BYTES - partial_file(tmp_path / "cache").stat().st_size


def test_bytes_that_were_changed_on_the_way_are_deleted(hub: Hub, tmp_path: Path) -> None:
    hub.corrupts = True

    with pytest.raises(
        LoadError, match=r"tokenizer\.json: the downloaded bytes have the sha256 .* a proxy or a mirror"
    ):
        fetch(describe(NAME, COMMIT))

    assert not list((tmp_path / "cache").rglob("*.gateway-partial"))
    hub.corrupts = False
    assert fetch(describe(NAME, COMMIT)).is_dir()


def test_a_partial_file_that_is_too_large_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(describe(NAME, COMMIT))
    [blob] = [path for path in (tmp_path / "cache").glob("*/blobs/*") if path.stat().st_size == len(WEIGHTS)]
    blob.with_name(f"{blob.name}.gateway-partial").write_bytes(WEIGHTS + b"more")
    (blob.parents[1] / "snapshots" / COMMIT / "model.safetensors").unlink()
    blob.unlink()

    assert (fetch(describe(NAME, COMMIT)) / "model.safetensors").read_bytes() == WEIGHTS


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_disk_without_room_is_reported_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "free_bytes", lambda _folder: 1000)

    with pytest.raises(
        LoadError, match=r"700 kB would be downloaded, but only 1 kB are free in .*cache: make room, or set HF_HOME"
    ):
        fetch(describe(NAME, COMMIT))

    assert hub.fetched() == []


def test_a_disk_that_is_full_in_the_middle_is_reported(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(LoadError, match=r"the disk of .*cache is full; make room, or set HF_HOME"):
        fetch(describe(NAME, COMMIT), full)


def test_a_folder_that_may_not_be_written_to_is_reported(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models--owner--model").write_text("a file where a folder must be")

    with pytest.raises(LoadError, match="cannot download from the model hub: "):
        fetch(describe(NAME, COMMIT))


@pytest.mark.parametrize(
    ("repo", "revision", "token", "message"),
    [
        pytest.param(None, COMMIT, "", "no such repository on http.* private and HF_TOKEN is not set", id="absent"),
        pytest.param(Repo(FILES), "f" * 40, "", r"no such revision; its commits are on .*/commits/main", id="revision"),
        pytest.param(
            Repo(FILES, token="right"), COMMIT, "wrong", "private and the token of HF_TOKEN may not", id="private"
        ),
        pytest.param(Repo(FILES, token="right"), COMMIT, "expired", "HF_TOKEN is wrong or has expired", id="expired"),
        pytest.param(
            Repo(FILES, token="right", is_gated=True),
            COMMIT,
            "",
            r"is gated; accept its terms on .*, and set HF_TOKEN",
            id="gated",
        ),
    ],
)
def test_a_refusal_of_the_hub_names_the_way_out(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, repo: Repo | None, revision: str, token: str, message: str
) -> None:
    hub.repos = {} if repo is None else {NAME: repo}
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(LoadError, match=message):
        locate(entry(revision=revision))


def test_the_token_is_sent_to_the_hub_and_not_to_the_host_of_the_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[NAME] = Repo(FILES, token="right")
    monkeypatch.setenv("HF_TOKEN", "right")

    assert (locate(entry()) / "model.safetensors").is_file()

    assert {path.split("/")[1] for _, path in hub.with_token} == {"api", "owner"}


def test_a_proxy_is_named_without_its_password(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://ada:secret@proxy.example:3128")

    with pytest.raises(LoadError) as caught:
        describe(NAME, COMMIT)

    assert "through HTTPS_PROXY=http://proxy.example:3128; HF_ENDPOINT sets a mirror" in str(caught.value)
    assert "secret" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- licenses


@pytest.mark.parametrize("license_name", ["cc-by-nc-4.0", "CC BY-NC-SA 4.0"])
@pytest.mark.parametrize("is_stated", [True, False], ids=["in models.yaml", "on the card"])
def test_weights_whose_license_forbids_commercial_use_are_not_fetched_unasked(
    hub: Hub, license_name: str, is_stated: bool
) -> None:
    hub.repos[NAME] = Repo(FILES, {} if is_stated else {"license": license_name})

    with pytest.raises(
        LicenseNotAccepted, match=rf"its license, {license_name}, forbids commercial use: .*license_accepted: true"
    ):
        locate(entry(license=license_name) if is_stated else entry())

    assert hub.fetched() == []
    assert (hub.requests == []) == is_stated  # the hub need not be asked


@pytest.mark.parametrize("yes", [{"license_accepted": True}, {"enabled": True}], ids=str)
def test_weights_whose_license_is_accepted_are_fetched_and_stay(hub: Hub, yes: dict[str, object]) -> None:
    licensed = entry(license="cc-by-nc-4.0", **yes)

    folder = locate(licensed)

    assert locate(entry(license="cc-by-nc-4.0")) == folder  # it is on this machine, so no request is needed


def test_the_license_that_has_no_standard_name_is_the_cards(hub: Hub) -> None:
    hub.repos[NAME] = Repo(FILES, {"license": "other", "license_name": "sarashina-non-commercial"})

    with pytest.raises(LicenseNotAccepted, match="sarashina-non-commercial"):
        locate(entry())


# ------------------------------------------------------------------------------------------------------------------- log


def test_a_download_is_announced_with_source_size_license_and_cache(hub: Hub, tmp_path: Path) -> None:
    reports: list[str] = []

    with capture_logs() as lines:
        locate(entry(), report=reports.append)

    [first, last] = lines
    assert {key: first[key] for key in ("event", "model", "source", "size", "license", "cache")} == {
        "event": "model_downloading",
        "model": "m",
        "source": f"{hub.url}/{NAME}",
        "size": "700 kB",
        "license": "mit",
        "cache": str(tmp_path / "cache"),
    }
    assert (last["event"], last["model"]) == ("model_downloaded", "m")
    assert reports[0].startswith("downloading: ")
    assert reports[0].endswith(" of 700 kB")


@pytest.mark.parametrize(
    ("num_bytes", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (90_900_000, "91 MB"), (2_289_000_000, "2.3 GB")]
)
def test_sizes_are_shown_in_decimal_units(num_bytes: int, shown: str) -> None:
    assert format_size(num_bytes) == shown


class Lying(Repo):
    """A repository of a mirror that changes its listed files."""

    def __init__(self, files: Mapping[str, bytes], **changes: object) -> None:
        super().__init__(files)
        self.changes = changes

    def sibling(self, name: str) -> dict[str, object]:
        found = super().sibling(name)
        if name == "model.safetensors":
            found |= self.changes
        return found


@pytest.mark.parametrize(
    "name", ["../../evil.json", "/etc/evil.json", "a//b.json", "./x.json", "a/../../b/config.json"]
)
def test_a_name_that_leads_out_of_the_cache_is_refused(hub: Hub, name: str, tmp_path: Path) -> None:
    hub.repos[NAME] = Repo({**FILES, name: b"{}"})
    with pytest.raises(LoadError, match="lists a file that no repository can have"):
        locate(entry())
    assert hub.fetched() == []
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"lfs": {"size": 5 * LARGE, "sha256": "../../../evil", "pointerSize": 134}},
        {"lfs": {"size": 5 * LARGE, "sha256": "A" * 64, "pointerSize": 134}},
        {"size": -1},
    ],
)
def test_a_hash_or_a_size_that_is_not_one_is_refused(hub: Hub, changes: dict[str, object], tmp_path: Path) -> None:
    hub.repos[NAME] = Lying(FILES, **changes)
    with pytest.raises(LoadError, match="lists a file that no repository can have"):
        locate(entry())
    assert not list(tmp_path.rglob("*evil*"))


def test_a_file_without_an_end_does_not_fill_the_disk(hub: Hub, tmp_path: Path) -> None:
    hub.repos[NAME] = Lying(FILES, size=LARGE)
    with pytest.raises(LoadError, match="the hub announced 100,000 bytes but sends more"):
        locate(entry())
    [partial] = tmp_path.rglob("*.gateway-partial")
    assert partial.stat().st_size == 0
