"""Studies of image classifiers that search by accuracy: values, the order of trials, and what is shown of them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial
from test_image_studies import place, trained, tune  # noqa: F401 - fixtures
from tinystudy import CommandLine, quiet, run

from atp_tune.blocks import replay
from atp_tune.config.typed import parse_limit
from atp_tune.dashboard.publishing import columns, study_note, trial_note
from atp_tune.figures.style import Points
from atp_tune.figures.trials import draw_history, draw_perplexity
from atp_tune.measures import ACCURACY, accuracy, error_rate, excess
from atp_tune.report.contents import gather
from atp_tune.results.formatting import limit_of, sign_of_beta
from atp_tune.results.results import Results, is_uniform
from atp_tune.results.summary import summarise
from atp_tune.search.objective import estimate
from atp_tune.storage.progress import ranked

HARD = ("sparsity=0.9", "search.objective=accuracy")


def test_the_error_rate_has_half_an_image_more() -> None:
    misses = [1, 0, 0, 1, 0, 0, 0]
    found = error_rate(misses)
    assert found.value == pytest.approx(2.5 / 8) and found.stderr == pytest.approx(accuracy(misses).stderr)
    assert error_rate([0, 0]).value == pytest.approx(0.5 / 3) and error_rate([1, 1]).value == pytest.approx(2.5 / 3)
    assert error_rate([0.25], 100).value == pytest.approx(25.5 / 101)
    assert error_rate([-0.1], 100).value == pytest.approx(0.5 / 101)  # an estimate beyond the ends
    assert str(found) == f"31.2% ± {np.std([*misses, *misses, 0, 1]) / 8**0.5:.1%}"


def made(value: float, misses: list[int], nlls: list[float], **more: object) -> FrozenTrial:
    attrs = {"misses": misses, "nlls": nlls, "ranks": misses, **more}
    return optuna.create_trial(value=value, user_attrs=attrs, params={}, distributions={})


def test_of_equal_accuracies_the_lower_cross_entropy_leads() -> None:
    first, second = made(0.3, [1, 0], [2.0, 1.0]), made(0.3, [0, 1], [1.0, 1.5])
    worse, stopped = made(0.5, [1, 1], [0.1, 0.1]), made(0.1, [0], [0.1], stopped_after=1)
    assert ranked([worse, first, stopped, second]) == [second, first, worse]
    results = Results({}, [worse, first, stopped, second], ("accuracy",))
    found = results.score(first, "validation")
    assert found is not None and found.value == pytest.approx(math.exp(1.5))
    assert results.score(stopped, "validation") is None
    scores = [results.score(trial, "validation", ACCURACY) for trial in (first, stopped)]
    assert [score and score.value for score in scores] == [0.5, pytest.approx(1 - (3 * 0.1 - 0.5) / 2)]


def by_error() -> optuna.Study:
    study = optuna.create_study()
    with quiet():
        study.set_metric_names(["top-1 error"])
    study.set_user_attr("fingerprint", {"search.objective": ["accuracy"]})
    return study


def test_accuracies_are_shown_without_the_half_image() -> None:
    """The tables' 50 %, not the objective's; off the scale too, where perplexities have no digits."""
    study = by_error()
    for misses in ([1, 0], [1, 1]):
        study.add_trial(made(error_rate(misses).value, misses, [1.0, 2.0], allocation="uniform"))
    summary = summarise(study)
    first, second = study.trials
    points = Points(summary)
    assert points.main is ACCURACY and points.told(first).endswith(", accuracy 50.0% ± 28.9%")
    assert (points.said(first), points.said(second)) == ("50.0%", "0.0%")


def test_figures_have_accuracies_on_a_linear_axis() -> None:
    """Points, error bars, lines and the GP's curve, from errors with half an image; the best is the highest."""
    study = by_error()
    beta = {"beta": FloatDistribution(-1, 1)}
    for value, misses in ((0.0, [1, 1, 0, 0]), (0.1, [1, 0, 0, 0]), (-0.1, [1, 1, 1, 1])):
        error = error_rate(misses)
        attrs = {"misses": misses, "nlls": [1.0] * 4, "ranks": misses, "stderr": error.stderr}
        study.add_trial(
            optuna.create_trial(value=error.value, user_attrs=attrs, params={"beta": value}, distributions=beta)
        )
    study.set_user_attr("dense_ranks", [0, 0, 0, 0])
    posterior = {"curves": {"": {"beta": [-0.1, 0.1], "mean": [0.5, 0.3], "low": [0.3, 0.1], "high": [0.7, 0.5]}}}
    summary = replace(summarise(study), gp_posterior=posterior, best_trial=study.trials[1])
    figure, history = draw_perplexity(summary), draw_history(summary)
    assert figure is not None and history is not None and figure.layout.title.text == "Accuracy against β"
    assert figure.layout.yaxis.title.text == "accuracy, validation images" and figure.layout.yaxis.type is None
    points = next(trace for trace in figure.data if trace.error_y.array is not None)
    assert dict(zip(points.x, points.y, strict=True)) == pytest.approx({-0.1: 0, 0.0: 0.5, 0.1: 0.75}, abs=1e-4)
    stderr = error_rate([1, 1, 0, 0]).stderr
    assert max(points.error_y.array) == pytest.approx(stderr, abs=1e-4)
    mean = next(trace for trace in figure.data if trace.mode == "lines" and trace.name != "band")
    assert mean.y == pytest.approx([1 - (5 * e - 0.5) / 4 for e in (0.5, 0.3)], abs=1e-4)
    lines = {shape.name: shape.y0 for shape in figure.layout.shapes if shape.yref == "y"}
    assert lines["dense 100.0%"] == pytest.approx(1) and lines["uniform 50.0%"] == pytest.approx(0.5)
    low, high = figure.layout.yaxis.range
    assert low < 0 and 1 < high <= 1.01 and not figure.layout.annotations
    assert history.data[1].y == pytest.approx([0.5, 0.75, 0.75], abs=1e-4)


