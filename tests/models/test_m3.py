"""BGE-M3: its dense, sparse and multi-vector outputs equal FlagEmbedding's, in any batch and any combination."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from gateway.config.registry import ModelEntry
from gateway.engine.devices import choose_dtype
from gateway.engine.loading import plan_load
from gateway.engine.model.items import Encoded
from gateway.errors import LoadError
from gateway.types import Output
from tests.models.checkpoints import TEXTS, linear_head
from tests.models.plain import entry, load_whole

Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
Tokenize = Callable[..., list[int]]
Load = Callable[..., Any]
Copy = Callable[[Path], Path]

RUNTIMES = ("reference", "packed", "openvino")
ALL = (Output.DENSE, Output.SPARSE, Output.MULTIVECTOR)
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(ALL, size)]
SPECIAL_IDS = {0, 1, 2, 3}  # <s>, <pad>, </s>, <unk>
# Words twice, unknown letters, and special tokens that are written in the text.
M3_TEXTS = (*TEXTS, "fox fox near fox near", "\U0001f98a \U0001f98a", "near <pad> vectors </s> fox <s> Berlin <unk>")


@dataclass(frozen=True)
class Expected:
    """What FlagEmbedding 1.4's ``M3Embedder`` and its model return for one text."""

    dense: np.ndarray
    sparse: dict[int, float]
    multivector: np.ndarray


@pytest.fixture(scope="module")
def expected(m3: Path, tokenize: Tokenize) -> list[Expected]:
    """Compute the three outputs of each text by itself, by the rules of FlagEmbedding, as plainly as can be."""
    model = AutoModel.from_pretrained(m3).eval()
    sparse, multi = (torch.load(m3 / f"{name}.pt", weights_only=True) for name in ("sparse_linear", "colbert_linear"))

    @torch.inference_mode()
    def compute(text: str) -> Expected:
        ids = tokenize(m3, text)
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        dense = states[0] / states[0].norm()
        weights: dict[int, float] = {}
        for token, state in zip(ids, states, strict=True):
            weight = max(0.0, float(sparse["weight"][0].float() @ state + sparse["bias"][0].float()))
            if token not in SPECIAL_IDS and weight > weights.get(token, 0.0):
                weights[token] = weight
        vectors = [multi["weight"].float() @ state + multi["bias"].float() for state in states[1:]]
        return Expected(dense.numpy(), weights, np.stack([(vector / vector.norm()).numpy() for vector in vectors]))

    return [compute(text) for text in M3_TEXTS]


def check(encoded: Encoded, expected: Expected, outputs: tuple[Output, ...], tolerance: float = 5e-4) -> None:
    """Check that the outputs are exactly the wanted ones, and are right."""
    dense = encoded.dense[0] / np.linalg.norm(encoded.dense[0])
    np.testing.assert_allclose(dense, expected.dense, atol=tolerance)
    assert (encoded.sparse is None, encoded.multivector is None) == (
        Output.SPARSE not in outputs,
        Output.MULTIVECTOR not in outputs,
    )
    if encoded.sparse is not None:
        assert encoded.sparse.indices.dtype == np.int64
        assert encoded.sparse.values.dtype == np.float32
        assert encoded.sparse.indices.tolist() == sorted(expected.sparse)
        values = [expected.sparse[token] for token in sorted(expected.sparse)]
        np.testing.assert_allclose(encoded.sparse.values, values, atol=5 * tolerance)
    if encoded.multivector is not None:
        assert encoded.multivector.dtype == np.float32
        np.testing.assert_allclose(encoded.multivector, expected.multivector, atol=tolerance)


def test_the_texts_are_worth_comparing(expected: list[Expected], cosines: Cosines) -> None:
    dense = np.stack([one.dense for one in expected])

    assert cosines(dense[:-1], dense[1:]).max() < 0.999
    assert sum(len(one.sparse) for one in expected) > 50
    assert {len(one.multivector) for one in expected} > {1, 2, 63}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_outputs_of_a_batch(m3: Path, load: Load, expected: list[Expected], runtime: str) -> None:
    encoded = load(m3, runtime).encode(M3_TEXTS, outputs=[ALL] * len(M3_TEXTS))

    for one, right in zip(encoded, expected, strict=True):
        check(one, right, ALL)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_outputs_of_a_text_alone(m3: Path, load: Load, expected: list[Expected], runtime: str) -> None:
    for text, right in zip(M3_TEXTS, expected, strict=True):
        [one] = load(m3, runtime).encode([text], outputs=[ALL])
        check(one, right, ALL)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_text_of_a_batch_gets_the_outputs_that_it_asks_for(
    m3: Path, load: Load, expected: list[Expected], runtime: str
) -> None:
    model = load(m3, runtime)
    for shift in range(len(SUBSETS)):
        outputs = [SUBSETS[(i + shift) % len(SUBSETS)] for i in range(len(M3_TEXTS))]

        encoded = model.encode(M3_TEXTS, outputs=outputs)

        for one, right, wanted in zip(encoded, expected, outputs, strict=True):
            check(one, right, wanted)


