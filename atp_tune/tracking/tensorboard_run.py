"""A study in TensorBoard: event files in the folder NAME.tensorboard; the step is the trial's number."""

from typing import TYPE_CHECKING

from atp_tune.tracking.records import TrialRecord

if TYPE_CHECKING:
    from atp_tune.tracking import TrackedStudy

EVERY = {"scalars": 0}  # no scalar is left out when files are read back
TAG = "trial/seconds"  # every trial has it


class TensorBoardRun:
    """The run of one study; a resumed one adds an event file."""

    def __init__(self, study: "TrackedStudy") -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = study.beside(f"{study.name}.tensorboard")
        self.place = f"tensorboard --logdir {folder}"
        self._known, self._finals = _stored(str(folder)) if folder.is_dir() else (set(), {})
        self._writer = SummaryWriter(str(folder))

    def known(self) -> set[int]:
        """The numbers of the trials in its files."""
        return self._known

    def log(self, record: TrialRecord) -> None:
        """Writes one trial."""
        for name, value in record.numbers.items():
            self._writer.add_scalar(name, value, record.number)
        self._writer.add_text("trial/plan", f"{record.plan} ({record.state})", record.number)
        self._writer.flush()
        self._known.add(record.number)

    def finish(self, numbers: dict[str, float], step: int) -> None:
        """Writes the final numbers that its files do not have at this step."""
        for name, value in numbers.items():
            if step not in self._finals.get(name, ()):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes its file."""
        self._writer.close()


def _stored(folder: str) -> tuple[set[int], dict[str, set[int]]]:
    """Steps of the trials and, by name, of the final numbers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(folder, size_guidance=EVERY)
    read.Reload()
    steps = {tag: {event.step for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
    return steps.get(TAG, set()), {tag: found for tag, found in steps.items() if tag.startswith("final/")}
