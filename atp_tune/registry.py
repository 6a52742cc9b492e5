"""Registries of objects that a study file names, imported on first use.

The place of an object is written as in Python's entry points, "package.module:attribute", or "package.module" for a
whole module. Other packages register objects in the same way:

    PRUNERS["mine"] = "my_package.pruner:MyPruner"

Registering imports nothing, so a study file can be read without the libraries that a pruner needs.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, TypeVar

from atp_tune.errors import did_you_mean

T = TypeVar("T")


class UnknownNameError(KeyError):
    """A name that is not in a registry; the message lists the names that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(MutableMapping[str, T]):
    """Objects of one kind by name, in the order of registration; `rows` hold objects or their places.

    Error messages call an object by its `kind`. Entry points of other packages are not read yet.
    """

    def __init__(self, kind: str, rows: Mapping[str, str | T]) -> None:
        self._kind = kind
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> T:
        """The object of that name, imported if necessary; UnknownNameError if the name is not registered."""
        if name not in self._rows:
            known = ", ".join(self._rows)
            raise UnknownNameError(f'no {self._kind} "{name}"; known are {known}{did_you_mean(name, list(self._rows))}')
        found = self._rows[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            imported: Any = import_module(module)
            found = self._rows[name] = getattr(imported, attribute) if attribute else imported
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
