"""Plug-ins: pruners, allocations, scores, sources of texts and samplers from outside the package.

A decorator registers one for the process:

    @atp_tune.pruner("ria")
    class RIA(SettingsTable): ...

A study file names one by its place, FILE.py:NAME or package.module:NAME. NAME is that of a decorator or of an attribute
of the module; in lower case it is the short name, by which tables, databases and figures call it. The code of a place
runs only with a permission that no file can give: `--trust-plugins`.

Loads no library of its own, and no code of a plug-in unless asked to.
"""

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from atp_tune.errors import PluginError, TrialError, UserError, did_you_mean
from atp_tune.paths import is_special, written
from atp_tune.registry import Origin, Registry, resolved

__all__ = ["allocation", "pruner", "sampler", "score", "text_source"]

T = TypeVar("T")
PLACE = re.compile(r"(?P<where>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_][\w-]*)", re.ASCII)
IN_SCHEMA = r"^(.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):[A-Za-z_][\w-]*$"  # the same, for editors too
NAME = re.compile(r"[a-z_][a-z0-9_-]*")
ASK = "--trust-plugins"
REGISTRIES = {  # kind → the place of its registry
    "pruner": "atp_tune.pruners:PRUNERS",
    "allocation": "atp_tune.allocations:ALLOCATIONS",
    "score": "atp_tune.spec.search:SCORES",
    "source of texts": "atp_tune.inputs.documents:SOURCES",
    "sampler": "atp_tune.spec.search:SAMPLERS",
}


@dataclass(frozen=True)
class Module:
    """The module of a file that was run, and what its decorators registered: kind, name and object."""

    code: ModuleType
    registered: tuple[tuple[str, str, Any], ...]
    sha256: str


_modules: dict[tuple[Path, str], Module] = {}  # by file and content
_running: list[list[tuple[str, str, Any]]] = []  # what decorators register in a file that is being run


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

    def register(found: T) -> T:
        if _running:
            _running[-1].append((kind, name, found))
        else:
            registry(kind).add(found, _origin_of(kind, name, found))
        return found

    return register


def registry(kind: str) -> Registry[Any]:
    """The registry of a kind."""
    found: Registry[Any] = resolved(REGISTRIES[kind])
    return found


def _origin_of(kind: str, name: str, found: Any) -> Origin:
    """The origin of an object that a decorator registers; a notebook has no file, so there its own code is hashed."""
    code = found if inspect.isclass(found) or inspect.isroutine(found) else type(found)
    place = f"{code.__module__}:{code.__qualname__}"
    try:
        file = Path(str(inspect.getsourcefile(code)))
        if file.is_file():
            return Origin(kind, name, "decorator", place, file.absolute(), digest(file.read_bytes()))
    except (OSError, TypeError):  # a class of a notebook
        pass
    return Origin(kind, name, "decorator", place, None, digest("\n".join(_code_of(code)).encode()))


def _code_of(each: Any) -> Iterator[str]:
    """What an object without a file does, as text: the compiled code of its functions, and its settings."""
    if inspect.isclass(each):
        yield repr(getattr(each, "model_fields", ""))
        for name, own in sorted(vars(each).items()):
            yield from (f"{name} {part}" for part in _code_of(getattr(own, "__func__", own)))
    code = each if inspect.iscode(each) else getattr(each, "__code__", None)
    if code is not None:
        yield f"{code.co_code.hex()} {code.co_names}"
        for constant in code.co_consts:
            yield from _code_of(constant) if inspect.iscode(constant) else (repr(constant),)


def digest(content: bytes) -> str:
    """The SHA-256 (hex) of some bytes."""
    return hashlib.sha256(content).hexdigest()


