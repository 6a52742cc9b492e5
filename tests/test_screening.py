import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
from families import nlls_of
from test_runner import reopen, states, without_bench
from test_space import SIZES, space_for, study_of
from tinystudy import BLOCKS, LONG, CommandLine, finish, run, settings, start, study_file, wait_for

from atp_tune.blocks.prune_pass import Pass
from atp_tune.config.best import read_config
from atp_tune.config.search import ScreenConfig
from atp_tune.errors import UserError
from atp_tune.events import Message, TrialEnded, TrialStarted
from atp_tune.results.summary import summarise
from atp_tune.run import dense_model
from atp_tune.run.session import Session
from atp_tune.search import runner, trial_loop
from atp_tune.search.goals import APART, confirmed, is_near, screening_file
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


@pytest.fixture
def screened_place(ran: Run, windows: None, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(ran.place, tmp_path / "screened"))


@pytest.mark.slow
def test_a_study_is_screened_before_it_begins(ran: Run) -> None:
    place, events, study = ran.place, ran.events, reopen(ran.place)
    screened = reopen(place, "tiny.screen")
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


@pytest.mark.slow
def test_trials_that_are_confirmed_are_measured_as_any_other(screened_place: Path) -> None:
    place = screened_place
    confirmed_one = reopen(place).trials[0]
    again = run(place, "search.trials=1", "search.sampler=random", name="other")
    again.enqueue_trial(confirmed_one.params)
    other = run(place, "search.trials=2", "search.sampler=random", name="other").trials[1]
    assert other.params == confirmed_one.params
    assert other.user_attrs["nlls"] == confirmed_one.user_attrs["nlls"]
    assert other.user_attrs["errors"] == confirmed_one.user_attrs["errors"]


@pytest.mark.slow
def test_a_screening_is_what_its_keys_say(screened_place: Path) -> None:
    """`--set` with the keys of the screening gives the same study, value for value."""
    place = screened_place
    by_keys = ("prune.statistics=dense", "texts.validation.stride=3", "search.trials=5", "search.sampler=gp")
    twin = run(place, *by_keys, name="twin")
    screened = reopen(place, "tiny.screen")
    assert [t.params for t in twin.trials] == [t.params for t in screened.trials]
    assert [t.value for t in twin.trials] == pytest.approx([t.value for t in screened.trials], rel=1e-6)
    assert twin.user_attrs["fingerprint"] == screened.user_attrs["fingerprint"]


@pytest.mark.slow
def test_it_runs_no_calibration_pass(ran: Run) -> None:
    assert ran.passes == [("dense", 0)] * 5 + [("block", 8)] * 5  # three trials and two reports


