"""The protocol between an encoder and the runtime of its transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gateway.engine.model.states import TokenStates

PACKED_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "jina_embeddings_v3")
"""``model_type`` of the architectures whose forward takes a packed row on CUDA."""


class Runtime(Protocol):
    """Computes a transformer's forward.

    Attributes:
        name: the name that ``ModelInfo.engine`` shows.
        extra_bytes: memory of additional weights that are not in the checkpoint.
    """

    name: str
    extra_bytes: int

    def groups(self, lengths: Sequence[int], adapters: Sequence[int] | None = None) -> Sequence[Sequence[int]]:
        """Split a batch into forwards.

        Args:
            lengths: tokens of each text.
            adapters: for each text the index of its adapter, or -1 for none.

        Returns:
            The positions of each forward's texts in ``lengths``; each occurs once.
        """

    def prepare(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[int],
        seconds: Sequence[int | None] | None = None,
        attended: Sequence[int] | None = None,
    ) -> Any:
        """Prepare token ids as input of the forward.

        Args:
            rows: token ids of each text.
            adapters: for each text the index of its adapter, or -1 for none.
            seconds: for each pair the position where its second text begins, or ``None``; only for a model with segments.
            attended: for each text the number of first tokens that are attended to; ``None`` for all tokens. The other
                tokens get states but change no other token's state, like ColBERT's mask tokens after a query.
        """

    def forward(self, features: Any) -> TokenStates:
        """Run the transformer on the result of :meth:`prepare`, and return the states in the order of its rows."""
