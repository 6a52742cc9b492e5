"""Studies that minimise the KL divergence from the dense model, or perplexity and KL together."""

import math
import shutil
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import naive
import optuna
import pytest
from byhand import ByHand
from families import few
from optuna.trial import FrozenTrial, TrialState
from synthetic import storage_in
from tinystudy import CommandLine, few_at_a_time, quiet, run, settings, start, stored, study_file
from tinystudy import finish as finished

from atp_tune import figures, measures
from atp_tune.allocations import Budget
from atp_tune.api.merging import merge
from atp_tune.config.best import read_config
from atp_tune.config.facts import facts
from atp_tune.dashboard.publishing import study_note, trial_note
from atp_tune.errors import UserError
from atp_tune.events import TrialEnded
from atp_tune.results.goals import front_of
from atp_tune.results.status import status_of, to_json
from atp_tune.results.stored import best_config
from atp_tune.results.summary import summarise
from atp_tune.search import trial_loop
from atp_tune.search.samplers import levelled
from atp_tune.search.space import make_space
from atp_tune.search.trial_loop import regret_of
from atp_tune.storage import progress
from atp_tune.storage.fingerprint import SUFFIX

KL = "search.objective=kl"
BOTH = 'search.objective=["kl", "perplexity"]'
GP = "search.sampler=gp"


