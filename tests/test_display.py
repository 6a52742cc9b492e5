"""Progress as plain lines, where the output is no terminal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import planned

from atp_tune.api import arguments
from atp_tune.cli import display
from atp_tune.cli.display import Display, Line
from atp_tune.cost.remaining import Remaining
from atp_tune.events import Ahead, Message, Step, TrialEnded, TrialStarted

priced = planned("wanda", "gradient-rows", (0.5, 0.7), target=0.6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The display's time, as the sum of these seconds."""
    seconds = [0.0]
    monkeypatch.setattr(display, "monotonic", lambda: sum(seconds))
    return seconds


def test_what_is_left_is_of_the_whole_study(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """It was that of the trials alone, and 0 while a third of the run was ahead."""
    show = Display()
    show(Ahead({"dense": (1, 100), "gradient": (1, 600), "trial": (4, 200), "test": (2, 300), "training": (1, 2000)}))
    for seconds, event in (
        (0.0, TrialStarted("dense model", None)),
        (50.0, TrialStarted("gradient", None)),  # half a second a token: 300 s, 4 × 100 s, 2 × 150 s, 1000 s
        (120.0, TrialStarted("trial 0", priced, 0)),
        (20.0, TrialEnded(0, {"perplexity": 20.0}, None, {"perplexity": 20.0}, 1, 4)),
        (0.0, TrialStarted("trial 1", priced, 1)),
        (20.0, TrialEnded(1, {"perplexity": 18.0}, None, {"perplexity": 18.0}, 2, 2)),  # ended early
        (0.0, TrialStarted("test text: dense model", None)),
        (90.0, TrialStarted("test text: trial 1", priced)),
        (70.0, TrialStarted("training the kept weights of trial 1", None)),
        (0.0, TrialStarted("fine-tuning x", None)),
        (50.0, Step("loss 3.000", 1, 9)),  # 450 s in all, not 470
        (0.0, TrialStarted("measuring x", None)),
    ):
        clock.append(seconds)
        show(event)
    assert capsys.readouterr().out.splitlines() == [
        "dense model",
        "gradient (33 min left)",
        "[1/4] trial 0: 60% wanda gradient-rows: perplexity 20.00 in 20 s (best 20.00, 10 min left)",
        "[2/2] trial 1: 60% wanda gradient-rows: perplexity 18.00 in 20 s (best 18.00, 8 min left)",
        "test text: dense model (8 min left)",
        "test text: trial 1 60% wanda gradient-rows (9 min left)",
        "training the kept weights of trial 1 (7 min left)",
        "fine-tuning x (7 min left)",
        "measuring x (7 min left)",
    ]


PARTS = {
    "dense": (1, 9.0),
    "screening": (3, 2.0),
    "trial": (3, 20.0),
    "test": (2, 20.0),
    "generate": (2, 9.0),
    "draw": (2, 20.0),
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_estimate_ends_at_the_end_and_is_never_0(data: st.DataObject) -> None:
    """Whatever the parts take: one second at least is left; with seconds by size the estimate is right at once."""
    pace = data.draw(st.sampled_from((1.0, 0.01, 30.0)))
    even = data.draw(st.booleans())
    remaining, now, said = Remaining(), 0.0, list[tuple[float, float]]()

    def pass_time(part: str) -> None:
        nonlocal now
        now += pace * (PARTS[part][1] if even else data.draw(st.floats(0.0, 50.0)))
        if (left := remaining.left(now)) is not None:
            assert left >= 1
            said.append((now, left))

    remaining.hear(Ahead(PARTS), now)
    begin = lambda title: remaining.hear(TrialStarted(title, None), now)  # noqa: E731
    begin("dense model")
    pass_time("dense")
    for what in ("screening", "trial"):
        for number in range(3):
            begin(f"{what} {number}")
            pass_time(what)
            remaining.hear(TrialEnded(number, {"perplexity": 1.0}, None, {"perplexity": 1.0}, number + 1, 3, what), now)
    for _ in range(2):
        begin("test text: trial 1")
        pass_time("test")
        remaining.hear(Step("generate", 1, 1), now)
        pass_time("generate")
    for _ in range(2):
        begin("draw 2 of 3: trial 1")
        pass_time("draw")
    assert said
    assert not even or all(abs(at + left - now) <= max(1.0, 0.11 * now) for at, left in said)


def test_workers_share_what_is_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Each descends by itself, at the same time."""
    show = Display()
    one, other = Line(show, "worker 0: "), Line(show, "worker 1: ")
    one(Ahead({"trial": (7, 1.0), "gradient": (1, 30.0)}))
    for line in (one, other):
        line(TrialStarted("gradient", None))
    clock.append(300.0)
    for number, line in enumerate((one, other)):
        line(TrialStarted(f"trial {number}", priced, number))
    clock.append(10.0)
    one(TrialEnded(0, {"perplexity": 20.0}, None, {"perplexity": 20.0}, 1, 7))
    other(TrialEnded(1, {"perplexity": 18.0}, None, {"perplexity": 18.0}, 2, 7))
    assert "(best 18.00, 25 s left)" in capsys.readouterr().out
    other.hide()
    one(TrialStarted("trial 2", None, 2))
    clock.append(10.0)
    one(TrialEnded(2, {"perplexity": 19.0}, None, {"perplexity": 18.0}, 3, 7))
    assert "(best 18.00, 40 s left)" in capsys.readouterr().out


def test_a_long_phase_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At most a line a minute; two phases that take turns are both followed."""
    now = 0.0
    monkeypatch.setattr(display, "monotonic", lambda: now)
    show = Display()
    show(TrialStarted("gradient", None))
    for step in range(1, 45):
        now += 7.0
        show(Step("step", step, 44))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["gradient", "gradient: step 9 of 44, 4 min left", "gradient: step 18 of 44, 3 min left"]
    assert len(lines) == 1 + 44 * 7 // 63
    show(TrialStarted("trial 0", None, 0))
    for step in range(1, 11):
        for phase in ("prune", "evaluate"):
            now += 4.0
            show(Step(phase, step, 10))
    assert capsys.readouterr().out.splitlines() == ["trial 0: prune 8 of 10, 16 s left"]
    show(TrialStarted("trial 1", None, 1))
    for step in (1, 2, 3, 4, 1, 2, 3, 4):  # it ends, and begins again, as each part of the windows does
        now += 30.0
        show(Step("evaluate", step, 4))
    said = ["trial 1: evaluate 2 of 4, 60 s left", "trial 1: evaluate 2 of 4, 60 s left"]
    assert capsys.readouterr().out.splitlines() == said


def test_a_bar_of_python_is_made_when_work_begins_and_has_the_whole_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error before left an empty bar above it."""
    now = 0.0
    monkeypatch.setattr(arguments, "monotonic", lambda: now)
    lines = arguments.Lines(has_bar=True)
    lines(Message("loading"))
    lines.close()
    assert capsys.readouterr().err == ""
    lines(Ahead({"dense": (1, 10), "trial": (3, 20), "test": (2, 20)}))
    for title in ("dense model", "trial 0"):
        now += 10
        lines(TrialStarted(title, None))
    lines.close()
    assert "trial 0:  17%" in (said := capsys.readouterr().err) and said.rstrip().endswith("ETA 0:01:40")
