"""The forward of BERT's family and of Jina v3 on a packed row, in few calls of torch.

Computing a short text takes less time than launching its kernels, and each call holds the interpreter's lock for a while.
So this code does transformers' arithmetic with fewer kernels and without its modules:

- query, key and value are one product. All weights are shared with transformers' model, which is kept as the reference for
  :mod:`.agreement`;
- the sum with the residual is part of the product before it: ``x += a W'``, in place. The bias of that product is folded
  into the bias of the layer norm that computes ``x``, and the bias of the other product that reads ``x`` subtracts it again;
- rotary positions rotate query and key in one step, with precomputed sines and cosines;
- on a card, our kernels replace torch's wherever :mod:`.tuning` finds them faster;
- adapters are added in place (:mod:`.low_rank`), or are merged into weights for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from gateway.engine.accumulation import ACCUMULATION
from gateway.engine.model.adapters import AdapterMask
from gateway.engine.model.runtimes.flash import Texts, attend
from gateway.engine.model.runtimes.low_rank import (
    Choice,
    LowRank,
    TableAdapters,
    expand_table,
    stack_layers,
    stack_table,
)
from gateway.engine.model.runtimes.own_kernels import Heads, Normalize, Rotate
from gateway.engine.model.runtimes.short_attention import Attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Activate: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes an activation of ``x W' + b`` from ``x``, ``W`` and ``b``."""


@dataclass(frozen=True, slots=True)
class Row:
    """A packed row, on the device; all indices are int32.

    Attributes:
        ids: ``(total,)``.
        kinds: ``(total,)`` rows of the segment table; ``None`` for row 0 for all tokens.
        positions: ``(total,)``.
        places: ``(total,)`` rows of the word table's adapters, or ``None``.
        keys: the attended tokens: their ``(k,)`` positions in the row, and the texts' boundaries among them; ``None`` for
            all tokens.
    """

    ids: torch.Tensor
    kinds: torch.Tensor | None
    positions: torch.Tensor
    places: torch.Tensor | None
    choice: Choice
    texts: Texts
    keys: tuple[torch.Tensor, Texts] | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer, ``x W' + b``, with its adapters."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    adapters: LowRank | None

    def __call__(self, x: torch.Tensor, choice: Choice) -> torch.Tensor:
        y = functional.linear(x, self.weight, self.bias)
        if self.adapters is not None and choice is not None:
            self.adapters.add(y, x, choice)
        return y

    def add_to(self, y: torch.Tensor, x: torch.Tensor, choice: Choice) -> None:
        """Add the product to ``y``, which already includes the bias."""
        y.addmm_(x, self.weight.t())
        if self.adapters is not None and choice is not None:
            self.adapters.add(y, x, choice)

    def without(self, folded: torch.Tensor | None) -> Product:
        """Return the product for an input to which ``folded``, ``(in,)`` float32, has been added."""
        if folded is None:
            return self
        bias = -(self.weight.float() @ folded) + (0 if self.bias is None else self.bias.float())
        adapters = None if self.adapters is None else self.adapters.shifted(folded)
        return Product(self.weight, bias.to(self.weight.dtype), adapters)

    def merged(self, adapter: int) -> Product:
        if self.adapters is None:
            return self
        weight = self.adapters.merged(self.weight, adapter)
        if self.adapters.shift is None or self.bias is None:
            return Product(weight, self.bias, None)
        _down, up, own_shift = self.adapters.parts[adapter]
        bias = self.bias.float() if own_shift is None else self.bias.float() + own_shift.float() @ up.float()
        return Product(weight, bias.to(self.bias.dtype), None)


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> Norm:
        return cls(norm.get_parameter("weight"), norm.get_parameter("bias"), float(norm.eps))  # type: ignore[arg-type]

    def __call__(self, x: torch.Tensor, kernel: Normalize | None = None) -> torch.Tensor:
        """Return the rows of ``x`` normalized; a kernel does it in place."""
        if kernel is None:
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        kernel(x, self.weight, self.bias, self.eps)
        return x

    def plus(self, folded: torch.Tensor | None) -> Norm:
        return self if folded is None else replace(self, bias=(self.bias.float() + folded).to(self.bias.dtype))


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: attention and a feed-forward, with a norm after each sum."""

    qkv: Product
    out: Product
    norm: Norm
    up: Product
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: Product
    last_norm: Norm

    def activated(self, x: torch.Tensor, choice: Choice, kernel: Activate | None) -> torch.Tensor:
        """Return the input of the feed-forward's second product."""
        if kernel is not None and self.up.bias is not None and (self.up.adapters is None or choice is None):
            return kernel(x, self.up.weight, self.up.bias)
        return self.activation(self.up(x, choice))

    def merged(self, adapter: int) -> Layer:
        return replace(self, **{name: getattr(self, name).merged(adapter) for name in ("qkv", "out", "up", "down")})


@dataclass(frozen=True, slots=True)
class _Modules:
    """The modules of a transformers layer, by function; the first three make query, key and value."""

    qkv: Sequence[nn.Module]
    out: nn.Module
    norm: nn.Module
    up: nn.Module
    activation: Callable[[torch.Tensor], torch.Tensor]
    down: nn.Module
    last_norm: nn.Module


