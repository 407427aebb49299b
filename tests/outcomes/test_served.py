"""The file of experiments has the weights and the models that were served, and a change of a model withholds a verdict."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.config.registry import Experiment
from gateway.experiments.exposures import Exposure, now
from gateway.experiments.split import Split
from gateway.outcomes.keeper import Keeper
from gateway.outcomes.served import Served, read_served, why_models_changed
from gateway.outcomes.store import FILE_NAME, Reader

BEFORE = {"a": "m@111111111111", "b": "n@222222222222"}
AFTER = {"a": "m@111111111111", "b": "n@333333333333"}
MB = 1024**2


def experiment(weight: float = 1.0, **fields: Any) -> Experiment:
    arms = ({"name": "a", "model": "m", "weight": 1.0}, {"name": "b", "model": "n", "weight": weight})
    content = {"id": "exp", "kind": "same_space", "unit": ("body:user",), "arms": arms, **fields}
    return Experiment.model_validate(content)


def exposure(one: Experiment) -> Exposure:
    return Exposure(
        now(), "exp", Split(one).generation, "a", f"{1:016x}", "m", BEFORE["a"], 0.5, "body:user", answered=True
    )


class Process:
    """One process that serves the experiment; its models are known once they have loaded."""

    def __init__(self, folder: Path, one: Experiment, max_bytes: int = 100 * MB) -> None:
        self.experiment, self.spaces, self.since = one, dict[str, str](), datetime.now(UTC).timestamp()
        self.keeper = Keeper(
            folder, max_bytes, lambda: [self.experiment], lambda _one: self.spaces, lambda _one: self.since
        )

    async def serve(self, spaces: dict[str, str]) -> None:
        """Load the models, and answer a request."""
        self.spaces = spaces
        self.keeper.offer(exposure(self.experiment))
        await self.keeper.report(self.experiment, None)


class Machine:
    """A folder, and the process that runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running = contextlib.ExitStack()

    def start(self, one: Experiment, **fields: Any) -> Process:
        """Start a process; the one before it ends."""
        self.stop()
        process = Process(self.folder, one, **fields)
        self._running.callback(process.keeper.close)
        return process

    def stop(self) -> None:
        self._running.close()

    async def run(self, one: Experiment, spaces: dict[str, str]) -> Process:
        """Start a process, load its models, and answer a request."""
        process = self.start(one)
        await process.serve(spaces)
        return process

    def command(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in the file, as another program does."""
        with contextlib.closing(sqlite3.connect(self.folder / FILE_NAME, isolation_level=None)) as other:
            return other.execute(statement).fetchall()

    @property
    def noted(self) -> list[Served]:
        with Reader(self.folder / FILE_NAME) as reader:
            return read_served(reader, "exp")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.stop()


@pytest.mark.parametrize("begins", ["another salt", "counts again"])
async def test_a_new_model_may_come_with_a_new_begin(machine: Machine, begins: str) -> None:
    await machine.run(experiment(salt="one"), BEFORE)
    fields = {"salt": "two"} if begins == "another salt" else {"salt": "one", "counts_from": datetime.now(UTC)}
    again = experiment(**fields)
    await machine.run(again, AFTER)

    assert why_models_changed(again, machine.noted) is None


@pytest.mark.parametrize("weight", [1.0, 3.0], ids=["the same weights", "other weights"])
async def test_a_model_that_changes_with_a_restart_is_noticed(machine: Machine, weight: float) -> None:
    await machine.run(experiment(), BEFORE)
    process = await machine.run(experiment(weight), AFTER)

    assert "the model of arm 'b' changed" in (why_models_changed(experiment(weight), machine.noted) or "")
    assert machine.noted[-1].time == pytest.approx(process.since)  # its old model never answered here


async def test_a_model_that_changed_long_after_the_begin_is_noticed(machine: Machine) -> None:
    await machine.run(experiment(), BEFORE)
    machine.command("UPDATE served SET time = time - 7200")
    again = experiment(counts_from=datetime.now(UTC) - timedelta(hours=1))
    await machine.run(again, AFTER)

    assert "the model of arm 'b' changed" in (why_models_changed(again, machine.noted) or "")


async def test_a_full_file_of_an_earlier_version_does_not_stop_the_gateway(machine: Machine) -> None:
    """It has the arms, but no table of the models."""
    one = experiment()
    machine.start(one)
    machine.stop()
    for statement in ("DROP TABLE served", "VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
        machine.command(statement)
    [(num_pages,)] = machine.command("PRAGMA page_count")

    await machine.start(one, max_bytes=num_pages * 4096).serve(BEFORE)

    assert machine.noted == []
    assert machine.command("SELECT unit FROM exposures") == [(1,)]  # its page had room
    await machine.run(one, BEFORE)
    assert len(machine.noted[-1].spaces) == 2
