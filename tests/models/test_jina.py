"""Jina v3: each task gives the vectors of PEFT, mixed in any batch, with every runtime."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from gateway.cli.verify import verify
from gateway.config.registry import ModelEntry
from gateway.config.settings import Settings
from gateway.engine import loading, published
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.read import read_checkpoint
from gateway.engine.devices import choose_dtype
from gateway.engine.loading import load_engine, plan_load
from gateway.engine.model.adapters import install_adapters
from gateway.engine.model.runtimes.inputs import InputMaker
from gateway.errors import LoadError
from gateway.types import Truncate
from tests.models.checkpoints import JINA_TASKS, MAX_TOKENS, SENTENCES, TEXTS, make_transformer, save_adapters
from tests.models.checkpoints import unigram_tokenizer as jina_tokenizer

Cosines = Callable[[np.ndarray, np.ndarray], np.ndarray]
Copy = Callable[[Path], Path]
Tokenize = Callable[..., list[int]]
Load = Callable[..., Any]
EditJson = Callable[..., None]
PeftStates = Callable[[Sequence[int], str | None], torch.Tensor]
Reference = Callable[[str, str | None], np.ndarray]

TASKS = tuple(JINA_TASKS.values())
RUNTIMES = ("reference", "packed", "openvino")
INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
}
MIXED = [(text, task) for i, text in enumerate(TEXTS) for task in ((None, *TASKS)[i % 6], (None, *TASKS)[(i + 3) % 6])]


@pytest.fixture(scope="module")
def reference(jina: Path, peft_states: PeftStates, tokenize: Tokenize) -> Reference:
    """Return the function that computes a text's vector with PEFT, by itself."""

    def vector(text: str, task: str | None) -> np.ndarray:
        return peft_states(tokenize(jina, INSTRUCTIONS.get(task or "", "") + text), task).mean(0).numpy()

    return vector


@pytest.fixture(scope="module")
def mixed(reference: Reference) -> np.ndarray:
    """Compute the vectors of :data:`MIXED`."""
    return np.stack([reference(text, task) for text, task in MIXED])


# ------------------------------------------------------------------------------------------------ published numbers


@pytest.fixture
def published_model(
    jina: Path, monkeypatch: pytest.MonkeyPatch, peft_states: PeftStates, tokenize: Tokenize
) -> ModelEntry:
    """Return a model whose published numbers are PEFT's, as Jina's are those of transformers."""
    ids = tokenize(jina, published.TEXT)
    numbers = {task: tuple(peft_states(ids, task)[1, 1:5].tolist()) for task in (None, *TASKS)}
    monkeypatch.setattr(published, "SOURCE", str(jina))
    monkeypatch.setattr(published, "NUM_TOKENS", len(ids))
    monkeypatch.setattr(published, "STATES", numbers)
    return ModelEntry(id="jina", source=str(jina), enabled=True, device="cpu", dtype="float32")


def test_a_model_that_gives_the_published_numbers_is_verified(published_model: ModelEntry) -> None:
    checks = verify(published_model, Settings())

    assert [check.what for check in checks] == [
        "the published text",
        *(f"published states, {task or 'no adapter'}" for task in (None, *TASKS)),
        *(f"published states, openvino in float32, {task or 'no adapter'}" for task in (None, *TASKS)),
        "openvino in float32 on cpu, compared with torch in float32",
    ]
    assert [check.quantity for check in checks] == ["tokens", *["deviation"] * 12, "lowest cosine"]
    assert all(check.is_passed for check in checks), checks