# The names of the modules by family: the layers, and the fields of _Modules within a layer.
_JINA = (
    ("layers", [f"self_attn.{name}_proj" for name in "qkv"]),
    ("self_attn.o_proj", "post_attention_layernorm", "mlp.fc1", "mlp.activation_fn", "mlp.fc2", "post_mlp_layernorm"),
)
_BERT = (
    ("encoder.layer", [f"attention.self.{name}" for name in ("query", "key", "value")]),
    (
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "intermediate.intermediate_act_fn",
        "output.dense",
        "output.LayerNorm",
    ),
)


def _modules(model: nn.Module) -> Iterator[_Modules]:
    """Yield the layers of a model.

    Raises:
        AttributeError: the model is of another family.
    """
    (layers, projections), others = _JINA if hasattr(model, "rotary_emb") else _BERT
    for layer in model.get_submodule(layers).children():
        yield _Modules([_part(layer, name) for name in projections], *(_part(layer, name) for name in others))


def _part(layer: nn.Module, name: str) -> Any:
    return attrgetter(name)(layer)


class Network:
    """The forward pass. It shares the weights of ``model``, which then holds views of them.

    Args:
        model: transformers' model of BERT's family or Jina v3, on its device.
        mask: the mask of the model's adapters, if it has any.

    Attributes:
        num_words: number of rows of the word table.
        rotate: a kernel for rotary positions; ``None`` for torch's functions.
        normalize: a kernel for layer norms; ``None`` for torch's function.
        activate: a kernel for an activation and the product before it; ``None`` for torch's functions, one after the other.
        attend_short: a kernel for rotary positions and attention within short texts; ``None`` for FlashAttention.
        kinds_step: number of rows in the segment table from one adapter to the next; 0 if all adapters share them.
    """

    def __init__(self, model: PreTrainedModel, mask: AdapterMask | None) -> None:
        self.num_heads = int(model.config.num_attention_heads)
        self.rotate: Rotate | None = None
        self.normalize: Normalize | None = None
        self.activate: Activate | None = None
        self.attend_short: Attend | None = None
        embeddings = model.get_submodule("embeddings")
        words, kinds = (embeddings.get_submodule(f"{name}_embeddings") for name in ("word", "token_type"))
        self._words = words.get_parameter("weight")
        self._word_adapters: TableAdapters | None = stack_table(words, mask)
        self._kinds = expand_table(kinds, mask)
        self._rotary: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        if hasattr(model, "rotary_emb"):
            self._rotary = _rotary_table(model)
        else:
            self._positions = embeddings.get_submodule("position_embeddings").get_parameter("weight")
        norm = Norm.of(embeddings.get_submodule("LayerNorm"))
        self._norm, self._layers = _build_layers(norm, list(_modules(model)), mask)
        self._merged: dict[int, Sequence[Layer]] = {}
        qkv = self._layers[0].qkv.weight
        self.heads = Heads(self.num_heads, int(qkv.shape[0]) // 3 // self.num_heads, qkv.dtype)
        self.scale = self.heads.scale
        self.num_words, num_kinds = len(self._words), int(kinds.get_parameter("weight").shape[0])
        # A table that no adapter changes is not expanded. Reading a row beyond its end would destroy the card's context.
        self.kinds_step = num_kinds if len(self._kinds) > num_kinds else 0

    @property
    def rotary_table(self) -> torch.Tensor | None:
        """The cosines and sines of all positions, ``(positions, d)``; ``None`` for a model without them."""
        return self._rotary

    @property
    def norm(self) -> Norm:
        """The norm of the first layer; all have one width."""
        return self._layers[0].norm

    @property
    def has_gelu(self) -> bool:
        """Whether all activations are GELU in its exact form."""
        probe = torch.linspace(-4, 4, 65)
        return all(torch.equal(layer.activation(probe), functional.gelu(probe)) for layer in self._layers)

    @property
    def first_up(self) -> Product:
        """The first product of the first layer's feed-forward."""
        return self._layers[0].up

    @property
    def has_word_adapters(self) -> bool:
        return self._word_adapters is not None

    @property
    def merged_bytes(self) -> int:
        """Memory of the weights that :meth:`merge` adds for an adapter."""
        products = [product for layer in self._layers for product in (layer.qkv, layer.out, layer.up, layer.down)]
        return sum(product.weight.nbytes for product in products if product.adapters is not None)

    def merge(self, adapters: Sequence[int]) -> None:
        """Merge weights for each of the adapters, for rows in which all texts use that adapter."""
        self._merged = {adapter: [layer.merged(adapter) for layer in self._layers] for adapter in adapters}

    def __call__(self, row: Row) -> torch.Tensor:
        """Return the states of a row's tokens, ``(total, width)``, in the dtype of the weights."""
        x = self._embed(row)
        layers: Sequence[Layer] = self._layers
        choice = row.choice
        if isinstance(choice, int) and choice in self._merged:
            layers, choice = self._merged[choice], None
        is_short = self.attend_short is not None and row.keys is None and row.texts.longest <= self.attend_short.most
        turns = None if is_short else self.turns(row.positions)
        for layer in layers:
            qkv = layer.qkv(x, choice).view(len(x), 3, self.num_heads, -1)
            if is_short and self.attend_short is not None:
                attended = self.attend_short(qkv, row.texts.boundaries, row.positions)
            else:
                attended = self.attend(qkv, row, turns)
            layer.out.add_to(x, attended, choice)
            x = layer.norm(x, self.normalize)
            activated = layer.activated(x, choice, self.activate)
            with ACCUMULATION.exact():  # the longest sums, which lose the most in float16
                layer.down.add_to(x, activated, choice)
            x = layer.last_norm(x, self.normalize)
        return x

    def turns(self, positions: torch.Tensor) -> Sequence[torch.Tensor] | None:
        """Return the cosines and sines of tokens for :meth:`attend`; ``None`` if it needs none."""
        if self._rotary is None or self.rotate is not None:
            return None
        return functional.embedding(positions, self._rotary)[:, None, None].chunk(2, dim=-1)

    def attend(self, qkv: torch.Tensor, row: Row, turns: Sequence[torch.Tensor] | None) -> torch.Tensor:
        """Return FlashAttention's output for each token, ``(total, width)``, after rotary positions.

        Args:
            qkv: ``(total, 3, heads, d)``, which may be rotated in place.
        """
        if self.rotate is not None:
            self.rotate(qkv, row.positions)
        query, key = (qkv[:, :2] if turns is None else rotate(qkv[:, :2], *turns)).unbind(1)
        value, keys = qkv[:, 2], row.texts
        if row.keys is not None:
            places, keys = row.keys
            key, value = key.index_select(0, places), value.index_select(0, places)
        return attend(query, key, value, row.texts, keys, self.scale).flatten(1)

    def _embed(self, row: Row) -> torch.Tensor:
        x = functional.embedding(row.ids, self._words)
        if self._word_adapters is not None and row.choice is not None and row.places is not None:
            self._word_adapters.add(x, row.places, row.choice)
        x.add_(self._kinds[0] if row.kinds is None else functional.embedding(row.kinds, self._kinds))
        if self._positions is not None:
            x.add_(functional.embedding(row.positions, self._positions))
        return self._norm(x, self.normalize)


def activated_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return GELU of ``x W' + b`` from one kernel of cuBLASLt, with GELU's tanh formula (Hendrycks & Gimpel, 2016).

    The formula differs from the exact one by at most 0.0005: as much as rounding 1 to float16 does.
    """
    activated: torch.Tensor = torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return activated


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``(total, 2, heads, d)`` by their positions (Su et al., 2021): the halves of ``d`` form the pairs.

    Args:
        cos: ``(total, 1, 1, d / 2)``.
    """
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (new_first, new_second) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    return turned


@torch.no_grad()
def _rotary_table(model: PreTrainedModel) -> torch.Tensor:
    """Return the cosines and sines of all positions, ``(positions, d)``, as transformers computes them."""
    places = torch.arange(model.config.max_position_embeddings, device=model.device)[None]
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    cos, sin = (table[0] for table in model.get_submodule("rotary_emb")(like, places))
    half = cos.shape[-1] // 2  # the second half repeats the first
    return torch.cat((cos[:, :half], sin[:, :half]), dim=-1).contiguous()


@torch.no_grad()
def _build_layers(norm: Norm, layers: Sequence[_Modules], mask: AdapterMask | None) -> tuple[Norm, list[Layer]]:
    """Return the norm of the embeddings and the layers after it, with the biases of residual products in the norms."""
    built: list[Layer] = []
    for modules in layers:
        out, down = _product([modules.out], mask), _product([modules.down], mask)
        out_bias, down_bias = (None if product.bias is None else product.bias.float() for product in (out, down))
        if built:
            built[-1] = replace(built[-1], last_norm=built[-1].last_norm.plus(out_bias))
        else:
            norm = norm.plus(out_bias)
        built.append(
            Layer(
                qkv=_product(modules.qkv, mask).without(out_bias),
                out=out,
                norm=Norm.of(modules.norm).plus(down_bias),
                up=_product([modules.up], mask).without(down_bias),
                activation=modules.activation,
                down=down,
                last_norm=Norm.of(modules.last_norm),
            )
        )
    return norm, built


def _product(layers: Sequence[nn.Module], mask: AdapterMask | None) -> Product:
    """Combine layers that read the same input into one product; the layers keep views of its weights."""
    weights: list[torch.Tensor] = [layer.get_parameter("weight") for layer in layers]
    biases = [layer.bias if isinstance(layer.bias, torch.Tensor) else None for layer in layers]
    adapters = stack_layers(layers, mask)
    if len(layers) == 1:
        return Product(weights[0], biases[0], adapters)
    weight = torch.cat(weights)
    for layer, part in zip(layers, torch.split(weight, [len(old) for old in weights]), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    filled = [weight.new_zeros(len(old)) if bias is None else bias for bias, old in zip(biases, weights, strict=True)]
    return Product(weight, torch.cat(filled), adapters)
