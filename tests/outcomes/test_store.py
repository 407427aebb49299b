"""The file of experiments: confirmed outcomes survive a kill, several processes write it, and bad files are refused."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.errors import StartError
from gateway.experiments.exposures import Exposure
from gateway.outcomes.joining import Branch, join
from gateway.outcomes.keeper import Keeper
from gateway.outcomes.store import Decision, NewOutcome, Reader, Store, StoreBusy, StoreFull

BRANCHES = [Branch("g", "a", "model-a", None, 0.5), Branch("g", "b", "model-b", "query", 0.5)]
MB = 1024**2


def exposure(unit: int, arm: str = "a", *, answered: bool = True) -> tuple[Exposure, float]:
    space = "m@0123456789ab" if answered else None
    time = "1970-01-01T00:00:05.000+00:00"
    one = Exposure(time, "exp", "g", arm, f"{unit:016x}", "m", space, 0.5, "body:user", answered=answered)
    return one, 5.0


def outcome(number: int, unit: int = 1, **fields: object) -> NewOutcome:
    content = {"name": "kept", "value": 1.0, "of": 1.0, "time": 9.0, "is_before": False, **fields}
    return NewOutcome(key=number.to_bytes(16), unit=unit, **content)


def command(path: Path, statement: str) -> None:
    """Run a statement in a file, as another program does."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(statement)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a" / "experiments.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, 100 * MB)
    store.declare("exp", BRANCHES)
    yield store
    store.close()


def test_stored_outcomes_are_read_back(store: Store, path: Path) -> None:
    store.expose([exposure(1), exposure(2**64 - 1, "b", answered=False), exposure(1)])
    store.keep("exp", [outcome(1, unit=-1, value=0.5, of=2.0, is_before=True), outcome(2)])
    store.keep("other", [outcome(1)])

    with Reader(path) as reader:
        exposures = reader.exposures("exp")
        kept, keys = reader.outcomes("exp", "kept")
        log = [one for _, one in reader.log()]
        assert reader.names("exp") == ["kept"]

    assert exposures.branches == BRANCHES
    assert (exposures.unit.tolist(), exposures.branch.tolist(), exposures.time.tolist()) == (
        [1, -1],
        [0, 1],
        [5.0, 5.0],
    )
    assert (kept.unit.tolist(), kept.value.tolist(), kept.of.tolist()) == ([-1, 1], [0.5, 1.0], [2.0, 1.0])
    assert (kept.time.tolist(), kept.is_before.tolist()) == ([9.0, 9.0], [True, False])
    assert keys == [(1).to_bytes(16), (2).to_bytes(16)]
    assert log == [exposure(1)[0], exposure(2**64 - 1, "b", answered=False)[0]]


def test_an_answer_that_comes_later_is_noted(store: Store, path: Path) -> None:
    store.expose([exposure(1, answered=False)])
    store.expose([exposure(1)])
    store.expose([exposure(1, answered=False)])

    with Reader(path) as reader:
        assert [one for _, one in reader.log()] == [exposure(1)[0]]


def test_exposures_of_unknown_arms_are_left_out(store: Store, path: Path) -> None:
    store.expose([exposure(1, "c"), exposure(2)])

    with Reader(path) as reader:
        assert reader.exposures("exp").unit.tolist() == [2]


def test_the_log_continues_where_it_was(store: Store, path: Path) -> None:
    store.expose([exposure(1), exposure(2)])
    with Reader(path) as reader:
        number, _ = list(reader.log())[-1]
        store.expose([exposure(3)])
        assert [one for _, one in reader.log(number)] == [exposure(3)[0]]


def test_an_outcome_that_arrives_after_its_exposure_counts_even_if_the_clock_was_set_back(
    store: Store, path: Path
) -> None:
    store.expose([(exposure(1)[0], 7_205.0), (exposure(2, "b")[0], 7_205.0)])
    late = [outcome(1, time=3_600.0), outcome(2, unit=2, time=7_200.0)]
    store.keep("exp", late)
    assert store.keep("exp", late).repeated == 2

    with Reader(path) as reader:
        kept, _keys = reader.outcomes("exp", "kept")
        joined = join(reader.exposures("exp"), kept)

    assert joined.num_unmatched == 1  # five seconds before its exposure: it came from an earlier visit
    assert joined.value.tolist() == [1.0, 0.0]


def test_an_outcome_belongs_to_the_last_arm_of_a_unit_that_the_clock_had_ahead(store: Store, path: Path) -> None:
    """The clock was an hour ahead when the unit was seen first; then it was corrected, and a ramp moved the unit."""
    store.expose([(exposure(1)[0], 7_200.0)])
    store.expose([(exposure(1, "b")[0], 3_600.0)])
    store.keep("exp", [outcome(1, time=3_900.0)])

    with Reader(path) as reader:
        exposures = reader.exposures("exp")
        joined = join(exposures, reader.outcomes("exp", "kept")[0])

    arms = [joined.exposures.branches[branch].arm for branch in joined.exposures.branch]
    assert dict(zip(arms, joined.value.tolist(), strict=True)) == {"a": 0.0, "b": 1.0}


def test_the_first_decision_stays(store: Store, path: Path) -> None:
    store.decide("exp", "q", "b", Decision("better", "t1"))
    store.decide("exp", "q", "b", Decision("worse", "t2"))
    store.decide("exp", "other", "b", Decision("worse", "t3"))

    with Reader(path) as reader:
        assert reader.decisions("exp", "q") == {"b": Decision("better", "t1")}
        assert reader.decisions("exp", "none") == {}


