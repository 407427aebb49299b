"""Count the cost of a forward pass on a card, without a card: kernels, calls of the host, its time, and bytes of memory.

Full-size Jina v3 and BGE-M3 on fake tensors, whose devices, types and shapes are those of a card and which compute nothing.
*Before* is transformers' own model on padded texts, *now* the gateway's packed forward. The host's time is measured, with as
many layers of width 16 and an attention that returns at once; a CPU launches other kernels, so only the ratio counts.

    python -m bench.gpu_counts              prints the tables, in half a minute
    python -m bench.gpu_counts --update     also writes them into docs/performance.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from transformers import JinaEmbeddingsV3Config, PreTrainedConfig, XLMRobertaConfig

from bench import gpu_models
from bench.emulated_card import Launches, Traffic, fake_card, fake_model
from bench.machine import describe_machine
from bench.report import Goal, goals_table, number, table, update_page
from bench.stats import median, median_ratio
from gateway.engine.model.runtimes import network
from gateway.engine.model.runtimes.own_kernels import Normalize, Rotate
from gateway.engine.model.runtimes.packed import PackedRuntime
from gateway.engine.model.runtimes.padded import PaddedRuntime
from gateway.engine.model.runtimes.short_attention import Attend

if TYPE_CHECKING:
    from gateway.engine.model.runtimes.base import Runtime

# Calls of the host for a forward that is a graph: its input, the graph, and its output.
GRAPH_CALLS = 3
_NUM_TEXTS, _LENGTH = 256, 64


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the requested outputs.

    Attributes:
        adapters: of two short texts; -1 for no adapter.
        merges: there are weights for each adapter.
        most: the goal for the calls of a forward, or ``None``.
    """

    name: str
    config: PreTrainedConfig
    adapters: tuple[int, int] = (-1, -1)
    merges: bool = False
    most: int | None = None

    @property
    def num_adapters(self) -> int:
        return gpu_models.NUM_TASKS if max(self.adapters) >= 0 else 0


@dataclass(frozen=True, slots=True)
class Counts:
    """The cost of a forward pass.

    Attributes:
        kernels: that the card runs, before and now.
        calls: of torch by the host, views and allocations included, before and now.
        own: kernels with the gateway's own two among them.
        host_ms: before and now.
        kib: of activations for a token and layer, before and now: of element-wise kernels, and of all.
    """

    case: Case
    kernels: tuple[int, int]
    calls: tuple[int, int]
    own: int
    host_ms: tuple[float, float]
    host_ratio: float
    kib: tuple[tuple[float, float], tuple[float, float]]


def cases(*, is_tiny: bool = False) -> list[Case]:
    """Return the cases: the two models of ``models.yaml`` that are made for a card."""
    jina, m3 = gpu_models.jina_v3_config(is_tiny=is_tiny), gpu_models.bge_m3_config(is_tiny=is_tiny)
    return [
        Case("BGE-M3", m3, most=150),
        Case("Jina v3, one task, merged weights", jina, (2, 2), merges=True, most=350),
        Case("Jina v3, one task, adapters", jina, (2, 2), most=350),
        Case("Jina v3, several tasks in a row", jina, (2, 4), most=350),
    ]


def count(case: Case) -> Counts:
    """Count a forward of two short texts, and one of a large batch."""
    adapters = list(case.adapters)
    with fake_card():
        before, now = _runtimes(case)
        reference, packed = (_launches(one, adapters) for one in (before, now))
        sizes = {_NUM_TEXTS, _NUM_TEXTS * _LENGTH}
        traffic = [_traffic(one, adapters, sizes, case.config) for one in (before, now)]
        own = _launches(now, adapters, has_own=True)
    seconds = _host_seconds(case)
    return Counts(
        case,
        (reference.total, packed.total),
        (reference.num_calls, packed.num_calls),
        own.total,
        (1000 * median(seconds["before"]), 1000 * median(seconds["now"])),
        median_ratio(seconds["now"], seconds["before"]),
        (traffic[0], traffic[1]),
    )


def _runtimes(case: Case) -> tuple[PaddedRuntime, PackedRuntime]:
    model, mask = fake_model(case.config, torch.float16, case.num_adapters)
    before = PaddedRuntime(model, mask)
    now = PackedRuntime(model, mask)
    if case.merges:
        now.merge()
    return before, now


