"""Base classes and validators of all data models: tables of study files, published JSON files, stored records."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticKnownError
from pydantic_core.core_schema import with_info_before_validator_function

STORED = {"stored": True}  # context of the validation of what was stored: plug-ins may have been taken away since
_STORED_NAME = re.compile(r"[\w.:/ ~-]{1,500}")


class FrozenModel(BaseModel):
    """An immutable model; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingsTable(FrozenModel, allow_inf_nan=False):
    """A table that a person writes: numbers must be finite, and true and false are not accepted as numbers."""

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """Refuses true and false where a number belongs, since pydantic would read true as 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            kind = cls.model_fields[key].annotation if key in cls.model_fields else None
            if isinstance(value, bool) and {kind, *get_args(kind)} & {int, float}:
                raise ValueError(f"{key}: must be a number, got {str(value).lower()}")
        return data


@dataclass(frozen=True, eq=False)
class OneOf:
    """Makes a string accept only these names, with the error message that pydantic has for a `Literal`.

    The JSON schema lists the names that there are when it is made. Other strings are accepted that match `other`, a
    regular expression, and any name where the validation has the context `STORED`.
    """

    names: Collection[str]
    other: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Checks the name before the type."""
        return with_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Adds the names to the type."""
        named = {**handler(schema), "enum": list(self.names)}
        return named if self.other is None else {"anyOf": [named, {**handler(schema), "pattern": self.other}]}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and (value in self.names or self._is_other(value, info.context)):
            return value
        *others, last = map(repr, self.names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})

    def _is_other(self, value: str, context: Any) -> bool:
        if self.other is not None and re.fullmatch(self.other, value, re.ASCII):
            return True
        return context == STORED and _STORED_NAME.fullmatch(value) is not None


def relocated(error: ValidationError, *place: str) -> list[InitErrorDetails]:
    """The errors of an inner table, at their place in an outer one, to be raised again."""
    return [
        InitErrorDetails(
            type=details["type"], loc=(*place, *details["loc"]), input=details["input"], ctx=details.get("ctx", {})
        )
        for details in error.errors(include_url=False)
    ]


def check_once(names: tuple[str, ...], key: str) -> None:
    """ValueError if a name occurs twice under `key`."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'{key}: holds "{name}" {names.count(name)} times')