def code_of(kind: type) -> str:
    """The SHA-256 of the file that defines a class, or of its name where it has none."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return digest(f"{kind.__module__}.{kind.__qualname__}".encode() if file is None else Path(file).read_bytes())


def is_place(written_name: str) -> bool:
    """Whether a name in a study file is the place of a plug-in."""
    return PLACE.fullmatch(written_name) is not None


def short_name(written_name: str) -> str:
    """The name by which tables, databases and figures call an object of a study file."""
    found = PLACE.fullmatch(written_name)
    return found["name"].lower() if found else written_name


def file_of(place: str, folder: Path, key: str) -> Path | None:
    """The file of a place; None for one in a package. Relative paths start at `folder`."""
    found = PLACE.fullmatch(place)
    assert found is not None
    return written(found["where"], folder, key) if found["where"].endswith(".py") else None


def content_of(place: str, folder: Path, key: str) -> str | None:
    """The SHA-256 of the file of a place; None if it cannot be read, or lies in a package."""
    file = file_of(place, folder, key)
    try:
        return digest(file.read_bytes()) if file is not None and not is_special(file) else None
    except OSError:
        return None


def load(kind: str, place: str, folder: Path, key: str) -> None:
    """Runs the code of a place and holds its object for the present study; UserError, with the key, if that fails."""
    found = PLACE.fullmatch(place)
    assert found is not None
    file = file_of(place, folder, key)
    module = _run(file, place, key) if file is not None else _import(found["where"], place, key)
    source = Path(str(module.code.__file__)).resolve()
    if registry(kind).is_added_by(short_name(place), source):  # its decorator ran in this process before
        return
    named = {name: each for of, name, each in module.registered if of == kind}
    name = found["name"]
    if name not in named and not hasattr(module.code, name):
        own = [each for each in vars(module.code) if each.lower() == name.lower()]
        known = [*named, *own]
        has = f"; it has {', '.join(known)}" if known else ""
        raise UserError(f"{key}: {place}: has no {kind} {name}{did_you_mean(name, known) or has}")
    origin = Origin(kind, short_name(place), "file" if file else "module", place, source, module.sha256)
    registry(kind).hold(named[name] if name in named else getattr(module.code, name), origin)


def registered_in(file: Path) -> list[tuple[str, str]]:
    """Kind and name of the plug-ins that the decorators of a file register; its code runs, and they are held."""
    module = _run(file, str(file), "plug-in")
    for kind, name, found in module.registered:
        origin = Origin(kind, name, "file", f"{file}:{name}", file, module.sha256)
        registry(kind).hold(found, origin)
    return [(kind, name) for kind, name, _ in module.registered]


def _run(file: Path, place: str, key: str) -> Module:
    """The module of a file; its code runs once for each content."""
    if is_special(file) or not file.is_file():
        raise UserError(f"{key}: {place}: there is no file {file}; copy it there")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {place}: {file} cannot be read: {error.strerror}") from None
    file, sha256 = file.resolve(), digest(content)
    if (file, sha256) not in _modules:
        code = ModuleType(f"atp_tune_plugin_{file.stem}_{sha256[:12]}")
        code.__file__ = str(file)
        sys.modules[code.__name__] = code  # where pydantic looks for names in annotations
        registered: list[tuple[str, str, Any]] = []
        _running.append(registered)
        try:
            exec(compile(content, file, "exec"), code.__dict__)
        except Exception as error:  # anything that a stranger's code may raise
            del sys.modules[code.__name__]
            raise UserError(f"{key}: {place}: {_reason(error, file)}") from None
        finally:
            _running.pop()
        _modules[file, sha256] = Module(code, tuple(registered), sha256)
    return _modules[file, sha256]


def _import(module: str, place: str, key: str) -> Module:
    """An installed module; its decorators have registered what they name for the process."""
    try:
        code = import_module(module)
        return Module(code, (), digest(Path(str(code.__file__)).read_bytes()))
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: {place}: needs the module {error.name}; is it installed?") from None
    except Exception as error:
        raise UserError(f"{key}: {place}: {type(error).__name__}: {error}") from None


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
