"""The end of a study: dense, uniform and best on the test text, once, also on other draws of the calibration text."""

import os
from time import sleep
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial

from atp_tune.events import TrialStarted
from atp_tune.results.best_config import best_config
from atp_tune.results.summary import undrawn, unreported
from atp_tune.search.space import Space
from atp_tune.search.study_run import StudyRun
from atp_tune.search.trial_loop import POLL
from atp_tune.storage import fingerprint, ranking
from atp_tune.storage.process_identity import identity, is_alive
from atp_tune.storage.validation import TRIAL, checked

if TYPE_CHECKING:
    from atp_tune.search.context import TrialContext

REPORTER = "reporter"  # system attribute of a study: the process that measures the test text


def report(run: StudyRun, study: optuna.Study, context: "TrialContext", space: Space) -> None:
    """Measures dense, uniform and the best of each allocation on the test text, once, those also on other draws of
    the calibration text if there are to be some, and writes the best down.

    Each measurement is stored at once, and by itself: two hosts may do this at the same moment.
    """
    draws = run.file.study.texts.calibration.draws
    _wait_for_reporter(run, study, draws)
    is_missing = bool(unreported(study) or undrawn(study, draws))
    if is_missing:
        study._storage.set_study_system_attr(study._study_id, REPORTER, identity())
    try:
        for name in unreported(study):
            nlls, kls = _report_scores(run, study, context, space, name)
            if kls:  # first: what has NLLs is not measured again
                study.set_user_attr(f"test_kls:{name}", kls)
            study.set_user_attr(f"test_nlls:{name}", nlls)
        for draw, name in undrawn(study, draws):
            study.set_user_attr(f"draws:{name}:{draw}", _drawn_nlls(run, study, context, space, draw, name))
    finally:
        if is_missing:
            study._storage.set_study_system_attr(study._study_id, REPORTER, None)
    write_best(run, study)


def _wait_for_reporter(run: StudyRun, study: optuna.Study, draws: int) -> None:
    """Leaves the test text to another process of this host that measures it: two may end a study together."""
    told = False
    while (unreported(study) or undrawn(study, draws)) and _is_reported(study):
        if not told:
            run.note("waiting for the numbers on the test text, which another process measures")
        told = True
        sleep(POLL)


def _is_reported(study: optuna.Study) -> bool:
    """Whether another process of this host measures the test text; what others do cannot be known from here."""
    other = study._storage.get_study_system_attrs(study._study_id).get(REPORTER)
    return isinstance(other, dict) and other.get("pid") != os.getpid() and is_alive(checked(other, TRIAL))


def write_best(run: StudyRun, study: optuna.Study) -> None:
    """Writes the best configuration down, unless it is there: a run may have been killed just before it was."""
    if not run.writes or ranking.best_trial(study) is None:
        return
    out = run.file.best_of(run.name)
    config = best_config(run.file, study, out)
    if not out.exists() or out.read_bytes() != config.to_json().encode():
        config.write(out)


def _report_scores(
    run: StudyRun, study: optuna.Study, context: "TrialContext", space: Space, name: str
) -> tuple[list[float], list[float]]:
    """Window NLLs on the test text, and KLs if the study minimises them; with the paper's protocol the search's."""
    from atp_tune.checkpoints.devices import oom_as_user_error

    dense = name == "dense"
    trial = None if dense else study.trials[int(name)]
    if run.file.study.texts.test is None:
        if trial is None:
            return study.user_attrs["dense"], []
        return trial.user_attrs["nlls"], trial.user_attrs.get("kls", [])
    plan = None if trial is None else space.plan(trial.params)
    title = f"report: {'dense model' if dense else f'trial {name}'}"
    run.watch(TrialStarted(title, plan))
    _begin_as(study, trial, context)
    pruned = None if plan is None else ((block.index, block.weights) for block in context.prune(plan))
    with oom_as_user_error(title):
        return context.all_scores(
            pruned or context.dense(), "test", kl="kl" in run.file.study.search.objective and not dense
        )


def _drawn_nlls(
    run: StudyRun, study: optuna.Study, context: "TrialContext", space: Space, draw: int, name: str
) -> list[float]:
    """Window NLLs of a trial's plan on the text that reports, pruned by another draw of the calibration text."""
    from atp_tune.checkpoints.devices import oom_as_user_error

    trial, draws = study.trials[int(name)], run.file.study.texts.calibration.draws
    plan, title = space.plan(trial.params), f"draw {draw + 1} of {draws}: trial {name}"
    run.watch(TrialStarted(title, plan))
    _begin_as(study, trial, context)
    pruned = ((block.index, block.weights) for block in context.drawn(draw).prune(plan))
    with oom_as_user_error(title):
        return context.all_nlls(pruned, "validation" if run.file.study.texts.test is None else "test")


def _begin_as(study: optuna.Study, trial: FrozenTrial | None, context: "TrialContext") -> None:
    """Begins in the batches in which a trial was measured, which decide its mask, or in its study's."""
    own = fingerprint.batches_in(trial, study.user_attrs.get("fingerprint", {})) if trial else {}
    context.begin({**fingerprint.batches_of(study), **own})
