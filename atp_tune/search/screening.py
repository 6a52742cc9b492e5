"""Screening: a cheaper study before the study, and the points that it leaves to be confirmed.

It is a study like any other, kept beside the main one as NAME.screen, with two keys changed: the statistics are those
of the dense model, measured once, and only every `stride`-th of the validation windows is measured. So a trial is a
mask and a part of an evaluation, without a pass over the calibration text. Its perplexities differ from the main
study's, but near the optimum it ranks points alike; the best of them begin the main study, which measures them in full.
"""

from collections.abc import Sequence
from dataclasses import replace

from optuna.trial import FrozenTrial

from atp_tune.events import Event, EventHandler, Message, TrialEnded, TrialStarted
from atp_tune.search import proposals
from atp_tune.search.proposals import kinds_of
from atp_tune.search.space import Params, Space
from atp_tune.spec.study import ScreenConfig
from atp_tune.spec.studyfile import StudyFile, overridden
from atp_tune.storage.fingerprint import CHANGED

APART = 1 / 28  # of an interval: half a step of the paper's grid, 0.002, on 32 blocks at 70 %


def screening_file(file: StudyFile, screen: ScreenConfig) -> StudyFile:
    """The study file of the screening: what `--set` would make of the main one."""
    values: tuple[str | int, ...] = ("dense", screen.stride, screen.trials, "none", "none")
    return overridden(file, dict(zip(CHANGED, values, strict=True)))


def renamed(watch: EventHandler) -> EventHandler:
    """A watch to which the trials of a screening are called so."""

    def on_event(event: Event) -> None:
        if isinstance(event, Message):
            event = Message(f"screening: {event.text}")
        if isinstance(event, TrialStarted):
            event = replace(event, title=event.title.replace("trial", "screening", 1))
        watch(replace(event, what="screening") if isinstance(event, TrialEnded) else event)

    return on_event


def begins_with(points: list[Params], space: Space, total: int) -> list[Params]:
    """What a screened study asks for before its sampler does: the points to be confirmed, then uniform for each pruner,
    which the best is compared with and the search does not wait for.
    """
    uniform = space.uniform()
    return [*points[: max(0, total - len(uniform))], *uniform][:total]


def confirmed(screened: Sequence[FrozenTrial], space: Space, count: int) -> list[Params]:
    """Parameters of the best trials of a screening [best first], each some way apart from the better ones, uniform left
    out.
    """
    uniform, chosen = space.uniform(), list[Params]()
    for trial in screened:
        others = [*uniform, *chosen]
        if len(chosen) < count and not any(is_near(trial.params, other, space) for other in others):
            chosen.append(trial.params)
    return chosen


def is_near(point: Params, other: Params, space: Space) -> bool:
    """Whether two points are of one pruner and allocation, and no parameter is more than `APART` apart."""
    moved = space.within(other, point["allocation"])
    return moved is not None and proposals.is_near(point, moved, kinds_of(space, point["allocation"]), APART)
