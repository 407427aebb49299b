"""The protocol between an encoder and what computes its transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gateway.engine.model.states import TokenStates

PACKED_MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "jina_embeddings_v3")
"""``model_type`` of the architectures whose forward takes a packed row on CUDA."""


class Runtime(Protocol):
    """Computes a transformer's forward.

    Attributes:
        name: what ``ModelInfo.engine`` says.
        extra_bytes: memory of weights that the checkpoint does not have.
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
        """Put token ids where the forward reads them.

        Args:
            rows: token ids of each text.
            adapters: for each text the index of its adapter, or -1 for none.
            seconds: for each pair where its second text begins, or ``None``: only for a model that tells the two apart.
            attended: for each text how many of its first tokens are attended to; ``None`` for all of every text. The
                others get states, and change no state of another token: ColBERT's mask tokens behind a query.
        """

    def forward(self, features: Any) -> TokenStates:
        """Run the transformer on what :meth:`prepare` returned: the states in the order of its rows."""
