"""Compare the gateway's engine with sentence-transformers on a card, from texts to vectors.

Both read one checkpoint with BGE-M3's shape, random weights, and a tokenizer that has a word for each id, in float16, and
take turns. The engine is the gateway's own, from submitting a job to its vectors; sentence-transformers gets all texts at
once, with its usual batches of 32 texts and with larger ones.

    python -m bench.gpu_peers                        on the first CUDA device
    python -m bench.gpu_peers --update               also writes the table into docs/performance.md
    python -m bench.gpu_peers --device cpu --tiny    the same code with a tiny model, to see that it works
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer, __version__
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench import gpu_models
from bench.gpu_card import describe_card
from bench.gpu_models import min_cosine, mixed_lengths
from bench.machine import describe_machine
from bench.report import Goal, goals_table, note, number, table, update_page
from bench.stats import median, median_ratio
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine.loading import load_engine, plan_load
from gateway.types import EmbedJob, Output, Truncate

_ROUNDS = 3
# Texts of a job, as a client's request has them, and the jobs that wait for an answer at a time.
_JOB_TEXTS, _NUM_JOBS = 256, 8
_LARGE_BATCH = 256
_OTHERS = (Output.SPARSE, Output.MULTIVECTOR)
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

K = TypeVar("K")
Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Row:
    """Texts of one length, or of mixed ones.

    Attributes:
        tokens_per_s: of the engine, of sentence-transformers, and of that with large batches.
        ratios: of the engine to the other two.
        cosine: the lowest cosine between vectors of the engine and of sentence-transformers.
    """

    lengths: str
    tokens_per_s: Sequence[float]
    ratios: Sequence[float]
    cosine: float


@dataclass(frozen=True, slots=True)
class Findings:
    """All measurements.

    Attributes:
        costs: of each other output: the time that it adds to dense vectors, as a share of theirs, with texts of 64 tokens.
    """

    rows: Sequence[Row]
    costs: Mapping[Output, float]


def make_checkpoint(folder: Path, device: torch.device, *, is_tiny: bool) -> None:
    """Write a checkpoint as sentence-transformers saves one; its words are "t" and their ids."""
    config = gpu_models.bge_m3_config(is_tiny=is_tiny)
    model = gpu_models.build_model(config, device, torch.float16 if device.type == "cuda" else torch.float32)
    model.save_pretrained(folder / "transformer")
    ids = {name: i for i, name in enumerate(_SPECIAL)} | {f"t{i}": i for i in range(len(_SPECIAL), config.vocab_size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))  # noqa: S106  no password
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, model_max_length=8192, **names
    )
    tokenizer.save_pretrained(folder / "transformer")
    modules = [Transformer(str(folder / "transformer")), Pooling(config.hidden_size, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"), create_model_card=False)
    for name, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", config.hidden_size)):
        torch.save(torch.nn.Linear(config.hidden_size, width).half().state_dict(), folder / "model" / name)


def make_texts(lengths: Sequence[int], *, is_tiny: bool) -> list[str]:
    """Return texts of so many tokens, the two special ones included."""
    source = random.Random(len(lengths))  # noqa: S311  not for secrets
    last = 199 if is_tiny else 250_001
    return [" ".join(f"t{source.randint(4, last)}" for _ in range(max(1, length - 2))) for length in lengths]


class Ours:
    """The engine, and the event loop that it runs in."""

    def __init__(self, folder: Path, device: str) -> None:
        self._runner = asyncio.Runner()
        source = str(folder / "model")
        entry = {"source": source, "device": device, "outputs": (Output.DENSE, *_OTHERS), "enabled": True}
        plan = plan_load(ModelEntry.model_validate({"id": "bench", **entry}))
        self._engine = load_engine(plan, Settings())
        self._runner.run(self._engine.astart())
        gc.collect()
        gc.freeze()  # as the gateway does after its start

    def encode(self, texts: Sequence[str], *others: Output) -> npt.NDArray[np.float32]:
        """Return the dense vectors of texts; other outputs are computed too."""
        return self._runner.run(self._encode(texts, frozenset({Output.DENSE, *others})))

    async def _encode(self, texts: Sequence[str], outputs: frozenset[Output]) -> npt.NDArray[np.float32]:
        slots = asyncio.Semaphore(_NUM_JOBS)

        async def embed(part: Sequence[str]) -> npt.NDArray[np.float32]:
            async with slots:
                job = EmbedJob(part, None, Truncate.END, time.monotonic() + 3600, "bench", outputs)
                return (await self._engine.submit(job)).vectors

        parts = [texts[first : first + _JOB_TEXTS] for first in range(0, len(texts), _JOB_TEXTS)]
        return np.concatenate(await asyncio.gather(*map(embed, parts)))

    def close(self) -> None:
        self._runner.run(self._engine.astop())
        self._runner.close()


def measure(device: torch.device, *, is_tiny: bool) -> Findings:
    """Measure texts of several lengths, each side in turn, and the other outputs of the engine."""
    num_tokens, lengths = (200, (8,)) if is_tiny else (65_536, (16, 64, 512))
    kinds: dict[str, list[int]] = {str(length): [length] * (num_tokens // length) for length in lengths}
    kinds["mixed"] = mixed_lengths(num_tokens, 64 if is_tiny else 8192)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, device, is_tiny=is_tiny)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        peer = SentenceTransformer(str(folder / "model"), device=str(device), model_kwargs={"dtype": dtype})
        ours = Ours(folder, "cuda:0" if device.type == "cuda" else "cpu")
        encoders: Mapping[str, Encode] = {
            "ours": ours.encode,
            "theirs": lambda texts: np.asarray(peer.encode(list(texts), show_progress_bar=False)),
            "large": lambda texts: np.asarray(
                peer.encode(list(texts), batch_size=_LARGE_BATCH, show_progress_bar=False)
            ),
        }
        try:
            rows = [
                _row(kind, make_texts(found, is_tiny=is_tiny), sum(found), encoders) for kind, found in kinds.items()
            ]
            return Findings(rows, _costs(ours, make_texts([64] * (num_tokens // 64), is_tiny=is_tiny)))
        finally:
            ours.close()


def _row(kind: str, texts: Sequence[str], num_tokens: int, encoders: Mapping[str, Encode]) -> Row:
    note(f"{kind}: {len(texts)} texts")
    vectors = {name: torch.from_numpy(encode(texts)).float() for name, encode in encoders.items()}  # warms up
    seconds = _in_turns({name: partial(encode, texts) for name, encode in encoders.items()})
    row = Row(
        kind,
        [num_tokens / median(times) for times in seconds.values()],
        [median_ratio(seconds[name], seconds["ours"]) for name in ("theirs", "large")],
        min_cosine(vectors["ours"], vectors["theirs"]),
    )
    note(
        f"{kind}: {' '.join(map(number, (*row.tokens_per_s, *row.ratios)))}, cosine {row.cosine:.6f}"
    )  # it may end early
    return row


def _costs(ours: Ours, texts: Sequence[str]) -> dict[Output, float]:
    note("other outputs")
    works = {output: partial(ours.encode, texts, output) for output in (Output.DENSE, *_OTHERS)}
    for work in works.values():
        work()
    seconds = _in_turns(works)
    return {output: median_ratio(seconds[output], seconds[Output.DENSE]) - 1 for output in _OTHERS}


def _in_turns(works: Mapping[K, Callable[[], object]]) -> dict[K, list[float]]:
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for _ in range(_ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def markdown(device: torch.device, findings: Findings) -> str:
    """Return the tables for the documentation."""
    rows = findings.rows
    goals = [
        Goal("mixed lengths, against sentence-transformers with batches of 32", ">=", 2, "x", rows[-1].ratios[0]),
        Goal("sparse output through the engine, 64 tokens", "<=", 0.1, "%", findings.costs[Output.SPARSE]),
    ]
    header = (
        "tokens per text",
        "engine, tokens/s",
        "sentence-transformers, tokens/s",
        f"in batches of {_LARGE_BATCH}",
        "engine, x",
        f"x batches of {_LARGE_BATCH}",
        "lowest cosine",
    )
    lines = [(row.lengths, *map(number, (*row.tokens_per_s, *row.ratios)), f"{row.cosine:.6f}") for row in rows]
    costs = [(output.value, f"{cost:.1%}") for output, cost in findings.costs.items()]
    what = f"{describe_card(device)}; sentence-transformers {__version__}; {describe_machine()}"
    return "\n\n".join(
        (what, goals_table(goals), table(header, lines), table(("next to dense, 64 tokens", "added time"), costs))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="torch device (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: only to see that it works")
    parser.add_argument("--update", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device is present; `--device cpu --tiny` runs the same code with a tiny model\n")
    text = markdown(device, measure(device, is_tiny=options.tiny))
    print(text)
    if options.update:
        update_page("bench.gpu_peers", text)


if __name__ == "__main__":
    main()
