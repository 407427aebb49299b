"""Measure the encoders on a CUDA device, against the limits of the card and against padded batches.

Jina v3 and BGE-M3 at full size with random weights, through the runtime and heads that the gateway would choose, in turns
with transformers' own model on padded batches in the same precision: of 32 texts, as sentence-transformers makes them, and
of as many tokens as ours.

    python -m bench.gpu                        on the first CUDA device
    python -m bench.gpu --update               also writes the result into docs/performance.md
    python -m bench.gpu --device cpu --tiny    the same code with tiny models, to see that it works
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import orjson
import torch
from transformers import PreTrainedConfig

from bench import gpu_models
from bench.gpu_card import describe_card, describe_state
from bench.gpu_findings import Findings, Latency, ModelFindings, Outputs, Tasks, Throughput, model_report
from bench.gpu_models import NUM_TASKS, PaddedEncoder, Rows, RuntimeEncoder, mixed_lengths
from bench.machine import describe_machine
from bench.processes import RESULTS
from bench.report import goals_table, note, update_page
from bench.stats import median, median_ratio, percentile
from gateway.engine.accumulation import ACCUMULATION, keep_sums_in_float32


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure.

    Attributes:
        matmul: side of the large square product.
        tokens: of the texts that are encoded in one measurement.
        max_batch_tokens: the gateway's maximum number of tokens in one forward.
        requests: texts and tokens of a request whose latency is measured.
        num_latencies: of a request; the p99 of fewer than some hundred would be the slowest.
        output_lengths: of the texts whose other outputs are measured.
    """

    is_tiny: bool
    matmul: int
    lengths: Sequence[int]
    tokens: int
    max_batch_tokens: int
    rounds: int
    requests: Sequence[tuple[int, int]]
    num_latencies: int
    output_lengths: Sequence[int]


FULL = Scale(
    is_tiny=False,
    matmul=8192,
    lengths=(16, 32, 64, 128, 256, 512, 2048, 8192),
    tokens=65_536,
    max_batch_tokens=16_384,
    rounds=3,
    requests=((1, 16), (32, 16), (32, 128)),
    num_latencies=300,
    output_lengths=(16, 64, 512),
)
TINY = Scale(
    is_tiny=True,
    matmul=64,
    lengths=(4, 64),
    tokens=128,
    max_batch_tokens=64,
    rounds=2,
    requests=((1, 4), (32, 4)),
    num_latencies=3,
    output_lengths=(64,),
)
# A busy event loop: it holds the interpreter's lock for so long, then waits.
_BUSY_S, _IDLE_S = 0.006, 0.004


class Encoder(Protocol):
    """Turns token ids into vectors."""

    def encode(self, rows: Rows, adapters: Sequence[int]) -> torch.Tensor:
        """Return the vectors on the CPU."""


