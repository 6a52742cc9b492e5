"""The replay against the model's own forward, on one short text, before any number of it is believed.

The model runs as it is, with its own blocks in its own order. Of each block it is seen that it is called once, in the
order of the list, with the hidden states [windows, tokens, width] that left the block before it, that it returns the
same when it is replayed, and that its linears are multiplied by calling them. Then the logits are compared, also those
of a slice of positions alone. A second text goes along, with other tokens in its second half: it must come to the same
predictions in its first. Weights are asked for once a block, so that a streamed model passes once.

On a CPU equal means to the last bit. Elsewhere sums may run in another order each time, so there it means within a few
units in the last place of a block's output.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atp_tune.blocks.replay import Replay, bypassed, hidden_of, split
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.errors import UserError

WINDOWS, TOKENS = 2, 16
PART = slice(4, 11)  # positions of which the logits are computed alone, too
UNITS = 32  # in the last place, on devices whose sums run in no fixed order


class Difference(Exception):  # noqa: N818 - a finding, of which a line is made for the user
    """Where the replay is not the model."""


@torch.inference_mode()
def verified(checkpoint: Checkpoint) -> Replay:
    """The replay of a model that was seen to equal it; UserError in one line that says where the two differ."""
    kind = type(checkpoint.model).__name__
    try:
        _check_own_weights(checkpoint)
        replay = Replay(checkpoint)
        _compare(replay)
    except Difference as difference:
        raise UserError(f"model {kind}: {difference}; such a model cannot be pruned block by block") from None
    except UserError:
        raise
    except Exception as error:  # whatever a model raises that wants more than a text
        if is_out_of_memory(error):
            raise
        raise UserError(f"model {kind}: cannot be run block by block on a text alone: {one_line(error)}") from error
    return replay


@torch.inference_mode()
def check_length(replay: Replay, ids: Tensor, what: str) -> None:
    """UserError where a model cannot take a text's windows, ids [windows, tokens]: learned positions have an end."""
    try:
        replay.embed(ids[:1])
    except (IndexError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        known = getattr(replay.checkpoint.config.get_text_config(), "max_position_embeddings", None)
        positions = "" if known is None else f", which has {known} positions"
        raise UserError(
            f"{what}.tokens: the model{positions}, cannot take windows of {ids.shape[1]} tokens ({one_line(error)}); "
            "lower tokens"
        ) from None


def _check_own_weights(checkpoint: Checkpoint) -> None:
    """Difference where two blocks share a weight: pruned twice, it would have the zeros of the second alone."""
    owners: dict[int, int] = {}
    for index, block in enumerate(checkpoint.blocks):
        tensors = dict(block.named_parameters(remove_duplicate=False))
        for linear in checkpoint.linears[index]:
            if owners.setdefault(id(tensors[linear.key]), index) != index:
                raise Difference(f"shares {linear.key} between blocks {owners[id(tensors[linear.key])]} and {index}")


def _compare(replay: Replay) -> None:
    ids, other = _texts(replay)
    walk = _Walk(replay, ids, other)
    with _Calls(replay.checkpoint) as calls, bypassed(replay.checkpoint.blocks, walk.step):
        logits = replay.forward(ids).logits
    if calls.missing:
        raise Difference(f"does not call {min(calls.missing)} on a text, so the inputs of its weights are not known")
    if logits.shape[:2] != ids.shape:
        raise Difference("has no logits for each token")
    if not _is_equal(replay.logits(ids, walk.hidden), logits):
        raise Difference("computes its logits from more than the hidden states that leave its last block")
    if not _is_near(replay.logits(ids[:, PART], walk.hidden[:, PART]), logits[:, PART]):
        raise Difference("does not compute its logits position by position")
    if not _is_causal(logits, replay.logits(other, walk.other), calls.routed):
        raise Difference("predicts tokens from those that come later, so it is no causal language model")


def _texts(replay: Replay) -> tuple[Tensor, Tensor]:
    """Random ids [windows, tokens], and the same with other tokens in the second half of each window."""
    draw = torch.Generator().manual_seed(0)
    ids, other = torch.randint(replay.vocabulary(), (2, WINDOWS, TOKENS), generator=draw)
    other[:, : TOKENS // 2] = ids[:, : TOKENS // 2]
    return ids.to(replay.checkpoint.device), other.to(replay.checkpoint.device)


def _is_causal(logits: Tensor, other: Tensor, routed: bool) -> bool:
    """Whether both texts come to the same logits where they are the same so far.

    To the last bit, since all shapes are the same and nothing of a row or position goes into another's; but tokens that
    are routed are multiplied together with those that chose the same expert, and how many these are decides last bits.
    """
    early, others = logits[:, : TOKENS // 2], other[:, : TOKENS // 2]
    if _is_equal(early, others):
        return True
    return routed and _is_near(early, others)


class _Walk:
    """Stands in for the blocks of a running model: runs each as the model calls it, and compares its replay."""

    def __init__(self, replay: Replay, ids: Tensor, other: Tensor) -> None:
        self.hidden = replay.embed(ids)
        self.other = replay.embed(other).clone()  # of a text that only goes along
        self._replay = replay
        self._own = [block.forward for block in replay.checkpoint.blocks]
        self._done = 0

    def step(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """What block `index` returns; Difference where the replay would be called with, or return, something else."""
        given = split(args, kwargs)[0]
        self._check_call(index, given)
        weights = self._replay.checkpoint.weights(index)
        output = self._replay.within(index, weights, partial(self._own[index], *args, **kwargs))
        with _as_before(self._replay.checkpoint.blocks[index], self._own[index]):
            replayed = self._replay.run(index, weights, given)
            self.other = self._replay.run(index, weights, self.other)
        self.hidden = hidden_of(output)
        if not _is_equal(replayed, self.hidden):
            raise Difference(f"block {index} returns other numbers when it is run alone")
        self._done += 1
        return output

    def _check_call(self, index: int, given: Any) -> None:
        if index < self._done:
            raise Difference(f"runs its blocks several times, block {index} after block {self._done - 1}")
        if index > self._done:
            raise Difference(f"runs its blocks in another order than they stand in, block {index} first")
        if not isinstance(given, Tensor) or given.dim() != 3:
            raise Difference(f"gives block {index} hidden states that are not [windows, tokens, width]")
        if not _is_equal(given, self.hidden):
            source = f"leave block {index - 1}" if index else "enter it where the blocks are bypassed"
            raise Difference(f"gives block {index} other hidden states than those that {source}")


@contextmanager
def _as_before(block: nn.Module, own: Callable[..., Any]) -> Iterator[None]:
    """While the body runs, a block that is bypassed computes by itself."""
    block.forward, stand_in = own, block.forward
    try:
        yield
    finally:
        block.forward = stand_in


class _Calls:
    """Hears which modules with prunable weights are called, and whether one of them is given some tokens only."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        names = {f"{i}.{linear.module}" for i, linears in enumerate(checkpoint.linears) for linear in linears}
        self.missing = set(names)
        self.routed = any(linear.expert is not None for linears in checkpoint.linears for linear in linears)
        self._handles = [
            checkpoint.blocks.get_submodule(name).register_forward_pre_hook(partial(self._on_input, name))
            for name in names
        ]

    def __enter__(self) -> "_Calls":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_input(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.missing.discard(name)
        if args and isinstance(args[0], Tensor):
            self.routed = self.routed or bool(args[0].shape[:-1].numel() % (WINDOWS * TOKENS))


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same numbers; NaN is itself."""
    if one.shape != other.shape:
        return False
    if torch.equal(one, other) or (one.isnan().equal(other.isnan()) and one.nan_to_num().equal(other.nan_to_num())):
        return True
    return one.device.type != "cpu" and _distance(one, other) < UNITS * _eps(one)


def _is_near(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding at most, that went through the whole model."""
    return _distance(one, other) < 4 * math.sqrt(_eps(one))


def _eps(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps)


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean difference as a share of the mean size of what is compared; 0 where neither is a number."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return float((one - other).abs().mean() / other.abs().mean().clamp(min=1e-30))
