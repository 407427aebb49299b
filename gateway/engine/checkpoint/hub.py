"""The model hub: the files of a repository, the files in the cache, and the reasons for the hub's errors."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.errors import LoadError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

WEIGHTS_PATTERNS = ("*.safetensors", "*.bin", "*.pt")

# The files of a checkpoint except the weights, which are safetensors, or `.bin` in a repository without safetensors. Among
# them are chat templates, the settings of Stanford's ColBERT, and code, which runs only if the entry trusts it.
_FILES = (
    "*.json",
    "*.jinja",
    "*.metadata",
    "*.py",
    "*.txt",
    "*.model",
    "*.pt",
    "*/config.json",
    "*/adapter_config.json",
    "*/*.safetensors",
    "*_Dense/*",
)
IGNORED = ("onnx/*", "openvino/*", "*.onnx", "*.msgpack", "*.h5", "imgs/*")
_COMPLETE = ".gateway-complete"
_BEGUN = ".gateway-begun"
# The content of the mark of a complete download: the patterns of its files.
_FORM = "\n".join((*_FILES, "", *IGNORED))
# The files that decide how a text's vector is made, and that transformers does not fetch.
_DECIDING = ("modules.json", "config_sentence_transformers.json")
# Names of the folders that sentence-transformers makes for modules with the weights of a model.
_TRANSFORMER, _STATIC = "*_*Transformer", "*_StaticEmbedding"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The cache folder is not writable, or a part of its path is a file.
_NO_FOLDER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
TIMEOUT_S = 20.0
"""The time limit of a request for the description of a repository."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    Attributes:
        sha256: the hash of a large file (in Git LFS), which is also the name of its blob in the cache; empty for a small
            file.
    """

    name: str
    num_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of one commit of a hub repository that the gateway reads.

    Attributes:
        license: the license on the model card, such as MIT; empty if the card names none.
    """

    name: str
    revision: str
    files: tuple[HubFile, ...]
    license: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """The bytes that are not in the cache yet; of a partial file, only the rest counts."""
        return self.num_bytes - sum(map(self.present_bytes, self.files))

    def present_bytes(self, file: HubFile) -> int:
        """Return the number of bytes of a file that are in the cache."""
        if (snapshot_folder(self.name, self.revision) / file.name).exists():
            return file.num_bytes
        if not file.sha256:
            return 0
        return file.num_bytes if self.blob(file).exists() else min(size(self.partial(file)), file.num_bytes)

    def blob(self, file: HubFile) -> Path:
        """Return the path of a large file in the cache."""
        return _repository_folder(self.name) / "blobs" / file.sha256

    def partial(self, file: HubFile) -> Path:
        """Return the path of a large file while it is incomplete."""
        return self.blob(file).with_name(f"{file.sha256}.gateway-partial")


class HubRefusal(LoadError):
    """The hub refuses access: the repository does not exist, or is not visible to this user."""


def cache_folder() -> Path:
    """Return the folder of downloaded repositories, which HF_HOME or HF_HUB_CACHE sets."""
    from huggingface_hub import constants  # slow to import, and needed only with a hub

    return Path(constants.HF_HUB_CACHE).expanduser()


def endpoint() -> str:
    """Return the URL of the hub, or of the mirror that HF_ENDPOINT names."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def describe(name: str, revision: str, timeout_s: float = TIMEOUT_S) -> Repository:
    """Ask the hub for the files and the license of a repository; downloads nothing.

    Raises:
        LoadError: the hub does not answer, or refuses; the message gives the reason and a remedy.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(name, revision=revision, timeout=timeout_s, files_metadata=True)
    except Exception as error:  # from the hub's HTTP library, whose classes differ between releases, or the hub's own
        raise explain(error, name, revision) from error
    files = tuple(_wanted(found.siblings or ()))
    for file in files:
        _require_safe(file, f"{name} at {revision}")
    return Repository(name, revision, files, _license(found))


