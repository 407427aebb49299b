"""What every request body has in common: unknown fields are ignored, `null` means absent, one message says what is wrong."""

from __future__ import annotations

from typing import Annotated, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from gateway.api.json_body import Json, describe
from gateway.errors import BadInput

# The second is what Infinity's own client sends when it is told of no model.
_NO_MODEL = ("", "default/not-specified")

ModelName: TypeAlias = Annotated[str, AfterValidator(lambda name: None if name in _NO_MODEL else name)]
"""The name of a model; what means that none was named becomes ``None``."""


class RequestBody(BaseModel):
    """A request's body. The ``title`` of each field says what it must be, for the error message."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @classmethod
    def parse(cls, content: dict[str, Json]) -> Self:
        """Validate a parsed body.

        Raises:
            BadInput: a field is missing or has a value that is not accepted; names the first such field.
        """
        given = {name: value for name, value in content.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
        if field not in given:
            raise BadInput(f"`{field}` is required", param=field)
        raise BadInput(f"`{field}` must be {cls.model_fields[field].title}, got {describe(given[field])}", param=field)
