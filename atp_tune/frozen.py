"""Base classes and validators of all data models: tables of study files, published JSON files, stored records."""

from collections.abc import Collection
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticKnownError


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


def one_of(names: Collection[str]) -> BeforeValidator:
    """A validator that accepts only these names, with the error message that pydantic has for a `Literal`."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in names:
            return value
        *others, last = map(repr, names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})

    return BeforeValidator(check)


def check_once(names: tuple[str, ...], key: str) -> None:
    """ValueError if a name occurs twice under `key`."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'{key}: holds "{name}" {names.count(name)} times')
