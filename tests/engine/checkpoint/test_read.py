"""A checkpoint is read as it describes itself, and one that cannot be served is refused with the reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.engine.checkpoint.classes import MODEL_TYPES
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.pair_template import has_chat_template
from gateway.engine.checkpoint.read import Checkpoint, read_checkpoint
from gateway.errors import LoadError
from gateway.types import Output

MakeCheckpoint = Callable[..., Path]


def test_the_bundled_model(bundled_folder: Path) -> None:
    checkpoint = read_checkpoint(bundled_folder)

    assert (checkpoint.model_type, checkpoint.width, checkpoint.num_layers, checkpoint.attention.num_heads) == (
        "bert",
        384,
        6,
        12,
    )
    assert (checkpoint.max_tokens, checkpoint.position_limit) == (256, 512)
    assert (checkpoint.pooling, checkpoint.is_normalized, checkpoint.is_lower_cased) == (Pooling.MEAN, True, False)
    assert (checkpoint.prompts, checkpoint.default_prompt) == ({}, None)
    assert [path.name for path in checkpoint.weights] == ["model.safetensors"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_sizes_are_found_under_each_architectures_names(
    plain_checkpoints: Callable[[str], Path], model_type: str
) -> None:
    checkpoint = read_checkpoint(plain_checkpoints(model_type))

    sizes = (checkpoint.width, checkpoint.num_layers, checkpoint.attention.num_heads, checkpoint.intermediate_width)
    assert sizes == (32, 2, 4, 64)
    assert checkpoint.hidden_width == 32
    # Jina's own code normalizes, and its checkpoint has no modules that say so.
    assert (checkpoint.pooling, checkpoint.is_normalized) == (Pooling.MEAN, model_type == "jina_embeddings_v3")


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_a_dense_layer_decides_the_width(make_checkpoint: MakeCheckpoint, has_safetensors: bool) -> None:
    folder = make_checkpoint()
    insert_dense({"out_features": 8})(folder)
    weights = folder / "2_Dense" / ("model.safetensors" if has_safetensors else "pytorch_model.bin")
    before = read_checkpoint_of(folder, weights, b"weights")
    after = read_checkpoint_of(folder, weights, b"others!")

    assert (before.width, before.hidden_width, before.is_normalized) == (8, 32, True)
    assert before.dense_layers == (folder / "2_Dense",)
    assert weights in before.all_weights
    assert weights not in before.weights
    assert before.fingerprint != after.fingerprint


def read_checkpoint_of(folder: Path, path: Path, content: bytes) -> Checkpoint:
    path.write_bytes(content)
    return read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "output"), [("sparse_linear.pt", Output.SPARSE), ("colbert_linear.pt", Output.MULTIVECTOR)]
)
def test_a_head_is_found_by_its_file(make_checkpoint: MakeCheckpoint, name: str, output: Output) -> None:
    folder = make_checkpoint()
    bare = read_checkpoint(folder)

    headed = read_checkpoint_of(folder, folder / name, b"weights")
    changed = read_checkpoint_of(folder, folder / name, b"others!")

    assert bare.outputs == (Output.DENSE,)
    assert headed.outputs == (Output.DENSE, output)
    assert folder / name in headed.all_weights
    assert len({bare.fingerprint, headed.fingerprint, changed.fingerprint}) == 3


def test_adapters_are_found_by_their_folders(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    for name in ("text_matching", "retrieval_query", "another"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}")
        (folder / name / "adapter_model.safetensors").write_bytes(name.encode())

    checkpoint = read_checkpoint(folder)

    # In the order of their indices.
    assert list(checkpoint.adapters.items()) == [
        ("retrieval.query", folder / "retrieval_query"),
        ("text-matching", folder / "text_matching"),
    ]
    assert folder / "text_matching" / "adapter_model.safetensors" in checkpoint.all_weights
    changed = read_checkpoint_of(folder, folder / "text_matching" / "adapter_model.safetensors", b"others!")
    assert changed.fingerprint != checkpoint.fingerprint


MODULE_NAMES = {
    "release 2": "sentence_transformers.models.",
    "release 6": "sentence_transformers.sentence_transformer.modules.pooling.",
}


@pytest.mark.parametrize("prefix", MODULE_NAMES.values(), ids=MODULE_NAMES)
def test_modules_are_known_under_the_names_of_all_releases(make_checkpoint: MakeCheckpoint, prefix: str) -> None:
    folder = make_checkpoint(pooling={"pooling_mode": "max"})
    path = folder / "modules.json"
    path.write_text(path.read_text().replace(MODULE_NAMES["release 2"], prefix))

    checkpoint = read_checkpoint(folder)

    assert (checkpoint.pooling, checkpoint.is_normalized) == (Pooling.MAX, True)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        pytest.param({}, Pooling.MEAN, id="nothing"),
        pytest.param({"pooling_mode_mean_tokens": False}, Pooling.MEAN, id="no flag is set"),
        pytest.param({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Pooling.CLS, id="one flag"),
        pytest.param({"pooling_mode": "lasttoken"}, Pooling.LAST, id="mode"),
        pytest.param({"pooling_mode": ["cls"]}, Pooling.CLS, id="a list of one mode"),
        pytest.param(
            {"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, Pooling.CLS, id="mode wins over a flag"
        ),
    ],
)
def test_every_form_of_pooling_is_read(
    make_checkpoint: MakeCheckpoint, pooling: dict[str, object], expected: Pooling
) -> None:
    assert read_checkpoint(make_checkpoint(pooling=pooling or {"include_prompt": True})).pooling is expected


# ------------------------------------------------------------------------------------------------------- fingerprint


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "is_other"),
    [
        pytest.param(change_weights, True, id="weights"),
        pytest.param(change_json("tokenizer.json", normalizer=None), True, id="tokenizer"),
        pytest.param(change_json("1_Pooling/config.json", pooling_mode="cls"), True, id="pooling"),
        pytest.param(change_json("sentence_bert_config.json", do_lower_case=True), True, id="lower-casing"),
        pytest.param(change_json("config.json", hidden_act="relu"), True, id="activation"),
        pytest.param(change_json("config.json", sliding_window=7), True, id="window"),
        pytest.param(change_json("config.json", local_rope_theta=None), True, id="null is not the default"),
        pytest.param(change_json("config.json", unheard_of=1), True, id="unknown setting"),
        pytest.param(change_json("tokenizer_config.json", add_eos_token=True), True, id="token added"),
        pytest.param(change_json("special_tokens_map.json", cls_token="<s>"), True, id="special token"),
        pytest.param(change_json("added_tokens.json", fox=7), True, id="word added"),
        pytest.param(change_json("config.json", transformers_version="9", dtype="float16"), False, id="who saved it"),
        pytest.param(change_json("config.json", hidden_dropout_prob=0.3, use_cache=False), False, id="training"),
        pytest.param(change_json("config.json", text={"initializer_range": 1}), True, id="nested setting"),
        pytest.param(change_json("tokenizer_config.json", padding_side="left", chat_template="x"), False, id="padding"),
        pytest.param(change_json("README.md", title="x"), False, id="a file that is not read"),
    ],
)
def test_the_fingerprint_changes_with_everything_that_determines_the_vectors(
    make_checkpoint: MakeCheckpoint, change: Callable[[Path], None], is_other: bool
) -> None:
    folder = make_checkpoint()
    before = read_checkpoint(folder).fingerprint

    change(folder)

    assert (read_checkpoint(folder).fingerprint != before) == is_other


def test_the_fingerprint_does_not_depend_on_the_place(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    before = read_checkpoint(folder).fingerprint

    moved = folder.rename(tmp_path / "elsewhere")

    assert read_checkpoint(moved).fingerprint == before


# ---------------------------------------------------------------------------------------------------------- refusals


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def add_module(kind: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "modules.json"
        rows = json.loads(path.read_text())
        rows.append({"idx": 9, "name": "9", "path": "9", "type": f"sentence_transformers.models.{kind}"})
        path.write_text(json.dumps(rows))

    return change


def insert_dense(config: dict[str, object] | None = None) -> Callable[[Path], None]:
    """Put a linear layer between pooling and normalization, with its configuration but without weights."""

    def change(folder: Path) -> None:
        path = folder / "modules.json"
        rows = json.loads(path.read_text())
        rows.insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
        path.write_text(json.dumps(rows))
        if config is not None:
            (folder / "2_Dense").mkdir()
            (folder / "2_Dense" / "config.json").write_text(json.dumps(config))

    return change


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "config.json: no such file; is this a checkpoint folder?"),
    "config is not JSON": (write("config.json", "{"), "config.json: not readable as JSON: "),
    "config is not text": (write("config.json", b"\xff\xfe"), "config.json: not readable as JSON: "),
    "config is a list": (write("config.json", "[]"), "config.json: must hold a JSON object, got list"),
    "no model type": (write("config.json", "{}"), "model_type must be a string, got None"),
    "another architecture": (
        change_json("config.json", model_type="gpt2"),
        "model_type 'gpt2' is not supported; supported: bert, roberta, ",
    ),
    "no width": (
        change_json("config.json", hidden_size=None),
        "config.json: not a configuration that can be used: Validation error for field 'hidden_size'",
    ),
    "width is not a number": (
        change_json("config.json", hidden_size="32"),
        "config.json: not a configuration that can be used: Validation error for field 'hidden_size'",
    ),
    "no positions": (change_json("config.json", max_position_embeddings=0), "config.json: every size must be positive"),
    "a negative width": (change_json("config.json", hidden_size=-32), "config.json: every size must be positive"),
    "no layers": (change_json("config.json", num_hidden_layers=0), "config.json: every size must be positive"),
    "modules is not JSON": (write("modules.json", "nonsense"), "modules.json: not readable as JSON: "),
    "modules is an object": (write("modules.json", "{}"), "modules.json: must hold a list"),
    "modules holds a number": (write("modules.json", "[1]"), "modules.json: each entry must be an object, got 1"),
    "a module without a path": (
        write("modules.json", '[{"type": "x.Transformer"}]'),
        "modules.json: path must be a string, got None",
    ),
    "no transformer": (
        write("modules.json", '[{"type": "x.Pooling", "path": "1_Pooling"}]'),
        "modules.json: the modules Pooling are not supported; supported: Transformer, Pooling, then optionally Dense",
    ),
    "no modules": (write("modules.json", "[]"), "modules.json: the modules none are not supported"),
    "a dense layer behind the normalization": (
        add_module("Dense"),
        "modules.json: the modules Transformer, Pooling, Normalize, Dense are not supported",
    ),
    "two normalizations": (
        add_module("Normalize"),
        "modules.json: the modules Transformer, Pooling, Normalize, Normalize are not supported",
    ),
    "an unknown module": (
        add_module("WeightedLayerPooling"),
        "modules.json: the modules Transformer, Pooling, Normalize, WeightedLayerPooling are not supported",
    ),
    "a dense layer without a folder": (insert_dense(), "2_Dense/config.json: no such file"),
    "a dense layer without a width": (insert_dense({}), "2_Dense/config.json: out_features must be a positive integer"),
    "a dense layer of no width": (
        insert_dense({"out_features": 0}),
        "2_Dense/config.json: out_features must be a positive integer, got 0",
    ),
    "a dense layer without weights": (
        insert_dense({"out_features": 8}),
        "2_Dense: no weights: neither model.safetensors",
    ),
    "no pooling file": (remove("1_Pooling/config.json"), "1_Pooling/config.json: no such file"),
    "an unknown pooling": (
        change_json("1_Pooling/config.json", pooling_mode="attention"),
        "pooling 'attention' is not supported; supported: mean, cls, max, lasttoken",
    ),
    "weighted pooling": (
        change_json("1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_weightedmean_tokens=True),
        "pooling 'weightedmean' is not supported",
    ),
    "two poolings by flags": (
        change_json("1_Pooling/config.json", pooling_mode_max_tokens=True),
        "pooling ['max', 'mean'] is not supported",
    ),
    "two poolings by mode": (
        change_json("1_Pooling/config.json", pooling_mode=["cls", "mean"]),
        "pooling ['cls', 'mean'] is not supported",
    ),
    "prompts are not pooled": (
        change_json("1_Pooling/config.json", include_prompt=False),
        "include_prompt: false is not supported",
    ),
    "a default prompt that is not there": (
        change_json("config_sentence_transformers.json", prompts={"query": "q: "}, default_prompt_name="passage"),
        "default_prompt_name is 'passage', but the prompts are: query",
    ),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer: neither tokenizer.json nor vocab.* nor *.model"),
    "no weights": (remove("model.safetensors"), "no weights: neither model.safetensors nor pytorch_model.bin"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_unsupported_checkpoint_is_refused_with_the_reason(make_checkpoint: MakeCheckpoint, name: str) -> None:
    change, message = REFUSALS[name]
    folder = make_checkpoint()
    change(folder)

    with pytest.raises(LoadError, match=re.escape(message)) as caught:
        read_checkpoint(folder)

    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize("name", ["modules.json", "tokenizer_config.json", "config_sentence_transformers.json"])
def test_optional_files_may_be_missing(make_checkpoint: MakeCheckpoint, name: str) -> None:
    folder = make_checkpoint()
    (folder / name).unlink(missing_ok=True)

    assert isinstance(read_checkpoint(folder), Checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer_config.json",
        "sparse_linear.pt",
        "model.safetensors",
        "config.json",
    ],
)
def test_a_link_that_leads_nowhere_is_not_a_file_that_is_missing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    """A part of the hub's cache may have been deleted. Without `modules.json`, another pooling would be taken."""
    folder = make_checkpoint()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "blobs" / "gone")

    with pytest.raises(LoadError, match=f"{re.escape(name)}: is a link to .*gone, which does not exist"):
        read_checkpoint(folder)


def test_a_chat_template_that_cannot_be_read_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")

    with pytest.raises(
        LoadError, match=r"chat_template\.jinja: cannot be read: must be a regular file, but is a named"
    ):
        has_chat_template(tmp_path)


@pytest.mark.parametrize("limit", [None, "12", 0, -1, True, 1.5e30])
def test_an_impossible_length_is_ignored(make_checkpoint: MakeCheckpoint, limit: Any) -> None:
    folder = make_checkpoint(transformer={"max_seq_length": limit})

    assert read_checkpoint(folder).max_tokens == 40