def _wanted(files: Iterable[RepoSibling]) -> Iterator[HubFile]:
    from huggingface_hub.utils._paths import filter_repo_objects

    by_name = {file.rfilename: file for file in files}
    for name in filter_repo_objects(by_name, allow_patterns=patterns(by_name), ignore_patterns=list(IGNORED)):
        file = by_name[name]
        yield HubFile(name, file.size or 0, file.lfs.sha256 if file.lfs else "")


def _require_safe(file: HubFile, where: str) -> None:
    """Refuse a file that would be written outside the cache, because HF_ENDPOINT may be any mirror.

    Raises:
        LoadError: the file's name, hash or size is invalid.
    """
    is_path = all(part not in {"", ".", ".."} for part in file.name.split("/")) and "\0" not in file.name
    if not is_path or (file.sha256 and not _SHA256.fullmatch(file.sha256)) or file.num_bytes < 0:
        raise LoadError(
            f"{where}: {endpoint()} lists a file that no repository can have: {file.name[:200]!r}, {file.num_bytes} bytes, "
            f"sha256 {file.sha256[:70] or 'none'!r}. Nothing is downloaded; HF_ENDPOINT names the hub"
        )


def _license(found: ModelInfo) -> str:
    card = found.card_data
    names = [] if card is None else [card.get("license_name"), card.get("license")]
    return next((str(name) for name in names if name and name != "other"), "")


def patterns(names: Iterable[str]) -> list[str]:
    """Return patterns of the files to download: safetensors, or ``.bin`` in a repository without safetensors."""
    has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in names)
    return [*_FILES, "*.safetensors" if has_safetensors else "*.bin"]


# ---------------------------------------------------------------------------------------------------------- the cache


def cached_snapshot(name: str, revision: str) -> Path | None:
    """Return the cached snapshot of a commit if it has a configuration and weights, else ``None``.

    Smaller files may be missing after an interrupted download, or one by an earlier release. So only a snapshot that
    :func:`is_complete` is used without asking the hub. A pinned commit never changes, so such a snapshot stays correct.
    """
    # Not with `snapshot_download(local_files_only=True)`: it requires every file of the repository, including other formats
    # of the weights, which are not fetched.
    folder = snapshot_folder(name, revision)
    root = _root(folder)
    has_config = (root / "config.json").exists() or root.match(_STATIC)
    has_weights = any(any(root.glob(pattern)) for pattern in WEIGHTS_PATTERNS)
    is_sharded = any(root.glob("*.index.json")) and not _was_complete(folder)  # parts may be missing: ask the hub
    return folder if has_config and has_weights and not is_sharded else None


def _root(snapshot: Path) -> Path:
    """Return the folder of the model itself; the folders of further layers have weights too."""
    if (snapshot / "config.json").exists():
        return snapshot
    # As before release 2 of sentence-transformers, in a router, and of static embeddings.
    modules = (module for pattern in (_TRANSFORMER, _STATIC) for module in sorted(snapshot.glob(pattern)))
    return next(modules, snapshot)


def is_complete(snapshot: Path) -> bool:
    """Return whether the download of a snapshot is complete, with all files that this release reads."""
    with suppress(OSError):
        return (snapshot / _COMPLETE).read_text(encoding="utf-8") == _FORM
    return False


def _was_complete(snapshot: Path) -> bool:
    """Return whether the download of a snapshot was complete, perhaps for an earlier release, which read fewer files."""
    return (snapshot / _COMPLETE).exists()


def may_lack(snapshot: Path) -> str:
    """Return a file on which vectors depend, and which the repository may have but a snapshot lacks; empty if none.

    Another program may have fetched only the files that it needs: a model that pools the first token would then look like
    one that averages over all of them. A snapshot lacks nothing if it is of the whole repository, which `.gitattributes`
    shows. The cache also notes which of the files that a program wanted the repository does not have.
    """
    if _was_complete(snapshot):
        return ""
    if (snapshot / _BEGUN).exists():
        return "a file that was still to be downloaded"
    if (snapshot / ".gitattributes").exists():
        return ""
    absent = snapshot.parents[1] / ".no_exist" / snapshot.name
    return next((name for name in _DECIDING if not ((snapshot / name).exists() or (absent / name).exists())), "")


