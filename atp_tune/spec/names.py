"""Names of what is registered, as values in a study file and in a configuration."""

from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticKnownError

from atp_tune.registry import Registry


def one_of(registry: Registry[Any]) -> BeforeValidator:
    """Refuses whatever is no name in the registry, in the words in which pydantic refuses what is in no `Literal`."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in registry:
            return value
        *names, last = map(repr, registry)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(names)} or {last}"})

    return BeforeValidator(check)


def check_once(names: tuple[str, ...], key: str) -> None:
    """ValueError where a name is there twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'{key}: holds "{name}" {names.count(name)} times')
