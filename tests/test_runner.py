import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import psutil
import pytest
from byhand import ByHand
from expect import parametrize, refusal, slow
from optuna.trial import TrialState
from processes import popen
from safetensors.torch import load_file, save_file
from synthetic import storage_in
from tinystudy import few_at_a_time, go_silent, run, stored, study_file

from atp_tune.cli.terminal import quiet
from atp_tune.config.best import read_config
from atp_tune.errors import TrialError
from atp_tune.events import Event, Message, Step, TrialStarted
from atp_tune.plan import Plan
from atp_tune.results.goals import best_trial
from atp_tune.results.summary import unreported
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session
from atp_tune.search import objective, runner
from atp_tune.storage.progress import identity

BOTH = "prune.pruners=['wanda', 'magnitude']"


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def measured(study: optuna.Study) -> list[dict[str, Any]]:
    """Parameters of all trials that were measured, not answered from the store."""
    return [t.params for t in study.trials if t.state == TrialState.COMPLETE and "repeats" not in t.user_attrs]


def distinct(params: list[dict[str, Any]]) -> int:
    return len({tuple(sorted(each.items())) for each in params})


def without_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a complete study loads nothing")

    monkeypatch.setattr(runner, "open_context", refuse)


# --- a study that runs to its end


@slow
def test_values_equal_a_measurement_by_hand(done: Path) -> None:
    """NLLs are compared window by window."""
    study = stored(done)
    best = best_trial(study)
    assert best
    wanda = next(t for t in study.trials[2:] if t.params["pruner"] == "wanda")
    for trial in {t.number: t for t in (best, study.trials[1], wanda)}.values():
        byhand = ByHand(done).prune(trial.params["pruner"], trial.user_attrs["plan"]["levels"])
        assert trial.user_attrs["nlls"] == pytest.approx(byhand.nlls("validation"), rel=1e-5)
        assert trial.user_attrs["realised"] == byhand.zeros()
    assert study.user_attrs["dense"] == pytest.approx(ByHand(done).nlls("validation"), rel=1e-5)
    byhand = ByHand(done).prune(best.params["pruner"], best.user_attrs["plan"]["levels"])
    assert study.user_attrs["test_nlls"][str(best.number)] == pytest.approx(byhand.nlls("test"), rel=1e-5)


def test_the_dense_checkpoint_is_not_written_to(done: Path, tiny_place: Path) -> None:
    for file in sorted((tiny_place / "model").iterdir()):
        assert file.read_bytes() == (done / "model" / file.name).read_bytes()


# --- going on


@slow
def test_a_larger_total_goes_on(done: Path) -> None:
    before = stored(done).trials
    study = run(done, "search.trials=8")
    assert states(study) == ["COMPLETE"] * 8
    assert study.user_attrs["total"] == 8
    assert [(t.number, t.params, t.value, t.user_attrs) for t in study.trials[:6]] == [
        (t.number, t.params, t.value, t.user_attrs) for t in before
    ]
    assert distinct(measured(study)) == 8


@slow
def test_going_on_draws_what_was_not_drawn(place: Path) -> None:
    """A resumed random sampler that is seeded as at the start would propose its first trials again."""
    for total in (2, 4):
        study = run(place, f"search.trials={total}")
    assert distinct([t.params for t in study.trials]) == 4


