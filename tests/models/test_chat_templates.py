"""Texts that sentence-transformers puts into a chat template are read in it, or their model is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from gateway.engine.loading import plan_load
from gateway.errors import LoadError
from tests.models.plain import assert_same_logits, entry
from tests.models.test_llm_rerankers import CHATML, DOCUMENTS, QUERY, RERANKER, load, scores, write


def test_an_embedder_with_a_chat_template_is_refused(tmp_path: Path) -> None:
    """sentence-transformers uses it for each text if the tokenizer had one when it saved the model."""
    plain, folder = tmp_path / "plain", tmp_path / "saved"
    write(plain, AutoModel, chat_template=CHATML)
    theirs = SentenceTransformer(modules=[Transformer(str(plain)), Pooling(64, pooling_mode="lasttoken")], device="cpu")
    theirs.save(str(folder), create_model_card=False)
    text = ["near vectors"]
    with_template = SentenceTransformer(str(folder), device="cpu").encode(text)

    with pytest.raises(LoadError, match=r"sentence_bert_config\.json: modality_config has 'message'"):
        plan_load(entry(folder))

    path = folder / "sentence_bert_config.json"
    config = json.loads(path.read_text())
    del config["modality_config"]["message"]
    path.write_text(json.dumps(config))
    plan_load(entry(folder))
    assert np.abs(SentenceTransformer(str(folder), device="cpu").encode(text) - with_template).max() > 0.01


@pytest.mark.parametrize("is_named", [False, True])
def test_a_language_model_with_a_chat_template_and_without_modules_is_refused(
    tmp_path: Path, edit_json: Callable[..., None], *, is_named: bool
) -> None:
    folder = write(tmp_path / "plain", AutoModel, chat_template=CHATML)
    if is_named:  # the form of several templates
        (folder / "chat_template.jinja").unlink()
        templates = [{"name": "tools", "template": "{{ x }}"}, {"name": "default", "template": CHATML}]
        edit_json(folder / "tokenizer_config.json", chat_template=templates)
    bare = write(tmp_path / "bare", AutoModel, chat_template=None)
    theirs, without = (SentenceTransformer(str(path), device="cpu").encode(["near"]) for path in (folder, bare))

    with pytest.raises(LoadError, match=r"has a chat template, but no modules\.json"):
        plan_load(entry(folder))
    plan_load(entry(bare))
    assert np.abs(theirs - without).max() > 0.01


def test_arguments_of_a_reranker_s_template_are_read(tmp_path: Path, edit_json: Callable[..., None]) -> None:
    body, _, answer = RERANKER.rpartition("<|im_start|>")
    template = body + "{% if add_generation_prompt %}<|im_start|>" + answer + "{% endif %}"
    plain, folder = tmp_path / "plain", tmp_path / "saved"
    write(plain, AutoModelForCausalLM, chat_template=template)
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(folder), create_model_card=False)
    arguments = {"chat_template": {"add_generation_prompt": True}}
    edit_json(folder / "sentence_bert_config.json", processing_kwargs=arguments)
    theirs = CrossEncoder(str(folder), device="cpu")
    expected = np.stack([theirs.predict([(QUERY, text)], activation_fn=nn.Identity())[0] for text in DOCUMENTS])

    assert_same_logits(scores(load(folder), QUERY, DOCUMENTS)[:, 0], expected)

    edit_json(folder / "sentence_bert_config.json", processing_kwargs={**arguments, "text": {"truncation": False}})
    with pytest.raises(LoadError, match="processing_kwargs: text is not supported"):
        plan_load(entry(folder))

    (folder / "chat_template.jinja").unlink()
    with pytest.raises(LoadError, match=r"has 'message': .*There is no chat template here"):
        plan_load(entry(folder))
