"""Scores of a model: how well it predicts the next token. Another score, such as for images, can be added.

A search sees only lists of numbers, one per item (a window or an image). A new score is a file with an object of type
`Score` and a row of `SCORES`, or a plug-in.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import Head
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.config.search import SCORES
from atp_tune.errors import PluginError
from atp_tune.inputs import Batch

__all__ = ["SCORES", "Score", "Scores", "joined"]


Scores: TypeAlias = dict[str, list[float]]  # of each window, or other item, by the key of a measure's items: nlls, …


class Score(Head, Protocol):
    """Scores a model from the hidden states after its last block."""

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """For items of `positions`: how many positions go through the head at a time, and bytes for each."""

    def items(self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None) -> Scores:
        """Scores of a batch, from its final hidden states [items, positions, width]: `nlls`, in nats per token.

        `dense`: the final hidden states of the dense model, for `kls`.
        """

    def gradient(
        self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """Gradient of each item's NLL by its final hidden states [items, positions, width], for prices.

        `dense`: the final hidden states of the dense model; the loss is then this share of the NLL, and for the rest KL
        from it.
        """


def joined(parts: Sequence[Scores]) -> Scores:
    """Concatenates scores; PluginError if they are not of the same measures."""
    if any(part.keys() != parts[0].keys() for part in parts):
        raise PluginError("search.score: its items are of other measures in some batches; return the same in each")
    return {key: [one for part in parts for one in part[key]] for key in (parts[0] if parts else ())}
