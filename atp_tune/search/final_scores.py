"""The final scores of a study: dense, uniform and best on the test text, also over draws of the calibration text.

The models that are pruned for it also continue prompts. Trials of a front have their test scores already: the
objective measures them while it has the pruned blocks, since all of them are compared.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from math import nan
from time import sleep
from typing import TYPE_CHECKING, Any

import optuna

from atp_tune.allocations import is_fitted
from atp_tune.cache import alone_with
from atp_tune.errors import TrialError
from atp_tune.events import TrialStarted
from atp_tune.metrics.continuations import NAMES, PROMPTS
from atp_tune.results.annotations import Key, answers_of, attached, store
from atp_tune.results.best_config import best_config
from atp_tune.results.summary import fits_anew, undrawn, unreported
from atp_tune.results.trials import allocation_of, best_of_each, is_uniform, uniform_of
from atp_tune.search.space import Space
from atp_tune.search.trial_loop import POLL
from atp_tune.storage import fingerprint, progress
from atp_tune.storage.process_identity import identity, is_alive
from atp_tune.storage.validation import TRIAL, checked

if TYPE_CHECKING:
    from atp_tune.run.observers import LeftOut
    from atp_tune.run.session import Session
    from atp_tune.scores import WindowScores
    from atp_tune.search.runner import StudyRun

CONTINUATIONS: Key = "continuations"  # user attribute of a study: texts by trial
ANSWERS = "answers"  # the same of an image classifier: answers on test images by trial
REPORTER = "reporter"  # system attribute of a study: the process that measures on the test text


def report(run: "StudyRun", study: optuna.Study, context: "Session", space: Space) -> None:
    """Measures dense, uniform and the best of each allocation on the test text, and writes the best configuration.

    If `texts.calibration.draws` > 1, the trials are pruned with the other draws too; plans that are fitted to the
    calibration text are fitted anew to each draw's own. Each measurement is stored at once, in an attribute of its own:
    two hosts may report at the same moment.
    """
    draws = run.file.study.data.calibration.draws
    _wait_for_reporter(run, study, draws)
    is_missing = bool(unreported(study) or undrawn(study, draws))
    if is_missing:
        study._storage.set_study_system_attr(study._study_id, REPORTER, identity())
    try:
        names, shown = _shown(run, study, context, is_missing)
        for row in unreported(study):
            store_test_scores(study, row, *_measure(run, study, context, space, row, names.get(row, ""), shown))
        _complete(run, study, context, space, names, shown)
        anew = fits_anew(study)
        for draw, name in undrawn(study, draws):
            try:
                nlls = _redrawn(run, study, context, space, name, draw, anew)
            except TrialError as error:  # of a descent: NaN, which ends the study, and has no spread over draws
                run.note(f"draw {draw + 1} of trial {name} gives no number: {error}; its spread over draws is left out")
                nlls = [nan] * len(study.user_attrs["test_nlls"][name])
            study.set_user_attr(f"refits:{name}:{draws}:{draw}" if anew else f"draws:{name}:{draw}", nlls)
            if anew:
                fitted_to = {**study.user_attrs.get("fitted_to", {}), str(draws): list(context.fitted_to)}
                study.set_user_attr("fitted_to", fitted_to)
    finally:
        if is_missing:
            study._storage.set_study_system_attr(study._study_id, REPORTER, None)
    write_best(run, study)


def store_test_scores(study: optuna.Study, name: str, nlls: list[float], kls: list[float], ranks: list[int]) -> None:
    """Stores the NLLs, KLs and ranks of a trial, or of `dense`, on the test items."""
    for key, found in (("test_kls", kls), ("test_ranks", ranks)):
        if found:  # before the NLLs, which mark a trial as reported
            study.set_user_attr(f"{key}:{name}", found)
    study.set_user_attr(f"test_nlls:{name}", nlls)


def _wait_for_reporter(run: "StudyRun", study: optuna.Study, draws: int) -> None:
    """Waits while another process of this host measures the test text: two may reach the total together."""
    is_noted = False
    while (unreported(study) or undrawn(study, draws)) and _is_reported(study):
        if not is_noted:
            run.note("waiting for the numbers on the test text, which another process measures")
        is_noted = True
        sleep(POLL)


def _is_reported(study: optuna.Study) -> bool:
    """Whether another live process of this host measures the test text; False for processes of other hosts."""
    other = study._storage.get_study_system_attrs(study._study_id).get(REPORTER)
    return isinstance(other, dict) and other.get("pid") != os.getpid() and is_alive(checked(other, TRIAL))


def write_best(run: "StudyRun", study: optuna.Study) -> None:
    """Writes the best configuration unless the file has it: the last run may have been killed before it wrote."""
    if not run.writes or progress.best_trial(study) is None:
        return
    out = run.file.best_of(run.name)
    with alone_with(out):
        config = best_config(run.file, study, out)
        if not out.exists() or out.read_bytes() != config.to_json().encode():
            config.write(out)


def _shown(
    run: "StudyRun", study: optuna.Study, context: "Session", is_missing: bool
) -> tuple[dict[str, str], "LeftOut | None"]:
    """The models that continue prompts, by row of the test text, and what collects that; None if nothing does.

    These are dense, uniform and the best of each allocation; of an image classifier dense, uniform and the best of all
    answer on images. `is_missing`: numbers on the test text are; else the study ended without these texts, or has them.
    """
    from atp_tune.inputs import KINDS
    from atp_tune.run.observers import ImageAnswers, LeftOut, Prompts, can_keep

    spec, best = run.file.study, progress.best_trial(study)
    asked, uniform = spec.continuations, uniform_of(study, best)
    if best is None or uniform is None:
        return {}, None
    known = CONTINUATIONS in attached(study, best.number) or answers_of(study, best) is not None
    if not is_missing or known or not asked.tokens:
        return {}, None
    ranked = [] if spec.interval else best_of_each(study)
    others = {str(trial.number): allocation_of(trial) for trial in ranked if not is_uniform(trial)}
    names = {"dense": "dense", **{row: name for row, name in others.items() if name not in NAMES}}
    names |= {str(best.number): "best", str(uniform.number): "uniform"}
    if spec.images is not None:
        work: Any = ImageAnswers("validation" if spec.data.test is None else "test")
        return names, LeftOut(work, NAMES, "answers on images", context.watch)
    if context.inputs is not KINDS["tokens"]:
        return {}, None
    work = Prompts((*PROMPTS, *asked.prompts), asked.tokens, "memory")
    shown = LeftOut(work, tuple(dict.fromkeys((*NAMES, *names.values()))), "continuations", context.watch)
    if not can_keep(context.checkpoint):
        shown.leave_out("the model leaves no room for a pruned copy; `tune.py generate` makes them")
    return names, shown


def _complete(
    run: "StudyRun",
    study: optuna.Study,
    context: "Session",
    space: Space,
    names: Mapping[str, str],
    shown: "LeftOut | None",
) -> None:
    """Shows the models that were measured before, then stores what all of them wrote, or saw."""
    if shown is None:
        return
    for row, name in names.items():
        if name in shown.wanted:
            plan = None if row == "dense" else space.plan_of(study.trials[int(row)])
            run.watch(TrialStarted(f"continuations: {name}", plan if name == "best" else None))
            _begin(study, context, row)
            context.measure(plan, [shown], name)
    shown.repeat("best", "uniform")  # one trial may be both
    best, found = progress.best_trial(study), shown.result()
    if found and best:
        key = CONTINUATIONS if run.file.study.images is None else ANSWERS
        store(study, key, best.number, found.model_dump(mode="json"))


def _measure(
    run: "StudyRun",
    study: optuna.Study,
    context: "Session",
    space: Space,
    row: str,
    name: str,
    shown: "LeftOut | None",
) -> "WindowScores":
    """Scores of a trial, or of `dense`, on the test text (else the validation text), with KLs if minimised.

    `name`: of its model, if that is shown too.
    """
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.run.observers import RoleScores
    from atp_tune.scores import WindowScores

    trial = None if row == "dense" else study.trials[int(row)]
    if run.file.study.data.test is None:
        if trial is None:
            return WindowScores(study.user_attrs["dense"], [], study.user_attrs.get("dense_ranks", []))
        return WindowScores(trial.user_attrs["nlls"], *(trial.user_attrs.get(key, []) for key in ("kls", "ranks")))
    plan = None if trial is None else space.plan_of(trial)
    title = "test text:" if run.file.study.images is None else "test images:"
    title += f" trial {row}" if trial else " dense model"
    run.watch(TrialStarted(title, plan))
    _begin(study, context, row)
    scores = RoleScores("test", "kl" in run.file.study.search.objective and trial is not None)
    with oom_as_user_error(title):
        context.measure(plan, [scores, *([shown] if shown else [])], name)
    return scores.found[name]


def _redrawn(
    run: "StudyRun", study: optuna.Study, context: "Session", space: Space, name: str, draw: int, anew: bool
) -> list[float]:
    """Window NLLs of a trial that another draw prunes; `anew`: a plan that is fitted is fitted to that draw.

    Draw 0 is the trial's own, but for a plan that is fitted anew to less than the study's own plan was.
    """
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.run.observers import RoleScores

    spec, trial = run.file.study.data, study.trials[int(name)]
    is_refitted = anew and is_fitted(allocation_of(trial))
    if not (draw or (is_refitted and context.is_short)):
        return list(study.user_attrs["test_nlls"][name])
    plan, drawn = space.plan_of(trial), context.drawn(draw)
    title = f"draw {draw + 1} of {spec.calibration.draws}: trial {name}"
    run.watch(TrialStarted(title, plan))
    _begin(study, context, name)
    with oom_as_user_error(title):
        if is_refitted:
            plan = replace(space, budget=drawn.budget(space.budget.target)).plan(trial.params)
        scores = RoleScores("validation" if spec.test is None else "test")
        return list(drawn.measure(plan, [scores])[0].nlls)


def _begin(study: optuna.Study, context: "Session", name: str) -> None:
    """Begins with the batch sizes of a trial's measurement, which affect its mask, or of `dense`."""
    trial = None if name == "dense" else study.trials[int(name)]
    own = fingerprint.batches_in(trial) if trial else {}
    context.begin({**fingerprint.batches_of(study), **own})
