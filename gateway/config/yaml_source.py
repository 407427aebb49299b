"""The plain values of a YAML file, with their places.

All problems of a file are reported at once, with line and column. So this module walks the node tree instead of loading it:
a loader stops at the first duplicate key or wrong number, and does not say where a value came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from gateway.config.files import UnsuitableFile, read_bounded
from gateway.config.wording import quote
from gateway.errors import ConfigError, Problem

MAX_FILE_BYTES = 1024 * 1024
MAX_VALUES = 20_000
"""The maximum number of values and keys while parsing, which takes seconds per megabyte, and of values after anchors are
expanded: a small file of nested anchors can expand to billions ("billion laughs")."""
MAX_DEPTH = 32

Value: TypeAlias = "bool | int | float | str | tuple[Value, ...] | dict[str, Value] | None"
KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys and list indices from the top of the file: ``("models", 1, "revision")``."""

# Advice by a part of the parser's message.
_ADVICE = {
    r"'\t'": "this is a tab; indent with spaces",
    "<block end>": "indent this line like the others of its list or mapping",
    "mapping values are not allowed": "put a text that contains `: ` in quotes, or indent this line like the one before",
}
_TAG = "tag:yaml.org,2002:"
_SUBSTITUTION = re.compile(
    r"""
    (?P<escaped>\$\$\{)
    | \$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<with_default>:-(?P<default>[^}]*))?\}
    | (?P<malformed>\$\{)
    """,
    re.VERBOSE,
)


class Place(NamedTuple):
    """A position in a file, counted from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Document:
    """The values of a YAML file, their places, and its problems.

    Attributes:
        keys: place of each key of a mapping, by its path.
        values: place of each value, by its path.
        unread: paths of values that could not be read, each with a recorded problem.
    """

    file: str
    root: Value = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    unread: set[KeyPath] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def value_problem(self, path: KeyPath, message: str) -> Problem:
        """Return a problem of a value; a missing value is placed at the mapping that lacks it."""
        known = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in self.values), None)
        line, column = self.values[known] if known is not None else Place(1, 1)
        return Problem(self.file, line, column, dotted(path), message)

    def key_problem(self, path: KeyPath, message: str) -> Problem:
        """Return a problem of a key itself, rather than of its value."""
        place = self.keys.get(path)
        return Problem(self.file, *place, dotted(path), message) if place else self.value_problem(path, message)


def dotted(path: KeyPath) -> str:
    """Write a path as ``models[1].revision``; keys that hold dots or slashes as ``sha256["a.bin"]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of configuration file.

    Attributes:
        keys: the keys of its top level, for a message.
        hint: the way to name another file, for a message.
        max_values: the maximum number of values and keys.
    """

    keys: str
    hint: str
    max_values: int = MAX_VALUES


def read_document(path: Path, environ: Mapping[str, str], kind: FileKind, text: str | None = None) -> Document:
    """Read one YAML document and substitute ``${NAME}`` and ``${NAME:-default}`` in its values.

    A plain (unquoted) value is typed after the substitution, so ``${X:-8192}`` is a number; a quoted value stays text.

    Args:
        text: new content of the file, which is checked before it is written.

    Raises:
        ConfigError: the file is missing, not a regular file, too large, not UTF-8, not YAML, or empty. Problems of single
            values are in ``Document.problems`` instead.
    """
    file = str(path)
    yaml, root = compose(read_text(path, kind) if text is None else text, file, kind)
    reader = _NodeReader(Document(file), yaml, environ, kind)
    reader.document.root = reader.read(root, ())
    return reader.document


def compose(text: str, file: str, kind: FileKind) -> tuple[YAML, Node]:
    """Parse one YAML document into nodes, and return the parser with them.

    Raises:
        ConfigError: the text is not YAML, has more values than the kind allows, or is empty.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MAX_DEPTH
    yaml.Composer = _CountingComposer
    yaml.composer.max_nodes = kind.max_values
    # YAML allows an anchor to be redefined. The library's default is a Python warning, which is never shown.
    yaml.composer.warn_double_anchors = False
    root = _compose(yaml, text, file)
    if root is None or (isinstance(root, ScalarNode) and root.value == ""):
        raise ConfigError([Problem(file, 0, 0, "", f"the file is empty; it needs {kind.keys}")])
    return yaml, root


