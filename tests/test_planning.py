import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_forecast import RATES
from tinystudy import TOKENS, WIDTH, CommandLine, run, settings, stored, study_file

from atp_tune.cli.commands.studies import cost_beside
from atp_tune.cost import forecast, planning, probe
from atp_tune.cost.forecast import Amounts, Done
from atp_tune.cost.forecast import parts as parts_of
from atp_tune.cost.planning import foresee, foresee_open
from atp_tune.cost.remaining import foretold
from atp_tune.events import Ahead, Event, Opened, ignore_events
from atp_tune.results.goals import front_of
from atp_tune.results.results import is_uniform
from atp_tune.run.session import Session, Setup
from atp_tune.search import trial_loop
from atp_tune.storage import opening
from atp_tune.storage.progress import counted


def test_a_study_is_foretold(place: Path) -> None:
    found = foresee(study_file(place), "tiny", ignore_events)
    (trial,) = found.trial
    assert (trial.pruner, trial.tokens.total) == ("wanda", 2 * 256 + 512)
    assert found.whole.trials == 3
    assert found.whole.tokens == 3 * 1024 + 512 + 256 + 2 * (512 + 512) + 512
    assert trial.seconds is not None
    assert min(trial.seconds.calibrate, trial.seconds.prune, trial.seconds.evaluate) > 0
    assert found.whole.seconds == found.whole.seconds_left
    assert found.weights.offload == "none"
    assert found.weights.blocks == 4
    assert found.memory.device is None
    assert found.problems == ()
    assert not list(place.glob("*.db"))


def test_another_preset_is_foretold_beside_an_open_study(place: Path) -> None:
    """A preset did not say what it takes before it started; the loading is over by then."""
    file = study_file(place)
    setup = Setup.of_study(file.study, file.folder, False)
    with Session.open(setup) as context:
        own, other = foresee_open(file, "tiny", context, file.study)
    assert own.tokens == foresee(file, "tiny", ignore_events).whole.tokens
    assert (other.tokens, other.seconds) == (own.tokens, own.seconds)  # the same study, by its settings alone
    costs = [own.model_copy(update={"seconds": seconds, "descents": 60.0}) for seconds in (170.0, 1500.0)]
    said = "3 trials, about 3 min, of which 60 s for the gradient; --preset"
    assert cost_beside(costs, "quick", "balanced") == f"quick: {said} balanced measures more, in about 25 min"
    assert cost_beside(costs[::-1], "balanced", "quick").endswith("; --preset quick measures less, in about 3 min")
    assert cost_beside(costs[:1], "quick", "balanced") == f"quick: {said.partition(';')[0]}"


@pytest.mark.parametrize(
    ("keys", "models", "speed"),
    [
        ([], 3, 0),
        (["speed=true"], 3, 2 * 256 + 2 * 4 * (64 + 16 * 96)),
        (["allocation=['atp', 'gradient-rows', 'uniform']"], 4, 0),
        (["allocation=uniform"], 3, 0),
        (["continuations.tokens=0"], 0, 0),
        (["sparsity=[0.5, 0.7]", "allocation=['atp', 'gradient-rows']"], 3, 0),
    ],
)
def test_texts_and_speed_at_the_end_are_counted(keys: list[str], models: int, speed: int, tiny_place: Path) -> None:
    """In the time that is left while the study runs, and in what `plan` says."""
    study = study_file(tiny_place, "continuations.tokens=8", *keys).study
    ahead: list[Event] = []
    items = {"calibration": (8, TOKENS), "validation": (16, TOKENS), "test": (16, TOKENS)}
    foretold(ahead.append)(Opened(study, 3, 0, items))
    assert isinstance(ahead[0], Ahead)
    parts = ahead[0].parts
    assert parts.get("generate") == ((models, 3 * 8 * 32) if models else None)
    assert parts.get("speed") == ((1, speed) if speed else None)
    known = Amounts(study, forecast.Tokens(256, 512, 512, 0), 8, 16, 3.0, False)
    expected = (models * 3 * 8 * 32 + speed) * (4 * 0.002 + 0.01) + 5 * (speed > 0)
    after = [part for part in parts_of(known, Done(3), RATES) if part.name in ("generate", "speed")]
    assert sum(part.number * part.seconds for part in after) == pytest.approx(expected)