@pytest.mark.parametrize("ranks", [None, [0, 1], []])
def test_the_sign_of_beta_in_a_tampered_database(ranks: list[int] | None) -> None:
    study = by_error()
    for beta, misses in ((0.1, [0, 0, 1]), (-0.1, [1, 0, 1])):
        attrs = {"misses": misses, "nlls": [1.0] * 3} | ({} if ranks is None else {"ranks": ranks})
        kinds = {"beta": FloatDistribution(-1, 1)}
        value = error_rate(misses).value
        study.add_trial(optuna.create_trial(value=value, user_attrs=attrs, params={"beta": beta}, distributions=kinds))
    assert sign_of_beta(summarise(study)).startswith("Sign of β: positive")
    assert ("66.7%" in sign_of_beta(summarise(study))) == (ranks != [0, 1])


def test_misses_of_other_numbers_do_not_compare() -> None:
    study = optuna.create_study()
    kinds = {"beta": FloatDistribution(-1, 1)}
    for beta, misses in ((0.1, [0, 0, 1]), (-0.1, [1])):
        attrs = {"misses": misses, "nlls": [1.0] * len(misses), "ranks": misses}
        study.add_trial(
            optuna.create_trial(
                value=error_rate(misses).value, user_attrs=attrs, params={"beta": beta}, distributions=kinds
            )
        )
    assert "may be chance" not in sign_of_beta(summarise(study))


def test_a_stopped_trial_is_estimated_from_the_best() -> None:
    study = optuna.create_study()
    study.add_trial(made(0.3, [1, 0, 0, 0, 1, 0, 0, 0], [1.0] * 8))
    trial = study.ask()
    value = estimate(trial, [1, 1, 0, 0], ACCURACY)  # one more than the best has of these four
    assert value == error_rate([0.25 + 0.25], 8).value == pytest.approx(4.5 / 9)
    assert trial.user_attrs["stopped_after"] == 4