class _TooManyNodes(MarkedYAMLError):
    pass


class _CountingComposer(Composer):
    """The library's composer with a maximum number of nodes, because a megabyte of nodes would take seconds."""

    max_nodes = MAX_VALUES
    num_nodes = 0

    def compose_node(self, parent: Node | None, index: Node | int | None) -> Node:
        self.num_nodes += 1
        if self.num_nodes > self.max_nodes:
            raise _TooManyNodes(problem_mark=self.parser.peek_event().start_mark)
        node: Node = super().compose_node(parent, index)
        return node


def read_text(path: Path, kind: FileKind) -> str:
    """Read a file of at most ``MAX_FILE_BYTES`` in UTF-8.

    Raises:
        ConfigError: the file cannot be read, is not a regular file, or is not UTF-8.
    """
    file = str(path)
    try:
        content = read_bounded(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        message = f"the file does not exist{where}; {kind.hint}"
        raise ConfigError([Problem(file, 0, 0, "", message)]) from None
    except UnsuitableFile as error:
        raise ConfigError([Problem(file, 0, 0, "", f"the file {error.strerror}; {kind.hint}")]) from None
    except OSError as error:
        message = f"the file cannot be read: {error.strerror}; {kind.hint}"
        raise ConfigError([Problem(file, 0, 0, "", message)]) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        message = f"the file is not UTF-8: byte 0x{content[error.start]:02x} is not valid here"
        raise ConfigError([Problem(file, *_place_after(before), "", message)]) from error


def _place_after(text: str) -> Place:
    return Place(text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1)


def _compose(yaml: YAML, text: str, file: str) -> Node | None:
    try:
        root: Node | None = yaml.compose(text)
    except ReaderError as error:
        message = "is not valid YAML: control characters are not allowed"
        raise ConfigError([Problem(file, *_place_after(text[: error.position]), "", message)]) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark else Place(0, 0)
        if isinstance(error, _TooManyNodes):
            message = f"the file has more than {yaml.composer.max_nodes:,} values and keys"
            raise ConfigError([Problem(file, *place, "", message)]) from None
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        advice = "".join(f": {advice}" for sign, advice in _ADVICE.items() if sign in problem)
        raise ConfigError([Problem(file, *place, "", f"is not valid YAML: {problem}{advice}")]) from error
    except (YAMLError, ValueError) as error:
        raise ConfigError([Problem(file, 0, 0, "", f"is not valid YAML: {error}")]) from error
    return root


@dataclass(slots=True)
class _NodeReader:
    """Turns nodes into values, and records their places and problems in the document."""

    document: Document
    yaml: YAML
    environ: Mapping[str, str]
    kind: FileKind
    num_values: int = 0

    def read(self, node: Node, path: KeyPath) -> Value:
        self._count(node, len(path))
        self.document.values[path] = _place(node)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if str(node.tag) not in {f"{_TAG}seq", f"{_TAG}map"}:
            self._refuse(path, f"has the YAML tag {quote(str(node.tag))}; tags are not supported")
            return None
        if isinstance(node, SequenceNode):
            return tuple(self.read(item, (*path, index)) for index, item in enumerate(node.value))
        entries: dict[str, Value] = {}
        for key, (key_node, value_node) in self._pairs(node, path, depth=0).items():
            self.document.keys[*path, key] = _place(key_node)
            entries[key] = self.read(value_node, (*path, key))
            if entries[key] is None and not value_node.value:
                # An empty value has no place: ruamel.yaml reports the place of the next token, which may be lines below.
                self.document.values[*path, key] = _place(key_node)
        return entries

    def _count(self, node: Node, depth: int) -> None:
        self.num_values += 1
        max_values = self.kind.max_values
        if self.num_values > max_values or depth > MAX_DEPTH:
            limit = f"{max_values:,} values" if self.num_values > max_values else f"{MAX_DEPTH} levels"
            message = f"the file has more than {limit} once its anchors are expanded"
            raise ConfigError([Problem(self.document.file, *_place(node), "", message)])

    def _refuse(self, path: KeyPath, message: str) -> None:
        self.document.problems.append(self.document.value_problem(path, message))
        self.document.unread.add(path)

    def _pairs(self, node: Node, path: KeyPath, depth: int) -> dict[str, tuple[Node, Node]]:
        """Return the nodes of a mapping by key: its own, and those of merge keys (``<<``), which never override them."""
        self._count(node, depth)
        pairs: dict[str, tuple[Node, Node]] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if str(key_node.tag) == f"{_TAG}merge":
                merged += value_node.value if isinstance(value_node, SequenceNode) else [value_node]
                continue
            if (
                not isinstance(key_node, ScalarNode)
                or str(key_node.tag) != f"{_TAG}str"
                or _unprintable(key_node.value)
            ):
                self._problem_at(key_node, path, "a key must be plain text; put it in quotes if it looks like a number")
                continue
            key = key_node.value
            if key in pairs:
                first = _place(pairs[key][0]).line
                self._problem_at(key_node, (*path, key), f"appears twice; the first one is on line {first}")
            else:
                pairs[key] = (key_node, value_node)
        for source in merged:
            if isinstance(source, MappingNode):
                pairs = self._pairs(source, path, depth + 1) | pairs
            else:
                self._problem_at(source, (*path, "<<"), "can only merge a mapping, or a list of mappings")
        return pairs

    def _problem_at(self, node: Node, path: KeyPath, message: str) -> None:
        self.document.problems.append(Problem(self.document.file, *_place(node), dotted(path), message))

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Value:
        text: str = node.value
        tag = str(node.tag)
        if "${" in text:
            substituted = self._substitute(text, path)
            if substituted is None:
                return None
            # A quoted or block value is always text.
            is_plain = not node.style
            text, tag = substituted, str(self.yaml.resolver.resolve(ScalarNode, substituted, (is_plain, not is_plain)))
        if _unprintable(text):
            self._refuse(path, "has a character that is not valid in text")
            return None
        match tag.removeprefix(_TAG):
            case "str" | "timestamp" | "merge" | "value":
                return text
            case "null" | "bool" | "int" | "float":
                return self._typed(tag, text, path)
            case _:
                self._refuse(path, f"has the YAML tag {quote(tag)}; tags are not supported")
                return None

    def _typed(self, tag: str, text: str, path: KeyPath) -> Value:
        try:
            value: bool | int | float | None = self.yaml.constructor.construct_object(ScalarNode(tag, text))
        except (ValueError, LookupError):  # an explicit tag, as in `!!int abc`, or a number of thousands of digits
            self._refuse(path, f"{quote(text)} is not a valid {tag.removeprefix(_TAG)}")
            return None
        return value

    def _substitute(self, text: str, path: KeyPath) -> str | None:
        """Return the text with its variables substituted, or ``None`` after recording a problem."""
        problems: list[str] = []

        def fill(match: re.Match[str]) -> str:
            if match["escaped"]:
                return "${"
            if match["malformed"]:
                problems.append("`${` must be followed by `NAME}` or `NAME:-default}`; write `$${` for a literal `${`")
                return ""
            name = match["name"]
            if match["with_default"]:
                return self.environ.get(name) or match["default"]  # as in a shell: an empty variable counts as unset
            if name not in self.environ:
                problems.append(
                    f"the environment variable `{name}` is not set; set it, or write `${{{name}:-default}}`"
                )
            return self.environ.get(name, "")

        filled = _SUBSTITUTION.sub(fill, text)
        for message in problems:
            self._refuse(path, message)
        return None if problems else filled


def _place(node: Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _unprintable(text: str) -> bool:
    """Return whether the text has a NUL or a lone surrogate, which an escape in double quotes can produce."""
    return any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)
