"""Serve BERT-like sentence-transformers checkpoints: one transformer, then a pooling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from tokenizers import normalizers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gateway.embedding import Truncate, Vectors
from gateway.engine.checkpoint import Checkpoint, Pooling
from gateway.engine.encoders.base import Encoder, empty_vectors
from gateway.engine.tokenizer import Tokenizer, Tokens
from gateway.errors import LoadError

# A forward costs about as much as this many tokens before it has computed any: what splitting a batch must save.
_FORWARD_OVERHEAD_TOKENS = 64
# At most this share of a padded batch may be padding once it is larger than the overhead.
_MAX_PADDING_SHARE = 0.10


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Texts of similar length, padded to the longest.

    Attributes:
        rows: position of each text in the batch that was asked for.
        input_ids: ``(b, t)`` int64.
        lengths: ``(b,)`` int64, tokens of each text.
        is_padded: whether any text is shorter than ``t``.
    """

    rows: list[int]
    input_ids: torch.Tensor
    lengths: torch.Tensor
    is_padded: bool


class SentenceEncoder(Encoder):
    """A transformer encoder with mean, first-token, last-token or maximum pooling.

    Args:
        checkpoint: what to load.
        device: torch device, such as ``cpu`` or ``cuda:0``.
        dtype: name of the torch dtype to compute in.
        max_tokens: the longest text; at most the checkpoint's own limit.
        tasks: instruction of each task.
        instruction: what is put before a text that has no task.
        trust_remote_code: let the checkpoint bring Python code that then runs in this process.

    Raises:
        LoadError: the checkpoint is corrupt, incomplete, or not what its configuration says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        dtype: str,
        max_tokens: int,
        tasks: dict[str, str],
        instruction: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        self.width = checkpoint.width
        self._pooling = checkpoint.pooling
        self._device = torch.device(device)
        self._tasks = tasks
        self._instruction = instruction
        self.tokenizer = _load_tokenizer(checkpoint, max_tokens, trust_remote_code)
        self._model = _load_model(checkpoint, dtype, trust_remote_code)
        torch.nn.Module.to(self._model, self._device)
        self._pad_id = self._model.config.pad_token_id or 0

    def instruction(self, task: str | None) -> str:
        return self._instruction if task is None else self._tasks[task]

    def encode_pre(self, sentences: list[str | Tokens]) -> list[PaddedBatch]:
        """Group the texts by length and pad each group to its longest."""
        tokens = [self.tokenise([item], None, Truncate.END)[0] if isinstance(item, str) else item for item in sentences]
        return [
            self._pad([tokens[row] for row in rows], rows) for rows in group_by_length([len(t.ids) for t in tokens])
        ]

    @torch.inference_mode()
    def encode_core(self, features: list[PaddedBatch]) -> list[tuple[PaddedBatch, torch.Tensor]]:
        """Run the transformer: token states ``(b, t, width)`` of each group."""
        outputs = []
        for batch in features:
            mask = None
            if batch.is_padded:
                positions = torch.arange(batch.input_ids.shape[1], device=self._device)
                mask = (positions < batch.lengths[:, None]).long()
            states = self._model(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
            outputs.append((batch, states))
        return outputs

    @torch.inference_mode()
    def encode_post(
        self,
        embedding: list[tuple[PaddedBatch, torch.Tensor]],
        skip_quanitzation: bool = True,
    ) -> Vectors:
        """Pool each text's states into its vector: ``(n, width)`` float32, in the order that was asked for."""
        vectors = empty_vectors(sum(len(batch.rows) for batch, _states in embedding), self.width)
        for batch, states in embedding:
            pooled = pool(states, batch.lengths, self._pooling)
            vectors[batch.rows] = pooled.to("cpu", torch.float32).numpy()
        return vectors

    def _pad(self, tokens: Sequence[Tokens], rows: list[int]) -> PaddedBatch:
        lengths = [len(row.ids) for row in tokens]
        longest = max(lengths)
        padded = [row.ids + [self._pad_id] * (longest - len(row.ids)) for row in tokens]
        return PaddedBatch(
            rows=rows,
            input_ids=torch.tensor(padded, device=self._device),
            lengths=torch.tensor(lengths, device=self._device),
            is_padded=min(lengths) < longest,
        )


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split texts into groups of similar length, longest first, so that little of what is computed is padding.

    A group ends where the next text would make padding more than 10 % of it, unless that padding still costs less
    than another forward does.

    Returns:
        Positions in ``lengths``; each occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = padding = 0
    for i in order:
        padding += longest - lengths[i]
        if groups and padding <= max(_FORWARD_OVERHEAD_TOKENS, _MAX_PADDING_SHARE * longest * (len(groups[-1]) + 1)):
            groups[-1].append(i)
        else:
            groups.append([i])
            longest, padding = lengths[i], 0
    return groups


def pool(states: torch.Tensor, lengths: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool token states ``(b, t, width)`` of right-padded texts into vectors ``(b, width)`` float32.

    The rules are sentence-transformers' (``sentence_transformer/modules/pooling.py``), computed in float32.
    """
    if pooling is Pooling.CLS:
        return states[:, 0].float()
    if pooling is Pooling.LAST:
        return states[torch.arange(len(lengths), device=states.device), lengths - 1].float()
    is_token = (torch.arange(states.shape[1], device=states.device) < lengths[:, None]).unsqueeze(-1)
    if pooling is Pooling.MAX:
        return states.float().masked_fill(~is_token, float("-inf")).amax(dim=1)
    return (states.float() * is_token).sum(dim=1) / lengths[:, None]


def _load_tokenizer(checkpoint: Checkpoint, max_tokens: int, trust_remote_code: bool) -> Tokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        fast = tokenizer.backend_tokenizer
        if checkpoint.is_lower_cased:  # as sentence-transformers does it: before the tokenizer's own normaliser
            own = [] if fast.normalizer is None else [fast.normalizer]
            fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        return Tokenizer(fast, max_tokens)
    except Exception as error:  # transformers and tokenizers raise a bare Exception for a malformed file
        raise LoadError(f"{checkpoint.folder}: the tokenizer cannot be loaded: {error}") from error


def _load_model(checkpoint: Checkpoint, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    if not sys.stderr.isatty():  # a progress bar in a log file is noise
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, report = AutoModel.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            output_loading_info=True,
        )
    except UnpicklingError as error:  # torch's own message explains at length how to run the code after all
        raise LoadError(
            f"{checkpoint.folder}: the weights cannot be loaded: the file holds more than weights, and could run code"
        ) from error
    except Exception as error:  # a configuration that makes no sense can make transformers raise anything
        reason = f"{type(error).__name__}: {error}"
        raise LoadError(f"{checkpoint.folder}: the weights cannot be loaded: {reason}") from error
    # transformers fills what is missing with random numbers and only warns. The pooler is not used here.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        raise LoadError(
            f"{checkpoint.folder}: the weights do not belong to this configuration: missing "
            f"{missing[:3] or 'none'} ({len(missing)} in all), of the wrong shape: {len(report['mismatched_keys'])}"
        )
    loaded: PreTrainedModel = model
    return loaded
