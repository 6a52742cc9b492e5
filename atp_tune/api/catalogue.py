"""Lists what is known by name: pruners, allocations, scores, sources of texts and samplers, built in and plug-ins."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, Field, JsonValue

from atp_tune.allocations import Budget, Shape
from atp_tune.config.plugged import settings_of
from atp_tune.errors import UserError
from atp_tune.plugins import REGISTRIES, registry
from atp_tune.pruners import SETTINGS
from atp_tune.utils.frozen import FrozenModel
from atp_tune.utils.registry import Origin, Registry

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
    parameters: dict[str, tuple[float, float]] = Field({})


def entries(named: Sequence[tuple[str, str]] = ()) -> list[Entry]:
    """All entries, kind by kind; `named`: kind and name of those that a study or a file names too.

    Imports all that is known. UserError for a plug-in that cannot be imported, and for a name that is given twice.
    """
    found = []
    for kind in REGISTRIES:
        names = dict.fromkeys([*registry(kind), *(name for of, name in named if of == kind)])
        names.pop("memory", None)  # of the Python interface, which people cannot name
        found += [_entry(registry(kind), name) for name in names]
    return found


def _entry(known: Registry[Any], name: str) -> Entry:
    each, origin, parameters = known[name], known.origin(name), dict[str, tuple[float, float]]()
    if known.kind == "allocation":
        with suppress(UserError):  # one that cannot say its bounds without a model
            parameters = each.bounds(EXAMPLE)
    # The first sentence of an object's docstring, else of its class; "" without one.
    text = getattr(each, "__doc__", None) or ""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return Entry(
        kind=known.kind,
        name=name,
        origin=_source(origin),
        about=ABOUT.get(name) or re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph)[0].rstrip("."),
        settings=tuple(_settings(name)) if known.kind == "pruner" else (),
        parameters=parameters,
    )


def _source(origin: Origin | None) -> str:
    if origin is None:
        return "built in"
    if origin.via == "entry point":
        return f"entry point of {origin.package.removeprefix('the package ')}"
    if origin.via == "decorator":
        return f"decorator in {origin.file or origin.place}"
    return str(origin.file)


def _settings(pruner: str) -> Iterator[Setting]:
    table: type[BaseModel] | None = SETTINGS.get(pruner)
    fields = table.model_fields if table else settings_of(pruner)
    if not fields:
        return
    model: Any = table or registry("pruner")[pruner]
    properties = model.model_json_schema()["properties"]
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        yield Setting(
            name=name,
            type=_type(properties[name]),
            default=list(default) if isinstance(default, tuple) else default,
            description=field.description or "",
        )


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `number > 0`, `row or row-variant`."""
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    words = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema]
    return " ".join([str(schema.get("type", "any")), " and ".join(bounds)]).strip()
