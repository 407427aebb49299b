"""Wording of messages about a wrong value and the accepted values.

pydantic finds the problems, but its own wording ("Input should be a valid tuple") is for programmers, not for operators.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MAX_SHOWN_CHARACTERS = 60


def quote(text: str) -> str:
    """Return the text in backticks on one line, shortened if it is long."""
    line = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    if len(line) > MAX_SHOWN_CHARACTERS:
        line = f"{line[: MAX_SHOWN_CHARACTERS - 3]}..."
    return f"`{line}`"


def cut(text: str, max_characters: int = 100) -> str:
    """Shorten a text for a message, because a client's text can be as long as a request body."""
    return text if len(text) <= max_characters else f"{text[:max_characters]}…"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number and its noun: "1 model", "2,000 models"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def describe(value: object) -> str:
    """Describe a value and its kind, for a message about the expected kind."""
    match value:
        case None:
            words = "nothing"
        case bool():
            words = f"`{str(value).lower()}`"
        case int() | float():
            words = f"the number {quote(str(value))}"
        case str():
            words = f"the text {quote(value)}" if value else "an empty text"
        case Mapping():
            words = "a mapping"
        case list() | tuple():
            words = "a list"
        case _:
            words = quote(str(value))
    return words


def enumerate_names(names: Iterable[str]) -> str:
    """Return the names in backticks, comma-separated, in the given order."""
    return ", ".join(quote(name) for name in names)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean `x`?"`` for the closest known name, or nothing if no name is close."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f"; did you mean {quote(by_folded[close[0]])}?" if close else ""


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Return a message for an unknown key, with the closest key and all allowed keys."""
    names = list(allowed)
    return f"is not a known key{did_you_mean(key, names) or ';'} allowed keys: {enumerate_names(names)}"


def first_sentence(description: str | None) -> str:
    """Return a field's description up to its first full stop."""
    return re.split(r"\.(?:\s|$)", description or "", maxsplit=1)[0]


def explain(error: ErrorDetails, fields: Mapping[str, FieldInfo]) -> str:
    """Translate a pydantic error for readers of ``key: message``.

    Args:
        error: an error of pydantic.
        fields: the fields of the model that has, or lacks, the key; excluded fields cannot be configured.
    """
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "missing":
        return f"is missing and required: {first_sentence(fields[key].description)}"
    if error["type"] == "extra_forbidden":
        return unknown_key(key, configurable(fields))
    expected = _EXPECTED.get(error["type"])
    # No field raises another type of error today. If one ever does, this text is plainer than pydantic's.
    return expected(error) if expected else f"is not accepted, got {describe(error['input'])}"


def configurable(fields: Mapping[str, FieldInfo]) -> list[str]:
    """Return the names of the fields that are keys of the file; the loader sets the excluded fields."""
    return [name for name, field in fields.items() if not field.exclude]


def _must_be(expected: str, hint: str = "") -> Callable[[ErrorDetails], str]:
    return lambda error: f"must be {expected}, got {describe(error['input'])}{hint}"


def _text(error: ErrorDetails) -> str:
    hint = "; put it in quotes" if isinstance(error["input"], bool | int | float) else ""
    return f"must be text, got {describe(error['input'])}{hint}"


def _one_of(error: ErrorDetails) -> str:
    # "'auto', True or False": pydantic shows Python literals, but the file has YAML's.
    choices = re.findall(r"'([^']*)'|(True|False)", error["ctx"]["expected"])
    names = [text or literal.lower() for text, literal in choices]
    value = error["input"]
    guess = did_you_mean(value, names) if isinstance(value, str) else ""
    return f"must be one of {enumerate_names(names)}, got {describe(value)}{guess}"


def _bounded(words: str, bound: str) -> Callable[[ErrorDetails], str]:
    def message(error: ErrorDetails) -> str:
        limit = str(error["ctx"][bound]).removesuffix(".0")
        return f"must be {words} {limit}, got {quote(str(error['input']))}"

    return message


def _own_message(error: ErrorDetails) -> str:
    return str(error["ctx"]["error"])


_EXPECTED: Mapping[str, Callable[[ErrorDetails], str]] = {
    "string_type": _text,
    "string_unicode": _must_be("valid text"),
    "string_too_short": _must_be("a text that is not empty"),
    "int_type": _must_be("a whole number"),
    "int_parsing": _must_be("a whole number"),
    "int_parsing_size": _must_be("a whole number of a sensible size"),
    "int_from_float": _must_be("a whole number"),
    "float_type": _must_be("a number"),
    "float_parsing": _must_be("a number"),
    "finite_number": _must_be("a finite number"),
    "bool_type": _must_be("`true` or `false`"),
    "tuple_type": _must_be("a list"),
    "mapping_type": _must_be("a mapping of keys to values"),
    "dict_type": _must_be("a mapping of keys to values"),
    "model_type": _must_be("a mapping of keys to values"),
    "model_attributes_type": _must_be("a mapping of keys to values"),
    "path_type": _must_be("a path"),
    "literal_error": _one_of,
    "enum": _one_of,
    "greater_than": _bounded("more than", "gt"),
    "greater_than_equal": _bounded("at least", "ge"),
    "less_than_equal": _bounded("at most", "le"),
    "value_error": _own_message,
}