@pytest.mark.slow
def test_the_dense_states_that_kl_compares_with_are_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[forecast.Bytes] = []
    monkeypatch.setattr(planning, "peaks", lambda held, *more: seen.append(held) or forecast.peaks(held, *more))
    for keys in ((), ("search.objective=kl",)):
        assert foresee(study_file(place, *keys), "t", ignore_events).trial[0].seconds
    plain, _, kl, _ = seen  # before the model is loaded, and with what the probe has measured
    assert kl.dense - plain.dense == (16 + 16) * TOKENS * WIDTH * 4
    assert replace(kl, dense=0, process=0) == replace(plain, dense=0, process=0)


@pytest.mark.slow
def test_a_study_that_may_settle_is_foretold_at_most(place: Path, command: CommandLine) -> None:
    options = settings("search.early_termination=true", "search.sampler=gp")
    assert "study:   at most 3 trials, " in command("plan", "--study", place / "tiny.toml", *options).out
    assert "study:   3 trials, " in command("plan", "--study", place / "tiny.toml").out


@pytest.mark.slow
def test_tasks_of_a_limit_are_said_to_be_left_out(place: Path, command: CommandLine) -> None:
    options = settings(*OVER, "search.trials=9", "limit.min_accuracy={far=0.6}")
    line = next(
        line
        for line in command("plan", "--study", place / "tiny.toml", *options).out.splitlines()
        if "9 trials" in line
    )
    assert line.endswith(", without the tasks of limit.min_accuracy")


@pytest.mark.slow
def test_trials_that_are_done_count(done: Path) -> None:
    found = foresee(study_file(done), "tiny", ignore_events)
    assert (found.whole.trials, found.whole.done, found.whole.seconds_left) == (6, 6, 0.0)
    assert {trial.pruner for trial in found.trial} == {"wanda", "magnitude"}


@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_where_weights_will_lie(place: Path, offload: str) -> None:
    found = foresee(study_file(place, f"model.offload={offload}"), "tiny", ignore_events)
    assert found.weights.offload == offload


@pytest.mark.slow
def test_a_small_device_makes_weights_stay_on_the_host(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "200kB")
    found = foresee(study_file(place), "tiny", ignore_events)
    assert found.weights.offload == "cpu"
    assert found.memory.device_free == 200_000
    assert found.memory.device is not None
    assert run(place).best_value > 0


def test_what_does_not_fit_is_not_loaded(place: Path, monkeypatch: pytest.MonkeyPatch, command: CommandLine) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "20kB")
    monkeypatch.setattr(probe, "probe", lambda *args: pytest.fail("loaded"))
    answer = command("plan", "--study", place / "tiny.toml")
    assert answer.code == 0
    assert "does not fit: device memory: " in answer.out
    assert "2,048" not in answer.out
    assert "1,024" in answer.out


@pytest.mark.slow
def test_the_command(place: Path, command: CommandLine) -> None:
    answer = command("plan", "--study", place / "tiny.toml", *settings("prune.pruners=['wanda', 'sparsegpt']"))
    assert answer.code == 0, answer.err
    for word in ("wanda", "sparsegpt", "3 trials", "tokens through the model", "in 4 blocks", "on the device", "host "):
        assert word in answer.out
    answer = command("plan", "--study", place / "tiny.toml", "--json", "--study-name", "other")
    document = json.loads(answer.out)
    assert (document["format"], document["study"]) == ("atp_tune.plan/2", "other")
    assert answer.err == ""


@pytest.mark.slow
def test_statistics_of_the_dense_model_are_counted_once(place: Path) -> None:
    found = foresee(
        study_file(place, "prune.statistics=dense", "prune.pruners=['wanda','sparsegpt']"), "t", ignore_events
    )
    assert {trial.tokens.listen for trial in found.trial} == {0}
    plain = foresee(study_file(place, "prune.pruners=['magnitude']"), "t", ignore_events)
    assert (found.whole.tokens or 0) - (plain.whole.tokens or 0) == 2 * 2 * 256
    owl = foresee(study_file(place, "allocation=['owl']", "prune.pruners=['magnitude']"), "t", ignore_events)
    assert (owl.whole.tokens or 0) - (plain.whole.tokens or 0) == 2 * 256


@pytest.mark.slow
def test_a_screening_is_foretold(place: Path, command: CommandLine) -> None:
    words = ("search.screen.trials=5", "search.screen.stride=3", "search.sampler=gp")
    plain = foresee(study_file(place), "tiny", ignore_events)
    found = foresee(study_file(place, *words), "tiny", ignore_events)
    assert (found.whole.trials, found.whole.screened) == (3, 5)
    assert (found.whole.tokens or 0) - (plain.whole.tokens or 0) == (5 + 1) * 6 * 32 + 2 * 256
    assert (found.whole.seconds or 0) > 0
    assert found.memory.host > plain.memory.host  # ranks of weights
    assert (
        "3 trials after 5 trials of screening" in command("plan", "--study", place / "tiny.toml", *settings(*words)).out
    )
    run(place, *words, timeout=0)
    run(place, *words)
    assert foresee(study_file(place, *words), "tiny", ignore_events).whole.seconds_left == 0


