"""Find the files of a checkpoint, and describe the content of a folder that has no such files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from gateway.engine.checkpoint.json_files import is_lfs_pointer, is_present, read_object
from gateway.errors import LoadError

_LFS = "a Git LFS pointer instead of the file: run `git lfs pull` in its repository"
# Formats of weights that the gateway does not read.
_OTHER_FORMS = {
    "*.gguf": "GGUF, llama.cpp's form of a model",
    "*.onnx": "ONNX",
    "openvino_model*.xml": "OpenVINO's form of a model",
    "tf_model.h5": "TensorFlow's form of a model",
    "flax_model.msgpack": "Flax' form of a model",
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files that transformers looks for, in its order; each may be split into parts, which ``NAME.index.json`` lists."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
"""Where PEFT puts an adapter."""


def weights_files(folder: Path, names: Sequence[str] = _WEIGHTS) -> tuple[Path, ...]:
    """Return the files from which transformers reads a model's weights: safetensors if present, otherwise pickled.

    Args:
        names: names to look for; the first existing file counts.

    Raises:
        LoadError: no such file exists, a part is missing, or a file is a Git LFS pointer or a link that leads nowhere.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if is_present(folder / name):
            return _present([folder / name])
        if is_present(index):
            places = read_object(index).get("weight_map")
            parts = sorted({str(place) for place in places.values()}) if isinstance(places, dict) else []
            missing = [part for part in parts if not is_present(folder / part)]
            if missing or not parts:
                what = f"{len(missing)} are missing: {', '.join(missing[:3])}" if missing else "weight_map is empty"
                raise LoadError(f"{index}: lists {len(parts)} files with weights, but {what}")
            return _present([folder / part for part in parts])
    found = what_is_there(folder)
    raise LoadError(f"{folder}: no weights: {'neither ' + ' nor '.join(names)}{found and f'. {found}'}")


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files with the vocabulary; without such a file, transformers silently makes an empty tokenizer.

    Raises:
        LoadError: no such file exists, or a file is a Git LFS pointer.
    """
    for patterns in (["tokenizer.json"], ["vocab.*", "merges.txt", "*.model"]):
        files = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if files:
            return _present(files)
    raise LoadError(f"{folder}: no tokenizer: neither tokenizer.json nor vocab.* nor *.model")


def require_model(folder: Path) -> None:
    """Refuse a folder that holds no ``config.json`` of a model, or that holds an adapter.

    Raises:
        LoadError: the folder holds something else, which the message names.
    """
    adapter = folder / "adapter_config.json"
    if is_present(adapter):
        base = read_object(adapter).get("base_model_name_or_path")
        raise LoadError(
            f"{folder}: contains a PEFT adapter (adapter_config.json) of {base or 'a model that it does not name'}: "
            "merge it into its base model (`merge_and_unload`), save that, and serve the result"
        )
    path = folder / "config.json"
    if not is_present(path):
        raise LoadError(f"{path}: no such file; is this a checkpoint folder? {what_is_there(folder)}".rstrip())


def what_is_there(folder: Path) -> str:
    """Return a hint at the content of a folder that holds no model; empty if nothing is recognized."""
    for pattern, form in _OTHER_FORMS.items():
        if found := _first([*folder.glob(pattern), *folder.glob(f"*/{pattern}")]):
            return (
                f"It holds {found.relative_to(folder)}: {form} is not supported; take the repository with safetensors"
            )
    if (folder / "snapshots").is_dir():
        inner = _first(folder.glob("snapshots/*/config.json"))
        return f"It is an entry of the hub's cache: take {inner.parent if inner else 'a folder in snapshots'}"
    found = _first(path for name in (*_WEIGHTS, "config.json") for path in folder.glob(f"*/{name}"))
    return f"There is one in {found.parent.name}/, which no modules.json names" if found else ""


def _first(paths: Iterable[Path]) -> Path | None:
    return min(paths, default=None)


def require_content(path: Path) -> None:
    """Refuse a file that was checked out without Git LFS.

    Raises:
        LoadError: the file is a Git LFS pointer.
    """
    if is_lfs_pointer(path):
        raise LoadError(f"{path}: {_LFS}")


def _present(files: list[Path]) -> tuple[Path, ...]:
    for path in files:
        require_content(path)
    return tuple(files)