def _launches(runtime: Runtime, adapters: Sequence[int], *, has_own: bool = False) -> Launches:
    """Count the kernels of two texts of 8 tokens."""
    launches = Launches()
    if has_own and isinstance(runtime, PackedRuntime):
        heads, turns = runtime.network.heads, runtime.network.rotary_table
        runtime.network.attend_short = Attend(heads, launches.launch, turns)
        runtime.network.rotate = None if turns is None else Rotate(heads, turns, launches.launch)
        runtime.network.normalize = Normalize(launches.launch)
        runtime.network.activate = network.activated_product
    features = runtime.prepare([[5] * 8, [6] * 8], adapters)
    with launches:
        runtime.forward(features)
    return launches


def _traffic(
    runtime: Runtime, adapters: Sequence[int], sizes: set[int], config: PreTrainedConfig
) -> tuple[float, float]:
    """Return the KiB of activations for a token and layer, of element-wise kernels and of all."""
    half = _NUM_TEXTS // 2
    features = runtime.prepare([[5] * _LENGTH] * _NUM_TEXTS, [adapters[0]] * half + [adapters[1]] * half)
    with Traffic(sizes) as traffic:
        runtime.forward(features)
    places = 1024 * _NUM_TEXTS * _LENGTH * config.num_hidden_layers
    return traffic.elementwise_bytes / places, traffic.total_bytes / places


def _host_seconds(case: Case, rounds: int = 15) -> dict[str, list[float]]:
    """Return the CPU seconds of this thread for a forward, before and now, measured in turns."""
    torch.set_num_threads(1)
    small = _narrow(case.config)
    model = gpu_models.build_model(small, torch.device("cpu"), torch.float32)
    mask = gpu_models.add_adapters(model) if case.num_adapters else None
    before, now = PaddedRuntime(model, mask), PackedRuntime(model, mask)
    if case.merges:
        now.merge()
    runtimes: Sequence[tuple[str, Any]] = (("before", before), ("now", now))
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    with torch.inference_mode(), mock.patch.object(network, "attend", _attend_at_once):
        for _ in range(rounds):
            for name, runtime in runtimes:
                features = runtime.prepare([[5] * 8, [6] * 8], list(case.adapters))
                began = time.thread_time()
                runtime.forward(features)
                seconds[name].append(time.thread_time() - began)
    return {name: found[2:] for name, found in seconds.items()}  # the first ones make room


def _attend_at_once(query: torch.Tensor, *_rest: object) -> torch.Tensor:
    return torch.empty(query.shape)


def _narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration with as many layers, each as narrow as possible."""
    kind = JinaEmbeddingsV3Config if isinstance(config, JinaEmbeddingsV3Config) else XLMRobertaConfig
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 200}
    return kind(**{**config.to_dict(), **narrow, "pad_token_id": 1})


# -------------------------------------------------------------------------------------------------------------- main


def goals(found: Sequence[Counts]) -> list[Goal]:
    """Return the goals of the calls by which the host launches a forward, and of its time."""
    reached = []
    for one in found:
        if one.case.most is not None:
            note = f"a graph of {one.own} kernels"
            reached.append(Goal(f"{one.case.name}: launches with a graph", "<=", one.case.most, "", GRAPH_CALLS, note))
            reached.append(Goal(f"{one.case.name}: launches without a graph", "<=", one.case.most, "", one.own))
        reached.append(Goal(f"{one.case.name}: host time without a graph, of before", "<=", 1 / 3, "x", one.host_ratio))
    return reached


def markdown(found: Sequence[Counts]) -> str:
    """Return the tables for the documentation."""
    launched = [
        (
            one.case.name,
            *map(str, (*one.kernels, one.own)),
            *(f"{calls:,}" for calls in one.calls),
            str(GRAPH_CALLS),
        )
        for one in found
    ]
    spent = [
        (one.case.name, *map(number, (*one.host_ms, one.host_ratio)), *(number(k) for pair in one.kib for k in pair))
        for one in found
    ]
    return "\n\n".join(
        (
            describe_machine(),
            goals_table(goals(found)),
            table(
                (
                    "two texts of 8 tokens",
                    "kernels, before",
                    "now",
                    "with ours",
                    "calls of torch, before",
                    "now",
                    "as a graph",
                ),
                launched,
            ),
            table(
                (
                    "",
                    "host, before, ms",
                    "now",
                    "ratio",
                    "KiB per token and layer, before: element-wise",
                    "all",
                    "now: element-wise",
                    "all",
                ),
                spent,
            ),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to see that it works")
    parser.add_argument("--update", action="store_true", help="write the tables into docs/performance.md")
    options = parser.parse_args()
    text = markdown([count(case) for case in cases(is_tiny=options.tiny)])
    print(text)
    if options.update:
        update_page("bench.gpu_counts", text)


if __name__ == "__main__":
    main()
