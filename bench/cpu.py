"""The forward pass on a CPU: rows that texts share, a row for each text, and the rate of the processor's matrix products.

python -m bench.cpu                  about two minutes
python -m bench.cpu --clock cpu      for a machine that others use: rates of the processor time that was spent
python -m bench.cpu --update         also writes the tables into docs/performance.md

No HTTP, no queue: batches of token ids, taken in turns by as many threads as the runtime has streams. ModernBERT has random
weights in the size of gte-modernbert-base, which are as fast as the real ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, ModernBertConfig, ModernBertModel, PreTrainedModel

from bench.bare import bundled_model
from bench.machine import describe_machine
from bench.report import note, number, table, update_page
from bench.stats import median
from bench.texts import Sentences
from gateway.engine.devices import CpuThreads, choose_cpu_threads, choose_dtype
from gateway.engine.model.runtimes.attention import attention_rule
from gateway.engine.model.runtimes.base import Runtime
from gateway.engine.model.runtimes.openvino import OpenVinoRuntime, TracedModel
from gateway.engine.model.runtimes.padded import PaddedRuntime

_BATCHES = (1, 4, 8, 16, 25, 32, 90)
_MIXED = 25
_ROUNDS = 5
_MATMUL = (512, 1024, 2048)
# ModernBERT is twenty times as large as all-MiniLM-L6-v2.
_MODERNBERT_SHARE = 8
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Rows = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Clock:
    """Measures seconds; those of a processor's time are shared by the threads that spent them."""

    name: str

    def seconds(self, work: Callable[[], object], num_threads: int) -> float:
        read = _CLOCKS[self.name]
        started = read()
        work()
        return (read() - started) / (num_threads if self.name == "cpu" else 1)


@dataclass(frozen=True, slots=True)
class Subject:
    """A runtime under measurement, in all of its streams."""

    runtimes: Sequence[Runtime]
    num_threads: int

    def encode(self, batches: Sequence[Rows]) -> float:
        """Compute batches, and return how much of it was padding."""
        queue = iter(batches)
        with ThreadPoolExecutor(len(self.runtimes)) as pool:
            counts = list(pool.map(lambda runtime: _encode(runtime, queue), self.runtimes))
        padding = sum(count for count, _ in counts)
        return padding / (padding + sum(count for _, count in counts))


@torch.inference_mode()
def _encode(runtime: Runtime, batches: object) -> tuple[int, int]:
    """Compute batches until none is left, and return the tokens of padding and of texts."""
    num_padding = num_tokens = 0
    for rows in batches:  # type: ignore[attr-defined]
        for group in runtime.groups([len(row) for row in rows]):
            states = runtime.forward(runtime.prepare([rows[i] for i in group], [-1] * len(group)))
            num_padding += states.num_padding
            num_tokens += len(states.flat)
    return num_padding, num_tokens


def compare(subjects: dict[str, Subject], rows: Rows, size: int, clock: Clock) -> dict[str, tuple[float, float]]:
    """Measure subjects in turns on batches of ``size`` texts; return texts per second and the share of padding of each."""
    batches = [rows[first : first + size] for first in range(0, len(rows) - size + 1, size)]
    rates: dict[str, list[float]] = {name: [] for name in subjects}
    padding = {
        name: subject.encode(batches) for name, subject in subjects.items()
    }  # not counted: the first time is slower
    for _ in range(_ROUNDS):
        for name, subject in subjects.items():
            seconds = clock.seconds(lambda subject=subject: subject.encode(batches), subject.num_threads)  # type: ignore[misc]
            rates[name].append(len(batches) * size / seconds)
    return {name: (median(rates[name]), padding[name]) for name in subjects}


