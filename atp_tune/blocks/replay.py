"""Running a model block by block, with exactly what the model itself passes to each block.

The model runs with its blocks bypassed: each block's forward is replaced by a stand-in that records its arguments
and returns the hidden state unchanged. So embeddings, masks, rotary tables, final norm and head are the model's own
code, whatever its family, and no name of them is known here. A block is then replayed with `functional_call` and any
weights, dense or pruned.

H hidden states [items, positions, width], of a text [windows, tokens, width]. What the model is called with, token ids
[windows, tokens] say, is its kind of input's business (`inputs`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError
from atp_tune.inputs import Batch, InputKind

StandIn = Callable[..., Any]
T = TypeVar("T")
HIDDEN = "hidden_states"
SHAPES = 4  # of batches whose calls are kept: full and last ones of two texts that go through a block in turn


@dataclass(frozen=True)
class Call:
    """What the model passes to one block besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # the hidden state is passed as a keyword

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with a hidden state put in."""
        if self.by_name:
            return self.args, {HIDDEN: hidden, **self.kwargs}
        return (hidden, *self.args), self.kwargs


class Replay:
    """Embeds, runs single blocks and computes logits, through a model's own code."""

    @torch.inference_mode()
    def __init__(self, checkpoint: Checkpoint, inputs: InputKind[Any]) -> None:
        self.checkpoint = checkpoint
        self.inputs = inputs
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._rest = self._outputs_beside_hidden()

    def embed(self, batch: Batch) -> Tensor:
        """Hidden states [items, positions, width] that enter block 0."""
        return self._enter(batch)[0]

    def run(self, index: int, weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Hidden states after block `index`, computed with these weights."""
        return self.within(index, weights, lambda: self.step(index, hidden))

    def within(self, index: int, weights: dict[str, Tensor], body: Callable[[], T]) -> T:
        """Result of `body()`, in which block `index` has these weights."""
        named = {f"block.{name}": tensor for name, tensor in weights.items()}
        result: T = torch.func.functional_call(_Within(self.checkpoint.blocks[index], body), named, ())
        return result

    @contextmanager
    def whole(self, weights_of: Callable[[int], dict[str, Tensor]]) -> Iterator[nn.Module]:
        """The model itself for programs that run it as a whole; its blocks compute with the weights given for them."""
        own = [block.forward for block in self.checkpoint.blocks]

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            return self.within(index, weights_of(index), partial(own[index], *args, **kwargs))

        with bypassed(self.checkpoint.blocks, stand_in):
            yield self.checkpoint.model

    def step(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states after block `index`, with the weights that it has now."""
        call = self._calls_for(hidden.shape[0], hidden.shape[1])[index]
        args, kwargs = call.with_hidden(hidden)
        return hidden_of(self.checkpoint.blocks[index](*args, **kwargs))

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Logits, of a text [windows, tokens, vocabulary], of the hidden states that leave the last block."""
        last = len(self.checkpoint.blocks) - 1

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._wrap(hidden if index == last else split(args, kwargs)[0])

        with bypassed(self.checkpoint.blocks, stand_in):
            logits: Tensor = self.forward(batch).logits
        return logits

    def forward(self, batch: Batch) -> Any:
        """The model's own output for a batch."""
        return self.inputs.forward(self.checkpoint.model, batch)

    def _wrap(self, hidden: Tensor) -> Any:
        """A block's output in the form that the model expects from it."""
        return hidden if self._rest is None else (hidden, *self._rest)

    def _enter(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Hidden states that enter block 0, and what each block is called with for this batch."""
        recorded: list[tuple[Tensor, Call]] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            recorded.append(split(args, kwargs))
            if len(recorded) == len(self.checkpoint.blocks):
                raise Reached  # the last block: what the model does after it is not wanted here
            return self._wrap(recorded[-1][0])

        with bypassed(self.checkpoint.blocks, stand_in), suppress(Reached):
            self.forward(batch)
        if len(recorded) < len(self.checkpoint.blocks):
            self._refuse_skipped(len(recorded))
        return recorded[0][0], [call for _, call in recorded]

    def _calls_for(self, items: int, positions: int) -> list[Call]:
        """The recorded calls for a batch of this shape; they must not depend on what is in it.

        Kept for the shapes that were used last: masks of a batch may take as much memory as its activations.
        """
        shape = (items, positions)
        if shape in self._calls:
            self._calls[shape] = self._calls.pop(shape)  # the last in order: used last
        else:
            _, one, other = self.inputs.examples(self.checkpoint, items, positions)
            self._calls[shape] = self._enter(one)[1]
            if len(self._calls) == 1 and not _same(self._calls[shape], self._enter(other)[1]):
                kind = type(self.checkpoint.model).__name__
                raise UserError(f"model {kind}: passes its blocks values that depend on the tokens; not supported yet")
            if len(self._calls) > SHAPES:
                del self._calls[next(iter(self._calls))]
        return self._calls[shape]

    def _outputs_beside_hidden(self) -> tuple[Any, ...] | None:
        """What block 0 returns after the hidden state, by running it once; None if it returns a plain tensor."""
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            arguments.append((args, kwargs))
            raise Reached

        blank, *_ = self.inputs.examples(self.checkpoint, 1, 2)
        with bypassed(self.checkpoint.blocks, stand_in), suppress(Reached):
            self.forward(blank)
        if not arguments:
            self._refuse_skipped(0)
        output: Any = torch.func.functional_call(self.checkpoint.blocks[0], self.checkpoint.weights(0), *arguments[0])
        return tuple(output[1:]) if isinstance(output, tuple | list) else None

    def _refuse_skipped(self, ran: int) -> NoReturn:
        kind, blocks = type(self.checkpoint.model).__name__, len(self.checkpoint.blocks)
        raise UserError(f"model {kind}: runs {ran} of {blocks} blocks on a text, so it cannot be measured on one")


class _Within(nn.Module):
    """Gives `functional_call` a body that runs a block more than once."""

    def __init__(self, block: nn.Module, body: Callable[[], Any]) -> None:
        super().__init__()
        self.block = block
        self.forward = body


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """The model called the block that was waited for."""


@contextmanager
def bypassed(blocks: nn.ModuleList, stand_in: StandIn) -> Iterator[None]:
    """While the body runs, `stand_in(index, *args, **kwargs)` answers in the place of each block.

    A `forward` that somebody has set on a block, as accelerate's hooks are, is there again afterwards.
    """
    before = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = partial(stand_in, index)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Hidden state and the rest of a block's arguments."""
    if args:
        return args[0], Call(args[1:], kwargs, by_name=False)
    rest = {name: value for name, value in kwargs.items() if name != HIDDEN}
    return kwargs[HIDDEN], Call((), rest, by_name=True)


def _same(one: Any, other: Any) -> bool:
    """Whether two recordings, or parts of them, hold equal values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Call):
        return isinstance(other, Call) and _same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and _same([*one.items()], [*other.items()])
    if isinstance(one, list | tuple):
        is_as_long = isinstance(other, list | tuple) and len(one) == len(other)
        return is_as_long and all(map(_same, one, other))
    return one is other or bool(one == other)
