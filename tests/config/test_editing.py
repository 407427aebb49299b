"""An experiment is changed in its file by a few characters, and everything else stays as it was."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.config.editing import Change, edit_experiment
from gateway.config.registry import load_registry
from gateway.errors import ConfigError, StartError

HEAD = """\
# Our models. Größe: 日本語 😀
version: 1
models:
  - {id: one, source: ./one}
  - {id: two, source: ./two}
experiments:
"""
BLOCK = """\
  - id: "exp"      # clients send this
    kind: cross_space
    unit: {from: [model]}
    arms:
      - model: one
        weight: 50       # the control
      - {name: new, model: two, weight: 50.0}
  - id: other
    kind: cross_space
    unit: {from: [model]}
    arms: [{model: one, weight: 50}, {model: two, weight: 50}]
# the end
"""
FLOW = "  - {id: exp, kind: cross_space, unit: {from: [model]}, arms: [{model: one, weight: 1}, {model: two, weight: 2}]}\n"
END = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def edited(tmp_path: Path, text: str, change: Change, **environ: str) -> str:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    edit = edit_experiment(load_registry(path, environ), "exp", change, environ)
    assert path.read_text() == edit.after
    return edit.after


def test_weights_are_replaced_and_comments_stay(tmp_path: Path) -> None:
    after = edited(tmp_path, HEAD + BLOCK, Change({"one": 10, "new": 0.125}))

    assert after == HEAD + BLOCK.replace("weight: 50       #", "weight: 10       #").replace("50.0", "0.125")


def test_an_end_is_added_below_the_id(tmp_path: Path) -> None:
    after = edited(tmp_path, HEAD + BLOCK, Change({}, END))

    assert after == HEAD + BLOCK.replace("send this\n", "send this\n    end: 2030-01-02T03:04:05Z\n")


def test_an_existing_end_is_replaced(tmp_path: Path) -> None:
    before = HEAD + BLOCK.replace("    arms:\n", '    end: "2031-01-01"  # later\n    arms:\n', 1)

    after = edited(tmp_path, before, Change({}, END))

    assert after == before.replace('"2031-01-01"', "2030-01-02T03:04:05Z")


def test_the_short_form_is_changed_as_well(tmp_path: Path) -> None:
    after = edited(tmp_path, HEAD + FLOW, Change({"two": 8}, END))

    assert after == HEAD + FLOW.replace("id: exp", "id: exp, end: 2030-01-02T03:04:05Z").replace(
        "weight: 2", "weight: 8"
    )


def test_a_file_without_a_line_break_at_its_end_and_with_windows_ones(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_bytes((HEAD + BLOCK).rstrip().replace("\n", "\r\n").encode())

    edit_experiment(load_registry(path, {}), "exp", Change({"one": 7}, END), {})

    experiment = load_registry(path, {}).experiment("exp")
    assert experiment is not None
    assert (experiment.end, experiment.arms[0].weight) == (END, 7)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_the_byte_order_mark_and_the_line_breaks_of_an_editor_stay(tmp_path: Path, mark: str, line_break: str) -> None:
    path = tmp_path / "models.yaml"

    def write(text: str) -> bytes:
        return (mark + text.replace("\n", line_break)).encode()

    path.write_bytes(write(HEAD + BLOCK))

    edit = edit_experiment(load_registry(path, {}), "exp", Change({}, END), {})
    changed = path.read_bytes()
    edit.undo()

    assert changed == write(HEAD + BLOCK.replace("send this\n", "send this\n    end: 2030-01-02T03:04:05Z\n"))
    assert path.read_bytes() == write(HEAD + BLOCK)


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        (HEAD + FLOW.replace("weight: 2", "weight: '${SHARE}'"), {"SHARE": "2"}),
        (HEAD + FLOW.replace("weight: 2", "weight: ${SHARE:-2}"), {}),
        (HEAD + FLOW.replace("weight: 1}", "weight: &w 1}").replace("weight: 2", "weight: *w"), {}),
    ],
)
def test_values_that_stand_elsewhere_are_left_to_people(tmp_path: Path, text: str, environ: dict[str, str]) -> None:
    with pytest.raises((StartError, ConfigError)) as caught:
        edited(tmp_path, text, Change({"two": 8}), **environ)

    assert "change it by hand" in str(caught.value) or isinstance(caught.value, ConfigError)
    assert (tmp_path / "models.yaml").read_text() == text


def test_a_file_with_changes_that_are_not_served_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(HEAD + FLOW)
    served = load_registry(path, {})
    path.write_text(HEAD + FLOW.replace("weight: 1", "weight: 5"))

    with pytest.raises(StartError, match="has changes that are not served yet: read it again first"):
        edit_experiment(served, "exp", Change({"two": 8}), {})
    assert "weight: 5" in path.read_text()


def test_a_wrong_change_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be later than `start`"):
        edited(tmp_path, HEAD + FLOW.replace("id: exp", "id: exp, start: 2040-01-01"), Change({}, END))
    assert "2030" not in (tmp_path / "models.yaml").read_text()


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "models.yaml"
    path.parent.mkdir()
    path.write_text(HEAD + FLOW)
    served = load_registry(path, {})
    path.unlink()
    path.symlink_to("/proc/self/comm")  # exists, and no file can be put next to it

    with pytest.raises(StartError):
        edit_experiment(served, "exp", Change({"two": 8}), {})


def test_an_edit_is_undone_unless_the_file_was_changed_since(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(HEAD + FLOW)
    edit = edit_experiment(load_registry(path, {}), "exp", Change({"two": 8}), {})

    edit.undo()
    assert path.read_text() == HEAD + FLOW

    edit = edit_experiment(load_registry(path, {}), "exp", Change({"two": 8}), {})
    path.write_text("by hand")
    edit.undo()
    assert path.read_text() == "by hand"
