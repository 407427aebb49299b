"""``gateway key`` makes an entry for the file of keys, or adds it there; ``gateway check`` reads that file too."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.access.keyring import KEY_PREFIX, Keyring, key_digest, make_key
from gateway.cli.main import app
from gateway.config.api_keys import add_key, load_key_file, make_entry
from gateway.config.settings import load_settings

DIGEST = "a" * 64


def shown_key(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("egw_"))


def add(file: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["key", *arguments, "--file", str(file)])


async def test_a_made_key_opens_with_its_entry(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["key", "search-team"])
    key = shown_key(made.stderr)
    file = tmp_path / "keys.yaml"
    file.write_text(f"version: 1\nkeys:\n{made.stdout}", encoding="utf-8")

    keyring = Keyring(load_settings({"GATEWAY_API_KEYS_FILE": str(file)}))

    assert made.exit_code == 0
    assert key not in made.stdout  # the entry for the file does not contain the key
    assert (await keyring.identify(key_digest(key), "127.0.0.1")).name == "search-team"
    await keyring.close()


def test_each_made_key_is_another() -> None:
    keys = {CliRunner().invoke(app, ["key", "a"]).stderr for _ in range(20)}

    assert len(keys) == 20


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    models, keys = tmp_path / "models.yaml", tmp_path / "keys.yaml"
    models.write_text(
        "version: 1\nmodels:\n  - {id: mini, source: package:w}\naliases: {default: mini}\n", encoding="utf-8"
    )
    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", str(keys))
    return models, keys


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (
            f"{{name: a, sha256: {DIGEST}, models: [minni]}}",
            "key a: the model `minni` does not exist; did you mean `mini`?",
        ),
        ("{name: a, sha256: secret}", "keys[0].sha256[0]: must be the 64 lowercase hex digits"),
        ("{name: a, sha256: 12345}", "got the number `12345`; put it in quotes"),
        (f"{{name: a, sha256: {DIGEST}}}\n  - {{name: a, sha256: {'b' * 64}}}", "`a` appears twice"),
    ],
)
def test_a_wrong_file_of_keys_fails_the_check(files: tuple[Path, Path], entry: str, problem: str) -> None:
    models, keys = files
    keys.write_text(f"version: 1\nkeys:\n  - {entry}\n", encoding="utf-8")

    result = CliRunner().invoke(app, ["check", "--models", str(models)])

    assert result.exit_code == 1
    assert problem in result.stderr
    assert str(keys) in result.stderr
    assert "secret" not in result.stderr


def test_a_right_file_of_keys_passes_the_check(files: tuple[Path, Path]) -> None:
    models, keys = files
    keys.write_text(f"version: 1\nkeys:\n  - {{name: a, sha256: {DIGEST}, models: [default]}}\n", encoding="utf-8")

    assert CliRunner().invoke(app, ["check", "--models", str(models)]).exit_code == 0


def test_a_missing_file_of_keys_fails_the_check(files: tuple[Path, Path]) -> None:
    models, keys = files

    result = CliRunner().invoke(app, ["check", "--models", str(models)])

    assert result.exit_code == 1
    assert str(keys) in result.stderr
    assert "GATEWAY_API_KEYS_FILE" in result.stderr


def test_keys_have_their_own_prefix_and_no_character_that_splits_a_word() -> None:
    """So that scanners for leaked secrets find them, and a double click takes all of one."""
    key = make_key()

    assert key.startswith(KEY_PREFIX)
    assert key.removeprefix(KEY_PREFIX).isalnum()


# ------------------------------------------------------------------------------------------------------------ --file


async def test_the_file_is_made_with_the_first_key_for_the_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"

    made = add(file, "search-frontend")

    assert made.exit_code == 0, made.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().startswith("version: 1\n\nkeys:\n  - name: search-frontend\n    sha256: ")
    keyring = Keyring(load_settings({"GATEWAY_API_KEYS_FILE": str(file)}))
    assert (await keyring.identify(key_digest(shown_key(made.stderr)), "")).name == "search-frontend"
    await keyring.close()


def test_every_option_is_in_the_entry(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    options = ["--models", "mini, team/b", "--requests-per-minute", "60", "--tokens-per-minute", "9000"]

    made = add(file, "a", *options, "--expires", "2127-01-01")

    assert made.exit_code == 0, made.stderr
    (entry,) = load_key_file(file, {}).keys
    assert (entry.models, entry.requests_per_minute, entry.tokens_per_minute) == (("mini", "team/b"), 60, 9000)
    assert entry.expires is not None
    assert entry.expires.isoformat() == "2127-01-01T00:00:00+00:00"


LAYOUTS = {
    "block": f"# who\nversion: 1\nkeys:  # all\n  - name: one # first\n    sha256: {DIGEST}\n\n# the end\n",
    "not indented": f"version: 1\nkeys:\n- {{name: one, sha256: {DIGEST}}}",
    "keys first": f"keys:\n  - name: one\n    sha256: {DIGEST}\n# between\nversion: 1 # end\n",
    "flow": f"version: 1\nkeys: [{{name: one, sha256: {DIGEST}}}]  # end\n",
    "flow with a last comma": f"version: 1\nkeys: [\n  {{name: one, sha256: {DIGEST}}},\n]\n",
    "windows": f"version: 1\r\nkeys:\r\n  - name: one\r\n    sha256: {DIGEST}\r\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_is_extended_and_the_rest_of_it_kept(tmp_path: Path, layout: str) -> None:
    file = tmp_path / "keys.yaml"
    before = LAYOUTS[layout].encode()
    file.write_bytes(before)
    file.chmod(0o640)

    made = add(file, "two", "--models", "mini")

    assert made.exit_code == 0, made.stderr
    assert [entry.name for entry in load_key_file(file, {}).keys] == ["one", "two"]
    lines = file.read_bytes().splitlines()
    kept = [line for line in before.splitlines() if "flow" not in layout or line.startswith(b"version")]
    assert [line for line in lines if line in kept] == kept
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["keys.yaml"]


@pytest.mark.parametrize("text", ["", "version: 1\nkeys: []\n"], ids=["an empty file", "no keys"])
def test_a_file_without_keys_gets_its_first(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(text)

    assert add(file, "one").exit_code == 0
    assert [entry.name for entry in load_key_file(file, {}).keys] == ["one"]


@pytest.mark.parametrize("name", ["true", "123", "1e5", "2027-01-01", "team/a", "null", "a.b"])
def test_a_name_that_yaml_would_read_as_something_else_is_quoted(tmp_path: Path, name: str) -> None:
    file = tmp_path / "keys.yaml"

    assert add(file, name).exit_code == 0
    assert [entry.name for entry in load_key_file(file, {}).keys] == [name]


def test_a_name_that_is_taken_is_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "one")
    before = file.read_text()

    again = add(file, "One")

    assert again.exit_code == 1
    assert f"{file}: the name `One` is taken" in again.stderr
    assert "egw_" not in again.stderr  # a key that opens nothing is not shown
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["a b"], "command line: NAME: must be made of letters"),
        (["a", "--requests-per-minute", "0"], "command line: --requests-per-minute: must be at least 1, got `0`"),
        (["a", "--expires", "soon"], "command line: --expires: must be a time with its zone"),
        (["a", "--expires", "2020-01-01"], "command line: --expires: must be in the future, got `2020-01-01`"),
        (["a", "--models", ""], "command line: --models: must be a text that is not empty"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, arguments: list[str], problem: str) -> None:
    file = tmp_path / "keys.yaml"

    result = add(file, *arguments)

    assert result.exit_code == 1
    assert problem in result.stderr
    assert not file.exists()


def test_a_wrong_file_is_not_extended(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("version: 1\nkeys:\n  - {name: one}\n")

    result = add(file, "two")

    assert result.exit_code == 1
    assert f"{file}:3:5: keys[0].sha256: is missing and required" in result.stderr
    assert file.read_text() == "version: 1\nkeys:\n  - {name: one}\n"


def test_keys_that_are_not_a_plain_list_are_left_to_people(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    text = f"version: 1\n<<: &more\n  keys: [{{name: one, sha256: {DIGEST}}}]\n"
    file.write_text(text)

    result = add(file, "two")

    assert result.exit_code == 1
    assert "its `keys` are not a plain list; add by hand:\n  - name: two\n" in result.stderr
    assert file.read_text() == text


def test_the_byte_order_mark_and_the_line_breaks_of_an_editor_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    add(file, "one")
    before = b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n")
    file.write_bytes(before)

    assert add(file, "two").exit_code == 0

    after = file.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == after.count(b"\r\n") > before.count(b"\n")
    assert [entry.name for entry in load_key_file(file, {}).keys] == ["one", "two"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "keys.yaml"

    result = add(file, "one")

    assert result.exit_code == 1
    assert result.stderr == f"{file}: cannot be written: No such file or directory\n"


def test_keys_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    names = [f"client-{number}" for number in range(8)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: add_key(file, make_entry(name=name, sha256=key_digest(name)), {}), names))

    assert {entry.name for entry in load_key_file(file, {}).keys} == set(names)
