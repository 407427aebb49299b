"""Entries of the cache of compiled models: whole or absent, dropped when unused, and never the end of a start."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.engine.compiled_cache import CompiledCache, key_of

KEY = key_of({"model": "a"})


def write(content: str) -> Callable[[Path], None]:
    def _write(folder: Path) -> None:
        (folder / "model.bin").write_text(content)
        (folder / "inputs.json").write_text("{}")

    return _write


@pytest.fixture
def cache(tmp_path: Path) -> CompiledCache:
    return CompiledCache(tmp_path / "compiled")


def test_an_entry_is_found_once_it_is_stored(cache: CompiledCache) -> None:
    assert cache.find(KEY) is None
    cache.store(KEY, 10, write("weights"))
    entry = cache.find(KEY)
    assert entry is not None
    assert (entry / "model.bin").read_text() == "weights"
    assert cache.find(key_of({"model": "b"})) is None


def test_only_the_user_can_read_the_folder_and_nothing_else_is_left_in_it(cache: CompiledCache, tmp_path: Path) -> None:
    cache.store(KEY, 10, write("weights"))
    assert (tmp_path / "compiled").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "compiled").iterdir()] == [KEY]


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "no digests", "no entry"])
def test_a_damaged_entry_is_not_used_and_can_be_stored_again(cache: CompiledCache, tmp_path: Path, damage: str) -> None:
    cache.store(KEY, 10, write("weights"))
    entry = tmp_path / "compiled" / KEY
    match damage:
        case "changed":
            (entry / "model.bin").write_text("weightz")
        case "cut":
            (entry / "model.bin").write_text("wei")
        case "missing":
            (entry / "model.bin").unlink()
        case "no digests":
            (entry / "entry.json").unlink()
        case "no entry":
            shutil.rmtree(entry)
    assert cache.find(KEY) is None
    cache.store(KEY, 10, write("weights"))
    assert cache.find(KEY) == entry


@pytest.mark.parametrize("content", ["[]", "no JSON", '{"../../etc/passwd": "0"}', '{"model.bin": 3}', "null"])
def test_an_entry_with_strange_digests_is_not_used(cache: CompiledCache, tmp_path: Path, content: str) -> None:
    cache.store(KEY, 10, write("weights"))
    (tmp_path / "compiled" / KEY / "entry.json").write_text(content)
    assert cache.find(KEY) is None
    cache.store(KEY, 10, write("weights"))
    assert cache.find(KEY) is not None


def test_a_process_that_is_slower_keeps_the_entry_of_the_faster(cache: CompiledCache) -> None:
    def write_late(folder: Path) -> None:
        cache.store(KEY, 10, write("first"))
        write("second")(folder)

    cache.store(KEY, 10, write_late)
    entry = cache.find(KEY)
    assert entry is not None
    assert (entry / "model.bin").read_text() == "first"


def test_an_entry_that_was_not_used_for_a_month_goes_when_another_comes(cache: CompiledCache, tmp_path: Path) -> None:
    other = key_of({"model": "b"})
    cache.store(KEY, 10, write("weights"))
    cache.store(other, 10, write("weights"))
    for key, days in ((KEY, 31), (other, 31)):
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / "compiled" / key, (then, then))
    assert cache.find(other) is not None  # which is a use
    cache.store(key_of({"model": "c"}), 10, write("weights"))
    assert cache.find(KEY) is None
    assert cache.find(other) is not None


def test_files_of_others_in_the_folder_stay(cache: CompiledCache, tmp_path: Path) -> None:
    """An operator may name a folder that is not for this cache alone, such as /var/cache."""
    theirs = [tmp_path / "compiled" / name for name in ("photos", "fedcba98", KEY.upper())]
    then = time.time() - 365 * 24 * 3600
    for folder in theirs:
        folder.mkdir(parents=True)
        (folder / "file").write_text("theirs")
        os.utime(folder, (then, then))
    left_over = tmp_path / "compiled" / ".new-of-a-crash"
    left_over.mkdir()
    os.utime(left_over, (then, then))
    cache.store(KEY, 10, write("weights"))
    assert [(folder / "file").read_text() for folder in theirs] == ["theirs"] * 3
    assert not left_over.exists()
    assert cache.find(KEY) is not None


def test_an_entry_that_cannot_be_written_is_used(cache: CompiledCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an image, on a read-only disk, or filled by another user."""
    cache.store(KEY, 10, write("weights"))

    def refuse(_path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.find(KEY) is not None
    assert cache.find(KEY) is not None


def test_an_entry_that_vanishes_in_between_is_no_obstacle(
    cache: CompiledCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "compiled"
    gone, present = folder / ".new-of-another-process", Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: [*([gone] if path == folder else []), *present(path)])
    cache.store(KEY, 10, write("weights"))
    assert cache.find(KEY) is not None


def test_nothing_is_stored_on_a_full_disk(cache: CompiledCache, tmp_path: Path) -> None:
    cache.store(KEY, shutil.disk_usage(tmp_path).free, write("weights"))
    assert cache.find(KEY) is None


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = CompiledCache(tmp_path / "file" / "compiled")
    cache.store(KEY, 10, write("weights"))
    assert cache.find(KEY) is None


def test_a_name_that_no_disk_takes_keeps_nothing(tmp_path: Path) -> None:
    cache = CompiledCache(tmp_path / ("x" * 300))
    assert cache.find(KEY) is None
    cache.store(KEY, 10, write("weights"))
    assert cache.find(KEY) is None


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("as OpenVINO says it")])
def test_a_write_that_fails_leaves_nothing(cache: CompiledCache, tmp_path: Path, error: Exception) -> None:
    def fail(folder: Path) -> None:
        write("weights")(folder)
        raise error

    cache.store(KEY, 10, fail)
    assert list((tmp_path / "compiled").iterdir()) == []


def test_without_a_folder_nothing_is_kept() -> None:
    cache = CompiledCache(None)
    cache.store(KEY, 10, write("weights"))
    assert cache.find(KEY) is None
