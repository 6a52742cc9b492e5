"""The pass over the blocks: measures, prunes and runs one block at a time.

For block i = 0 … L-1, with H the hidden states of the calibration windows that enter it:

    1. run the dense block on H and collect the pruner's statistics of the inputs of each linear
    2. prune each linear to the sparsity s_i of the block
    3. H ← block_i(H) with the pruned weights

So block i is measured with blocks 0 … i-1 pruned, as in the papers (statistics "block"). With statistics "sequential"
each linear is measured with all earlier linears pruned, see `sequential`. With statistics of the dense model ("dense")
step 1 is omitted, and step 3 runs only the windows of the error curve, if any.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from atp_tune.allocations.rows import read_offsets, zeros_of_rows
from atp_tune.blocks.channels import ChannelPruner, PrunedChannels
from atp_tune.blocks.replay import AutoBatch, Replay, once_more
from atp_tune.checkpoints.blocks import Linear, expert_inputs, expert_name, expert_weights
from atp_tune.checkpoints.devices import Tensors
from atp_tune.errors import TrialError
from atp_tune.inputs import Batch
from atp_tune.plan import Level, Plan
from atp_tune.pruners import Pruner, Statistics, make_pruner
from atp_tune.pruners.refinement import Treatment
from atp_tune.pruners.rounding import RTN, Grid
from atp_tune.pruners.selection import nonzeros
from atp_tune.pruners.wanda import WandaOfRows

# --- Hooks that collect statistics of the inputs of a block's linears while the block runs.
#
# `prune_sequentially` prunes the linears one after the other in a single pass, each measured with all earlier ones
# pruned.
#
# The block runs on all batches of windows at once, each in a greenlet, which can be suspended:
#
#     stop      each batch runs until it is about to multiply by the next linear
#     measure   X of that linear ← its inputs in all batches
#     prune     its weight, in place
#     go on     each batch multiplies by the pruned weight, and runs to the next linear
#
# Each token goes through each block once; measuring the dense block first takes a second pass. The activations of all
# suspended batches must fit in memory: about 2 (width + inner width) numbers per calibration token in a gated MLP.
#
# Source: the order of `true-sequential` in GPTQ's code (Frantar et al., ICLR 2023), which takes one pass per group of
# linears.

OnInputs = Callable[[Sequence[Linear]], None]


class AllInputsSeen(Exception):  # noqa: N818 - a signal, not an error
    """All linears have their inputs, so the block need not go on."""


@dataclass(eq=False)
class InputCollector:
    """Statistics by linear, collected by forward pre-hooks; linears with the same input tensor share one object.

    `on_inputs` is called with one linear, or with the experts of a mixture, after their inputs were added and before
    they are multiplied by the weight.
    """

    linears: list[Linear]
    kind: type[Statistics]
    on_inputs: OnInputs

    def __post_init__(self) -> None:
        self._by_name = dict[str, Statistics]()
        self._run = set[str]()
        self._by_tensor = dict[int, tuple[ref[Tensor], Statistics]]()  # by id of the input tensor

    @contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Collects inputs while the context is active."""
        # The linears of experts by name, for the path of each experts module.
        experts = dict[str, dict[str, Linear]]()
        with ExitStack() as stack:
            for linear in self.linears:
                if linear.expert is None:
                    module, hook = block.get_submodule(linear.name), partial(self._on_input, linear)
                    stack.enter_context(module.register_forward_pre_hook(hook))
                else:
                    experts.setdefault(linear.module, {})[linear.name] = linear
            for path, linears in experts.items():
                on_experts = partial(self._on_expert_input, path, linears)
                module = block.get_submodule(path)
                stack.enter_context(module.register_forward_pre_hook(on_experts, with_kwargs=True))
            yield

    def of(self, linear: Linear) -> Statistics | None:
        """The statistics of a linear so far; None for an expert without tokens."""
        return self._by_name.get(linear.name)

    def result(self) -> dict[str, Statistics]:
        """Statistics by name, without those of experts without tokens; TrialError if a linear was not run."""
        never_run = [linear.name for linear in self.linears if linear.name not in self._run]
        if never_run:
            raise TrialError(f"linear {never_run[0]} was not run by its block, so its inputs are not known")
        return self._by_name

    def _on_input(self, linear: Linear, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        tensor, statistics = self._by_tensor.get(id(x), (None, None))
        if statistics is None or tensor is None or tensor() is not x:
            statistics = self._take_in(linear, x)
            self._by_tensor[id(x)] = ref(x), statistics
        self._by_name[linear.name] = statistics
        self._ran([linear])

    def _on_expert_input(
        self, path: str, linears: dict[str, Linear], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        for weight in expert_weights(
            module
        ):  # in "sequential", W_up is pruned before the inputs of W_down are computed
            for expert, x in expert_inputs(module, weight, hidden, chosen):
                linear = linears[expert_name(path, weight, expert)]
                self._by_name[linear.name] = self._take_in(linear, x)
            self._ran([linear for linear in linears.values() if linear.key == f"{path}.{weight}"])

    def _take_in(self, linear: Linear, x: Tensor) -> Statistics:
        """Adds inputs to the statistics of a linear, and returns them."""
        statistics = self._by_name.get(linear.name) or self.kind(linear.in_features, x.device)
        statistics.add(x)
        return statistics

    def _ran(self, linears: Sequence[Linear]) -> None:
        self._run.update(linear.name for linear in linears)
        self.on_inputs(linears)


def stop_when_all_seen(linears: Sequence[Linear]) -> OnInputs:
    """A callback that raises `AllInputsSeen` when all linears have their inputs, in each run of a block."""
    missing = {linear.name for linear in linears}

    def on_inputs(seen: Sequence[Linear]) -> None:
        missing.difference_update(linear.name for linear in seen)
        if not missing:
            missing.update(linear.name for linear in linears)
            raise AllInputsSeen

    return on_inputs


Run = Callable[[], Tensor]
Prune = Callable[[Linear, Statistics | None], None]


def prune_sequentially(
    block: nn.Module, linears: list[Linear], kind: type[Statistics], runs: Sequence[Run], prune: Prune
) -> list[Tensor]:
    """Results of all runs; calls `prune` for each linear when all runs have reached it.

    Errors: TrialError if a linear is never reached, if runs reach linears in different orders, or if the model changes
    a setting of torch around a linear.
    """
    collector = InputCollector(linears, kind, getcurrent().switch)
    before, batches, pruned = thread_state(), [greenlet(run) for run in runs], set[str]()
    for batch in batches:
        batch.gr_context = copy_context()
    with collector.attached(block):
        try:
            while True:
                # Each batch runs to its next linears, or to its end, where the stop is its result.
                stops = list[Any]()
                for batch in batches:
                    stops.append(batch.switch())
                    if thread_state() != before:  # of the thread, not of the greenlet: the other batches share it
                        raise TrialError(
                            "the model changes settings of torch, such as autocast, around a linear, which batches "
                            'that stop there would share; set statistics = "block"'
                        )
                if all(batch.dead for batch in batches):
                    break
                if any(batch.dead or stop != stops[0] for batch, stop in zip(batches, stops, strict=True)):
                    raise TrialError(
                        'batches meet the linears of a block in different orders; set statistics = "block"'
                    )
                for linear in stops[0]:
                    if linear.name not in pruned:
                        prune(linear, collector.of(linear))
                        pruned.add(linear.name)
        finally:
            for batch in batches:  # ends suspended batches after an error
                if batch:
                    batch.throw(GreenletExit)
    collector.result()
    return stops


def thread_state() -> tuple[object, ...]:
    """Settings of torch per thread that a model may change temporarily."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu", *([] if accelerator is None else [accelerator.type])]
    autocast = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return *autocast, *modes, torch.get_default_device()


# --- Timing of phases on asynchronous devices.


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its work; on CUDA that of the current stream.

    So it does not wait for the copy of the next block, which has a stream of its own.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(eq=False)
class Timer:
    """Sums the seconds of named phases; a phase ends with its last kernel on the device."""

    device: torch.device

    def __post_init__(self) -> None:
        self.seconds = dict[str, float]()
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Adds the time since the last lap to a phase."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        wait_for(self.device)
        return perf_counter()


BlockStatistics = Mapping[str, Statistics]


@dataclass(frozen=True)
class PrunedBlock:
    """A pruned block: its tensors by name, zeros per linear, and seconds by phase; of a dense one the tensors alone."""

    index: int
    weights: Tensors
    zeros: dict[str, int] = field(default_factory=dict)
    error: float | None = None  # ‖H - H_dense‖ / ‖H_dense‖ after the block, over the windows of the error curve
    seconds: dict[str, float] = field(default_factory=dict)
    experts_without_tokens: tuple[str, ...] = ()  # pruned by magnitude
    channels: Mapping[str, Tensor] = field(default_factory=dict)  # masks of those that are gone, by their reader
    bits: Mapping[str, int | str] = field(default_factory=dict)  # of each linear, where weights are rounded, or types
    grids: Mapping[str, Grid] = field(default_factory=dict)  # the same, if the pass keeps them


@dataclass
class Pass:
    """The pass over the blocks for one pruner.

    `dense_states` [L]: hidden states [few, tokens, width] after each block of the dense model, for the error curve;
    `in_one_pass`: statistics "sequential"; `after`: the hidden states after the last step.
    """

    replay: Replay
    batch: AutoBatch
    pruner: Pruner
    dense_states: Sequence[Tensor] | None
    dense_statistics: Sequence[BlockStatistics] | None = None
    in_one_pass: bool = False
    channels: ChannelPruner | None = None  # whole channels go, in the place of single weights
    keeps_grids: bool = False
    after: Tensor = field(init=False)

    def run(self, plan: Plan, hidden: Tensor, items: Batch = None) -> Iterator[PrunedBlock]:
        """Prunes block after block; overwrites `hidden` [windows, tokens, width] with the states after each block.

        `hidden` has no windows if neither the pruner nor an error curve needs them. Where a block changes the shape of
        the states, they are a new tensor. `items`: those of `hidden`, needed where a vision tower is pruned too.
        """
        tower = list[Tensors]()
        for index in range(len(self.replay.checkpoint.linears)):
            hidden = entering(self.replay, self.batch, index, hidden, items, tower)
            block = self.step(plan, index, hidden)
            hidden = self.after
            if index < self.replay.in_tower:
                tower.append(block.weights)
            yield block

    def step(self, plan: Plan, index: int, hidden: Tensor) -> PrunedBlock:
        """Prunes block `index`, and runs the hidden states through it."""
        checkpoint, channels = self.replay.checkpoint, self.channels
        linears, timer, weights = checkpoint.linears[index], Timer(checkpoint.device), checkpoint.weights(index)
        levels = plan.of(index, len(linears))
        make = partial(Pruning, linears, weights, self.pruner, levels, self.keeps_grids)
        measured = partial(measure_and_advance, self.replay, self.batch, index, weights, hidden, stops=True)
        kind = (channels or self.pruner).measures
        pruned: PrunedChannels
        if self.in_one_pass and kind is not None:  # never of channels
            pruned = self._prune_sequentially(index, hidden, kind, make, timer)
        else:
            statistics: BlockStatistics = {}
            if channels is not None:
                readers = {each.reader for each in channels.blocks[index].sets}
                statistics = {} if kind is None else measured(kind, [x for x in linears if x.name in readers])[0]
                timer.lap("calibrate")
                shares = tuple(level.amount for level in levels)
                pruned = once_more(partial(channels.prune, index, linears, weights, shares, statistics))
            else:
                if self.dense_statistics is not None:
                    statistics = self.dense_statistics[index]
                elif kind is not None:
                    statistics = measured(kind)[0]
                timer.lap("calibrate")
                pruned = pruning = make()
                for linear in linears:
                    pruning.prune(linear, statistics.get(linear.name))
            del statistics  # they may be larger than the block, which runs now
            timer.lap("prune")
            self.after = advance(self.replay, self.batch, index, pruned.weights, hidden)
        error = None
        if self.dense_states is not None:  # ‖H - D‖ / ‖D‖ (Frobenius norm, float32) over the first windows
            dense = self.dense_states[index].to(self.after.device).float()
            norm = torch.linalg.vector_norm
            error = float(norm(self.after[: len(dense)].float() - dense) / norm(dense))
        zeros = pruned.zeros()
        timer.lap("calibrate")
        lacking = tuple(pruned.experts_without_tokens)
        return PrunedBlock(
            index, pruned.weights, zeros, error, timer.seconds, lacking, pruned.channels, pruned.bits, pruned.grids
        )

    def _prune_sequentially(
        self, index: int, hidden: Tensor, kind: type[Statistics], make: Callable[[], "Pruning"], timer: Timer
    ) -> "Pruning":
        """Measures, prunes and runs the block in one pass over the hidden states."""
        block, linears = self.replay.checkpoint.blocks[index], self.replay.checkpoint.linears[index]

        def step(windows: int) -> Pruning:
            pruning = make()

            def prune(linear: Linear, statistics: Statistics | None) -> None:
                timer.lap("calibrate")
                pruning.prune(linear, statistics)
                timer.lap("prune")

            runs = [partial(self.replay.step, index, rows) for rows in torch.split(hidden, windows)]
            after = self.replay.within(
                index, pruning.weights, lambda: prune_sequentially(block, linears, kind, runs, prune)
            )
            self.after = joined([self.replay.cross(index, rows) for rows in after], hidden)
            return pruning

        return self.batch.run(step)


class Pruning(PrunedChannels):
    """The tensors of a block, whose linears are pruned one by one; the dense weights are not changed."""

    def __init__(
        self, linears: list[Linear], weights: Tensors, pruner: Pruner, levels: tuple[Level, ...], keeps_grids: bool
    ) -> None:
        """`levels`: of each linear; where they have bits, the pruner is a `Treatment`, whose grids are kept if
        `keeps_grids`.
        """
        keys = {linear.key for linear in linears}
        room = {key: torch.empty_like(weights[key], memory_format=torch.contiguous_format) for key in keys}
        super().__init__(weights | room, {})
        self._dense = weights
        self._pruner = pruner
        self._levels = dict(zip((linear.name for linear in linears), levels, strict=True))
        self._keeps_grids = keeps_grids
        self._kept: Tensors = {}
        self._sizes = {linear.name: linear.size for linear in linears}

    def prune(self, linear: Linear, statistics: Statistics | None) -> None:
        """Prunes one linear to its sparsity; an expert without tokens is pruned by magnitude."""
        rule = self._pruner
        if statistics is None and rule.measures is not None:
            rule = unmeasured(rule)
            self.experts_without_tokens.append(linear.name)
        elif (level := self._levels[linear.name]).rows is not None:
            offsets = read_offsets(level.rows, linear.out_features)
            rule = of_rows(rule, torch.from_numpy(zeros_of_rows(linear.in_features, level.sparsity or 0.0, offsets)))
        sparse = once_more(partial(self._pruned, rule, linear, statistics))
        linear.matrix(self.weights[linear.key]).copy_(sparse)
        self._kept[linear.name] = nonzeros(sparse)

    def _pruned(self, rule: Pruner, linear: Linear, statistics: Statistics | None) -> Tensor:
        """Treats a linear's dense weight by the rule."""
        level = self._levels[linear.name]
        pruned = rule.prune(linear.matrix(self._dense[linear.key]), level.sparsity or 0.0, statistics)
        if level.bits is None or not isinstance(rule, Treatment) or rule.quantizer is None:
            return pruned
        self.bits[linear.name] = level.width
        if self._keeps_grids:
            assert isinstance(rule.quantizer, RTN)
            self.grids[linear.name] = rule.quantizer.grid(pruned, int(level.bits))
        return rule.rounded(pruned, level.width, statistics)

    def zeros(self) -> dict[str, int]:
        """Number of zeros in each linear, with a single synchronisation of the device."""
        counts = dict(zip(self._kept, torch.stack(list(self._kept.values())).tolist(), strict=True))
        return {name: size - counts[name] for name, size in self._sizes.items()}


def embed(replay: Replay, batch: AutoBatch, items: Batch, tower: Sequence[Tensors] = ()) -> Tensor:
    """Hidden states [items, positions, width] that enter block 0, computed batch by batch; empty without items.

    `tower`: as for `Replay.embed`. Batches matter here too, since the masks of some families take more memory than all
    else.
    """
    hidden = torch.empty(0, device=replay.checkpoint.device)

    def step(rows: slice) -> None:
        nonlocal hidden
        states = replay.embed(items[rows], tower)
        hidden = hidden if rows.start else states.new_empty(len(items), *states.shape[1:])
        hidden[rows] = states

    batch.over(len(items), step)
    return hidden


def entering(
    replay: Replay, batch: AutoBatch, index: int, hidden: Tensor, items: Batch, tower: Sequence[Tensors]
) -> Tensor:
    """Hidden states that enter block `index`, from those that left the block before.

    They are the same but where a vision tower ends: from there the model's own code leads to the language model, with
    the weights `tower` of the tower's blocks.
    """
    return embed(replay, batch, items, tower) if 0 < index == replay.in_tower else hidden


def advance(replay: Replay, batch: AutoBatch, index: int, weights: Tensors, hidden: Tensor) -> Tensor:
    """Overwrites hidden states [windows, tokens, width] with those after block `index`, batch by batch; returns them.

    Where the block changes their shape, they are a new tensor.
    """
    after = hidden

    def step(rows: slice) -> None:
        nonlocal after
        states = replay.run(index, weights, hidden[rows])
        if not rows.start and states.shape[1:] != hidden.shape[1:]:
            after = states.new_empty(len(hidden), *states.shape[1:])
        after[rows] = states

    batch.over(len(hidden), step)
    return after


def joined(parts: list[Tensor], hidden: Tensor) -> Tensor:
    """The states after a block of all batches, in the place of `hidden` unless their shape is another."""
    return torch.cat(parts, out=hidden) if parts[0].shape[1:] == hidden.shape[1:] else torch.cat(parts)


def measure_and_advance(
    replay: Replay,
    batch: AutoBatch,
    index: int,
    weights: Tensors,
    hidden: Tensor,
    kind: type[Statistics],
    only: list[Linear] | None = None,
    stops: bool = False,
) -> tuple[BlockStatistics, Tensor]:
    """Statistics of the inputs of each linear of block `index`, by name, over all windows, and `advance` in one pass.

    It overwrites hidden [windows, tokens, width]. `only`: these linears, in the place of all; `stops`: the block runs
    until they have their inputs, and the states stay as they are.
    """

    def step(windows: int) -> tuple[BlockStatistics, Tensor]:
        linears, after = replay.checkpoint.linears[index] if only is None else only, list[Tensor]()
        collector = InputCollector(linears, kind, stop_when_all_seen(linears) if stops else lambda seen: None)
        with collector.attached(replay.checkpoint.blocks[index]):
            for rows in torch.split(hidden, windows):
                with suppress(AllInputsSeen):
                    after.append(replay.run(index, weights, rows))
        return collector.result(), hidden if stops else joined(after, hidden)

    return batch.run(step)


def of_rows(pruner: Pruner, zeros: Tensor) -> Pruner:
    """Wanda, by itself or with what follows it, with so many zeros [out] in the rows of one linear."""
    return replace(pruner, pruner=WandaOfRows(zeros)) if isinstance(pruner, Treatment) else WandaOfRows(zeros)


def unmeasured(pruner: Pruner) -> Pruner:
    """The pruner for a linear without inputs: magnitude, with the same group; RTN, where weights are rounded."""
    plain = make_pruner("magnitude", {"group": getattr(pruner, "group", None)})
    if isinstance(pruner, Treatment) and isinstance(rtn := pruner.quantizer, RTN):
        return Treatment(pruner.pruner and plain, quantizer=RTN(rtn.group_size, rtn.symmetric))
    return plain
