"""Heads, which compute outputs from a text's token states: dense, sparse, one vector per token, the score of a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from gateway.engine.checkpoint.classifier import Activation, Classifier, Layer, Linear, TokenLogit
from gateway.engine.checkpoint.files import require_content, weights_files
from gateway.engine.checkpoint.modules import DenseLayer, read_dense
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.weights import read_rows, read_tensors
from gateway.engine.model.in_flight import start_copy
from gateway.engine.model.items import Item
from gateway.engine.model.states import TokenStates, to_host
from gateway.errors import LoadError
from gateway.types import MultiVector, SparseVector

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# The classes that sentence-transformers writes into a Dense layer's configuration.
ACTIVATIONS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "Tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU}


class DenseHead(nn.Module):
    """Pooling, then the checkpoint's linear layers, if it has any, then a cut to its width; all in float32.

    The cut is sentence-transformers' ``truncate_dim``: only the first dimensions stay.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._pooling = checkpoint.pooling
        self.layers = nn.Sequential()
        width = checkpoint.hidden_width
        for folder in checkpoint.dense_layers:
            layer = Dense(folder, read_dense(folder), width)
            self.layers.append(layer)
            width = layer.out_features
        self._cut_to = checkpoint.width if checkpoint.width < width else None

    def forward(self, states: TokenStates, spans: Sequence[Sequence[tuple[int, int]] | None]) -> torch.Tensor:
        """Return the vectors of a batch, ``(n, width)`` float32: one per text, or one for each of its spans."""
        if all(text_spans is None for text_spans in spans):
            pooled = states.pool(self._pooling)
        else:
            whole = [
                [(0, length)] if text_spans is None else text_spans
                for text_spans, length in zip(spans, states.lengths, strict=True)
            ]
            pooled = states.pool_spans(whole)
        vectors: torch.Tensor = self.layers(pooled)
        return vectors if self._cut_to is None else vectors[:, : self._cut_to]


class OutputHead(Protocol[T_co]):
    """A head that has an output for each text, besides a vector."""

    def begin(self, states: TokenStates, items: Sequence[Item], rows: Sequence[int]) -> Callable[[], Sequence[T_co]]:
        """Launch the computation, and return a function that returns the outputs once the device is done.

        Args:
            items: the items of all texts.
            rows: the positions of the texts that want the output.
        """


class TokenHead(nn.Module, Generic[T]):
    """A head that computes numbers for each token on the device, and then makes the outputs of the texts on the host."""

    def compute(self, states: TokenStates) -> torch.Tensor:
        """Return the numbers of each token, ``(total, …)`` float32, without waiting for the device."""
        raise NotImplementedError

    def read(
        self, numbers: npt.NDArray[np.float32], lengths: Sequence[int], items: Sequence[Item], rows: Sequence[int]
    ) -> list[T]:
        """Return the outputs of the texts at ``rows``, without views of ``numbers``.

        Args:
            numbers: the result of :meth:`compute` for these texts.
            lengths: the number of tokens of each of these texts.
            items: the items of all texts.
        """
        raise NotImplementedError

    def forward(self, states: TokenStates, items: Sequence[Item], rows: Sequence[int]) -> list[T]:
        """Return the outputs of the texts at ``rows``; ``items`` are those of all texts."""
        chosen = states.select(rows)
        return self.read(to_host(self.compute(chosen)), chosen.lengths, items, rows)

    def begin(self, states: TokenStates, items: Sequence[Item], rows: Sequence[int]) -> Callable[[], list[T]]:
        """Do the same in two steps; see :meth:`OutputHead.begin`."""
        chosen = states.select(rows)
        lengths, numbers = chosen.lengths, start_copy(self.compute(chosen))  # the states are not kept
        return lambda: self.read(numbers(), lengths, items, rows)


class SparseHead(TokenHead[SparseVector]):
    """BGE-M3's token weights: ``relu(linear(state))``, the maximum over equal tokens, without special tokens.

    The rule is FlagEmbedding's (``inference/embedder/encoder_only/m3.py``, ``_process_token_weights``).
    """

    def __init__(self, weights: Path, hidden_width: int, special_ids: frozenset[int]) -> None:
        super().__init__()
        self.linear = _load_linear(weights, hidden_width)
        if self.linear.out_features != 1:
            raise LoadError(f"{weights}: must give 1 number per token, gives {self.linear.out_features}")
        self._special_ids = np.array(sorted(special_ids), np.int64)

    def compute(self, states: TokenStates) -> torch.Tensor:
        return torch.relu(self.linear(states.flat.float())).squeeze(-1)

    def read(
        self, numbers: npt.NDArray[np.float32], lengths: Sequence[int], items: Sequence[Item], rows: Sequence[int]
    ) -> list[SparseVector]:
        ids = token_ids(items, rows)
        is_kept = ~np.isin(ids, self._special_ids)
        owners = np.repeat(np.arange(len(rows)), lengths)[is_kept]
        return _largest_by_token(owners, ids[is_kept], numbers[is_kept], len(rows))


