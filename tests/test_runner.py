import math
import os
import shutil
import signal
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
import torch
from byhand import ByHand
from optuna.trial import TrialState
from plans import linears_of
from processes import popen
from safetensors.torch import load_file, save_file
from synthetic import storage_in
from tinystudy import BLOCKS, LONG, few_at_a_time, finish, go_silent, run, settings, start, study_file, wait_for

from atp_tune.cli.terminal import quiet
from atp_tune.config.best import read_config
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Event, Message, Step, TrialEnded, TrialStarted
from atp_tune.plan import Plan
from atp_tune.results.goals import best_trial
from atp_tune.results.results import allocation_of
from atp_tune.results.summary import summarise, unreported
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session
from atp_tune.search import final_scores, runner, trial_loop
from atp_tune.storage import opening, progress
from atp_tune.storage.process import identity

BOTH = "prune.pruners=['wanda', 'magnitude']"


def reopen(place: Path, name: str = "tiny") -> optuna.Study:
    db = opening.open_storage(study_file(place).storage_url, create=False)
    assert db
    study = opening.find_study(db, name)
    assert study
    return study


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


def test_a_study_runs_to_its_total(done: Path) -> None:
    study = reopen(done)
    assert states(study) == ["COMPLETE"] * 6
    assert [t.number for t in study.trials] == list(range(6))
    assert study.user_attrs["total"] == 6


def test_it_starts_with_uniform_for_each_pruner(done: Path) -> None:
    trials = reopen(done).trials
    assert [t.params for t in trials[:2]] == [
        {"pruner": pruner, "allocation": "atp", "beta": 0.0} for pruner in ("wanda", "magnitude")
    ]
    assert all(t.user_attrs["plan"]["levels"] == [0.5] * BLOCKS for t in trials[:2])
    assert all(t.params["beta"] > 0 for t in trials[2:])


def test_attributes_of_a_trial(done: Path) -> None:
    study = reopen(done)
    for trial in study.trials:
        attrs = trial.user_attrs
        assert set(attrs) - {"start"} == {
            "host", "pid", "process_started", "booted", "plan", "realised", "errors", "nlls", "seconds",
            "peak_bytes", "device", "dtype", "versions", "stderr", "batches",
            "packed_bytes", "packed MB",
            "zeros %", "± stderr", "time (s)", "peak GB",
        }  # fmt: skip
        assert attrs["host"] == os.uname().nodename
        assert psutil.Process(attrs["pid"]).ppid() == os.getppid()  # the study was made here or by a worker beside
        assert len(attrs["plan"]["levels"]) == len(attrs["errors"]) == BLOCKS
        assert len(attrs["nlls"]) == 16
        assert all(isinstance(nll, float) and 0 < nll < 10 for nll in attrs["nlls"])
        assert all(0 < error < 10 for error in attrs["errors"])
        assert set(attrs["seconds"]) == {"calibrate", "prune", "evaluate"}
        assert all(seconds >= 0 for seconds in attrs["seconds"].values())
        assert all(isinstance(size, int) and size > 1e6 for size in attrs["peak_bytes"].values())
        assert set(attrs["peak_bytes"]) == {"prune", "evaluate"}
        assert attrs["device"].startswith("cpu")
        assert set(attrs["versions"]) == {"atp_tune", "torch", "transformers", "optuna"}
        assert trial.value == pytest.approx(math.exp(fmean(attrs["nlls"])))
        assert 0 < attrs["stderr"] < trial.value
        assert fmean(attrs["plan"]["levels"]) == pytest.approx(0.5)


