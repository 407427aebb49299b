"""Sources that change while a job reads them, links between folders, and two jobs that write into one folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gateway.bulk.files.folder import FolderSink
from gateway.bulk.files.sinks import open_folder
from gateway.bulk.rows import BulkError
from tests.bulk.test_file_sinks import NOTE, embedded, rows
from tests.bulk.test_file_sources import RECORDS, WRITERS, opened, rows_of, write_jsonl


def _replace(path: Path, other: Path) -> None:
    """Put another file in the place of a file, with the same size and time, as a program that restores times does."""
    before = path.stat()
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    content = bytearray(other.read_bytes())
    content[-2] ^= 1
    other.write_bytes(content)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def _truncate(path: Path, _other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _append(path: Path, _other: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"id": "late", "text": "late"}\n')


def _rename(path: Path, other: Path) -> None:
    path.rename(other)


def _delete(path: Path, _other: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [_replace, _truncate, _append, _rename, _delete])
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_that_changes_while_it_is_read_ends_the_reading(
    name: str, change: Callable[[Path, Path], None], is_folder: bool, tmp_path: Path
) -> None:
    path = WRITERS[name](tmp_path / name)
    write_jsonl(tmp_path / "zz.jsonl", [{"id": "last", "text": "x"}])
    source = opened(tmp_path if is_folder else path)
    source.fingerprint()
    reading = source.read()
    next(reading)
    change(path, tmp_path / "_other")
    with pytest.raises(
        BulkError, match=r"docs\.\S+: (was modified while it was being read|no such file|cannot be read)"
    ):
        list(reading)


def test_other_rights_and_another_link_are_not_another_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs.jsonl")
    source = opened(path)
    source.fingerprint()
    reading = source.read()
    next(reading)
    path.chmod(0o600)
    os.link(path, tmp_path / "backup")
    assert len(list(reading)) == len(RECORDS) - 1


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
def test_a_file_of_another_filesystem_that_changes_while_it_is_read_ends_the_reading(name: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    writer = WRITERS["docs.parquet" if name.endswith("parquet") else "docs.jsonl"]
    content = writer(tmp_path / name).read_bytes()
    memory.pipe_file(f"/bulk-changes/{name}", content)
    source = opened(f"memory://bulk-changes/{name}")
    source.fingerprint()
    reading = source.read()
    next(reading)
    memory.pipe_file(f"/bulk-changes/{name}", content)
    with pytest.raises(BulkError, match=rf"{name}: was modified while it was being read"):
        list(reading)


class _Listed(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem that answers all questions about files by listing their folder, as that of the Hub does."""

    protocol = "hf"
    cachable = False
    num_listings = 0
    opened: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("hf://")))

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> Any:
        if path not in self.dircache:
            _Listed.num_listings += 1
            self.dircache[path] = [dict(entry) for entry in super().ls(path, detail=True)]
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def info(self, path: str, **kwargs: object) -> Any:
        path = self._strip_protocol(path)
        found = [entry for entry in self.ls(self._parent(path)) if entry["name"] == path]
        return found[0] if found else super().info(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> Any:
        self.opened.append(path)
        return super()._open(path, mode, **kwargs)


def test_many_files_elsewhere_cost_one_listing_and_one_opening_before_the_first_row() -> None:
    fsspec.register_implementation("hf", _Listed, clobber=True)
    memory = fsspec.filesystem("memory")
    for number in range(50):
        memory.pipe_file(f"/many/{number:02}.jsonl", b'{"id": %d, "text": "x"}\n' % number)
    _Listed.num_listings = 0
    _Listed.opened.clear()
    source = opened("hf://many/*.jsonl")
    source.fingerprint()
    assert _Listed.num_listings < 5
    assert _Listed.opened == ["/many/00.jsonl"]
    reading = source.read()
    next(reading)
    memory.pipe_file("/many/00.jsonl", b'{"id": 1000, "text": "x"}\n')
    with pytest.raises(BulkError, match=r"00\.jsonl: was modified while it was being read"):
        list(reading)


# ------------------------------------------------------------------------------------------------------------ places


def test_links_to_folders_and_files_are_followed_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "elsewhere" / "deep" / "a.jsonl", RECORDS[:2])
    write_jsonl(tmp_path / "other.jsonl", RECORDS[2:4])
    folder = tmp_path / "docs"
    write_jsonl(folder / "z.jsonl", RECORDS[4:5])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "file.jsonl").symlink_to(tmp_path / "other.jsonl")
    (folder / "linked" / "deep" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder)
    assert [row.id for row in rows_of(opened(folder))] == ["d2", "d3", "d0", "d1", "d4"]


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("gone"), os.mkfifo, lambda path: path.symlink_to(path)])
def test_an_entry_of_a_folder_that_cannot_be_read_is_named_and_not_left_out(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "docs" / "a.jsonl")
    make(tmp_path / "docs" / "b.jsonl")
    for place in (tmp_path / "docs", f"{tmp_path}/docs/*.jsonl"):
        with pytest.raises(BulkError, match=r"b\.jsonl: (no such file|cannot be read)"):
            list(opened(place).read())


def test_the_same_file_under_two_names_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs" / "a.jsonl")
    (tmp_path / "docs" / "loop").symlink_to(tmp_path / "docs")
    (tmp_path / "latest.jsonl").symlink_to(path)
    for places in (
        [f"{tmp_path}/docs/**/*.jsonl"],
        [path, tmp_path / "latest.jsonl"],
        [path, f"{tmp_path}/docs/../docs"],
    ):
        with pytest.raises(BulkError, match=r"is the same file as .*a\.jsonl, so each of its rows would be read twice"):
            opened(*places)


