"""Early stopping: the loss on held-out windows, measured every few steps, chooses the step that is merged."""

import math

from atp_tune.sparse.provenance import Settings
from atp_tune.spec.recover import FEWEST, MOST, SHARE


class EarlyStop:
    """Held-out losses by step, from step 0, which is the pruned model."""

    def __init__(self, patience: int, losses: list[tuple[int, float]] | None = None) -> None:
        """`patience`: measurements without a lower loss after which training ends."""
        self._patience = patience
        self.losses = losses or []

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest loss, the first of equals, and its loss."""
        return min(self.losses, key=lambda each: each[1])

    @property
    def has_ended(self) -> bool:
        """Whether the last `patience` measurements have not lowered the loss."""
        return bool(self.losses) and len(self.losses) - 1 - self.losses.index(self.best) >= self._patience

    def add(self, step: int, loss: float) -> bool:
        """Notes a measurement; whether it is the best so far."""
        self.losses.append((step, loss))
        return self.best[0] == step


def windows_read(settings: Settings) -> int:
    """How many windows, or images, a run reads: those of its steps, and those that it holds out."""
    needed = settings.steps * settings.batch
    return needed + (min(max(math.ceil(needed / (SHARE - 1)), FEWEST), MOST) if settings.patience else 0)


def windows_held_out(found: int, settings: Settings) -> int:
    """How many of the windows that were found are held out, at their end; 0 where too few would be left to train on."""
    own = min(max(found // SHARE, FEWEST), MOST) if settings.patience else 0
    return own if found - own >= min(settings.steps * settings.batch, own) else 0
