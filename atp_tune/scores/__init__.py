"""What a model is scored by. Today that is the next token; classes of images can come in by the same door.

A search sees lists of numbers, one an item (a window, or an image), and knows nothing of what they are made from.
Another score is a file with an object of type `Score`, and a row of `SCORES`.
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import Head
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.inputs import Batch


class WindowScores(NamedTuple):
    """NLL and KL of each window (or other item), in nats; no KL where there is nothing to compare with."""

    nlls: list[float]
    kls: list[float]


class Score(Head, Protocol):
    """How good a model is, from the hidden states that leave its last block."""

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """Of an item of so many positions: how many go through the head at a time, and bytes that each takes there."""

    def items(self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None) -> WindowScores:
        """Scores of a batch of items, from their final hidden states [items, positions, width].

        `dense`: those of the dense model, if it is to be compared with.
        """


SCORES = {"next-token": "atp_tune.scores.next_token:NEXT_TOKEN"}


def find_score(name: str = "next-token") -> Score:
    """The score of that name, from its row in `SCORES`."""
    return cast(Score, resolve_name(SCORES[name]))


def joined(parts: Sequence[WindowScores]) -> WindowScores:
    """The scores of several parts as one."""
    return WindowScores([nll for part in parts for nll in part.nlls], [kl for part in parts for kl in part.kls])
