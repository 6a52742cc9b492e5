"""Runs a model that reads images beside text block by block, its vision tower before its language model.

The blocks of the tower and those of the language model are replayed apart. What lies between them, such as a projector,
and which hidden states of the tower the language model gets, is the model's own code: it runs with the tower's weights,
dense or pruned, up to the first block of the language model.

Hidden states are [images, patches, width] in the tower and [pairs, tokens, width] behind it; each pair has one image.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atp_tune.blocks.replay import Replay, bypassed, hidden_of, split
from atp_tune.blocks.verification import (
    Difference,
    Head,
    as_user_error,
    check_batch,
    check_own_weights,
    is_equal,
    missing_calls,
    verified,
)
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.inputs import Batch, InputKind
from atp_tune.inputs.items import IDS, Items

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


class OfPairs:
    """What the replay of a tower needs of an `InputKind`: examples are a pair with other pixels."""

    called = "a pair of image and text"
    has_steps = False

    def __init__(self, inputs: InputKind, pairs: Items) -> None:
        """`pairs`: some, of which the first is the example."""
        self._inputs = inputs
        self._pair = pairs[:1]

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The output of the model for a batch."""
        return self._inputs.forward(model, batch)

    def examples(self, checkpoint: Checkpoint, items: int, positions: int) -> tuple[Items, Items, Items]:
        """Three batches of one shape: pixels of one value, and two of noise."""

        def filled(seed: int) -> Items:
            draw = torch.Generator().manual_seed(seed)
            found = {}
            for name, tensor in self._pair.tensors.items():
                rows = tensor.expand(items, *tensor.shape[1:]).clone()
                if tensor.is_floating_point():
                    noise = torch.randn(rows.shape, generator=draw) if seed else torch.ones(rows.shape)
                    rows.copy_(noise)
                found[name] = rows
            return replace(self._pair, tensors=found)

        return filled(0), filled(1), filled(2)


@torch.inference_mode()
def verified_with_tower(checkpoint: Checkpoint, inputs: InputKind, head: Head, items: dict[str, Batch]) -> TowerReplay:
    """The verified replay of a model whose vision tower is pruned too; UserError that names the first difference.

    `items`: pairs by role, on which the tower is compared with the model's own forward.
    """
    language = verified(checkpoint.part(checkpoint.in_tower, len(checkpoint.blocks)), inputs, head)
    kind, failed = type(checkpoint.model).__name__, f"cannot be run block by block on its pairs: {{}}; {ONLY}"
    with as_user_error(f"model {kind}: ", ONLY, failed):
        replay = TowerReplay(checkpoint, _tower_of(checkpoint, inputs, next(iter(items.values()))), language)
        dense = checkpoint.tower_weights()
    for role, batch in items.items():
        where = f"texts.{role}.images"
        with as_user_error(f"{where}: {kind}: ", ONLY, failed):
            _check_tower(replay._tower, batch)
            check_batch(language, batch, where, ONLY)
            if not is_equal(replay.embed(batch[:2], dense), language.embed(batch[:2])):
                raise Difference("gives its language model other numbers when its tower is run by blocks")
    return replay


def _tower_of(checkpoint: Checkpoint, inputs: InputKind, pairs: Items) -> Replay:
    """The replay of the tower; Difference if it has not one image for each pair, or does not call its linears."""
    tower = Replay(checkpoint.part(0, checkpoint.in_tower), OfPairs(inputs, pairs))  # type: ignore[arg-type]
    hidden = tower.embed(pairs[:2])
    if hidden.dim() != 3 or len(hidden) != len(pairs[:2].tensors[IDS]):
        raise Difference(
            f"runs its vision tower on {tuple(hidden.shape)} for {len(pairs[:2])} pairs, not on one image for each"
        )
    check_own_weights(tower.checkpoint)
    if missing := missing_calls(tower, pairs[:2]):
        raise Difference(f"does not call {min(missing)} of its vision tower")
    return tower


def _check_tower(tower: Replay, batch: Batch) -> None:
    """Difference unless the blocks of a tower, replayed one by one, compute what they do when the model runs.

    They are replayed after the model has run: while it runs, transformers collects what its blocks return.
    """
    ran: list[tuple[int, Tensor, Tensor]] = []
    own = [block.forward for block in tower.checkpoint.blocks]
    weights = tower.checkpoint.weights

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
        output = tower.within(index, weights(index), partial(own[index], *args, **kwargs))
        ran.append((index, split(args, kwargs)[0].clone(), hidden_of(output).clone()))
        return output

    if not all(tower.is_as_examples(batch[row : row + 1]) for row in range(len(batch))):
        raise Difference("passes the blocks of its tower values that depend on the image")
    with bypassed(tower.checkpoint.blocks, stand_in):
        tower.forward(batch[:2])
    if [index for index, *_ in ran] != list(range(len(own))):
        raise Difference("does not run each block of its vision tower once, in their order")
    hidden = tower.embed(batch[:2])
    for index, given, output in ran:
        found = tower.alone(index, weights(index), hidden)
        if not is_equal(given, hidden) or not is_equal(found, output):
            raise Difference(f"gives block {index} of its tower other numbers than when it is run alone")
        hidden = found
