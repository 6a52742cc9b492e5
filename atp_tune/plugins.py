"""Plug-ins: pruners, allocations, scores, sources of texts and samplers from outside the package.

A decorator registers one for the process:

    @atp_tune.pruner("ria")
    class RIA(SettingsTable): ...

A study file names one by its place, FILE.py:NAME or package.module:NAME. NAME is that of a decorator or of an attribute
of the module; in lower case it is the short name, by which tables, databases and figures call it. The code of a place
runs only with a permission that no file can give: `--trust-plugins`.

Loads no library of its own, and no code of a plug-in unless asked to.
"""

from __future__ import annotations  # help() shows the types as they stand here

import hashlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import CellType, EllipsisType, FunctionType, ModuleType, NoneType
from typing import Any, Self, TypeVar

from atp_tune.errors import PluginError, TrialError, UserError, did_you_mean
from atp_tune.utils.registry import Origin, Registry, resolved
from atp_tune.utils.system import is_special, written

__all__ = ["allocation", "pruner", "sampler", "score", "text_source"]

T = TypeVar("T")
IN_SCHEMA = r"^(.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_][\w-]*$"  # of a place, for editors too
PLACE = re.compile(IN_SCHEMA, re.ASCII)
NAME = re.compile(r"[a-z_][a-z0-9_-]*")
ASK = "--trust-plugins"
REGISTRIES = {  # kind → the place of its registry
    "pruner": "atp_tune.pruners:PRUNERS",
    "allocation": "atp_tune.allocations:ALLOCATIONS",
    "score": "atp_tune.config.search:SCORES",
    "source of texts": "atp_tune.inputs.sources:SOURCES",
    "sampler": "atp_tune.config.search:SAMPLERS",
}


@dataclass(frozen=True)
class Module:
    """The module of a file that was run, and what its decorators registered: kind, name and object."""

    code: ModuleType
    registered: tuple[tuple[str, str, Any], ...]
    sha256: str


_modules = dict[tuple[Path, str], Module]()  # by file and content
_PROCESS = os.urandom(16).hex()  # what cannot be known is another one in each process
_STDLIB = str(Path(os.__file__).parent)
_running = list[list[tuple[str, str, Any]]]()  # what decorators register in a file that is being run


def pruner(name: str) -> Callable[[T], T]:
    """Registers a class as a pruner: see `atp_tune.pruners.Pruner`."""
    return _decorator("pruner", name)


def allocation(name: str) -> Callable[[T], T]:
    """Registers a class or an object as an allocation: see `atp_tune.allocations.Allocation`."""
    return _decorator("allocation", name)


def score(name: str) -> Callable[[T], T]:
    """Registers a class or an object as a score, for `search.score`: see `atp_tune.scores.Score`."""
    return _decorator("score", name)


def text_source(name: str) -> Callable[[T], T]:
    """Registers a source of texts: a function from what follows `NAME:`, and the study's folder, to documents."""
    return _decorator("source of texts", name)


def sampler(name: str) -> Callable[[T], T]:
    """Registers a function from a seed to an Optuna sampler, for `search.sampler`."""
    return _decorator("sampler", name)


def _decorator(kind: str, name: str) -> Callable[[T], T]:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f'the {kind} "{name}": its name must be of lower-case letters, digits, - and _')

    def register(plugin: T) -> T:
        if _running:
            _running[-1].append((kind, name, plugin))
        else:
            registry(kind).add(plugin, _new_origin(kind, name, plugin))
        return plugin

    return register


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind."""
    result: Registry[Any] = resolved(REGISTRIES[kind])
    return result


def _new_origin(kind: str, name: str, plugin: Any) -> Origin:
    """The origin of an object that a decorator registers; a notebook has no file, so there the object is hashed."""
    code = plugin if inspect.isclass(plugin) or inspect.isroutine(plugin) else type(plugin)
    address = f"{code.__module__}:{code.__qualname__}"
    with suppress(OSError, TypeError):  # a class of a notebook
        file = Path(str(inspect.getsourcefile(code)))
        if file.is_file():
            return Origin(kind, name, "decorator", address, file.absolute(), digest(file.read_bytes()))
    return Origin(kind, name, "decorator", address, None, content_of_object(plugin))


def content_of_object(value: Any) -> str:
    """The SHA-256 of all that decides what an object without a file does: its code, and the values that it can reach.

    Where something cannot be known, such as an open file or what is nested too deeply, it is another one in each
    process.
    """
    seen = dict[int, tuple[int, Any]]()

    def parts(each: Any) -> Iterator[str]:
        """Yields an object's type, then its parts, as text, each part once."""
        if isinstance(each, str | bytes | int | float | complex | range | NoneType | EllipsisType):
            yield repr(each)
        elif id(each) in seen:
            yield f"part {seen[id(each)][0]}"
        else:
            seen[id(each)] = len(seen), each  # which stays, and so its id
            yield type(each).__qualname__
            for part in _members(each):
                yield from parts(part)

    try:
        return digest("\n".join(parts(value)).encode())
    except RecursionError:
        return digest(f"{_PROCESS} {id(value)}".encode())


