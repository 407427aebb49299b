"""Measure the encoders on a CUDA device, against the limits of the card and against padded batches.

Jina v3 and BGE-M3 at full size with random weights, through the gateway's packed runtime, in turns with transformers' own
model on padded batches in the same precision (what sentence-transformers runs).

    python -m bench.gpu                        on the first CUDA device
    python -m bench.gpu --update               also writes the result into docs/performance.md
    python -m bench.gpu --device cpu --tiny    the same code with tiny models, to see that it works
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import orjson
import torch
from transformers import PreTrainedConfig

from bench import gpu_models
from bench.gpu_findings import Findings, Latency, ModelFindings, Tasks, Throughput
from bench.gpu_models import NUM_TASKS, PaddedEncoder, Rows
from bench.machine import describe_machine
from bench.processes import RESULTS
from bench.report import note, update_page
from bench.stats import median, median_ratio, percentile


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure.

    Attributes:
        matmul: side of the large square product.
        tokens: of the texts that are encoded in one measurement.
        max_batch_tokens: the most tokens of the gateway in one forward.
    """

    is_tiny: bool
    matmul: int
    lengths: Sequence[int]
    tokens: int
    max_batch_tokens: int
    rounds: int
    num_latencies: int


FULL = Scale(False, 8192, (16, 32, 64, 128, 256, 512, 2048, 8192), 131_072, 16_384, 5, 50)
TINY = Scale(True, 64, (4, 16), 128, 64, 2, 3)


class Encoder(Protocol):
    """Turns token ids into vectors."""

    def encode(self, rows: Rows, adapters: Sequence[int]) -> torch.Tensor:
        """Return the vectors on the CPU."""


