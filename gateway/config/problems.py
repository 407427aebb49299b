"""Problems of a file from pydantic's errors, with a line, a column and a plain message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gateway.config.wording import explain
from gateway.config.yaml_source import Document, KeyPath
from gateway.errors import Problem


def field_problems(
    error: ValidationError, document: Document, fields_at: Callable[[KeyPath], Mapping[str, FieldInfo]]
) -> Iterator[Problem]:
    """Yield the problems of single fields; problems of the whole file have no path, and are left out.

    Args:
        fields_at: returns the fields of the model that has the last key of a path.
    """
    for detail in error.errors(include_url=False):
        path: KeyPath = detail["loc"]
        if path == () or path in document.unread:
            continue
        if path[-1] == "[key]":
            yield document.key_problem(path[:-1], explain(detail, {}))
        elif detail["type"] == "extra_forbidden":
            yield document.key_problem(path, explain(detail, fields_at(path)))
        else:
            yield document.value_problem(path, explain(detail, fields_at(path)))
