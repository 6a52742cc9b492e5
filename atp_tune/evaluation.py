"""Window NLLs of a model that is given as weights per block.

Blocks are met once, in order, so they may come one at a time, as a model larger than memory does.

ids token ids [windows, tokens]; NLL nats per token, mean over the tokens - 1 predicted positions of a window.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.nn.functional import cross_entropy

from atp_tune.batching import BatchSize
from atp_tune.prune_pass import advance
from atp_tune.replay import Replay

Block = tuple[int, dict[str, Tensor]]  # index, tensors by name


def group_nlls(
    replay: Replay, batch: BatchSize, heads: BatchSize, blocks: Iterable[Block], groups: Sequence[Tensor]
) -> Iterator[list[float]]:
    """Window NLLs of each group of ids, after all groups went through the blocks together.

    `batch` sizes the batches of the blocks, `heads` those of the logits.
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
            return [
                float(cross_entropy(logits[:-1].float(), window[1:]))
                for window, logits in zip(ids[rows], replay.logits(ids[rows], hidden[rows]), strict=True)
            ]

        nlls += heads.attempt(step)
    return nlls
