"""The examples run as described in their README, and print the promised output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.clients.conftest import KEY
from tests.clients.gateway_process import ACROSS, MODEL, TOLD, WITHIN, Gateway

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "mem0_memory.py"
UNUSED_URL = "http://127.0.0.1:9/v1"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE, *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("store", ["qdrant", "milvus"])
def test_memories_are_added_found_changed_and_deleted(gateway: Gateway, store: str) -> None:
    space = httpx.get(f"{gateway.base_url}/models/{MODEL}").json()["space"]

    done = run("--store", store, "--base-url", gateway.base_url)

    assert done.returncode == 0, done.stderr
    head, added, *steps, end = done.stdout.split("\n\n")
    assert head.splitlines() == [
        f"{MODEL}: 384 dimensions, space {space}",
        f"{store} collection memories_{space.replace('-', '_').replace('@', '_')}",
    ]
    assert len(added.splitlines()) == 3
    # Only the best result of each search is checked: the number of others above Mem0's threshold depends on the model.
    assert [(step.split()[0], step.splitlines()[1][9:] if "\n" in step else "") for step in steps] == [
        ("searched", "I play the violin in an orchestra"),
        ("updated", ""),
        ("searched", "I play the cello in a quartet"),
        ("deleted", ""),
        ("searched", "My cat is allergic to fish"),
    ]
    assert "ADD, UPDATE, DELETE" in end
    assert "0 memories after delete_all" in end


def test_memories_that_are_kept_are_found_by_the_next_run(gateway: Gateway, tmp_path: Path) -> None:
    """The second run opens the collection of the first, which has the same space in its name."""
    options = ("--store", "qdrant", "--dir", str(tmp_path), "--base-url", gateway.base_url)

    first, second = run(*options), run(*options, "--model", MODEL)

    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert len(list((tmp_path / "qdrant" / "collection").glob("memories_*"))) == 1


def test_without_a_gateway_it_ends_with_advice() -> None:
    done = run("--base-url", UNUSED_URL)

    assert done.returncode == 1
    assert f"No gateway answers at {UNUSED_URL}. Start it with `make run`" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_ends_with_the_known_names(gateway: Gateway) -> None:
    done = run("--base-url", gateway.base_url, "--model", "bge-m4")

    assert done.returncode == 1
    assert f"available: {MODEL}" in done.stderr
    assert "Traceback" not in done.stderr


def test_milvus_may_be_elsewhere(gateway: Gateway, tmp_path: Path) -> None:
    database = tmp_path / "elsewhere.db"

    done = run("--store", "milvus", "--milvus-url", str(database), "--base-url", gateway.base_url)

    assert done.returncode == 0, done.stderr
    assert database.exists()


def test_a_key_is_passed_on(furnished_gateway: Gateway, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n", encoding="utf-8")

    without = run("--base-url", furnished_gateway.base_url)
    with_key = run("--base-url", furnished_gateway.base_url, "--api-key", KEY)
    with_file = run("--base-url", furnished_gateway.base_url, "--api-key-file", str(key_file))

    assert without.returncode == 1
    assert "refuses: Error code: 401" in without.stderr
    assert with_key.returncode == 0, with_key.stderr
    assert with_file.returncode == 0, with_file.stderr


def test_an_experiment_between_spaces_is_refused_with_its_models(furnished_gateway: Gateway) -> None:
    """Mem0 would store vectors of different arms in one collection."""
    done = run("--base-url", furnished_gateway.base_url, "--api-key", KEY, "--model", ACROSS)

    assert done.returncode == 1
    assert f"{ACROSS} is an experiment between spaces" in done.stderr
    for model in (MODEL, TOLD):
        assert f"--model {model}   (space {space_of(furnished_gateway, model)})" in done.stderr
    assert "examples/mem0_ab.py keeps a collection for each arm" in done.stderr
    assert "collection memories_" not in done.stdout
    assert "Traceback" not in done.stderr


def test_an_experiment_within_a_space_has_a_collection_for_that(furnished_gateway: Gateway) -> None:
    done = run("--base-url", furnished_gateway.base_url, "--api-key", KEY, "--model", WITHIN)

    assert done.returncode == 0, done.stderr
    space = space_of(furnished_gateway, MODEL)
    assert done.stdout.splitlines()[0] == f"{WITHIN}: 384 dimensions, space {space}"


def space_of(gateway: Gateway, model: str) -> str:
    headers = {"authorization": f"Bearer {KEY}"}
    space: str = httpx.get(f"{gateway.base_url}/models/{model}", headers=headers).json()["space"]
    return space
