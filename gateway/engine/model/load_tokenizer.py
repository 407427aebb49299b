"""Load a checkpoint's tokenizer, and make it treat texts like sentence-transformers or the publisher's code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers, processors

from gateway.engine.checkpoint.classes import must_end_texts
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.sizes import load_config
from gateway.engine.compiled_cache import CompiledCache
from gateway.engine.model.chat_pairs import ChatPairTokenizer, ChatTextTokenizer
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


@dataclass(frozen=True, slots=True)
class _Read:
    """What transformers has read from the files of a tokenizer.

    Attributes:
        fast: the tokenizer, as it serves.
        input_names: the inputs that transformers' tokenizer makes.
        own: transformers' tokenizer; ``None`` if an earlier start has read it.
    """

    fast: FastTokenizer
    special_ids: frozenset[int]
    input_names: Sequence[str]
    own: Any = None

    @classmethod
    def parse(cls, text: str) -> _Read:
        """Return the reading that :meth:`text` has written."""
        values = json.loads(text)
        fast = FastTokenizer.from_str(values["tokenizer"])
        fast.encode_special_tokens = values["splits_special_tokens"]  # not in the tokenizer's own form
        return cls(fast, frozenset(values["special_ids"]), values["input_names"])

    def text(self) -> str | None:
        """Return everything as text; ``None`` if the tokenizer would not be the same when it is read again."""
        try:
            written = self.fast.to_str()
            is_same = FastTokenizer.from_str(written).to_str() == written
        except Exception:  # tokenizers raises a bare one, for example for parts that run Python code
            return None
        values = {
            "tokenizer": written,
            "splits_special_tokens": self.fast.encode_special_tokens,
            "special_ids": sorted(self.special_ids),
            "input_names": list(self.input_names),
        }
        return json.dumps(values) if is_same else None


def load_tokenizers(
    checkpoint: Checkpoint,
    max_tokens: int,
    max_query_tokens: int,
    *,
    trust_remote_code: bool,
    cache: CompiledCache | None = None,
) -> Tokenizers:
    """Return the tokenizer of a checkpoint, and for a multi-vector model also its query tokenizer.

    Args:
        cache: where an earlier start may have kept what transformers has read; ``None`` keeps nothing.

    Raises:
        LoadError: the tokenizer cannot be read, does not belong to the model, or treats texts in an unsupported way.
    """
    colbert = checkpoint.colbert
    if trust_remote_code or checkpoint.layout is not None or colbert is not None:
        cache = None
    try:
        read = _recall(checkpoint, cache) if cache else _read(checkpoint, trust_remote_code=trust_remote_code)
        fast = read.fast
        ours = _reader(checkpoint, fast, max_tokens, read.input_names)
        queries = None if colbert is None else query_tokenizer(read.own, colbert, max_query_tokens)
        skipped_ids = frozenset() if colbert is None else find_skipped_ids(read.own, colbert)
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
    return Tokenizers(ours, queries, read.special_ids, skipped_ids)


def _recall(checkpoint: Checkpoint, cache: CompiledCache) -> _Read:
    """Return the tokenizer as an earlier start has read it, or read it and keep it.

    Raises:
        LoadError, Exception: as :func:`_read`.
    """
    return cache.reading(
        checkpoint.transformer,
        {"tokenizer of": checkpoint.model_type, "is_lower_cased": checkpoint.is_lower_cased},
        read=lambda: _read(checkpoint, trust_remote_code=False),
        parse=_Read.parse,
        text=lambda read: read.text(),
    )


def _read(checkpoint: Checkpoint, *, trust_remote_code: bool) -> _Read:
    """Read a tokenizer with transformers.

    Raises:
        LoadError: the tokenizer treats texts in an unsupported way.
        Exception: of any class, for a malformed file.
    """
    from transformers import AutoTokenizer  # slow to import

    own = AutoTokenizer.from_pretrained(
        checkpoint.transformer,
        config=None if checkpoint.layout is None else load_config(checkpoint.transformer),
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    if own.truncation_side != "right":
        raise LoadError(
            f"{checkpoint.folder}: truncation_side {own.truncation_side!r} is not supported: a text that is too "
            "long is cut at its end"
        )
    if checkpoint.colbert is not None:
        keep_markers_whole(own, checkpoint.colbert)
    fast = own.backend_tokenizer
    if must_end_texts(checkpoint.transformer, checkpoint.model_type) and not trust_remote_code:
        _end_texts(fast, own.eos_token)
    if checkpoint.is_lower_cased:  # as in sentence-transformers: before the tokenizer's own normalizer
        normalizer = [] if fast.normalizer is None else [fast.normalizer]
        fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), *normalizer])
    special = (own.cls_token_id, own.eos_token_id, own.pad_token_id, own.unk_token_id)
    return _Read(fast, frozenset(id_ for id_ in special if id_ is not None), own.model_input_names, own)


def _reader(checkpoint: Checkpoint, fast: FastTokenizer, max_tokens: int, input_names: Sequence[str]) -> Tokenizer:
    if checkpoint.pair_template is not None:
        return ChatPairTokenizer(fast, max_tokens, checkpoint.pair_template)
    if checkpoint.text_template is not None:
        return ChatTextTokenizer(fast, max_tokens, checkpoint.text_template)
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