def test_a_drop_of_accuracy_is_paired_by_image() -> None:
    """The mean of hits lost, at the upper end of its error, above the limit; not known without ranks."""
    before, after = [0, 0, 3, 0, 1, 0, 0], [0, 2, 0, 0, 1, 5, 9]
    lost = [int(new > 0) - int(old > 0) for old, new in zip(before, after, strict=True)]
    upper = fmean(lost) + np.std([*lost, *lost, 1, -1, 0, 0]) / math.sqrt(9)
    limit = {"max_drop": 0.1}
    assert excess(limit, None, None, ranks=(before, after)) == pytest.approx(upper - 0.1)
    assert excess(limit, None, None, ranks=(before, before)) == pytest.approx(1 / 9 - 0.1)  # where nothing changed too
    for ranks in ((None, after), (before, None), (before, after[:3]), ([], [])):
        assert excess(limit, [1.0], [1.0], ranks=ranks) is None
    assert limit_of({"max_drop": 0.01}) == "1 point of accuracy less than dense"
    assert limit_of({"max_drop": 0.025}) == "2.5 points of accuracy less than dense"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1%", 0.01), ("0.005", 0.005), ("1", None), ("150%", None), ("0", None), ("-1%", None), ("few", None)],
)
def test_drops_as_people_type_them(text: str, expected: float | None) -> None:
    if expected is not None:
        assert parse_limit("max_drop", text) == expected
        return
    with pytest.raises(ValueError, match="must be"):
        parse_limit("max_drop", text)


