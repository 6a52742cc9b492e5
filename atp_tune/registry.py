"""Registries of what a study file may name: each name with the place of what it means, imported when it is asked for.

A place is written as Python's entry points write theirs, "package.module:attribute", or "package.module" for a module
as a whole. What belongs to this package and what another package brings are registered in the same way:

    PRUNERS["mine"] = "my_package.pruner:MyPruner"

Nothing is imported by it, so that a study file can be read without the libraries that a pruner needs.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

from atp_tune.errors import did_you_mean

T = TypeVar("T")


class UnknownNameError(KeyError):
    """A name that a registry does not have, with the names that it has."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(MutableMapping[str, T]):
    """The objects of one kind by name, in the order in which they were registered; rows hold them or their places.

    `kind` is what error messages call one of them. Entry points of other packages are not read yet: their rows would be
    added in `__init__`.
    """

    def __init__(self, kind: str, rows: Mapping[str, str | T]) -> None:
        self._kind = kind
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> T:
        """The object of that name; UnknownNameError if there is none."""
        if name not in self._rows:
            known = ", ".join(self._rows)
            raise UnknownNameError(f'no {self._kind} "{name}"; known are {known}{did_you_mean(name, list(self._rows))}')
        found = self._rows[name]
        if isinstance(found, str):
            found = self._rows[name] = _imported(found)
        return found

    def __setitem__(self, name: str, row: str | T) -> None:
        self._rows[name] = row

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found
