"""What every request body has in common, and the types of its fields.

Unknown fields are ignored; `null` means absent, and so does an empty string where a field is optional. Clients that are
built from forms and templates send `"true"`, `"512"` and `512.0`: a value that can mean only one thing is taken for it.
Anything else is a 400, with one message for all fields.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from gateway.api.json_body import Json, describe, integral
from gateway.errors import BadInput
from gateway.types import Truncate

# The second is what Infinity's own client sends when it is told of no model.
_NO_MODEL = ("", "default/not-specified")

MAX_USER_CHARS = 1_000
_MAX_NAME_CHARS = 10_000
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?", re.ASCII)
# The words of Cohere, NVIDIA, Jina and TEI. ``True`` does not say where a text is cut.
_TRUNCATIONS = {
    True: None,
    False: Truncate.REFUSE,
    "end": Truncate.END,
    "right": Truncate.END,
    "start": Truncate.START,
    "left": Truncate.START,
    "none": Truncate.REFUSE,
}


def _flag(value: Json) -> Json:
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower(), value)
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def _whole_number(value: Json) -> Json:
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(text := value.strip()):
        return int(text.partition(".")[0])
    return integral(value)


def _lower(value: Json) -> Json:
    return value.strip().lower() if isinstance(value, str) else value


def _truncation(value: Json) -> Json:
    known = _lower(_flag(value))
    return _TRUNCATIONS.get(known, value) if isinstance(known, str | bool) else value


def _direction(value: Json) -> Json:
    known = _truncation(value) if isinstance(value, str) else value
    return known if known in (Truncate.START, Truncate.END) else value


Name: TypeAlias = Annotated[str, AfterValidator(lambda name: name[:_MAX_NAME_CHARS])]
"""The name of a task, say. Of one that is longer than any the beginning is kept: looking it up would cost the event loop."""

ModelName: TypeAlias = Annotated[Name, AfterValidator(lambda name: None if name in _NO_MODEL else name)]
"""The name of a model; what means that none was named becomes ``None``."""


def _short(value: Json) -> Json:
    if isinstance(value, str) and len(value) > MAX_USER_CHARS:
        raise ValueError
    return value


User: TypeAlias = Annotated[Any, AfterValidator(_short)]
"""Whom a request is for, of any type; what is no string or number means nothing."""

Flag: TypeAlias = Annotated[bool, BeforeValidator(_flag)]
"""A boolean, also written as ``"True"``, ``"0"`` or ``1``."""

PositiveInteger: TypeAlias = Annotated[int, Field(ge=1), BeforeValidator(_whole_number)]
"""A whole number from 1, also written as ``"512"`` or ``512.0``."""

IN_ANY_CASE = BeforeValidator(_lower)
"""Marks a field that has a list of values, all of them lower case: they may come in any case."""

TRUNCATION = "true, false, `END`, `START`, `NONE`, `right` or `left`"
Truncation: TypeAlias = Annotated[
    Truncate | None,
    BeforeValidator(_truncation),
    WithJsonSchema(
        {"anyOf": [{"type": "boolean"}, {"enum": ["NONE", "END", "START", "left", "right"]}, {"type": "null"}]}
    ),
]
"""What to do with a text that is too long, in the words of any API; ``None`` for plain ``true``."""

DIRECTION = "`Left` or `Right`"
Direction: TypeAlias = Annotated[
    Truncate | None,
    BeforeValidator(_direction),
    WithJsonSchema({"anyOf": [{"enum": ["Left", "Right", "left", "right"]}, {"type": "null"}]}),
]
"""Where a text that is too long is cut, in TEI's words: which of its ends is dropped."""


class RequestBody(BaseModel):
    """A request's body. The ``title`` of each field says what it must be, for the error message."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @classmethod
    def parse(cls, content: dict[str, Json]) -> Self:
        """Validate a parsed body.

        Raises:
            BadInput: a field is missing or has a value that is not accepted; names the first such field.
        """
        given = {name: value for name, value in content.items() if not cls._is_absent(name, value)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
        if field not in given:
            raise BadInput(f"`{field}` is required", param=field)
        raise BadInput(f"`{field}` must be {cls.model_fields[field].title}, got {describe(given[field])}", param=field)

    @classmethod
    def _is_absent(cls, name: str, value: Json) -> bool:
        if value is None:
            return True
        return value == "" and (field := cls.model_fields.get(name)) is not None and not field.is_required()


def wanted_truncation(truncate: Truncate | None, direction: Truncate | None) -> Truncate:
    """Join what a request says of texts that are too long: whether to cut them, and where.

    Raises:
        BadInput: one field says to cut at the start, the other at the end.
    """
    if truncate is Truncate.REFUSE or direction is None:
        return truncate or Truncate.END
    if truncate not in (None, direction):
        raise BadInput(
            "`truncate` and `truncation_direction` name different ends of a text: leave one out",
            param="truncation_direction",
        )
    return direction
