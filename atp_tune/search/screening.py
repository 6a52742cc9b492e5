"""Screening: a cheaper study before the main study, which then confirms the best points.

The screening is stored beside the main study as NAME.screen. It prunes with the dense model's statistics and measures
every `stride`-th validation window: a trial is a mask and part of an evaluation, without a pass over the calibration
text. Its perplexities differ from the main study's, but near the optimum it ranks points alike. The main study begins
with the best points and measures them in full.
"""

from collections.abc import Sequence
from dataclasses import replace

from optuna.trial import FrozenTrial

from atp_tune.events import Event, EventHandler, Message, TrialEnded, TrialStarted
from atp_tune.search import proposals
from atp_tune.search.space import Params, Space
from atp_tune.spec.search import ScreenConfig
from atp_tune.spec.studyfile import StudyFile, overridden
from atp_tune.storage.fingerprint import CHANGED

APART = 1 / 28  # of an interval: half a step (0.002) of the paper's grid, on 32 blocks at 70 %


def screening_file(file: StudyFile, screen: ScreenConfig) -> StudyFile:
    """The study file of the screening: the main one with overrides, without a limit."""
    values: tuple[str | int, ...] = ("dense", screen.stride, screen.trials, "none", "none")
    keys = CHANGED if file.study.images is None else [key.replace("texts.", "images.") for key in CHANGED]
    return overridden(file, {**dict(zip(keys, values, strict=True)), "limit": "none"})


def renamed(watch: EventHandler) -> EventHandler:
    """A handler that names the trials in events of a screening `screening`."""

    def on_event(event: Event) -> None:
        if isinstance(event, Message):
            event = Message(f"screening: {event.text}")
        if isinstance(event, TrialStarted):
            event = replace(event, title=event.title.replace("trial", "screening", 1))
        watch(replace(event, what="screening") if isinstance(event, TrialEnded) else event)

    return on_event


def confirmed(screened: Sequence[FrozenTrial], space: Space, count: int) -> list[Params]:
    """Parameters of the best screened trials (given best first) that are not near a better one or uniform."""
    uniform, chosen = space.uniform(), list[Params]()
    for trial in screened:
        others = [*uniform, *chosen]
        if len(chosen) < count and not any(is_near(trial.params, other, space) for other in others):
            chosen.append(trial.params)
    return chosen


def is_near(point: Params, other: Params, space: Space) -> bool:
    """Whether two points have one pruner and allocation, and parameters within `APART` of each other."""
    moved = space.within(other, point["allocation"])
    return moved is not None and proposals.is_near(point, moved, space.kinds(point["allocation"]), APART)
