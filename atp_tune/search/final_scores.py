"""The final scores of a study: dense, uniform and best on the test text, also over draws of the calibration text."""

import os
from time import sleep
from typing import TYPE_CHECKING

import optuna

from atp_tune.events import TrialStarted
from atp_tune.results.best_config import best_config
from atp_tune.results.summary import undrawn, unreported
from atp_tune.search.space import Space
from atp_tune.search.trial_loop import POLL
from atp_tune.storage import fingerprint, progress
from atp_tune.storage.process_identity import identity, is_alive
from atp_tune.storage.validation import TRIAL, checked

if TYPE_CHECKING:
    from atp_tune.search.context import TrialContext
    from atp_tune.search.runner import StudyRun

REPORTER = "reporter"  # system attribute of a study: the process that measures on the test text


def report(run: "StudyRun", study: optuna.Study, context: "TrialContext", space: Space) -> None:
    """Measures dense, uniform and the best of each allocation on the test text, and writes the best configuration.

    If `texts.calibration.draws` > 1, the trials are pruned with the other draws too. Each measurement is stored at
    once, in an attribute of its own: two hosts may report at the same moment.
    """
    draws = run.file.study.texts.calibration.draws
    _wait_for_reporter(run, study, draws)
    is_missing = bool(unreported(study) or undrawn(study, draws))
    if is_missing:
        study._storage.set_study_system_attr(study._study_id, REPORTER, identity())
    try:
        for name in unreported(study):
            nlls, kls = _measure(run, study, context, space, name)
            if kls:  # before the NLLs, which mark a trial as reported
                study.set_user_attr(f"test_kls:{name}", kls)
            study.set_user_attr(f"test_nlls:{name}", nlls)
        for draw, name in undrawn(study, draws):
            study.set_user_attr(f"draws:{name}:{draw}", _measure(run, study, context, space, name, draw)[0])
    finally:
        if is_missing:
            study._storage.set_study_system_attr(study._study_id, REPORTER, None)
    write_best(run, study)


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
    config = best_config(run.file, study, out)
    if not out.exists() or out.read_bytes() != config.to_json().encode():
        config.write(out)


def _measure(
    run: "StudyRun", study: optuna.Study, context: "TrialContext", space: Space, name: str, draw: int = 0
) -> tuple[list[float], list[float]]:
    """Window NLLs of a trial, or of `dense`, on the test text (else the validation text), and KLs if minimised.

    `draw`: the draw of the calibration text that prunes; without KLs where it is not the trial's own, 0. The batch
    sizes are those of the trial's measurement, which affect its mask.
    """
    from atp_tune.checkpoints.devices import oom_as_user_error

    texts, trial = run.file.study.texts, None if name == "dense" else study.trials[int(name)]
    if texts.test is None and not draw:
        if trial is None:
            return study.user_attrs["dense"], []
        return trial.user_attrs["nlls"], trial.user_attrs.get("kls", [])
    plan = None if trial is None else space.plan(trial.params)
    title = f"draw {draw + 1} of {texts.calibration.draws}:" if draw else "test text:"
    title += f" trial {name}" if trial else " dense model"
    run.watch(TrialStarted(title, plan))
    own = fingerprint.batches_in(trial, study.user_attrs.get("fingerprint", {})) if trial else {}
    context.begin({**fingerprint.batches_of(study), **own})
    drawn = context.drawn(draw) if draw else context
    blocks = context.dense() if plan is None else ((block.index, block.weights) for block in drawn.prune(plan))
    kl = "kl" in run.file.study.search.objective and trial is not None and not draw
    with oom_as_user_error(title):
        return context.all_scores(blocks, "validation" if texts.test is None else "test", kl=kl)
