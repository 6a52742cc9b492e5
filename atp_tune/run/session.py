"""A session: a dense checkpoint and windows of texts, loaded once, which prunes and measures any plan.

Windows are evaluated in the same batches with and without a stopper, so trials have the same values to the last bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atp_tune.allocations import Budget
from atp_tune.allocations.bits import Size
from atp_tune.allocations.budget import Costs, ranked_by
from atp_tune.allocations.channels import BlockChannels
from atp_tune.allocations.rows import RowSparsities
from atp_tune.allocations.types import BLOCKS, fitting
from atp_tune.blocks.channels import ChannelPruner, find_channels, too_sparse
from atp_tune.blocks.prune_pass import Pass, PrunedBlock, embed
from atp_tune.blocks.replay import AutoBatch, Replay, block_bytes
from atp_tune.blocks.verification import check_batch, verified, verified_with_tower
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint, Released
from atp_tune.checkpoints.convert import check_gguf
from atp_tune.checkpoints.devices import find_device, oom_as_user_error, other_products, reuse_freed_memory
from atp_tune.checkpoints.models import Ask, ModelFolder, resolve
from atp_tune.config.best import Config
from atp_tune.config.data import CLASSES, IMAGES, Text
from atp_tune.config.plugged import plug_in_config
from atp_tune.config.prune import Pattern, PruneConfig, QuantizeConfig, Treatments, bits_of_size, parse
from atp_tune.config.study import Data, ModelConfig, Study
from atp_tune.errors import UserError
from atp_tune.events import Event, EventHandler, Message, Place, Step, TrialStarted, ignore_events
from atp_tune.inputs import KINDS, Batch
from atp_tune.inputs.items import Items
from atp_tune.metrics import BosEffect
from atp_tune.plan import Plan
from atp_tune.pruners.ggml import GGML
from atp_tune.pruners.rounding import RTN
from atp_tune.pruners.wanda import Wanda
from atp_tune.run.dense_model import (
    POOL,
    CalibrationGradients,
    DenseMeasurements,
    bit_costs,
    by_pruner,
    by_score,
    dense_blocks,
    dense_final_states,
)
from atp_tune.run.outer import Outer
from atp_tune.scores import SCORES
from atp_tune.scores.next_token import compare_bos
from atp_tune.storage.fingerprint import BOS
from atp_tune.utils.cache import package_version

if TYPE_CHECKING:
    from atp_tune.run.observers import Observer


@dataclass(frozen=True)
class Setup:
    """The contents of a session: model, pruners, texts by role, and the device.

    `batches`: sizes for `Session.begin`. `draws`: of the calibration text, each with a pool of its own if plans are
    found `by_prices`. `bos`: windows begin with BOS; None if the dense model's perplexity on the calibration text
    decides. `score`: a row of `scores.SCORES`. `path`: the targets of a descent by prices, if a study has several.
    `quantize`: weights are rounded; if it `prunes` them first, to `bits` in every block, or within a `size`. `ask`:
    what a command must know before the model is read.
    """

    model: ModelConfig
    prune: PruneConfig
    texts: dict[str, Data]
    place: Place
    batches: Mapping[str, int] = field(default_factory=dict)
    draws: int = 1
    bos: bool | None = False
    score: str = "next-token"
    path: tuple[float, ...] = ()
    quantize: QuantizeConfig | None = None
    prunes: bool = True
    bits: int | None = None
    size: str | None = None
    by_prices: bool = False
    ask: Ask = lambda folder, size: None

    @classmethod
    def of_study(cls, study: Study, base: Path, bos: bool | None, watch: EventHandler = ignore_events) -> "Setup":
        """The setup for a study's trials; relative paths start at `base`."""
        data = study.data
        texts = {"calibration": data.calibration, "validation": data.validation}
        return cls(
            study.model,
            study.prune,
            texts if data.test is None else {**texts, "test": data.test},
            Place(base, study.device, watch=watch),
            draws=data.calibration.draws,
            bos=bos,
            score=study.score,
            path=study.path,
            quantize=study.methods.quantize,
            prunes=not study.by_bits,
            bits=study.fixed_bits,
            size=study.size,
            by_prices=bool(study.allocation.by_prices),
            ask=check_gguf if study.quantize.by_types else cls.ask,
        )

    @classmethod
    def of_config(cls, config: Config, place: Place, **more: Data) -> "Setup":
        """The setup for a configuration's plan, with its plug-ins, for which UserError unless they are allowed.

        `more`: texts beside the one for calibration.
        """
        texts = {"calibration": config.calibration, **more}
        plug_in_config(config, texts, place.base, place.allowed.get("trust_plugins", False))
        return cls(
            config.model.model(place.allowed),
            config.prune,
            texts,
            place,
            batches=config.batches,
            bos=config.bos,
            score=config.score,
            quantize=config.quantize,
            prunes=not config.by_bits,
            bits=config.plan.fixed_bits,
            size=None if config.bits is None else config.bits.size,
        )

    @property
    def inputs(self) -> str:
        """The kind of input that the score is of: a row of `inputs.KINDS`."""
        return IMAGES if self.score == CLASSES else "tokens"


