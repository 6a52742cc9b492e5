"""The base of all data models: tables of study files, of published JSON files, and of what is stored."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class FrozenModel(BaseModel):
    """Values that never change; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingsTable(FrozenModel, allow_inf_nan=False):
    """A table that a person writes: every number is finite, and true and false are no numbers."""

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, data: Any) -> Any:
        """Python would take true for 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            kind = cls.model_fields[key].annotation if key in cls.model_fields else None
            if isinstance(value, bool) and {kind, *get_args(kind)} & {int, float}:
                raise ValueError(f"{key}: must be a number, got {str(value).lower()}")
        return data