def token_ids(items: Sequence[Item], rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the token ids of the texts at ``rows``, one text after the other."""
    return np.fromiter(chain.from_iterable(items[row].tokens.ids for row in rows), np.int64)


def _largest_by_token(
    owners: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], num_texts: int
) -> list[SparseVector]:
    """Return the largest weight of each token in each text, if it is above 0.

    Args:
        owners: the index of each token's text, in the same order as ``ids`` and ``weights``.
    """
    order = np.lexsort((ids, owners))
    owners, ids = owners[order], ids[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (np.diff(ids) != 0) | (np.diff(owners) != 0)
    firsts = is_first.nonzero()[0]
    largest = np.maximum.reduceat(weights[order], firsts) if len(firsts) else weights
    is_positive = ~(largest <= 0)  # NaN stays, and is reported
    firsts, largest = firsts[is_positive], largest[is_positive]
    ends = np.searchsorted(owners[firsts], np.arange(num_texts + 1))
    parts = [slice(start, end) for start, end in pairwise(ends)]
    # Copies, because a view would keep the weights of the whole batch.
    return [SparseVector(ids[firsts[part]], largest[part].copy()) for part in parts]


class MultiVectorHead(TokenHead[MultiVector]):
    """BGE-M3's vector for each token except the first: ``linear(state)``, L2-normalized."""

    def __init__(self, weights: Path, hidden_width: int) -> None:
        super().__init__()
        self.linear = _load_linear(weights, hidden_width)

    def compute(self, states: TokenStates) -> torch.Tensor:
        return functional.normalize(self.linear(states.flat.float()), dim=-1)

    def read(
        self, numbers: npt.NDArray[np.float32], lengths: Sequence[int], items: Sequence[Item], rows: Sequence[int]
    ) -> list[MultiVector]:
        return [numbers[end - n + 1 : end].copy() for end, n in zip(accumulate(lengths), lengths, strict=True)]


class ScoreHead(nn.Module):
    """The head of a model that scores or classifies: the layers of its description, in float32.

    Raises:
        LoadError: the checkpoint's weights hold no such head.
    """

    def __init__(self, checkpoint: Checkpoint, classifier: Classifier) -> None:
        super().__init__()
        self._pooling = checkpoint.pooling
        self._is_late = classifier.is_late
        folder, width = checkpoint.folder, checkpoint.hidden_width
        own = read_tensors(checkpoint.weights, classifier.tensors)
        self.layers = nn.Sequential()
        for layer in classifier.layers:
            with reading(folder, f"a head of {classifier.architecture}"):
                self.layers.append(_layer_of(layer, own, checkpoint.weights))
            if isinstance(linear := self.layers[-1], nn.Linear):
                require_inputs(folder, linear, width)
                width = linear.out_features
        if width != len(classifier.labels):
            raise LoadError(
                f"{folder}: the head gives {width} numbers, expected {len(classifier.labels)} for its labels"
            )
        self.requires_grad_(False)

    def forward(self, states: TokenStates, spans: Sequence[Sequence[tuple[int, int]] | None]) -> torch.Tensor:
        """Return a number for each label, before any function of it, ``(n, labels)`` float32.

        Args:
            spans: for each text the one token that is read; ``None`` if the pooling determines it.
        """
        if any(text_spans is not None for text_spans in spans):  # then the pooling takes the last token
            ends = [
                [(n - 1, n)] if text_spans is None else text_spans
                for text_spans, n in zip(spans, states.lengths, strict=True)
            ]
            read: torch.Tensor = self.layers(states.pool_spans(ends))
            return read
        if self._is_late:
            return replace(states, flat=self.layers(states.flat.float())).pool(self._pooling)
        scores: torch.Tensor = self.layers(states.pool(self._pooling))
        return scores


def _layer_of(layer: Layer, own: Mapping[str, torch.Tensor], weights: Sequence[Path]) -> nn.Module:
    """Return a layer of a head.

    Args:
        own: tensors of the transformer's weights.
        weights: files with them.

    Raises:
        Exception: of any class, if the tensors do not form such a layer.
    """
    if isinstance(layer, Activation):
        from transformers.activations import ACT2FN  # slow to import

        activation: nn.Module = ACT2FN[layer.name]
        return activation
    if isinstance(layer, TokenLogit):
        tokens = [layer.positive] if layer.negative is None else [layer.positive, layer.negative]
        rows = read_rows(weights, layer.table, tokens).float()
        return _linear(rows[:1] - rows[1:].sum(dim=0), None)
    tensors = own if layer.folder is None else read_tensors(weights_files(layer.folder))
    return (
        linear_of(tensors, layer.tensors) if isinstance(layer, Linear) else norm_of(tensors, layer.tensors, layer.eps)
    )


def linear_of(tensors: Mapping[str, torch.Tensor], layer: str) -> nn.Linear:
    return _linear(tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias"))


def norm_of(tensors: Mapping[str, torch.Tensor], layer: str, eps: float) -> nn.LayerNorm:
    weight, bias = tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias")
    norm = nn.LayerNorm(len(weight), eps=eps, bias=bias is not None, dtype=torch.float32)
    norm.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return norm


def _load_linear(path: Path, num_in: int) -> nn.Linear:
    """Load a single linear layer from a pickled state dict."""
    require_content(path)
    with reading(path, "a linear layer"):
        tensors = read_tensors([path])
        linear = _linear(tensors["weight"], tensors.get("bias"))
    require_inputs(path, linear, num_in)
    return linear


@contextmanager
def reading(where: Path, what: str) -> Iterator[None]:
    """Convert any error that a broken or unrelated file causes in the readers to :class:`LoadError`."""
    try:
        yield
    except LoadError:
        raise
    except UnpicklingError as error:  # torch's own message explains at length how to run the code after all
        reason = "the file holds more than weights, and could run code"
        raise LoadError(f"{where}: cannot read {what}: {reason}") from error
    except Exception as error:  # a file can be broken in as many ways as there are classes of errors
        raise LoadError(f"{where}: cannot read {what}: {type(error).__name__}: {error}") from error


def require_inputs(where: Path, layer: nn.Linear, num_in: int) -> None:
    if layer.in_features != num_in:
        raise LoadError(f"{where}: expects {layer.in_features} numbers, but its input has {num_in}")


class Dense(nn.Module):
    """A ``Dense`` module of sentence-transformers: ``activation(linear(x))``, optionally plus ``x`` or a layer over ``x``.

    Raises:
        LoadError: the weights do not match the configuration.
    """

    def __init__(self, folder: Path, config: DenseLayer, num_in: int) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise LoadError(
                f"{folder}: activation {config.activation} is not supported; supported: {', '.join(ACTIVATIONS)}"
            )
        expected = {"linear.weight", "linear.bias"} if config.has_bias else {"linear.weight"}
        has_other_width = config.has_residual and num_in != config.width
        expected |= {"residual.weight"} if has_other_width else set()
        with reading(folder, "a Dense layer"):
            tensors = read_tensors(weights_files(folder))
            self.linear = linear_of(tensors, "linear")
        if tensors.keys() != expected:
            raise LoadError(
                f"{folder}: holds {', '.join(sorted(tensors))}, but its configuration {', '.join(sorted(expected))}"
            )
        require_inputs(folder, self.linear, num_in)
        self.out_features = self.linear.out_features
        if self.out_features != config.width:
            raise LoadError(f"{folder}: the vectors have {self.out_features} dimensions, expected {config.width}")
        self.activation = ACTIVATIONS[config.activation]()
        self.residual: nn.Module | None = None
        if config.has_residual:
            self.residual = linear_of(tensors, "residual") if has_other_width else nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return ``(n, out_features)`` for ``(n, in_features)`` float32."""
        result: torch.Tensor = self.activation(self.linear(states))
        return result if self.residual is None else result + self.residual(states)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    num_out, num_in = weight.shape
    layer = nn.Linear(num_in, num_out, bias=bias is not None, dtype=torch.float32)
    layer.load_state_dict({"weight": weight.float()} | ({} if bias is None else {"bias": bias.float()}))
    return layer.requires_grad_(False)
