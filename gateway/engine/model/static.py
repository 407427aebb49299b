"""Build the encoder of static embeddings: a text's vector is the mean over the vectors of its tokens, from a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from statistics import median

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors
from torch.nn import functional

from gateway.config.model_entry import ModelEntry
from gateway.engine.checkpoint.files import tokenizer_files
from gateway.engine.checkpoint.read import Checkpoint
from gateway.engine.checkpoint.static import StaticRule
from gateway.engine.checkpoint.weights import read_tensors
from gateway.engine.model.items import Tokens
from gateway.engine.model.states import TokenStates
from gateway.engine.model.tokenizer import Steps, Tokenizer
from gateway.errors import BadInput, ContextLengthExceeded, LoadError
from gateway.types import Truncate

_RUNTIME = "table"
# Tokens of a batch. They are only summed, so the cost of a batch is mostly its overhead.
_MAX_BATCH_TOKENS = 65_536


def place_table(entry: ModelEntry) -> tuple[tuple[str, ...], str, str, int]:
    """Return where and how static embeddings run: devices, dtype, runtime, and the tokens of a batch.

    Raises:
        LoadError: a setting of the registry does not apply to static embeddings; the message names it.
    """
    for key, value, allowed in (
        ("device", entry.device, ("auto", "cpu")),
        ("dtype", entry.dtype, ("auto", "float32")),
        ("runtime", entry.runtime, ("auto", "torch")),
    ):
        if value not in allowed:
            raise LoadError(
                f"{key} {value} is not supported for static embeddings, which are summed in float32 on the CPU: use "
                f"{' or '.join(allowed)}"
            )
    return ("cpu",), "float32", _RUNTIME, entry.max_batch_tokens or _MAX_BATCH_TOKENS


def load_table(checkpoint: Checkpoint, max_tokens: int) -> tuple[Tokenizer, StaticRuntime]:
    """Return the tokenizer and the runtime of a checkpoint with static embeddings.

    Args:
        max_tokens: the longest text.

    Raises:
        LoadError: a file is corrupt, or the table has too few rows for the tokenizer.
    """
    try:
        fast = FastTokenizer.from_file(str(tokenizer_files(checkpoint.transformer)[0]))
        table = _folded(read_tensors(checkpoint.weights))
    except Exception as error:  # a file can be broken in as many ways as there are classes of errors
        raise LoadError(f"{checkpoint.folder}: static embeddings cannot be read: {error}") from error
    tokenizer = StaticTokenizer(fast, max_tokens, is_model2vec=checkpoint.static is StaticRule.MODEL2VEC)
    if tokenizer.largest_id >= len(table):
        raise LoadError(
            f"{checkpoint.folder}: the tokenizer has token ids up to {tokenizer.largest_id}, but the table has "
            f"{len(table)} rows"
        )
    return tokenizer, StaticRuntime(table)


def _folded(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the vector of each token id, ``(vocabulary, width)`` float32.

    model2vec looks up a token's vector in two steps, and weights it: ``embeddings[mapping[id]] * weights[id]``.
    """
    table = tensors["embedding.weight"] if "embedding.weight" in tensors else tensors["embeddings"]
    if "mapping" in tensors:
        table = table[tensors["mapping"].long()]
    if "weights" in tensors:
        table = table * tensors["weights"][:, None]
    return table.float().contiguous()


class StaticTokenizer(Tokenizer):
    """The tokenizer of static embeddings: no special tokens, and by model2vec's rule no unknown tokens.

    Args:
        is_model2vec: follow model2vec's rules; see :mod:`gateway.engine.checkpoint.static`.
    """

    def __init__(self, tokenizer: FastTokenizer, max_tokens: int, *, is_model2vec: bool) -> None:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        super().__init__(tokenizer, max_tokens)
        self._unknown: int | None = None
        self._max_chars: int | None = None
        if is_model2vec:
            self._unknown = _unknown_id(tokenizer)
            self._max_chars = max_tokens * int(median(map(len, tokenizer.get_vocab())))

    def read(
        self,
        texts: Sequence[str],
        instruction: str,
        truncate: Truncate,
        first_index: int = 0,
        name: str = "input",
        max_text_tokens: int | None = None,
    ) -> Steps[list[Tokens]]:
        """Tokenize texts, like :meth:`Tokenizer.read`, which lists the other errors.

        Raises:
            BadInput: a text has no token with a vector, so it has no mean.
        """
        cut = [self._cut_characters(text, instruction, truncate, first_index + i) for i, text in enumerate(texts)]
        rows = yield from super().read(cut, instruction, truncate, first_index, name, max_text_tokens)
        tokens = []
        for i, (text, kept, row) in enumerate(zip(texts, cut, rows, strict=True)):
            ids = row.ids if self._unknown is None else [id_ for id_ in row.ids if id_ != self._unknown]
            if not ids:
                raise BadInput(
                    f"{name}[{first_index + i}] has no token with a vector in this model, whose vectors are the mean over a "
                    "text's tokens: leave out texts that are blank or in another script",
                    param="input",
                )
            tokens.append(replace(row, ids=ids, is_truncated=row.is_truncated or len(kept) < len(text)))
        return tokens

    def _cut_characters(self, text: str, instruction: str, truncate: Truncate, index: int) -> str:
        """Cut a text as model2vec does before tokenizing: at its end, or at its start if the request asks for it."""
        if self._max_chars is None or len(instruction) + len(text) <= self._max_chars:
            return text
        room = max(0, self._max_chars - len(instruction))
        match truncate:
            case Truncate.END:
                return text[:room]
            case Truncate.START:
                return text[len(text) - room :]
            case Truncate.REFUSE:
                raise ContextLengthExceeded(
                    f"This model's maximum context length is {self.max_tokens} tokens and {self._max_chars} characters, "
                    f"however input[{index}] has {len(text)} characters. Shorten it, or leave out truncate: false.",
                    param="input",
                )


def _unknown_id(tokenizer: FastTokenizer) -> int | None:
    """Return the id of the unknown token, if there is one; Unigram gives its id, other models its text."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    found: int | None = model.get("unk_id") if token is None else tokenizer.token_to_id(token)
    return found


@dataclass(frozen=True, slots=True)
class Bags:
    """Texts as inputs of the table lookup: the ids of all texts, ``(total,)`` int64, and where each text begins."""

    ids: torch.Tensor
    starts: torch.Tensor


class StaticRuntime:
    """The :class:`~gateway.engine.model.runtimes.base.Runtime` of static embeddings.

    It returns one state per text, the mean over the text's tokens, so the dense head's mean changes nothing. The rows of a
    batch are summed without first being copied out of the table.
    """

    name = _RUNTIME
    extra_bytes = 0

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def groups(self, lengths: Sequence[int], adapters: Sequence[int] | None = None) -> Sequence[Sequence[int]]:
        return [range(len(lengths))]

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> Bags:
        starts = [0, *accumulate(map(len, rows))][:-1]
        return Bags(torch.tensor(list(chain.from_iterable(rows))), torch.tensor(starts))

    def forward(self, features: Bags) -> TokenStates:
        means = functional.embedding_bag(features.ids, self._table, features.starts, mode="mean")
        return TokenStates(means, [1] * len(means))
