"""What tests of several workers on one study share: its trials, and whether all is there."""

from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from tinystudy import stored

# Together they take as long as a start of Python with all libraries: every worker comes to its turn, however fast a
# core is.
TOTAL = 12
LONG = ("texts.calibration.source=file:long.txt", "texts.calibration.nsamples=2000", "texts.validation.nsamples=250")


def trials(place: Path) -> list[FrozenTrial]:
    return stored(place).trials if (place / "tiny.db").exists() else []


def measured(place: Path) -> list[FrozenTrial]:
    return [trial for trial in trials(place) if trial.state == TrialState.COMPLETE]


def check_whole(place: Path) -> None:
    """Exactly the total, nothing twice, nothing left over, and the final numbers are there."""
    whole = measured(place)
    assert len(whole) == TOTAL
    assert len({str(trial.params) for trial in whole}) == TOTAL
    assert not [trial for trial in whole if "repeats" in trial.user_attrs]
    assert not [trial for trial in trials(place) if not trial.state.is_finished()]
    assert (place / "tiny.best.json").exists()