OVER = ("sparsity=[0.3, 0.8]", "search.sampler=tpe", "search.screen={trials=6, confirm=3, stride=3}",
        "texts.calibration.nsamples=4", "texts.calibration.draws=3")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "trials", "most"),
    [
        ([], 6, 0),  # all trials may be on the front, or be uniform beside it: none is pruned again
        (["limit.max_increase=0.05", "search.trials=9"], 9, 2),
        (["limit.max_kl=0.05", "search.trials=9", "search.objective=kl"], 9, 2),
    ],
)
def test_a_study_over_an_interval_is_foretold(place: Path, more: list[str], trials: int, most: int) -> None:
    """It prunes at most so many trials again for the test text, and with other draws the best and its uniform."""
    toml = (place / "tiny.toml").read_text().replace("trials = 3\n", "")
    (place / "tiny.toml").write_text(toml)
    found = foresee(study_file(place, *OVER, *more), "tiny", ignore_events)
    assert (found.whole.trials, found.whole.screened) == (trials, 6)
    assert found.whole.early_termination == bool(more)
    screened, calibration, text = (6 + 1) * 6 * TOKENS + 2 * 128, 2 * 128, 512
    tested, drawn = text + most * (calibration + text), 2 * 2 * (calibration + text)
    each = calibration + (text if more else 2 * text)
    assert found.whole.tokens == trials * each + text + 128 + tested + drawn + screened
    study = run(place, *OVER, *more)
    assert counted(study) <= trials
    measured = set(study.user_attrs["test_nlls"]) - {"dense"}
    assert 1 <= len(measured) <= (most or trials)
    assert 1 <= len(study.user_attrs["draws"]) <= 2
    if not more:
        assert all(str(trial.number) in measured for trial in front_of(study) if not is_uniform(trial))
    left = foresee(study_file(place, *OVER, *more), "tiny", ignore_events).whole
    assert (left.seconds_left, left.trials) == (0, counted(study))


def test_the_trials_of_an_interval_are_known_without_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = (place / "tiny.toml").read_text().replace("trials = 3\n", "")
    (place / "tiny.toml").write_text(toml)
    monkeypatch.setattr(planning, "problems", lambda *_: ("too large",))
    found = foresee(study_file(place, *OVER), "tiny", ignore_events)
    assert (found.whole.trials, found.whole.seconds) == (6, None)


@pytest.mark.slow
def test_a_screening_has_a_row_and_counts_as_far_as_it_went(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("search.screen.trials=30", "search.screen.stride=3", "search.sampler=gp", "search.early_termination=true")
    monkeypatch.setattr(trial_loop, "should_terminate", lambda study, space: counted(study) >= 9)
    run(place, *words)
    settled = counted(stored(place, "tiny.screen"))
    assert settled == 9
    found = foresee(study_file(place, *words), "tiny", ignore_events)
    assert (found.whole.screened, found.whole.seconds_left) == (settled, 0)
    assert [(row.what, row.tokens.total) for row in found.trial] == [("trial", 2 * 256 + 512), ("screening", 6 * 32)]


@pytest.mark.slow
def test_what_stands_in_the_middle_of_a_block_is_stated(place: Path) -> None:
    plain, found = (
        foresee(study_file(place, f"prune.statistics={way}", "device=cpu"), "tiny", ignore_events)
        for way in ("block", "sequential")
    )
    assert found.trial[0].tokens.total == plain.trial[0].tokens.total - 256
    assert found.memory.host != plain.memory.host


def test_a_model_with_no_weights_is_one_line(place: Path, command: CommandLine) -> None:
    shutil.rmtree(place / "model")
    assert command("plan", "--study", place / "tiny.toml").error.startswith("model.source: ")


@pytest.mark.slow
def test_nothing_is_stored(done: Path) -> None:
    before = (done / "tiny.db").read_bytes()
    foresee(study_file(done), "tiny", ignore_events)
    assert (done / "tiny.db").read_bytes() == before
    assert opening.open_storage(study_file(done).storage_url, create=False) is not None
