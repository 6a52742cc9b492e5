import math
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pytest
import torch
from expect import parametrize
from families import setup_of
from optuna.exceptions import StorageInternalError
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState
from tinystudy import study_file

from atp_tune.errors import TrialError, UserError
from atp_tune.events import Event, Step, TrialStarted, ignore_events
from atp_tune.run.session import Session
from atp_tune.search.objective import Objective, estimate, find_measured, reasons
from atp_tune.search.runner import StudyRun, open_context
from atp_tune.search.space import Space, make_space
from atp_tune.storage.progress import identity

PARAMS = {"pruner": "wanda", "allocation": "atp", "beta": 0.1}


pytestmark = pytest.mark.usefixtures("without_warnings")


@pytest.fixture(scope="module")
def context(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_context(StudyRun(study_file(tiny_place), "tiny", None, ignore_events))


@pytest.fixture(scope="module")
def space(tiny_place: Path, context: Session) -> Space:
    study = study_file(tiny_place).study
    return make_space(study, context.budget(study.sparsity))


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


def ask(study: optuna.Study, space: Space, **params: Any) -> optuna.Trial:
    """A running trial of these parameters, which the objective may suggest again."""
    study.enqueue_trial({**PARAMS, **params})
    trial = study.ask()
    space.suggest(trial)
    return trial


def done(study: optuna.Study, space: Space, value: float | None, attributes: dict[str, Any], **params: Any) -> None:
    trial = ask(study, space, **params)
    for name, attribute in attributes.items():
        trial.set_user_attr(name, attribute)
    study.tell(trial, value, TrialState.COMPLETE if value is not None else TrialState.FAIL)


# --- one trial


def test_attributes_are_stored_as_soon_as_they_are_known(context: Session, space: Space, study: optuna.Study) -> None:
    """A process that dies leaves behind who it was and what it was doing."""
    trial, seen = ask(study, space), {}

    def watch(event: Event) -> None:
        if isinstance(event, TrialStarted | Step):
            seen.setdefault(type(event), dict(study.trials[0].user_attrs))

    Objective(context, space, False, watch)(trial)
    assert seen[TrialStarted] == identity()
    Objective(
        Session(context.folder, context.checkpoint, context.windows, setup_of(context.prune_settings, watch)),
        space,
        False,
        watch,
    )(ask(study, space, beta=0.05))
    assert set(study.trials[1].user_attrs) > {"plan", "host"}


# --- what was measured before


def measured_before(study: optuna.Study, space: Space, **params: Any) -> FrozenTrial | None:
    trial = ask(study, space, **params)
    return find_measured(trial, space.plan(trial.params))


@parametrize(
    ("value", "attributes", "found"),
    [
        (5.0, {}, True),
        (5.0, {"stopped_after": 2}, False),
        (None, {"failure": "out of memory"}, True),
        (None, {"lost": "its process died"}, False),
        (None, {}, False),
    ],
)
def test_what_counts_as_measured(
    space: Space, study: optuna.Study, value: float | None, attributes: dict[str, Any], found: bool
) -> None:
    done(study, space, value, attributes)
    assert (measured_before(study, space) is not None) == found


def test_a_third_time_is_answered_by_the_first(context: Session, space: Space, study: optuna.Study) -> None:
    objective = Objective(context, space, False, ignore_events)
    for _ in range(3):
        study.enqueue_trial(PARAMS)
        study.optimize(objective, n_trials=1)
    assert [trial.user_attrs.get("repeats") for trial in study.trials] == [None, 0, 0]
    assert len({trial.value for trial in study.trials}) == 1


# --- stopping


def test_an_estimate_is_the_best_mean_and_the_difference(space: Space, study: optuna.Study) -> None:
    """The windows that were seen are easy ones: a mean over them alone would be the lowest perplexity of all."""
    done(study, space, math.exp(2.0), {"nlls": [1.0, 1.5, 2.5, 3.0]})
    trial = ask(study, space, beta=0.2)
    assert estimate(trial, [1.25, 1.75]) == pytest.approx(math.exp(2.0 + 0.25))
    assert trial.user_attrs["stopped_after"] == 2


def test_an_estimate_is_never_made_from_an_estimate(space: Space, study: optuna.Study) -> None:
    """One that happens to lie below the best is no trial to compare with: it has seen a part of the windows."""
    done(study, space, math.exp(2.0), {"nlls": [1.0, 1.5, 2.5, 3.0]})
    done(study, space, math.exp(1.9), {"nlls": [1.1, 1.2], "stopped_after": 2}, beta=0.05)
    assert study.best_trial.number == 1
    assert estimate(ask(study, space, beta=0.2), [1.5, 2.0]) == pytest.approx(math.exp(2.5))


class Impatient(BasePruner):
    """Stops the second trial when it has reported its third group, whatever that is."""

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.number == 1 and trial.last_step == 2


def test_trials_are_stopped_at_the_same_groups_as_they_are_reported(
    context: Session, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context.batch("validation"), "windows", 2)
    study = optuna.create_study(pruner=Impatient())
    objective = Objective(context, space, True, ignore_events)
    for beta in (0.0, 0.26):
        study.enqueue_trial({**PARAMS, "beta": beta})
    study.optimize(objective, n_trials=2)
    uniform, hopeless = study.trials
    assert list(uniform.intermediate_values) == list(range(8))
    assert list(hopeless.intermediate_values) == [0, 1, 2]
    assert hopeless.user_attrs["stopped_after"] == 2 * 3 == len(hopeless.user_attrs["nlls"])
    difference = fmean(
        own - other for own, other in zip(hopeless.user_attrs["nlls"], uniform.user_attrs["nlls"], strict=False)
    )
    assert hopeless.value == pytest.approx(math.exp(fmean(uniform.user_attrs["nlls"]) + difference))
    assert hopeless.state == TrialState.COMPLETE
    assert {"realised", "errors", "seconds", "versions"} <= set(hopeless.user_attrs)


# --- why there is no value


@parametrize(
    ("error", "reason"),
    [
        (TrialError("Hessian not positive definite"), "Hessian not positive definite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
    ids=["its own", "cuda", "cpu", "python"],
)
def test_a_failure_is_stored(space: Space, study: optuna.Study, error: Exception, reason: str) -> None:
    trial = ask(study, space)
    with pytest.raises(TrialError) as caught, reasons(trial):
        raise error
    assert str(caught.value) == reason
    assert caught.value.__cause__ is error
    assert trial.user_attrs == {"failure": reason}


def test_an_interruption_is_stored(space: Space, study: optuna.Study) -> None:
    trial = ask(study, space)
    with pytest.raises(KeyboardInterrupt), reasons(trial):
        raise KeyboardInterrupt
    assert trial.user_attrs == {"lost": "interrupted"}


@parametrize("error", [RuntimeError("shapes"), ValueError("memory")], ids=repr)
def test_a_bug_ends_the_run_and_counts_as_the_trials_own(
    space: Space, study: optuna.Study, error: BaseException
) -> None:
    trial = ask(study, space)
    with pytest.raises(type(error)) as caught, reasons(trial):
        raise error
    assert caught.value is error
    assert trial.user_attrs == {"lost": "an error", "cut_off": {"crash": type(error).__name__, "alone": False}}


@parametrize("error", [UserError("disk full"), StorageInternalError(), SystemExit(1)], ids=repr)
def test_what_is_no_trials_fault_says_nothing_of_it(space: Space, study: optuna.Study, error: BaseException) -> None:
    trial = ask(study, space)
    with pytest.raises(type(error)), reasons(trial):
        raise error
    assert trial.user_attrs == {}
