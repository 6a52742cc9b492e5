"""Experiment trackers that a study can write to: TensorBoard, MLflow, Weights & Biases.

A tracker has one run per study, and one step per trial. What it has it knows itself, so that a study that is resumed
goes on in the same run and no trial is written twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atp_tune.extras import require
from atp_tune.registry import Registry
from atp_tune.tracking.records import TrialRecord


@dataclass(frozen=True)
class TrackedStudy:
    """What a tracker is opened for: the study's name, a key that stays when its database moves, and where files go."""

    name: str
    key: str
    beside: Callable[[str], Path]


class Tracker(Protocol):
    """One run of one tracker; `place`: where it writes, for people."""

    place: str

    def __init__(self, study: TrackedStudy) -> None: ...

    def known(self) -> set[int]:
        """The numbers of the trials that it has."""

    def log(self, record: TrialRecord) -> None:
        """Writes one trial."""

    def finish(self, numbers: dict[str, float], step: int) -> None:
        """Writes the final numbers; `step`: the number of the last trial."""

    def close(self) -> None:
        """Flushes all to the disk or the server."""


# Each name is also that of the module that the tracker needs, and of the extra that installs it.
TRACKERS: Registry[type[Tracker]] = Registry(
    "tracker",
    {
        "tensorboard": "atp_tune.tracking.tensorboard_run:TensorBoardRun",
        "mlflow": "atp_tune.tracking.mlflow_run:MLflowRun",
        "wandb": "atp_tune.tracking.wandb_run:WandbRun",
    },
)


def check_installed(names: Sequence[str]) -> None:
    """UserError if the package of a tracker is missing."""
    for name in names:
        require(name, f"--track {name}")
