import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import plans
import plotly.graph_objects as go
import pytest
from optuna.trial import TrialState, create_trial
from synthetic import BLOCKS, BOUND, made_up, new_study
from test_summary import stored
from tinystudy import quiet

from atp_tune import figures
from atp_tune.errors import UserError
from atp_tune.figures import blocks, sheet
from atp_tune.figures.style import CYCLE, FINE, TICKS, Points, faint, log_axis, rounded
from atp_tune.figures.trials import add_gp_posterior, draw_history
from atp_tune.measures import Perplexity
from atp_tune.results.summary import summarise
from atp_tune.utils.extras import EXTRAS, install

KEYS = ["perplexity", "sparsity", "error", "seconds"]


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def study() -> optuna.Study:
    return new_study(None)


def drawn(study: optuna.Study) -> dict[str, go.Figure]:
    return figures.draw(summarise(study))


def names(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data]


def lines(figure: go.Figure) -> list[str]:
    return [shape.name for shape in figure.layout.shapes]


def notes(figure: go.Figure) -> str:
    return "<br>".join(note.text for note in figure.layout.annotations)


# Studies that are not whole


def test_an_empty_study_has_no_figure(study: optuna.Study) -> None:
    assert drawn(study) == {}
    assert draw_history(summarise(study)) is None


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL])
def test_trials_without_a_value_make_no_figure(study: optuna.Study, state: TrialState) -> None:
    study.add_trial(create_trial(state=state, user_attrs=plans.stored([0.5] * BLOCKS)))
    assert drawn(study) == {}


def test_one_trial(study: optuna.Study) -> None:
    study.add_trial(made_up(0.0))
    made = drawn(study)
    assert list(made) == KEYS
    assert names(made["perplexity"]) == ["wanda", "best (trial 0)"]
    assert names(made["sparsity"]) == names(made["error"]) == ["best (trial 0)"]
    assert len(draw_history(summarise(study)).data) == 2


def test_a_study_that_runs_and_half_failed(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.004, state=TrialState.FAIL, failure="no"), made_up(0.006)])
    study.add_trial(made_up(0.01, state=TrialState.RUNNING))
    made = drawn(study)
    assert list(made) == KEYS
    assert list(made["perplexity"].data[0].x) == [0.0, 0.006]
    assert list(made["seconds"].data[0].x) == [0, 2]


def test_an_old_study_whose_trials_know_little() -> None:
    study = optuna.create_study(study_name="old")
    for beta in (0.0, 0.01):
        whole = made_up(beta)
        params = {"pruner": "wanda", "beta": beta}
        study.add_trial(
            create_trial(value=whole.value, params=params, distributions={n: whole.distributions[n] for n in params})
        )
    made = drawn(study)
    assert list(made) == ["perplexity"]
    assert lines(made["perplexity"]) == [f"uniform {study.trials[0].value:.2f}"]
    assert list(made["perplexity"].data[0].error_y.array) == [0, 0]


def test_trials_without_parameters(study: optuna.Study) -> None:
    study.add_trial(create_trial(value=5.0))
    assert list(drawn(study)) == ["perplexity"]


def test_a_perplexity_that_no_axis_can_show(study: optuna.Study) -> None:
    study.add_trial(create_trial(value=math.inf))
    assert drawn(study) == {}


def test_a_stopped_trial_is_not_shown_as_measured(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.01, stopped_after=4)])
    made = drawn(study)
    assert list(made["perplexity"].data[0].x) == [0.0]
    assert list(made["seconds"].data[0].x) == [0, 1]  # its time was spent all the same


def test_a_real_study(done: Path) -> None:
    made = drawn(stored(done))
    assert list(made) == KEYS
    assert {"wanda", "magnitude"} <= set(names(made["perplexity"]))
    for figure in made.values():
        figure.to_json()


# Perplexity against β


def test_one_trace_for_each_pruner(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.0, "sparsegpt"), made_up(0.004), made_up(0.006, "sparsegpt")])
    figure = drawn(study)["perplexity"]
    assert names(figure)[:2] == ["sparsegpt", "wanda"]
    sparsegpt = figure.data[0]
    assert list(sparsegpt.x) == [0.0, 0.006]
    assert list(sparsegpt.error_y.array) == [3.5, 3.5]
    assert sparsegpt.text[0].startswith("trial 1: sparsegpt uniform<br>perplexity ")
    assert sparsegpt.text[0].endswith("± 3.50")
    assert figure.layout.yaxis.type == "log"


def test_allocations_with_beta_have_a_trace_each(study: optuna.Study) -> None:
    study.add_trials([made_up(0.002), made_up(0.004, allocation="curve")])
    assert names(drawn(study)["perplexity"])[:2] == ["wanda, atp", "wanda, curve"]


def test_allocations_without_beta_stand_apart(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.004), made_up(None, allocation="owl", lam=0.1)])
    figure = drawn(study)["perplexity"]
    apart = figure.data[1]
    assert (apart.xaxis, list(apart.x), apart.showlegend) == ("x2", ["owl"], False)
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]


