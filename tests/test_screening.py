import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from expect import refused, slow
from families import nlls_of
from preloaded import held
from test_runner import states
from test_space import SIZES, space_for, study_of
from tinystudy import LONG, CommandLine, finish, run, settings, start, stored, study_file, wait_for

from atp_tune.blocks.prune_pass import Pass
from atp_tune.config.best import read_config
from atp_tune.events import TrialEnded, TrialStarted
from atp_tune.results.summary import summarise
from atp_tune.run import dense_model
from atp_tune.run.session import Session
from atp_tune.search import runner
from atp_tune.search.goals import APART, confirmed
from atp_tune.search.samplers import levelled
from atp_tune.storage.progress import counted, measured

SCREEN = ("search.screen.trials=5", "search.screen.stride=3", "search.screen.confirm=2")
INSIDE = ("search.sampler=gp", *SCREEN)


class Run(NamedTuple):
    """A screening of five and its study of three, and what happened in them."""

    place: Path
    events: list[Any]
    passes: list[tuple[str, int]]  # the statistics that each pass over the blocks began with, and its windows
    measured: list[int]  # a call for each block whose statistics were measured apart from a pass


@pytest.fixture(scope="module")
def ran(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """To be read only."""
    ran = Run(tmp_path_factory.mktemp("screened") / "tiny", [], [], [])
    original, measure = Pass.run, dense_model.measure_and_advance

    def run_pass(self: Pass, plan: Any, hidden: Any, items: Any) -> Any:
        ran.passes.append(("dense" if self.dense_statistics is not None else "block", len(hidden)))
        return original(self, plan, hidden, items)

    shutil.copytree(tiny_place, ran.place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(ran.place.parent / "cache"))
        patch.setattr(Pass, "run", run_pass)
        patch.setattr(dense_model, "measure_and_advance", lambda *args: ran.measured.append(1) or measure(*args))
        run(ran.place, *INSIDE, watch=ran.events.append)
    return ran


@slow
def test_a_study_is_screened_before_it_begins(ran: Run) -> None:
    place, events, study = ran.place, ran.events, stored(ran.place)
    screened = stored(place, "tiny.screen")
    assert states(screened) == ["COMPLETE"] * 5
    assert [len(t.user_attrs["nlls"]) for t in screened.trials] == [6] * 5  # of 16 windows the first, fourth, …
    assert all(t.user_attrs["errors"] == [] for t in screened.trials)
    bound = screened.trials[0].distributions["beta"].high
    best = [t.params for t in measured(screened) if t.params["beta"] > APART * bound]  # uniform is measured anyway
    assert study.trials[0].params == best[0]
    assert study.trials[2].params["beta"] == 0.0
    assert states(study) == ["COMPLETE"] * 3
    assert study.user_attrs["total"] == 3
    titles = [event.title for event in events if isinstance(event, TrialStarted)]
    screening, trials = [f"screening {k}" for k in range(5)], [f"trial {k}" for k in range(3)]
    assert titles[:10] == ["dense model", *screening, *trials, "dense model"]
    assert len(study.user_attrs["dense"]) == 16
    assert [event.what for event in events if isinstance(event, TrialEnded)] == ["screening"] * 5 + ["trial"] * 3


@slow
def test_a_screening_that_was_killed_goes_on(place: Path) -> None:
    words = (
        "--study",
        place / "tiny.toml",
        *settings(*INSIDE, "search.screen.trials=40", "texts.validation.nsamples=250"),
    )
    process = start(*words, inject=partial(held, place, 3))
    wait_for(place / "tiny.db", 3, process)
    process.kill()
    process.communicate()
    assert stored(place, "tiny.screen").trials and not stored(place).trials
    again = finish(start(*words, *settings("search.screen.trials=6")))
    assert again.code == 0
    assert [t.state.name for t in stored(place).trials] == ["COMPLETE"] * 3


@slow
def test_two_workers_share_a_screening(place: Path) -> None:
    words = ("--study", place / "tiny.toml", *settings(*INSIDE, *LONG, "search.screen.trials=24"))
    answers = [finish(process) for process in [start(*words), start(*words)]]
    assert [answer.code for answer in answers] == [0, 0], answers
    screened, study = stored(place, "tiny.screen"), stored(place)
    assert counted(screened) == 24 and counted(study) == 3
    done = [t for t in screened.trials if t.state.name == "COMPLETE"]
    assert len({t.user_attrs["pid"] for t in done}) == 2
    assert not [t for t in done if "repeats" in t.user_attrs]
    assert len({str(t.params) for t in done}) == len(done)


def test_a_screening_keeps_all_kinds_of_a_mixed_text(place: Path) -> None:
    """Every fifth window of five kinds in turn is of one kind."""
    study_file(place, "search.screen.trials=5", 'texts.validation.source="mixed"', "search.screen.stride=4")
    with refused("stride: leaves kinds of windows out; share no divisor with 5"):
        study_file(place, "search.screen.trials=5", 'texts.validation.source="mixed"', "search.screen.stride=5")


def test_a_bench_for_screening_shares_all_but_the_text(place: Path) -> None:
    whole = runner.open_context(runner.StudyRun(study_file(place), "tiny", None, lambda event: None))
    other = whole.screening(4)
    assert isinstance(other, Session)
    assert other.checkpoint is whole.checkpoint and other.replay is whole.replay
    nlls = nlls_of(whole, whole.blocks(None), "validation")
    assert nlls_of(other, other.blocks(None), "validation") == pytest.approx(nlls[::4], rel=1e-5)
    assert len(other.windows["validation"].ids) == 4 and len(whole.windows["validation"].ids) == 16
    assert other.contents().keys() == whole.contents().keys()
    assert whole.prune_settings.statistics == "block"


@slow
def test_a_study_that_goes_on_knows_what_was_screened(place: Path) -> None:
    """Perplexities of the screening, at the level of the main study's, stand beside its own in the sampler's model."""
    run(place, *INSIDE, "search.screen.trials=9", "search.trials=5")
    study = stored(place)
    assert study.user_attrs["gp_posterior"]["before"] == 4 + 9 - 3  # two were confirmed, and uniform is in both


def test_levels() -> None:
    part, full = screening_of([(0.1, 30.0), (0.05, 33.0), (0.15, 60.0)]), screening_of([(0.1, 40.0), (0.02, 50.0)])
    found = levelled(measured(part), measured(full))
    assert [(t.params["beta"], t.value) for t in found] == [(0.05, pytest.approx(44.0)), (0.15, pytest.approx(80.0))]
    assert levelled(measured(part), measured(screening_of([(0.02, 50.0)]))) == []
    assert levelled([], measured(full)) == []


# --- which points are confirmed


def screening_of(points: list[tuple[float, float]]) -> optuna.Study:
    study = optuna.create_study()
    for beta, value in points:
        params = {"pruner": "wanda", "allocation": "atp", "beta": beta}
        kinds = {
            "pruner": optuna.distributions.CategoricalDistribution(["wanda"]),
            "allocation": optuna.distributions.CategoricalDistribution(["atp"]),
            "beta": optuna.distributions.FloatDistribution(0, 0.2),
        }
        study.add_trial(optuna.create_trial(value=value, params=params, distributions=kinds))
    return study


def test_the_best_are_confirmed_some_way_apart() -> None:
    space = space_for(study_of(), SIZES)
    near = 0.2 * APART
    points = [(0.0, 1.0), (0.1, 3.0), (0.1 + near / 2, 2.0), (0.15, 5.0), (0.05, 4.0), (0.1 - near, 3.5)]
    found = confirmed(measured(screening_of(points)), space, 3)
    assert [point["beta"] for point in found] == [0.1 + near / 2, 0.1 - near, 0.05]
    assert [point["beta"] for point in confirmed(measured(screening_of(points[:2])), space, 3)] == [0.1]


# --- what a screening is


@slow
def test_a_study_that_a_person_calls_like_a_screening_is_reported(place: Path, command: CommandLine) -> None:
    """A study is a screening if one was made for another; its name says nothing."""
    words = ["--study", place / "tiny.toml", "--study-name", "mine.screen"]
    command.ok(*words)
    assert set(stored(place, "mine.screen").user_attrs["test_nlls"]) > {"dense"}
    assert read_config(place / "mine.screen.best.json").scored() is not None
    status = json.loads(command("status", *words, "--json").out)
    assert status["complete"] and status["best"]["scores"]["perplexity"]["test"]
    run(place, name="mine")
    assert summarise(stored(place, "mine")).screening is None
