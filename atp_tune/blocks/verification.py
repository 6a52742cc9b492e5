"""Verifies the replay against the model's own forward on a small batch.

The model runs normally. The checks: each block is called once, in the order of the list, with the hidden states [items,
positions, width] of the block before it; its replay returns the same; and its linears are applied by calling their
modules. The score then checks the logits (`Head`). The weights of each block are used once, so that a streamed model is
copied once.

On a CPU results must be bit-identical. On other devices the order of sums may vary, so they must agree within a few
units in the last place.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atp_tune.blocks.replay import Replay, bypassed, hidden_states, split
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.errors import UserError
from atp_tune.inputs import Batch, InputKind
from atp_tune.inputs.items import IDS, Items

TEXTS_ALONE = "leave the images out, it is calibrated on texts"
UNITS = 32  # tolerance in units in the last place, on devices with varying order of sums


class Difference(Exception):  # noqa: N818 - a finding, of which a line is made for the user
    """A difference between replay and model, or a model that does not suit its score."""


@dataclass(frozen=True)
class ProbeRun:
    """A batch, and its hidden states [items, positions, width] after the last block."""

    batch: Batch
    hidden: Tensor


class Head(Protocol):
    """The part of a score that checks the logits of a model."""

    def probes(self, checkpoint: Checkpoint) -> Sequence[Batch]:
        """Small batches, the first is also run by the model as a whole; none: an example of the kind of input."""

    def check_head(self, replay: Replay, runs: Sequence[ProbeRun], logits: Tensor, is_routed: bool) -> None:
        """Raises Difference if the model does not suit the score.

        `runs`: replays of the probes; `logits`: of the first probe by the model as a whole; `is_routed`: some linears
        get only a part of the hidden states.
        """


@contextmanager
def as_user_error(what: str, failed: str, remedy: str = "") -> Iterator[None]:
    """Turns a Difference into a UserError of `what` and `remedy`, and other errors but a lack of memory into `failed`.

    `failed`: follows `what`; the error, in one line, stands in the place of {}.
    """
    try:
        yield
    except Difference as difference:
        raise UserError(f"{what}{difference}; {remedy}") from None
    except UserError:
        raise
    except Exception as error:  # models, such as those that need more inputs than a text, raise many types
        if is_out_of_memory(error):
            raise
        raise UserError(what + failed.format(one_line(error))) from error


@torch.inference_mode()
def verified(checkpoint: Checkpoint, inputs: InputKind, head: Head) -> Replay:
    """The verified replay of a model; UserError that names the first difference."""
    what = f"model {type(checkpoint.model).__name__}: "
    failed = f"cannot be run block by block on {inputs.called} alone: {{}}"
    with as_user_error(what, failed, "such a model cannot be pruned block by block"):
        check_own_weights(checkpoint)
        replay = Replay(checkpoint, inputs)
        probes = head.probes(checkpoint) or inputs.examples(checkpoint, 2, 1)[1:2]
        walk = _BlockComparison(replay, probes)
        rows = walk.hidden[0].shape[:2].numel()
        with _recorded(checkpoint, rows) as calls, bypassed(checkpoint.blocks, walk.step):
            logits = replay.forward(probes[0]).logits
        if calls.missing:
            raise Difference(
                f"does not call {min(calls.missing)} on {inputs.called}, so the inputs of its weights are not known"
            )
        head.check_head(replay, list(map(ProbeRun, probes, walk.hidden)), logits, calls.is_routed)
    return replay


@torch.inference_mode()
def check_batch(replay: Replay, batch: Batch, where: str, remedy: str = TEXTS_ALONE) -> None:
    """UserError, which begins with `where`, unless blocks can be replayed on items of a batch as on examples.

    Of the whole batch the arguments of the blocks are compared, which may depend on images; of its first two items also
    the hidden states between the blocks, into which a model may write again what it saw.
    """
    with as_user_error(f"{where}: {type(replay.checkpoint.model).__name__} ", "cannot be run on its pairs: {}", remedy):
        for index in range(len(batch)):
            if not replay.is_as_examples(batch[index : index + 1]):
                raise Difference("passes its blocks values that depend on the image")
        with bypassed(replay.checkpoint.blocks, _BlockComparison(replay, [batch[:2]]).step):
            replay.forward(batch[:2])


def check_own_weights(checkpoint: Checkpoint) -> None:
    """Raises Difference if blocks share a weight, since pruning it twice would keep the second mask only."""
    owners = dict[int, int]()
    for index, block in enumerate(checkpoint.blocks):
        tensors = dict(block.named_parameters(remove_duplicate=False))
        for linear in checkpoint.linears[index]:
            if owners.setdefault(id(tensors[linear.key]), index) != index:
                raise Difference(f"shares {linear.key} between blocks {owners[id(tensors[linear.key])]} and {index}")


class _BlockComparison:
    """Replaces the blocks of a running model: runs each block as the model calls it, and compares its replay."""

    def __init__(self, replay: Replay, batches: Sequence[Batch]) -> None:
        self.hidden = [replay.embed(batch).clone() for batch in batches]  # those of the first batch are the model's own
        self._replay = replay
        self._own = [block.forward for block in replay.checkpoint.blocks]
        self._done = 0

    def step(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """The output of block `index`; raises Difference if arguments or output of the replay differ."""
        given = split(args, kwargs)[0]
        if index < self._done:
            raise Difference(f"runs its blocks several times, block {index} after block {self._done - 1}")
        if index > self._done:
            raise Difference(f"runs its blocks in another order than they stand in, block {index} first")
        if not isinstance(given, Tensor) or given.dim() < 3 or (given.dim() > 3 and not self._replay.inputs.has_steps):
            raise Difference(f"gives block {index} hidden states that are not [windows, tokens, width]")
        if not is_equal(given, self.hidden[0]):
            source = f"leave block {index - 1}" if index else "enter it where the blocks are bypassed"
            raise Difference(f"gives block {index} other hidden states than those that {source}")
        weights = self._replay.checkpoint.weights(index)
        output = self._replay.within(index, weights, partial(self._own[index], *args, **kwargs))
        block = self._replay.checkpoint.blocks[index]
        block.forward, stand_in = self._own[index], block.forward
        try:
            replayed, *others = (self._replay.alone(index, weights, hidden) for hidden in (given, *self.hidden[1:]))
        finally:
            block.forward = stand_in
        if not is_equal(replayed, hidden_states(output)):
            raise Difference(f"block {index} returns other numbers when it is run alone")
        self.hidden = [self._replay.cross(index, hidden) for hidden in (hidden_states(output), *others)]
        self._done += 1
        return output


@dataclass
class _Calls:
    """The modules with prunable weights that were not called, and whether one gets only some positions."""

    missing: set[str]
    is_routed: bool


@contextmanager
def _recorded(checkpoint: Checkpoint, rows: int) -> Iterator[_Calls]:
    """Records calls of a batch with so many hidden states (`rows`), items times positions."""
    names = {f"{i}.{linear.module}" for i, linears in enumerate(checkpoint.linears) for linear in linears}
    calls = _Calls(set(names), any(linear.expert is not None for linears in checkpoint.linears for linear in linears))

    def on_input(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.missing.discard(name)
        if args and isinstance(args[0], Tensor):
            calls.is_routed |= bool(args[0].shape[:-1].numel() % rows)

    with ExitStack() as stack:
        for name in names:
            module = checkpoint.blocks.get_submodule(name)
            stack.enter_context(module.register_forward_pre_hook(partial(on_input, name)))
        yield calls


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two results are equal, with NaN equal to NaN; within `UNITS` on devices other than a CPU."""
    if one.shape != other.shape:
        return False
    if torch.equal(one, other) or (one.isnan().equal(other.isnan()) and one.nan_to_num().equal(other.nan_to_num())):
        return True
    return one.device.type != "cpu" and _distance(one, other) < UNITS * torch.finfo(one.dtype).eps


