"""The facts (settings and contents) that a study's values depend on: stored once, then compared at each run."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from atp_tune.config.data import KINDS, is_local_text
from atp_tune.config.plugged import contents, split_source
from atp_tune.config.search import ACCURACY
from atp_tune.config.study import Study
from atp_tune.errors import UserError
from atp_tune.plan import searched_by, targets_in
from atp_tune.plugins import is_place, short_name
from atp_tune.pruners import SETTINGS
from atp_tune.storage.attributes import ValidatedStudy
from atp_tune.storage.progress import experimental, measured, trials_in

DTYPE = "model.dtype"
PRODUCTS = "model.products"  # where the caller has set another number format for them
OBJECTIVE = "search.objective"
PLUGINS = "plugins."  # before the name of a plug-in and `.content`, its hash
METRICS = {ACCURACY: "top-1 error"}  # what Optuna calls an objective, where it is not called so itself
PERPLEXITY = ("perplexity",)  # the objective, if the facts name none
SUFFIX = ".screen"  # of a screening's name, after its main study's
# Keys in which a screening differs from its main study.
CHANGED = ("prune.statistics", "texts.validation.stride", "search.trials", "search.stopper", "search.screen")
MIX = "--allow-device-change"
Facts = Mapping[str, Any]


def create_study(storage: BaseStorage, name: str, facts: Facts, any_dtype: bool = False) -> optuna.Study:
    """The study of this name, created with these facts if there is none; UserError if its facts differ.

    `any_dtype`: accept another number format.
    """
    objectives = stored_objectives(facts)
    minimise = [StudyDirection.MINIMIZE] * len(objectives)
    study = optuna.create_study(study_name=name, storage=storage, directions=minimise, load_if_exists=True)
    if is_new(study):
        if len(study.directions) != len(objectives):  # the process that created it died before it stored the facts
            raise UserError(f"study {name}: was begun with another {OBJECTIVE}; start another with --study-name NAME")
        with experimental():
            study.set_metric_names([METRICS.get(name, name) for name in objectives])  # for the axes of Optuna's plots
        study.set_user_attr("fingerprint", dict(facts))
    study = ValidatedStudy(name, study._storage)
    check_facts(study, facts, any_dtype=any_dtype)
    return study


def stored_bos(spec: Study, study: optuna.Study | None) -> bool | None:
    """Whether windows begin with BOS, by the study file, else the stored study; None (to be measured) without one."""
    if spec.bos is not None or study is None or is_new(study):
        return spec.bos
    return has_bos(study)


def facts_in(study: optuna.Study) -> dict[str, Any]:
    """The facts of a stored study; empty while it is new."""
    return dict(study.user_attrs.get("fingerprint", {}))


def has_bos(study: optuna.Study) -> bool:
    """Whether the windows of a stored study begin with BOS."""
    return bool(facts_in(study).get(BOS))


def stored_objectives(facts: Facts) -> tuple[str, ...]:
    """The objectives in a study's facts, in the order of its trials' values."""
    names, choices = facts.get(OBJECTIVE), (["kl"], ["perplexity", "kl"], ["accuracy"])
    objectives = tuple(names) if names in choices else PERPLEXITY
    targets = targets_in(facts)
    return (*objectives, searched_by(targets[0]).left) if len(targets) > 1 else objectives


def is_new(study: optuna.Study) -> bool:
    """Whether a study has neither facts nor trials: a process is creating it, or died while creating it."""
    return "fingerprint" not in study.user_attrs and not trials_in(study)


def take_plugins(study: optuna.Study, facts: Facts) -> None:
    """Takes over the hashes of changed plug-ins as long as no trial is measured: none of its values depends on them."""
    stored = facts_in(study)
    changed = {key: fact for key, fact in facts.items() if key.startswith(PLUGINS) and stored.get(key, fact) != fact}
    if changed and not measured(study):
        study.set_user_attr("fingerprint", {**stored, **changed})


def check_facts(study: optuna.Study, facts: Facts, partly: bool = False, any_dtype: bool = False) -> None:
    """UserError with the keys whose facts differ from the study's.

    `partly`: `facts` holds the study file's only, not the contents, which need the model. `any_dtype`: accept another
    number format if nothing else differs.
    """
    pairs = differences(study, facts, partly)
    is_dtype = [*pairs] == [DTYPE]
    if pairs and not (is_dtype and any_dtype):
        mix = f", or mix them in this one with {MIX}" if is_dtype else ""
        raise UserError(
            f"study {study.study_name}: {in_words(pairs)}. Put it back, or start another study with "
            f"--study-name NAME{mix}"
        )


def in_words(pairs: Mapping[str, tuple[str, str]]) -> str:
    """Facts that differ, with both values."""
    shown = "; ".join(f"{key} is {here}, was {there}" for key, (here, there) in list(pairs.items())[:3])
    return shown + (f"; and {len(pairs) - 3} more" if len(pairs) > 3 else "")


def differences(study: optuna.Study, facts: Facts, partly: bool = False) -> dict[str, tuple[str, str]]:
    """The facts that differ from the study's, each with the value here and the study's."""
    stored = facts_in(study)
    if partly:
        stored = {
            key: value
            for key, value in stored.items()
            if key in facts or not (key.endswith(".content") or key in (DTYPE, PRODUCTS, BOS))
        }
    keys = [key for key in sorted({*facts, *stored}) if facts.get(key) != stored.get(key)]
    return {key: (_shown(facts, key), _shown(stored, key)) for key in keys}


def check_device(study: optuna.Study, here: str) -> None:
    """UserError if this device (a trial's `device`) is of another kind than the study's first."""
    began, kind = first_device(study), device_kind(here)
    if began is not None and began != kind:
        raise UserError(
            f"study {study.study_name}: its trials ran on {began}, here is {kind}. Go on there, start another study "
            f"with --study-name NAME, or mix them in this one with {MIX}"
        )


def first_device(study: optuna.Study) -> str | None:
    """The kind of device of a study's first measured trial."""
    trials = [trial for trial in measured(study) if "device" in trial.user_attrs]
    first = min(trials, key=lambda trial: trial.number, default=None)
    return device_kind(first.user_attrs["device"]) if first else None


def device_kind(name: str) -> str:
    """A device's name without the number of threads, which does not change values."""
    return re.sub(r" \(\d+ threads\)$", "", name)


def stored_batches(owner: optuna.Study | FrozenTrial) -> dict[str, int]:
    """The batch sizes, in windows per text, with which a study's trials begin, or those at a trial's end."""
    return dict(owner.user_attrs.get("batches", {}))


def _shown(facts: Facts, key: str) -> str:
    return json.dumps(facts[key], ensure_ascii=False) if key in facts else "not set"


def is_screening(study: optuna.Study) -> bool:
    """Whether a study is the screening of another, which its attribute `screens` names, and has nothing to report."""
    return "screens" in study.user_attrs


# --- Facts of a study: the settings that determine the value of a trial, by dotted key.

Fact = str | int | float | bool | list[str] | list[float]

BOS = "texts.bos"  # stored as true or false, also if the study says "auto"
ROLES = ("calibration", "validation", "test")
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
    *(f"texts.{role}.{key}" for role in ROLES for key in ("stride", "shuffle")),
)  # fmt: skip


