"""A study in Weights & Biases: a run of the project atp_tune; its files are in the folder NAME.wandb.

WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are respected. A run that is offline cannot be asked what it has, so the file
`trials.json` of the folder lists the trials that were written.
"""

import json
import os
from typing import TYPE_CHECKING, Any

from atp_tune.cache import alone_with, write_atomically
from atp_tune.tracking.records import TrialRecord

if TYPE_CHECKING:
    from atp_tune.tracking import TrackedStudy

PROJECT = "atp_tune"
STEP = "trial"  # the axis of all curves


class WandbRun:
    """The run of one study, whose id is the same each time."""

    def __init__(self, study: "TrackedStudy") -> None:
        import wandb

        folder = study.beside(f"{study.name}.wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self.place = f"project {os.environ.get('WANDB_PROJECT') or PROJECT}, files in {folder}"
        self._list = folder / "trials.json"
        self._known = self._listed()
        settings = wandb.Settings(silent=True, console="off")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=study.name, id=study.key, resume="allow",
            dir=str(folder), settings=settings,
        )  # fmt: skip
        self._run.define_metric("*", step_metric=STEP)

    def known(self) -> set[int]:
        """The numbers of the trials that were written."""
        return set(self._known)

    def _listed(self) -> set[int]:
        return set(json.loads(self._list.read_text())) if self._list.is_file() else set()

    def log(self, record: TrialRecord) -> None:
        """Writes one trial."""
        self._run.log({STEP: record.number, "plan": record.plan, "state": record.state, **record.numbers})
        with alone_with(self._list):
            self._known |= {record.number, *self._listed()}
            write_atomically(self._list, json.dumps(sorted(self._known)).encode())

    def finish(self, numbers: dict[str, float], step: int) -> None:
        """Writes the final numbers into the run's summary."""
        self._run.summary.update(numbers)

    def close(self) -> None:
        """Ends the run for now; a later one with its id goes on."""
        self._run.finish()