def matmul_rate(dtype: str, num_threads: int, clock: Clock) -> float:
    """Return the best rate of torch's square products in a precision, in operations per second."""
    torch.set_num_threads(num_threads)
    best = 0.0
    for size in _MATMUL:
        left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(left)
        count = max(1, 2 * (_MATMUL[-1] // size) ** 3)
        for _ in range(_ROUNDS):
            seconds = clock.seconds(lambda: [torch.mm(left, right, out=out) for _ in range(count)], num_threads)  # noqa: B023
            best = max(best, 2 * size**3 * count / seconds)
    torch.set_num_threads(1)
    return best


def operations_per_token(model: PreTrainedModel) -> int:
    """Return the operations of a token's linear layers; those of the attention depend on its text, and are left out."""
    return sum(2 * layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def token_ids(folder: Path, count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return [encoding.ids for encoding in tokenizer.encode_batch(Sentences(seed=22).take(count))]


def compiled(model: PreTrainedModel, dtype: str, threads: CpuThreads, *, share_rows: bool) -> Subject:
    rule = attention_rule(model.config) if share_rows else None
    runtimes = OpenVinoRuntime.compile(TracedModel.trace(model, None, rule, has_segments=False), dtype, threads)
    return Subject(runtimes, threads.num_streams * threads.per_stream)


def prepared(model: Any) -> PreTrainedModel:
    model.config.use_cache = False
    model.pooler = None
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def bundled_table(rows: Rows, sizes: Sequence[int], dtype: str, threads: CpuThreads, clock: Clock) -> str:
    """Compare rows that are shared with rows that are not, with the bundled model."""
    model = prepared(AutoModel.from_pretrained(bundled_model()))
    subjects = {
        "a row per text": compiled(model, dtype, threads, share_rows=False),
        "shared rows": compiled(model, dtype, threads, share_rows=True),
    }
    num_threads = subjects["shared rows"].num_threads
    per_text = operations_per_token(model) * sum(map(len, rows)) / len(rows)
    lines = []
    for size in sizes:
        note(f"batches of {size}")
        found = compare(subjects, rows, size, clock)
        limit = matmul_rate(dtype, num_threads, clock)
        (before, padded), (after, padding) = found.values()
        shares = [number(100 * rate * per_text / limit) for rate in (before, after)]
        lines.append(
            [
                *(str(size), number(before), number(after), f"{after / before:.2f}", *shares),
                *(number(100 * padded), number(100 * padding), number(limit / 1e12)),
            ]
        )
    header = ("texts per batch", "texts/s, a row per text", "shared rows", "ratio", "% of matmul", "shared rows, %")
    return table((*header, "padding, %", "shared rows, %", "matmul, TFLOP/s"), lines)


def modernbert_table(rows: Rows, dtype: str, threads: CpuThreads, clock: Clock) -> str:
    """Compare OpenVINO with torch, with a model that has windows."""
    torch.manual_seed(5)
    config = ModernBertConfig(pad_token_id=0)
    model = prepared(ModernBertModel(config))
    ours = compiled(model, dtype, threads, share_rows=True)
    num_threads = choose_cpu_threads(0, "torch").per_stream
    torch.set_num_threads(num_threads)
    theirs = Subject([PaddedRuntime(model.to(getattr(torch, dtype)), None)], num_threads)
    note("ModernBERT")
    found = compare(
        {"torch": theirs, "OpenVINO": ours}, rows[: max(_MIXED, len(rows) // _MODERNBERT_SHARE)], _MIXED, clock
    )
    (before, _), (after, padding) = found.values()
    row = [str(_MIXED), number(before), number(after), f"{after / before:.2f}", number(100 * padding)]
    return table(("texts per batch", "texts/s, torch", "OpenVINO", "ratio", "padding, %"), [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clock", choices=tuple(_CLOCKS), default="wall")
    parser.add_argument("--texts", type=int, default=720)
    parser.add_argument("--batches", type=int, nargs="+", default=_BATCHES, help="texts per batch")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args()
    clock = Clock(options.clock)
    threads, dtype = choose_cpu_threads(0, "openvino"), choose_dtype("auto", "cpu")
    rows = token_ids(bundled_model(), options.texts)
    about = (
        f"{dtype}, {threads.num_streams} stream(s) of {threads.per_stream} thread(s), sentences of "
        f"{sum(map(len, rows)) / len(rows):.1f} tokens on average, medians of {_ROUNDS} turns. "
    )
    if clock.name == "cpu":
        about += "Rates are of processor time, shared by the threads: others used the machine."
    parts = [
        describe_machine(),
        about,
        "**all-MiniLM-L6-v2**",
        bundled_table(rows, options.batches, dtype, threads, clock),
    ]
    parts += ["**ModernBERT, 22 layers of 768**", modernbert_table(rows, dtype, threads, clock)]
    markdown = "\n\n".join(parts)
    print(f"\n{markdown}")
    if options.update:
        update_page("bench.cpu", markdown)


if __name__ == "__main__":
    main()
