"""Stored values are read back, even after the process was killed or the file was cut."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gateway.cache.files import CacheError, CacheFolder, RowFile
from gateway.cache.keys import key_of

IDENTITY = {"space": "mini@0123456789ab", "task": None}
WIDTH = 3
VECTOR = np.dtype(("<f4", (WIDTH,)))


def vectors(*numbers: float) -> list[np.ndarray]:
    return [np.full((1, WIDTH), number, np.float32) for number in numbers]


def stored_file(folder: Path) -> Path:
    (path,) = folder.glob("*.rows")
    return path


def test_vectors_are_read_in_the_order_of_the_texts(tmp_path: Path) -> None:
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        file.append(["a", "b"], vectors(1, 2))
        file.append(["", "\ud83d"], vectors(3, 4))
        assert file.lacking(["a", "c", "b", "d", "c"]) == {"c", "d"}
        read = file.read(["\ud83d", "b", "a", "b", ""]).firsts()
    assert read.dtype == np.float32
    assert read[:, 0].tolist() == [4, 2, 1, 2, 3]


def test_another_run_finds_them_and_says_how_many(tmp_path: Path) -> None:
    """Vectors of this run are not counted, and a vector that is read twice counts once."""
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, VECTOR).append(["a", "b"], vectors(1, 2))
        cache.rows(IDENTITY, VECTOR).read(["a", "b"])
        assert cache.num_reused == 0
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        file.append(["c"], vectors(3))
        assert file.read(["a", "c"]).firsts()[:, 0].tolist() == [1, 3]
        file.read(["a"])
        assert cache.num_reused == 1


def test_a_file_next_to_the_vectors_lists_everything_that_they_depend_on(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    with CacheFolder(folder) as cache:
        cache.rows(IDENTITY, VECTOR)
    assert json.loads(stored_file(folder).with_suffix(".json").read_text()) == IDENTITY | {"row": "('<f4', (3,))"}


def test_an_empty_file_has_nothing(tmp_path: Path) -> None:
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        assert file.lacking(["a"]) == {"a"}
        assert file.lacking([]) == set()
        assert file.read([]).firsts().shape == (0, WIDTH)
        with pytest.raises(KeyError):
            file.read(["a"])


@pytest.mark.parametrize("torn_bytes", [1, 4, 4 * WIDTH - 1])
def test_a_torn_vector_is_cut_off(tmp_path: Path, torn_bytes: int) -> None:
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, VECTOR).append(["a", "b"], vectors(1, 2))
    path = stored_file(tmp_path)
    path.write_bytes(path.read_bytes()[: 4 * WIDTH + torn_bytes])
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        assert file.lacking(["a", "b"]) == {"b"}
        file.append(["b"], vectors(5))
        assert file.read(["a", "b"]).firsts()[:, 0].tolist() == [1, 5]
    assert path.stat().st_size == 2 * 4 * WIDTH


def test_another_identity_is_another_file(tmp_path: Path) -> None:
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, VECTOR).append(["a"], vectors(1))
        assert cache.rows(IDENTITY | {"task": "retrieval.query"}, VECTOR).lacking(["a"])
        assert cache.rows(IDENTITY, np.dtype("<f4")).lacking(["a"])
        assert not cache.rows(dict(reversed(IDENTITY.items())), VECTOR).lacking(["a"])


def test_two_processes_cannot_write_to_one_file(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import numpy as np
from gateway.cache.files import CacheFolder
CacheFolder(Path({str(tmp_path)!r})).rows({IDENTITY!r}, np.dtype(("<f4", ({WIDTH},))))
"""
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, VECTOR)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing to" in run.stderr
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_killed_process_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
import numpy as np
from gateway.cache.files import CacheFolder
CacheFolder(Path({str(tmp_path)!r})).rows({IDENTITY!r}, np.dtype(("<f4", ({WIDTH},)))).append(["a"], [np.ones((1, {WIDTH}))])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode < 0
    with CacheFolder(tmp_path) as cache:
        assert cache.rows(IDENTITY, VECTOR).read(["a"]).firsts().tolist() == [[1] * WIDTH]


