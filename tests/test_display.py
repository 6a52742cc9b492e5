"""Progress as plain lines, where the output is no terminal."""

import pytest

from atp_tune.cli import display
from atp_tune.cli.display import Display
from atp_tune.events import TrialEnded, TrialStarted


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
