"""The final scores of a study: dense, uniform and best on the test text, also over draws of the calibration text.

The models that are pruned for it also continue prompts. Trials of a front have their test scores already: the
objective measures them while it has the pruned blocks, since all of them are compared.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import nan
from time import sleep
from typing import TYPE_CHECKING

import optuna

from atp_tune.allocations import is_fitted
from atp_tune.cache import alone_with
from atp_tune.errors import TrialError
from atp_tune.events import TrialStarted
from atp_tune.metrics.continuations import NAMES, PROMPTS
from atp_tune.plan import Plan
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
    from atp_tune.run.session import Session
    from atp_tune.scores import WindowScores
    from atp_tune.scores.evaluation import Block
    from atp_tune.search.answers import StudyAnswers
    from atp_tune.search.continuations import StudyContinuations
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
        texts = _Texts(run, study, context, is_missing)
        for name in unreported(study):
            store_test_scores(study, name, *_measure(run, study, context, space, name, texts))
        texts.complete(space)
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


class _Texts:
    """Continuations by dense, uniform and the best of each allocation, stored on the study once all of them are there.

    Of an image classifier answers on images, by dense, uniform and the best of all.
    """

    def __init__(self, run: "StudyRun", study: optuna.Study, context: "Session", is_missing: bool) -> None:
        """`is_missing`: numbers on the test text are; else the study ended without these texts, or has them."""
        asked, best = run.file.study.continuations, progress.best_trial(study)
        uniform = uniform_of(study, best)
        self._run, self._study, self._context = run, study, context
        self._best, self._uniform = best, uniform
        is_wanted = bool(is_missing and best and uniform and not self._known())
        self._names = {"dense": "dense"}
        if best and uniform:
            ranked = [] if run.file.study.interval else best_of_each(study)
            others = {str(trial.number): allocation_of(trial) for trial in ranked if not is_uniform(trial)}
            self._names |= {row: name for row, name in others.items() if name not in NAMES}
            self._names |= {str(best.number): "best", str(uniform.number): "uniform"}
        names = (*dict.fromkeys((*NAMES, *self._names.values())),)
        self.work = _work(run, context, is_wanted, (*PROMPTS, *asked.prompts), names)

    def name(self, row: str) -> str | None:
        """The model of a row of the test text, if it is to continue the prompts."""
        return self._names.get(row)

    def complete(self, space: Space) -> None:
        """Continues the prompts by models that were measured before, then stores all texts."""
        for row, name in self._names.items():
            if name in self.work.wanted:
                plan = None if row == "dense" else space.plan_of(self._study.trials[int(row)])
                self._run.watch(TrialStarted(f"continuations: {name}", plan if name == "best" else None))
                _begin(self._study, self._context, row)
                for _ in self.work.follow(name, _blocks(self._context, plan)):
                    pass
                self.work.say(name)
        if self._best and self._uniform and self._best.number == self._uniform.number:
            self.work.repeat("best", "uniform")
        found = self.work.result()
        if found and self._best:
            store(self._study, self._key, self._best.number, found.model_dump(mode="json"))

    @property
    def _key(self) -> str:
        return CONTINUATIONS if self._run.file.study.images is None else ANSWERS

    def _known(self) -> bool:
        if self._best is None:
            return False
        known = CONTINUATIONS in attached(self._study, self._best.number)
        return known or answers_of(self._study, self._best) is not None


def _work(
    run: "StudyRun", context: "Session", is_wanted: bool, prompts: Sequence[str], names: Sequence[str]
) -> "StudyContinuations | StudyAnswers":
    """What collects continuations or answers between the final scores; nothing unless it `is_wanted`."""
    from atp_tune.search.answers import StudyAnswers
    from atp_tune.search.continuations import StudyContinuations

    study = run.file.study
    if study.images is not None and is_wanted and study.continuations.tokens:
        return StudyAnswers(context, "validation" if study.images.test is None else "test")
    return StudyContinuations(context, prompts, study.continuations.tokens if is_wanted else 0, names)


def _measure(
    run: "StudyRun", study: optuna.Study, context: "Session", space: Space, name: str, texts: _Texts
) -> "WindowScores":
    """Scores of a trial, or of `dense`, on the test text (else the validation text), with KLs if minimised."""
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.scores import WindowScores

    trial = None if name == "dense" else study.trials[int(name)]
    if run.file.study.data.test is None:
        if trial is None:
            return WindowScores(study.user_attrs["dense"], [], study.user_attrs.get("dense_ranks", []))
        return WindowScores(trial.user_attrs["nlls"], *(trial.user_attrs.get(key, []) for key in ("kls", "ranks")))
    plan = None if trial is None else space.plan_of(trial)
    title = "test text:" if run.file.study.images is None else "test images:"
    title += f" trial {name}" if trial else " dense model"
    run.watch(TrialStarted(title, plan))
    _begin(study, context, name)
    kl, model = "kl" in run.file.study.search.objective and trial is not None, texts.name(name)
    with oom_as_user_error(title):
        found = context.all_scores(texts.work.follow(model, _blocks(context, plan)), "test", kl=kl)
    texts.work.say(model)
    return found


def _redrawn(
    run: "StudyRun", study: optuna.Study, context: "Session", space: Space, name: str, draw: int, anew: bool
) -> list[float]:
    """Window NLLs of a trial that another draw prunes; `anew`: a plan that is fitted is fitted to that draw.

    Draw 0 is the trial's own, but for a plan that is fitted anew to less than the study's own plan was.
    """
    from atp_tune.checkpoints.devices import oom_as_user_error

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
        return context.all_nlls(_blocks(drawn, plan), "validation" if spec.test is None else "test")


def _begin(study: optuna.Study, context: "Session", name: str) -> None:
    """Begins with the batch sizes of a trial's measurement, which affect its mask, or of `dense`."""
    trial = None if name == "dense" else study.trials[int(name)]
    own = fingerprint.batches_in(trial) if trial else {}
    context.begin({**fingerprint.batches_of(study), **own})


def _blocks(context: "Session", plan: Plan | None) -> Iterable["Block"]:
    """The blocks of a plan, or of the dense model for None."""
    return context.dense() if plan is None else ((block.index, block.weights) for block in context.prune(plan))