BITS_ALONE = 3.6  # bits a weight, from which zeros beside them lose to bits alone, both trained


class Session(Released):
    """A dense checkpoint and the windows of each text, ready to prune and measure any plan.

    A context manager that frees its memory at the end: `with Session.open(setup) as session`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        checkpoint: Checkpoint,
        windows: Mapping[str, Items],
        setup: Setup,
        replay: Replay | None = None,
    ) -> None:
        """`replay`: the verified replay of this checkpoint, if there is one; verifying copies all weights."""
        self.folder = folder
        self.checkpoint = checkpoint
        self.windows = windows
        self.prune_settings = setup.prune
        self.quantize = setup.quantize
        self.prunes, self.bits, self.size = setup.prunes, setup.bits, setup.size
        self.bos_effect: BosEffect | None = None  # not measured
        self.watch = watch = setup.place.watch
        self.inputs, self.score = KINDS[setup.inputs].of(windows), SCORES[setup.score]
        items = {role: each.batch(checkpoint.device) for role, each in windows.items()}
        if replay is None:  # compared with the model's own forward; UserError that names the first difference
            own = checkpoint, self.inputs, self.score
            replay = verified_with_tower(*own, items) if checkpoint.in_tower else verified(*own)
        self.replay = replay
        size = block_bytes(checkpoint)
        self._roles = {
            role: Role(items[role], AutoBatch(checkpoint.device, each.positions, size, watch))
            for role, each in windows.items()
        }
        longest = max((each.positions for each in windows.values()), default=1)
        positions, size = self.score.head_cost(checkpoint, longest)
        self.heads = AutoBatch(checkpoint.device, positions, size, watch)
        self._has_error_curve = True  # `prune` measures the error of the hidden states
        self._draws: Sequence[
            tuple[Items, Items]
        ] = ()  # of the calibration text: windows, and what plans are fitted to
        self._path = setup.path
        self._batches = setup.batches  # that `compare` begins with
        self._pool: Callable[[], Items] = lambda: windows["calibration"]  # what descents draw from

    @classmethod
    def open(cls, setup: Setup) -> "Session":
        """Loads the model and the texts; UserError if one cannot be loaded."""
        device, base, inputs = find_device(setup.place.device), setup.place.base, KINDS[setup.inputs]
        if device.type == "cpu":
            reuse_freed_memory()
        folder = resolve(setup.model, base, setup.place.note, setup.ask)
        windows = inputs.read(setup.texts, folder, base, bool(setup.bos))
        positions = {role: len(each) * each.positions for role, each in windows.items()}
        largest = max((number for role, number in positions.items() if role != "calibration"), default=0)
        checkpoint = folder.checkpoint(setup.model, device, (positions.get("calibration", 0), largest))
        try:
            return cls._opened(setup, folder, checkpoint, windows)
        except BaseException:
            checkpoint.release()
            raise

    @classmethod
    def _opened(
        cls, setup: Setup, folder: ModelFolder, checkpoint: Checkpoint, windows: Mapping[str, Items]
    ) -> "Session":
        base = setup.place.base
        if checkpoint.offload != "none":
            setup.place.note(
                f"blocks are kept {'in host memory' if checkpoint.offload == 'cpu' else 'on disk'} and copied to the "
                "device one by one"
            )
        # The model can be replayed, and takes the items.
        kind, text = KINDS[setup.inputs], setup.texts.get("calibration")
        session = cls(folder, checkpoint, windows, setup)
        replay = session.replay
        kind.check_fit(checkpoint, windows, replay.embed)
        session._check_format()
        has_images = getattr(text, "images", None) is not None
        if has_images and not checkpoint.in_tower:
            check_batch(replay, windows["calibration"].batch(checkpoint.device), "texts.calibration.images")
        # Windows begin with BOS, or not, whichever gives the dense model the lower perplexity.
        if setup.bos is None:
            assert isinstance(text, Text)
            effect = compare_bos(replay, session.batch("calibration"), session.heads, folder, text, base)
            if effect is not None:
                setup.place.note(f"texts.bos: {effect}")
                if effect.taken:
                    windows = kind.read(setup.texts, folder, base, True)
            session = cls(folder, checkpoint, windows, setup, replay)
            session.bos_effect = effect
        # What steps by prices draw from, and the draws of the calibration text.
        bos = session.bos
        if text is not None:
            session._pool = partial(kind.many, text, POOL, folder, base, bos)
        if setup.draws > 1:
            pairs = kind.draws(text, setup.draws, POOL if setup.by_prices else 0, folder, base, bos)
            session._draws = [(items, pool if setup.by_prices else items) for items, pool in pairs]
            for drawn in chain.from_iterable(pairs):
                kind.check_disjoint({**windows, "calibration": drawn})
        session.begin(setup.batches)
        return session

    def release(self) -> None:
        """Frees the measurements and the checkpoint."""
        self._roles.clear()
        if "measured" in vars(self):
            self.measured.clear()
        self.checkpoint.release()

    def screening(self, every: int) -> "Session":
        """The session for screening: dense statistics, every `every`-th validation window, no error curve.

        Model and dense measurements are shared.
        """
        return self._with(
            "validation",
            self.windows["validation"].thinned(every),
            measured=self.measured,
            prune_settings=self.prune_settings.model_copy(update={"statistics": "dense"}),
        )

    def drawn(self, index: int) -> "Session":
        """The session with another draw of the calibration text (0: its own), without dense measurements."""
        (items, pool), watch = self._draws[index], self.watch

        def hear(event: Event) -> None:
            if not isinstance(event, TrialStarted):
                watch(event)

        return self._with("calibration", items, _pool=lambda: pool, watch=hear)

    @cached_property
    def fitted_to(self) -> tuple[int, int]:
        """Tokens, or images, that plans are fitted to anew in each draw, and those that the study's own are."""
        (items, pool), *_ = self._draws
        size = pool.positions if self.inputs.called == "a text" else 1
        return len(pool) * size, len(items if pool is items else self._pool()) * size

    @property
    def is_short(self) -> bool:
        """Whether draws are fitted to less than the study's own plans, since the calibration text has no room."""
        return len(self._draws) > 1 and len(set(self.fitted_to)) > 1

    def limited(self, most: int) -> "Session":
        """The session with the first test items, at most so many."""
        return self._with("test", self.windows["test"][:most])

    def _with(self, role: str, items: Items, **changed: Any) -> "Session":
        """A copy with other items of one role and these attributes, without dense measurements and error curve."""
        other = copy(self)
        for name in ("measured", "outer"):  # are of the calibration text
            vars(other).pop(name, None)
        roles = {**self._roles, role: Role(items.batch(self.checkpoint.device), self.batch(role))}
        vars(other).update(windows={**self.windows, role: items}, _roles=roles, _has_error_curve=False, **changed)
        return other

    @property
    def batches(self) -> dict[str, int]:
        """Batch sizes in windows: per text for the blocks, and `heads` for the head.

        At most the windows of the text: larger sizes give the same bits.
        """
        texts = {role: min(each.batch.windows, len(self.windows[role])) for role, each in self._roles.items()}
        return {**texts, "heads": self.heads.windows}

    def begin(self, batches: Mapping[str, int]) -> None:
        """Begins a trial with these batch sizes, keyed as in `batches`; sizes without a key stay."""
        for name, batch in [*((role, each.batch) for role, each in self._roles.items()), ("heads", self.heads)]:
            batch.begin(batches.get(name, batch.windows))

    @property
    def bos(self) -> bool:
        """Whether the windows begin with BOS."""
        return self.inputs.facts(self.windows).get(BOS, False)

    @property
    def dtype(self) -> str:
        """Name of the dtype of the computation."""
        return str(self.checkpoint.dtype).removeprefix("torch.")

    def batch(self, role: str) -> AutoBatch:
        """The batch size of a text in the blocks.

        Each text has its own, so that the masks depend on the calibration text alone: `apply` and `evaluate` load
        other texts than a trial and must give the same weights.
        """
        return self._roles[role].batch

    def items(self, role: str) -> Batch:
        """All windows of a text on the compute device."""
        return self._roles[role].items

    @cached_property
    def measured(self) -> DenseMeasurements:
        """Measurements of the dense model on the calibration text."""
        role = "calibration"
        return DenseMeasurements(
            self.replay.dense, self.windows[role], self.items(role), self.batch(role), self.folder.content, self.watch
        )

    @cached_property
    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of all weights in the dense model's files, and of a value of the blocks."""
        return self.folder.stored_bytes()

    @cached_property
    def _size(self) -> Size | None:
        """The size of all linears, if one is given; UserError if even the smallest widths make more.

        A line tells where bits alone were better.
        """
        if self.size is None or self.quantize is None:
            return None
        (dense, itemsize), weights, stored = self.stored_bytes, sum(self.checkpoint.sizes), self.quantize.stored_bits
        others = dense - weights * itemsize
        shapes, fewest = chain.from_iterable(self.checkpoint.shapes), self.quantize.widths[0]
        least = sum(stored(shape.rows, shape.columns, fewest) for shape in shapes)
        most = bits_of_size(self.size, weights, others, dense)
        if most < least:
            ends = f"{math.ceil(100 * least / weights) / 100}bpw or {math.ceil((others + least / 8) / 1e4) / 100}MB"
            raise UserError(f"size: {self.size} is less than {fewest} bits everywhere take, {ends}; give a larger one")
        if most >= BITS_ALONE * weights:
            self.watch(
                Message(
                    f"size: {most / weights:.2f} bits a weight; from {BITS_ALONE} on bits alone were better than zeros "
                    "with bits (docs/bits.md#trained): give `bits` in the place of `size`"
                )
            )
        return Size(most, stored)

    def budget(self, target: float) -> Budget:
        """The budget of this checkpoint at a target sparsity; its dense metrics are measured when needed."""
        settings, sizes, shapes = self.prune_settings, self.checkpoint.sizes, self.checkpoint.shapes
        outer = self.outer.shapes if self.by_types else {}
        evidence = self.measured.evidence(
            self._priced, settings.priced_by, settings.by_rows, self._path, self._width_costs
        )
        if not self.pattern.channels:
            size = self._size
            widths = () if self.quantize is None or (self.prunes and size is None) else self.quantize.widths
            return Budget(target, sizes, shapes, evidence, widths=widths, bits=self.bits, size=size, outer=outer)
        budget = Budget(target, sizes, (), evidence, channels=self.channels)
        if target > budget.highest:
            raise too_sparse(target, self.channels, settings.channels)
        return budget

    def _check_format(self) -> None:
        """UserError if a linear cannot be stored in the format of the settings."""
        own = self.quantize
        if not own or not own.format:
            return
        fits, more = True, ""
        if own.format == "mlx":
            fits, more = own.group_size in (32, 64, 128) and 7 not in own.widths, " of 32, 64 or 128, and not by 7 bits"
        for linear in chain.from_iterable(self.checkpoint.linears):
            if not fits or linear.transposed or linear.expert is not None or linear.in_features % own.group_size:
                raise UserError(
                    f"quantize.format: {own.format} stores an nn.Linear in whole groups of inputs{more}; {linear.name} "
                    f"has {linear.in_features} in groups of {own.group_size}: set quantize.group_size, quantize.widths"
                )

    @property
    def by_types(self) -> bool:
        """Whether weights are rounded to types of ggml, embedding and head too."""
        return self.quantize is not None and self.quantize.by_types

    @cached_property
    @torch.no_grad()
    def outer(self) -> Outer:
        """Embedding and head, with the importance of their columns on the calibration text."""
        outer, items = Outer(self.checkpoint), self.items("calibration")
        [hidden] = dense_final_states(self.replay.dense, self.batch("calibration"), [items], self.watch, "measure")
        outer.measure(self.replay.dense, self.heads, items, hidden)
        return outer

    def of(self, plan: Plan | None) -> "Session":
        """The session for a plan: with its embedding and head, where it has types of those."""
        if plan is None or not plan.outer:
            return self
        replay = self.replay.dense.with_outer(self.outer.at(plan.outer))
        other = copy(self)
        other.replay = replay
        return other

    @property
    def pattern(self) -> Pattern:
        """Where zeros may stand."""
        return parse(self.prune_settings.pattern)

    @property
    def methods(self) -> Treatments:
        """The treatments of weights."""
        return Treatments(self.prune_settings, self.quantize, self.prunes)

    def channel_pruner(self, pruner: str) -> ChannelPruner | None:
        """The pruner of whole channels by a pruner's scores; None for other patterns."""
        if not self.pattern.channels:
            return None
        return ChannelPruner(self.channels, self.prune_settings.channels, pruner == "magnitude")

    @cached_property
    def channels(self) -> tuple[BlockChannels, ...]:
        """The channels of each block that may go; UserError if a block has none."""
        return find_channels(self.replay, self.prune_settings.channels)

    def _priced(self, targets: Sequence[float], pruner: str, rows: bool) -> tuple[RowSparsities, ...]:
        """Ends of descents by prices, measured on windows that no other text shares; `rows`: rows move too."""
        gradients, group = self._gradients(), self.pattern.group
        measured = self.measured.statistics_key(Wanda())
        if self.prune_settings.has_own_prices(pruner):
            own = self.prune_settings.pruner(pruner)
            prepared = self.measured.statistics(own) if own.measures else [{} for _ in self.checkpoint.blocks]
            return by_pruner(gradients, own, prepared).ends(targets, measured)
        statistics = self.measured.fast_statistics(Wanda(group=group))
        loss = self.prune_settings.loss if rows else None
        return by_score(gradients, ranked_by(pruner), statistics, group, loss).ends(targets, measured)

    def _width_costs(self) -> Costs:
        """What it costs to round each linear of the dense model to each width."""
        assert self.quantize is not None
        gradients, own = self._gradients(), self.quantize
        measured = self.measured.statistics_key(Wanda())
        if not self.by_types:
            nearest = RTN(own.group_size, own.symmetric)
            return bit_costs(
                gradients,
                lambda index, linear, weight: [nearest.quantize(weight, bits, None) for bits in own.widths],
                measured,
                [own.group_size, own.symmetric, list(own.widths)],
            )
        quantizer, statistics = GGML(), self.measured.statistics(self.methods.pruner("ggml"))

        def at_types(index: int, linear: Linear, weight: Tensor) -> list[Tensor]:
            inputs = statistics[index].get(linear.name)
            return [quantizer.quantize(weight, name, inputs) for name in fitting(linear.in_features)]

        levels = ["ggml", package_version("llama-cpp-py-sync"), [*BLOCKS]]
        return bit_costs(gradients, at_types, measured, levels, lambda: self.outer.costs(self))

    def _gradients(self) -> CalibrationGradients:
        pool = self._pool()
        self.inputs.check_disjoint({**self.windows, "calibration": pool})
        return CalibrationGradients(self.checkpoint, self.inputs, self.score, pool, self.heads, self.watch)

    def contents(self) -> dict[str, str | bool]:
        """The facts of a value that are not in the study file: SHA-256 of model and windows, number formats, BOS."""
        table = "texts" if self.inputs.called == "a text" else "images"
        texts = {f"{table}.{role}.content": items.content for role, items in self.windows.items()}
        products = " ".join(other_products(self.checkpoint.device))
        return {
            "model.content": self.folder.content,
            "model.dtype": self.dtype,
            **({"model.products": products} if products else {}),
            **self.inputs.facts(self.windows),
            **texts,
        }

    @torch.inference_mode()
    def prune(self, plan: Plan, grids: bool = False) -> Iterator[PrunedBlock]:
        """Prunes the blocks in order by the plan; the dense checkpoint is not changed.

        `grids`: rounded blocks have the scales and zero points of their linears too.
        """
        pruner, batch = self.methods.pruner(plan.method), self.batch("calibration")
        way = self.prune_settings.statistics
        dense = self.measured.fast_statistics(pruner) if pruner.measures and way == "dense" else None
        states = self.measured.states if self._has_error_curve else None
        channels = self.channel_pruner(plan.method)
        work = Pass(self.replay, batch, pruner, states, dense, way == "sequential", channels, grids)
        calibration = self.items("calibration")
        measures = (channels or pruner).measures
        measured = len(calibration) if dense is None and measures else 0
        items = calibration[: max(measured, self.measured.curve_windows if self._has_error_curve else 0)]
        for block in work.run(plan, embed(self.replay, batch, items), items):
            self.watch(Step("prune", block.index + 1, len(self.checkpoint.blocks)))
            yield block

    def dense_states(self, role: str, parts: Sequence[Batch]) -> Sequence[Tensor]:
        """Final hidden states [windows, tokens, width] of the dense model for each part of a role, in host memory.

        Computed once, in the batches of a trial, so that the KL of the dense model from itself is exactly 0.
        """
        own, sizes = self._roles[role], [len(part) for part in parts]
        if not own.dense:
            own.dense = dense_final_states(self.replay.dense, own.batch, parts, self.watch)
        if [len(hidden) for hidden in own.dense] == sizes:
            return own.dense
        return torch.split(torch.cat([*own.dense]), sizes)  # batches became smaller when memory ran out

    def blocks(self, plan: Plan | None) -> Iterator[PrunedBlock]:
        """The blocks of a plan, or of the dense model for None."""
        if plan is not None:
            return self.prune(plan)
        return (PrunedBlock(index, weights) for index, weights in dense_blocks(self.checkpoint))

    def measure(
        self,
        plan: Plan | None,
        observers: Sequence["Observer[Any]"],
        name: str = "",
        blocks: Iterable[PrunedBlock] | None = None,
    ) -> list[Any]:
        """Passes the blocks of a plan, or of the dense model, or other `blocks`, to observers; what each found.

        All see a block before the next one is pruned, so that no more than one pruned block need be held. They end in
        their order; after an error of one those behind it do not.
        """
        own = self.of(plan)
        for observer in observers:
            observer.begin(own, name, plan)
        for block in own.blocks(plan) if blocks is None else blocks:
            for observer in observers:
                observer.block(block)
        for observer in observers:
            observer.found[name] = observer.end()
        return [observer.found[name] for observer in observers]

    def compare(
        self,
        plans: Mapping[str, Plan | None],
        observers: Sequence["Observer[Any]"],
        titles: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        """Measures models one after the other, by name; an equal plan is not measured again. Seconds of each.

        `titles`: by name, for people.
        """
        seconds = dict[str, float]()
        for name, plan in plans.items():
            equal = [other for other in seconds if plan and (earlier := plans[other]) and earlier.does == plan.does]
            if equal:
                seconds[name] = 0.0
                for observer in observers:
                    observer.found[name] = observer.found[equal[0]]
                continue
            title = (titles or {}).get(name, name)
            self.watch(TrialStarted(title, plan))
            self.begin(self._batches)
            began = perf_counter()
            with oom_as_user_error(title):
                self.measure(plan, observers, name)
            seconds[name] = round(perf_counter() - began, 1)
        return seconds


@dataclass
class Role:
    """The items of one role on the compute device, their batch size in blocks, and their final dense states."""

    items: Batch
    batch: AutoBatch
    dense: Sequence[Tensor] = ()