@pytest.mark.slow
def test_the_sparsest_plan_within_a_drop_of_accuracy(place: Path, tune: CommandLine) -> None:  # noqa: F811
    """By the study's limit and by `export --max-drop`; a study of texts, and one limit too many, are refused."""
    screen = "search.screen={trials = 6, confirm = 3}"
    study = run(place, "sparsity=[0.3, 0.95]", "limit.max_drop=0.1", "search.sampler=tpe", screen, "search.trials=9")
    best, dense = summarise(study).best_trial, study.user_attrs["dense_ranks"]
    assert best is not None
    drops = {trial.number: excess({"max_drop": 0.1}, None, None, ranks=(dense, trial.user_attrs["ranks"]))
             for trial in study.trials}  # fmt: skip
    inside = [trial for trial in study.trials if drops[trial.number] <= 0]  # type: ignore[operator]
    assert inside and best.params["sparsity"] == max(trial.params["sparsity"] for trial in inside)
    assert len(inside) < len(study.trials)
    summary = summarise(study)
    said = summary.goal.outcome(summary)
    assert "accuracy " in said and "dense " in said and "10 points of accuracy less than dense" in said
    found = tune("export", "--study", place / "tiny.toml", "--max-drop", "10%", "--out", place / "x.json")
    assert found.code == 0 and f"trial {best.number}, " in found.err and "on the validation images" in found.err, found
    refused = tune("export", "--study", place / "tiny.toml", "--max-drop", "1%", "--max-increase", "5%")
    assert refused.code == 2 and "leave one out" in refused.err
    reported = tune("report", "--study", place / "tiny.toml", "--out", place / "r.md")
    assert reported.code == 0 and "10 points of accuracy less than dense" in (place / "r.md").read_text(), reported
    accuracies = "validation accuracy | test accuracy | accuracy against uniform"
    assert f"| against uniform | {accuracies} | packed | limit |" in (place / "r.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_a_study_by_accuracy(place: Path, sampler: str, tune: CommandLine) -> None:  # noqa: F811
    study = run(place, *HARD, f"search.sampler={sampler}", "search.trials=8")
    assert study.metric_names == ["top-1 error"] and study.user_attrs["fingerprint"]["search.objective"] == ["accuracy"]
    for trial in study.trials:
        wrong = [int(rank > 0) for rank in trial.user_attrs["ranks"]]
        assert trial.user_attrs["misses"] == wrong and trial.value == pytest.approx((sum(wrong) + 0.5) / 61)
        assert trial.user_attrs["stderr"] == accuracy(wrong).stderr
    summary = summarise(study)
    best = summary.best_trial
    assert best is not None and summary.results.main is ACCURACY and summary.complete
    assert best == min(study.trials, key=lambda trial: (trial.value, fmean(trial.user_attrs["nlls"])))
    assert "(accuracy, validation)" in sign_of_beta(summary)
    note, contents = study_note(summary, "x", "x", []), gather(study, best.datetime_complete)
    assert "top-1 error (1 - accuracy" in note and "Accuracy on the validation images" in trial_note(best, summary)
    assert columns(best)["± stderr"] == round(best.user_attrs["stderr"], 4)
    if not is_uniform(best):
        found = summary.results.against_uniform(best, ACCURACY)
        assert found is not None
        gain, role = found.change, found.on
        said = f"The best plan’s accuracy is {gain.beside('uniform’s')} on the {role} images."
        assert contents.verdict.replace("\u00a0", " ").startswith(said) and said in note
        assert ("may be chance" in contents.verdict) == gain.may_be_chance(summary.results.counts[role])
    assert Points(summary).told(best).endswith(f", accuracy {accuracy(best.user_attrs['ranks'])}")
    again = ("--set", "sparsity=0.9", "--set", "search.objective=accuracy", "--set", f"search.sampler={sampler}")
    shown = tune("--study", place / "tiny.toml", *again, "--trials", "9")
    assert shown.code == 0 and re.search(r"\[9/9\] trial 8: .*perplexity .*, accuracy \d+\.\d% in", shown.out), shown
    status = tune("status", "--study", place / "tiny.toml")
    assert status.code == 0, status
    reported = tune("report", "--study", place / "tiny.toml", "--out", place / "r.html")
    assert reported.code == 0 and "Accuracy against β" in (place / "r.html").read_text()
    other = tune("--study", place / "tiny.toml", "--trials", "10", "--set", "sparsity=0.9")
    assert other.code == 2 and "search.objective is" in other.err


@pytest.mark.slow
def test_the_stopper_compares_errors(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(replay.TOKENS, "cpu", 5 * 17)  # five images of 17 positions: the stopper comes to word often
    more = ("prune.pruners=['wanda','magnitude']", "search.stopper=wilcoxon", "search.trials=10", "search.seed=1")
    study = run(place, *HARD, *more)
    stopped = [trial for trial in study.trials if "stopped_after" in trial.user_attrs]
    assert stopped
    for trial in stopped:
        count, earlier = trial.user_attrs["stopped_after"], study.trials[: trial.number]
        best = ranked(earlier)[0].user_attrs["misses"]
        mean = fmean(best) + fmean(trial.user_attrs["misses"]) - fmean(best[:count])
        assert trial.value == pytest.approx((min(max(mean, 0), 1) * 60 + 0.5) / 61)
    summary = summarise(study)
    assert summary.complete and "stopped_after" not in summary.best_trial.user_attrs  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"search.objective": ["accuracy", "kl"]}, "objective: accuracy moves in steps of one image.* give it alone"),
        ({"search.screen.trials": 4, "search.screen.stride": 2}, "screen: accuracy moves in steps .* leave screen out"),
        ({"search.early_termination": True}, 'early_termination: accuracy moves in steps .* by "cross-entropy"'),
        ({"sparsity": [0.3, 0.6]}, 'search.objective: must be "cross-entropy" or "kl" where sparsity is an interval'),
    ],
)
def test_what_accuracy_does_not_go_with(
    more: dict[str, object], said: str, tmp_path: Path, command: CommandLine
) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(
        'sparsity = 0.5\n[model]\nsource = "m"\n[images.calibration]\nsource = "idx:a"\n[images.validation]\n'
        'source = "idx:b"\n[images.test]\nsource = "idx:c"\n[search]\ntrials = 6\nobjective = "accuracy"\n'
    )
    options = [word for key, value in more.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    answer = command("plan", "--study", file, *options)
    assert answer.code == 2 and re.search(said, answer.err) and len(answer.err.splitlines()) == 1, answer


def test_a_study_of_texts_has_no_accuracy(tiny_place: Path, command: CommandLine) -> None:
    answer = command("plan", "--study", tiny_place / "tiny.toml", "--set", "search.objective=accuracy")
    assert answer.code == 2 and "search.objective: accuracy is of images" in answer.err, answer