def test_attributes_of_the_study(done: Path) -> None:
    attrs = reopen(done).user_attrs
    assert set(attrs) == {
        "fingerprint", "sizes", "blocks", "linears", "total", "made_from", "dense", "test_nlls", "batches",
        "dense_bytes",
        "model.source", "model.dtype", "protocol", "sparsity", "trials",
    }  # fmt: skip
    assert attrs["sizes"] == [7680] * BLOCKS  # q, o: 32²; k, v: 16 · 32; three of 48 · 32
    assert len(attrs["dense"]) == 16
    best = best_trial(reopen(done))
    assert best
    assert best.number > 1
    uniform = {"wanda": "0", "magnitude": "1"}[best.params["pruner"]]
    assert set(attrs["test_nlls"]) == {"dense", uniform, str(best.number)}
    assert all(len(nlls) == 16 for nlls in attrs["test_nlls"].values())
    assert {key for key in attrs["fingerprint"] if key.endswith("content")} == {
        "model.content", "texts.calibration.content", "texts.validation.content", "texts.test.content",
    }  # fmt: skip
    assert "model.source" not in attrs["fingerprint"]


@pytest.mark.slow
def test_values_equal_a_measurement_by_hand(done: Path) -> None:
    """NLLs are compared window by window."""
    study = reopen(done)
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


def test_the_best_configuration_is_written(done: Path) -> None:
    study, config = reopen(done), read_config(done / "tiny.best.json")
    best = best_trial(study)
    assert best
    assert (config.study, config.trial) == ("tiny", best.number)
    assert config.scored("best", "validation")
    assert config.scored("best", "validation").value == best.value
    assert config.scored()
    assert config.scored().value == pytest.approx(math.exp(fmean(study.user_attrs["test_nlls"][str(best.number)])))


# --- going on