def _members(each: Any) -> Iterable[Any]:
    if isinstance(each, type | FunctionType | ModuleType):
        return _defined_by(each)
    if inspect.iscode(each):  # without file, lines and comments
        counts = each.co_argcount, each.co_posonlyargcount, each.co_kwonlyargcount, each.co_flags
        names = *each.co_names, *each.co_varnames, *each.co_freevars
        return [each.co_code, each.co_exceptiontable, *counts, *names, *each.co_consts]
    if type(each) in (list, tuple, set, frozenset):
        return each if type(each) in (list, tuple) else sorted(each, key=repr)
    if isinstance(each, staticmethod | classmethod | property) or inspect.ismethod(each) or inspect.isbuiltin(each):
        return [getattr(each, name, None) for name in ("__name__", "__self__", "__func__", "fget", "fset")]
    try:  # how it would be made again
        recipe = each.__reduce_ex__(4)
        return [recipe] if isinstance(recipe, str) else [*recipe[:3], *(list(part or ()) for part in recipe[3:5])]
    except Exception:  # a stranger's object may raise anything
        return [_PROCESS, id(each)]


def _defined_by(each: Any) -> Iterable[Any]:
    """The name of a library's class, function or module, and the SHA-256 of a user's file; the parts of a notebook's.

    Those of a class are its attributes; of a function its code, and the values of the names that it uses.
    """
    name = each.__name__ if inspect.ismodule(each) else str(each.__module__)
    file = getattr(sys.modules.get(name), "__file__", None)
    if name in sys.modules and name != "__main__":
        is_library = file is None or name.split(".")[0] == "atp_tune" or "-packages" in file or file.startswith(_STDLIB)
        with suppress(OSError):  # in a .zip file, or gone
            own = "" if is_library else digest(Path(str(file)).read_bytes())
            return [getattr(each, "__qualname__", ""), each.__name__, own]
    if inspect.isclass(each):
        of_pydantic = [repr(getattr(each, name, "")) for name in ("model_fields", "__private_attributes__")]
        items = sorted(vars(each).items())
        pairs = [pair for pair in items if isinstance(pair[1], FunctionType) or not pair[0].startswith(("__", "_abc_"))]
        return [each.__bases__, *of_pydantic, *pairs]
    if inspect.ismodule(each):  # made by hand
        return [_PROCESS, id(each)]
    codes, names = [each.__code__], set[str]()
    for code in codes:  # those within it too
        names |= {*code.co_names}
        codes += filter(inspect.iscode, code.co_consts)
    used = [each.__globals__[name] for name in sorted(names) if name in each.__globals__]
    cells = [cell.cell_contents for cell in each.__closure__ or () if cell != CellType()]
    return [each.__code__, each.__defaults__, each.__kwdefaults__, cells, used]


def digest(content: bytes) -> str:
    """The SHA-256 (hex) of some bytes."""
    return hashlib.sha256(content).hexdigest()


