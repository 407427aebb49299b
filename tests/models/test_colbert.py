"""ColBERT: a vector for each token, as sentence-transformers' MultiVectorEncoder gives it, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from gateway.engine.model.items import Item, Tokens

Load = Callable[..., Any]
Tokenize = Callable[..., list[int]]

RUNTIMES = ("reference", "packed", "openvino")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_tokens_that_are_not_attended_to_get_states_and_change_no_other(
    m3: Path, load: Load, tokenize: Tokenize, runtime: str
) -> None:
    model = AutoModel.from_pretrained(m3).eval()
    rows = [tokenize(m3, text) for text in ("a fox is near", "Berlin", "near vectors mean near texts")]
    attended = [len(rows[0]), len(rows[1]) - 2, len(rows[2]) - 3]
    items = [Item(Tokens(ids, num_attended=n)) for ids, n in zip(rows, attended, strict=True)]
    items[0] = Item(Tokens(rows[0]))  # of this one all are
    encoder = load(m3, runtime).encoder

    computed = encoder.forward(encoder.prepare(items))

    found = {row: text for group, states in computed for row, text in zip(group.rows, states.texts(), strict=True)}
    for row, (ids, n) in enumerate(zip(rows, attended, strict=True)):
        mask = (torch.arange(len(ids)) < n).long()[None]
        with torch.inference_mode():
            right = model(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
        np.testing.assert_allclose(found[row].numpy(), right.numpy(), atol=2e-4)
