"""The folder of a comparison with a judge, as `gateway compare` writes it, made without a model and without a judge."""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gateway.compare.judge.judging import Judged
from gateway.compare.judge.outputs import write_judgments
from gateway.compare.outputs import write_page, write_results
from gateway.compare.page import render_page
from gateway.compare.results import Comparison, Hit, QueryResult
from gateway.comparisons.sheet import CHECK_FILE, Sheet
from tests.compare.judge.test_judging import Grade, World, graded_before, make_world, run, true_grade
from tests.compare.results_example import BGE, JINA, make_comparison


def comparison_of(world: World) -> Comparison:
    """Return the comparison whose rankings the world has; its other figures are those of an example."""
    example = make_comparison(JINA, BGE, num_queries=60, has_judgments=False)
    subject = world.subject
    dataset = subject.dataset
    queries = [
        QueryResult(
            id=query,
            text=text,
            rankings={
                arm: [Hit(document, score, dataset.documents[document][:300], None) for document, score in found[query]]
                for arm, found in subject.rankings.items()
            },
            quality={},
            overlap={"new": 0.5},
            rbo={"new": 0.5},
            group=dataset.groups.get(query),
        )
        for query, text in dataset.queries.items()
    ]
    arms = [dataclasses.replace(arm, name=name) for arm, name in zip(example.arms, subject.rankings, strict=True)]
    groups = {dataset.groups.get(query, (query,)) for query in dataset.queries}
    return dataclasses.replace(
        example,
        seed=subject.seed,
        dataset=dataclasses.replace(example.dataset, num_queries=len(queries), num_groups=len(groups)),
        arms=arms,
        agreements=[dataclasses.replace(example.agreements[0], arm="new", baseline="old")],
        cost_contrasts=[dataclasses.replace(example.cost_contrasts[0], arm="new", baseline="old")],
        queries=queries,
    )


def write(world: World, judged: Judged, folder: Path, check: Path | None = None) -> Path:
    """Write the files of a comparison as `gateway compare` does, with the grades of a check."""
    comparison = comparison_of(world)
    write_results(comparison, {}, folder)
    write_judgments(judged, world.subject.dataset, folder, world.subject.seed)
    write_page(render_page(comparison, judged.report), folder)
    if check is not None:
        (folder / CHECK_FILE).write_bytes(check.read_bytes())
    return folder


def make_judged_folder(folder: Path, cache: Path, grade: Grade = true_grade) -> World:
    """Write a comparison of which ``new`` is better, judged by ``grade``, and not yet checked by people."""
    world = make_world(gain=0.8)
    url = graded_before(world, cache, grade)
    with ThreadPoolExecutor(1) as pool:  # a browser's event loop may run in this thread
        judged = pool.submit(asyncio.run, run(world, url, cache)).result()
    write(world, judged, folder)
    return world


def grade_by_hand(world: World, folder: Path, num_left: int = 0) -> None:
    """Fill in the file as in a spreadsheet, except for the last lines."""
    path = folder / CHECK_FILE
    content = path.read_bytes()
    pairs = list(Sheet(content).pairs)
    for pair in pairs[: len(pairs) - num_left]:
        content = content.replace(
            "\t".join((*pair, "\t")).encode(), f"{pair[0]}\t{pair[1]}\t{world.people[pair]}\t".encode()
        )
    path.write_bytes(content)
