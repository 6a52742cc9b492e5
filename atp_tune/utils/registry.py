"""Registries of objects that a study file names, imported on first use.

The place of an object is written as in Python's entry points, "package.module:attribute", or "package.module" for a
whole module. Registering imports nothing, so a study file can be read without the libraries that a pruner needs.

A plug-in is an object from outside the package. A registry knows it by a decorator (`add`), by an entry point of an
installed package, or for the study that names its place (`hold`); `atp_tune.plugins` has decorators and places. Each
has an `Origin`, which error messages name, and goes through the registry's `finish`, which checks what it is and does.
"""

import hashlib
import re
import sys
from collections import UserDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

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

from atp_tune.errors import UserError, did_you_mean

T = TypeVar("T")
Table: TypeAlias = dict[str, Any]  # of TOML or JSON, by key
Via = Literal["decorator", "entry point", "file", "module"]


class UnknownNameError(KeyError):
    """A name that is not in a registry; the message lists the names that are."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Origin:
    """Where a plug-in comes from; `str` is how error messages call it.

    `place`: FILE.py:NAME or package.module:NAME, as written; `file`: its source, None if it has none; `sha256`: of the
    content of that file; `package`: of an entry point.
    """

    kind: str
    name: str
    via: Via
    place: str
    file: Path | None
    sha256: str
    package: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} ({self.place if self.file is None else self.file})"


class Registry(UserDict[str, T]):
    """Objects of one kind by name, in the order of registration; `rows` hold built-in objects or their places.

    Error messages call an object by its `kind`. `group`: of the entry points. `finish`: the place of a function that
    takes a plug-in and its `Origin` and returns the object to use; UserError if it is none of this kind.
    """

    data: dict[str, Any]

    def __init__(self, kind: str, rows: Mapping[str, str | T], group: str = "", finish: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.data = dict(rows)
        self._group = group
        self._finish = finish
        self._added = dict[str, tuple[Any, Origin]]()  # by decorators
        self._held = dict[str, tuple[Any, Origin]]()  # named by the present study; no names of other studies
        self._loaded = dict[EntryPoint, tuple[Any, Origin]]()

    def __getitem__(self, name: str) -> T:
        """The object of that name, imported if necessary; UnknownNameError if the name is not registered."""
        if name in self.data:
            value = self.data[name] = resolved(self.data[name])
            return cast(T, value)
        plugin = self._plugin(name)
        if plugin is None:
            names = list(self)
            raise UnknownNameError(f'no {self.kind} "{name}"; known are {", ".join(names)}{did_you_mean(name, names)}')
        return cast(T, plugin[0])

    def get(self, name: str, default: Any = None) -> Any:
        """The object of that name, also one that only a study names; `default` if there is none."""
        try:
            return self[name]
        except UnknownNameError:
            return default

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in self._added or name in self.entry_points()

    def __iter__(self) -> Iterator[str]:
        """Built-in names, then those of decorators and entry points; not those that only a study names."""
        return iter(dict.fromkeys([*self.data, *self._added, *self.entry_points()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def is_built_in(self, name: str) -> bool:
        """Whether the name belongs to the package."""
        return name in self.data

    def origin(self, name: str) -> Origin | None:
        """Where a plug-in comes from, imported if necessary; None for a built-in object and for an unknown name."""
        plugin = None if name in self.data else self._plugin(name)
        return plugin and plugin[1]

    def is_added_by(self, name: str, file: Path) -> bool:
        """Whether a decorator in this file has registered the name."""
        entry = self._added.get(name)
        return entry is not None and entry[1].file is not None and entry[1].file.resolve() == file

    def held(self) -> dict[str, Origin]:
        """The plug-ins whose code has been run, by name."""
        loaded = [*self._added.values(), *self._loaded.values(), *self._held.values()]
        return {origin.name: origin for _, origin in loaded}

    def entry_points(self) -> Mapping[str, EntryPoint]:
        """Entry points by name; UserError if two have one name, or one has a name of the package."""
        by_name = entry_points_by_name(self._group, tuple(sys.path)) if self._group else {}
        for name, points in by_name.items():
            if len(points) > 1 or name in self.data:
                other = "is built in" if name in self.data else f"is one of {_package(points[1])} too"
                raise UserError(f"{self.kind} {name}, of {_package(points[0])}: {other}; uninstall one of the packages")
        return {name: points[0] for name, points in by_name.items()}

    def add(self, plugin: Any, origin: Origin) -> None:
        """Registers a plug-in for all studies of the process; UserError if another object has its name.

        An object of the same place may be registered again, as when a cell of a notebook runs twice.
        """
        earlier = self._added.get(origin.name)
        if earlier is not None and earlier[1].place != origin.place:
            raise UserError(f"{origin}: {earlier[1].place} has that name too; choose another name")
        if origin.name in self.data or origin.name in self.entry_points():
            raise UserError(f"{origin}: {self._clash(origin.name)}; choose another name")
        self._added[origin.name] = self._finished(plugin, origin), origin

    def hold(self, plugin: Any, origin: Origin) -> None:
        """Registers a plug-in that the present study names by its place, instead of that of an earlier study.

        UserError if the name is taken.
        """
        if origin.name in self:
            raise UserError(f"{origin}: {self._clash(origin.name)}; rename the object after the colon")
        self._held[origin.name] = self._finished(plugin, origin), origin

    def _clash(self, name: str) -> str:
        if name in self.data:
            return f"there is a built-in {self.kind} {name}"
        return f"there is another {self.kind} {name}, of {self.origin(name)}"

    def _finished(self, plugin: Any, origin: Origin) -> Any:
        return resolved(self._finish)(plugin, origin) if self._finish else plugin

    def _plugin(self, name: str) -> tuple[Any, Origin] | None:
        entry = self._added.get(name) or self._held.get(name)
        point = None if entry else self.entry_points().get(name)
        if point is None:
            return entry
        if point not in self._loaded:
            package = _package(point)
            try:
                plugin = point.load()
                source = Path(str(sys.modules[point.module].__file__))
                digest = hashlib.sha256(source.read_bytes()).hexdigest()
            except Exception as error:  # anything that its code may raise
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{self.kind} {point.name}, of {package}: {point.value}: {reason}") from None
            origin = Origin(self.kind, point.name, "entry point", point.value, source, digest, package)
            self._loaded[point] = self._finished(plugin, origin), origin
        return self._loaded[point]


def resolved(row: Any) -> Any:
    """An object, imported if its place is given."""
    if not isinstance(row, str):
        return row
    module, _, attribute = row.partition(":")
    imported = import_module(module)
    return getattr(imported, attribute) if attribute else imported


@cache
def entry_points_by_name(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name; `path`: where Python looks for packages, which may change."""
    by_name = dict[str, list[EntryPoint]]()
    for point in entry_points(group=group):
        if point not in by_name.setdefault(point.name, []):
            by_name[point.name].append(point)
    return by_name


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else "an installed package"


