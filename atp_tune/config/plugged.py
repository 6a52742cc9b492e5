"""The code that a study or a configuration names: permission, the settings of plug-ins, and the hashes of files.

Reading a study runs no code. `plug_in` and `plug_in_config` run it, for commands that prune.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, ValidationError
from pydantic_core import InitErrorDetails

from atp_tune.allocations import ALLOCATIONS, Bounds, Budget, Shape
from atp_tune.config.data import TEXT_SOURCES, Source
from atp_tune.config.manifest import SHA256
from atp_tune.config.prune import PruneConfig
from atp_tune.config.search import SCORES
from atp_tune.config.study import Data, Study
from atp_tune.errors import UserError
from atp_tune.plugins import ASK, REGISTRIES, digest, file_digest, is_place, load, plugin_file, registry, short_name
from atp_tune.pruners import PRUNERS, QUANTIZERS, SETTINGS
from atp_tune.utils.cache import sha256_of_json
from atp_tune.utils.registry import FrozenModel, Origin, Registry, Table, relocated
from atp_tune.utils.system import written

if TYPE_CHECKING:
    from atp_tune.config.best import Config

SOURCE = "source of texts"
TEXT = re.compile(r"(?P<place>(?:.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+):[A-Za-z_][\w-]*)(?::(?P<rest>.*))?", re.DOTALL)


def _a_path(address: str) -> str:
    address.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    if "\0" in address or not is_place(address):
        raise ValueError("must be FILE.py:NAME or package.module:NAME")
    return address


@dataclass(frozen=True)
class Named:
    """A name in a study that may be a plug-in's: its kind, the key that holds it, and the name as it is written."""

    kind: str
    key: str
    written: str

    @property
    def short(self) -> str:
        """The short name."""
        return short_name(self.written)


class PluginRef(FrozenModel):
    """A plug-in: its kind, its place (FILE.py:NAME or package.module:NAME), and the SHA-256 of its file."""

    kind: Literal["pruner", "allocation", "score", "source of texts", "sampler"]
    place: Annotated[str, AfterValidator(_a_path)]
    sha256: SHA256


def check_known(method: str, allocation: str, score: str, plugins: Mapping[str, PluginRef], rounds: bool) -> None:
    """ValidationError unless a configuration's method, allocation and score are built in or among its plug-ins.

    `rounds`: weights are only rounded, so that the method is a quantizer.
    """
    for key, name, objects in (
        (("plan", "method"), method, QUANTIZERS if rounds else PRUNERS),
        (("plan", "allocation"), allocation, ALLOCATIONS),
        (("score",), score, SCORES),
    ):
        plugin = plugins.get(name)
        if not objects.is_built_in(name) and (plugin is None or plugin.kind != objects.kind):
            *others, last = map(repr, objects)
            expected = {"expected": f"{', '.join(others)} or {last}"}
            wrong = InitErrorDetails(type="literal_error", loc=key, input=name, ctx=expected)
            raise ValidationError.from_exception_data("Config", [wrong])


def split_source(source: str) -> tuple[str, str]:
    """The name of a source of texts, which may be a place, and what follows it."""
    match = TEXT.fullmatch(source)
    if match and source.partition(":")[0] not in TEXT_SOURCES:
        return match["place"], match["rest"] or ""
    name, _, rest = source.partition(":")
    return name, rest


def named_in(study: Study) -> list[Named]:
    """The plug-ins of a study: places, and names that are not built in."""
    rows = [Named("pruner", "prune.pruners", name) for name in study.prune.pruners]
    rows += [Named("allocation", "allocation.names", name) for name in study.allocation.names]
    rows += [
        Named("sampler", "search.sampler", study.search.sampler),
        Named("score", "search.score", study.search.score),
    ]
    rows += [
        Named(SOURCE, f"{key}.source", split_source(text.source)[0])
        for key, text in study.data.sources.items()
        if text.data == "text"
    ]
    return [plugin for plugin in rows if is_place(plugin.written) or _is_plugged(plugin)]