def test_uniform_without_beta_is_at_zero(study: optuna.Study) -> None:
    study.add_trials([made_up(None, allocation="uniform"), made_up(0.004)])
    traces = drawn(study)["perplexity"].data
    assert 0.0 in [x for trace in traces for x in trace.x]
    assert all(trace.xaxis == "x" for trace in traces)


def test_a_study_without_any_beta(study: optuna.Study) -> None:
    study.add_trials([made_up(None, allocation="uniform"), made_up(None, allocation="owl", lam=0.1)])
    figure = drawn(study)["perplexity"]
    assert {trace.xaxis for trace in figure.data} == {"x2"}
    assert figure.layout.xaxis2.domain == (0, 1)
    assert figure.layout.xaxis.visible is False


def test_explosions_do_not_squash_the_picture(study: optuna.Study) -> None:
    study.add_trials([made_up(beta) for beta in (0.0, 0.004, 0.006, 0.008, BOUND)])
    figure = drawn(study)["perplexity"]
    exploded = study.trials[-1].value
    assert exploded is not None
    assert 10 ** figure.layout.yaxis.range[1] < 120
    assert notes(figure) == f"β = 0.0276: {exploded:.0f} ↑"
    arrow = figure.data[1]
    assert (arrow.name, arrow.marker.symbol, list(arrow.x)) == ("off the scale", "triangle-up", [round(BOUND, 6)])
    assert arrow.y[0] < 120
    assert f"{exploded:.2f}" in arrow.text[0]


def test_many_explosions_are_counted(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0005 * k) for k in range(12)] + [made_up(0.0255 + 0.0005 * k) for k in range(4)])
    assert notes(drawn(study)["perplexity"]).endswith("<br>and 2 more ↑")


def test_lines_to_compare_with(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.006), made_up(0.02)])
    uniform, dense = lines(drawn(study)["perplexity"])[1:]
    assert uniform.startswith("uniform ")
    assert dense.startswith("dense ")
    assert dense.endswith(" ↓")  # a third of the lowest: drawn, but off the scale


def test_several_pruners_say_whose_uniform_it_is(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.0, "sparsegpt"), made_up(0.006, "sparsegpt")])
    assert any(line.startswith("uniform, sparsegpt ") for line in lines(drawn(study)["perplexity"]))


def test_the_bound_is_drawn_where_it_is_near(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.02)])
    figure = drawn(study)["perplexity"]
    assert lines(figure)[0] == "admissible bound 0.0276"
    assert figure.layout.shapes[0].x0 == pytest.approx(BOUND)
    assert figure.layout.xaxis.range[1] > BOUND


def test_a_bound_far_off_does_not_squeeze_the_data(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.002)])
    figure = drawn(study)["perplexity"]
    assert not any("bound" in line for line in lines(figure))
    assert figure.layout.xaxis.range[1] < 0.003
    assert figure.layout.xaxis.title.text.endswith("(admissible up to 0.0276)")


def test_falling_progressions_have_a_bound_too(study: optuna.Study) -> None:
    study.add_trials([made_up(-0.02), made_up(0.02)])
    assert lines(drawn(study)["perplexity"])[:2] == ["admissible bound ±0.0276"] * 2


# Belief

CURVE = {"beta": [0.0, 0.01], "mean": [60.0, 70.0], "low": [50.0, 60.0], "high": [70.0, 80.0]}


def test_the_posterior_is_a_line_and_a_band(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.006)])
    study.set_user_attr("gp_posterior", {"before": 2, "curves": {"wanda": CURVE, "sparsegpt": CURVE}})
    summary = summarise(study)
    assert summary.gp_posterior is not None
    figure = figures.draw(summary)["perplexity"]
    assert names(figure)[:4] == [
        "band",
        "GP after 2 trials, wanda (± 2 sd)",
        "band",
        "GP after 2 trials, sparsegpt (± 2 sd)",
    ]
    band, line = figure.data[:2]
    assert list(band.y) == [70.0, 80.0, 60.0, 50.0]
    assert list(line.y) == CURVE["mean"]
    assert "after 2 trials" in line.hovertemplate


@pytest.mark.parametrize(
    "gp_posterior",
    [
        None, [], "x", {}, {"curves": None}, {"curves": {"wanda": None}}, {"curves": {"wanda": {"beta": [1]}}},
        {"curves": {"wanda": {**CURVE, "mean": [1.0]}}}, {"curves": {"wanda": {**CURVE, "low": [0.0, 1.0]}}},
        {"curves": {"wanda": {**CURVE, "high": [math.inf, 1.0]}}},
        {"curves": {"wanda": {**CURVE, "high": [None, 1.0]}}},
        {"curves": {"wanda": {part: [] for part in CURVE}}},
    ],
)  # fmt: skip
def test_a_posterior_that_is_not_whole_is_left_out(gp_posterior: Any) -> None:
    figure = go.Figure()
    add_gp_posterior(figure, gp_posterior, Points(summarise(new_study(None))))
    assert len(figure.data) == 0