class Bench:
    """Measures on one device in one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype, scale: Scale) -> None:
        self.device, self.dtype, self.scale = device, dtype, scale
        self.matmul_tflops = {
            shape: self._matmul_tflops(*shape)
            for side in [scale.matmul]
            for shape in ((side, side, side), *_model_shapes(scale))
        }
        self.peak_tflops = self.matmul_tflops[scale.matmul, scale.matmul, scale.matmul]

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

    def peak_mib(self, work: Callable[[], object]) -> float:
        """Return the most memory that is allocated during ``work``, models included."""
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
        """Measure a model."""
        throughput, latency = self._run_without_tasks(name, config)
        tasks = self._run_tasks(name, config) if has_tasks else []
        return ModelFindings(name, str(self.dtype).removeprefix("torch."), throughput, latency, tasks)

    def _run_without_tasks(self, name: str, config: PreTrainedConfig) -> tuple[list[Throughput], list[Latency]]:
        model = gpu_models.build_model(config, self.device, self.dtype)
        num_weights = gpu_models.linear_params(model)
        ours = gpu_models.packed_encoder(model, (), self.scale.max_batch_tokens)
        padded = PaddedEncoder(gpu_models.build_model(config, self.device, self.dtype))
        texts = {str(length): self._texts(length) for length in self.scale.lengths} | {"mixed": self._mixed_texts()}
        throughput = []
        for lengths, rows in texts.items():
            note(f"{name}, {self.dtype}: {lengths}")
            throughput.append(
                self._throughput(lengths, rows, ours, padded, gpu_models.flops(config, num_weights, rows))
            )
        return throughput, [self._latency(count, length, ours) for count, length in ((1, 16), (32, 16), (32, 128))]

    def _throughput(self, lengths: str, rows: Rows, ours: Encoder, padded: Encoder, num_flops: float) -> Throughput:
        none = [-1] * len(rows)
        works: dict[str, Callable[[], object]] = {"ours": lambda: ours.encode(rows, none)}
        peak_mib = self.peak_mib(works["ours"])
        cosine = math.nan
        try:
            cosine = gpu_models.min_cosine(ours.encode(rows, none), padded.encode(rows, none))
            works["padded"] = lambda: padded.encode(rows, none)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        seconds = self.in_turns(works)
        num_tokens = sum(len(row) for row in rows)
        tflops = num_flops / median(seconds["ours"]) / 1e12
        return Throughput(
            lengths=lengths,
            texts_per_s=len(rows) / median(seconds["ours"]),
            tokens_per_s=num_tokens / median(seconds["ours"]),
            tflops=tflops,
            share=tflops / self.peak_tflops,
            padded_tokens_per_s=num_tokens / median(seconds.get("padded", [])),
            ratio=median_ratio(seconds["padded"], seconds["ours"]) if "padded" in seconds else math.nan,
            padding=_padding(rows),
            cosine=cosine,
            peak_mib=peak_mib,
        )

    def _latency(self, count: int, length: int, ours: Encoder) -> Latency:
        rows = random_rows([length] * count, self._vocabulary)
        ours.encode(rows, [-1] * count)
        seconds = [self.seconds(lambda: ours.encode(rows, [-1] * count)) for _ in range(self.scale.num_latencies)]
        return Latency(f"{count} x {length} tokens", 1000 * percentile(seconds, 0.5), 1000 * percentile(seconds, 0.99))

    def _run_tasks(self, name: str, config: PreTrainedConfig) -> list[Tasks]:
        """Compare adapters with the weights that one of them is merged into."""
        note(f"{name}, {self.dtype}: tasks")
        merged_model = gpu_models.build_model(config, self.device, self.dtype)
        adapters = gpu_models.make_adapters(merged_model)
        gpu_models.merge_adapter(merged_model, adapters[0])
        merged = gpu_models.packed_encoder(merged_model, (), self.scale.max_batch_tokens)
        with tempfile.TemporaryDirectory() as folder:
            folders = gpu_models.save_adapters(adapters, Path(folder))
            model = gpu_models.build_model(config, self.device, self.dtype)
            adapted = gpu_models.packed_encoder(model, folders, self.scale.max_batch_tokens)
        return [self._task_shares(length, adapted, merged) for length in self.scale.lengths if length <= 512]

    def _task_shares(self, length: int, adapted: Encoder, merged: Encoder) -> Tasks:
        rows = self._texts(length)
        none, first = [-1] * len(rows), [0] * len(rows)
        mixed = [i % NUM_TASKS for i in range(len(rows))]
        seconds = self.in_turns(
            {
                "merged": lambda: merged.encode(rows, none),
                "one": lambda: adapted.encode(rows, first),
                "five": lambda: adapted.encode(rows, mixed),
            }
        )
        return Tasks(
            length=length,
            merged_tokens_per_s=len(rows) * length / median(seconds["merged"]),
            one_task=median_ratio(seconds["merged"], seconds["one"]),
            five_tasks=median_ratio(seconds["merged"], seconds["five"]),
            cosine=gpu_models.min_cosine(adapted.encode(rows, first), merged.encode(rows, none)),
        )

    @property
    def _vocabulary(self) -> int:
        return 200 if self.scale.is_tiny else 250_000

    def _texts(self, length: int) -> Rows:
        return random_rows([length] * max(1, self.scale.tokens // length), self._vocabulary)

    def _mixed_texts(self) -> Rows:
        return random_rows(mixed_lengths(self.scale.tokens, max(self.scale.lengths)), self._vocabulary)


def _model_shapes(scale: Scale) -> tuple[tuple[int, int, int], ...]:
    """Return the products of a layer on a full batch: rows, inner size, columns."""
    width, inner = (32, 64) if scale.is_tiny else (1024, 4096)
    rows = scale.max_batch_tokens
    return (rows, width, width), (rows, width, inner), (rows, inner, width)


def random_rows(lengths: Sequence[int], vocabulary: int) -> Rows:
    """Return texts of random token ids, the same each time, without those that may mean something special."""
    source = random.Random(len(lengths))  # noqa: S311  not for secrets
    return [[source.randrange(5, vocabulary) for _ in range(length)] for length in lengths]


def mixed_lengths(num_tokens: int, longest: int) -> list[int]:
    """Return lengths as texts have them, most short and a few very long: log-normal, 60 tokens in the middle."""
    source = random.Random(0)  # noqa: S311
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(max(4, min(longest, round(source.lognormvariate(math.log(60), 1.2)))))
    return lengths


def _padding(rows: Rows) -> float:
    """Return the padding that sorted batches of 32 compute, as a share of the real tokens."""
    lengths = sorted((len(row) for row in rows), reverse=True)
    padded = sum(lengths[first] * len(lengths[first : first + 32]) for first in range(0, len(lengths), 32))
    return padded / sum(lengths) - 1


# -------------------------------------------------------------------------------------------------------------- main


def measure(device: torch.device, dtypes: Sequence[torch.dtype], scale: Scale) -> Findings:
    """Measure both models in each precision."""
    matmul: dict[str, dict[str, float]] = {}
    models = []
    with torch.inference_mode():
        for dtype in dtypes:
            bench = Bench(device, dtype, scale)
            matmul[str(dtype).removeprefix("torch.")] = {
                " x ".join(map(str, shape)): rate for shape, rate in bench.matmul_tflops.items()
            }
            models.append(bench.run("Jina v3", gpu_models.jina_v3_config(is_tiny=scale.is_tiny), has_tasks=True))
            models.append(bench.run("BGE-M3", gpu_models.bge_m3_config(is_tiny=scale.is_tiny), has_tasks=False))
    return Findings(_describe_device(device), matmul, models)


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    accumulation = "fp16" if torch.backends.cuda.matmul.allow_fp16_accumulation else "fp32"
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, "
        f"{accumulation} accumulation"
    )


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
    default = ("float32",) if device.type == "cpu" else ("float16", "bfloat16")
    torch.backends.cuda.matmul.allow_fp16_accumulation = options.fp16_accumulation
    dtypes = [getattr(torch, name) for name in options.dtype or default]
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
