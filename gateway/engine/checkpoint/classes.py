"""Determine from a checkpoint's class whether it is an embedder, a supported reranker, or neither.

sentence-transformers pools the token states of any of them, because its caller has chosen ``SentenceTransformer(…)``. Here
only the checkpoint can say which kind it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gateway.engine.checkpoint.classifier import HEADS, architecture, own_class
from gateway.engine.checkpoint.json_files import Json, read_object, require_string
from gateway.engine.checkpoint.modules import MULTI_VECTOR
from gateway.errors import LoadError

MODEL_TYPES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "mpnet": "MPNetModel",
    "modernbert": "ModernBertModel",
    "nomic_bert": "NomicBertModel",
    "gte": "GteModel",
    "qwen3": "Qwen3Model",
    "qwen2": "Qwen2Model",
    "mistral": "MistralModel",
    "llama": "LlamaModel",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3TextModel",
    "lfm2": "Lfm2Model",
    "eurobert": "EuroBertModel",
    "albert": "AlbertModel",
    "deberta-v2": "DebertaV2Model",
    "t5": "T5EncoderModel",
    "jina_embeddings_v3": "JinaEmbeddingsV3Model",
}
"""For each supported ``model_type``, whose forward gives one state per token: transformers' class of the model without a
head."""

DECODERS = {"qwen3", "qwen2", "mistral", "llama", "gemma2", "gemma3_text", "lfm2"}
"""Types of language models."""

OVERFLOWING = DECODERS | {"gte", "eurobert", "t5"}
"""Types whose states overflow float16 for some texts: most were trained in bfloat16. In Qwen3-Embedding-8B it is each text
that begins with 'import', in Gemma 3 it is many, and in stella_en_400M_v5 it depends on the length (infinity#328)."""

# Models with the same mathematics under another name, so that transformers' own class gives the same numbers:
# `model_type`, and the class in the checkpoint's code. `gateway.engine.checkpoint.layouts` reads others.
_SAME_MATHEMATICS = {
    ("nomic_bert", "NomicBertModel"),
    ("gte", "GteModel"),
    ("gte", "NewModel"),
    ("eurobert", "EuroBertModel"),
}
# gte-Qwen2 and its relatives are Qwen2 with bidirectional attention, which transformers computes if the configuration says
# `is_causal: false`. The code of their tokenizer appends the end token to each text if `add_eos_token` is true.
_TWO_WAY_CLASSES = {("qwen2", "Qwen2Model")}
_SAME_TOKENIZERS = {("qwen2", "Qwen2Tokenizer")}
# facebook/contriever is BERT whose class takes the mean. The gateway takes the mean without that class.
_SAME_CLASSES = {("bert", "Contriever"), ("gte", "NewModel")}

_REASONS = {
    "gemma3": (
        "This is Gemma 3 with its part for images. The part for text is model_type 'gemma3_text', as EmbeddingGemma has it"
    ),
}
_HEADS = {
    "ForTokenClassification": "labels each token (named entities, for example)",
    "ForMaskedLM": "predicts masked words: a sparse encoder (set `outputs: [sparse]` if it is a SPLADE model), or a "
    "pretrained model that was not trained to embed",
    "ForCausalLM": "writes text: an LLM reranker, or a model that was not trained to embed",
    "LMHeadModel": "writes text: a model that was not trained to embed",
    "ForConditionalGeneration": "writes text: a model that was not trained to embed",
    "ForQuestionAnswering": "finds an answer in a text",
    "ForMultipleChoice": "chooses among texts",
    "ForNextSentencePrediction": "a pretrained model that was not trained to embed",
    "ForPreTraining": "a pretrained model that was not trained to embed",
    "ForRanking": "a reranker of a kind that is not supported",
    "ForRetrieval": MULTI_VECTOR,
}


def require_model_type(config: Mapping[str, Json], folder: Path) -> str:
    """Return the ``model_type`` of a checkpoint.

    Raises:
        LoadError: the type is not supported.
    """
    model_type = require_string(config, "model_type", folder / "config.json")
    if model_type not in MODEL_TYPES:
        reason = _REASONS.get(model_type)
        raise LoadError(
            f"{folder}: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
            + (f". {reason}" if reason else "")
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
        raise LoadError(
            f"{folder}: quantized weights (quantization_config, {name}) are not supported: use the repository with the "
            "weights in float16, bfloat16 or float32"
        )
    if model_type != "gemma2" and (cap := config.get("attn_logit_softcapping")):
        raise LoadError(
            f"{folder}: attn_logit_softcapping {cap!r} is not supported: transformers' {MODEL_TYPES[model_type]} does not "
            "compute it"
        )
    if config.get("is_causal") and model_type not in DECODERS:
        raise LoadError(
            f"{folder}: is_causal {config['is_causal']!r} is not supported for {model_type!r}: transformers then looks one "
            "way in a batch without padding and both ways in one with padding"
        )
    if model_type in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        positions = config.get("position_embedding_type")
        if positions not in (None, "absolute"):
            code = "; it has its own code for that" if own_class(config, "AutoModel") else ""
            alibi = " (ALiBi, as Jina v2 has it)" if positions == "alibi" else ""
            raise LoadError(f"{folder}: position_embedding_type {positions!r}{alibi} is not supported{code}")
    return model_type


def require_known_code(folder: Path, config: Mapping[str, Json], model_type: str, *, trust_remote_code: bool) -> bool:
    """Refuse a checkpoint whose code computes something other than transformers' class for its ``model_type``.

    Returns:
        Whether the checkpoint's own class of the model runs.

    Raises:
        LoadError: the checkpoint has such code, and it is not trusted.
    """
    name = own_class(config, "AutoModel")
    if name is not None:
        if trust_remote_code:
            return True
        is_two_way = (model_type, name) in _TWO_WAY_CLASSES and isinstance(config.get("is_causal"), bool)
        if (model_type, name) not in _SAME_MATHEMATICS and not is_two_way:
            raise LoadError(
                f"{folder}: it has its own code ({name}, in auto_map) that would change what {model_type!r} computes: "
                "without that code, its vectors would be wrong. If you trust the code, set trust_remote_code: true"
            )
    tokenizer, is_same = _own_tokenizer(folder, config, model_type)
    if tokenizer is not None and not is_same and not trust_remote_code:
        raise LoadError(
            f"{folder}: its tokenizer has its own code ({tokenizer}, in auto_map): without that code, texts might be "
            "split into other tokens. If you trust the code, set trust_remote_code: true"
        )
    return False


def must_end_texts(folder: Path, model_type: str) -> bool:
    """Return whether the tokenizer's own code, which does not run here, would append the end token to each text."""
    config = read_object(folder / "tokenizer_config.json", optional=True)
    return _own_tokenizer(folder, config, model_type)[1] and config["add_eos_token"] is True


def _own_tokenizer(folder: Path, config: Mapping[str, Json], model_type: str) -> tuple[str | None, bool]:
    """Return the checkpoint's own tokenizer class, and whether its effect can be reproduced without its code."""
    tokenizer_config = read_object(folder / "tokenizer_config.json", optional=True)
    name = own_class(config, "AutoTokenizer") or own_class(tokenizer_config, "AutoTokenizer")
    is_known = (model_type, name) in _SAME_TOKENIZERS
    return name, is_known and isinstance(tokenizer_config.get("add_eos_token"), bool)


def require_embedder(folder: Path, config: Mapping[str, Json], model_type: str, *, has_own_code: bool) -> None:
    """Refuse a checkpoint that has no pooling module, and whose class has a head.

    Raises:
        LoadError: the class has a head; the message names the class and its kind of model.
    """
    name = architecture(config)
    if name is None or name == MODEL_TYPES[model_type] or (model_type, name) in _SAME_CLASSES:
        return
    what = _describe_class(name, config)
    if not what and has_own_code:
        return
    what = what or f"it is not the class of transformers for {model_type!r}"
    raise LoadError(
        f"{folder}: {name} is not a model that embeds: {what}. There is no modules.json with a Pooling that defines how its "
        "token states become the vector of a text"
    )


def _describe_class(name: str, config: Mapping[str, Json]) -> str:
    if name.endswith("ForSequenceClassification"):
        labels = config.get("id2label")
        num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
        if num_labels != 1:
            return f"a classifier with {num_labels} labels"
        return f"a reranker (cross-encoder) of a class that is not supported; supported: {', '.join(HEADS)}"
    if "colbert" in name.lower():
        return MULTI_VECTOR
    return next((what for head, what in _HEADS.items() if name.endswith(head)), "")