@pytest.mark.slow
def test_dense_statistics_are_measured_once(ran: Run) -> None:
    assert len(ran.measured) == BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize("pruners", [["wanda", "magnitude"], pytest.param(["sparsegpt"], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "allocation",
    [["atp", "owl"], *(pytest.param([name], marks=pytest.mark.slow) for name in ("atp", "curve"))],
)
def test_every_pruner_and_allocation_can_be_screened(place: Path, pruners: list[str], allocation: list[str]) -> None:
    space = (f"prune.pruners={pruners}", f"allocation={allocation}", "allocation.beta=auto")
    study = run(place, *INSIDE, *space, "search.screen.trials=8", f"search.trials={len(pruners) + 2}")
    first = study.trials[0].params
    best = measured(reopen(place, "tiny.screen"))
    assert first in [t.params for t in best]
    assert counted(study) == len(pruners) + 2


@pytest.mark.slow
def test_a_complete_screening_is_not_run_again(screened_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = screened_place
    before = reopen(place, "tiny.screen").trials
    more = run(place, *INSIDE, "search.trials=5")
    assert states(more) == ["COMPLETE"] * 5
    assert reopen(place, "tiny.screen").trials == before
    without_bench(monkeypatch)
    assert states(run(place, *INSIDE, "search.trials=5")) == ["COMPLETE"] * 5


@pytest.mark.slow
def test_a_larger_screening_goes_on(screened_place: Path) -> None:
    place = screened_place
    first = [t.params for t in reopen(place, "tiny.screen").trials]
    study = run(place, *INSIDE, "search.screen.trials=7", "search.trials=6")
    assert [t.params for t in reopen(place, "tiny.screen").trials][:5] == first
    assert len(reopen(place, "tiny.screen").trials) == 7
    assert states(study) == ["COMPLETE"] * 6


@pytest.mark.slow
def test_time_that_is_up_while_screening(place: Path) -> None:
    ended: list[TrialEnded] = []
    study = run(place, *INSIDE, timeout=0, watch=lambda event: isinstance(event, TrialEnded) and ended.append(event))
    assert not ended and [t.state.name for t in study.trials] == ["WAITING"]
    study = run(place, *INSIDE)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[0].params in [t.params for t in reopen(place, "tiny.screen").trials]


@pytest.mark.slow
def test_how_far_a_screening_is(place: Path, command: Any) -> None:
    def stop(event: Any) -> None:
        if isinstance(event, TrialStarted) and event.title == "screening 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, *INSIDE, watch=stop)
    words = ("--study", place / "tiny.toml", *settings(*INSIDE))
    answer = command("status", *words)
    assert "screening: 3 of 5 trials are done; they are the study tiny.screen" in answer.out
    assert json.loads(command("status", *words, "--json").out)["screening"] == {
        "study": "tiny.screen", "done": 3, "total": 5,
    }  # fmt: skip
    run(place, *INSIDE)
    assert "screening: " not in command("status", *words).out
    of_screening = command("status", *words, "--study-name", "tiny.screen")
    assert "test text" not in of_screening.out.replace("test perplexity", "")
    assert json.loads(command("status", *words, "--study-name", "tiny.screen", "--json").out)["complete"]


@pytest.mark.slow
def test_a_study_without_uniform_can_be_looked_at_and_taken_home(place: Path, command: Any) -> None:
    """As it stands where the time is up before uniform, the last trial, has begun."""
    words = ("--study", place / "tiny.toml", *settings(*INSIDE, "search.screen.trials=6"))

    def stop(event: Any) -> None:
        if isinstance(event, TrialStarted) and event.title == "trial 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, *INSIDE, "search.screen.trials=6", watch=stop)
    study = reopen(place)
    assert states(study) == ["COMPLETE", "FAIL", "WAITING", "WAITING"] and "dense" not in study.user_attrs
    for name in ("status", "report"):
        assert command(name, *words).code == 0
    assert command("export", *words, "--out", place / "best.json").code == 0
    assert counted(run(place, *INSIDE, "search.screen.trials=6")) == 3


@pytest.mark.slow
def test_a_screening_that_was_killed_goes_on(place: Path) -> None:
    words = (
        "--study",
        place / "tiny.toml",
        *settings(*INSIDE, "search.screen.trials=40", "texts.validation.nsamples=250"),
    )
    process = start(*words)
    wait_for(place / "tiny.db", 3, process)
    process.kill()
    process.communicate()
    assert reopen(place, "tiny.screen").trials and not reopen(place).trials
    again = finish(start(*words, *settings("search.screen.trials=6")))
    assert again.code == 0, again.err
    assert [t.state.name for t in reopen(place).trials] == ["COMPLETE"] * 3


@pytest.mark.slow
def test_two_workers_share_a_screening(place: Path) -> None:
    words = ("--study", place / "tiny.toml", *settings(*INSIDE, *LONG, "search.screen.trials=24"))
    answers = [finish(process) for process in [start(*words), start(*words)]]
    assert [answer.code for answer in answers] == [0, 0], answers
    screened, study = reopen(place, "tiny.screen"), reopen(place)
    assert counted(screened) == 24 and counted(study) == 3
    done = [t for t in screened.trials if t.state.name == "COMPLETE"]
    assert len({t.user_attrs["pid"] for t in done}) == 2
    assert not [t for t in done if "repeats" in t.user_attrs]
    assert len({str(t.params) for t in done}) == len(done)


@pytest.mark.slow
def test_a_grid_is_screened_whole(place: Path) -> None:
    words = ("search.sampler=grid", "search.step=0.03", *SCREEN, "search.screen.trials=99")
    study = run(place, *words)
    assert counted(reopen(place, "tiny.screen")) == 9  # uniform and 0.03, …, 0.24
    assert counted(study) == 3


@pytest.mark.slow
def test_a_main_study_of_other_facts_is_refused_before_anything_is_screened(place: Path) -> None:
    run(place)
    with pytest.raises(UserError, match=r"search.sampler is \"gp\", was \"random\""):
        run(place, *INSIDE)
    with pytest.raises(AssertionError):
        reopen(place, "tiny.screen")


@pytest.mark.slow
def test_a_command_that_a_user_types(place: Path, command: Any) -> None:
    answer = command("--study", place / "tiny.toml", *settings(*INSIDE))
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert any(line.startswith("[5/5] screening 4: wanda atp") for line in lines)
    assert any(line.startswith("[3/3] trial 2: wanda uniform") for line in lines)
    status = command("status", "--study", place / "tiny.toml", "--study-name", "tiny.screen", *settings(*INSIDE))
    assert status.code == 0 and "wanda atp" in status.out


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("search.screen.trials=0", "search.screen.trials: must be at least 1, got 0"),
        ("search.screen.stride=0", "search.screen.stride: must be at least 1, got 0"),
        ("search.screen.confirm=6", "search.screen.confirm: must be at most search.screen.trials, 5"),
        ("search.screen.stride=16", "search.screen.stride: leaves one of 16 windows; must be less than that"),
        ("search.screen=3", "search.screen: must be a table, got 3"),
        ("search.screen.strid=3", "search.screen.strid: unknown key; did you mean"),
    ],
)
def test_mistakes(place: Path, override: str, error: str) -> None:
    with pytest.raises(UserError) as raised:
        study_file(place, "search.screen.trials=5", override)
    assert error in str(raised.value)


def test_a_screening_keeps_all_kinds_of_a_mixed_text(place: Path) -> None:
    """Every fifth window of five kinds in turn is of one kind."""
    study_file(place, "search.screen.trials=5", 'texts.validation.source="mixed"', "search.screen.stride=4")
    with pytest.raises(UserError, match="stride: leaves windows of one kind; take no multiple of 5"):
        study_file(place, "search.screen.trials=5", 'texts.validation.source="mixed"', "search.screen.stride=5")


def test_a_file_without_a_screening(place: Path) -> None:
    file = study_file(place, *SCREEN)
    assert screening_file(file, ScreenConfig(trials=5)).study.search.screen is None
    assert study_file(place, *SCREEN, "search.screen=none").study.search.screen is None
    assert file.study.search.screen == ScreenConfig(trials=5, stride=3, confirm=2)


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


@pytest.mark.slow
def test_a_study_that_goes_on_knows_what_was_screened(place: Path) -> None:
    """Perplexities of the screening, at the level of the main study's, stand beside its own in the sampler's model."""
    run(place, *INSIDE, "search.screen.trials=9", "search.trials=5")
    study = reopen(place)
    assert study.user_attrs["gp_posterior"]["before"] == 4 + 9 - 3  # two were confirmed, and uniform is in both


def test_levels() -> None:
    part, full = screening_of([(0.1, 30.0), (0.05, 33.0), (0.15, 60.0)]), screening_of([(0.1, 40.0), (0.02, 50.0)])
    found = levelled(measured(part), measured(full))
    assert [(t.params["beta"], t.value) for t in found] == [(0.05, pytest.approx(44.0)), (0.15, pytest.approx(80.0))]
    assert levelled(measured(part), measured(screening_of([(0.02, 50.0)]))) == []
    assert levelled([], measured(full)) == []


@pytest.mark.slow
def test_other_keys_of_a_screening_are_refused(screened_place: Path) -> None:
    """By the keys that a user wrote, whether the screening is complete or not; more points are no other keys."""
    place = screened_place
    for key, text in (("stride=2", "stride is 2, was 3"), ("confirm=1", "confirm is 1, was not set")):
        with pytest.raises(UserError, match=f"study tiny: search.screen.{text}"):
            run(place, *INSIDE, f"search.screen.{key}")
    run(place, *INSIDE, "search.screen.trials=6")


@pytest.mark.slow
def test_what_a_screening_says_is_said_of_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_loop, "should_terminate", lambda study, space: len(study.trials) >= 9)
    notes: list[str] = []
    watch = lambda event: isinstance(event, Message) and notes.append(event.text)  # noqa: E731
    run(place, *INSIDE, "search.early_termination=true", "search.screen.trials=30", watch=watch)
    assert any(note.startswith("screening: terminated early after 9 ") for note in notes), notes


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