def facts(study: Study, folder: Path = Path()) -> dict[str, Fact]:
    """The settings that determine the value of a trial: studies with equal facts can share trials.

    Keys without a value are left out, and so are local sources, whose content hash is recorded elsewhere. Plug-ins are
    called by their short names, and `plugins.NAME.content` is the SHA-256 of their file. Relative sources and files
    start at `folder`.
    """
    flat = dict(_flat(study.model_dump(mode="json")))
    if BOS in flat:
        flat[BOS] = study.bos
    never = (*NOT_FACTS, *study.methods.unused)
    hidden = {key for key, value in flat.items() if value is None or key.startswith(never)}
    hidden |= {key for key, value in flat.items() if key.startswith(UNLESS_DEFAULT) and value == DEFAULTS[key]}
    if study.model.dtype == "auto":
        hidden.add("model.dtype")
    if is_local(study.model.source, folder):
        hidden.add("model.source")
    hidden |= {f"{key}.source" for key, data in study.data.sources.items() if is_local_text(data.source)}
    # The names of plug-ins, without their places, which differ between machines.
    texts = [(key, split_source(data.source)) for key, data in study.data.sources.items() if data.data == "text"]
    flat |= {
        "prune.pruners": list(study.prune.short_names),
        "allocation.names": list(study.allocation.short_names),
        "search.sampler": short_name(study.search.sampler),
        "search.score": study.score,
        **{f"{key}.source": f"{short_name(name)}:{rest}" for key, (name, rest) in texts if is_place(name)},
        **{f"plugins.{name}.content": digest for name, digest in contents(study, folder).items()},
    }
    return {key: value for key, value in flat.items() if key not in hidden}


def is_local(source: str, folder: Path) -> bool:
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


_TEXTS = {role: {"source": f"mixed:{kind}"} for role, kind in zip(ROLES, KINDS, strict=False)}
_SEARCH = {"trials": 1, "screen": {"trials": 2}}
_PLAIN = Study.model_validate({"sparsity": 0.5, "model": {"source": "-"}, "texts": _TEXTS, "search": _SEARCH})
DEFAULTS = dict(_flat(_PLAIN.model_dump(mode="json")))
