"""Registries of objects that a study file names, imported on first use.

The place of an object is written as in Python's entry points, "package.module:attribute", or "package.module" for a
whole module. Other packages register objects in the same way:

    PRUNERS["mine"] = "my_package.pruner:MyPruner"

Registering imports nothing, so a study file can be read without the libraries that a pruner needs.
"""

from collections import UserDict
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar, cast

from atp_tune.errors import did_you_mean

T = TypeVar("T")


class UnknownNameError(KeyError):
    """A name that is not in a registry; the message lists the names that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(UserDict[str, T]):
    """Objects of one kind by name, in the order of registration; `rows` hold objects or their places.

    Error messages call an object by its `kind`. Entry points of other packages are not read yet.
    """

    data: dict[str, Any]

    def __init__(self, kind: str, rows: Mapping[str, str | T]) -> None:
        super().__init__()
        self._kind = kind
        self.data = dict(rows)

    def __getitem__(self, name: str) -> T:
        """The object of that name, imported if necessary; UnknownNameError if the name is not registered."""
        if name not in self.data:
            known = ", ".join(self.data)
            raise UnknownNameError(f'no {self._kind} "{name}"; known are {known}{did_you_mean(name, list(self.data))}')
        found = self.data[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = import_module(module)
            found = self.data[name] = getattr(found, attribute) if attribute else found
        return cast(T, found)

    def __setitem__(self, name: str, row: str | T) -> None:
        self.data[name] = row