# The others


def test_sparsities_of_best_second_and_uniform(study: optuna.Study) -> None:
    study.add_trials(
        [made_up(0.0), made_up(0.006), made_up(0.006, "sparsegpt"), made_up(0.009), made_up(0.0, "sparsegpt")]
    )
    figure = drawn(study)["sparsity"]
    assert names(figure) == ["best (trial 2)", "second best (trial 3)", "uniform (trial 4)"]
    assert [len(trace.y) for trace in figure.data] == [BLOCKS] * 3
    assert lines(figure) == []  # uniform is the target in every block
    second = Points(summarise(study)).second
    assert second is not None
    assert second.number == 3  # trial 1 has the sparsities of the best


def test_errors_of_best_uniform_and_worst(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.006), made_up(0.02)])
    figure = drawn(study)["error"]
    assert names(figure) == ["best (trial 1)", "uniform (trial 0)", "worst (trial 2)"]
    assert figure.layout.yaxis.type == "log"


def test_errors_of_zero_are_gaps(study: optuna.Study) -> None:
    trial = made_up(0.006)
    trial.user_attrs["errors"] = [0.0, math.nan, 0.5, 1.0]
    study.add_trial(trial)
    assert list(drawn(study)["error"].data[0].y) == [None, None, 0.5, 1.0]


def test_seconds_by_phase_without_repeats(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.006, seconds={"prune": 2.0, "thinking": 1.0}), made_up(0.006, repeats=1)])
    figure = drawn(study)["seconds"]
    assert names(figure) == ["calibrate (statistics)", "prune", "evaluate (perplexity)", "thinking"]
    assert [list(trace.x) for trace in figure.data] == [[0, 1]] * 4
    assert list(figure.data[1].y) == [1.1, 2.0]
    assert figure.layout.barmode == "stack"


def test_the_best_so_far_only_falls(study: optuna.Study) -> None:
    study.add_trials([made_up(beta) for beta in (0.0, 0.02, 0.006, 0.01)])
    values = list(draw_history(summarise(study)).data[1].y)
    assert values == sorted(values, reverse=True)
    assert len(values) == 4


def test_several_studies_in_one_figure() -> None:
    studies = [new_study(None, name) for name in ("a", "<b>", "empty")]
    for study in studies[:2]:
        study.add_trials([made_up(0.0), made_up(0.006)])
    summaries = [summarise(study) for study in studies]
    for draw in (blocks.sparsities, blocks.perplexities):
        assert names(draw(summaries)) == ["a", "&lt;b&gt;"]
        assert draw(summaries[1:]) is None


# Size and style


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_a_long_study_stays_small(long: optuna.Study, key: str) -> None:
    text = figures.FIGURES[key](summarise(long)).to_json()
    assert len(text) < 150_000


def test_pages_shine_through(long: optuna.Study) -> None:
    for figure in figures.draw(summarise(long)).values():
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.modebar.bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.width is None
        assert figure.layout.yaxis.title.text


def luminance(colour: str) -> float:
    shares = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", CYCLE)
@pytest.mark.parametrize("page", ["#ffffff", "#14171c"])
def test_colours_stand_out_on_light_and_dark(colour: str, page: str) -> None:
    light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_axes_and_numbers() -> None:
    assert "tickvals" not in log_axis(50, 80)
    assert log_axis(10, 100)["tickvals"] == FINE
    assert log_axis(10, 400)["tickvals"] == TICKS
    assert log_axis(5, 5)["range"][0] < log_axis(5, 5)["range"][1]
    assert rounded([0.123456789, 1234567.0]) == [0.12346, 1234600.0]
    assert faint("#102030", 0.5) == "rgba(16,32,48,0.5)"


def test_the_view_takes_in_the_dense_model_where_it_is_near(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.006)])
    points = Points(summarise(study))
    low = points.view().low
    for near, seen in ((0.9, 0.9 * low), (0.3, low)):
        assert points.view(Perplexity(value=near * low, stderr=0.0)).low == seen


def test_a_picture_needs_kaleido(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(UserError) as caught:
        sheet.png([go.Figure()])
    said = f"a picture: kaleido is not installed; run: {install('png')} and a Chrome or Chromium"
    assert str(caught.value) == said


def test_a_browser_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(figures: object, kind: str) -> bytes:
        raise RuntimeError("no browser.\nlong story")

    monkeypatch.setitem(EXTRAS, "png", {"plotly": "plotly"})  # is here, where kaleido need not be
    monkeypatch.setattr(sheet, "_draw", fails)
    with pytest.raises(UserError) as caught:
        sheet.svg([go.Figure()])
    assert str(caught.value) == (
        f"a picture could not be drawn (no browser); it needs: {install('png')} and {sheet.BROWSER}"
    )


def test_a_long_name_does_not_push_the_figure_away() -> None:
    assert blocks.label("short") == "short"
    assert blocks.label("x" * 100) == "x" * 39 + "…"
