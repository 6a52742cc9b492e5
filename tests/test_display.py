"""Progress as plain lines, where the output is no terminal."""

import pytest

from atp_tune.cli import display
from atp_tune.cli.display import Display, Line
from atp_tune.events import Step, TrialEnded, TrialStarted


def test_time_that_no_trial_took_is_not_forecast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as that of the dense model before the trials, and of a descent by prices between two of them."""
    now = 0.0
    monkeypatch.setattr(display, "monotonic", lambda: now)
    show = Display()
    for seconds, event in (
        (50.0, TrialStarted("dense model", None)),
        (100.0, TrialStarted("trial 0", None, 0)),
        (10.0, TrialEnded(0, 20.0, None, 20.0, 1, 4)),
        (0.0, TrialStarted("prices", None)),
        (300.0, TrialStarted("trial 1", None, 1)),
        (10.0, TrialEnded(1, 18.0, None, 18.0, 2, 4)),
    ):
        now += seconds
        show(event)
    said = capsys.readouterr().out
    assert "in 10 s (best 20.00, 30 s of trials left)" in said
    assert "in 10 s (best 18.00, 20 s of trials left)" in said


def test_workers_share_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each descends by itself, at the same time."""
    now = 0.0
    monkeypatch.setattr(display, "monotonic", lambda: now)
    show = Display()
    one, other = Line(show, "worker 0: "), Line(show, "worker 1: ")
    for line in (one, other):
        line(TrialStarted("prices", None))
    now = 300.0
    for number, line in enumerate((one, other)):
        line(TrialStarted(f"trial {number}", None, number))
    now = 310.0
    one(TrialEnded(0, 20.0, None, 20.0, 1, 7))
    other(TrialEnded(1, 18.0, None, 18.0, 2, 7))
    assert "(best 18.00, 25 s of trials left)" in capsys.readouterr().out
    other.hide()
    one(TrialStarted("trial 2", None, 2))
    now = 320.0
    one(TrialEnded(2, 19.0, None, 18.0, 3, 7))
    assert "(best 18.00, 40 s of trials left)" in capsys.readouterr().out


def test_a_long_phase_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At most a line a minute; two phases that take turns are both followed."""
    now = 0.0
    monkeypatch.setattr(display, "monotonic", lambda: now)
    show = Display()
    show(TrialStarted("prices", None))
    for step in range(1, 45):
        now += 7.0
        show(Step("step", step, 44))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["prices", "prices: step 9 of 44, 4 min left", "prices: step 18 of 44, 3 min left"]
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