@pytest.mark.skipif(choose_dtype("auto", "cpu") != "bfloat16", reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bfloat16_stays_near(m3: Path, load: Load, expected: list[Expected], cosines: Cosines, runtime: str) -> None:
    encoded = load(m3, runtime, "bfloat16").encode(M3_TEXTS, outputs=[ALL] * len(M3_TEXTS))

    for one, right in zip(encoded, expected, strict=True):
        assert cosines(one.dense[0], right.dense) > 0.999
        assert cosines(one.multivector, right.multivector).min() > 0.99


def test_a_text_without_words_has_no_sparse_weights(m3: Path, load: Load) -> None:
    [encoded] = load(m3, "reference").encode([""], outputs=[ALL])

    assert encoded.sparse.indices.tolist() == encoded.sparse.values.tolist() == []
    assert encoded.multivector.shape == (1, 64)


# ------------------------------------------------------------------------------------------------------- checkpoints


def plan(folder: Path, **entry: object) -> Any:
    return plan_load(ModelEntry(id="m3", source=str(folder), device="cpu", **entry))


def test_pickled_weights_give_the_same(m3_bin: Path, load: Load, expected: list[Expected]) -> None:
    encoded = load(m3_bin, "reference").encode(M3_TEXTS, outputs=[ALL] * len(M3_TEXTS))

    for one, right in zip(encoded, expected, strict=True):
        check(one, right, ALL)


def test_the_outputs_of_a_checkpoint_are_those_that_it_has_heads_for(m3: Path, copy: Copy) -> None:
    folder = copy(m3)
    (folder / "colbert_linear.pt").unlink()

    assert plan(m3).checkpoint.outputs == ALL
    assert plan(folder).checkpoint.outputs == (Output.DENSE, Output.SPARSE)
    with pytest.raises(LoadError, match="outputs multivector: the checkpoint has no such head, only dense, sparse"):
        plan(folder, outputs=("dense", "multivector"))


def test_a_head_belongs_to_the_fingerprint(m3: Path, copy: Copy) -> None:
    folder = copy(m3)
    torch.save(linear_head(64, 1), folder / "sparse_linear.pt")

    assert plan(folder).checkpoint.fingerprint != plan(m3).checkpoint.fingerprint


class Code:
    """Runs when it is unpickled by something that runs code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (pytest.fail, ("code in a checkpoint has run",))


@pytest.fixture(params=["sparse_linear.pt", "colbert_linear.pt"])
def broken_head(request: pytest.FixtureRequest, m3: Path, copy: Copy) -> Iterator[Path]:
    """Return the path of a head in a checkpoint that a test may break."""
    return copy(m3) / str(request.param)


def test_code_in_a_head_does_not_run(broken_head: Path, load: Load) -> None:
    torch.save({"weight": Code()}, broken_head)

    with pytest.raises(LoadError, match="cannot read a linear layer"):
        load(broken_head.parent, "reference")


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", pickle.dumps({"weight": 1}), pickle.dumps([])],
    ids=["empty", "text", "number", "list"],
)
def test_a_broken_head_is_refused(broken_head: Path, load: Load, content: bytes) -> None:
    broken_head.write_bytes(content)

    with pytest.raises(LoadError, match="cannot read a linear layer"):
        load(broken_head.parent, "reference")


def test_a_git_lfs_pointer_instead_of_a_head_is_named(broken_head: Path, load: Load) -> None:
    broken_head.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 3\n")

    with pytest.raises(LoadError, match=r"_linear\.pt: a Git LFS pointer instead of the file"):
        load(broken_head.parent, "reference")


def test_a_weight_that_is_not_a_number_is_not_passed_over(m3: Path, copy: Copy) -> None:
    """The largest weight of a token is above 0 or not: NaN is neither."""
    folder = copy(m3)
    torch.save({name: part * torch.nan for name, part in linear_head(64, 1).items()}, folder / "sparse_linear.pt")

    with pytest.raises(LoadError, match="the model returns sparse vectors that are not finite"):
        load_whole(folder, outputs=ALL)


def test_heads_without_a_pooling_are_refused(m3: Path, copy: Copy) -> None:
    """A folder without modules is pooled by the mean, and BGE-M3 is trained for the first token."""
    folder = copy(m3)
    (folder / "modules.json").unlink()

    with pytest.raises(LoadError, match=r"has BGE-M3's sparse_linear\.pt and colbert_linear\.pt, but no modules\.json"):
        plan_load(entry(folder))


def test_a_head_for_another_width_is_refused(broken_head: Path, load: Load) -> None:
    torch.save(linear_head(32, 1), broken_head)

    with pytest.raises(LoadError, match="expects 32 numbers, but its input has 64"):
        load(broken_head.parent, "reference")


def test_a_sparse_head_gives_one_weight_per_token(m3: Path, copy: Copy, load: Load) -> None:
    folder = copy(m3)
    torch.save(linear_head(64, 2), folder / "sparse_linear.pt")

    with pytest.raises(LoadError, match="must give 1 number per token, gives 2"):
        load(folder, "reference")


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_forward_tells_how_long_others_should_take(load: Load, m3: Path, runtime: str) -> None:
    loaded = load(m3, runtime)
    loaded.encoder.s_per_token = 0.0
    loaded.encode(["two words"])
    assert loaded.encoder.s_per_token == 0.0  # too few to tell

    loaded.encode(["several words of a text"] * 40)

    assert 0.0 < loaded.encoder.s_per_token < 1.0
