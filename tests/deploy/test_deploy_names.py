"""Everything that deploy/ names exists: settings, files and make targets; and versions written twice are equal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway import __version__
from gateway.config.settings import Settings, variable
from tests.deploy.deployment_files import DEPLOY, ROOT, deployment_texts

README = (DEPLOY / "README.md").read_text()
TEXTS = {path.relative_to(ROOT): text for path, text in deployment_texts()}
SETTINGS = {variable(name) for name in Settings.model_fields}


@pytest.mark.parametrize("file", TEXTS, ids=str)
def test_every_setting_that_is_named_exists(file: Path) -> None:
    named = set(re.findall(r"\bGATEWAY_[A-Z0-9_]+\b", TEXTS[file]))

    assert named - SETTINGS == set()


def test_the_settings_would_be_seen() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"\bGATEWAY_[A-Z0-9_]+\b", text)}

    assert {"GATEWAY_ADMIN_PORT", "GATEWAY_API_KEYS_FILE", "GATEWAY_SHUTDOWN_GRACE_S"} <= named


def test_the_readme_names_files_that_exist() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    named = re.findall(r"\b(?:deploy|examples|docs|requirements)/[\w./-]*\w", README)

    assert linked
    assert named
    assert [name for name in linked if not (DEPLOY / name).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_names_targets_of_make_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^ *make ([a-z-]+)|`make ([a-z-]+)", README, re.MULTILINE))

    assert {"image-proof"} <= {first or second for first, second in named} <= targets


def test_every_tag_of_our_images_is_this_version() -> None:
    tags = {
        (str(file), tag)
        for file, text in TEXTS.items()
        for tag in re.findall(r"(?<!/python-stand-in)\bembedding-gateway(?:-mem0)?:(\d[\w.]*)", text)
    }

    assert {file for file, _ in tags} >= {"Dockerfile", "deploy/README.md", "deploy/compose/compose.yaml"}
    assert {tag for _, tag in tags} == {__version__}
