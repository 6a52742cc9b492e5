"""What tests of several workers on one study share: its trials, and whether all is there."""

from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from tinystudy import settings, stored

TOTAL = 12
MEETING = '''
import os
from pathlib import Path
from time import sleep

from atp_tune.pruners.wanda import Wanda


class Meeting(Wanda):
    """Wanda, in a process that waits in its first trial until another one is in its first, too."""

    def prune(self, weight, sparsity, statistics):
        here = Path(__file__).parent
        (here / f"pruning-{os.getpid()}").touch()
        while len(list(here.glob("pruning-*"))) < 2:
            sleep(0.05)
        return super().prune(weight, sparsity, statistics)
'''
# Together the trials take as long as a start of Python with all libraries: every worker comes to its turn, however fast
# a core is, unless others want it. Where two must, they meet, and the trials may be short.
LONG = ("texts.calibration.source=file:long.txt", "texts.calibration.nsamples=800", "texts.validation.nsamples=250")


def meeting(place: Path) -> list[str]:
    """Options of a study whose pruner is a plug-in, by which at least two processes have a trial each."""
    (place / "meeting.py").write_text(MEETING)
    return [*settings('prune.pruners=["meeting.py:Meeting"]'), "--trust-plugins"]


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
