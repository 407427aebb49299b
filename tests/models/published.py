"""Tiny checkpoints as their publishers wrote them, with random weights, and their mathematics written a second time.

The publishers' code is not run: the functions here follow its description, over tensors of the published names, one text
at a time and without padding. They share no code with the tested modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from tests.models.checkpoints import MAX_TOKENS

Tensors = Mapping[str, torch.Tensor]

WIDTH = 32
INTERMEDIATE = 48
LAYERS = 2
HEADS = 2


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 11) -> dict[str, torch.Tensor]:
    """Return a tensor of each shape; norms are near 1, so that nothing vanishes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else 0.3)
        + float(_is_norm(name) and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def _is_norm(name: str) -> bool:
    return any(part in name for part in ("LayerNorm", "_ln.", "norm"))


def write(
    folder: Path, config: Mapping[str, object], tensors: Tensors, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """Write the files of a transformer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_modules(
    folder: Path,
    pooling: str,
    *,
    width: int = WIDTH,
    dense: Mapping[str, torch.Tensor] | None = None,
    is_normalized: bool = True,
    prompts: Mapping[str, str] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> None:
    """Write sentence-transformers' files as releases before 5 did.

    Args:
        dense: weight and bias of a linear layer without activation, in the folder ``2_Dense``.
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * (dense is not None), *["Normalize"] * is_normalized]
    rows = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": max_tokens, "do_lower_case": False})
    )
    if prompts:
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({"prompts": prompts, "default_prompt_name": None})
        )
    modes = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{flag}": pooling == mode for flag, mode in modes.items()}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": width, **flags}))
    if dense is not None:
        out, in_ = dense["linear.weight"].shape
        (folder / "2_Dense").mkdir()
        (folder / "2_Dense" / "config.json").write_text(
            json.dumps(
                {
                    "in_features": in_,
                    "out_features": out,
                    "bias": True,
                    "activation_function": "torch.nn.modules.linear.Identity",
                }
            )
        )
        save_file(dict(dense), folder / "2_Dense" / "model.safetensors")


