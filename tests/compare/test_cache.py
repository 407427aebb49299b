"""What was stored is read back, whatever happened to the process or to the end of the file."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gateway.compare.cache import VectorCache, VectorFile
from gateway.errors import CompareError

IDENTITY = {"space": "mini@0123456789ab", "task": None}
WIDTH = 3
RECORD_BYTES = 16 + 4 * WIDTH


def vectors(*numbers: float) -> np.ndarray:
    return np.array([[number] * WIDTH for number in numbers], dtype=np.float32)


def stored_file(folder: Path) -> Path:
    (path,) = folder.glob("*.vectors")
    return path


def test_vectors_are_read_in_the_order_of_the_texts(tmp_path: Path) -> None:
    with VectorCache(tmp_path) as cache:
        file = cache.file(IDENTITY, WIDTH)
        file.append(["a", "b"], vectors(1, 2))
        file.append(["", "\ud83d"], vectors(3, 4))
        assert "a" in file
        assert "c" not in file
        read = file.read(["\ud83d", "b", "a", "b", ""])
    assert read.dtype == np.float32
    assert read[:, 0].tolist() == [4, 2, 1, 2, 3]


def test_another_run_finds_them_and_says_how_many(tmp_path: Path) -> None:
    """Vectors of this run are not counted, nor is one that is read twice."""
    with VectorCache(tmp_path) as cache:
        cache.file(IDENTITY, WIDTH).append(["a", "b"], vectors(1, 2))
        cache.file(IDENTITY, WIDTH).read(["a", "b"])
        assert cache.num_reused == 0
    with VectorCache(tmp_path) as cache:
        file = cache.file(IDENTITY, WIDTH)
        file.append(["c"], vectors(3))
        assert file.read(["a", "c"])[:, 0].tolist() == [1, 3]
        file.read(["a"])
        assert cache.num_reused == 1


def test_a_file_next_to_the_vectors_names_what_they_depend_on(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    with VectorCache(folder) as cache:
        cache.file(IDENTITY, WIDTH)
    assert json.loads(stored_file(folder).with_suffix(".json").read_text()) == IDENTITY


def test_an_empty_file_has_nothing(tmp_path: Path) -> None:
    with VectorCache(tmp_path) as cache:
        file = cache.file(IDENTITY, WIDTH)
        assert "a" not in file
        assert file.read([]).shape == (0, WIDTH)
        with pytest.raises(KeyError):
            file.read(["a"])


@pytest.mark.parametrize("torn_bytes", [1, 15, 16, RECORD_BYTES - 1])
def test_a_torn_record_is_cut_off(tmp_path: Path, torn_bytes: int) -> None:
    with VectorCache(tmp_path) as cache:
        cache.file(IDENTITY, WIDTH).append(["a", "b"], vectors(1, 2))
    path = stored_file(tmp_path)
    path.write_bytes(path.read_bytes()[: RECORD_BYTES + torn_bytes])
    with VectorCache(tmp_path) as cache:
        file = cache.file(IDENTITY, WIDTH)
        assert "b" not in file
        file.append(["b"], vectors(5))
        assert file.read(["a", "b"])[:, 0].tolist() == [1, 5]
    assert path.stat().st_size == 2 * RECORD_BYTES


def test_another_identity_is_another_file(tmp_path: Path) -> None:
    with VectorCache(tmp_path) as cache:
        cache.file(IDENTITY, WIDTH).append(["a"], vectors(1))
        assert "a" not in cache.file(IDENTITY | {"task": "retrieval.query"}, WIDTH)
        assert "a" in cache.file(dict(reversed(IDENTITY.items())), WIDTH)


def test_two_processes_cannot_write_to_one_file(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from gateway.compare.cache import VectorCache
VectorCache(Path({str(tmp_path)!r})).file({IDENTITY!r}, {WIDTH})
"""
    with VectorCache(tmp_path) as cache:
        cache.file(IDENTITY, WIDTH)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another comparison is writing to" in run.stderr
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_killed_process_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
import numpy as np
from gateway.compare.cache import VectorCache
VectorCache(Path({str(tmp_path)!r})).file({IDENTITY!r}, {WIDTH}).append(["a"], np.ones((1, {WIDTH})))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode < 0
    with VectorCache(tmp_path) as cache:
        assert cache.file(IDENTITY, WIDTH).read(["a"]).tolist() == [[1] * WIDTH]