def code_digest(kind: type) -> str:
    """The SHA-256 of the file that defines a class, or of the class itself where it has none."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return content_of_object(kind) if file is None else digest(Path(file).read_bytes())


def is_place(written_name: str) -> bool:
    """Whether a name in a study file is the place of a plug-in."""
    return PLACE.fullmatch(written_name) is not None


def short_name(written_name: str) -> str:
    """The name by which tables, databases and figures call an object of a study file."""
    return written_name.rpartition(":")[2].lower() if is_place(written_name) else written_name


def plugin_file(address: str, folder: Path, key: str) -> Path | None:
    """The file of an address; None for one in a package. Relative paths start at `folder`."""
    where = address.rpartition(":")[0]
    return written(where, folder, key) if where.endswith(".py") else None


def file_digest(address: str, folder: Path, key: str) -> str | None:
    """The SHA-256 of the file of an address; None if it cannot be read, or lies in a package."""
    file = plugin_file(address, folder, key)
    try:
        return digest(file.read_bytes()) if file is not None and not is_special(file) else None
    except OSError:
        return None


def load(kind: str, address: str, folder: Path, key: str) -> None:
    """Runs the code of an address and holds its object for this study; UserError, with the key, if that fails."""
    (where, _, name), file = address.rpartition(":"), plugin_file(address, folder, key)
    module = _run(file, address, key) if file is not None else _import(where, address, key)
    source = Path(str(module.code.__file__)).resolve()
    if registry(kind).is_added_by(short_name(address), source):  # its decorator ran in this process before
        return
    objects = {own: each for of, own, each in module.registered if of == kind}
    if name not in objects and not hasattr(module.code, name):
        names = [*objects, *[each for each in vars(module.code) if each.lower() == name.lower()]]
        has = f"; it has {', '.join(names)}" if names else ""
        raise UserError(f"{key}: {address}: has no {kind} {name}{did_you_mean(name, names) or has}")
    origin = Origin(kind, short_name(address), "file" if file else "module", address, source, module.sha256)
    registry(kind).hold(objects[name] if name in objects else getattr(module.code, name), origin)


def registered_in(file: Path) -> list[tuple[str, str]]:
    """Kind and name of the plug-ins that the decorators of a file register; its code runs, and they are held."""
    module = _run(file, str(file), "plug-in")
    for kind, name, plugin in module.registered:
        registry(kind).hold(plugin, Origin(kind, name, "file", f"{file}:{name}", file, module.sha256))
    return [(kind, name) for kind, name, _ in module.registered]


def _run(file: Path, address: str, key: str) -> Module:
    """The module of a file; its code runs once for each content."""
    if is_special(file) or not file.is_file():
        raise UserError(f"{key}: {address}: there is no file {file}; copy it there")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {address}: {file} cannot be read: {error.strerror}") from None
    file, sha256 = file.resolve(), digest(content)
    if (file, sha256) not in _modules:
        code = ModuleType(f"atp_tune_plugin_{file.stem}_{sha256[:12]}")
        code.__file__ = str(file)
        sys.modules[code.__name__] = code  # where pydantic looks for names in annotations
        registered = list[tuple[str, str, Any]]()
        _running.append(registered)
        try:
            exec(compile(content, file, "exec"), code.__dict__)
        except Exception as error:  # anything that a stranger's code may raise
            del sys.modules[code.__name__]
            raise UserError(f"{key}: {address}: {_reason(error, file)}") from None
        finally:
            _running.pop()
        _modules[file, sha256] = Module(code, tuple(registered), sha256)
    return _modules[file, sha256]


def _import(module: str, address: str, key: str) -> Module:
    """An installed module; its decorators have registered what they name for the process."""
    try:
        code = import_module(module)
        return Module(code, (), digest(Path(str(code.__file__)).read_bytes()))
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: {address}: needs the module {error.name}; is it installed?") from None
    except Exception as error:
        raise UserError(f"{key}: {address}: {type(error).__name__}: {error}") from None


def _reason(error: Exception, file: Path) -> str:
    """An error of a plug-in, with the line of its file that raised it."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    line = error.lineno if isinstance(error, SyntaxError) else (frames or [None])[-1]
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{'' if line is None else f'line {line}: '}{type(error).__name__}: {' '.join(text.split())}"


@contextmanager
def guarded(origin: Origin, what: str) -> Iterator[None]:
    """Turns errors of a plug-in's code into PluginError, which names the plug-in, its file and `what` it was doing.

    UserError and TrialError pass, and so does a lack of memory, which smaller batches may cure.
    """
    try:
        yield
    except (UserError, TrialError):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        file = Path() if origin.file is None else origin.file.resolve()
        raise PluginError(f"{origin}: {what}: {_reason(error, file)}") from error


class Checked:
    """An object around a plug-in, which checks its results; PluginError names the plug-in and its file."""

    def __init__(self, plugin: Any, origin: Origin) -> None:
        self._plugin = plugin
        self._origin = origin
        self.__doc__ = getattr(plugin, "__doc__", None)

    @classmethod
    def finished(cls, plugin: Any, origin: Origin, **methods: str) -> Self:
        """Returns it around an object, or a class, of which one is made; UserError if it lacks one of these methods.

        `methods`: what the message says of each by name.
        """
        for name, text in methods.items():
            if not callable(getattr(plugin, name, None)):
                raise UserError(f"{origin}: is no {origin.kind}: has no method {name}{text}")
        with guarded(origin, "it could not be made"):
            return cls(plugin() if isinstance(plugin, type) else plugin, origin)

    def wrong(self, method: str, what: str) -> PluginError:
        """The error of a method's result."""
        return PluginError(f"{self._origin}: {method} {what}")
