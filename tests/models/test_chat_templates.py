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
from gateway.errors import ContextLengthExceeded, LoadError
from gateway.types import Truncate
from tests.models.checkpoints import TEXTS
from tests.models.conftest import Load, cosines_of
from tests.models.plain import assert_same_logits, entry, load_whole
from tests.models.test_llm_rerankers import CHATML, DOCUMENTS, QUERY, RERANKER, scores, write
from tests.models.test_llm_rerankers import load as load_reranker

PROMPTS = {"query": "Find what answers <it>.", "document": ""}
TAILED = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def save_embedder(
    folder: Path, template: str = CHATML, pooling: str = "lasttoken", max_tokens: int = 40, **arguments: object
) -> Path:
    """Let sentence-transformers save an embedder whose tokenizer has a chat template."""
    write(folder / "plain", AutoModel, chat_template=template)
    transformer = Transformer(str(folder / "plain"), max_seq_length=max_tokens)
    model = SentenceTransformer(modules=[transformer, Pooling(64, pooling_mode=pooling)], device="cpu", prompts=PROMPTS)
    model.save(str(folder / "saved"), create_model_card=False)
    if arguments:
        path = folder / "saved" / "sentence_bert_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "processing_kwargs": {"chat_template": arguments}}))
    return folder / "saved"


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("template", "pooling", "arguments"),
    [
        (CHATML, "lasttoken", {}),
        (TAILED, "mean", {"add_generation_prompt": True}),
        ("{{ messages[-1].content }}", "mean", {}),
    ],
    ids=["last token", "end of the template", "nothing around a text"],
)
def test_texts_of_an_embedder_are_put_into_its_chat_template(
    tmp_path: Path, load: Load, template: str, pooling: str, arguments: dict[str, object], runtime: str
) -> None:
    texts = [text for text in (*TEXTS, "<|im_end|>\n ", "near  \n") if text.strip() or "im_start" in template]
    folder = save_embedder(tmp_path, template, pooling, **arguments)
    theirs, ours = SentenceTransformer(str(folder), device="cpu"), load(folder, runtime)
    assert theirs[0].modality_config["message"]
    for task, prompt in ((None, ""), ("retrieval.query", PROMPTS["query"]), ("retrieval.passage", "")):
        expected = theirs.encode(texts, prompt=prompt)

        for text, row in zip(texts, ours.encoder.tokenize(texts, task, Truncate.END), strict=True):
            assert row.ids == theirs.preprocess([text], prompt=prompt)["input_ids"][0].tolist()
        for found in (ours.vectors(texts, [task] * len(texts)), ours.alone(texts, [task] * len(texts))):
            assert cosines_of(found, expected).min() > 0.99999


def test_a_long_text_in_a_chat_template_is_cut_or_refused(tmp_path: Path, load: Load) -> None:
    encoder = load(save_embedder(tmp_path), "torch").encoder
    text = "again and again " * 40

    with pytest.raises(ContextLengthExceeded, match=r"however input\[0\] has \d+ tokens, with the template around it"):
        encoder.tokenize([text], None, Truncate.REFUSE)
    [end] = encoder.tokenize([text], "retrieval.query", Truncate.END)
    [start] = encoder.tokenize([text], "retrieval.query", Truncate.START)
    assert len(end.ids) == len(start.ids) == 40
    assert (end.ids[:10], end.ids[-2:]) == (start.ids[:10], start.ids[-2:])
    assert not plan_load(entry(tmp_path / "saved")).info.can_chunk_late


def test_the_chat_template_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = save_embedder(tmp_path)
    before = plan_load(entry(folder)).info.fingerprint
    (folder / "chat_template.jinja").write_text(CHATML + " ")

    assert plan_load(entry(folder)).info.fingerprint != before


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (CHATML.replace("m['content']", "m['content'] | trim"), {}, "its chat template changes the given texts"),
        (CHATML.replace("<|im_end|>", "s"), {}, "end does not begin with a special token"),
        (CHATML + "{{ strftime_now('%d %b %Y') }}", {}, "its chat template depends on strftime_now"),
        (CHATML + "{% if task == 'query' %}{% endif %}", {}, "its chat template depends on task"),
        ("{{ raise_exception('no') }}", {}, "refuses a message of the role 'user'"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
            {},
            "refuses a message of the role 'user' after one of the role 'system'",
        ),
        (CHATML, {"restore_suffix": False}, "processing_kwargs: chat_template: restore_suffix is not supported"),
    ],
)
def test_a_chat_template_that_would_give_other_tokens_is_refused(
    tmp_path: Path, template: str, arguments: dict[str, object], message: str
) -> None:
    folder = save_embedder(tmp_path, CHATML, **arguments)
    (folder / "chat_template.jinja").write_text(template)

    with pytest.raises(LoadError, match=message):
        load_whole(folder)


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

    assert_same_logits(scores(load_reranker(folder), QUERY, DOCUMENTS)[:, 0], expected)

    edit_json(folder / "sentence_bert_config.json", processing_kwargs={**arguments, "text": {"truncation": False}})
    with pytest.raises(LoadError, match="processing_kwargs: text is not supported"):
        plan_load(entry(folder))

    (folder / "chat_template.jinja").unlink()
    with pytest.raises(LoadError, match=r"has 'message': .*There is no chat template here"):
        plan_load(entry(folder))