@slow
def test_reports_that_are_missing_are_measured(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process died after its last trial: the trials are there, the final numbers are not."""
    with closing(sqlite3.connect(done / "tiny.db")) as connection, connection:
        connection.execute("DELETE FROM study_system_attributes WHERE key LIKE 'atp_tune:test_nlls:%'")
    (done / "tiny.best.json").unlink()
    study = run(done)
    assert len(study.trials) == 6
    assert len(study.user_attrs["test_nlls"]) == 3
    assert (done / "tiny.best.json").exists()


@slow
def test_a_better_best_is_reported_too(done: Path) -> None:
    reports = stored(done).user_attrs["test_nlls"]
    study = stored(done)
    best = best_trial(study)
    assert best
    trial = optuna.create_trial(
        value=1.0, params={**best.params, "beta": 0.01}, distributions=best.distributions, user_attrs=best.user_attrs
    )
    study.add_trial(trial)
    assert set(run(done).user_attrs["test_nlls"]) == {*reports, "6"}
    assert read_config(done / "tiny.best.json").trial == 6


@slow
@parametrize("dies", [False, True])
def test_of_two_that_end_a_study_one_measures_the_report_text(
    dies: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one waits for its numbers, and measures them itself if it dies."""
    with quiet():
        study = runner.tune(runner.StudyRun(study_file(place), "tiny", None, lambda _: None, reports=False))
    assert unreported(study)
    other = popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun = psutil.Process(other.pid).create_time()
    reporter = {**identity(), "pid": other.pid, "process_started": begun}
    study._storage.set_study_system_attr(study._study_id, objective.REPORTER, reporter)

    def ends(_: float) -> None:
        if not dies:
            study.set_user_attr("test_nlls", {name: [1.0, 2.0] for name in unreported(study)})
        other.communicate()

    monkeypatch.setattr(objective, "sleep", ends)
    events: list[Event] = []
    run(place, watch=events.append)
    notes = [event.text for event in events if isinstance(event, Message)]
    assert "waiting for the numbers on the test text, which another process measures" in notes
    assert dies == any(isinstance(event, TrialStarted) and event.title.startswith("test text: ") for event in events)
    assert not unreported(stored(place))
    assert (place / "tiny.best.json").exists()


# --- a process that dies


def interrupt_at(number: int) -> Any:
    def watch(event: Event) -> None:
        if isinstance(event, TrialStarted):
            watch.title = event.title  # type: ignore[attr-defined]
        if isinstance(event, Step) and watch.title == f"trial {number}" and event.done == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    return watch


@slow
def test_an_interrupted_trial_is_queued_first(place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(place, watch=interrupt_at(1))
    study = stored(place)
    assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
    with pytest.raises(KeyboardInterrupt):
        run(place, watch=interrupt_at(2))
    assert states(stored(place)) == ["COMPLETE", "FAIL", "FAIL", "WAITING"]
    study = run(place)
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[2].params == study.trials[3].params


@slow
def test_an_interruption_while_a_trial_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna then reads a variable that it has not set, and raises that in the place of the interruption."""
    tell = optuna.study._optimize._tell_with_warning

    def interrupted(**told: Any) -> Any:
        if told["trial"].number == 1:
            raise KeyboardInterrupt
        return tell(**told)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.study._optimize, "_tell_with_warning", interrupted)
        run(place)
    assert states(stored(place)) == ["COMPLETE", "FAIL", "WAITING"]
    assert states(run(place)) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def add_running(study: optuna.Study, **attributes: Any) -> None:
    """A trial that another process runs, and that has sent one heartbeat."""
    best = study.trials[0]
    params = {**best.params, "beta": 0.1}
    study.enqueue_trial(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats are meant for trials under study.optimize
        trial = study.ask(best.distributions)
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL", 0.05)


@slow
@pytest.mark.usefixtures("impatient")
def test_a_trial_of_another_machine_is_waited_for_and_then_run_again(place: Path) -> None:
    study = run(place, "search.trials=2")
    add_running(study, host="elsewhere", pid=1, process_started=0.0)
    waiting = Message("waiting for trial 2, which elsewhere runs (or was running when it stopped)")
    notes: list[Event] = []

    def watch(event: Event) -> None:
        notes.append(event)
        if event == waiting:
            go_silent(place / "tiny.db")

    study = run(place, "search.trials=3", watch=watch)
    assert waiting in notes
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[3].params == study.trials[2].params


@slow
@pytest.mark.usefixtures("impatient")
def test_a_trial_that_ends_elsewhere_counts(place: Path) -> None:
    study = run(place, "search.trials=2")
    add_running(study, host="elsewhere", pid=1, process_started=0.0)
    best = study.trials[0].user_attrs

    def end_it(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith("waiting"):
            other = stored(place)
            for name in ("plan", "realised", "nlls", "versions"):
                other._storage.set_trial_user_attr(other.trials[2]._trial_id, name, best[name])
            with quiet():
                other.tell(2, 77.0)

    study = run(place, watch=end_it)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[2].value == 77


@slow
def test_a_process_that_died_before_it_wrote_the_fingerprint(place: Path) -> None:
    with quiet():
        optuna.create_study(study_name="tiny", storage=storage_in(place / "tiny.db"))
    assert states(run(place)) == ["COMPLETE"] * 3
    assert stored(place).user_attrs["fingerprint"]["sparsity"] == 0.6


# --- what a study was made with


def edit_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def edit_text(place: Path) -> None:
    file = place / "validation.txt"
    file.write_text("X" + file.read_text())


@slow
@parametrize(
    ("edit", "key"), [(edit_weights, "model.content"), (edit_text, "texts.validation.content")], ids=["model", "text"]
)
def test_other_contents_are_refused(done: Path, edit: Any, key: str) -> None:
    before = stored(done).user_attrs["fingerprint"][key]
    edit(done)
    message = refusal(run, done, "search.trials=7")
    assert message.startswith(f'study tiny: {key} is "')
    assert message.endswith(f'was "{before}". Put it back, or start another study with --study-name NAME')
    assert len(stored(done).trials) == 6
    assert len(run(done, "search.trials=1", name="other").trials) == 1
    assert len(stored(done).trials) == 6


@slow
def test_what_does_not_change_values_may_change(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bench(monkeypatch)
    assert len(run(done, "description=other", "device=auto", "search.trials=1").trials) == 6
    shutil.move(done / "tiny.db", done / "moved.db")
    assert len(run(done, "storage=sqlite:///moved.db").trials) == 6


# --- trials that fail


@slow
def test_a_dense_model_that_cannot_be_measured_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(*_: Any) -> None:
        raise TrialError("out of memory with one window at a time")

    monkeypatch.setattr(RoleScores, "begin", too_small)
    with pytest.raises(TrialError, match="out of memory"):
        run(place)


# --- pairs that were measured before


@slow
def test_a_failed_pair_is_not_measured_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(context: Session, plan: Plan) -> Iterator[Any]:
        plans.append(plan)
        raise TrialError("no")

    plans: list[Plan] = []
    monkeypatch.setattr(Session, "prune", fail)
    study = run(place, "search.trials=1")
    study.enqueue_trial(study.trials[0].params)
    study = run(place, "search.trials=2")
    assert len(plans) == 1
    assert states(study) == ["FAIL", "FAIL", "WAITING"]
    assert [t.user_attrs["failure"] for t in study.trials[:2]] == ["no", "failed before, as trial 0: no"]


# --- trials that are stopped


@slow
def test_hopeless_trials_are_stopped_and_never_the_best(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_a_time(monkeypatch)
    plain = run(place, "search.trials=8", name="plain")
    study = run(place, "search.trials=8", "search.stopper=wilcoxon", name="stopping")
    stopped = [t for t in study.trials if "stopped_after" in t.user_attrs]
    assert stopped
    assert states(study) == ["COMPLETE"] * 8
    best = best_trial(study)
    assert best
    for trial in stopped:
        seen = trial.user_attrs["stopped_after"]
        assert seen in range(2, 16, 2)
        assert len(trial.user_attrs["nlls"]) == seen
        assert list(trial.intermediate_values) == list(range(seen // 2))
        assert trial.value is not None and trial.value > best.value  # type: ignore[operator]
        assert "stderr" not in trial.user_attrs
    for trial in study.trials:
        groups = [
            fmean(trial.user_attrs["nlls"][start : start + 2]) for start in range(0, len(trial.user_attrs["nlls"]), 2)
        ]
        assert list(trial.intermediate_values.values()) == pytest.approx(groups)
    same = {t.params["beta"]: t for t in plain.trials}
    for trial in stopped:  # the estimate is near what the whole text says
        assert trial.value == pytest.approx(same[trial.params["beta"]].value, rel=0.1)
    full = [t for t in study.trials if "stopped_after" not in t.user_attrs]
    for trial in full:
        assert trial.value == pytest.approx(same[trial.params["beta"]].value, rel=1e-6)
    assert best.number == best_trial(plain).number  # type: ignore[union-attr]


@slow
def test_a_trial_that_has_seen_all_windows_is_not_stopped(place: Path) -> None:
    """All windows fit into one batch here: nothing is left to be spared, so the value is the whole text's."""
    study = run(place, "search.trials=5", "search.stopper=wilcoxon")
    plain = run(place, "search.trials=5", name="plain")
    assert not any("stopped_after" in t.user_attrs for t in study.trials)
    assert [t.value for t in study.trials] == [t.value for t in plain.trials]


@slow
def test_uniform_is_never_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the best is compared with, on both texts: a part of its windows would not do."""
    few_at_a_time(monkeypatch)
    values = {t.params["pruner"]: t.values for t in run(place, BOTH, "sparsity=0.8", "search.trials=2").trials}
    better, worse = sorted(values, key=lambda pruner: values[pruner])
    pruners = f"prune.pruners=['{better}', '{worse}']"
    study = run(place, pruners, "sparsity=0.8", "search.stopper=wilcoxon", name="stopped")
    assert study.trials[1].value > study.trials[0].value  # type: ignore[operator]
    assert "stopped_after" not in study.trials[1].user_attrs
    assert len(study.trials[1].user_attrs["nlls"]) == 16


@slow
def test_a_stopped_pair_is_measured_again_if_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_a_time(monkeypatch)
    overrides = ("search.stopper=wilcoxon",)
    study = run(place, "search.trials=6", *overrides)
    stopped = next(t for t in study.trials if "stopped_after" in t.user_attrs)
    study.enqueue_trial(stopped.params)
    study = run(place, "search.trials=7", *overrides)
    assert "repeats" not in study.trials[6].user_attrs


# --- samplers


GRID = ("search.sampler=grid", "search.step=0.06")
POINTS = [0.06, 0.12, 0.18, 0.24]  # up to 2 · 0.4 / 3 = 0.267


def without_total(place: Path) -> None:
    toml = (place / "tiny.toml").read_text()
    (place / "tiny.toml").write_text(toml.replace("trials = 3\n", ""))


def asked(study: optuna.Study) -> list[tuple[str, float]]:
    return sorted((t.params["pruner"], t.params["beta"]) for t in study.trials if t.state == TrialState.COMPLETE)


@slow
@parametrize("pruners", [pytest.param(["wanda"], marks=slow), ["wanda", "magnitude"]], ids=len)
def test_a_grid_is_its_points_and_uniform(place: Path, monkeypatch: pytest.MonkeyPatch, pruners: list[str]) -> None:
    without_total(place)
    study = run(place, *GRID, f"prune.pruners={pruners}")
    assert asked(study) == sorted((pruner, beta) for pruner in pruners for beta in [0.0, *POINTS])
    assert study.user_attrs["total"] == 5 * len(pruners)
    assert study.user_attrs["test_nlls"]
    without_bench(monkeypatch)
    assert len(run(place, *GRID, f"prune.pruners={pruners}").trials) == 5 * len(pruners)


@slow
def test_a_grid_in_several_runs_misses_no_point(place: Path) -> None:
    for total in (2, 3, 4):
        run(place, *GRID, BOTH, f"search.trials={total}")
    with pytest.raises(KeyboardInterrupt):
        run(place, *GRID, BOTH, "search.trials=10", watch=interrupt_at(5))
    study = run(place, *GRID, BOTH, "search.trials=10")
    assert asked(study) == sorted((pruner, beta) for pruner in ("wanda", "magnitude") for beta in [0.0, *POINTS])


# --- the paper's protocol


def paper(place: Path) -> None:
    toml = (place / "tiny.toml").read_text()
    head, report = toml.split("[texts.test]")
    toml = 'protocol = "paper"\n' + head + report[report.index("[search]") :]
    (place / "tiny.toml").write_text(toml)


@slow
def test_the_papers_protocol_reports_the_search_text_without_measuring_again(place: Path) -> None:
    paper(place)
    events: list[Event] = []
    study = run(place, *GRID, "search.trials=5", watch=events.append)
    assert not [e for e in events if isinstance(e, TrialStarted) and e.title.startswith("test")]
    best = best_trial(study)
    assert best
    reports = study.user_attrs["test_nlls"]
    assert reports.keys() >= {"dense", "0", str(best.number)}
    assert reports.pop("dense") == study.user_attrs["dense"]
    assert all(nlls == study.trials[int(number)].user_attrs["nlls"] for number, nlls in reports.items())
    config = read_config(place / "tiny.best.json")
    assert config.scored() == config.scored("best", "validation")
    assert config.texts.test == config.texts.validation


@slow
def test_a_total_that_was_asked_for_stays(place: Path) -> None:
    """A worker that joins, or a later run, asks for no other total than `--trials` did; the file counts without it."""
    toml = (place / "tiny.toml").read_text()
    (place / "tiny.toml").write_text(toml.replace("trials = 3", "trials = 1"))
    run(place, "search.trials=2")
    assert len(run(place).trials) == 2
    assert run(place).user_attrs["total"] == 2
    assert len(run(place, "search.trials=3").trials) == 3
    run(place, name="other")
    (place / "tiny.toml").write_text(toml.replace("trials = 3", "trials = 2"))
    assert len(run(place, name="other").trials) == 2


@slow
def test_a_run_follows_a_total_that_another_one_raises(place: Path) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, TrialStarted) and event.title == "trial 2":
            stored(place).set_user_attr("total", 5)

    assert len(run(place, watch=watch).trials) == 5
    assert stored(place).user_attrs["test_nlls"]