def mark_begun(snapshot: Path) -> None:
    """Mark the download of a snapshot as begun, so that an interrupted one is recognized."""
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / _BEGUN).touch()


def mark_complete(snapshot: Path) -> None:
    """Mark the download of a snapshot as complete."""
    (snapshot / _COMPLETE).write_text(_FORM, encoding="utf-8")
    (snapshot / _BEGUN).unlink(missing_ok=True)


def _repository_folder(name: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=name, repo_type="model")


def snapshot_folder(name: str, revision: str) -> Path:
    """Return the folder of a commit's files in the cache; the folder may not exist."""
    return _repository_folder(name) / "snapshots" / revision


def size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ------------------------------------------------------------------------------------------------------------- errors


def explain(error: Exception, name: str, revision: str) -> LoadError:
    """Translate an error of huggingface_hub or of the system to ours, with a remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{name} at {revision}"
    chain = [error, *([error.__cause__] if isinstance(error.__cause__, Exception) else [])]
    for cause in chain:
        if isinstance(cause, GatedRepoError):
            return HubRefusal(
                f"{where}: the repository is gated; accept its terms on {endpoint()}/{name}, and set HF_TOKEN to a token of "
                "that account"
            )
        if isinstance(cause, RevisionNotFoundError):
            return HubRefusal(
                f"{where}: the repository exists but has no such revision; its commits are on "
                f"{endpoint()}/{name}/commits/main"
            )
        if isinstance(cause, RepositoryNotFoundError):
            token = "the token of HF_TOKEN may not read it" if _has_token() else "HF_TOKEN is not set"
            return HubRefusal(f"{where}: no such repository on {endpoint()}, or it is private and {token}")
    return LoadError(f"{where}: cannot download from the model hub: {_reason(chain)}")


def _reason(chain: list[Exception]) -> str:
    """Return the reason why the hub was not reached or the file was not written, with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for error in chain:
        line = first_line(error)
        if isinstance(error, OfflineModeIsEnabled):
            return (
                "HF_HUB_OFFLINE is set, so only downloaded models are served; unset it, or run `gateway download` on a "
                f"machine with a network and copy {cache_folder()} (offline mode)"
            )
        if isinstance(error, HfHubHTTPError):
            is_token = error.response.status_code == 401
            return f"{line}{'. HF_TOKEN is wrong or has expired' if is_token else ''}"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"the disk of {cache_folder()} is full; make room, or set HF_HOME to a folder on another disk"
        if isinstance(error, OSError) and error.errno in _NO_FOLDER:
            return f"cannot write to {cache_folder()}: {error.strerror}; set HF_HOME to a folder that this user may write to"
    if not endpoint().startswith(("https://", "http://")):
        return f"HF_ENDPOINT is {endpoint()}; it must begin with https:// or http://"
    return f"{first_line(chain[-1]).rstrip('.')}. {_describe_route(endpoint())}"


def _describe_route(url: str) -> str:
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    through = f"through HTTPS_PROXY={without_password(proxy)}" if proxy else "without a proxy"
    return f"The hub is {url}, {through}; HF_ENDPOINT sets a mirror, HTTPS_PROXY a proxy"


def without_password(url: str) -> str:
    """Return the URL of a proxy without its user and password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class if it has none."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def format_size(num_bytes: int) -> str:
    """Return a size on a disk or of a download, in decimal units: ``2.3 GB``, ``91 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.1f} {unit}" if unit == "GB" else f"{value:.0f} {unit}"
    return f"{num_bytes} bytes"