class Bench:
    """Measures on one device in one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype, scale: Scale) -> None:
        self.device, self.dtype, self.scale = device, dtype, scale
        self.matmul_tflops = {shape: self._matmul_tflops(*shape) for shape in _model_shapes(scale)}
        self.matmul_tflops[(scale.matmul,) * 3] = self.peak_tflops()

    def peak_tflops(self) -> float:
        """Return the card's rate for a large square product, now."""
        return self._matmul_tflops(*(self.scale.matmul,) * 3)

    def _matmul_tflops(self, rows: int, inner: int, columns: int) -> float:
        left = torch.randn(rows, inner, device=self.device, dtype=self.dtype)
        right = torch.randn(inner, columns, device=self.device, dtype=self.dtype)
        count = max(1, round(2e13 / (2 * rows * inner * columns))) if not self.scale.is_tiny else 2

        def multiply() -> None:
            for _ in range(count):
                torch.mm(left, right)

        seconds = median(self.in_turns({"": multiply})[""])
        return 2 * rows * inner * columns * count / seconds / 1e12

    def in_turns(self, works: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Run each once to warm up, then all in rounds; return the seconds of each."""
        for work in works.values():
            work()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(self.scale.rounds):
            for name, work in works.items():
                seconds[name].append(self.seconds(work))
        return seconds

    def seconds(self, work: Callable[[], object]) -> float:
        self._synchronize()
        started = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - started

    def _peak_mib(self, work: Callable[[], object]) -> float:
        """Return the peak of the memory allocated during ``work``, models included."""
        if self.device.type != "cuda":
            return math.nan
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) / 2**20

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------------------------------------- one model

    def run(self, name: str, config: PreTrainedConfig, *, has_tasks: bool) -> ModelFindings:
        """Measure a model: texts without a task, and with tasks if it has any, else other outputs."""
        before, state = self.peak_tflops(), describe_state(self.device)
        model = gpu_models.build_model(config, self.device, self.dtype)
        num_weights = gpu_models.linear_params(model)
        ours = gpu_models.gateway_encoder(model, (), self.scale.max_batch_tokens)
        latency = [self._latency(count, length, ours) for count, length in self.scale.requests]
        outputs = [] if has_tasks else self._outputs(ours)
        throughput = self._throughputs(name, config, ours, num_weights)
        runtime = ours.runtime.name
        del model, ours  # the next ones need the room
        tasks = self._run_tasks(name, config, num_weights) if has_tasks else []
        return ModelFindings(
            name,
            str(self.dtype).removeprefix("torch."),
            runtime,
            (before, self.peak_tflops()),
            (state, describe_state(self.device)),
            throughput,
            latency,
            outputs,
            tasks,
        )

    def _throughputs(
        self, name: str, config: PreTrainedConfig, ours: RuntimeEncoder, num_weights: int
    ) -> list[Throughput]:
        texts = {str(length): self._texts(length) for length in self.scale.lengths} | {"mixed": self._mixed_texts()}
        # Before there is another model on the card.
        peaks = {lengths: self._peak_mib(partial(encode, ours, rows)) for lengths, rows in texts.items()}
        padded = PaddedEncoder(gpu_models.build_model(config, self.device, self.dtype))
        found = []
        for lengths, rows in texts.items():
            note(f"{name}, {self.dtype}: {lengths}")
            num_flops = gpu_models.flops(config, num_weights, rows)
            found.append(self._throughput(lengths, rows, ours, padded, num_flops, peaks[lengths]))
        return found

    def _throughput(
        self, lengths: str, rows: Rows, ours: Encoder, padded: PaddedEncoder, num_flops: float, peak_mib: float
    ) -> Throughput:
        works: dict[str, Callable[[], object]] = {"ours": lambda: encode(ours, rows)}
        even = PaddedEncoder(padded.model, self.scale.max_batch_tokens)
        cosine = math.nan
        try:
            cosine = gpu_models.min_cosine(encode(ours, rows), encode(padded, rows))
            encode(even, rows)
            works |= {"padded": lambda: encode(padded, rows), "even": lambda: encode(even, rows)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        seconds = self.in_turns(works)
        num_tokens = sum(len(row) for row in rows)
        return Throughput(
            lengths=lengths,
            texts_per_s=len(rows) / median(seconds["ours"]),
            tokens_per_s=num_tokens / median(seconds["ours"]),
            tflops=num_flops / median(seconds["ours"]) / 1e12,
            padded_tokens_per_s=num_tokens / median(seconds.get("padded", [])),
            ratio=median_ratio(seconds["padded"], seconds["ours"]) if "padded" in seconds else math.nan,
            even_tokens_per_s=num_tokens / median(seconds.get("even", [])),
            padding=_padding(rows),
            cosine=cosine,
            peak_mib=peak_mib,
        )

    def _latency(self, count: int, length: int, ours: Encoder) -> Latency:
        rows = random_rows([length] * count, self._vocabulary)
        encode(ours, rows)
        quiet = [1000 * self.seconds(lambda: encode(ours, rows)) for _ in range(self.scale.num_latencies)]
        with busy_thread():
            busy = [1000 * self.seconds(lambda: encode(ours, rows)) for _ in range(self.scale.num_latencies)]
        return Latency(count, length, *(percentile(found, share) for found in (quiet, busy) for share in (0.5, 0.99)))

    def _outputs(self, ours: RuntimeEncoder) -> list[Outputs]:
        """Compare dense vectors alone with dense vectors and another output."""
        found = []
        for length in self.scale.output_lengths:
            rows = self._texts(length)
            wanted: dict[str, tuple[str, ...]] = {"dense": (), "sparse": ("sparse",), "multivector": ("multivector",)}
            seconds = self.in_turns({name: partial(ours.read, rows, outputs) for name, outputs in wanted.items()})
            for name in ("sparse", "multivector"):
                cost = median_ratio(seconds[name], seconds["dense"]) - 1
                found.append(Outputs(name, length, len(rows) * length / median(seconds[name]), cost))
        return found

    def _run_tasks(self, name: str, config: PreTrainedConfig, num_weights: int) -> list[Tasks]:
        """Compare merged weights for each task with adapters next to the weights."""
        note(f"{name}, {self.dtype}: tasks")
        merged, adapted = (self._with_tasks(config, merges=merges) for merges in (True, False))
        return [
            self._task_rates(config, length, num_weights, merged, adapted)
            for length in self.scale.lengths
            if length <= 512
        ]

    def _with_tasks(self, config: PreTrainedConfig, *, merges: bool) -> RuntimeEncoder:
        model = gpu_models.build_model(config, self.device, self.dtype)
        with tempfile.TemporaryDirectory() as folder:
            folders = gpu_models.save_adapters(gpu_models.make_adapters(model), Path(folder))
            return gpu_models.gateway_encoder(model, folders, self.scale.max_batch_tokens, merges=merges)

    def _task_rates(
        self, config: PreTrainedConfig, length: int, num_weights: int, merged: Encoder, adapted: Encoder
    ) -> Tasks:
        rows = self._texts(length)
        first, mixed = [0] * len(rows), [i % NUM_TASKS for i in range(len(rows))]
        seconds = self.in_turns(
            {
                "one": lambda: merged.encode(rows, first),
                "five": lambda: merged.encode(rows, mixed),
                "adapted": lambda: adapted.encode(rows, first),
            }
        )
        num_flops = gpu_models.flops(config, num_weights, rows)
        one, five, adapted_rate = (num_flops / median(seconds[key]) / 1e12 for key in ("one", "five", "adapted"))
        cosine = gpu_models.min_cosine(merged.encode(rows, mixed), adapted.encode(rows, mixed))
        return Tasks(length, one, five, adapted_rate, cosine)

    @property
    def _vocabulary(self) -> int:
        return 200 if self.scale.is_tiny else 250_000

    def _texts(self, length: int) -> Rows:
        return random_rows([length] * max(1, self.scale.tokens // length), self._vocabulary)

    def _mixed_texts(self) -> Rows:
        return random_rows(mixed_lengths(self.scale.tokens, max(self.scale.lengths)), self._vocabulary)


def encode(encoder: Encoder, rows: Rows) -> torch.Tensor:
    """Return the vectors of texts without a task."""
    return encoder.encode(rows, [-1] * len(rows))


@contextmanager
def busy_thread() -> Iterator[None]:
    """Run Python in another thread, 60 % of the time, as a busy event loop does."""
    is_over = threading.Event()

    def turn() -> None:
        while not is_over.wait(_IDLE_S):
            end = time.perf_counter() + _BUSY_S
            while time.perf_counter() < end:
                pass

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _model_shapes(scale: Scale) -> tuple[tuple[int, int, int], ...]:
    """Return the products of a layer on a full batch: rows, inner size, columns."""
    width, inner = (32, 64) if scale.is_tiny else (1024, 4096)
    rows = scale.max_batch_tokens
    return (rows, width, width), (rows, width, inner), (rows, inner, width)


def random_rows(lengths: Sequence[int], vocabulary: int) -> Rows:
    """Return texts of random token ids, the same each time, without those that may mean something special."""
    source = random.Random(len(lengths))  # noqa: S311  not for secrets
    return [[source.randrange(5, vocabulary) for _ in range(length)] for length in lengths]


def _padding(rows: Rows) -> float:
    """Return the padding that sorted batches of 32 compute, as a share of the real tokens."""
    lengths = sorted((len(row) for row in rows), reverse=True)
    padded = sum(lengths[first] * len(lengths[first : first + 32]) for first in range(0, len(lengths), 32))
    return padded / sum(lengths) - 1


# -------------------------------------------------------------------------------------------------------------- main


def measure(device: torch.device, dtypes: Sequence[torch.dtype], scale: Scale) -> Findings:
    """Measure both models in each precision, and print the report of each at once: a run may be ended early."""
    matmul: dict[str, dict[str, float]] = {}
    models = []
    configs = {"Jina v3": gpu_models.jina_v3_config, "BGE-M3": gpu_models.bge_m3_config}
    with torch.inference_mode():
        for dtype in dtypes:
            bench = Bench(device, dtype, scale)
            matmul[str(dtype).removeprefix("torch.")] = {
                " x ".join(map(str, shape)): rate for shape, rate in bench.matmul_tflops.items()
            }
            for name, make_config in configs.items():
                models.append(bench.run(name, make_config(is_tiny=scale.is_tiny), has_tasks=name == "Jina v3"))
                note(f"\n{goals_table(models[-1].goals())}\n\n{model_report(models[-1])}\n")
    return Findings(describe_card(device), matmul, models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="torch device (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), action="append", help="default: the first two"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to see that it works")
    parser.add_argument("--fp16-accumulation", action="store_true", help="let matrix products add up in fp16")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device is present; `--device cpu --tiny` runs the same code with tiny models\n")
    if device.type == "cpu" and not options.tiny:
        parser.exit(1, "full-size models on a CPU take hours; add --tiny\n")
    torch.set_num_threads(1)  # what is left for the CPU is small, and threads would only wait for each other
    keep_sums_in_float32()
    default = ("float32",) if device.type == "cpu" else ("float16", "bfloat16")
    dtypes = [getattr(torch, name) for name in options.dtype or default]
    with ACCUMULATION.forward(in_float16=options.fp16_accumulation):
        findings = measure(device, dtypes, TINY if options.tiny else FULL)
    markdown = findings.markdown()
    print(markdown)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_bytes(orjson.dumps({"machine": describe_machine(), **asdict(findings)}))
    if options.update:
        update_page("bench.gpu", markdown)


if __name__ == "__main__":
    main()