def test_a_process_that_is_killed_while_it_writes_loses_its_last_record_at_most(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import numpy as np
from gateway.cache.files import CacheFolder
file = CacheFolder(Path({str(tmp_path)!r})).rows({IDENTITY!r}, np.dtype(("<f4", ({WIDTH},))))
for number in range(1_000_000):
    file.append([str(number)], [np.full((1, {WIDTH}), number)])
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 500:
                process.kill()
                break
        last = max([500, *(int(line) for line in process.stdout if line.endswith(b"\n"))])
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        assert file.read([str(number) for number in range(last + 1)]).firsts()[:, 0].tolist() == list(range(last + 1))
        file.append(["more"], vectors(7))
    assert stored_file(tmp_path).stat().st_size % (4 * WIDTH) == 0


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with CacheFolder(tmp_path / "file" / "cache") as cache, pytest.raises(CacheError, match="cannot be written"):
        cache.rows(IDENTITY, VECTOR)


class FullDisk(io.BytesIO):
    name = "full.rows"

    def write(self, _content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_reported() -> None:
    with pytest.raises(CacheError, match=r"the cache full\.rows cannot be written: No space left on device"):
        RowFile(io.BytesIO(), FullDisk(), VECTOR).append(["a"], vectors(1))


# ------------------------------------------------------------------------------------------- several rows for each text

ROW = np.dtype(("<f2", (WIDTH,)))


def rows(*lengths: int) -> list[np.ndarray]:
    """Return rows for a text of each length, which count up."""
    counted = np.arange(sum(lengths), dtype=np.float32).reshape(-1, 1).repeat(WIDTH, 1)
    return np.split(counted, np.cumsum(lengths)[:-1])


def test_rows_are_read_in_the_order_of_the_texts(tmp_path: Path) -> None:
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, ROW)
        file.append(["a", "none", "b"], rows(2, 0, 3))
        file.append(["c"], [np.full((1, WIDTH), 9, np.float32)])
        read = file.read(["c", "b", "none", "a"])
        assert [one[:, 0].tolist() for one in map(read.__getitem__, range(4))] == [[9], [2, 3, 4], [], [0, 1]]
        assert read[0].dtype == np.float16
        assert len(read) == 4
        assert read.bytes_per_text == 6 / 4 * WIDTH * 2
        assert file.lacking(["none", "d"]) == {"d"}
        assert cache.num_reused == 0
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, ROW)
        file.append(["d"], [np.full((2, WIDTH), 7, np.float32)])
        read = file.read(["d", "a", "c", "a"])
        assert [one[:, 0].tolist() for one in map(read.__getitem__, range(4))] == [[7, 7], [0, 1], [9], [0, 1]]
        assert cache.num_reused == 2


@pytest.mark.parametrize(
    ("file_name", "num_lost_bytes"), [("index", 1), ("index", 32), ("rows", 1), ("rows", 2 * WIDTH * 2)]
)
def test_rows_that_an_interruption_cut_short_are_written_again(
    tmp_path: Path, file_name: str, num_lost_bytes: int
) -> None:
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, ROW).append(["a", "b"], rows(2, 3))
    (path,) = tmp_path.glob(f"*.{file_name}")
    path.write_bytes(path.read_bytes()[:-num_lost_bytes])
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, ROW)
        assert file.lacking(["a", "b"]) == {"b"}
        file.append(["b"], [np.full((1, WIDTH), 5, np.float32)])
        read = file.read(["b", "a"])
        assert [read[0][:, 0].tolist(), read[1][:, 0].tolist()] == [[5], [0, 1]]


def test_texts_without_rows(tmp_path: Path) -> None:
    """A query of unknown words has no weights."""
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, ROW)
        file.append(["a"], rows(0))
        assert file.read(["a"])[0].shape == (0, WIDTH)
    with CacheFolder(tmp_path) as cache:
        assert cache.rows(IDENTITY, ROW).read(["a"])[0].shape == (0, WIDTH)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from gateway.cache.files import CacheFolder