@pytest.fixture(scope="module")
def made(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study of KL, and one of both; to be read only."""
    place = tmp_path_factory.mktemp("objectives") / "tiny"
    shutil.copytree(tiny_place, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(place.parent / "cache"))
        run(place, KL, GP, "search.trials=4", name="kl")
        run(place, BOTH, GP, "search.trials=6", name="both")
    return place


def windows_of(study: optuna.Study, key: str) -> list[list[float]]:
    return [trial.user_attrs[key] for trial in study.trials if "repeats" not in trial.user_attrs]


# --- one value


@pytest.mark.slow
def test_a_trial_s_value_is_its_kl_by_hand(made: Path) -> None:
    study, dense = stored(made, "kl"), ByHand(made)
    assert [direction.name for direction in study.directions] == ["MINIMIZE"]
    best = study.best_trial
    assert best.number == min(study.trials, key=lambda trial: trial.values[0]).number
    pruned = ByHand(made).prune("wanda", best.user_attrs["plan"]["levels"])
    expected = naive.kls_of(dense.model, pruned.model, dense.windows("validation"))
    assert best.user_attrs["kls"] == pytest.approx(expected, rel=1e-5)
    assert best.user_attrs["nlls"] == pytest.approx(pruned.nlls("validation"), rel=1e-5)
    assert best.value == fmean(best.user_attrs["kls"])
    results = summarise(study).results
    score, kl = results.score(best, "validation"), results.score(best, "validation", measures.KL)
    assert score
    assert kl
    assert score.value == math.exp(fmean(best.user_attrs["nlls"]))
    assert (kl.value, kl.stderr) == (best.value, best.user_attrs["stderr"])
    on_report = naive.kls_of(dense.model, pruned.model, dense.windows("test"))
    assert study.user_attrs["test_kls"][str(best.number)] == pytest.approx(on_report, rel=1e-5)
    assert study.user_attrs["test_kls"].keys() == study.user_attrs["test_nlls"].keys() - {"dense"}


@pytest.mark.slow
def test_the_best_is_by_kl_and_compared_with_uniform_by_windows(made: Path) -> None:
    study = stored(made, "kl")
    summary = summarise(study)
    assert summary.objectives == ("kl",)
    assert summary.best_trial == study.best_trial
    uniform, kls = summary.uniform_trial, study.user_attrs["test_kls"]
    assert uniform
    rank = next(rank for rank in summary.ranks if rank.number != uniform.number)
    against = summary.results.against_uniform(rank, measures.KL)
    assert against
    expected = fmean(kls[str(rank.number)]) / fmean(kls[str(uniform.number)]) - 1
    assert against.change.value == pytest.approx(expected)
    assert 0 < against.change.stderr < 0.2


@pytest.mark.slow
def test_the_configuration_holds_both(made: Path) -> None:
    config = read_config(made / "kl.best.json")
    summary = summarise(stored(made, "kl"))
    assert config.scores["best"] == summary.results.scores(summary.best_trial)
    assert config.scores["uniform"] == summary.results.scores(summary.uniform_trial)
    assert config.scored(measure=measures.KL)


@pytest.mark.slow
def test_the_paper_s_protocol_reports_on_the_search_text(place: Path) -> None:
    file = place / "tiny.toml"
    head, _, tail = file.read_text().partition("[texts.test]")
    file.write_text('protocol = "paper"\n' + head + "[search]" + tail.partition("[search]")[2])
    study = run(place, KL)
    best = study.best_trial
    assert study.user_attrs["test_kls"][str(best.number)] == best.user_attrs["kls"]


@pytest.mark.slow
def test_a_stopped_trial_has_a_kl_that_compares(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_a_time(monkeypatch)
    study = run(place, KL, "search.stopper=wilcoxon", "search.trials=12")
    stopped = [trial for trial in study.trials if "stopped_after" in trial.user_attrs]
    assert stopped
    for trial in stopped:
        seen = trial.user_attrs["kls"]
        assert len(seen) == trial.user_attrs["stopped_after"] == len(trial.user_attrs["nlls"]) < 16
        bests = [fmean(full) for full in windows_of(study, "kls") if len(full) == 16]
        assert trial.value is not None
        assert trial.value > min(bests)
        results = summarise(study).results
        assert results.score(trial, "validation") is None
        told = results.score(trial, "validation", measures.KL)
        assert told and (told.value, told.stderr) == (trial.value, 0)
    kls = study.trials[0].user_attrs["kls"]
    assert study.trials[0].intermediate_values == {k: pytest.approx(fmean(kls[2 * k : 2 * k + 2])) for k in range(8)}
    status_of(summarise(study), datetime.now())


@pytest.mark.slow
def test_what_may_be_gained_of_a_kl_is_relative(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_loop, "GAP", 1)  # eleven points may leave one
    study = run(place, KL, GP, "search.early_termination=true", "search.trials=11")
    space = make_space(study_file(place).study, Budget(0.6, tuple(study.user_attrs["sizes"])))
    trials = study.trials
    known = regret_of(trials, space, "atp")
    for trial in trials:
        trial.value = 3 * trial.value
    assert regret_of(trials, space, "atp") == pytest.approx(known, rel=1e-3) and known > 0


@pytest.mark.slow
def test_a_study_of_kl_is_screened(place: Path) -> None:
    study = run(place, KL, GP, "search.screen.trials=4", "search.screen.confirm=1", "search.trials=2")
    screened = stored(place, "tiny" + SUFFIX)
    assert [len(kls) for kls in windows_of(screened, "kls")] == [4] * len(windows_of(screened, "kls"))
    assert all(trial.value == fmean(trial.user_attrs["kls"]) for trial in screened.trials)
    assert len(study.trials[0].user_attrs["kls"]) == 16


def test_a_kl_of_zero_has_a_level_too() -> None:
    points = [optuna.create_trial(value=value) for value in (0.0, 0.2)]
    assert levelled(points, points) == []  # all of them are known
    assert levelled(points[1:], points[:1]) == []


# --- two values


def naive_front(trials: list[FrozenTrial]) -> set[int]:
    front = set()
    for one in trials:
        beaten = False
        for other in trials:
            no_worse = all(b <= a for a, b in zip(one.values, other.values, strict=True))
            beaten = beaten or (no_worse and other.values != one.values)
        if not beaten:
            front.add(one.number)
    return front


@pytest.mark.slow
def test_two_values_make_a_study_of_two_objectives(made: Path) -> None:
    study = stored(made, "both")
    assert [direction.name for direction in study.directions] == ["MINIMIZE"] * 2
    assert study.metric_names == ["perplexity", "kl"]
    assert study.user_attrs["fingerprint"]["search.objective"] == ["perplexity", "kl"]
    for trial in study.trials:
        nlls, kls = trial.user_attrs["nlls"], trial.user_attrs["kls"]
        assert trial.values == [math.exp(fmean(nlls)), fmean(kls)]


@pytest.mark.slow
def test_the_front_is_that_of_a_double_loop(made: Path) -> None:
    study = stored(made, "both")
    summary = summarise(study)
    measured = [trial for trial in study.trials if "repeats" not in trial.user_attrs]
    numbers = [trial.number for trial in summary.front]
    assert set(numbers) == naive_front(measured)
    assert 0 < len(numbers) < len(measured)
    assert summary.front[0] == summary.best_trial == min(measured, key=lambda trial: trial.values[0])
    assert sorted(numbers, key=lambda number: study.trials[number].values[0]) == numbers


@pytest.mark.parametrize("seed", range(5))
def test_the_front_of_any_values(seed: int) -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(30):
        trial = study.ask()
        study.tell(trial, [trial.suggest_int(name, 1, 9) for name in "ab"])
    found = front_of(study)
    assert {trial.number for trial in found} == naive_front(study.trials)
    assert [trial.values for trial in found] == sorted(trial.values for trial in found)
    assert front_of(optuna.create_study()) == []


@pytest.mark.slow
def test_both_studies_tell_the_same_of_a_plan(made: Path) -> None:
    one, both = stored(made, "kl").trials[0], stored(made, "both").trials[0]
    assert one.params == both.params
    assert one.value == both.values[1]
    assert one.user_attrs["nlls"] == both.user_attrs["nlls"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", few(["gp", "tpe", "random", "grid"], ["random"]))
def test_a_study_of_two_values_goes_on_where_it_was(sampler: str, place: Path) -> None:
    keys = (BOTH, f"search.sampler={sampler}", "search.step=0.02")
    run(place, *keys, "search.trials=4")
    study = run(place, *keys, "search.trials=7")
    whole = run(place, *keys, "search.trials=7", name="whole")
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]
    assert [trial.values for trial in study.trials] == [trial.values for trial in whole.trials]
    assert len(study.trials) == 7


@pytest.mark.slow
@pytest.mark.parametrize("allocations", ['["atp", "curve"]', '["atp", "owl"]'])
def test_two_values_with_several_allocations(allocations: str, place: Path) -> None:
    study = run(place, BOTH, GP, f"allocation={allocations}", "search.trials=10")
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert len({trial.params["allocation"] for trial in study.trials}) == 2


@pytest.mark.slow
def test_progress_names_both_values(made: Path, place: Path, command: CommandLine) -> None:
    events: list[Any] = []
    run(place, BOTH, watch=events.append)
    ended = [event for event in events if isinstance(event, TrialEnded)]
    assert [[event.scores[key] for key in ("perplexity", "kl")] for event in ended] == [
        trial.values for trial in stored(place).trials
    ]
    assert ended[-1].best == {"perplexity": min(event.scores["perplexity"] for event in ended)}
    answer = command("--study", place / "tiny.toml", "--study-name", "again", *settings(KL))
    trial = stored(place, "again").trials[0]
    score = summarise(stored(place, "again")).results.score(trial, "validation")
    assert score
    assert f": perplexity {score.value:.2f}, KL {trial.values[0]:.4f}, KL 99% " in answer.out
    assert "(best KL " in answer.out


@pytest.mark.slow
def test_a_lost_trial_of_two_values_runs_again(place: Path) -> None:
    study = run(place, BOTH)
    params, kinds = {**study.trials[2].params, "beta": 0.01}, study.trials[2].distributions
    attrs = {"lost": "interrupted"}
    study.add_trial(optuna.create_trial(state=TrialState.FAIL, params=params, distributions=kinds, user_attrs=attrs))
    again = run(place, BOTH, "search.trials=5")
    assert [trial.params.get("beta") for trial in again.trials].count(0.01) == 2
    assert progress.counted(again) == 5


@pytest.mark.slow
def test_two_workers_share_a_study_of_two_values(place: Path) -> None:
    keys = settings(BOTH, "search.trials=8")
    answer = finished(start("--study", place / "tiny.toml", *keys, "--workers", "2"), 120)
    assert answer.code == 0, answer.err
    study = stored(place)
    assert progress.counted(study) == 8
    assert "| trial | method" in answer.out
    alone = run(place, BOTH, "search.trials=8", name="alone")
    values = {str(trial.params): trial.values for trial in alone.trials}
    assert {str(trial.params): trial.values for trial in study.trials} == {
        params: pytest.approx(found, rel=1e-5) for params, found in values.items()
    }


@pytest.mark.slow
def test_studies_of_two_values_are_merged(made: Path, place: Path, tmp_path: Path) -> None:
    run(place, BOTH, GP, "search.seed=1", name="both")
    with quiet():
        merged = merge([str(made / "tiny.db"), str(place / "tiny.db")], tmp_path / "new.db", "both").study
    assert len(merged.directions) == 2
    assert len(merged.trials) == 6 + 3
    summary = summarise(merged)
    assert summary.best_trial
    assert merged.user_attrs["test_kls"].keys() == merged.user_attrs["test_nlls"].keys() - {"dense"}
    assert {trial.number for trial in summary.front} == naive_front(merged.trials) - {
        trial.number for trial in merged.trials if "repeats" in trial.user_attrs
    }


# --- what people and programs see


@pytest.mark.slow
def test_figures(made: Path) -> None:
    drawn = figures.draw(summarise(stored(made, "both")))
    assert set(drawn) == {"perplexity", "front", "sparsity", "error", "seconds"}
    study = stored(made, "both")
    front = next(trace for trace in drawn["front"].data if trace.name == "Pareto front")
    expected = [study.trials[n].values for n in (t.number for t in summarise(study).front)]
    assert [list(pair) for pair in zip(front.x, front.y, strict=True)] == [pytest.approx(v, rel=1e-4) for v in expected]
    drawn = figures.draw(summarise(stored(made, "kl")))
    assert "front" not in drawn
    assert drawn["perplexity"].layout.title.text == "KL divergence against β"
    assert drawn["perplexity"].layout.yaxis.title.text == "KL divergence, validation text"
    marks = [y for trace in drawn["perplexity"].data if trace.error_y.array is not None for y in trace.y]
    known = [t.values[0] for t in stored(made, "kl").trials]
    shown = sorted(value for value in known if value <= 3 * median(known))
    assert sorted(marks) == pytest.approx(shown, rel=1e-4)


@pytest.mark.slow
def test_any_trial_can_be_exported(made: Path, place: Path, command: CommandLine) -> None:
    shutil.copy(made / "tiny.db", place / "tiny.db")
    asked = ("export", "--study", place / "tiny.toml", "--study-name", "both")
    summary = summarise(stored(place, "both"))
    assert summary.best_trial
    assert read_config(made / "both.best.json").trial == summary.best_trial.number
    other = next(trial for trial in summary.trials if trial.number != summary.best_trial.number)
    out = place / f"both.trial-{other.number}.json"
    assert command(*asked, "--trial", str(other.number)).out == f"{out}\n"
    config = read_config(out)
    assert config.trial == other.number
    assert config.plan.amounts == tuple(other.user_attrs["plan"]["levels"])
    assert config.scores["best"] == summary.results.scores(other)
    assert not (place / "both.best.json").exists()
    error = command(*asked, "--trial", "99").error
    assert error == "study both: trial 99 is not measured in full; `status` lists all"


# --- what is refused, and what goes on


@pytest.mark.parametrize(
    ("keys", "first", "all_"),
    [
        (["search.stopper=wilcoxon"], "search.stopper", "it"),
        (
            [GP, "search.early_termination=true", "search.screen.trials=3"],
            "search.early_termination",
            "it and search.screen",
        ),
        (["search.screen.trials=3"], "search.screen", "it"),
    ],
)
def test_what_needs_one_value_is_refused(
    keys: list[str], first: str, all_: str, place: Path, command: CommandLine
) -> None:
    words = f"{first}: compares by one value; leave {all_} out, or give search.objective one name"
    assert command("--study", place / "tiny.toml", *settings(BOTH, *keys)).error.endswith(words)
    assert not (place / "tiny.db").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ppl", 'search.objective[0]: must be one of perplexity, kl, accuracy, got "ppl"'),
        ('["kl", "nll"]', 'search.objective[1]: must be one of perplexity, kl, accuracy, got "nll"'),
        ("[]", "search.objective: must hold at least 1 value, got []"),
        ("7", "search.objective: must be a list, got 7"),
    ],
)
def test_objectives_that_are_none(value: str, words: str, place: Path) -> None:
    with pytest.raises(UserError) as caught:
        study_file(place, f"search.objective={value}")
    assert words in str(caught.value)


def test_each_once_in_one_order(place: Path) -> None:
    orders = ('["kl", "perplexity"]', '["perplexity", "kl", "kl"]')
    found = [study_file(place, f"search.objective={order}").study.search.objective for order in orders]
    assert found == [("perplexity", "kl")] * 2
    assert study_file(place, 'search.objective=["kl"]').study == study_file(place, KL).study


@pytest.mark.slow
def test_a_study_of_another_objective_is_refused_by_name(made: Path, place: Path, command: CommandLine) -> None:
    shutil.copy(made / "tiny.db", place / "tiny.db")
    study = ("--study", place / "tiny.toml", "--study-name")
    said = command(*study, "kl", "--trials", "9", *settings(GP)).error
    assert said.startswith('study kl: search.objective is not set, was ["kl"]. Put it back, or start another')
    said = command(*study, "kl", "--trials", "9", *settings(GP, BOTH)).error
    assert said.startswith('study kl: search.objective is ["perplexity", "kl"], was ["kl"]. Put it back')


@pytest.mark.slow
def test_perplexity_is_no_fact_so_that_older_studies_go_on(place: Path) -> None:
    plain, named = study_file(place).study, study_file(place, "search.objective=perplexity").study
    assert facts(plain) == facts(named)
    assert "search.objective" not in facts(plain)
    study = run(place)
    assert "search.objective" not in study.user_attrs["fingerprint"]
    assert all("kls" not in trial.user_attrs for trial in study.trials)
    assert len(run(place, "search.objective=perplexity", "search.trials=4").trials) == 4


@pytest.mark.slow
def test_a_name_that_a_dead_process_left_with_fewer_values(place: Path, command: CommandLine) -> None:
    optuna.create_study(study_name="tiny", storage=storage_in(place / "tiny.db"))
    said = command("--study", place / "tiny.toml", *settings(BOTH)).error
    assert said == "study tiny: was begun with another search.objective; start another with --study-name NAME"


@pytest.mark.slow
def test_a_stranger_s_values_are_no_reason_to_stumble(made: Path, place: Path) -> None:
    shutil.copy(made / "tiny.db", place / "tiny.db")
    bare = optuna.load_study(study_name="both", storage=storage_in(place / "tiny.db"))
    strange: list[tuple[list[float], dict[str, Any]]] = [
        ([1.0, -2.0], {}), ([3.0, 0.0], {}), ([3.0, 0.0], {"kls": "x", "nlls": []}), ([2.0, 9.0], {"kls": [math.nan]}),
        ([50.0, 1.0], {"kls": [0.5, 1.5]}), ([0.0, 0.0], {"kls": [0.0]}),
    ]  # fmt: skip
    for values, attrs in strange:
        bare.add_trial(optuna.create_trial(values=values, user_attrs=attrs))
    summary = summarise(stored(place, "both"))
    to_json(status_of(summary, datetime.now()))
    figures.draw(summary)
    study_note(summary, "sqlite:///tiny.db")
    for trial in summary.trials:
        trial_note(trial, summary)
    with pytest.raises(UserError, match="lacks what a configuration needs"):
        best_config(study_file(place), stored(place, "both"), place / "x.json")
