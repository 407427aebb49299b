"""Files are read without hanging, and replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config.files import UnsuitableFile, open_regular, read_bounded, user_folder, write_whole
from gateway.errors import StartError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_up_to_the_limit_is_read_and_a_larger_one_refused_with_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")

    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(UnsuitableFile) as caught:
        read_bounded(path, 4)
    assert caught.value.strerror == "has 5 bytes; the limit is 4"


@pytest.mark.parametrize(
    ("path", "kind"), [(Path("/"), "a folder"), (Path("/dev/zero"), "a device"), (Path("/dev/null"), "a device")]
)
def test_a_path_that_is_not_a_file_is_named(path: Path, kind: str) -> None:
    with pytest.raises(UnsuitableFile) as caught:
        open_regular(path)
    assert caught.value.strerror == f"must be a regular file, but is {kind}"


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    """Kubernetes mounts secrets this way."""
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")

    assert read_bounded(tmp_path / "link", 1) == b"x"


def test_a_file_is_replaced_with_its_permissions_through_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o604)
    link.symlink_to(path)

    write_whole(link, "new")

    assert path.read_text() == "new"
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert names(tmp_path) == ["a", "link"]


def test_a_new_file_has_the_permissions_that_were_asked_for(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", [b"x", b"y"], 0o600)

    assert (tmp_path / "a").read_bytes() == b"xy"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def lines() -> Iterator[bytes]:
        yield b"half of the new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, lines())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    seen: list[str] = []

    def lines() -> Iterator[bytes]:
        yield b"half "
        seen.append(path.read_text())
        yield b"new"

    write_whole(path, lines())

    assert seen == ["old"]
    assert path.read_text() == "half new"


def test_a_path_that_is_not_a_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UnsuitableFile):
        write_whole(tmp_path / "pipe", "new")
    assert names(tmp_path) == ["pipe"]


def test_the_error_for_a_user_without_a_home_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container that runs under a number that no user has."""

    def fail(_uid: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", fail)

    with pytest.raises(StartError, match=r"~/\.local/state is not known, .* no home folder: set XDG_STATE_HOME"):
        user_folder({"XDG_STATE_HOME": "state"}, "XDG_STATE_HOME", "~/.local/state")
    found = user_folder({"XDG_STATE_HOME": str(tmp_path)}, "XDG_STATE_HOME", "~/.local/state")
    assert found == tmp_path / "embedding-gateway"
