"""The final scores of a study: dense, uniform and best on the test text, also over draws of the calibration text.

The models that are pruned for it also continue prompts. Trials of a front have their test scores already: the
objective measures them while it has the pruned blocks, since all of them are compared.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from time import sleep
from typing import TYPE_CHECKING, Any

import optuna

from atp_tune.allocations import is_fitted
from atp_tune.errors import TrialError
from atp_tune.events import TrialStarted
from atp_tune.measures import MEASURES
from atp_tune.metrics import NAMES, PROMPTS
from atp_tune.results.annotations import Key, answers_of, attached, store
from atp_tune.results.goals import best_trial, goal_in
from atp_tune.results.results import allocation_of, is_uniform, uniform_of
from atp_tune.results.status import best_config
from atp_tune.results.summary import fits_anew, undrawn, unreported
from atp_tune.search.space import Space
from atp_tune.search.trial_loop import POLL
from atp_tune.storage import fingerprint
from atp_tune.storage.attributes import TRIAL, checked
from atp_tune.storage.process import identity, is_alive
from atp_tune.utils.cache import alone_with

if TYPE_CHECKING:
    from atp_tune.run.observers import LeftOut, Observer
    from atp_tune.run.session import Session
    from atp_tune.scores import Scores
    from atp_tune.search.runner import StudyRun

CONTINUATIONS: Key = "continuations"  # user attribute of a study: texts by trial
ANSWERS = "answers"  # the same of an image classifier: answers on test images by trial
REPORTER = "reporter"  # system attribute of a study: the process that measures on the test text


def report(run: "StudyRun", study: optuna.Study, session: "Session", space: Space) -> None:
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
        FinalScores(run, study, session, space).measure(draws, is_missing)
    finally:
        if is_missing:
            study._storage.set_study_system_attr(study._study_id, REPORTER, None)
    write_best(run, study)


@dataclass(frozen=True)
class FinalScores:
    """The final measurements of a study, by row of the test text: numbers of trials, and `dense`."""

    run: "StudyRun"
    study: optuna.Study
    session: "Session"
    space: Space

    def measure(self, draws: int, is_missing: bool) -> None:
        """Measures and stores what is missing; `is_missing`: a number on the test text, or in a draw of it, is."""
        study, (names, shown) = self.study, self._shown() if is_missing else ({}, None)
        for row in unreported(study):
            store_test_scores(study, row, self._on_test_text(row, names.get(row, ""), shown))
        if shown is not None:
            self._complete(names, shown)
        anew = fits_anew(study)
        for draw, row in undrawn(study, draws):
            try:
                nlls = self._redrawn(row, draw, anew)
            except TrialError as error:  # of a descent: NaN, which ends the study, and has no spread over draws
                said = f"draw {draw + 1} of trial {row} gives no number: {error}; its spread over draws is left out"
                self.run.note(said)
                nlls = [nan] * len(study.user_attrs["test_nlls"][row])
            study.set_user_attr(f"refits:{row}:{draws}:{draw}" if anew else f"draws:{row}:{draw}", nlls)
            if anew:
                fitted_to = {**study.user_attrs.get("fitted_to", {}), str(draws): list(self.session.fitted_to)}
                study.set_user_attr("fitted_to", fitted_to)

    def _shown(self) -> "tuple[dict[str, str], LeftOut | None]":
        """The models that continue prompts, by row, and what collects that; None if nothing does, or it is known.

        These are dense, uniform and the best of each allocation; of an image classifier dense, uniform and the best of
        all answer on images.
        """
        from atp_tune.inputs import KINDS
        from atp_tune.run.observers import ImageAnswers, LeftOut, Prompts, can_keep

        study, session, spec = self.study, self.session, self.run.file.study
        asked, best = spec.continuations, best_trial(study)
        uniform = uniform_of(study, best)
        if best is None or uniform is None or not asked.tokens:
            return {}, None
        if CONTINUATIONS in attached(study, best.number) or answers_of(study, best) is not None:
            return {}, None
        ranked = goal_in(study).rivals()
        others = {str(trial.number): allocation_of(trial) for trial in ranked if not is_uniform(trial)}
        names = {"dense": "dense", **{row: name for row, name in others.items() if name not in NAMES}}
        names |= {str(best.number): "best", str(uniform.number): "uniform"}
        if spec.images is not None:
            work: Any = ImageAnswers("validation" if spec.data.test is None else "test")
            return names, LeftOut(work, NAMES, "answers on images", session.watch)
        if session.inputs is not KINDS["tokens"]:
            return {}, None
        work = Prompts((*PROMPTS, *asked.prompts), asked.tokens, "memory")
        shown = LeftOut(work, tuple(dict.fromkeys((*NAMES, *names.values()))), "continuations", session.watch)
        if not can_keep(session.checkpoint):
            shown.leave_out("the model leaves no room for a pruned copy; `tune.py generate` makes them")
        return names, shown

    def _complete(self, names: Mapping[str, str], shown: "LeftOut") -> None:
        """Shows the models that were measured before, then stores what all of them wrote, or saw."""
        for row, name in names.items():
            if name in shown.wanted:
                self._pass(row, f"continuations: {name}", [shown], name)
        shown.repeat("best", "uniform")  # one trial may be both
        best, found = best_trial(self.study), shown.result()
        if found and best:
            key = CONTINUATIONS if self.run.file.study.images is None else ANSWERS
            store(self.study, key, best.number, found.model_dump(mode="json"))

    def _on_test_text(self, row: str, name: str, shown: "LeftOut | None") -> "Scores":
        """Scores on the test text, or images (else the validation text), with KLs of a trial if minimised.

        `name`: of the row's model, if that is shown too.
        """
        from atp_tune.run.observers import RoleScores

        spec, is_dense = self.run.file.study, row == "dense"
        if spec.data.test is None:
            known = self.study.user_attrs if is_dense else self.study.trials[int(row)].user_attrs
            names = (
                {"dense": "nlls", "dense_ranks": "ranks"}
                if is_dense
                else {by.items: by.items for by in MEASURES.values()}
            )
            return {items: list(known[key]) for key, items in names.items() if key in known}
        title = f"test {spec.data.validation.data}: {'dense model' if is_dense else f'trial {row}'}"
        scores = RoleScores("test", "kl" in spec.search.objective and not is_dense)
        self._pass(row, title, [scores, *([shown] if shown else [])], name)
        return scores.found[name]

    def _redrawn(self, row: str, draw: int, anew: bool) -> list[float]:
        """Window NLLs of a trial that another draw prunes; `anew`: a plan that is fitted is fitted to that draw.

        Draw 0 is the trial's own, but for a plan that is fitted anew to less than the study's own plan was.
        """
        from atp_tune.run.observers import RoleScores

        spec = self.run.file.study.data
        is_refitted = anew and is_fitted(allocation_of(self.study.trials[int(row)]))
        if not (draw or (is_refitted and self.session.is_short)):
            return list(self.study.user_attrs["test_nlls"][row])
        scores = RoleScores("validation" if spec.test is None else "test")
        title = f"draw {draw + 1} of {spec.calibration.draws}: trial {row}"
        self._pass(row, title, [scores], "", self.session.drawn(draw), is_refitted)
        return scores.found[""]["nlls"]

    def _pass(
        self,
        row: str,
        title: str,
        observers: "Sequence[Observer[Any]]",
        name: str,
        drawn: "Session | None" = None,
        is_refitted: bool = False,
    ) -> None:
        """Passes the blocks of a row's model to observers, with the batch sizes of its measurement.

        Those affect its mask. `drawn`: prunes it, and its plan is fitted to that draw if it `is_refitted`.
        """
        from atp_tune.checkpoints.devices import oom_as_user_error

        trial = None if row == "dense" else self.study.trials[int(row)]
        plan = self.space.plan_of(trial) if trial else None
        self.run.watch(TrialStarted(title, plan))
        own = fingerprint.batches_in(trial) if trial else {}
        self.session.begin({**fingerprint.batches_of(self.study), **own})
        session = drawn or self.session
        with oom_as_user_error(title):
            if is_refitted and trial:
                target = self.space.budget.target
                plan = replace(self.space, budget=session.budget(target)).plan(trial.params)
            session.measure(plan, observers, name)


def store_test_scores(study: optuna.Study, name: str, scores: "Scores") -> None:
    """Stores the scores of a trial, or of `dense`, on the test items."""
    for key in sorted(scores, key="nlls".__eq__):  # the NLLs last, which mark a trial as reported
        study.set_user_attr(f"test_{key}:{name}", scores[key])


def _wait_for_reporter(run: "StudyRun", study: optuna.Study, draws: int) -> None:
    """Waits while another live process of this host measures the test text: two may reach the total together."""
    is_noted = False
    while unreported(study) or undrawn(study, draws):
        other = study._storage.get_study_system_attrs(study._study_id).get(REPORTER)
        if not isinstance(other, dict) or other.get("pid") == os.getpid() or not is_alive(checked(other, TRIAL)):
            return
        if not is_noted:
            run.note("waiting for the numbers on the test text, which another process measures")
        is_noted = True
        sleep(POLL)


def write_best(run: "StudyRun", study: optuna.Study) -> None:
    """Writes the best configuration unless the file has it: the last run may have been killed before it wrote."""
    if not run.writes or best_trial(study) is None:
        return
    out = run.file.best_of(run.name)
    with alone_with(out):
        config = best_config(run.file, study, out)
        if not out.exists() or out.read_bytes() != config.to_json().encode():
            config.write(out)
