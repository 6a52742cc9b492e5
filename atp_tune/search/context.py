"""The context of trials: what a process loads once, and every trial uses.

Dense checkpoint, the items of each role (windows of the three texts), and what is measured on the dense model alone.

Items are evaluated in the same batches whether or not a stopper looks at each group of them, and trials come to the
same bits with and without one.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from atp_tune.allocations import Budget
from atp_tune.blocks.batching import AutoBatch, block_bytes
from atp_tune.blocks.prune_pass import Pass, PrunedBlock, embed
from atp_tune.blocks.replay import Replay
from atp_tune.blocks.verification import verified
from atp_tune.checkpoints.checkpoint import Checkpoint, Released
from atp_tune.checkpoints.devices import find_device, find_dtype, reuse_freed_memory
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.events import EventHandler, Message, Step, ignore_events
from atp_tune.inputs import KINDS, Batch, Items
from atp_tune.metrics.bos import BosEffect
from atp_tune.plan import Plan
from atp_tune.pruners import make_pruner
from atp_tune.scores import SCORES, WindowScores, joined
from atp_tune.scores.bos import compare_bos
from atp_tune.scores.evaluation import Block, head_scores
from atp_tune.search.dense_model import DenseMeasurements, dense_blocks
from atp_tune.search.scoring import RoleScorer
from atp_tune.spec.facts import BOS
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import ModelConfig, Study, Text


@dataclass(frozen=True)
class ContextConfig:
    """What a context is made of: model, settings of the pruners, texts by role, and where relative paths start.

    `batches`: see `TrialContext.begin`; none where nothing was measured before. `draws`: of the calibration text.
    `bos`: windows begin with BOS; None where the dense model is to be asked, on the calibration text. `inputs` and
    `score` name a kind of input and what is scored (`inputs.KINDS`, `scores.SCORES`).
    """

    model: ModelConfig
    prune: PruneConfig
    texts: dict[str, Text]
    base: Path
    device: str
    batches: Mapping[str, int] = field(default_factory=dict)
    draws: int = 1
    bos: bool | None = False
    inputs: str = "tokens"
    score: str = "next-token"

    @classmethod
    def of_study(cls, study: Study, base: Path, bos: bool | None) -> "ContextConfig":
        """What a study's trials want: the test text only where it is not the validation text."""
        texts = {"calibration": study.texts.calibration, "validation": study.texts.validation}
        if study.texts.test is not None:
            texts["test"] = study.texts.test
        return cls(study.model, study.prune, texts, base, study.device, draws=study.texts.calibration.draws, bos=bos)


