"""Progress as plain lines, where the output is no terminal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import planned

from atp_tune.cli import display
from atp_tune.cli.display import Display
from atp_tune.cost.remaining import Remaining
from atp_tune.events import Ahead, Step, TrialEnded, TrialStarted

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
