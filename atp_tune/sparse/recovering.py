"""Recovery, as `[recover]` of a study asks: a configuration is pruned, and its kept weights are trained.

What was trained is kept in the cache, by what it was trained with, so that a second run of the same machine writes the
same folder without training.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atp_tune.cache import cache_dir, temporary_folder
from atp_tune.events import Event, EventHandler, Message, Place, TrialStarted
from atp_tune.measures import Estimate, by_kind, change
from atp_tune.paths import check_free
from atp_tune.sparse.applying import Way, write_applied, write_sparse
from atp_tune.sparse.finetuning import NoGainError, Trained, train
from atp_tune.sparse.provenance import PerplexityChange
from atp_tune.spec.config import Config
from atp_tune.spec.recover import RecoverConfig, Recovered, RecoveredScores

PRUNED = Way(write_sparse, copies=2)  # and then its weights trained
NO_GAIN = "no step lowered the loss on the held-out windows"


def apply_trained(config: Config, recover: RecoverConfig, out: Path, place: Place) -> Trained:
    """Prunes to a configuration, trains the kept weights, and writes the folder `out`, measured as `finetune` does.

    Arguments and errors are those of `apply`; NoGainError if no step lowers the held-out loss.
    """
    check_free(out)
    with temporary_folder(out) as pruned:  # beside: relative paths stay right
        place = replace(place, watch=_calling(place.watch, str(pruned), "the pruned model"))
        write_applied(config, pruned, place, PRUNED)
        return train(pruned, out, None, None, recover, place, stays=True)


def recovered(
    config: Config,
    recover: RecoverConfig,
    place: Place,
    uniform: Sequence[float] = (),
    kinds: Sequence[str] = (),
) -> Recovered:
    """What training of a configuration's kept weights comes to, measured on the folder that `apply` will write.

    `uniform`: window NLLs of the uniform allocation on the test text, if known; `kinds`: those of that text, in turn.
    The folder is removed.
    """
    with temporary_folder(cache_dir("recovered") / "model") as folder:
        out = folder / "trained"
        place = replace(place, watch=_calling(place.watch, str(out), "the best plan"))
        try:
            done = apply_trained(config, recover, out, place)
        except NoGainError:
            return Recovered(settings=recover, kept=False, reason=NO_GAIN)
    record, held = done.record, done.record.held_out
    has_test = record.validation is not None
    test = PerplexityChange(before=record.before, after=record.after, change=record.change)
    validation = _scores(record.validation or test)
    nlls = done.scores["test"].nlls
    against = change(uniform, nlls) if len(uniform) == len(nlls) else None
    fell = validation is not None and validation.change.value < 0
    if not fell:
        done.part.unlink(missing_ok=True)  # no run will write it
    changed = f"by {validation.change}" if validation else "to a number that is not finite"
    return Recovered(
        settings=recover,
        kept=fell,
        reason="" if fell else f"perplexity on the validation text changed {changed}",
        step=held.best if held else len(record.losses),
        steps=len(record.losses),
        seconds=record.seconds,
        validation=validation,
        test=_scores(test) if has_test else None,
        against_uniform=against if against and _is_finite(against) else None,
        kinds={kind: own for kind, own in by_kind(nlls, kinds).items() if _is_finite(own)},
    )


def _calling(watch: EventHandler, folder: str, name: str) -> EventHandler:
    """A handler that has a name for a folder that is removed in the end."""

    def on_event(event: Event) -> None:
        if isinstance(event, Message):
            event = Message(event.text.replace(folder, name))
        if isinstance(event, TrialStarted):
            event = replace(event, title=event.title.replace(folder, name))
        watch(event)

    return on_event


def _scores(found: PerplexityChange) -> RecoveredScores | None:
    if not (_is_finite(found.after) and _is_finite(found.change)):
        return None
    return RecoveredScores(perplexity=found.after, change=found.change)


def _is_finite(found: Estimate) -> bool:
    """Whether JSON can hold it."""
    return math.isfinite(found.value + found.stderr)
