"""Window NLLs of a model that is given as weights per block, and how far its predictions are from the dense model's.

Blocks are met once, in order, so they may come one at a time, as a model larger than memory does. Logits are computed
for a slice of positions at a time and turned into NLLs a few rows at a time, so that they never exist in float32 beyond
what a processor's cache holds: reading and writing them costs more than multiplying them, otherwise.

ids token ids [windows, tokens]; NLL nats per token, mean over the tokens - 1 predicted positions of a window. KL(p ‖ q)
likewise, p the dense model's next-token distribution and q this one's. The dense model is its final hidden states: its
logits, vocabulary × positions, would fit into no memory, so they are computed again beside the others.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from atp_tune.blocks.batching import BatchSize
from atp_tune.blocks.prune_pass import advance, embed
from atp_tune.blocks.replay import Replay

Block = tuple[int, dict[str, Tensor]]  # index, tensors by name
POSITIONS = 256  # of each window, whose logits are computed at a time
CACHED = 1 << 17  # logits in float32 at a time for each thread of a CPU (512 KB); elsewhere all of a slice
COMPARED = 1 << 28  # elsewhere, where two models are compared (1 GB)


class WindowScores(NamedTuple):
    """NLL and KL of each window, in nats per token; no KL where there is nothing to compare with."""

    nlls: list[float]
    kls: list[float]


def group_scores(
    replay: Replay,
    batch: BatchSize,
    heads: BatchSize,
    blocks: Iterable[Block],
    groups: Sequence[Tensor],
    dense: Sequence[Tensor] = (),
) -> Iterator[WindowScores]:
    """Scores of the windows of each group of ids, after all groups went through the blocks together.

    `batch` sizes the batches of the blocks, `heads` those of the logits, in windows of `POSITIONS` tokens. `dense`:
    final states of the dense model for each group, if it is to be compared with.
    """
    states = final_states(replay, batch, blocks, groups)
    for index, (ids, hidden) in enumerate(zip(groups, states, strict=True)):
        yield head_scores(replay, heads, ids, hidden, dense[index] if dense else None)


def final_states(replay: Replay, batch: BatchSize, blocks: Iterable[Block], groups: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states [windows, tokens, width] that leave the last block, of each group of ids."""
    states = [embed(replay, batch, ids) for ids in groups]
    for index, weights in blocks:
        for hidden in states:
            advance(replay, batch, index, weights, hidden)
    return states


def head_scores(
    replay: Replay, heads: BatchSize, ids: Tensor, hidden: Tensor, dense: Tensor | None = None
) -> WindowScores:
    """Scores of each window, from final hidden states [windows, tokens, width]."""
    found = WindowScores([], [])
    while len(found.nlls) < len(ids):
        start = len(found.nlls)

        def step(windows: int, start: int = start) -> WindowScores:
            rows = slice(start, start + windows)
            return window_scores(replay, ids[rows], hidden[rows], None if dense is None else dense[rows])

        for scores, more in zip(found, heads.attempt(step), strict=True):
            scores.extend(more)
    return found


def window_scores(replay: Replay, ids: Tensor, hidden: Tensor, dense: Tensor | None) -> WindowScores:
    """Scores of each window; norm and head work position by position, so slices of them pass through alone."""
    predicted = ids.shape[1] - 1
    nlls, kls = torch.zeros(2, len(ids), dtype=torch.float32, device=ids.device)
    for start in range(0, predicted, POSITIONS):
        here = slice(start, min(start + POSITIONS, predicted))
        logits = replay.logits(ids[:, here], hidden[:, here]).flatten(0, 1)
        targets = ids[:, here.start + 1 : here.stop + 1].flatten()
        nlls += token_nlls(logits, targets).view(len(ids), -1).sum(1)
        if dense is not None:
            others = replay.logits(ids[:, here], dense[:, here].to(ids.device)).flatten(0, 1)
            kls += token_kls(others, logits).view(len(ids), -1).sum(1)
    return WindowScores((nlls / predicted).tolist(), [] if dense is None else (kls / predicted).tolist())


def token_kls(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) [tokens] in float32 of logits [tokens, vocabulary], p of the dense ones; never negative."""
    rows = rows_at_a_time(logits) or max(1, COMPARED // logits.shape[1])
    kls = []
    for one, other in zip(torch.split(dense, rows), torch.split(logits, rows), strict=True):
        p, q = one.float().log_softmax(1), other.float().log_softmax(1)
        kls.append(functional.kl_div(q, p, reduction="none", log_target=True).sum(1).clamp_(min=0))
    return torch.cat(kls)


def token_nlls(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL [tokens] in float32 of logits z [tokens, vocabulary]: ln Σ exp(z - max z) - (z_target - max z)."""
    rows = rows_at_a_time(logits) or len(logits)
    nlls = []
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        z = part.float()
        z = z - z.amax(1, keepdim=True)
        picked = z.gather(1, target[:, None]).squeeze(1)
        nlls.append(z.exp_().sum(1).log_() - picked)
    return torch.cat(nlls)


def rows_at_a_time(logits: Tensor) -> int | None:
    """Rows of logits [tokens, vocabulary] that stay in a CPU's caches in float32; None elsewhere."""
    if logits.device.type != "cpu":
        return None
    return torch.get_num_threads() * max(1, CACHED // logits.shape[1])