@pytest.mark.slow
def test_a_complete_study_is_returned_without_work(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bench(monkeypatch)
    before = (done / "tiny.db").read_bytes()
    assert len(run(done).trials) == 6
    assert (done / "tiny.db").read_bytes() == before
    assert len(run(done, "search.trials=2").trials) == 6  # fewer than there are


@pytest.mark.slow
def test_a_larger_total_goes_on(done: Path) -> None:
    before = reopen(done).trials
    study = run(done, "search.trials=8")
    assert states(study) == ["COMPLETE"] * 8
    assert study.user_attrs["total"] == 8
    assert [(t.number, t.params, t.value, t.user_attrs) for t in study.trials[:6]] == [
        (t.number, t.params, t.value, t.user_attrs) for t in before
    ]
    assert distinct(measured(study)) == 8


@pytest.mark.slow
def test_going_on_draws_what_was_not_drawn(place: Path) -> None:
    """A resumed random sampler that is seeded as at the start would propose its first trials again."""
    for total in (2, 4):
        study = run(place, f"search.trials={total}")
    assert distinct([t.params for t in study.trials]) == 4


@pytest.mark.slow
def test_the_same_seed_draws_the_same(place: Path) -> None:
    one, two = (run(place, "search.trials=3", name=name) for name in ("one", "two"))
    other = run(place, "search.trials=3", "search.seed=1", name="other")
    assert [t.params for t in one.trials] == [t.params for t in two.trials]
    assert [t.value for t in one.trials] == [t.value for t in two.trials]
    assert one.trials[2].params != other.trials[2].params


@pytest.mark.slow
def test_no_time_is_no_trial(place: Path) -> None:
    study = run(place, timeout=0)
    assert states(study) == ["WAITING"] * 2
    assert "test_nlls" not in study.user_attrs
    assert states(run(place)) == ["COMPLETE"] * 3


@pytest.mark.slow
def test_time_that_is_up_starts_no_further_trial(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(context: Session, plan: Plan) -> Iterator[Any]:
        clock.append(clock[-1] + 0.5)
        yield from prune(context, plan)

    clock, prune = [0.0], Session.prune
    monkeypatch.setattr(trial_loop, "monotonic", lambda: clock[-1])
    monkeypatch.setattr(Session, "prune", slowly)
    assert states(run(place, "search.trials=50", timeout=0.4)) == ["COMPLETE", "WAITING"]


@pytest.mark.slow
def test_reports_that_are_missing_are_measured(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process died after its last trial: the trials are there, the final numbers are not."""
    with closing(sqlite3.connect(done / "tiny.db")) as connection, connection:
        connection.execute("DELETE FROM study_system_attributes WHERE key LIKE 'atp_tune:test_nlls:%'")
    (done / "tiny.best.json").unlink()
    study = run(done)
    assert len(study.trials) == 6
    assert len(study.user_attrs["test_nlls"]) == 3
    assert (done / "tiny.best.json").exists()


@pytest.mark.slow
def test_a_better_best_is_reported_too(done: Path) -> None:
    reports = reopen(done).user_attrs["test_nlls"]
    study = reopen(done)
    best = best_trial(study)
    assert best
    trial = optuna.create_trial(
        value=1.0, params={**best.params, "beta": 0.01}, distributions=best.distributions, user_attrs=best.user_attrs
    )
    study.add_trial(trial)
    after = run(done).user_attrs["test_nlls"]
    assert set(after) == {*reports, "6"}
    assert read_config(done / "tiny.best.json").trial == 6


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
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
    study._storage.set_study_system_attr(study._study_id, final_scores.REPORTER, reporter)

    def ends(_: float) -> None:
        if not dies:
            study.set_user_attr("test_nlls", {name: [1.0, 2.0] for name in unreported(study)})
        other.communicate()

    monkeypatch.setattr(final_scores, "sleep", ends)
    events: list[Event] = []
    run(place, watch=events.append)
    notes = [event.text for event in events if isinstance(event, Message)]
    assert "waiting for the numbers on the test text, which another process measures" in notes
    assert dies == any(isinstance(event, TrialStarted) and event.title.startswith("test text: ") for event in events)
    assert not unreported(reopen(place))
    assert (place / "tiny.best.json").exists()


@pytest.mark.slow
def test_events_tell_of_every_trial(place: Path) -> None:
    events: list[Event] = []
    study = run(place, watch=events.append)
    ended = [event for event in events if isinstance(event, TrialEnded)]
    assert [(e.number, e.scores, e.reason, e.done, e.total) for e in ended] == [
        (t.number, {"perplexity": t.value}, None, t.number + 1, 3) for t in study.trials
    ]
    assert ended[-1].best == {"perplexity": study.best_value}
    titles = [event.title for event in events if isinstance(event, TrialStarted)]
    assert titles[:4] == ["dense model", "trial 0", "trial 1", "trial 2"]
    assert titles[4] == "test text: dense model"
    assert {e.phase for e in events if isinstance(e, Step)} == {"prune", "evaluate"}


# --- a process that dies


def kill_in(place: Path, number: int, *overrides: str, by: int = signal.SIGKILL) -> tuple[int, str]:
    """Starts the study in a process and kills it in the middle of a trial; its exit code and output."""
    process = start("--study", place / "tiny.toml", *settings(*overrides))
    wait_for(place / "tiny.db", number, process)
    os.kill(process.pid, by)
    answer = finish(process)
    return answer.code, answer.out + answer.err


@pytest.mark.slow
def test_kill_9_in_a_trial_loses_only_that_trial(place: Path, tmp_path: Path) -> None:
    code, _ = kill_in(place, 2, *LONG, "search.trials=4")
    assert code == -signal.SIGKILL
    killed = reopen(place).trials[2]
    assert killed.state == TrialState.RUNNING
    moved = Path(shutil.copytree(place, tmp_path / "moved"))  # another folder, as on another disk

    for folder in (place, moved):
        notes: list[Event] = []
        study = run(folder, *LONG, "search.trials=4", watch=notes.append)
        assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", *["COMPLETE"] * 2]
        assert Message("trial 2 was lost with its process: it is run again") in notes
        assert study.trials[2].user_attrs["lost"] == "its process died"
        assert study.trials[3].params == killed.params
        assert "lost" not in study.trials[3].user_attrs
        assert distinct(measured(study)) == len(measured(study)) == 4
        assert progress.counted(study) == 4

    undisturbed = run(place, *LONG, "search.trials=3", name="undisturbed")
    study = reopen(place)
    assert study.trials[0].value == pytest.approx(undisturbed.trials[0].value, rel=1e-6)
    assert study.trials[1].params == undisturbed.trials[1].params
    assert [study.trials[n].value for n in (1, 3)] == pytest.approx(
        [undisturbed.trials[n].value for n in (1, 2)], rel=1e-6
    )


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(place: Path) -> None:
    for number in (0, 1, 3):  # a third death of the same would end it
        kill_in(place, number, *LONG, "search.trials=4")
    study = run(place, *LONG, "search.trials=4")
    assert progress.counted(study) == 4
    assert not {"RUNNING", "WAITING"} & set(states(study))
    assert distinct(measured(study)) == len(measured(study)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_a_trial(by: signal.Signals, place: Path) -> None:
    code, output = kill_in(place, 1, *LONG, "search.trials=4", by=by)
    assert code == 130
    assert f"stopped: finished trials are in {place / 'tiny.db'}" in output
    assert "Traceback" not in output
    study = reopen(place)
    assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
    assert study.trials[1].user_attrs["lost"] == "interrupted"
    study = run(place, *LONG, "search.trials=4")
    assert states(study) == ["COMPLETE", "FAIL", *["COMPLETE"] * 3]
    assert study.trials[2].params == study.trials[1].params
    assert study.user_attrs["test_nlls"]


@pytest.mark.slow
def test_two_processes_share_one_total(place: Path) -> None:
    command = ("--study", place / "tiny.toml", *settings(*LONG, "search.trials=8"))
    answers = [finish(process) for process in [start(*command), start(*command)]]
    assert [answer.code for answer in answers] == [0, 0], answers
    study = reopen(place)
    assert progress.counted(study) == 8
    assert len({str(params) for params in measured(study)}) >= 7  # both may begin their first draw at the same moment
    assert len({t.user_attrs["pid"] for t in study.trials if progress.counts(t)}) == 2
    assert study.user_attrs["test_nlls"]


def interrupt_at(number: int) -> Any:
    def watch(event: Event) -> None:
        if isinstance(event, TrialStarted):
            watch.title = event.title  # type: ignore[attr-defined]
        if isinstance(event, Step) and watch.title == f"trial {number}" and event.done == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    return watch


@pytest.mark.slow
def test_an_interrupted_trial_is_queued_first(place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(place, watch=interrupt_at(1))
    study = reopen(place)
    assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
    with pytest.raises(KeyboardInterrupt):
        run(place, watch=interrupt_at(2))
    assert states(reopen(place)) == ["COMPLETE", "FAIL", "FAIL", "WAITING"]
    study = run(place)
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[2].params == study.trials[3].params


@pytest.mark.slow
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
    assert states(reopen(place)) == ["COMPLETE", "FAIL", "WAITING"]
    assert states(run(place)) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_a_trial_that_is_lost_too_often_is_given_up(place: Path) -> None:
    for number in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(place, watch=interrupt_at(number))
    study = run(place)
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert distinct(measured(study)) == 3


def add_running(study: optuna.Study, attributes: dict[str, Any], beat: bool = True) -> None:
    """A trial that another process runs; with `beat` it has sent one heartbeat."""
    best = study.trials[0]
    params = {**best.params, "beta": 0.1}
    study.enqueue_trial(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats are meant for trials under study.optimize
        trial = study.ask(best.distributions)
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    if beat:
        study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_loop, "POLL", 0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_trial_of_another_machine_is_waited_for_and_then_run_again(place: Path) -> None:
    study = run(place, "search.trials=2")
    add_running(study, {"host": "elsewhere", "pid": 1, "process_started": 0.0})
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


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("beat", [True, False])
def test_a_process_that_died_before_it_said_who_it_is(place: Path, beat: bool) -> None:
    study = run(place, "search.trials=2")
    add_running(study, {}, beat)
    go_silent(place / "tiny.db")
    study = run(place, "search.trials=3")
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_trial_that_ends_elsewhere_counts(place: Path) -> None:
    study = run(place, "search.trials=2")
    add_running(study, {"host": "elsewhere", "pid": 1, "process_started": 0.0})
    best = study.trials[0].user_attrs

    def end_it(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith("waiting"):
            other = reopen(place)
            for name in ("plan", "realised", "nlls", "versions"):
                other._storage.set_trial_user_attr(other.trials[2]._trial_id, name, best[name])
            with quiet():
                other.tell(2, 77.0)

    study = run(place, watch=end_it)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[2].value == 77


@pytest.mark.slow
def test_a_process_that_died_before_it_wrote_the_fingerprint(place: Path) -> None:
    with quiet():
        optuna.create_study(study_name="tiny", storage=storage_in(place / "tiny.db"))
    assert states(run(place)) == ["COMPLETE"] * 3
    assert reopen(place).user_attrs["fingerprint"]["sparsity"] == 0.6


# --- what a study was made with


def edit_weights(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def edit_text(place: Path) -> None:
    file = place / "validation.txt"
    file.write_text("X" + file.read_text())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sparsity=0.6"], "sparsity is 0.6, was 0.5"),
        (["prune.pruners=['wanda']"], 'prune.pruners is ["wanda"], was ["wanda", "magnitude"]'),
        (["texts.validation.nsamples=8"], "texts.validation.nsamples is 8, was 16"),
        (["texts.test.nsamples=8"], "texts.test.nsamples is 8, was 16"),
        (["model.dtype=bfloat16"], 'model.dtype is "bfloat16", was "float32"'),
        (["search.sampler=tpe"], 'search.sampler is "tpe", was "random"'),
        (["search.stopper=wilcoxon"], 'search.stopper is "wilcoxon", was "none"'),
        (["allocation.beta=[0, 0.01]"], "allocation.beta is [0.0, 0.01], was [0.0, 0.1]"),
        (["sparsity=0.6", "search.seed=9"], "search.seed is 9, was 2; sparsity is 0.6, was 0.5"),
    ],
)
def test_other_settings_are_refused(done: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        run(done, *overrides)
    text = str(caught.value).removesuffix(", or mix them in this one with --allow-device-change")
    assert text == f"study tiny: {said}. Put it back, or start another study with --study-name NAME"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "key"), [(edit_weights, "model.content"), (edit_text, "texts.validation.content")], ids=["model", "text"]
)
def test_other_contents_are_refused(done: Path, edit: Any, key: str) -> None:
    before = reopen(done).user_attrs["fingerprint"][key]
    edit(done)
    with pytest.raises(UserError) as caught:
        run(done, "search.trials=7")
    message = str(caught.value)
    assert message.startswith(f'study tiny: {key} is "')
    assert message.endswith(f'was "{before}". Put it back, or start another study with --study-name NAME')
    assert len(reopen(done).trials) == 6
    study = run(done, "search.trials=1", name="other")
    assert len(study.trials) == 1
    assert len(reopen(done).trials) == 6


@pytest.mark.slow
def test_what_does_not_change_values_may_change(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bench(monkeypatch)
    assert len(run(done, "description=other", "device=auto", "search.trials=1").trials) == 6
    shutil.move(done / "tiny.db", done / "moved.db")
    assert len(run(done, "storage=sqlite:///moved.db").trials) == 6


@pytest.mark.slow
def test_another_name_lives_beside_it(done: Path) -> None:
    best = (done / "tiny.best.json").read_bytes()
    study = run(done, "sparsity=0.4", "search.trials=2", name="other")
    assert len(study.trials) == 2
    assert best_trial(study)
    assert len(reopen(done).trials) == 6
    assert (done / "tiny.best.json").read_bytes() == best
    assert read_config(done / "other.best.json").study == "other"


# --- trials that fail


@pytest.mark.slow
def test_a_model_with_nan_is_refused_before_a_trial_runs(place: Path) -> None:
    put_nan(place)
    with pytest.raises(UserError, match=r"^model.source: the perplexity of the dense model model is not finite: .*"):
        run(place)
    assert states(reopen(place)) == []


def put_nan(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.slow
def test_plans_without_a_finite_perplexity_fail_and_the_study_ends(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nan(place)
    monkeypatch.setattr(runner, "_measure_dense", lambda *_: None)  # which would refuse it
    reasons: list[str | None] = []
    pruners = "prune.pruners=['magnitude', 'wanda', 'sparsegpt']"
    overrides = (pruners, "search.trials=4")
    study = run(place, *overrides, watch=lambda e: reasons.append(e.reason) if isinstance(e, TrialEnded) else None)
    assert states(study) == ["FAIL"] * 4
    for trial in study.trials:
        assert trial.params["pruner"] in ("magnitude", "wanda", "sparsegpt")
        assert len(trial.user_attrs["plan"]["levels"]) == BLOCKS
        assert "lost" not in trial.user_attrs
    assert reasons == [t.user_attrs["failure"] for t in study.trials]
    assert reasons[0]
    assert reasons[0].startswith("perplexity is ")
    assert "Hessian not finite" in str(reasons[2])
    assert best_trial(study) is None
    assert not (place / "tiny.best.json").exists()
    assert len(run(place, *overrides).trials) == 4


@pytest.mark.slow
def test_a_hessian_that_cannot_be_inverted_fails_its_pruner_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atp_tune.pruners.statistics import Hessian

    upper = Hessian._upper
    monkeypatch.setattr(Hessian, "_upper", lambda self: -upper(self))
    study = run(place, "prune.pruners=['sparsegpt', 'wanda']", "search.trials=4")
    failed = [t for t in study.trials if t.params["pruner"] == "sparsegpt"]
    assert failed
    for trial in failed:
        assert trial.state == TrialState.FAIL
        assert trial.user_attrs["failure"] == "Hessian not positive definite, even with damping 100"
    best = best_trial(study)
    assert best
    assert best.params["pruner"] == "wanda"
    reports = set(study.user_attrs["test_nlls"])
    assert reports >= {"dense", "1", str(best.number)}
    assert all(study.trials[int(number)].params["pruner"] == "wanda" for number in reports - {"dense"})


@pytest.mark.slow
def test_memory_that_runs_out_fails_the_trial(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune_but(context: Session, plan: Plan) -> Iterator[Any]:
        if plan.parameters["beta"] > 0 and not raised:
            raised.append(plan)
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from prune(context, plan)

    raised: list[Plan] = []
    prune = Session.prune
    monkeypatch.setattr(Session, "prune", prune_but)
    study = run(place)
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["failure"] == "out of memory"
    assert study.trials[1].user_attrs["plan"]["levels"] == list(raised[0].amounts)
    assert study.trials[1].params["beta"] == raised[0].parameters["beta"]
    assert states(run(place)) == ["COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.slow
def test_an_error_that_nobody_expected_is_not_hidden(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: Session, plan: Plan) -> Iterator[Any]:
        raise RuntimeError("shapes do not match")

    prune = Session.prune
    monkeypatch.setattr(Session, "prune", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(place)
    monkeypatch.setattr(Session, "prune", prune)
    study = run(place)  # the bug is repaired: the trial did not fail by itself
    assert progress.counted(study) == 3


@pytest.mark.slow
def test_a_dense_model_that_cannot_be_measured_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(*_: Any) -> None:
        raise TrialError("out of memory with one window at a time")

    monkeypatch.setattr(RoleScores, "begin", too_small)
    with pytest.raises(TrialError, match="out of memory"):
        run(place)


# --- pairs that were measured before


@pytest.mark.slow
def test_a_repeated_pair_is_answered_from_the_store(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = reopen(done)
    params = study.trials[3].params
    study.enqueue_trial(params)
    plans: list[Plan] = []
    prune = Session.prune

    def count(context: Session, plan: Plan) -> Any:
        plans.append(plan)
        return prune(context, plan)

    monkeypatch.setattr(Session, "prune", count)
    events: list[Event] = []
    study = run(done, "search.trials=7", watch=events.append)
    assert plans == []
    again, first = study.trials[6], study.trials[3]
    assert (again.state, again.value, again.params) == (TrialState.COMPLETE, first.value, params)
    assert again.user_attrs["repeats"] == 3
    assert again.user_attrs["nlls"] == first.user_attrs["nlls"]
    assert Message("trial 6: measured before, as trial 3") in events
    assert progress.counted(study) == 7


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_reports_are_made_for_the_same_groups_without_a_stopper(place: Path) -> None:
    assert all(not t.intermediate_values for t in run(place).trials)


@pytest.mark.slow
def test_a_trial_that_has_seen_all_windows_is_not_stopped(place: Path) -> None:
    """All windows fit into one batch here: nothing is left to be spared, so the value is the whole text's."""
    study = run(place, "search.trials=5", "search.stopper=wilcoxon")
    plain = run(place, "search.trials=5", name="plain")
    assert not any("stopped_after" in t.user_attrs for t in study.trials)
    assert [t.value for t in study.trials] == [t.value for t in plain.trials]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_stopped_pair_is_measured_again_if_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_a_time(monkeypatch)
    overrides = ("search.stopper=wilcoxon",)
    study = run(place, "search.trials=6", *overrides)
    stopped = next(t for t in study.trials if "stopped_after" in t.user_attrs)
    study.enqueue_trial(stopped.params)
    study = run(place, "search.trials=7", *overrides)
    assert "repeats" not in study.trials[6].user_attrs


# --- samplers


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", ["gp", pytest.param("tpe", marks=pytest.mark.slow)]
)  # random is what the other tests run
def test_samplers(place: Path, sampler: str) -> None:
    study = run(place, f"search.sampler={sampler}", "search.trials=5", BOTH)
    assert states(study) == ["COMPLETE"] * 5
    assert all(0 <= t.params["beta"] <= 2 * 0.4 / 3 for t in study.trials)
    study = run(place, f"search.sampler={sampler}", "search.trials=6", BOTH)
    assert distinct([t.params for t in study.trials]) >= 5


GRID = ("search.sampler=grid", "search.step=0.06")
POINTS = [0.06, 0.12, 0.18, 0.24]  # up to 2 · 0.4 / 3 = 0.267


def without_total(place: Path) -> None:
    toml = (place / "tiny.toml").read_text()
    (place / "tiny.toml").write_text(toml.replace("trials = 3\n", ""))


def asked(study: optuna.Study) -> list[tuple[str, float]]:
    return sorted((t.params["pruner"], t.params["beta"]) for t in study.trials if t.state == TrialState.COMPLETE)


@pytest.mark.slow
@pytest.mark.parametrize("pruners", [pytest.param(["wanda"], marks=pytest.mark.slow), ["wanda", "magnitude"]], ids=len)
def test_a_grid_is_its_points_and_uniform(place: Path, monkeypatch: pytest.MonkeyPatch, pruners: list[str]) -> None:
    without_total(place)
    study = run(place, *GRID, f"prune.pruners={pruners}")
    assert asked(study) == sorted((pruner, beta) for pruner in pruners for beta in [0.0, *POINTS])
    assert study.user_attrs["total"] == 5 * len(pruners)
    assert study.user_attrs["test_nlls"]
    without_bench(monkeypatch)
    assert len(run(place, *GRID, f"prune.pruners={pruners}").trials) == 5 * len(pruners)


@pytest.mark.slow
def test_a_grid_in_several_runs_misses_no_point(place: Path) -> None:
    for total in (2, 3, 4):
        run(place, *GRID, BOTH, f"search.trials={total}")
    with pytest.raises(KeyboardInterrupt):
        run(place, *GRID, BOTH, "search.trials=10", watch=interrupt_at(5))
    study = run(place, *GRID, BOTH, "search.trials=10")
    assert asked(study) == sorted((pruner, beta) for pruner in ("wanda", "magnitude") for beta in [0.0, *POINTS])


@pytest.mark.slow
def test_a_grid_of_one_point(place: Path) -> None:
    without_total(place)
    assert asked(run(place, "search.sampler=grid", "search.step=0.2")) == [("wanda", 0.0), ("wanda", 0.2)]


@pytest.mark.slow
def test_a_grid_of_fewer_trials_than_points(place: Path) -> None:
    study = run(place, *GRID)
    assert progress.counted(study) == 3
    assert distinct([t.params for t in study.trials if t.state == TrialState.COMPLETE]) == 3


@pytest.mark.slow
def test_a_grid_of_more_trials_than_points_ends_with_them(place: Path) -> None:
    assert progress.counted(run(place, *GRID, "search.trials=99")) == 5


@pytest.mark.slow
def test_a_step_beyond_the_bound_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"^search.step: 0.3 is larger than the bound of beta, 0.266667$"):
        run(place, "search.sampler=grid", "search.step=0.3")


# --- the paper's protocol


def paper(place: Path) -> None:
    toml = (place / "tiny.toml").read_text()
    head, report = toml.split("[texts.test]")
    toml = 'protocol = "paper"\n' + head + report[report.index("[search]") :]
    (place / "tiny.toml").write_text(toml)


@pytest.mark.slow
def test_the_best_of_each_allocation_is_reported_and_ranked(place: Path) -> None:
    """Uniform, ATP, the curve and OWL in one study: each with its own parameters, all compared with uniform."""
    study = run(place, "allocation=['atp', 'curve', 'owl']", "search.trials=9", "search.sampler=gp")
    assert states(study) == ["COMPLETE"] * 9
    for trial in study.trials:
        names = {"atp": {"beta"}, "owl": {"M", "lam"}}.get(trial.params["allocation"])
        if names is not None:
            assert set(trial.params) == {"pruner", "allocation"} | names
    ranks, results = summarise(study).ranks, summarise(study).results
    assert {allocation_of(rank) for rank in ranks} == {"uniform", "atp", "curve", "owl"}
    values = [rank.value or 0 for rank in ranks]
    assert values == sorted(values)
    for rank in ranks:
        if allocation_of(rank) == "uniform":
            assert results.against_uniform(rank) is None
            continue
        own, base = (study.user_attrs["test_nlls"][str(t.number)] for t in (rank, study.trials[0]))
        against = results.against_uniform(rank)
        assert against and against.on == "test"
        assert against.change.value == pytest.approx(math.exp(fmean(own) - fmean(base)) - 1)
    best = ranks[0]
    config = read_config(place / "tiny.best.json")
    assert config.plan.parameters == {k: v for k, v in best.params.items() if k not in ("pruner", "allocation")}


@pytest.mark.slow
def test_a_split_within_the_block_is_carried_to_the_configuration(place: Path) -> None:
    study = run(place, "allocation=curve", "search.trials=3", "sparsity=0.5")
    trial = study.trials[2]  # where the curve begins beside ATP's middle
    plan = Plan.model_validate(trial.user_attrs["plan"])
    rows = linears_of(plan) or ()
    assert [len(row) for row in rows] == [7] * BLOCKS
    assert all(row[2] < row[0] == row[1] == row[6] for row in rows)  # the value projection is denser
    assert trial.user_attrs["realised"] == pytest.approx(0.5, abs=0.03)  # whole weights of rows of 32
    assert plan.amounts == pytest.approx([(row[0] * (7680 - 512) + row[2] * 512) / 7680 for row in rows], abs=1e-9)


@pytest.mark.slow
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


def test_quiet_lets_errors_through() -> None:
    with pytest.raises(UserError), quiet():
        raise UserError("no")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_follows_a_total_that_another_one_raises(place: Path) -> None:
    def watch(event: Event) -> None:
        if isinstance(event, TrialStarted) and event.title == "trial 2":
            study = reopen(place)
            study.set_user_attr("total", 5)

    assert len(run(place, watch=watch).trials) == 5
    assert reopen(place).user_attrs["test_nlls"]