def test_confirmed_outcomes_survive_a_kill(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gateway.outcomes.store import NewOutcome, Store\n"
        "store = Store(Path(sys.argv[1]), 2**30)\n"
        "for number in range(100_000):\n"
        "    row = NewOutcome('kept', number.to_bytes(16), number, 1.0, 1.0, 9.0, False)\n"
        "    assert store.keep('exp', [row]).stored == 1\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writing:
        assert writing.stdout is not None
        while int(writing.stdout.readline()) < 20:
            pass
        writing.kill()
        confirmed = 20 + len(writing.stdout.read().splitlines())

    store = Store(path, 2**30)
    assert (
        store.keep("exp", [outcome(number, unit=number) for number in range(confirmed + 1)]).repeated == confirmed + 1
    )
    with Reader(path) as reader:
        assert len(reader.outcomes("exp", "kept")[0].unit) >= confirmed
    store.close()


@pytest.mark.parametrize("replace", [Path.unlink, lambda path: path.with_suffix(".new").rename(path)])
def test_nothing_is_confirmed_in_a_file_that_was_removed_or_replaced(
    store: Store, path: Path, replace: Callable[[Path], object]
) -> None:
    Store(path.with_suffix(".new"), 100 * MB).close()
    assert store.keep("exp", [outcome(1)]).stored == 1

    replace(path)

    with pytest.raises(StoreBusy, match="was removed or replaced while the gateway runs; restart the gateway"):
        store.keep("exp", [outcome(2)])


def test_two_processes_write_one_file(store: Store, path: Path) -> None:
    other = Store(path, 100 * MB)
    for number in range(20):
        (store, other)[number % 2].keep("exp", [outcome(number)])

    assert other.keep("exp", [outcome(number) for number in range(20)]).repeated == 20
    other.close()


def test_a_file_that_another_process_holds_is_busy(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store._db.execute("PRAGMA busy_timeout = 1")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreBusy, match="locked"):
        store.keep("exp", [outcome(1)])
    holder.execute("COMMIT")
    holder.close()

    assert store.keep("exp", [outcome(1)]).stored == 1


def test_a_full_file_keeps_its_contents(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.sqlite3", MB)
    stored = 0
    with contextlib.suppress(StoreFull):
        for number in range(100):
            stored += store.keep("exp", [outcome(1_000 * number + i, unit=i) for i in range(1_000)]).stored

    assert 1_000 < stored < 100_000
    assert store.keep("exp", [outcome(i, unit=i) for i in range(1_000)]).repeated == 1_000
    assert (tmp_path / "x.sqlite3").stat().st_size <= MB
    store.close()


@pytest.mark.parametrize("content", [b"no database, but long enough to be read as a header of one" * 10, b"\0" * 5_000])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "experiments.sqlite3"
    path.write_bytes(content)

    with pytest.raises(StartError, match=r"cannot be opened as a file of experiments: file is not a database"):
        Store(path, MB)
    with pytest.raises(StartError, match=r"is not a file of experiments"):
        Reader(path)


def test_a_file_of_a_later_version_is_refused(store: Store, path: Path) -> None:
    command(path, "PRAGMA user_version = 7")

    with pytest.raises(StartError, match="has version 7, but this gateway reads version 1"):
        Store(path, MB)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("ALTER TABLE outcomes DROP COLUMN is_before", "its table outcomes has no column is_before"),
        ("ALTER TABLE branches RENAME COLUMN share TO part", "its table branches has no column share"),
    ],
)
def test_a_file_with_other_tables_is_refused(store: Store, path: Path, change: str, what: str) -> None:
    """Otherwise every later outcome would get a 503."""
    store.close()
    command(path, change)

    with pytest.raises(StartError, match=f"cannot be opened as a file of experiments: {what}; move it away"):
        Store(path, MB)
    with pytest.raises(StartError, match=f"is not a file of experiments: {what}"):
        Reader(path)


def test_a_reader_needs_every_table_and_its_own_version(store: Store, path: Path) -> None:
    command(path, "DROP TABLE decisions")
    with pytest.raises(StartError, match="is not a file of experiments: it has no table decisions"):
        Reader(path)

    command(path, "PRAGMA user_version = 7")
    with pytest.raises(StartError, match="has version 7, but this gateway reads version 1"):
        Reader(path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StartError, match="cannot be opened as a file of experiments"):
        Store(tmp_path / "file" / "x.sqlite3", MB)
    with pytest.raises(StartError, match="no such file"):
        Reader(tmp_path / "none.sqlite3")


def test_a_file_that_is_damaged_further_on_stops_the_start_with_a_reason(store: Store, path: Path) -> None:
    store.expose([exposure(unit) for unit in range(2_000)])
    command(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    with path.open("r+b") as content:  # the first pages have the schema
        content.seek(20 * 4096)
        content.write(b"\xff" * (size - 20 * 4096))

    with pytest.raises(StartError, match="cannot be read: database disk image is malformed; move it away"):
        Keeper(path.parent, 100 * MB, list).read_log()
    another = Store(path, 100 * MB)
    with pytest.raises(StoreBusy, match="malformed"):
        another.expose([exposure(unit) for unit in range(2_000)])
    another.close()
