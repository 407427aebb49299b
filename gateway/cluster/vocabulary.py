"""The vocabulary of a model whose tokenizer is in a replica, because a front has no checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from gateway.cluster.line import Line, LineLost
from gateway.errors import ModelRecovering
from gateway.types import Token


class RemoteVocabulary:
    """A model's :class:`~gateway.types.Vocabulary` in a replica. Do not call its methods on the event loop."""

    def __init__(self, line: Line, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self._line = line
        self._loop = loop
        self._limit_s = limit_s

    def split(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[Token]]:
        answer: list[list[Token]] = self._ask("split", texts, flag=add_special_tokens)
        return answer

    def join(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]:
        answer: list[str] = self._ask("join", [list(row) for row in rows], flag=skip_special_tokens)
        return answer

    def _ask(self, method: str, items: Sequence[Any], *, flag: bool) -> Any:
        asking = self._line.vocabulary(method, items, flag=flag, limit_s=self._limit_s)
        try:
            return asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        except LineLost as error:
            raise ModelRecovering(f"a replica was lost: {error}", retry_after_s=1) from error
