"""Nomic's mixture of experts, which transformers lacks: NomicBERT with other feed-forward layers.

The rules are those of the published code of `nomic-ai/nomic-embed-text-v2-moe`, as vLLM's `bert_with_rope.py` and a port by
Tenstorrent describe them. Every n-th layer, starting with the second, has experts. A router gives each token a softmax over
all experts. The token goes through the few with the largest shares, and their results are summed with these shares as
weights, which are not rescaled to a sum of one. A bias that the experts share is added once. The other layers are two
linear layers with GELU between them. Attention has biases.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import NomicBertConfig, NomicBertModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


class NomicMoeModel(NomicBertModel):  # type: ignore[no-untyped-call]
    """transformers' NomicBERT with Nomic's experts; tensors without a name in transformers have their published names.

    Args:
        config: a configuration with ``num_experts``, ``moe_top_k`` and ``moe_every_n_layers``.
    """

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            attention = layer.get_submodule("self_attn")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(attention, name, nn.Linear(config.hidden_size, config.hidden_size))
            has_experts = i % config.moe_every_n_layers == 1
            setattr(layer, "mlp", _Mixture(config) if has_experts else _FeedForward(config))  # noqa: B010  a module's
        self.post_init()  # type: ignore[no-untyped-call]


class _FeedForward(nn.Module):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.down_proj(functional.gelu(self.fc1(x)))
        return states


class _Router(nn.Module):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.layer = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares: torch.Tensor = self.layer(x).softmax(dim=-1, dtype=torch.float32)
        return shares


class _Weights(nn.Module):
    """All experts' weights, each ``(experts * intermediate, width)``: into the intermediate width, and back."""

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        shape = (config.num_experts * config.intermediate_size, config.hidden_size)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))


class _Experts(nn.Module):
    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.mlp = _Weights(config)
        self.bias = nn.Parameter(torch.empty(config.hidden_size))


class _Mixture(nn.Module):
    """A router and its experts; each expert computes only the tokens that are sent to it."""

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__()
        self.router = _Router(config)
        self.experts = _Experts(config)
        self._num_experts: int = config.num_experts
        self._num_chosen: int = config.moe_top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        shares = self.router(tokens)
        largest, chosen = shares.topk(self._num_chosen, dim=-1)
        shares = torch.zeros_like(shares).scatter(1, chosen, largest).to(x.dtype)
        total = torch.zeros_like(tokens)
        up = self.experts.mlp.w1.chunk(self._num_experts)
        down = self.experts.mlp.w2.chunk(self._num_experts)
        for i in range(self._num_experts):
            rows = shares[:, i].nonzero()[:, 0]
            given = functional.gelu(tokens[rows] @ up[i].t()) @ down[i]
            total = total.index_add(0, rows, given * shares[rows, i, None])
        return total.view_as(x) + self.experts.bias


# transformers renames published tensors only for its own classes.
_NAMES = get_checkpoint_conversion_mapping("nomic_bert")  # type: ignore[no-untyped-call]
register_checkpoint_conversion_mapping(NomicMoeModel.__name__, _NAMES, overwrite=True)
