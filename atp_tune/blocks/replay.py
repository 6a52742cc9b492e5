"""Runs a model block by block, with exactly the arguments that the model passes to each block.

The model runs with its blocks bypassed: the forward of each block is replaced by a stand-in that records its arguments
and returns the hidden states unchanged. So embeddings, masks, rotary tables, final norm and head are computed by the
model's own code, for any family. A block is then replayed by `functional_call` with any weights, dense or pruned.

Hidden states are [items, positions, width]; for texts [windows, tokens, width]. The kind of input (`inputs`) calls the
model, for texts with token ids [windows, tokens]. In image classifiers with stages, hidden states change their shape,
and there are steps between blocks, such as downsampling: those are run by a bypassed model too (`cross`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import Tensors, free_memory, is_out_of_memory, release_memory
from atp_tune.errors import TrialError, UserError
from atp_tune.events import EventHandler, Message
from atp_tune.inputs import Batch, InputKind

StandIn = Callable[..., Any]
T = TypeVar("T")
HIDDEN = "hidden_states"
SHAPES = 4  # batch shapes whose calls are kept: full and last batches of two texts that alternate


class Call(NamedTuple):
    """The arguments of one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # hidden states are passed as a keyword


class Replay:
    """Embeds, runs single blocks, and computes logits, with the code of the model."""

    _dense: "Replay | None" = None
    _outer: Mapping[nn.Module, Tensor] = {}

    @torch.inference_mode()
    def __init__(self, checkpoint: Checkpoint, inputs: InputKind) -> None:
        self.checkpoint = checkpoint
        self.inputs = inputs
        self._calls = dict[tuple[int, int], list[Call]]()
        self._blank = dict[int, Batch]()  # a batch of the last size that crossed a step
        self._steps = set[int]()  # blocks after which the model computes something before the next block
        self._rest = self._outputs()

    @property
    def dense(self) -> "Replay":
        """The replay of the dense model; itself, unless it has weights of its own."""
        return self._dense or self

    def with_outer(self, weights: Mapping[nn.Module, Tensor]) -> "Replay":
        """A replay of the model with other weights of some modules outside of the blocks."""
        other = copy(self)
        other._dense, other._outer = self.dense, weights
        return other

    @contextmanager
    def _outside(self) -> Iterator[nn.Module]:
        """Yields the model, whose modules outside of the blocks have their weights meanwhile."""
        own: dict[nn.Module, Any] = {module: module._parameters["weight"] for module in self._outer}

        def place(weights: Mapping[nn.Module, Any]) -> None:
            for module, weight in weights.items():
                module._parameters["weight"] = weight

        try:
            place(self._outer)
            yield self.checkpoint.model
        finally:
            place(own)

    @property
    def in_tower(self) -> int:
        """The number of blocks, the first, that are of a vision tower: see `verification`."""
        return self.checkpoint.in_tower

    def embed(self, batch: Batch, tower: Sequence[Tensors] = ()) -> Tensor:
        """Hidden states [items, positions, width] that enter block 0.

        `tower`: the weights of a tower's blocks; then those that enter the first block of the language model.
        """
        return self._enter(batch)[0]

    def run(self, index: int, weights: Tensors, hidden: Tensor) -> Tensor:
        """Hidden states after block `index` with the given weights, as they enter the next block."""
        return self.cross(index, self.alone(index, weights, hidden))

    def alone(self, index: int, weights: Tensors, hidden: Tensor) -> Tensor:
        """Hidden states that leave block `index` with the given weights."""
        return self.within(index, weights, lambda: self.step(index, hidden))

    def cross(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states that enter the block after `index`, from those that leave it, by the model's own code.

        In language models they are the same. In stages of image classifiers lies a step between them.
        """
        if index not in self._steps:
            return hidden
        states = list[Tensor]()

        def stand_in(i: int, *args: Any, **kwargs: Any) -> Any:
            if i == index + 1:
                states.append(split(args, kwargs)[0])
                raise Reached
            return self._wrap(i, hidden if i == index else split(args, kwargs)[0])

        if len(hidden) not in self._blank:
            self._blank = {len(hidden): self.inputs.examples(self.checkpoint, len(hidden), 1)[0]}
        with bypassed(self.checkpoint.blocks, stand_in), suppress(Reached):
            self.forward(self._blank[len(hidden)])
        return states[0]

    def within(self, index: int, weights: Tensors, body: Callable[[], T]) -> T:
        """Result of `body()`, run while block `index` has the given weights."""
        tensors = {f"block.{name}": tensor for name, tensor in weights.items()}
        result: T = torch.func.functional_call(_Within(self.checkpoint.blocks[index], body), tensors, ())
        return result

    @contextmanager
    def whole(self, weights_of: Callable[[int], Tensors]) -> Iterator[nn.Module]:
        """Yields the model for code that runs it as a whole; its blocks use the weights of `weights_of`."""
        with bypassed(self.checkpoint.blocks, self.with_weights(weights_of)), self._outside() as model:
            yield model

    def with_weights(self, weights_of: Callable[[int], Tensors]) -> StandIn:
        """Computes what a block's own forward does, with the weights of `weights_of`."""
        own = [block.forward for block in self.checkpoint.blocks]
        return lambda index, *args, **kwargs: self.within(
            index, weights_of(index), partial(own[index], *args, **kwargs)
        )

    def step(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states after block `index` with its current weights."""
        positions = 1 if self.inputs.has_steps else hidden.shape[1]
        call, block = self._calls_for(hidden.shape[0], positions)[index], self.checkpoint.blocks[index]
        if call.by_name:
            return hidden_states(block(**{HIDDEN: hidden, **call.kwargs}))
        return hidden_states(block(hidden, *call.args, **call.kwargs))

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Logits, for texts [windows, tokens, vocabulary], from the hidden states after the last block."""
        last = len(self.checkpoint.blocks) - 1

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._wrap(index, hidden if index == last else split(args, kwargs)[0])

        with bypassed(self.checkpoint.blocks, stand_in):
            logits: Tensor = self.forward(batch).logits
        return logits

    def forward(self, batch: Batch) -> Any:
        """The output of the model for a batch."""
        with self._outside() as model:
            return self.inputs.forward(model, batch)

    def _wrap(self, index: int, hidden: Tensor) -> Any:
        """The output of a block in the form that the model expects."""
        rest = self._rest[index]
        return hidden if rest is None else (hidden, *rest)

    def _enter(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """Hidden states that enter block 0, and the call of each block, for a batch."""
        recorded = list[tuple[Tensor, Call]]()

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            entry = split(args, kwargs)
            if self.inputs.has_steps and recorded and entry[0] is not recorded[-1][0]:
                self._steps.add(index - 1)
            recorded.append(entry)
            if len(recorded) == len(self.checkpoint.blocks):
                raise Reached  # the rest of the model is not needed
            return self._wrap(index, entry[0])

        with bypassed(self.checkpoint.blocks, stand_in), suppress(Reached):
            self.forward(batch)
        if len(recorded) < len(self.checkpoint.blocks):
            self._refuse_skipped(len(recorded))
        return recorded[0][0], [call for _, call in recorded]

    def _calls_for(self, items: int, positions: int) -> list[Call]:
        """The recorded calls for batches of a shape; UserError if they depend on the content of the batch.

        Only the last shapes are kept, since masks may take as much memory as activations.
        """
        shape, known = (items, positions), self._calls
        if shape in known:
            known[shape] = known.pop(shape)  # moves the shape to the end: most recently used
        else:
            _, one, other = self.inputs.examples(self.checkpoint, *shape)
            known[shape] = self._enter(one)[1]
            if len(known) == 1 and not _same(known[shape], self._enter(other)[1]):
                kind, what = type(self.checkpoint.model).__name__, "images" if self.inputs.has_steps else "tokens"
                raise UserError(f"model {kind}: passes its blocks values that depend on the {what}; not supported yet")
            if len(known) > SHAPES:
                del known[next(iter(known))]
        return known[shape]

    def is_as_examples(self, batch: Batch) -> bool:
        """Whether the blocks are called on a batch with the arguments that examples of its shape have."""
        hidden, calls = self._enter(batch)
        return _same(calls, self._calls_for(*hidden.shape[:2]))

    def _outputs(self) -> list[tuple[Any, ...] | None]:
        """The outputs of each block after the hidden states, from one run of the model; None if it returns a tensor.

        Of language models those of the block that runs first, for all blocks.
        """
        outputs, each, count = dict[int, Any](), self.inputs.has_steps, len(self.checkpoint.blocks)
        run = self.with_weights(self.checkpoint.weights)

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            output = run(index, *args, **kwargs)
            outputs[index] = tuple(output[1:]) if isinstance(output, tuple | list) else None
            if not each:
                raise Reached
            return output

        blank, *_ = self.inputs.examples(self.checkpoint, 1, 1 if each else 2)
        with bypassed(self.checkpoint.blocks, stand_in), suppress(Reached):
            self.forward(blank)
        if len(outputs) < (count if each else 1):
            self._refuse_skipped(len(outputs))
        return [outputs[index] for index in range(count)] if each else [*outputs.values()] * count

    def _refuse_skipped(self, ran: int) -> NoReturn:
        kind, blocks = type(self.checkpoint.model).__name__, len(self.checkpoint.blocks)
        what = self.inputs.called
        raise UserError(f"model {kind}: runs {ran} of {blocks} blocks on {what}, so it cannot be measured on one")


class _Within(nn.Module):
    """A module whose forward is `body`, so that `functional_call` covers several runs of a block."""

    def __init__(self, block: nn.Module, body: Callable[[], Any]) -> None:
        super().__init__()
        self.block = block
        self.forward = body


class Reached(Exception):  # noqa: N818 - a signal, not an error
    """The model has called the block of interest."""


@contextmanager
def bypassed(blocks: nn.ModuleList, stand_in: StandIn) -> Iterator[None]:
    """While the context is active, `stand_in(index, *args, **kwargs)` replaces the forward of each block.

    A `forward` set on a block instance, such as by accelerate's hooks, is restored.
    """
    before = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = partial(stand_in, index)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                vars(block).pop("forward", None)
            else:
                block.forward = own


def hidden_states(output: Any) -> Tensor:
    """The hidden states in the output of a block."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Splits the arguments of a block into hidden states and the rest."""
    if args:
        return args[0], Call(args[1:], kwargs, by_name=False)
    return kwargs[HIDDEN], Call((), {name: value for name, value in kwargs.items() if name != HIDDEN}, by_name=True)


def _same(one: Any, other: Any) -> bool:
    """Whether two recordings, or parts of recordings, are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and _same([*one.items()], [*other.items()])
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_same, one, other))
    return one is other or bool(one == other)


# --- Batch size in windows: chosen from free memory, halved when memory runs out.
#
# The batch size affects rounding of the hidden states, and so near-ties between scores, which at high sparsity change
# the perplexity by about 1 % (docs/log.md). So sizes are powers of two, which rarely change with free memory.
#
# For the same reason the size is stored in the study: all trials start with the size of the first trial, on any
# machine. A trial that runs out of memory goes on with half the size, and its record tells so; the next trial starts
# with the size of the study again, since the shortage may be temporary. If it is not, each trial has one failed step.

SHARE = 0.3  # share of free memory for the activations of a batch
TOKENS = {"cpu": 2048}  # per batch; more is not faster
ELSEWHERE = 32768  # the same on other devices


class AutoBatch:
    """Windows per batch, from free memory; a step that runs out of memory is repeated with half as many.

    `watch` gets a line the first time in each trial.
    """

    def __init__(self, device: torch.device, tokens: int, bytes_per_token: int, watch: EventHandler) -> None:
        self._device = device
        self._bytes = tokens * bytes_per_token
        fast = TOKENS.get(device.type, ELSEWHERE) // tokens
        most = max(1, min(self._fitting(SHARE), fast))
        self.windows = 1 << (most.bit_length() - 1)
        self._watch = watch
        self._is_notified = False

    def begin(self, windows: int) -> None:
        """Starts a trial with the size of its study; on a CPU the size is first halved until it fits.

        A GPU reports that memory ran out, but on a CPU the system kills the process or swaps.
        """
        self.windows, self._is_notified = windows, False
        while self._device.type == "cpu" and self.windows > max(1, self._fitting(1)):
            self._halve()

    def _fitting(self, share: float) -> int:
        return int(share * free_memory(self._device) / self._bytes)

    def run(self, step: Callable[[int], T]) -> T:
        """Result of `step(windows)`; TrialError if a single window does not fit."""
        while True:
            try:
                return step(self.windows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve()

    def over(self, count: int, step: Callable[[slice], T]) -> list[T]:
        """Results of `step(rows)` for consecutive slices of `count` windows, each slice a batch of `run`."""
        results = list[T]()
        start = 0

        def run_batch(windows: int) -> T:
            return step(slice(start, start + windows))

        while start < count:
            results.append(self.run(run_batch))
            start += self.windows
        return results

    def _halve(self) -> None:
        if self.windows == 1:
            way = ", or set PYTORCH_ALLOC_CONF=expandable_segments:True" * (self._device.type == "cuda")
            raise TrialError(f"out of memory with one window at a time; use shorter windows or a larger device{way}")
        self.windows //= 2
        release_memory()
        if not self._is_notified:
            self._watch(Message(f"memory ran out: going on with {self.windows} windows at a time"))
            self._is_notified = True


def once_more(work: Callable[[], T]) -> T:
    """Result of some work, which is done again with memory released if it runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()  # outside of the handler, whose error keeps tensors alive
    return work()


def block_bytes(checkpoint: Checkpoint, over: Callable[[Iterable[int]], int] = sum) -> int:
    """Estimated bytes per token in a block: twice the inputs and outputs `over` its linears, all of them by default."""
    # Inputs plus outputs per token of each weight tensor; experts count as often as a token chooses them.
    chosen = int(getattr(checkpoint.config.get_text_config(), "num_experts_per_tok", None) or 1)
    widths = (
        {x.key: (x.in_features + x.out_features) * (1 if x.expert is None else chosen) for x in linears}
        for linears in checkpoint.linears
    )
    return 2 * max(over(each.values()) for each in widths) * checkpoint.dtype.itemsize