# --- Base classes and validators of all data models: tables of study files, published JSON files, stored records.

STORED = {"stored": True}  # context of the validation of what was stored: plug-ins may have been taken away since
_STORED_NAME = re.compile(r"[\w.:/ ~-]{1,500}")


class FrozenModel(BaseModel):
    """An immutable model; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingsTable(FrozenModel, allow_inf_nan=False, use_attribute_docstrings=True):
    """A table that a person writes: numbers must be finite, and true and false are not accepted as numbers.

    The text below a key is its description.
    """

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
    other: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Checks the name before the type."""
        return with_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Adds the names to the type."""
        return {"anyOf": [{**handler(schema), "enum": list(self.names)}, {**handler(schema), "pattern": self.other}]}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            is_other = re.fullmatch(self.other, value, re.ASCII)
            is_stored = info.context == STORED and _STORED_NAME.fullmatch(value)
            if is_other or is_stored or value in self.names:
                return value
        *others, last = map(repr, self.names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})


def relocated(error: ValidationError, *path: str) -> list[InitErrorDetails]:
    """The errors of an inner table, at their place in an outer one, to be raised again."""
    return [
        InitErrorDetails(
            type=details["type"], loc=(*path, *details["loc"]), input=details["input"], ctx=details.get("ctx", {})
        )
        for details in error.errors(include_url=False)
    ]


def check_once(names: tuple[str, ...], key: str) -> None:
    """ValueError if a name occurs twice under `key`."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'{key}: holds "{name}" {names.count(name)} times')