from gateway.compare.judge.store import GradeStore, StoredGrade
from gateway.errors import StartError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
folder = Path(sys.argv[1])
for name in ("vectors", "rows", "grades"):
    try:
        with CacheFolder(folder) as cache, GradeStore(folder, {}) as grades:
            for number in range(100):
                if name == "vectors":
                    cache.rows({"a": 1}, np.dtype(("<f4", (8,)))).append([str(number)], [np.zeros((1, 8), np.float32)])
                elif name == "rows":
                    cache.rows({"a": 2}, np.dtype("<f4")).append([str(number)], [np.zeros(8, np.float32)])
                else:
                    grades.add(str(number), "text", StoredGrade(1, "model"))
    except StartError as error:
        sys.stderr.write(f"{name}: {error}\\n")
"""


def test_a_full_disk_is_reported_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=False, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["vectors", "rows", "grades"], done.stderr
    assert all(line.endswith("cannot be written: File too large") for line in lines)


# ---------------------------------------------------------------------------------------------- damage, and many entries


@pytest.mark.parametrize(
    ("file_name", "place"), [("rows", 0), ("rows", 17), ("index", 3), ("index", 16), ("index", 25)]
)
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_never_gives_other_rows(tmp_path: Path, file_name: str, place: int, bit: int) -> None:
    texts = ["a", "b", "c"]
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, VECTOR).append(texts, vectors(1, 2, 3))
    (path,) = tmp_path.glob(f"*.{file_name}")
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        numbers = file.find(list(map(key_of, texts)))
        entries = [file.get(number) if number >= 0 else None for number in numbers]
        right = [(0, vectors(number)[0].tobytes()) for number in (1, 2, 3)]
        assert all(entry in (None, expected) for entry, expected in zip(entries, right, strict=True))
        assert entries[2] == right[2]
        assert entries != right
        with pytest.raises((CacheError, KeyError)):
            file.read(texts)
        file.append(texts, vectors(1, 2, 3))  # the newest count
        assert file.read(texts).firsts()[:, 0].tolist() == [1, 2, 3]


def test_a_record_that_would_read_gigabytes_is_damaged(tmp_path: Path) -> None:
    with CacheFolder(tmp_path) as cache:
        cache.rows(IDENTITY, VECTOR).append(["a", "b"], vectors(1, 2))
    index, rows = (next(tmp_path.glob(f"*.{suffix}")) for suffix in ("index", "rows"))
    with rows.open("r+b") as file:
        file.truncate(2**36)  # a sparse file
    content = bytearray(index.read_bytes())
    content[16 + 4] = 1  # the first entry ends 2**32 rows later
    index.write_bytes(content)
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, VECTOR)
        assert [file.get(number) for number in file.find([key_of("a"), key_of("b")])] == [None, None]


def test_thousands_of_entries_are_found(tmp_path: Path) -> None:
    """Entries are sorted occasionally; two entries with the same first bytes are both found."""
    keys = [number.to_bytes(8, "big") + tail.to_bytes(8, "big") for number in range(5000) for tail in (1, 2)]
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, np.dtype("<f4"))
        for first in range(0, len(keys), 64):
            file.add([(key, i, np.float32(i).tobytes()) for i, key in enumerate(keys[first : first + 64], first)])
        file.add([(keys[7], 9, np.float32(-1).tobytes())])
    with CacheFolder(tmp_path) as cache:
        file = cache.rows(IDENTITY, np.dtype("<f4"))
        numbers = file.find([*keys, bytes(16)])
        assert numbers[-1] == -1
        expected = [(i, np.float32(i).tobytes()) for i in range(len(keys))]
        expected[7] = (9, np.float32(-1).tobytes())
        assert [file.get(number) for number in numbers[:-1]] == expected
        assert file.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
