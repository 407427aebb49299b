"""Load a checkpoint's tokenizer, and make it treat texts like sentence-transformers or the publisher's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from gateway.engine.checkpoint.classes import must_end_texts
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import load_config
from gateway.engine.model.chat_pairs import ChatPairTokenizer
from gateway.engine.model.colbert import find_skipped_ids, keep_markers_whole, query_tokenizer
from gateway.engine.model.pairs import PairTokenizer
from gateway.engine.model.tokenizer import Tokenizer
from gateway.errors import LoadError


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The tokenizers of a model, and the ids of tokens that a head treats differently.

    Attributes:
        texts: the tokenizer for all texts, or only for documents if ``queries`` exists.
        special_ids: ids of cls, eos, pad and unk, which BGE-M3's sparse rule leaves out.
        skipped_ids: tokens that get no vector in a multi-vector model.
    """

    texts: Tokenizer
    queries: Tokenizer | None = None
    special_ids: frozenset[int] = frozenset()
    skipped_ids: frozenset[int] = frozenset()


def load_tokenizers(
    checkpoint: Checkpoint, max_tokens: int, max_query_tokens: int, *, trust_remote_code: bool
) -> Tokenizers:
    """Return the tokenizer of a checkpoint, and for a multi-vector model also its query tokenizer.

    Raises:
        LoadError: the tokenizer cannot be read, does not belong to the model, or treats texts in an unsupported way.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.transformer,
            config=None if checkpoint.layout is None else load_config(checkpoint.transformer),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
        if tokenizer.truncation_side != "right":
            raise LoadError(
                f"{checkpoint.folder}: truncation_side {tokenizer.truncation_side!r} is not supported: a text that is too "
                "long is cut at its end"
            )
        colbert = checkpoint.colbert
        if colbert is not None:
            keep_markers_whole(tokenizer, colbert)
        fast = tokenizer.backend_tokenizer
        if must_end_texts(checkpoint.transformer, checkpoint.model_type) and not trust_remote_code:
            _end_texts(fast, tokenizer.eos_token)
        if checkpoint.is_lower_cased:  # as in sentence-transformers: before the tokenizer's own normalizer
            own = [] if fast.normalizer is None else [fast.normalizer]
            fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        special = (tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        ours = _reader(checkpoint, fast, max_tokens, tokenizer.model_input_names)
        queries = None if colbert is None else query_tokenizer(tokenizer, colbert, max_query_tokens)
        skipped_ids = frozenset() if colbert is None else find_skipped_ids(tokenizer, colbert)
    except LoadError:
        raise
    except Exception as error:  # transformers and tokenizers raise a bare Exception for a malformed file
        raise LoadError(f"{checkpoint.folder}: the tokenizer cannot be loaded: {error}") from error
    has_pairs = checkpoint.classifier is not None and checkpoint.pair_template is None
    if has_pairs and not fast.encode("").ids:  # a pair of empty texts has no state
        raise LoadError(
            f"{checkpoint.folder}: the tokenizer gives an empty text no tokens, so a pair might have no score: its template "
            "adds no special token"
        )
    if ours.largest_id >= checkpoint.vocab_size:
        raise LoadError(
            f"{checkpoint.folder}: the tokenizer has token ids up to {ours.largest_id}, but the model's table of words has "
            f"{checkpoint.vocab_size} rows: tokens were added, and the model was not resized for them"
        )
    return Tokenizers(ours, queries, frozenset(x for x in special if x is not None), skipped_ids)


def _reader(checkpoint: Checkpoint, fast: FastTokenizer, max_tokens: int, input_names: Sequence[str]) -> Tokenizer:
    if checkpoint.pair_template is not None:
        return ChatPairTokenizer(fast, max_tokens, checkpoint.pair_template)
    if checkpoint.classifier is None:
        return Tokenizer(fast, max_tokens)
    # A tokenizer's template may mark segments that transformers does not pass to the model.
    has_segments = checkpoint.classifier.has_segments and "token_type_ids" in input_names
    return PairTokenizer(fast, max_tokens, has_segments=has_segments)


def _end_texts(tokenizer: FastTokenizer, end: str) -> None:
    """Make a tokenizer append its end token to each text, unless it already does."""
    end_id = tokenizer.token_to_id(end)
    if tokenizer.encode("").ids[-1:] == [end_id]:
        return
    template = processors.TemplateProcessing(single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, end_id)])
    own = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
    tokenizer.post_processor = processors.Sequence([*own, template])