def test_a_process_that_is_killed_while_it_writes_loses_its_last_record_at_most(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import numpy as np
from gateway.compare.cache import VectorCache
file = VectorCache(Path({str(tmp_path)!r})).file({IDENTITY!r}, {WIDTH})
for number in range(1_000_000):
    file.append([str(number)], np.full((1, {WIDTH}), number))
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 500:
                process.kill()
                break
        last = max([500, *(int(line) for line in process.stdout if line.endswith(b"\n"))])
    with VectorCache(tmp_path) as cache:
        file = cache.file(IDENTITY, WIDTH)
        assert file.read([str(number) for number in range(last + 1)])[:, 0].tolist() == list(range(last + 1))
        file.append(["more"], vectors(7))
    assert stored_file(tmp_path).stat().st_size % RECORD_BYTES == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with VectorCache(tmp_path / "file" / "cache") as cache, pytest.raises(CompareError, match="cannot be written"):
        cache.file(IDENTITY, WIDTH)


class FullDisk(io.BytesIO):
    name = "full.vectors"

    def write(self, _content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said() -> None:
    with pytest.raises(CompareError, match=r"the cache full\.vectors cannot be written: No space left on device"):
        VectorFile(FullDisk(), WIDTH).append(["a"], vectors(1))


# ------------------------------------------------------------------------------------------- several rows for each text

ROW = np.dtype(("<f2", (WIDTH,)))


def rows(*lengths: int) -> list[np.ndarray]:
    """Return rows for a text of each length, which count up."""
    counted = np.arange(sum(lengths), dtype=np.float32).reshape(-1, 1).repeat(WIDTH, 1)
    return np.split(counted, np.cumsum(lengths)[:-1])


def test_rows_are_read_in_the_order_of_the_texts(tmp_path: Path) -> None:
    with VectorCache(tmp_path) as cache:
        file = cache.ragged(IDENTITY, ROW)
        file.append(["a", "none", "b"], rows(2, 0, 3))
        file.append(["c"], [np.full((1, WIDTH), 9, np.float32)])
        read = file.read(["c", "b", "none", "a"])
        assert [one[:, 0].tolist() for one in map(read.__getitem__, range(4))] == [[9], [2, 3, 4], [], [0, 1]]
        assert read[0].dtype == np.float16
        assert len(read) == 4
        assert read.bytes_per_text == 6 / 4 * WIDTH * 2
        assert ("none" in file, "d" in file) == (True, False)
        assert cache.num_reused == 0
    with VectorCache(tmp_path) as cache:
        file = cache.ragged(IDENTITY, ROW)
        file.append(["d"], [np.full((2, WIDTH), 7, np.float32)])
        read = file.read(["d", "a", "c", "a"])
        assert [one[:, 0].tolist() for one in map(read.__getitem__, range(4))] == [[7, 7], [0, 1], [9], [0, 1]]
        assert cache.num_reused == 2


@pytest.mark.parametrize(
    ("file_name", "num_lost_bytes"), [("index", 1), ("index", 24), ("rows", 1), ("rows", 2 * WIDTH * 2)]
)
def test_rows_that_an_interruption_cut_short_are_written_again(
    tmp_path: Path, file_name: str, num_lost_bytes: int
) -> None:
    with VectorCache(tmp_path) as cache:
        cache.ragged(IDENTITY, ROW).append(["a", "b"], rows(2, 3))
    (path,) = tmp_path.glob(f"*.{file_name}")
    path.write_bytes(path.read_bytes()[:-num_lost_bytes])
    with VectorCache(tmp_path) as cache:
        file = cache.ragged(IDENTITY, ROW)
        assert ("a" in file, "b" in file) == (True, False)
        file.append(["b"], [np.full((1, WIDTH), 5, np.float32)])
        read = file.read(["b", "a"])
        assert [read[0][:, 0].tolist(), read[1][:, 0].tolist()] == [[5], [0, 1]]


def test_texts_without_rows(tmp_path: Path) -> None:
    """A query of unknown words has no weights."""
    with VectorCache(tmp_path) as cache:
        file = cache.ragged(IDENTITY, ROW)
        file.append(["a"], rows(0))
        assert file.read(["a"])[0].shape == (0, WIDTH)
    with VectorCache(tmp_path) as cache:
        assert cache.ragged(IDENTITY, ROW).read(["a"])[0].shape == (0, WIDTH)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from gateway.compare.cache import VectorCache
from gateway.compare.judge.store import GradeStore, StoredGrade
from gateway.errors import CompareError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
folder = Path(sys.argv[1])
for name in ("vectors", "rows", "grades"):
    try:
        with VectorCache(folder) as cache, GradeStore(folder, {}) as grades:
            for number in range(100):
                if name == "vectors":
                    cache.file({"a": 1}, 8).append([str(number)], np.zeros((1, 8), np.float32))
                elif name == "rows":
                    cache.ragged({"a": 2}, np.dtype("<f4")).append([str(number)], [np.zeros(8, np.float32)])
                else:
                    grades.add(str(number), "text", StoredGrade(1, "model"))
    except CompareError as error:
        sys.stderr.write(f"{name}: {error}\\n")
"""


def test_a_full_disk_is_said_and_is_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=False, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["vectors", "rows", "grades"], done.stderr
    assert all(line.endswith("cannot be written: File too large") for line in lines)
