"""The files of a duel: damage by people or a crash, and their size limit."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.compare.outputs import write_results
from gateway.comparisons import dueling
from gateway.comparisons.dueling import Duels, Open
from gateway.comparisons.runs import Runs
from gateway.errors import BadInput
from tests.compare.results_example import BGE, JINA, MINILM, make_comparison

RUN = "not judged"


@pytest.fixture(scope="module")
def duels(tmp_path_factory: pytest.TempPathFactory) -> Duels:
    folder = tmp_path_factory.mktemp("runs")
    write_results(make_comparison(JINA, BGE, num_queries=20, has_judgments=False), {}, folder / RUN)
    return Duels(Runs(folder))


async def begin(duels: Duels) -> tuple[str, Path]:
    name = await duels.begin(RUN, JINA.name, BGE.name)
    return name, duels._runs.folder / RUN / "duels" / name


async def test_the_threshold_allows_for_all_arms_of_the_comparison(tmp_path: Path) -> None:
    comparison = make_comparison(JINA, BGE, MINILM, num_queries=20, has_judgments=False)
    write_results(comparison, {}, tmp_path / RUN)
    three = Duels(Runs(tmp_path))

    found = await three.open(RUN, await three.begin(RUN, JINA.name, BGE.name), "me")

    assert (found.duel.threshold, found.standing.preference.threshold) == (40, 40)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"time": "", "voter": "v", "turn": 999, "choice": "tie"}', "turns, and the vote is on 999"),
        ('{"time": "", "voter": "v", "turn": -1, "choice": "tie"}', "turns, and the vote is on -1"),
        ('{"time": "", "voter": "v", "turn": 1, "choice": "maybe"}', "choice: Input should be"),
        ('{"time": "", ', "Invalid JSON"),
        ("", "Invalid JSON"),
    ],
)
async def test_a_vote_that_was_damaged_by_hand_is_named_with_its_line(duels: Duels, line: str, problem: str) -> None:
    name, folder = await begin(duels)
    await duels.vote((RUN, name), "v", 0, "tie", ())
    with (folder / "votes.jsonl").open("a") as file:
        file.write(f"{line}\n")

    with pytest.raises(BadInput) as caught:
        await duels.open(RUN, name, "v")
    assert caught.value.message.startswith(f"{folder}/votes.jsonl:2 is damaged: ")
    assert problem in caught.value.message
    # The list of the duels shows the others as before.
    assert (RUN, name) in [place for place in await duels.latest(100, "v") if not isinstance(place, Open)]


async def test_a_named_pipe_instead_of_the_votes_is_refused_and_not_waited_for(duels: Duels) -> None:
    name, folder = await begin(duels)
    os.mkfifo(folder / "votes.jsonl")
    for step in (duels.open(RUN, name, "v"), duels.vote((RUN, name), "v", 0, "tie", ())):
        with pytest.raises(BadInput, match=r"votes\.jsonl cannot be read: must be a regular file, but is a named pipe"):
            await step
    with pytest.raises(OSError, match="must be a regular file, but is a named pipe"):
        dueling._append(folder / "votes.jsonl", b"{}")


async def test_a_turn_without_its_pair_is_named(duels: Duels) -> None:
    name, folder = await begin(duels)
    content = json.loads((folder / "duel.json").read_text())
    content["pairs"] = content["pairs"][:3]
    (folder / "duel.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"duel.json is damaged: it has 3 pairs, and a turn shows pair 3"):
        await duels.open(RUN, name, "v")


async def test_a_full_file_stays_readable_and_the_duel_can_be_ended(
    duels: Duels, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = await begin(duels)
    limit = (folder / "duel.json").stat().st_size + dueling._END_BYTES
    monkeypatch.setattr(dueling, "_MAX_FILE_BYTES", limit)

    async def vote_often() -> None:
        for number in range(1000):  # each character of the name has four bytes
            await duels.vote((RUN, name), f"{number}{'🚂' * 60}", 0, "tie", ())

    with pytest.raises(BadInput, match=r"is full; the limit is [0-9,]+ bytes: end this duel, and begin another"):
        await vote_often()
    assert (folder / "votes.jsonl").stat().st_size <= limit - dueling._END_BYTES

    await duels.end(RUN, name, "operator")

    assert (await duels.open(RUN, name, "operator")).standing.is_ended


async def test_the_votes_of_a_large_duel_are_counted_apart_from_the_event_loop(
    duels: Duels, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def counting(count: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object) -> object:
            threads.append(threading.current_thread())
            return count(*arguments)

        return counted

    for name in ("stand", "qrels"):
        monkeypatch.setattr(dueling, name, counting(getattr(dueling, name)))
    name, _folder = await begin(duels)

    assert await duels.vote((RUN, name), "ada", 0, "left", [])
    await duels.undo(RUN, name, "ada")
    await duels.end(RUN, name, "ada")
    assert (await duels.open(RUN, name, "ada")).standing.is_ended
    assert await duels.latest(1, "ada")

    assert threads
    assert threading.main_thread() not in threads
