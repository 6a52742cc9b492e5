from pathlib import Path

import pytest
from expect import parametrize, slow
from test_forecast import RATES
from tinystudy import TOKENS, CommandLine, run, study_file

from atp_tune.cli.studies import cost_beside
from atp_tune.cost import forecast, probe
from atp_tune.cost.forecast import Amounts, Done
from atp_tune.cost.forecast import parts as parts_of
from atp_tune.cost.planning import foresee, foresee_open
from atp_tune.cost.remaining import foretold
from atp_tune.events import Ahead, Event, Opened, ignore_events
from atp_tune.results.goals import pareto_front
from atp_tune.results.results import is_uniform
from atp_tune.run.session import Session, Setup
from atp_tune.storage import opening
from atp_tune.storage.progress import counted


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


@parametrize(
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


def test_what_does_not_fit_is_not_loaded(place: Path, monkeypatch: pytest.MonkeyPatch, command: CommandLine) -> None:
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "20kB")
    monkeypatch.setattr(probe, "probe", lambda *args: pytest.fail("loaded"))
    answer = command.ok("plan", "--study", place / "tiny.toml")
    assert "does not fit: device memory: " in answer.out
    assert "2,048" not in answer.out
    assert "1,024" in answer.out


OVER = ("sparsity=[0.3, 0.8]", "search.sampler=tpe", "search.screen={trials=6, confirm=3, stride=3}",
        "texts.calibration.nsamples=4", "texts.calibration.draws=3")  # fmt: skip


@slow
@parametrize(
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
    study = run(place, *OVER, *more)
    assert counted(study) <= trials
    measured = set(study.user_attrs["test_nlls"]) - {"dense"}
    assert 1 <= len(measured) <= (most or trials)
    assert 1 <= len(study.user_attrs["draws"]) <= 2
    if not more:
        assert all(str(trial.number) in measured for trial in pareto_front(study) if not is_uniform(trial))
    left = foresee(study_file(place, *OVER, *more), "tiny", ignore_events).whole
    assert (left.seconds_left, left.trials) == (0, counted(study))


@slow
def test_nothing_is_stored(done: Path) -> None:
    before = (done / "tiny.db").read_bytes()
    foresee(study_file(done), "tiny", ignore_events)
    assert (done / "tiny.db").read_bytes() == before
    assert opening.open_storage(study_file(done).storage_url, create=False) is not None
