"""The duels of a comparison on disk, and the steps of a duel: begin, vote, take back, end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from gateway.comparisons.duels import Choice, Duel, Standing, Vote, draw, make_vote, now, qrels, stand
from gateway.comparisons.runs import Runs, first_problem
from gateway.config.files import open_to_append, read_bounded, write_whole
from gateway.config.wording import cut
from gateway.errors import BadInput, NotFound

_MAX_DUELS: Final = 100
_MAX_FILE_BYTES: Final = 4 * 1024**2
_END_BYTES: Final = 4096  # a full file still has room for the line that ends the duel
_DUEL, _VOTES = "duel.json", "votes.jsonl"
_NAME: Final = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")

M = TypeVar("M", bound=BaseModel)


def _append(path: Path, line: bytes) -> None:
    """Append a whole line or nothing, because half a line, after a full disk, would make the file unreadable."""
    with os.fdopen(open_to_append(path, 0o666), "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


class DuelFolder:
    """The duels of one comparison, in its folder. The methods block: call them in a thread."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "duels"

    def names(self) -> list[str]:
        """Return the names of the duels, latest first."""
        try:
            return sorted((path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)
        except OSError:
            return []

    def create(self, duel: Duel) -> str:
        """Write a new duel, and return its name.

        Raises:
            BadInput: the folder cannot be written, or has too many duels.
        """
        if len(self.names()) >= _MAX_DUELS:
            raise BadInput(f"this comparison has {_MAX_DUELS} duels: remove some from {self._folder}")
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        try:
            (self._folder / name).mkdir(parents=True)
            write_whole(self._folder / name / _DUEL, duel.model_dump_json())
        except OSError as error:
            raise BadInput(
                f"{self._folder / name} cannot be written: {error.strerror}; duels are kept there"
            ) from error
        return name

    def read(self, name: str) -> tuple[Duel, list[Vote]]:
        """Return a duel and its votes.

        Raises:
            NotFound: no duel has this name.
            BadInput: the files of the duel cannot be read.
        """
        path = self._folder / name
        if not _NAME.fullmatch(name) or not (path / _DUEL).is_file():
            raise NotFound(f"no duel is called {cut(name)!r}")
        duel = _parse(Duel, f"{path / _DUEL}", self._bytes(name, _DUEL))
        pair = next((turn.pair for turn in duel.turns if not 0 <= turn.pair < len(duel.pairs)), None)
        if pair is not None:
            raise BadInput(f"{path / _DUEL} is damaged: it has {len(duel.pairs)} pairs, and a turn shows pair {pair}")
        votes: list[Vote] = []
        for number, line in enumerate(self._bytes(name, _VOTES).splitlines(), 1):
            place = f"{path / _VOTES}:{number}"
            vote = _parse(Vote, place, line)
            if vote.turn is not None and not 0 <= vote.turn < len(duel.turns):
                raise BadInput(
                    f"{place} is damaged: the duel has {len(duel.turns)} turns, and the vote is on {vote.turn}"
                )
            votes.append(vote)
        return duel, votes

    def add(self, name: str, vote: Vote) -> None:
        """Append a vote.

        Raises:
            BadInput: the file cannot be written, or is full.
        """
        path = self._folder / name / _VOTES
        line = f"{json.dumps(vote.model_dump(exclude_defaults=True), ensure_ascii=False)}\n".encode()
        most = _MAX_FILE_BYTES - (0 if vote.end else _END_BYTES)
        try:
            if path.exists() and path.stat().st_size + len(line) > most:
                raise BadInput(f"{path} is full; the limit is {most:,} bytes: end this duel, and begin another")
            _append(path, line)
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror}; the vote was not counted") from error

    def _bytes(self, name: str, file: str) -> bytes:
        path = self._folder / name / file
        try:
            return read_bounded(path, _MAX_FILE_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _parse(kind: type[M], place: str, content: bytes) -> M:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise BadInput(f"{place} is damaged: {first_problem(error)}") from error


@dataclass(frozen=True, slots=True)
class Open:
    """A duel with its votes, as it is on the disk now.

    Attributes:
        standing: with the next turn of the voter that it was opened for.
        qrels: the judgments so far.
    """

    run: str
    name: str
    duel: Duel
    votes: list[Vote]
    standing: Standing
    qrels: str


class Duels:
    """The duels of all comparisons in a folder.

    Args:
        runs: the folder of the comparisons.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        # Votes are appended one after the other, so that two clicks count as one vote.
        self._writing = asyncio.Lock()

    async def begin(self, run: str, baseline: str, arm: str) -> str:
        """Draw the pairs of a duel between two arms of a comparison, and return its name.

        Raises:
            NotFound: there is no such comparison.
            BadInput: the comparison has no such arms, or their lists are always equal.
        """
        found = await asyncio.to_thread(self._runs.find, run)
        names = [] if found.results is None else [known.name for known in found.results.arms]
        if baseline not in names or arm not in names or baseline == arm:
            raise BadInput(f"choose two different arms of {found.name}: {', '.join(names)}", param="arm")
        seed = secrets.randbits(32)
        duel = await asyncio.to_thread(lambda: draw(self._runs.queries(run), baseline, arm, seed, len(names)))
        return await asyncio.to_thread(self._folder(run).create, duel)

    async def open(self, run: str, name: str, voter: str) -> Open:
        """Read a duel, and count its votes.

        Raises:
            NotFound: there is no such duel.
            BadInput: its files cannot be read.
        """
        # A full file has 20,000 votes: to count them takes a tenth of a second.
        return await asyncio.to_thread(self._open, run, name, voter)

    async def vote(
        self,
        place: tuple[str, str],
        voter: str,
        turn: int,
        choice: Choice,
        marked: Iterable[str],
        seconds: float | None = None,
    ) -> bool:
        """Add a vote, and return whether it counts: only a voter's first vote on the shown pair does.

        Args:
            place: the names of the comparison and of the duel.
            seconds: the time that the pair was shown, if known.

        Raises:
            NotFound: there is no such duel.
            BadInput: the files cannot be read or written.
        """
        async with self._writing:
            known = await self.open(*place, voter)
            if known.standing.next_turn != turn:
                return False
            vote = make_vote(known.duel, turn, choice, marked, voter, seconds)
            await asyncio.to_thread(self._folder(place[0]).add, place[1], vote)
            return True

    async def undo(self, run: str, name: str, voter: str) -> None:
        """Take back the last vote of a voter, unless the duel has ended."""
        await self._note(run, name, Vote(time=now(), voter=voter, undo=True))

    async def end(self, run: str, name: str, voter: str) -> None:
        """End a duel for all voters."""
        await self._note(run, name, Vote(time=now(), voter=voter, end=True))

    async def latest(self, most: int, voter: str) -> list[Open | tuple[str, str]]:
        """Return the last duels, latest first; a duel with unreadable files has only its names."""
        return await asyncio.to_thread(self._latest, most, voter)

    def _latest(self, most: int, voter: str) -> list[Open | tuple[str, str]]:
        places = [(name, run.name) for run in self._runs.latest() for name in self._folder(run.name).names()]
        found: list[Open | tuple[str, str]] = []
        for name, run in sorted(places, reverse=True)[:most]:
            try:
                found.append(self._open(run, name, voter))
            except (BadInput, NotFound):
                found.append((run, name))
        return found

    def _open(self, run: str, name: str, voter: str) -> Open:
        duel, votes = self._folder(run).read(name)
        return Open(run, name, duel, votes, stand(duel, votes, voter), qrels(duel, votes))

    async def _note(self, run: str, name: str, vote: Vote) -> None:
        async with self._writing:
            known = await self.open(run, name, vote.voter)
            if not any(earlier.end for earlier in known.votes):
                await asyncio.to_thread(self._folder(run).add, name, vote)

    def _folder(self, run: str) -> DuelFolder:
        return DuelFolder(self._runs.path(run))