class TrialContext(Released):
    """A dense checkpoint and the items of each role, ready to prune and measure any plan.

    As a context manager it frees all that at the end: `with TrialContext.open(setup) as context`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        checkpoint: Checkpoint,
        windows: Mapping[str, Items],
        prune: PruneConfig,
        watch: EventHandler,
        replay: Replay | None = None,
        inputs: str = "tokens",
        score: str = "next-token",
    ) -> None:
        """`replay`: of this checkpoint, where it is verified already: that takes all weights through the device."""
        self.folder = folder
        self.checkpoint = checkpoint
        self.windows = windows
        self.prune_settings = prune
        self.bos_effect: BosEffect | None = None  # what spoke for or against BOS, where it was measured
        self.watch = watch
        self.inputs, self.score = KINDS[inputs], SCORES[score]
        self.replay = replay or verified(checkpoint, self.inputs, self.score)
        items: dict[str, Batch] = {role: each.batch(checkpoint.device) for role, each in windows.items()}
        positions = {role: each.positions for role, each in windows.items()}
        batches = {role: self._auto_batch(length, block_bytes(checkpoint)) for role, length in positions.items()}
        self.heads = self._auto_batch(*self.score.head_cost(checkpoint, max(positions.values())))
        self._roles = {role: self._scorer(items[role], batch) for role, batch in batches.items()}
        self._has_error_curve = True  # of the hidden states, also where nothing else takes them through the blocks
        self._draws: list[Items] = []  # of the calibration text, after the first

    @classmethod
    def open(cls, setup: ContextConfig, watch: EventHandler = ignore_events) -> "TrialContext":
        """Resolves the model and the texts and loads them; UserError for what cannot be loaded."""
        device, inputs = find_device(setup.device), KINDS[setup.inputs]
        if device.type == "cpu":
            reuse_freed_memory()
        folder = resolve(setup.model, setup.base, lambda text: watch(Message(text)))
        windows = inputs.read(setup.texts, folder, setup.base, bool(setup.bos))
        checkpoint = _load_checkpoint(setup.model, folder, device, watch)
        context = cls(folder, checkpoint, windows, setup.prune, watch, None, setup.inputs, setup.score)
        inputs.check_fit(checkpoint, windows, context.replay.embed)
        context = context._with_bos_if_better(setup) if setup.bos is None else context
        context.begin(setup.batches)
        if setup.draws > 1:
            text = setup.texts["calibration"]
            context._draws = inputs.draws(text, setup.draws, folder, setup.base, context.bos)
            for drawn in context._draws:
                inputs.check_disjoint({**context.windows, "calibration": drawn})
        return context

    def release(self) -> None:
        """Frees what was measured and the checkpoint, so that what comes next finds the device as this did."""
        self._roles.clear()
        if "measured" in vars(self):
            self.measured.clear()
        self.checkpoint.release()

    def _with_bos_if_better(self, setup: ContextConfig) -> "TrialContext":
        """The context with BOS or without, as the dense model is better; there may be no BOS to ask for."""
        text, batch = setup.texts["calibration"], self.batch("calibration")
        effect = compare_bos(self.replay, batch, self.heads, self.dense(), self.folder, text, setup.base)
        self.bos_effect = effect
        if effect is not None:
            self.watch(Message(f"texts.bos: {effect}"))
        if effect is None or not effect.taken:
            return self
        windows = self.inputs.read(setup.texts, self.folder, setup.base, True)
        other = TrialContext(
            self.folder,
            self.checkpoint,
            windows,
            self.prune_settings,
            self.watch,
            self.replay,
            setup.inputs,
            setup.score,
        )
        other.bos_effect = effect
        return other

    def screening(self, every: int) -> "TrialContext":
        """The same context with dense statistics, every so many-th window of the validation text, and no error curve.

        ModelConfig, statistics and evidence are shared.
        """
        other = self._with("validation", self.windows["validation"].thinned(every))
        vars(other)["measured"] = self.measured
        other.prune_settings = self.prune_settings.model_copy(update={"statistics": "dense"})
        return other

    def drawn(self, index: int) -> "TrialContext":
        """The same with another draw of the calibration text, 1 being the one after its own, and no error curve.

        What is measured on the dense model is measured anew.
        """
        return self._with("calibration", self._draws[index - 1])

    def _with(self, role: str, items: Items) -> "TrialContext":
        """A copy with other items of one role, no measurements of the dense model and no error curve."""
        other = copy(self)
        other.windows = {**self.windows, role: items}
        other._roles = {**self._roles, role: self._scorer(items.batch(self.checkpoint.device), self.batch(role))}
        other._has_error_curve = False
        vars(other).pop("measured", None)
        return other

    @property
    def batches(self) -> dict[str, int]:
        """How many windows of each text go through a block at a time, and how many through the head (`heads`).

        No more than the text has: larger sizes come to the same bits.
        """
        texts = {role: min(each.batch.windows, len(self.windows[role])) for role, each in self._roles.items()}
        return {**texts, "heads": self.heads.windows}

    def begin(self, batches: Mapping[str, int]) -> None:
        """Begins a trial in batches of these sizes, as `batches` gives them; what they do not name is left as it is."""
        for name, batch in [*((role, each.batch) for role, each in self._roles.items()), ("heads", self.heads)]:
            batch.begin(batches.get(name, batch.windows))

    @property
    def bos(self) -> bool:
        """Whether its windows begin with BOS."""
        return self.inputs.facts(self.windows).get(BOS, False)

    @property
    def dtype(self) -> str:
        """Name of the number format in which all is computed."""
        return str(self.checkpoint.dtype).removeprefix("torch.")

    def batch(self, role: str) -> AutoBatch:
        """How many windows of a text go through a block at a time.

        Each text has its own, so that the masks depend on the calibration text alone: `apply` and `evaluate` load
        other texts beside it than a trial does, and must come to the same weights.
        """
        return self._roles[role].batch

    def items(self, role: str) -> Batch:
        """All windows of a text on the compute device."""
        return self._roles[role].items

    @cached_property
    def measured(self) -> DenseMeasurements:
        """What is measured on the dense model with the calibration text."""
        items, batch = self.windows["calibration"], self.batch("calibration")
        return DenseMeasurements(self.replay, items, self.items("calibration"), batch, self.folder.content, self.watch)

    def budget(self, target: float) -> Budget:
        """What an allocation shares out over this checkpoint; what it asks for is measured once for all budgets."""
        evidence = self.measured.evidence()  # not kept here: it holds what was measured
        return Budget(target, self.checkpoint.sizes, self.checkpoint.shapes, evidence)

    def contents(self) -> dict[str, str | bool]:
        """What decides a value beside the study file: SHA-256 of model and windows, the number format, and BOS."""
        texts = {f"texts.{role}.content": items.content for role, items in self.windows.items()}
        facts = self.inputs.facts(self.windows)
        return {"model.content": self.folder.content, "model.dtype": self.dtype, **facts, **texts}

    @torch.inference_mode()
    def prune(self, plan: Plan) -> Iterator[PrunedBlock]:
        """Prunes block after block as the plan says; the dense checkpoint stays as it is."""
        pruner, batch = make_pruner(plan.pruner, self.prune_settings.settings(plan.pruner)), self.batch("calibration")
        way = self.prune_settings.statistics
        dense = self.measured.fast_statistics(pruner) if pruner.measures and way == "dense" else None
        states = self.measured.states if self._has_error_curve else None
        work = Pass(self.replay, batch, pruner, states, dense, in_one_pass=way == "sequential")
        calibration = self.items("calibration")
        measured = len(calibration) if dense is None and pruner.measures else 0
        followed = max(measured, self.measured.curve_windows if self._has_error_curve else 0)
        for block in work.run(plan, embed(self.replay, batch, calibration[:followed])):
            self.watch(Step("prune", block.index + 1, len(self.checkpoint.blocks)))
            yield block

    @torch.inference_mode()
    def scores(
        self, blocks: Iterable[Block], role: str, one_by_one: bool = False, kl: bool = False
    ) -> Iterator[WindowScores]:
        """Scores of the windows of one text, part by part, of a model given as blocks; at most `GROUPS` parts.

        `one_by_one`: a part is computed when it is asked for, if the blocks fit into memory meanwhile. `kl`: the dense
        model is compared with. UserError if the model's files were changed meanwhile: weights that are memory-mapped
        change with them.
        """
        for scores in self._roles[role].scores(blocks, one_by_one, kl):
            self.folder.check_unchanged()
            yield scores

    def all_scores(self, blocks: Iterable[Block], role: str, kl: bool = False) -> WindowScores:
        """Scores of all windows of one text of a model given as blocks."""
        return joined(list(self.scores(blocks, role, kl=kl)))

    def all_nlls(self, blocks: Iterable[Block], role: str) -> list[float]:
        """Window NLLs of one text of a model given as blocks."""
        return self.all_scores(blocks, role).nlls

    def head_scores(self, items: Batch, hidden: Tensor, dense: Tensor | None = None) -> WindowScores:
        """Scores of items from their final hidden states, and from those of the dense model, if it is compared with."""
        return head_scores(self.replay, self.score, self.heads, items, hidden, dense)

    def dense(self) -> Iterator[Block]:
        """The dense model as blocks."""
        return dense_blocks(self.checkpoint)

    def _scorer(self, items: Batch, batch: AutoBatch) -> RoleScorer:
        return RoleScorer(self.replay, self.score, items, batch, self.heads, self.watch)

    def _auto_batch(self, positions: int, bytes_per_position: int) -> AutoBatch:
        watch = self.watch  # alone: with `self` in it the context would hold itself, and its memory outlive it
        return AutoBatch(self.checkpoint.device, positions, bytes_per_position, lambda text: watch(Message(text)))


def _load_checkpoint(model: ModelConfig, folder: ModelFolder, device: torch.device, watch: EventHandler) -> Checkpoint:
    dtype, offload = find_dtype(model.dtype, device), None if model.offload == "auto" else model.offload
    checkpoint = Checkpoint.load(folder.path, dtype, device, folder.trusted, offload)
    if checkpoint.offload != "none":
        place = "in host memory" if checkpoint.offload == "cpu" else "on disk"
        watch(Message(f"blocks are kept {place} and copied to the device one by one"))
    return checkpoint
