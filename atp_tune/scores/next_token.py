"""Scores of next-token predictions: the NLL of each window, and the KL divergence from the dense model.

Logits are computed for a slice of positions at a time.

ids token ids [windows, tokens]; NLL in nats per token, mean over the tokens - 1 predicted positions of a window;
KL(p ‖ q) likewise, p next-token distribution of the dense model and q of this model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import Difference, ProbeRun, is_equal, is_near
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.inputs.pairs import IDS, PairBatch
from atp_tune.inputs.tokens import vocabulary
from atp_tune.scores import Score, WindowScores
from atp_tune.scores.losses import loss_gradient, token_kls, token_nlls

SCALE = 256.0  # of gradients by logits in float16, per predicted token, whose largest is then near it
POSITIONS = 256  # positions of each window whose logits are computed at a time
HEAD_BYTES = 12  # bytes per logit: bf16 or float32 logits, their float32 copy and its log-softmax
WINDOWS, TOKENS = 2, 16  # shape of a probe
PART = slice(4, 11)  # positions whose logits are also computed alone


class NextToken:
    """The `Score` of causal language models, whose inputs are token ids."""

    def probes(self, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
        """Random ids [windows, tokens], and the same ids with other tokens in the second half of each window."""
        draw = torch.Generator().manual_seed(0)
        ids, other = torch.randint(vocabulary(checkpoint), (2, WINDOWS, TOKENS), generator=draw)
        other[:, : TOKENS // 2] = ids[:, : TOKENS // 2]
        return ids.to(checkpoint.device), other.to(checkpoint.device)

    def check_head(self, replay: Replay, runs: Sequence[ProbeRun], logits: Tensor, is_routed: bool) -> None:
        """Raises Difference unless logits are causal and computed from the hidden states, position by position."""
        (ids, hidden), (other, others) = ((run.batch, run.hidden) for run in runs)
        if logits.shape[:2] != ids.shape:
            raise Difference("has no logits for each token")
        if not is_equal(replay.logits(ids, hidden), logits):
            raise Difference("computes its logits from more than the hidden states that leave its last block")
        if not is_near(replay.logits(ids[:, PART], hidden[:, PART]), logits[:, PART]):
            raise Difference("does not compute its logits position by position")
        if not is_causal(logits, replay.logits(other, others), is_routed):
            raise Difference("predicts tokens from those that come later, so it is no causal language model")

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """Number of positions of a window whose logits are computed at a time, and bytes for each."""
        return min(positions, POSITIONS), HEAD_BYTES * vocabulary(checkpoint)

    def items(self, replay: Replay, batch: Tensor | PairBatch, hidden: Tensor, dense: Tensor | None) -> WindowScores:
        """Scores of each window in nats per token; norm and head are applied to slices of positions.

        Of pairs of image and text, tokens that stand for an image are not predicted.
        """
        if isinstance(batch, PairBatch):
            return self._of_pairs(replay, batch, hidden, dense)
        predicted = batch.shape[1] - 1
        nlls, kls = torch.zeros(2, len(batch), dtype=torch.float32, device=batch.device)
        for start in range(0, predicted, POSITIONS):
            here = slice(start, min(start + POSITIONS, predicted))
            logits = replay.logits(batch[:, here], hidden[:, here]).flatten(0, 1)
            targets = batch[:, here.start + 1 : here.stop + 1].flatten()
            nlls += token_nlls(logits, targets).view(len(batch), -1).sum(1)
            if dense is not None:
                others = replay.logits(batch[:, here], dense[:, here].to(batch.device)).flatten(0, 1)
                kls += token_kls(others, logits).view(len(batch), -1).sum(1)
        return WindowScores((nlls / predicted).tolist(), [] if dense is None else (kls / predicted).tolist())

    def _of_pairs(self, replay: Replay, batch: PairBatch, hidden: Tensor, dense: Tensor | None) -> WindowScores:
        ids = batch.tensors[IDS]
        assert batch.image is not None
        counted = torch.ne(ids[:, 1:], batch.image)
        nlls, kls = torch.zeros(2, len(ids), dtype=torch.float32, device=ids.device)
        for start in range(0, counted.shape[1], POSITIONS):
            here = slice(start, min(start + POSITIONS, counted.shape[1]))
            of_text = counted[:, here]
            logits = replay.logits(ids[:, here], hidden[:, here]).flatten(0, 1)
            targets = ids[:, here.start + 1 : here.stop + 1].flatten()
            nlls += (token_nlls(logits, targets).view_as(of_text) * of_text).sum(1)
            if dense is not None:
                others = replay.logits(ids[:, here], dense[:, here].to(ids.device)).flatten(0, 1)
                kls += (token_kls(others, logits).view_as(of_text) * of_text).sum(1)
        predicted = counted.sum(1)
        return WindowScores((nlls / predicted).tolist(), [] if dense is None else (kls / predicted).tolist())

    def gradient(
        self, replay: Replay, batch: Tensor, hidden: Tensor, dense: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """Gradient of each window's loss by its final hidden states [windows, tokens, width], slice by slice.

        Of float16, whose range is too small for it, in float32.
        """
        predicted, is_half = batch.shape[1] - 1, hidden.dtype == torch.float16
        found = torch.zeros_like(hidden, dtype=torch.float32 if is_half else hidden.dtype)
        scale = SCALE * predicted if is_half else 1.0
        for start in range(0, predicted, POSITIONS):
            here = slice(start, min(start + POSITIONS, predicted))
            part = hidden[:, here].detach().requires_grad_()
            targets = batch[:, here.start + 1 : here.stop + 1].flatten()
            others = None if dense is None else dense[:, here].to(batch.device)
            likely = None if others is None else replay.logits(batch[:, here], others).flatten(0, 1)
            with torch.enable_grad():
                logits = replay.logits(batch[:, here], part).flatten(0, 1)
            by_logits = loss_gradient(logits.detach(), targets, likely, scale / predicted, share)
            found[:, here] = torch.autograd.grad(logits, part, by_logits)[0].to(found.dtype) / scale
        return found


NEXT_TOKEN: Score = NextToken()


def is_causal(logits: Tensor, other: Tensor, is_routed: bool) -> bool:
    """Whether the logits of both probes are equal in the first half, where their tokens are equal.

    Bit-identical if tokens are not routed, since all shapes are the same. With routing, the number of tokens that are
    multiplied by the same expert affects rounding.
    """
    early, others = logits[:, : TOKENS // 2], other[:, : TOKENS // 2]
    if is_equal(early, others):
        return True
    return is_routed and is_near(early, others)
