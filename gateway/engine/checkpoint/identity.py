"""Read the settings that change vectors and are neither in the weights nor in the vocabulary.

Two checkpoints with the same tensors give different vectors if, for example, their ``rope_theta``, activation,
attention window or ``add_eos_token`` differ, so these belong to the identity of the vectors. A key counts unless it is
known not to change vectors. If two equal spaces are mistaken for different ones, a request is refused. The opposite
error would mix vectors.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from gateway.engine.checkpoint.json_files import Json, read_object

# The origin of the file: its author, tool and source.
_ORIGIN = {"_name_or_path", "name_or_path", "transformers_version", "auto_map", "_commit_hash", "model_type_version"}
# How the model is computed, which the gateway chooses.
_COMPUTATION = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "attn_implementation",
    "compile",
    "deterministic_flash_attn",
    "dtype",
    "fused_bias_fc",
    "fused_dropout_add_ln",
    "fused_mlp",
    "gradient_checkpointing",
    "gradient_checkpointing_use_reentrant",
    "logn_attention_clip1",
    "pretraining_tp",
    "reference_compile",
    "repad_logits_with_grad",
    "torch_dtype",
    "torchscript",
    "unpad_inputs",
    "use_cache",
    "use_flash_attn",
    "use_memory_efficient_attention",
    "use_xformers",
}
# Keys that only training, generation or another head reads.
_OTHER_USES = {
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "classifier_dropout_prob",
    "decoder_start_token_id",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_dropout",
    "finetuning_task",
    "generator_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "initializer_cutoff_factor",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "layerdrop",
    "mlp_dropout",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "problem_type",
    "qa_dropout",
    "resid_pdrop",
    "return_dict",
    "seq_classif_dropout",
    "sparse_pred_ignore_index",
    "sparse_prediction",
    "summary_activation",
    "summary_first_dropout",
    "summary_last_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
}
# Keys of a tokenizer for padding, for lengths (which are read elsewhere), for decoding and for chats.
_TOKENIZER = {
    "chat_template",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "max_len",
    "max_length",
    "model_input_names",
    "model_max_length",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding_side",
    "processor_class",
    "special_tokens_map_file",
    "spaces_between_special_tokens",
    "stride",
    "tokenizer_file",
    "truncation_strategy",
    "vocab_file",
    "merges_file",
}


def settings(transformer: Path) -> dict[str, str]:
    """Return, by file, the settings of the model and its tokenizer that may change vectors, as sorted JSON.

    Args:
        transformer: the folder of the transformer and its tokenizer.

    Raises:
        LoadError: a file does not hold a JSON object.
    """
    model, tokenizer = _ORIGIN | _COMPUTATION | _OTHER_USES, _ORIGIN | _TOKENIZER
    files = {
        "config.json": model,
        "tokenizer_config.json": tokenizer,
        "special_tokens_map.json": tokenizer,
        "added_tokens.json": set(),
    }
    found = {name: _without(read_object(transformer / name, optional=True), keys) for name, keys in files.items()}
    return {name: json.dumps(content, sort_keys=True) for name, content in found.items() if content}


def _without(value: Json, keys: Collection[str]) -> Json:
    """Drop keys from a JSON value, at any depth."""
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [_without(item, keys) for item in value]
    return value