def token_ids(folder: Path, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Tokenize a text with the checkpoint's tokenizer alone, which asks no questions of its code."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    ids: list[int] = tokenizer.encode(text).ids
    return ids


# ---------------------------------------------------------------------------------------------------- shared arithmetic


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def layer_norm(tensors: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, (x.shape[-1],), tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def rotate(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Turn each pair of numbers, ``i`` and ``i + d / 2``, of ``(t, heads, d)`` by position times frequency."""
    angles = torch.arange(len(x))[:, None, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(packed: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Let every token read from every token: ``(t, width)``; ``packed`` holds query, key and value."""
    query, key, value = (part.unflatten(-1, (HEADS, -1)) for part in packed.chunk(3, dim=-1))
    scores = torch.einsum("qhd,khd->hqk", rotate(query, frequencies), rotate(key, frequencies))
    weights = (scores / (WIDTH // HEADS) ** 0.5).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def plain_frequencies(theta: float) -> torch.Tensor:
    head = WIDTH // HEADS
    return torch.tensor([theta ** (-2 * i / head) for i in range(head // 2)])


# ----------------------------------------------------------------------------------------------------- GTE, type `new`

GTE_CONFIG = {
    "architectures": ["NewModel"],
    "attention_probs_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
        "AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel",
        "AutoModelForMaskedLM": "Alibaba-NLP/new-impl--modeling.NewForMaskedLM",
        "AutoModelForSequenceClassification": "Alibaba-NLP/new-impl--modeling.NewForSequenceClassification",
        "AutoModelForTokenClassification": "Alibaba-NLP/new-impl--modeling.NewForTokenClassification",
    },
    "classifier_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "max_position_embeddings": 8192,
    "model_type": "new",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pack_qkv": True,
    "pad_token_id": 1,
    "position_embedding_type": "rope",
    "rope_scaling": {"factor": 8.0, "type": "ntk"},
    "rope_theta": 20000,
    "torch_dtype": "float16",
    "transformers_version": "4.39.1",
    "type_vocab_size": 1,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
}


def gte_tensors(vocab_size: int, num_types: int, prefix: str) -> dict[str, torch.Tensor]:
    """Return tensors under the names that ``NewModel`` gives them, behind a prefix."""
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (vocab_size, WIDTH)}
    if num_types:
        shapes["embeddings.token_type_embeddings.weight"] = (num_types, WIDTH)
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        shapes[f"{layer}.attention.qkv_proj.weight"] = (3 * WIDTH, WIDTH)
        shapes[f"{layer}.attention.qkv_proj.bias"] = (3 * WIDTH,)
        shapes[f"{layer}.attention.o_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}.attention.o_proj.bias"] = (WIDTH,)
        shapes[f"{layer}.mlp.up_gate_proj.weight"] = (2 * INTERMEDIATE, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INTERMEDIATE)
        shapes[f"{layer}.mlp.down_proj.bias"] = (WIDTH,)
        norms += [f"{layer}.attn_ln", f"{layer}.mlp_ln"]
    shapes |= {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}
    return random_tensors({f"{prefix}{name}": shape for name, shape in shapes.items()})


def gte_frequencies(theta: float, factor: float) -> torch.Tensor:
    """Return ``1 / (theta * factor) ** (2 i / d) / factor ** (2 / d)``, as ``NTKScalingRotaryEmbedding`` has it."""
    head = WIDTH // HEADS
    return plain_frequencies(theta * factor) / factor ** (2 / head)


def gte_states(tensors: Tensors, ids: Sequence[int], frequencies: torch.Tensor) -> torch.Tensor:
    """Return the token states of one text, ``(t, width)``, as the published model computes them.

    Layers are normalized behind each sum; the packed feed-forward holds first what passes, then its gate.
    """
    tensors = {name.removeprefix("new."): tensor for name, tensor in tensors.items()}
    x = tensors["embeddings.word_embeddings.weight"][list(ids)]
    if "embeddings.token_type_embeddings.weight" in tensors:
        x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(tensors, "embeddings.LayerNorm", x, 1e-12)
    for layer in (f"encoder.layer.{i}" for i in range(LAYERS)):
        packed = linear(tensors, f"{layer}.attention.qkv_proj", x)
        read = linear(tensors, f"{layer}.attention.o_proj", attend(packed, frequencies))
        x = layer_norm(tensors, f"{layer}.attn_ln", x + read, 1e-12)
        up, gate = linear(tensors, f"{layer}.mlp.up_gate_proj", x).chunk(2, dim=-1)
        x = layer_norm(
            tensors, f"{layer}.mlp_ln", x + linear(tensors, f"{layer}.mlp.down_proj", functional.gelu(gate) * up), 1e-12
        )
    return x


def normalized(vectors: Sequence[torch.Tensor]) -> np.ndarray:
    return functional.normalize(torch.stack(list(vectors)), dim=-1).numpy()


# ------------------------------------------------------------------------------------------ Nomic's mixture of experts

MOE_EXPERTS = 4
MOE_CHOSEN = 2
MOE_CONFIG = {
    "activation_function": "gelu",
    "add_pooling_layer": False,
    "architectures": ["NomicBertModel"],
    "auto_map": {
        "AutoConfig": "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
        "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel",
    },
    "causal": False,
    "expert_choice_router": False,
    "ffn_div": 1,
    "layer_norm_epsilon": 1e-05,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "model_type": "nomic_bert",
    "moe_every_n_layers": 2,
    "moe_impl": "megablocks",
    "moe_normalize_expert_weights": False,
    "moe_top_k": MOE_CHOSEN,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_inner": INTERMEDIATE,
    "n_layer": LAYERS,
    "n_positions": 2048,
    "num_experts": MOE_EXPERTS,
    "num_shared_experts": 0,
    "pad_token_id": 1,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": True,
    "rotary_emb_base": 10000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "type_vocab_size": 1,
    "use_flash_attn": True,
    "use_rms_norm": None,
}


def moe_tensors(vocab_size: int) -> dict[str, torch.Tensor]:
    """Return tensors under Nomic's names: layer 0 is plain, layer 1 has experts."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab_size, WIDTH),
        "embeddings.token_type_embeddings.weight": (1, WIDTH),
        "encoder.layers.0.mlp.fc1.weight": (INTERMEDIATE, WIDTH),
        "encoder.layers.0.mlp.fc1.bias": (INTERMEDIATE,),
        "encoder.layers.0.mlp.fc2.weight": (WIDTH, INTERMEDIATE),
        "encoder.layers.0.mlp.fc2.bias": (WIDTH,),
        "encoder.layers.1.mlp.router.layer.weight": (MOE_EXPERTS, WIDTH),
        "encoder.layers.1.mlp.experts.mlp.w1": (MOE_EXPERTS * INTERMEDIATE, WIDTH),
        "encoder.layers.1.mlp.experts.mlp.w2": (MOE_EXPERTS * INTERMEDIATE, WIDTH),
        "encoder.layers.1.mlp.experts.bias": (WIDTH,),
    }
    norms = ["emb_ln"]
    for layer in (f"encoder.layers.{i}" for i in range(LAYERS)):
        shapes[f"{layer}.attn.Wqkv.weight"] = (3 * WIDTH, WIDTH)
        shapes[f"{layer}.attn.Wqkv.bias"] = (3 * WIDTH,)
        shapes[f"{layer}.attn.out_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}.attn.out_proj.bias"] = (WIDTH,)
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
    shapes |= {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}
    tensors = random_tensors(shapes)
    for name in ("embeddings.word_embeddings.weight", "encoder.layers.1.mlp.router.layer.weight"):
        tensors[name] *= 4  # else all tokens would go to the same experts
    return tensors


def moe_states(tensors: Tensors, ids: Sequence[int]) -> torch.Tensor:
    """Return the token states of one text, ``(t, width)``, as the published model computes them."""
    x = tensors["embeddings.word_embeddings.weight"][list(ids)] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(tensors, "emb_ln", x, 1e-5)
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        packed = linear(tensors, f"{layer}.attn.Wqkv", x)
        read = linear(tensors, f"{layer}.attn.out_proj", attend(packed, plain_frequencies(10000)))
        x = layer_norm(tensors, f"{layer}.norm1", x + read, 1e-5)
        if i % 2:
            fed = torch.stack([_expert_sum(tensors, f"{layer}.mlp", token) for token in x])
        else:
            fed = linear(tensors, f"{layer}.mlp.fc2", functional.gelu(linear(tensors, f"{layer}.mlp.fc1", x)))
        x = layer_norm(tensors, f"{layer}.norm2", x + fed, 1e-5)
    return x


def _expert_sum(tensors: Tensors, name: str, token: torch.Tensor) -> torch.Tensor:
    """Send one token through the experts with the largest shares; the shares keep their size, the bias is added once."""
    shares = linear(tensors, f"{name}.router.layer", token).softmax(0)
    total = tensors[f"{name}.experts.bias"].clone()
    for expert in sorted(range(MOE_EXPERTS), key=lambda expert: -shares[expert].item())[:MOE_CHOSEN]:
        rows = slice(expert * INTERMEDIATE, (expert + 1) * INTERMEDIATE)
        up, down = (tensors[f"{name}.experts.mlp.{part}"][rows] for part in ("w1", "w2"))
        total += shares[expert] * (functional.gelu(up @ token) @ down)
    return total