def code_in(study: Study) -> Iterator[tuple[str, str]]:
    """Each key of a study, with its value, by which code runs that no file can allow: docs/security.md lists them."""
    yield from ((plugin.key, plugin.written) for plugin in named_in(study) if is_place(plugin.written))
    yield from _imports(study.data.sources)
    yield from (("limit.min_accuracy", name) for name in study.tasks if is_task_path(name))


def _imports(texts: Mapping[str, Source]) -> Iterator[tuple[str, str]]:
    """Texts and images inside a package that does not come with Python: to read them imports it."""
    for key, text in texts.items():
        kind, _, path = text.source.partition(":")
        if kind == "package" and re.split("[.:/]", path)[0] not in sys.stdlib_module_names:
            yield f"{key}.source", text.source


def is_task_path(name: str) -> bool:
    """Whether a task of lm-eval is named by the path of its YAML file or folder, whose functions then run."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def _ask(key: str, name: str) -> UserError:
    return UserError(
        f"{key}: {name} {'is' if is_place(name) else 'names'} Python code, which is not run; read it, then allow it "
        f"with {ASK}"
    )


def permission(study: Study) -> list[str]:
    """The option by which the code that a study names runs, if it names some."""
    return [ASK] if any(code_in(study)) else []


def _is_plugged(plugin: Named) -> bool:
    """Whether a name is a plug-in's; a source of texts of an unknown name is a mistake, which reading it reports."""
    if plugin.kind == SOURCE:
        return plugin.short not in TEXT_SOURCES and plugin.short in registry(SOURCE)
    return not registry(plugin.kind).is_built_in(plugin.short)


def contents(study: Study, folder: Path) -> dict[str, str]:
    """The SHA-256 of the content of each plug-in's file, by short name, as far as known; places start at `folder`."""
    digests = {}
    for plugin in named_in(study):
        source = registry(plugin.kind).held().get(plugin.short)
        if is_place(plugin.written):
            file = plugin_file(plugin.written, folder, plugin.key)
            if file is not None and (source is None or source.file is None or source.file.resolve() != file.resolve()):
                source = None
                if sha256 := file_digest(plugin.written, folder, plugin.key):
                    digests[plugin.short] = sha256
        if source is not None:
            digests[plugin.short] = source.sha256
    for name in filter(is_task_path, study.tasks):
        # That of the YAML and Python files of a folder of tasks, or of those beside a task's YAML file.
        path = written(name, folder, "limit.min_accuracy")
        home, all_of = (path, "**/*") if path.is_dir() else (path.parent, "*")
        files = sorted(file for file in home.glob(all_of) if file.suffix in (".yaml", ".yml", ".py") and file.is_file())
        digests[Path(name).stem] = sha256_of_json(
            {str(file.relative_to(home)): digest(file.read_bytes()) for file in files}
        )
    return digests


def records(study: Study, folder: Path) -> dict[str, dict[str, str]]:
    """Kind, place and SHA-256 of a study's plug-ins, whose code has been run, by short name.

    The place is that of the study file or of the entry point; a decorator's is its file, relative to `folder`.
    """
    rows = {}
    for plugin in named_in(study):
        origin = registry(plugin.kind).origin(plugin.short)
        if origin is None:
            continue
        address = plugin.written if is_place(plugin.written) else origin.place
        if origin.via == "decorator" and origin.file is not None and address == origin.place:
            address = f"{os.path.relpath(os.path.realpath(origin.file), os.path.realpath(folder))}:{plugin.short}"
        rows[plugin.short] = {"kind": origin.kind, "place": address, "sha256": origin.sha256}
    return rows


def plug_in(study: Study, folder: Path, trusted: bool) -> Study:
    """Runs the code of a study's plug-ins, checks the tables of pruners, and leaves out settings that are defaults.

    `trusted`: code that the study names may run. UserError without that, for a plug-in that is missing or wrong, and if
    two have one name; ValidationError, as of the study, for wrong settings.
    """
    plugins = named_in(study)
    if not trusted:
        for key, name in code_in(study):
            raise _ask(key, name)
    by_name = dict[str, Named]()
    for plugin in plugins:  # facts are named after it
        other = by_name.setdefault(plugin.short, plugin)
        if (other.kind, other.written) != (plugin.kind, plugin.written):
            raise UserError(
                f"{plugin.key}: {other.written}, in {other.key}, and {plugin.written} are both called {plugin.short}; "
                "rename one of the plug-ins"
            )
    for plugin in plugins:
        bring(plugin, folder, trusted)
    for kind in ("pruner", "allocation", "sampler", "score"):
        registry(kind).entry_points()  # UserError for one that has the name of a built-in object
    if not study.prune.tables:
        return study
    return study.model_copy(update={"prune": _with_settings(study.prune)})


