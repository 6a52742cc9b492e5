"""Scores of image classifiers: cross-entropy of each image, KL from the dense model, and rank of the right class.

z logits [images, classes], y the class of an image:

    cross-entropy   -ln softmax(z)_y, in nats per image; exp of its mean is the perplexity over classes
    KL(p ‖ q)       p class distribution of the dense model, q of this model; needs no labels
    rank            number of classes with a higher logit than y, or an equal one and a lower index: 0 if the first is
                    right, as argmax says; top-1 accuracy is the share of ranks below 1, top-5 of those below 5

The head of a classifier pools over positions, so that an image goes through it as a whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import Difference, ProbeRun, is_equal
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.inputs.items import LABELS, Items
from atp_tune.scores import Scores
from atp_tune.scores.next_token import loss_gradient, token_kls, token_nlls

SHELL = 4096  # bytes per position for embeddings and head, beside the logits
LOGIT = 16  # bytes per logit: its value, float32 copies and their log-softmax


class Classes:
    """The `Score` of image classifiers, whose inputs are images with classes."""

    def probes(self, checkpoint: Checkpoint) -> tuple[Items, ...]:
        """None: any image of the right shape will do."""
        return ()

    def check_head(self, replay: Replay, runs: Sequence[ProbeRun], logits: Tensor, is_routed: bool) -> None:
        """Raises Difference unless there are logits for each image, computed from the hidden states."""
        batch, hidden = runs[0].batch, runs[0].hidden
        if logits.dim() != 2 or len(logits) != len(batch):
            raise Difference("has no logits for each image")
        if not is_equal(replay.logits(batch, hidden), logits):
            raise Difference("computes its logits from more than the hidden states that leave its last block")

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """All positions of an image, and bytes for each."""
        return positions, SHELL + LOGIT * int(checkpoint.config.num_labels) // positions

    def items(self, replay: Replay, batch: Items, hidden: Tensor, dense: Tensor | None) -> Scores:
        """Scores of each image, from its final hidden states."""
        logits = replay.logits(batch, hidden)
        labels = batch.tensors[LABELS]
        scores = {"nlls": token_nlls(logits, labels).tolist(), "ranks": class_ranks(logits, labels).tolist()}
        if dense is not None:
            likely = replay.logits(batch, dense.to(hidden.device))
            same = (likely.argmax(1) == logits.argmax(1)).float()
            scores |= {"kls": token_kls(likely, logits).tolist(), "same_tops": same.tolist()}
        return scores

    def gradient(
        self, replay: Replay, batch: Items, hidden: Tensor, dense: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """Gradient of each image's loss by its final hidden states."""
        states = hidden.detach().requires_grad_()
        likely = None if dense is None else replay.logits(batch, dense.to(hidden.device))
        with torch.enable_grad():
            logits = replay.logits(batch, states)
        by_logits = loss_gradient(logits.detach(), batch.tensors[LABELS], likely, share=share)
        return torch.autograd.grad(logits, states, by_logits)[0]


CLASSES = Classes()


def class_ranks(logits: Tensor, classes: Tensor) -> Tensor:
    """Rank [images] of the right class among logits [images, classes]: 0 is the highest; of equals the first."""
    own = logits.gather(1, classes[:, None])
    is_before = torch.arange(logits.shape[1], device=logits.device)[None, :] < classes[:, None]
    return ((logits > own) | ((logits == own) & is_before)).sum(1)