def test_the_served_model_is_compared_with_the_published_numbers(
    published_model: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that the serving runtime mistakes for another, as no comparison with the reference alone would show."""
    make = InputMaker.make

    def mistake(self: InputMaker, rows: Any, adapters: Sequence[int], *others: Any) -> Any:
        return make(self, rows, [0 if adapter == 2 else adapter for adapter in adapters], *others)

    verified = load_engine  # the model is compared when it is compiled, so the mistake comes after that

    def load_and_break(*arguments: Any, **options: Any) -> Any:
        engine = verified(*arguments, **options)
        monkeypatch.setattr(InputMaker, "make", mistake)
        return engine

    monkeypatch.setattr(loading, "load_engine", load_and_break)

    wrong = [check for check in verify(published_model, Settings()) if not check.is_passed]

    assert [check.what for check in wrong] == [
        "published states, openvino in float32, separation",
        "openvino in float32 on cpu, compared with torch in float32",
    ]


@pytest.mark.parametrize("task", [None, "separation"])
def test_a_published_number_that_is_missed_is_reported_for_its_task_alone(
    published_model: ModelEntry, monkeypatch: pytest.MonkeyPatch, task: str | None
) -> None:
    first, *rest = published.STATES[task]
    monkeypatch.setitem(published.STATES, task, (first + 2 * published.TOLERANCE, *rest))

    wrong = [check for check in verify(published_model, Settings()) if not check.is_passed]

    assert [check.what for check in wrong] == [f"published states, {task or 'no adapter'}"]
    assert wrong[0].measured.startswith("0.0002")
    assert wrong[0].limit == "at most 0.0001"


def test_another_number_of_tokens_is_reported(published_model: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "NUM_TOKENS", published.NUM_TOKENS + 1)

    assert [check.what for check in verify(published_model, Settings()) if not check.is_passed] == [
        "the published text"
    ]


# ---------------------------------------------------------------------------------------------------------- vectors


def test_tasks_differ_by_far_more_than_the_tolerance(reference: Reference, cosines: Cosines) -> None:
    """Otherwise the tests below would prove nothing."""
    vectors = np.stack([reference("near vectors", task) for task in (None, *TASKS)])

    for shift in range(1, 6):
        assert cosines(vectors, np.roll(vectors, shift, axis=0)).max() < 0.99


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("task", [None, *TASKS])
def test_a_task_gives_what_peft_gives(
    jina: Path, load: Load, reference: Reference, cosines: Cosines, runtime: str, task: str | None
) -> None:
    model = load(jina, runtime)

    expected = np.stack([reference(text, task) for text in TEXTS])

    assert cosines(model.vectors(TEXTS, [task] * len(TEXTS)), expected).min() > 0.99999


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_tasks_and_none_mixed_in_one_batch_give_what_peft_gives(
    jina: Path, load: Load, mixed: np.ndarray, cosines: Cosines, runtime: str
) -> None:
    model = load(jina, runtime)
    texts, tasks = zip(*MIXED, strict=True)

    vectors = model.vectors(texts, tasks)

    assert set(tasks) == {None, *TASKS}
    assert cosines(vectors, mixed).min() > 0.99999
    np.testing.assert_allclose(vectors, mixed, atol=2e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_vector_does_not_depend_on_its_company(jina: Path, load: Load, runtime: str) -> None:
    model = load(jina, runtime)
    texts, tasks = zip(*MIXED, strict=True)

    np.testing.assert_allclose(model.vectors(texts, tasks), model.alone(texts, tasks), atol=2e-4)


@pytest.mark.skipif(choose_dtype("auto", "cpu") != "bfloat16", reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bfloat16_stays_near(jina: Path, load: Load, mixed: np.ndarray, cosines: Cosines, runtime: str) -> None:
    model = load(jina, runtime, "bfloat16")
    texts, tasks = zip(*MIXED, strict=True)

    assert cosines(model.vectors(texts, tasks), mixed).min() > 0.999


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    batch=st.lists(
        st.tuples(st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)), st.sampled_from([None, *TASKS])),
        min_size=1,
        max_size=12,
    )
)
@pytest.mark.parametrize("runtime", ["reference", "packed"])
def test_any_batch_in_any_order_gives_each_text_the_vector_it_has_alone(
    jina: Path, load: Load, runtime: str, batch: list[tuple[str, str | None]]
) -> None:
    model = load(jina, runtime)
    texts, tasks = zip(*batch, strict=True)

    np.testing.assert_allclose(model.vectors(texts, tasks), model.alone(texts, tasks), atol=3e-4)


def test_a_padding_token_inside_a_text_changes_nothing_for_others(jina: Path, load: Load, reference: Reference) -> None:
    texts = ["near <pad> vectors", "fox"]

    for runtime in RUNTIMES:
        vectors = load(jina, runtime).vectors(texts)
        np.testing.assert_allclose(vectors, [reference(text, None) for text in texts], atol=2e-4)


# ----------------------------------------------------------------------------------------------------- instructions


@pytest.mark.parametrize("task", [None, *TASKS])
@pytest.mark.parametrize("text", TEXTS)
def test_only_the_two_retrieval_tasks_have_an_instruction(
    jina: Path, load: Load, tokenize: Tokenize, task: str | None, text: str
) -> None:
    encoder = load(jina, "reference").encoder

    [tokens] = encoder.tokenize([text], task, Truncate.END)

    assert tokens.ids == tokenize(jina, INSTRUCTIONS.get(task or "", "") + text)
    assert len(tokens.ids) <= MAX_TOKENS


def test_sentence_transformers_empty_prompts_leave_jina_s_instructions(
    jina: Path, copy: Callable[[Path], Path]
) -> None:
    """sentence-transformers writes them into every checkpoint that has none; `query` also names `retrieval.query`."""
    folder = copy(jina)
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {"query": "", "document": ""}}')

    assert plan(folder).tasks == plan(jina).tasks


def test_the_checkpoint_s_own_instructions_win(jina: Path, copy: Callable[[Path], Path]) -> None:
    folder = copy(jina)
    prompts = {"query": "Q: ", "retrieval.passage": "", "code": "Without an adapter: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))

    tasks = plan(folder).tasks

    assert (tasks["retrieval.query"], tasks["retrieval.passage"]) == ("Q: ", "")
    assert set(tasks) == set(TASKS)


# ------------------------------------------------------------------------------------------------------------ spaces


def plan(folder: Path, **entry: object) -> Any:
    return plan_load(ModelEntry(id="jina", source=str(folder), device="cpu", **entry))


def spaces(folder: Path, dimensions: int = 64) -> dict[str | None, str]:
    info = plan(folder).info
    without_task = dataclasses.replace(info, default_task=None).space(None, dimensions)
    return {None: without_task} | {task: info.space(task, dimensions) for task in TASKS}


def test_a_query_and_a_passage_share_a_space_and_the_others_have_their_own(jina: Path) -> None:
    names = spaces(jina)

    assert names["retrieval.query"] == names["retrieval.passage"]
    assert len(set(names.values())) == 5
    assert not set(names.values()) & set(spaces(jina, 32).values())


@pytest.mark.parametrize("change", [{"lora_alpha": 2}, {"use_rslora": True}])
def test_another_scaling_of_an_adapter_is_another_space(
    jina: Path, copy: Callable[[Path], Path], edit_json: EditJson, change: dict[str, object]
) -> None:
    folder = copy(jina)
    edit_json(folder / "separation" / "adapter_config.json", **change)

    assert spaces(folder)["separation"] != spaces(jina)["separation"]


def test_a_checkpoint_saved_again_stays_in_its_space(
    jina: Path, copy: Callable[[Path], Path], edit_json: EditJson
) -> None:
    folder = copy(jina)
    edit_json(folder / "separation" / "adapter_config.json", peft_version="1.0", base_model_name_or_path="elsewhere")

    assert spaces(folder) == spaces(jina)


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def changed(jina: Path, copy: Callable[[Path], Path]) -> Iterator[Path]:
    """Return a copy of the checkpoint that a test may change."""
    return copy(jina)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def install(folder: Path, tasks: Sequence[str] = tuple(JINA_TASKS)) -> None:
    install_adapters(AutoModel.from_pretrained(folder), [folder / task for task in tasks])


FC1 = "base_model.model.layers.0.mlp.fc1.lora_"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            lambda tensors: tensors.update({f"{FC1}A.weight": torch.zeros(4, 63)}),
            r"layers\.0\.mlp\.fc1: an adapter of shapes \(4, 63\), \(96, 4\) does not fit a layer of 64 inputs and 96",
            id="wrong inputs",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{FC1}B.weight": torch.zeros(95, 4)}), "does not fit", id="wrong outputs"
        ),
        pytest.param(
            lambda tensors: tensors.update(
                {f"{FC1}A.weight": torch.zeros(3, 64), f"{FC1}B.weight": torch.zeros(96, 3)}
            ),
            "does not fit",
            id="wrong rank",
        ),
        pytest.param(lambda tensors: tensors.pop(f"{FC1}A.weight"), "has only one of", id="half of a pair"),
        pytest.param(
            lambda tensors: tensors.update(
                {
                    "base_model.model.layers.9.mlp.fc1.lora_A.weight": torch.zeros(4, 64),
                    "base_model.model.layers.9.mlp.fc1.lora_B.weight": torch.zeros(96, 4),
                }
            ),
            r"is for layers\.9\.mlp\.fc1, which the model does not have",
            id="no such layer",
        ),
        pytest.param(
            lambda tensors: tensors.update(
                {
                    "base_model.model.embeddings.LayerNorm.lora_A.weight": torch.zeros(4, 64),
                    "base_model.model.embeddings.LayerNorm.lora_B.weight": torch.zeros(64, 4),
                }
            ),
            r"holds embeddings\.LayerNorm\.lora_A\.weight, which the adapter's target_modules do not name",
            id="a layer of another kind",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{FC1}magnitude_vector.default.weight": torch.zeros(96)}),
            "magnitude_vector",
            id="a tensor of another method",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{FC1}B.bias": torch.zeros(96)}), r"fc1\.lora_B\.bias", id="a bias"
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    changed: Path, change: Callable[[dict[str, torch.Tensor]], object], reason: str
) -> None:
    edit_tensors(changed / "separation", change)

    with pytest.raises(LoadError, match=reason):
        install(changed)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "LOHA"},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"rank_pattern": {"fc1": 8}},
        {"alpha_pattern": {"fc1": 8}},
        {"modules_to_save": ["pooler"]},
        {"fan_in_fan_out": True},
        {"target_parameters": ["encoder.weight"]},
        {"arrow_config": {"router_k": 1}},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa"},
        {"r": None},
        # PEFT would leave some of the tensors out.
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": None},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["q_proj"]},
    ],
)
def test_a_method_that_computes_something_else_is_refused(
    changed: Path, edit_json: EditJson, change: dict[str, object]
) -> None:
    edit_json(changed / "separation" / "adapter_config.json", **change)

    with pytest.raises(LoadError, match="adapter"):
        install(changed)


def test_a_layer_that_one_adapter_leaves_alone_is_the_base_s_for_that_task(
    changed: Path, load: Load, reference: Reference, cosines: Cosines
) -> None:
    def drop_fc1(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".fc1." in key]:
            del tensors[key]

    edit_tensors(changed / "separation", drop_fc1)

    model = load(changed, "reference")
    others = [task for task in TASKS if task != "separation"]
    vectors = model.vectors(["near vectors"] * 5, ["separation", *others])

    assert cosines(vectors[1:], np.stack([reference("near vectors", task) for task in others])).min() > 0.99999
    assert cosines(vectors[:1], reference("near vectors", "separation")[None]).max() < 0.999


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_alpha": 3, "r": 2}, {"r": 6, "lora_alpha": 1}])
def test_scaling_and_rank_are_peft_s(
    tmp_path: Path, load: Load, tokenize: Tokenize, cosines: Cosines, options: dict[str, object]
) -> None:
    make_transformer(tmp_path, "jina_embeddings_v3", jina_tokenizer(), type_vocab_size=1)
    save_adapters(tmp_path, ["separation"], **options)
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path), tmp_path, subfolder="separation").eval()

    vector = load(tmp_path, "reference").vectors([SENTENCES[0]], ["separation"])

    with torch.inference_mode():
        states = peft(input_ids=torch.tensor([tokenize(tmp_path, SENTENCES[0])])).last_hidden_state[0]
    assert cosines(vector, states.mean(0)[None].numpy()).min() > 0.99999


def test_adapters_of_different_ranks_share_a_batch(tmp_path: Path, load: Load, cosines: Cosines) -> None:
    make_transformer(tmp_path, "jina_embeddings_v3", jina_tokenizer(), type_vocab_size=1)
    save_adapters(tmp_path, ["separation"], r=2)
    save_adapters(tmp_path, ["classification"], r=5)
    model = load(tmp_path, "packed")
    tasks = ["separation", None, "classification"]

    vectors = model.vectors(["near vectors"] * 3, tasks)

    np.testing.assert_allclose(vectors, model.alone(["near vectors"] * 3, tasks), atol=2e-4)
    assert cosines(vectors[:2], vectors[1:]).max() < 0.99


def test_rslora_scales_by_the_root_of_the_rank(changed: Path, edit_json: EditJson) -> None:
    model = AutoModel.from_pretrained(changed)
    name = "base_model.model.layers.0.mlp.fc1.lora_B.weight"
    up = load_file(changed / "separation" / "adapter_model.safetensors")[name]
    edit_json(changed / "separation" / "adapter_config.json", use_rslora=True)

    install_adapters(model, [changed / "separation"])

    torch.testing.assert_close(model.get_submodule("layers.0.mlp.fc1").up.data, up / math.sqrt(4))


# ------------------------------------------------------------------------------------------------------------- tasks


def test_every_adapter_is_a_task(jina: Path) -> None:
    assert plan(jina).tasks == {task: INSTRUCTIONS.get(task, "") for task in TASKS}


def test_a_task_without_its_adapter_is_refused(changed: Path) -> None:
    """Its texts would be embedded without an adapter: in a space that no client asked for."""
    (changed / "separation" / "adapter_config.json").unlink()

    assert "separation" not in plan(changed).tasks
    with pytest.raises(LoadError, match=r"'separation' has no adapter; tasks with one: retrieval\.query, "):
        plan(changed, prompts={"clustering": "Cluster: "})


def test_the_checkpoint_has_no_unused_weights(jina: Path) -> None:
    """The tiny checkpoint has an adapter for every layer, the unused pooler included, as the real one does."""
    checkpoint = read_checkpoint(jina)
    model = AutoModel.from_pretrained(jina)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}

    assert checkpoint.adapters.keys() == set(TASKS)
    for folder in checkpoint.adapters.values():
        keys = load_file(folder / "adapter_model.safetensors")
        assert {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys} == layers


def test_adapters_for_tasks_make_an_embedder_of_any_class(jina: Path, copy: Copy, edit_json: EditJson) -> None:
    folder = copy(jina)
    edit_json(folder / "config.json", architectures=["JinaEmbeddingsV3ForMaskedLM"])
    modules = [{"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    assert len(read_checkpoint(folder).adapters) == len(JINA_TASKS)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert read_checkpoint(folder).pooling is Pooling.MEAN

    for name in JINA_TASKS:
        shutil.rmtree(folder / name)
    with pytest.raises(LoadError, match=r"custom_st\.Transformer is the checkpoint's own code"):
        read_checkpoint(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(LoadError, match="JinaEmbeddingsV3ForMaskedLM is not a model that embeds"):
        read_checkpoint(folder)
