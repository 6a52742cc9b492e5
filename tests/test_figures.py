import optuna
import plans
import plotly.graph_objects as go
import pytest
from expect import parametrize, refusal
from optuna.trial import TrialState, create_trial
from synthetic import BLOCKS, BOUND, made_up, new_study

from atp_tune import report
from atp_tune.report import figures
from atp_tune.report.figures import CYCLE, draw_history
from atp_tune.results.summary import summarise
from atp_tune.utils.system import EXTRAS, install

KEYS = ["perplexity", "sparsity", "error", "seconds"]


pytestmark = pytest.mark.usefixtures("without_warnings")


@pytest.fixture
def study() -> optuna.Study:
    return new_study(None)


def drawn(study: optuna.Study) -> dict[str, go.Figure]:
    return figures.draw(summarise(study))


def names(figure: go.Figure) -> list[str]:
    return [trace.name for trace in figure.data]


def notes(figure: go.Figure) -> str:
    return "<br>".join(note.text for note in figure.layout.annotations)


# Studies that are not whole


def test_an_empty_study_has_no_figure(study: optuna.Study) -> None:
    assert drawn(study) == {}
    assert draw_history(summarise(study)) is None


@parametrize("state", [TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL])
def test_trials_without_a_value_make_no_figure(study: optuna.Study, state: TrialState) -> None:
    study.add_trial(create_trial(state=state, user_attrs=plans.stored([0.5] * BLOCKS)))
    assert drawn(study) == {}


def test_a_study_that_runs_and_half_failed(study: optuna.Study) -> None:
    study.add_trials([made_up(0.0), made_up(0.004, state=TrialState.FAIL, failure="no"), made_up(0.006)])
    study.add_trial(made_up(0.01, state=TrialState.RUNNING))
    made = drawn(study)
    assert list(made) == KEYS
    assert list(made["perplexity"].data[0].x) == [0.0, 0.006]
    assert list(made["seconds"].data[0].x) == [0, 2]


# Perplexity against β


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


def test_several_studies_in_one_figure() -> None:
    studies = [new_study(None, name) for name in ("a", "<b>", "empty")]
    for study in studies[:2]:
        study.add_trials([made_up(0.0), made_up(0.006)])
    summaries = [summarise(study) for study in studies]
    for draw in (figures.sparsities, figures.perplexities):
        assert names(draw(summaries)) == ["a", "&lt;b&gt;"]
        assert draw(summaries[1:]) is None


# Belief


# The others


# Size and style


def luminance(colour: str) -> float:
    shares = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@parametrize("colour", CYCLE)
@parametrize("page", ["#ffffff", "#14171c"])
def test_colours_stand_out_on_light_and_dark(colour: str, page: str) -> None:
    light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_a_browser_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(figures: object) -> bytes:
        raise RuntimeError("no browser.\nlong story")

    monkeypatch.setitem(EXTRAS, "png", {"plotly": "plotly"})  # is here, where kaleido need not be
    monkeypatch.setattr(report, "_draw", fails)
    assert refusal(report.picture, [go.Figure()]) == (
        f"a picture could not be drawn (no browser); it needs: {install('png')} and {report.BROWSER}"
    )
