"""Facts of a study: the settings that determine the value of a trial, by dotted key."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from atp_tune.config.data import Text, is_local_text
from atp_tune.config.plugged import contents, parts_of
from atp_tune.config.prune import PruneConfig
from atp_tune.config.search import NEXT_TOKEN, ScreenConfig
from atp_tune.config.study import Study
from atp_tune.plugins import is_place, short_name
from atp_tune.pruners import SETTINGS

Fact: TypeAlias = str | int | float | bool | list[str] | list[float]

BOS = "texts.bos"  # stored as true or false, also if the study says "auto"
# These keys do not change the value of a trial.
NOT_FACTS = (
    "description", "storage", "device", "search.trials", "search.early_termination", "search.screen.trials",
    "model.allow_pickle", "model.offload", "texts.calibration.draws",
    "continuations", "limit", "images.calibration.draws", "recover", "speed",
)  # fmt: skip
UNLESS_DEFAULT = (  # these are facts only if they differ from their defaults: few studies set them
    "prune.pattern", *(f"prune.{name}." for name in SETTINGS if name != "sparsegpt"), "model.trust_remote_code",
    "model.prune", "prune.refine", "prune.gradient_at", "prune.loss", "prune.channels.",
    "search.screen.", "search.objective", "search.score", "quantize.act_order",
    *(f"texts.{role}.{key}" for role in ("calibration", "validation", "test") for key in ("stride", "shuffle")),
)  # fmt: skip


def facts(study: Study, folder: Path = Path()) -> dict[str, Fact]:
    """The settings that determine the value of a trial: studies with equal facts can share trials.

    Keys without a value are left out, and so are local sources, whose content hash is recorded elsewhere. Plug-ins are
    called by their short names, and `plugins.NAME.content` is the SHA-256 of their file. Relative sources and files
    start at `folder`.
    """
    flat = dict(_flat(study.model_dump(mode="json")))
    hidden = {key for key, value in flat.items() if value is None or key.startswith(NOT_FACTS)}
    if study.bits is None:
        hidden |= {key for key in flat if key.startswith("quantize.")}
    elif study.by_bits:
        hidden |= {"prune.pruners", *(key for key in flat if key.startswith("prune.sparsegpt."))}
    hidden |= {key for key, value in flat.items() if key.startswith(UNLESS_DEFAULT) and value == DEFAULTS[key]}
    if study.model.dtype == "auto":
        hidden.add("model.dtype")
    if is_local(study.model.source, folder):
        hidden.add("model.source")
    hidden |= {f"{key}.source" for key, data in study.data.sources.items() if is_local_text(data.source)}
    flat |= _short(study) | {f"plugins.{name}.content": digest for name, digest in contents(study, folder).items()}
    flat[BOS] = study.bos
    if study.bos is None or study.images is not None:
        hidden.add(BOS)
    return {key: value for key, value in flat.items() if key not in hidden}


def _short(study: Study) -> dict[str, Any]:
    """The names of plug-ins, without their places, which differ between machines."""
    texts = [(key, parts_of(data.source)) for key, data in study.data.sources.items() if data.data == "text"]
    return {
        "prune.pruners": list(study.prune.short_names),
        "allocation.names": list(study.allocation.short_names),
        "search.sampler": short_name(study.search.sampler),
        "search.score": study.score,
        **{f"{key}.source": f"{short_name(name)}:{rest}" for key, (name, rest) in texts if is_place(name)},
    }


def is_local(source: str, folder: Path = Path()) -> bool:
    """Whether the source of a model is a local folder or file; relative paths start at `folder`."""
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        return True
    try:
        return (folder / source).is_dir()
    except OSError:  # a name too long for a file
        return False


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


DEFAULTS = {
    **dict(_flat(PruneConfig().model_dump(mode="json"), "prune.")),
    **dict(_flat(ScreenConfig(trials=1).model_dump(mode="json"), "search.screen.")),
    "model.trust_remote_code": False,
    "model.prune": ["language"],
    "search.objective": ["perplexity"],
    "search.score": NEXT_TOKEN,
    "quantize.act_order": False,
    **{
        f"texts.{role}.{key}": Text.model_fields[key].default
        for role in ("calibration", "validation", "test")
        for key in ("stride", "shuffle")
    },
}
