"""Window NLLs of a model that is given as weights per block.

Blocks are met once, in order, so they may come one at a time, as a model larger than memory does. Logits are computed
for a slice of positions at a time and turned into NLLs a few rows at a time, so that they never exist in float32 beyond
what a processor's cache holds: reading and writing them costs more than multiplying them, otherwise.

ids token ids [windows, tokens]; NLL nats per token, mean over the tokens - 1 predicted positions of a window.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from atp_tune.batching import BatchSize
from atp_tune.prune_pass import advance
from atp_tune.replay import Replay

Block = tuple[int, dict[str, Tensor]]  # index, tensors by name
POSITIONS = 256  # of each window, whose logits are computed at a time
CACHED = 1 << 22  # logits in float32 at a time on a CPU (16 MB); elsewhere all of a slice


def group_nlls(
    replay: Replay, batch: BatchSize, heads: BatchSize, blocks: Iterable[Block], groups: Sequence[Tensor]
) -> Iterator[list[float]]:
    """Window NLLs of each group of ids, after all groups went through the blocks together.

    `batch` sizes the batches of the blocks, `heads` those of the logits, in windows of `POSITIONS` tokens.
    """
    states = [replay.embed(ids).clone() for ids in groups]
    for index, weights in blocks:
        for hidden in states:
            advance(replay, batch, index, weights, hidden)
    for ids, hidden in zip(groups, states, strict=True):
        yield head_nlls(replay, heads, ids, hidden)


def head_nlls(replay: Replay, heads: BatchSize, ids: Tensor, hidden: Tensor) -> list[float]:
    """NLL of each window, from the hidden states [windows, tokens, width] that leave the last block."""
    nlls: list[float] = []
    while len(nlls) < len(ids):
        start = len(nlls)

        def step(windows: int, start: int = start) -> list[float]:
            rows = slice(start, start + windows)
            return window_nlls(replay, ids[rows], hidden[rows])

        nlls += heads.attempt(step)
    return nlls


def window_nlls(replay: Replay, ids: Tensor, hidden: Tensor) -> list[float]:
    """NLL of each window; norm and head work position by position, so slices of positions pass through them alone."""
    predicted = ids.shape[1] - 1
    total = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    for start in range(0, predicted, POSITIONS):
        here = slice(start, min(start + POSITIONS, predicted))
        logits = replay.logits(ids[:, here], hidden[:, here]).flatten(0, 1)
        targets = ids[:, here.start + 1 : here.stop + 1].flatten()
        total += token_nlls(logits, targets).view(len(ids), -1).sum(1)
    return (total / predicted).tolist()


def token_nlls(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL [tokens] in float32 of logits z [tokens, vocabulary]: ln Σ exp(z - max z) - (z_target - max z)."""
    rows = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    nlls = []
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        z = part.float()
        z = z - z.amax(1, keepdim=True)
        picked = z.gather(1, target[:, None]).squeeze(1)
        nlls.append(z.exp_().sum(1).log_() - picked)
    return torch.cat(nlls)