def bring(plugin: Named, folder: Path, trusted: bool) -> Origin:
    """Runs the code of one plug-in; its origin. UserError without permission, or if it is not there."""
    if is_place(plugin.written):
        if not trusted:
            raise _ask(plugin.key, plugin.written)
        load(plugin.kind, plugin.written, folder, plugin.key)
    origin = registry(plugin.kind).origin(plugin.short)
    if origin is None:
        raise UserError(
            f"{plugin.key}: no {plugin.kind} {plugin.short} is known in this process; install its package, or name "
            "it as FILE.py:NAME"
        )
    return origin


def _with_settings(prune: PruneConfig) -> PruneConfig:
    wrong = list[InitErrorDetails]()
    tables = dict[str, dict[str, JsonValue]]()
    for name, table in prune.tables.items():
        if "group" in table:  # the pattern sets it
            wrong.append(InitErrorDetails(type="extra_forbidden", loc=("prune", name, "group"), input=table["group"]))
            continue
        try:
            settings = PRUNERS[name].model_validate(table)  # type: ignore[attr-defined]
        except ValidationError as error:
            wrong += relocated(error, "prune", name)
        else:
            if set_ := settings.model_dump(mode="json", exclude_defaults=True):
                tables[name] = set_
    if wrong:
        raise ValidationError.from_exception_data("Study", wrong)
    copied = prune.model_copy()
    object.__setattr__(copied, "__pydantic_extra__", tables)
    object.__setattr__(copied, "__pydantic_fields_set__", {*prune.model_fields_set} - {*prune.tables} | {*tables})
    return copied


def plug_in_config(config: "Config", texts: Mapping[str, Data], base: Path, trusted: bool) -> None:
    """Runs the code of the plug-ins that a configuration's weights and scores need: its pruner, its score, these texts.

    An allocation's is not needed, since the configuration holds the sparsities. `base`: the folder that relative paths
    start at. UserError without permission, and for a plug-in that is missing, or has changed since.
    """
    _bring_recorded(config, {"pruner": config.plan.method, "score": config.score}, base, trusted)
    plug_in_texts(config, texts, base, trusted)


def plug_in_texts(config: "Config", texts: Mapping[str, Data], base: Path, trusted: bool) -> None:
    """Runs the code of the sources of a configuration's texts, as `plug_in_config` does."""
    for key, name in () if trusted else _imports(texts):
        raise _ask(key, name)
    names = {f"{role}.source": short_name(split_source(text.source)[0]) for role, text in texts.items()}
    _bring_recorded(config, names, base, trusted)


def _bring_recorded(config: "Config", needed: Mapping[str, str], base: Path, trusted: bool) -> None:
    for key, name in needed.items():
        if (ref := config.plugins.get(name)) is None:
            continue
        plugin = Named(ref.kind, key, name if name in registry(ref.kind) else ref.place)
        origin = bring(plugin, base, trusted)
        if origin.sha256 != ref.sha256:
            raise UserError(
                f"plugins.{name}.sha256: {origin.file or origin.place} is {origin.sha256[:12]}… here, the "
                f"configuration was found with {ref.sha256[:12]}…; give it the plug-in of the study"
            )


def plugin_settings(name: str) -> Table:
    """The fields of a plug-in pruner that are keys of its table; empty for another name, or before its code has run."""
    if PRUNERS.is_built_in(name) or name not in PRUNERS.held():
        return {}
    fields = PRUNERS[name].model_fields  # type: ignore[attr-defined]
    return {key: field for key, field in fields.items() if key != "group"}