def test_near_points() -> None:
    space = space_for(study_of(allocation=["atp", "owl"], prune={"pruners": ["wanda", "sparsegpt"]}), SIZES)
    point = {"pruner": "wanda", "allocation": "atp", "beta": 0.1}
    assert is_near(point, point, space)
    assert not is_near(point, {**point, "pruner": "sparsegpt"}, space)
    assert not is_near(point, {"pruner": "wanda", "allocation": "owl", "threshold": 5.0, "lam": 0.1}, space)


# --- what a screening is


@pytest.mark.slow
def test_a_screening_does_not_begin_where_a_study_has_its_name(place: Path, command: CommandLine) -> None:
    words = ["--study", place / "tiny.toml"]
    assert command(*words, "--study-name", "x.screen", "--trials", "1").code == 0
    answer = command(*words, "--study-name", "x", *settings("search.screen={trials=3, confirm=1}", "search.sampler=gp"))
    assert answer.error.startswith("search.screen: the screening would be called x.screen, as a study of its own is")
    with closing(sqlite3.connect(place / "tiny.db")) as connection:
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [("x.screen",)]


@pytest.mark.slow
def test_a_study_that_a_person_calls_like_a_screening_is_reported(place: Path, command: CommandLine) -> None:
    """A study is a screening if one was made for another; its name says nothing."""
    words = ["--study", place / "tiny.toml", "--study-name", "mine.screen"]
    assert command(*words).code == 0
    assert set(reopen(place, "mine.screen").user_attrs["test_nlls"]) > {"dense"}
    assert read_config(place / "mine.screen.best.json").scored() is not None
    status = json.loads(command("status", *words, "--json").out)
    assert status["complete"] and status["best"]["scores"]["perplexity"]["test"]
    run(place, name="mine")
    assert summarise(reopen(place, "mine")).screening is None


def test_levels_do_not_depend_on_the_order_of_parameters() -> None:
    """A database gives the parameters of a trial in the order in which it has them."""
    distributions = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("beta", "gamma")}

    def trial(value: float, **params: float) -> optuna.trial.FrozenTrial:
        return optuna.create_trial(value=value, params=params, distributions=distributions)

    screened = [trial(10.0, beta=0.1, gamma=0.2), trial(12.0, beta=0.3, gamma=0.4)]
    found = levelled(screened, [trial(20.0, gamma=0.2, beta=0.1)])
    assert [(one.params, one.value) for one in found] == [({"beta": 0.3, "gamma": 0.4}, pytest.approx(24.0))]