def test_folders_with_the_names_of_files_match_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark writes ``docs.parquet`` as a folder."""
    for number in range(2):
        part = tmp_path / f"{number}.parquet" / "part-0.parquet"
        part.parent.mkdir()
        pq.write_table(pa.Table.from_pylist([{"id": number, "text": "x"}]), part)
        (part.parent / "_SUCCESS").touch()
    write_jsonl(tmp_path / "2.jsonl", [{"id": 2, "text": "x"}])
    assert [row.id for row in rows_of(opened(f"{tmp_path}/*"))] == [0, 1, 2]
    assert [row.id for row in rows_of(opened(f"{tmp_path}/**"))] == [0, 1, 2]
    monkeypatch.chdir(tmp_path)
    for place in ("**", "./**", "./*", f"../{tmp_path.name}/**", f"{tmp_path}//**"):
        assert [row.id for row in rows_of(opened(place))] == [0, 1, 2]


def test_entries_that_cannot_be_sources_do_not_matter(tmp_path: Path) -> None:
    """A disk's root has a folder for the system alone, which users cannot read."""
    write_jsonl(tmp_path / "docs.jsonl")
    (tmp_path / "lost+found").mkdir(mode=0o000)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "README").symlink_to("gone")
    places = [str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/*.jsonl"]
    code = (
        "import os, sys; from gateway.bulk.fields import FieldNames; from gateway.bulk.files import source; "
        "os.geteuid() or os.setuid(65534); "
        "print([len(list(source.open_files([place], FieldNames()).read())) for place in sys.argv[1:]])"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    found = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == (f"{[len(RECORDS)] * 3}\n", "")


def test_links_in_a_circle_are_an_error_and_no_traceback(tmp_path: Path) -> None:
    for name in ("loop.jsonl", "out"):
        (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(BulkError, match=r"loop\.jsonl: cannot be read: Too many levels of symbolic links"):
        opened(tmp_path / "loop.jsonl")
    write_jsonl(tmp_path / "docs.jsonl")
    sink = open_folder(str(tmp_path / "out"), "text")
    with pytest.raises(BulkError, match=r"out: the folder cannot be created: "):
        sink.check_files([], None)
    with pytest.raises(BulkError, match="~absent-user/out: no such home folder; write the whole path"):
        open_folder("~absent-user/out", "text")


def test_a_file_of_a_wrong_format_ends_the_job_before_the_first_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    for name, content, problem in [
        ("b.jsonl", b'[{"id": 1}]', "is a JSON array"),
        ("b.csv", b"", "is empty"),
        ("b.parquet", b"PAR1 not really", "is not a Parquet file"),
        ("b.jsonl.gz", b"not packed", "Not a gzipped file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BulkError, match=problem):
            opened(tmp_path)
        (tmp_path / name).unlink()


# ------------------------------------------------------------------------------------------- fields called like columns


@pytest.mark.parametrize("ending", ["", ".jsonl"])
def test_fields_with_the_names_of_the_id_and_the_text_stay_fields(ending: str, tmp_path: Path) -> None:
    """The rows of one folder of vectors are the source of the next, twice."""
    record = {"key": "k1", "id": 99, "meta": {"text": "embed me"}, "text": "a title", "_rest": "r", "n": 1}
    source = opened(write_jsonl(tmp_path / "docs.jsonl", [record]), id="key", text="meta.text")
    [first] = rows_of(source)
    expected = {"id": 99, "text": "a title", "_rest": "r", "n": 1, "meta": {}}
    assert (first.id, first.text, first.payload) == ("k1", "embed me", expected)
    row, field = first, "meta.text"
    for number in range(2):
        place = tmp_path / f"out{number}{ending}"
        with closing(open_folder(str(place), field)) as sink:
            sink.open(NOTE)
            sink.write(0, embedded([row]))
        [row] = rows_of(opened(place))
        field = "text"
        assert (row.id, row.text) == ("k1", "embed me")
        assert row.payload["id"] == 99
        assert "a title" in str(row.payload["_rest"])
        assert row.payload["n"] == 1


# ---------------------------------------------------------------------------------------------- two jobs, one folder


@pytest.fixture(params=["out", "out.jsonl"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.fixture
def pair(folder: Path) -> Iterator[tuple[FolderSink, FolderSink]]:
    with closing(open_folder(str(folder), "text")) as one, closing(open_folder(str(folder), "text")) as other:
        yield one, other


def test_one_job_at_a_time_writes_into_a_folder(pair: tuple[FolderSink, FolderSink]) -> None:
    one, other = pair
    one.check_files([], None)
    with pytest.raises(BulkError, match="another job writes into this folder: choose another one"):
        other.check_files([], None)
    one.close()
    other.check_files([], None)


def test_a_file_that_another_job_wrote_in_a_bucket_is_not_replaced() -> None:
    """There are no locks in a bucket."""
    place = "memory://bulk-two-jobs/out.jsonl"
    one, other = open_folder(place, "text"), open_folder(place, "text")
    for sink in (one, other):
        sink.check_files([], None)
        sink.open(NOTE)
    one.write(0, embedded(rows({"a": 1})))
    one.write(0, embedded(rows({"a": 1})))  # its own file again
    with pytest.raises(BulkError, match=r"another job has written part-00000\.jsonl in the meantime"):
        other.write(0, embedded(rows({"b": 2})))
    again = open_folder(place, "text")
    again.check_files([], 0)  # a killed process of this job may have written it
    again.open(NOTE)
    again.write(0, embedded(rows({"a": 1})))