def rooted(names: Sequence[str], folder: Path) -> Iterator[str]:
    """Names from a command line, with places whose files start at `folder` made absolute."""
    for name in names:
        file = plugin_file(name, folder, "plug-in") if is_place(name) else None
        yield name if file is None else f"{file.absolute()}:{name.rpartition(':')[2]}"


# --- Lists what is known by name: pruners, allocations, scores, sources of texts and samplers, built in and plug-ins.

# A Llama of 32 blocks at 60 %, for the bounds of parameters.
_WIDTH, _INNER, _BLOCKS, _SPARSITY = 4096, 11008, 32, 0.6
_LINEARS = (
    *(Shape(_WIDTH, _WIDTH, attention=True, value=name == "v") for name in "qkvo"),
    *(Shape(_INNER, _WIDTH, attention=False) for _ in range(2)), Shape(_WIDTH, _INNER, attention=False),
)  # fmt: skip
EXAMPLE = Budget(_SPARSITY, (sum(shape.size for shape in _LINEARS),) * _BLOCKS, tuple(_LINEARS for _ in range(_BLOCKS)))

ABOUT = {  # those whose classes or functions are about more than one name
    "c4": "C4, web pages, on the hub",
    "wikitext2": "WikiText-2, articles of Wikipedia, on the hub",
    "hub": "hub:ORG/NAME, a data set on the hub with a column of texts",
    "gp": "A Gaussian process",
    "tpe": "Optuna's TPE",
    "grid": "β in equal steps (search.step), shuffled",
    "random": "Random points",
    "next-token": "The NLL of each next token",
    "classes": "The cross-entropy of the right class of images",
}


class Setting(FrozenModel):
    """A key of a pruner's table."""

    name: str
    type: str
    default: JsonValue
    description: str


class Entry(FrozenModel):
    """One name: where it comes from, the first sentence about it, its settings, and an allocation's parameters.

    `origin`: "built in", "entry point of PACKAGE", "decorator in FILE", or the file or module. `parameters`: the bounds
    at 60 % of a Llama of 32 blocks.
    """

    kind: str
    name: str
    origin: str
    about: str
    settings: tuple[Setting, ...] = ()
    parameters: Bounds = Field({})


def entries(others: Sequence[tuple[str, str]]) -> list[Entry]:
    """All entries, kind by kind; `others`: kind and name of those that a study or a file names too.

    Imports all that is known. UserError for a plug-in that cannot be imported, and for a name that is given twice.
    """
    rows = []
    for kind in REGISTRIES:
        names = dict.fromkeys([*registry(kind), *(name for of, name in others if of == kind)])
        names.pop("memory", None)  # of the Python interface, which people cannot name
        rows += [_entry(registry(kind), name) for name in names]
    return rows


def _entry(objects: Registry[Any], name: str) -> Entry:
    each, origin, parameters = objects[name], objects.origin(name), Bounds()
    if objects.kind == "allocation":
        with suppress(UserError):  # one that cannot say its bounds without a model
            parameters = each.bounds(EXAMPLE)
    source = "built in"
    if origin is not None:
        ways = {
            "entry point": f"entry point of {origin.package.removeprefix('the package ')}",
            "decorator": f"decorator in {origin.file or origin.place}",
        }
        source = ways.get(origin.via, str(origin.file))
    # The first sentence of an object's docstring, else of its class; "" without one.
    text = getattr(each, "__doc__", None) or ""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return Entry(
        kind=objects.kind,
        name=name,
        origin=source,
        about=ABOUT.get(name) or re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph)[0].rstrip("."),
        settings=tuple(_settings(name)) if objects.kind == "pruner" else (),
        parameters=parameters,
    )


def _settings(pruner: str) -> Iterator[Setting]:
    table = SETTINGS.get(pruner)
    fields = table.model_fields if table else plugin_settings(pruner)
    if not fields:
        return
    model = table or registry("pruner")[pruner]
    properties = model.model_json_schema()["properties"]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        yield Setting(
            name=name,
            type=_type(properties[name]),
            default=list(default) if isinstance(default, tuple) else default,
            description=field.description or "",
        )


def _type(schema: Table) -> str:
    """A JSON schema in words: `number > 0`, `row or row-variant`."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    words = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema)
    return f"{schema.get('type', 'any')} {bounds}".strip()