def is_near(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ at most by rounding through the whole model."""
    return _distance(one, other) < 4 * math.sqrt(torch.finfo(one.dtype).eps)


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference relative to the mean absolute value; NaN counts as 0."""
    one, other = one.float().nan_to_num(), other.float().nan_to_num()
    return float((one - other).abs().mean() / other.abs().mean().clamp(min=1e-30))


# --- Runs a model that reads images beside text block by block, its vision tower before its language model.
#
# The blocks of the tower and those of the language model are replayed apart. What lies between them, such as a
# projector, and which hidden states of the tower the language model gets, is the model's own code: it runs with the
# tower's weights, dense or pruned, up to the first block of the language model.
#
# Hidden states are [images, patches, width] in the tower and [pairs, tokens, width] behind it; each pair has one image.

ONLY = 'take model.prune = ["language"]'


class TowerReplay(Replay):
    """The replay of a tower and a language model, in one list of blocks; `logits` is of texts and of pairs alike."""

    def __init__(self, checkpoint: Checkpoint, tower: Replay, language: Replay) -> None:
        """`tower`, `language`: replays of the two parts of the checkpoint."""
        self.checkpoint = checkpoint
        self.inputs = language.inputs
        self._tower = tower
        self._language = language
        self._steps = set()

    def embed(self, batch: Batch, tower: Sequence[dict[str, Tensor]] = ()) -> Tensor:
        """Hidden states [images, patches, width] that enter the tower; with its weights those that leave it."""
        if not tower:
            return self._tower.embed(batch)
        with self._tower.whole(tower.__getitem__):
            return self._language.embed(batch)

    def step(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states after block `index` with its current weights."""
        if index < self.in_tower:
            return self._tower.step(index, hidden)
        return self._language.step(index - self.in_tower, hidden)

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Logits [pairs, tokens, vocabulary] from the hidden states after the last block."""
        return self._language.logits(batch, hidden)


@dataclass(frozen=True)
class OfPairs:
    """The input kind of a tower's replay: examples are a pair, the only one in `pair`, with other pixels."""

    inputs: InputKind
    pair: Items
    called = "a pair of image and text"
    has_steps = False

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The output of the model for a batch."""
        return self.inputs.forward(model, batch)

    def examples(self, checkpoint: Checkpoint, items: int, positions: int) -> tuple[Items, Items, Items]:
        """Three batches of one shape: pixels of one value, and two of noise."""

        def filled(seed: int) -> Items:
            draw = torch.Generator().manual_seed(seed)
            tensors = {}
            for name, tensor in self.pair.tensors.items():
                rows = tensor.expand(items, *tensor.shape[1:]).clone()
                if tensor.is_floating_point():
                    rows.copy_(torch.randn(rows.shape, generator=draw) if seed else torch.ones(rows.shape))
                tensors[name] = rows
            return replace(self.pair, tensors=tensors)

        return filled(0), filled(1), filled(2)


@torch.inference_mode()
def verified_with_tower(checkpoint: Checkpoint, inputs: InputKind, head: Head, items: dict[str, Batch]) -> TowerReplay:
    """The verified replay of a model whose vision tower is pruned too; UserError that names the first difference.

    `items`: pairs by role, on which the tower is compared with the model's own forward.
    """
    language = verified(checkpoint.part(checkpoint.in_tower, len(checkpoint.blocks)), inputs, head)
    kind, failed = type(checkpoint.model).__name__, f"cannot be run block by block on its pairs: {{}}; {ONLY}"
    with as_user_error(f"model {kind}: ", failed, ONLY):
        # The replay of the tower; Difference if it has not one image for each pair, or does not call its linears.
        pairs = next(iter(items.values()))
        tower = Replay(checkpoint.part(0, checkpoint.in_tower), OfPairs(inputs, pairs[:1]))  # type: ignore[arg-type]
        hidden = tower.embed(pairs[:2])
        if hidden.dim() != 3 or len(hidden) != len(pairs[:2].tensors[IDS]):
            raise Difference(
                f"runs its vision tower on {tuple(hidden.shape)} for {len(pairs[:2])} pairs, not on one image for each"
            )
        check_own_weights(tower.checkpoint)
        # The modules with prunable weights that the model does not call on a batch.
        with _recorded(tower.checkpoint, 1) as calls:
            tower.forward(pairs[:2])
        if calls.missing:
            raise Difference(f"does not call {min(calls.missing)} of its vision tower")
        replay = TowerReplay(checkpoint, tower, language)
        dense = checkpoint.tower_weights()
    for role, batch in items.items():
        where = f"texts.{role}.images"
        with as_user_error(f"{where}: {kind}: ", failed, ONLY):
            _check_tower(replay._tower, batch)
            check_batch(language, batch, where, ONLY)
            if not is_equal(replay.embed(batch[:2], dense), language.embed(batch[:2])):
                raise Difference("gives its language model other numbers when its tower is run by blocks")
    return replay


def _check_tower(tower: Replay, batch: Batch) -> None:
    """Difference unless the blocks of a tower, replayed one by one, compute what they do when the model runs.

    They are replayed after the model has run: while it runs, transformers collects what its blocks return.
    """
    ran, weights = list[tuple[int, Tensor, Tensor]](), tower.checkpoint.weights
    run, indices = tower.with_weights(weights), range(len(tower.checkpoint.blocks))

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
        output = run(index, *args, **kwargs)
        ran.append((index, split(args, kwargs)[0].clone(), hidden_states(output).clone()))
        return output

    if not all(tower.is_as_examples(batch[row : row + 1]) for row in range(len(batch))):
        raise Difference("passes the blocks of its tower values that depend on the image")
    with bypassed(tower.checkpoint.blocks, stand_in):
        tower.forward(batch[:2])
    if [index for index, *_ in ran] != list(indices):
        raise Difference("does not run each block of its vision tower once, in their order")
    hidden = tower.embed(batch[:2])
    for index, given, output in ran:
        states = tower.alone(index, weights(index), hidden)
        if not is_equal(given, hidden) or not is_equal(states, output):
            raise Difference(f"gives block {index} of its tower other numbers than when it is run alone")
        hidden = states
