"""Translates former names and values of keys when they are read. Loads no torch.

| key | read from | former | present |
|---|---|---|---|
| keys of study files, dotted | study files, `--set`, stored facts, configurations | left in `KEYS` | right in `KEYS` |
| `model.offload` | study files, `--set` | left in `PLACES` | right in `PLACES` |
| `prune.statistics` | stored facts | "sequential" | "block" |
| `prune.statistics` | stored facts | "sequential within blocks" | "sequential" |
| `prune.statistics` | configurations without `calibration.every` | "sequential" | "block" |
| `texts.bos` | stored facts | no such key | false |
| all of `LATER` | stored facts | no such key | the key's default |
| attributes of studies and trials | databases | left in `ATTRIBUTES` | right in `ATTRIBUTES` |
| roles of texts in scores and batches | databases, configurations | left in `ROLES` | right in `ROLES` |

A row of `KEYS` names a key or a whole table. Both names are read; the present one is written.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import WithJsonSchema

from atp_tune.pruners import SETTINGS

Names: TypeAlias = tuple[str, ...]

ROLES = {"search": "validation", "report": "test"}
_OF_TEXTS = {"windows": "nsamples", "tokens": "seqlen", "every": "stride", "draw": "sampling"}
KEYS: dict[str, str] = {  # former dotted key → present dotted key
    "model.residency": "model.offload",
    "search.settle": "search.early_termination",
    "search.screen.every": "search.screen.stride",
    **{f"texts.{former}": f"texts.{role}" for former, role in ROLES.items()},
    **{
        f"texts.{former}.{old}": f"texts.{ROLES.get(former, former)}.{new}"
        for former in ("calibration", *ROLES, *ROLES.values())
        for old, new in _OF_TEXTS.items()
    },
}
PLACES = {"device": "none", "host": "cpu"}
FormerPlace = Annotated[str, WithJsonSchema({"enum": list(PLACES), "type": "string", "deprecated": True})]
ATTRIBUTES = {
    "reports": "test_nlls",
    "report_kls": "test_kls",
    "belief": "gp_posterior",
    "settled": "terminated_early",
    "unheard": "experts_without_tokens",
}
VALUES = {  # present key → {present value: value that facts store}
    "prune.statistics": {"block": "sequential", "sequential": "sequential within blocks"},
}
LACKING: dict[str, Any] = {"texts.bos": False}  # values of facts that are missing in studies older than the key
# Keys added after the first release: they are facts only if they differ from the default, so that old studies resume.
LATER = (
    "prune.pattern", *(f"prune.{name}." for name in SETTINGS if name != "sparsegpt"), "model.trust_remote_code",
    "model.prune", "prune.swaps", "prune.refine", "prune.prices", "prune.loss", "prune.channels.",
    "search.screen.", "search.objective", "search.score", "quantize.act_order",
    *(f"texts.{role}.{key}" for role in ("calibration", "validation", "test") for key in ("stride", "shuffle")),
)  # fmt: skip


def present_key(key: str) -> str:
    """The present name of a dotted key of a study file."""
    return _translated(key, _rows())


def present_override(text: str) -> str:
    """The override `key=value` with the present name of its key."""
    key, equals, value = text.partition("=")
    key = ".".join(part.strip() for part in key.split("."))
    return text if present_key(key) == key else f"{present_key(key)}{equals}{value}"


def present_keys(data: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """Nested tables of a study, or its table with the former name `table`, with present names of keys.

    If both names of a key are present, the former name stays and is reported later as an unknown key.
    """
    rows = _rows(table)
    leaves = dict(_leaves(data, max(map(len, rows), default=1)))
    count = Counter(_renamed(path, rows) for path in leaves)
    result: dict[str, Any] = {}
    for path, value in leaves.items():
        present = _renamed(path, rows)
        is_taken = count[present] > 1 or any(present[:length] in leaves for length in range(1, len(present)))
        *tables, key = (*present[:-1], path[-1]) if is_taken else present
        inner = result
        for name in tables:
            inner = inner.setdefault(name, {})
        inner[key] = value
    return result


def present_facts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored facts with the present names of keys."""
    rows = _rows()
    return {_translated(key, rows): value for key, value in stored.items()}


def stored_value(key: str, value: Any) -> Any:
    """The value that facts store for a value of a study file."""
    return VALUES[key].get(value, value) if key in VALUES else value


def present_value(key: str, stored: Any) -> Any:
    """The present value, as in a study file, of a stored fact."""
    return next((value for value, former in VALUES.get(key, {}).items() if former == stored), stored)


def present_place(value: Any) -> Any:
    """The present value of `model.offload`."""
    return PLACES.get(value, value) if isinstance(value, str) else value


def present_attributes(attrs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Attributes of a stored study or trial with present names; the same object if nothing changes."""
    found: dict[str, Any] = {}
    for name, value in attrs.items():
        table, colon, row = name.partition(":")
        present = ATTRIBUTES.get(table, table) + colon + row
        if present == name or present not in attrs:
            found[present] = _translated_attribute(name, value)
    return attrs if found == attrs else found


def _translated_attribute(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if name == "batches":
        return {ROLES.get(role, role): size for role, size in value.items()}
    return present_facts(value) if name == "fingerprint" else value


def present_config(config: Any) -> Any:
    """A configuration with present keys and values; any other content is returned unchanged."""
    if not isinstance(config, dict) or config.get("format") != "atp_tune.config/1":
        return config
    tables = {"prune": "prune", "calibration": "texts.calibration", "texts": "texts"}  # key here → key in a study file
    found = {name: config.get(name) for name in tables}
    now = {name: present_keys(part, tables[name]) for name, part in found.items() if isinstance(part, dict)}
    match found:
        case {"calibration": {"source": _, **text}, "prune": {"statistics": "sequential"}} if "every" not in text:
            now["prune"]["statistics"] = "block"
    now |= {name: _by_present_role(config[name]) for name in ("perplexity", "batches") if name in config}
    for name in ("baselines", "kl"):  # tables of such tables
        if isinstance(config.get(name), dict):
            now[name] = {of: _by_present_role(scores) for of, scores in config[name].items()}
    return {**config, **now, "format": "atp_tune.config/2"}


def _by_present_role(table: Any) -> Any:
    return {ROLES.get(role, role): value for role, value in table.items()} if isinstance(table, dict) else table


def _rows(table: str = "") -> dict[Names, Names]:
    """`KEYS` as tuples; for a `table`, only the rows that stay inside it, relative to it."""
    inside, present = (f"{table}.", f"{present_key(table)}.") if table else ("", "")
    return {
        tuple(former.removeprefix(inside).split(".")): tuple(now.removeprefix(present).split("."))
        for former, now in KEYS.items()
        if former.startswith(inside) and now.startswith(present)
    }


def _translated(key: str, rows: Mapping[Names, Names]) -> str:
    return ".".join(_renamed(tuple(key.split(".")), rows))


def _renamed(path: Names, rows: Mapping[Names, Names]) -> Names:
    """The path with its longest prefix in `rows` replaced."""
    for length in range(len(path), 0, -1):
        if path[:length] in rows:
            return rows[path[:length]] + path[length:]
    return path


def _leaves(data: Mapping[str, Any], depth: int, above: Names = ()) -> Iterator[tuple[Names, Any]]:
    """Paths and values down to `depth`; a deeper table is one value."""
    for key, value in data.items():
        if isinstance(value, dict) and value and depth > 1:
            yield from _leaves(value, depth - 1, (*above, key))
        else:
            yield (*above, key), value
