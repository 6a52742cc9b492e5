"""The context of trials: what a process loads once, and every trial uses.

Dense checkpoint, the three texts as token windows, and what is measured on the dense model alone: the hidden states
of the error curve and, where a study asks for them, the statistics of all inputs.

Windows are evaluated in the same batches whether or not a stopper looks at each group of them, and trials come to the
same bits with and without one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from atp_tune.allocations import Budget
from atp_tune.blocks.batching import BatchSize
from atp_tune.blocks.dense_metrics import Cache, DenseMetrics
from atp_tune.blocks.prune_pass import BlockStatistics, Pass, PrunedBlock, advance, embed, measure_and_advance
from atp_tune.blocks.ranking import Ranked, can_rank
from atp_tune.blocks.replay import Replay
from atp_tune.blocks.statistics_cache import CachedStatistics, is_room, save_all
from atp_tune.blocks.verification import check_length, verified
from atp_tune.cache import cache_dir, sha256_of_json
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.classes import check_known
from atp_tune.checkpoints.devices import find_device, find_dtype, free_memory, reuse_freed_memory
from atp_tune.checkpoints.linears import Linear
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.errors import UserError
from atp_tune.events import Note, Step, Watch, unwatched
from atp_tune.metrics.bos import BosEffect
from atp_tune.plan import Plan
from atp_tune.pruners import Pruner, Statistics, make_pruner
from atp_tune.pruners.statistics import Hessian
from atp_tune.scores.evaluation import POSITIONS, Block, WindowScores, final_states, group_scores
from atp_tune.search.bos import check_embedding, compare
from atp_tune.spec.facts import BOS
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import ModelConfig, Text
from atp_tune.storage.process_identity import versions
from atp_tune.texts.windows import Windows, check_disjoint, stretches, thinned, token_windows

CURVE_TOKENS = 4096  # of the calibration text, for the error curve
GROUPS = 8  # of search windows, between which a stopper may end a trial
HEAD_BYTES = 12  # per logit: bf16 or float32 logits, their float32 copy and its log-softmax


@dataclass(frozen=True)
class ContextConfig:
    """What a context is made of: model, settings of the pruners, texts by role, and where relative paths start.

    `batches`: see `TrialContext.begin`; none where nothing was measured before. `draws`: of the calibration text.
    `bos`: windows begin with BOS; None where the dense model is to be asked, on the calibration text.
    """

    model: ModelConfig
    prune: PruneConfig
    texts: dict[str, Text]
    base: Path
    device: str
    batches: Mapping[str, int] = field(default_factory=dict)
    draws: int = 1
    bos: bool | None = False


class TrialContext:
    """A dense checkpoint and its texts, ready to prune and measure any plan.

    As a context manager it lets go of all that at the end: `with TrialContext.open(setup) as context`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        checkpoint: Checkpoint,
        windows: dict[str, Windows],
        prune: PruneConfig,
        watch: Watch,
        replay: Replay | None = None,
    ) -> None:
        """`replay`: of this checkpoint, where it is verified already: that takes all weights through the device."""
        self.folder = folder
        self.checkpoint = checkpoint
        self.windows = windows
        self.prune_settings = prune
        self.bos_effect: BosEffect | None = None  # what spoke for or against BOS, where it was measured
        self.watch = watch
        self.replay = replay or verified(checkpoint)
        self._ids = {role: torch.from_numpy(w.ids).to(checkpoint.device) for role, w in windows.items()}
        tokens = max(ids.shape[1] for ids in self._ids.values())
        self._batches = {
            role: self._batch_size(ids.shape[1], self._bytes_per_token()) for role, ids in self._ids.items()
        }
        vocabulary = int(checkpoint.config.get_text_config().vocab_size)
        self._heads = self._batch_size(min(tokens, POSITIONS), HEAD_BYTES * vocabulary)
        self._statistics: dict[str, Sequence[BlockStatistics]] = {}
        self._ranked: dict[str, Ranked] = {}
        self._evidence: Cache = {}
        self._finals: dict[str, list[Tensor]] = {}
        self._follows = True  # the error of the hidden states through all blocks, also where nothing else asks for them
        self._draws: list[Windows] = []  # of the calibration text, after the first

    @classmethod
    def open(cls, setup: ContextConfig, watch: Watch = unwatched) -> "TrialContext":
        """Resolves the model and the texts and loads them; UserError for what cannot be had."""
        device = find_device(setup.device)
        if device.type == "cpu":
            reuse_freed_memory()
        folder = resolve(setup.model, setup.base, lambda text: watch(Note(text)))
        windows = _all_windows(setup, folder, bool(setup.bos))
        dtype, named = find_dtype(setup.model.dtype, device), setup.model.residency
        residency = None if named == "auto" else named
        checkpoint = Checkpoint.load(folder.path, dtype, device, folder.trusted, residency)
        if checkpoint.residency != "device":
            place = "in host memory" if checkpoint.residency == "host" else "on disk"
            watch(Note(f"blocks are kept {place} and copied to the device one by one"))
        context = cls(folder, checkpoint, windows, setup.prune, watch)
        check_embedding(context)
        for role, found in windows.items():
            check_known(checkpoint.model, int(found.ids.max()), f"texts.{role}")
            check_length(context.replay, context._ids[role], f"texts.{role}")
        context = context._asked(setup) if setup.bos is None else context
        context.begin(setup.batches)
        if setup.draws > 1:
            context._draws = _draws(setup.texts["calibration"], setup.draws, folder, setup.base, context.bos)
            for drawn in context._draws:
                check_disjoint({**context.windows, "calibration": drawn})
        return context

    def __enter__(self) -> "TrialContext":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of what was measured and of the checkpoint, so that what comes next finds the device as this did."""
        for kept in (self._ids, self._statistics, self._ranked, self._evidence, self._finals):
            kept.clear()
        vars(self).pop("_dense_states", None)
        self.checkpoint.release()

    def _asked(self, setup: ContextConfig) -> "TrialContext":
        """The context with BOS or without, as the dense model is better; there may be no BOS to ask for."""
        self.bos_effect = compare(self, setup.texts["calibration"], setup.base)
        if self.bos_effect is not None:
            self.watch(Note(f"texts.bos: {self.bos_effect}"))
        if self.bos_effect is None or not self.bos_effect.taken:
            return self
        windows = _all_windows(setup, self.folder, bos=True)
        other = TrialContext(self.folder, self.checkpoint, windows, self.prune_settings, self.watch, self.replay)
        other.bos_effect = self.bos_effect
        return other

    def screening(self, every: int) -> "TrialContext":
        """The same context with dense statistics, every so many-th window of the search text, and no error curve.

        Model, statistics and evidence are shared.
        """
        other = copy(self)
        other.prune_settings = self.prune_settings.model_copy(update={"statistics": "dense"})
        other.windows = {**self.windows, "search": thinned(self.windows["search"], every)}
        other._ids = {**self._ids, "search": self._ids["search"][::every]}
        other._finals = {}
        other._follows = False
        return other

    def drawn(self, index: int) -> "TrialContext":
        """The same with another draw of the calibration text, 1 being the one after its own, and no error curve.

        What is measured on the dense model is measured anew.
        """
        other, drawn = copy(self), self._draws[index - 1]
        other.windows = {**self.windows, "calibration": drawn}
        other._ids = {**self._ids, "calibration": torch.from_numpy(drawn.ids).to(self.checkpoint.device)}
        other._statistics, other._ranked, other._evidence = {}, {}, {}
        other._follows = False
        return other

    @property
    def batches(self) -> dict[str, int]:
        """How many windows of each text go through a block at a time, and how many through the head (`heads`).

        No more than the text has: larger sizes come to the same bits.
        """
        texts = {role: min(batch.windows, len(self._ids[role])) for role, batch in self._batches.items()}
        return {**texts, "heads": self._heads.windows}

    def begin(self, batches: Mapping[str, int]) -> None:
        """Begins a trial in batches of these sizes, as `batches` gives them; what they do not name is left as it is."""
        for name, batch in {**self._batches, "heads": self._heads}.items():
            batch.begin(batches.get(name, batch.windows))

    @property
    def bos(self) -> bool:
        """Whether its windows begin with BOS."""
        return any(windows.bos for windows in self.windows.values())

    @property
    def dtype(self) -> str:
        """Name of the number format in which all is computed."""
        return str(self.checkpoint.dtype).removeprefix("torch.")

    def batch(self, role: str) -> BatchSize:
        """How many windows of a text go through a block at a time.

        Each text has its own, so that the masks depend on the calibration text alone: `apply` and `evaluate` load
        other texts beside it than a trial does, and must come to the same weights.
        """
        return self._batches[role]

    @property
    def heads(self) -> BatchSize:
        """How many windows go through the head at a time."""
        return self._heads

    def budget(self, target: float) -> Budget:
        """What an allocation shares out over this checkpoint; what it asks for is measured once for all budgets."""
        norms, step = partial(self._dense_statistics, make_pruner("wanda")), partial(self._step, "measure")
        evidence = DenseMetrics(self.checkpoint, norms, self._evidence, step)  # not kept here: it holds this context
        return Budget(target, self.checkpoint.sizes, self.checkpoint.shapes, evidence)

    def contents(self) -> dict[str, str | bool]:
        """What decides a value beside the study file: SHA-256 of model and windows, the number format, and BOS."""
        texts = {f"texts.{role}.content": windows.content for role, windows in self.windows.items()}
        return {"model.content": self.folder.content, "model.dtype": self.dtype, BOS: self.bos, **texts}

    @torch.inference_mode()
    def prune(self, plan: Plan) -> Iterator[PrunedBlock]:
        """Prunes block after block as the plan says; the dense checkpoint stays as it is."""
        pruner = make_pruner(plan.pruner, self.prune_settings.settings(plan.pruner))
        way = self.prune_settings.statistics
        dense = self._ready_statistics(pruner) if pruner.measures and way == "dense" else None
        states = self._dense_states if self._follows else None
        work = Pass(self.replay, self.batch("calibration"), pruner, states, dense, in_one_pass=way == "sequential")
        calibration = self._ids["calibration"]
        measured = len(calibration) if dense is None and pruner.measures else 0
        follow = calibration[: max(measured, self._curve_windows if self._follows else 0)]
        for block in work.run(plan, embed(self.replay, self.batch("calibration"), follow)):
            self._step("prune", block.index + 1)
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
        parts = self._parts(role)
        dense = self._final_states(role) if kl else []
        for scores in self._scores(self.batch(role), blocks, parts, dense, one_by_one):
            self.folder.check_unchanged()
            yield scores

    def _parts(self, role: str) -> Sequence[Tensor]:
        """The windows of a text in parts that are no smaller than a batch."""
        ids = self._ids[role]
        return ids.tensor_split(min(GROUPS, -(-len(ids) // self.batch(role).windows)))

    def _scores(
        self,
        batch: BatchSize,
        blocks: Iterable[Block],
        parts: Sequence[Tensor],
        dense: Sequence[Tensor],
        one_by_one: bool,
    ) -> Iterator[WindowScores]:
        if not one_by_one or not self._can_keep():
            yield from group_scores(self.replay, batch, self._heads, self._counted(blocks), parts, dense)
            return
        kept = list(blocks)
        for index, part in enumerate(parts):
            own = dense[index : index + 1]
            yield from group_scores(self.replay, batch, self._heads, self._counted(kept), [part], own)

    def _final_states(self, role: str) -> Sequence[Tensor]:
        """Hidden states [windows, tokens, width] that leave the dense model, in host memory, for each part of a text.

        They are computed once, in the batches of a trial: the dense model is at a distance of 0 from itself.
        """
        parts = self._parts(role)
        if role not in self._finals:
            found = final_states(self.replay, self.batch(role), self._counted(self.dense()), parts)
            self._finals[role] = [hidden.cpu() for hidden in found]
        known = self._finals[role]
        if [len(hidden) for hidden in known] == [len(ids) for ids in parts]:
            return known
        return torch.split(torch.cat(known), [len(ids) for ids in parts])  # memory ran out: batches are smaller now

    def all_scores(self, blocks: Iterable[Block], role: str, kl: bool = False) -> WindowScores:
        """Scores of all windows of one text of a model given as blocks."""
        found = list(self.scores(blocks, role, kl=kl))
        return WindowScores(*(list(chain.from_iterable(lists)) for lists in zip(*found, strict=True)))

    def all_nlls(self, blocks: Iterable[Block], role: str) -> list[float]:
        """Window NLLs of one text of a model given as blocks."""
        return self.all_scores(blocks, role).nlls

    def dense(self) -> Iterator[Block]:
        """The dense model as blocks."""
        return ((index, self.checkpoint.weights(index)) for index in range(len(self.checkpoint.blocks)))

    @cached_property
    def _curve_windows(self) -> int:
        windows, tokens = self._ids["calibration"].shape
        return int(min(windows, max(1, CURVE_TOKENS // tokens)))

    @cached_property
    def _dense_states(self) -> list[Tensor]:
        """Hidden states [few, tokens, width] after each dense block, in host memory."""
        batch = self.batch("calibration")
        hidden = embed(self.replay, batch, self._ids["calibration"][: self._curve_windows])
        states = []
        for index, weights in self.dense():
            advance(self.replay, batch, index, weights, hidden)
            states.append(hidden.cpu().clone())
        return states

    def _dense_statistics(self, pruner: Pruner) -> Sequence[BlockStatistics]:
        """Statistics of every linear's inputs in the dense model, measured once for each kind, and kept on the disk."""
        kind = pruner.measures
        assert kind is not None
        key = self._key_of(pruner, kind)
        if key not in self._statistics:
            self._statistics[key] = self._kept(cache_dir("statistics") / key, pruner, kind)
        return self._statistics[key]

    def _ready_statistics(self, pruner: Pruner) -> Sequence[BlockStatistics]:
        """The same in the form in which a trial takes least time."""
        found, kind = self._dense_statistics(pruner), pruner.measures
        assert kind is not None
        key = self._key_of(pruner, kind)
        if key not in self._ranked and can_rank(pruner, self.checkpoint):
            self._ranked[key] = Ranked(found, self.checkpoint)
        return self._ranked.get(key, found)

    def _key_of(self, pruner: Pruner, kind: type[Statistics]) -> str:
        contents = {name: value for name, value in self.contents().items() if not name.startswith("texts.")}
        text, prepared = self.windows["calibration"].content, kind is Hessian and repr(pruner)
        device, batch = self.checkpoint.device.type, self.batches["calibration"]
        return sha256_of_json([contents, text, kind.__name__, prepared, device, batch, versions()])

    def _kept(self, folder: Path, pruner: Pruner, kind: type[Statistics]) -> Sequence[BlockStatistics]:
        if not folder.is_dir():
            needed = sum(kind.bytes_for(x.in_features) for linears in self.checkpoint.linears for x in linears)
            if not is_room(folder.parent, needed):
                return list(self._measured(pruner, kind))
            try:
                save_all(folder, self._measured(pruner, kind))
            except OSError as error:
                self.watch(Note(f"cache folder {folder.parent}: {error}; dense statistics are kept in memory"))
                return list(self._measured(pruner, kind))
        return CachedStatistics(folder, kind, len(self.checkpoint.blocks), self.checkpoint.device)

    def _measured(self, pruner: Pruner, kind: type[Statistics]) -> Iterator[BlockStatistics]:
        batch = self.batch("calibration")
        hidden = embed(self.replay, batch, self._ids["calibration"])
        for index, weights in self.dense():
            found = measure_and_advance(self.replay, batch, index, weights, hidden, kind)
            for statistics in set(found.values()):
                pruner.prepare(statistics)
            yield found
            self._step("measure", index + 1)

    def _counted(self, blocks: Iterable[Block]) -> Iterator[Block]:
        for index, weights in blocks:
            yield index, weights
            self._step("evaluate", index + 1)

    def _step(self, phase: str, done: int) -> None:
        self.watch(Step(phase, done, len(self.checkpoint.blocks)))

    def _can_keep(self) -> bool:
        needed = sum(self.checkpoint.sizes) * self.checkpoint.dtype.itemsize
        return self.checkpoint.residency == "device" and needed < 0.5 * free_memory(self.checkpoint.device)

    def _batch_size(self, tokens: int, bytes_per_token: int) -> BatchSize:
        watch = self.watch  # alone: with `self` in it the context would hold itself, and its memory outlive it
        return BatchSize(self.checkpoint.device, tokens, bytes_per_token, lambda text: watch(Note(text)))

    @property
    def sequential_bytes_per_token(self) -> int:
        """Rough size of what a token holds in the middle of a block: input and output of the widest linear, twice."""
        widest = max(max(self._widths(linears).values()) for linears in self.checkpoint.linears)
        return 2 * widest * self.checkpoint.dtype.itemsize

    def _bytes_per_token(self) -> int:
        """Rough size of a block's activations: input and output of every linear that a token meets, twice over."""
        met = max(sum(self._widths(linears).values()) for linears in self.checkpoint.linears)
        return 2 * met * self.checkpoint.dtype.itemsize

    def _widths(self, linears: list[Linear]) -> dict[str, int]:
        """Inputs and outputs of each tensor of linears that a token meets."""
        chosen = int(getattr(self.checkpoint.config.get_text_config(), "num_experts_per_tok", None) or 1)
        return {x.key: (x.in_features + x.out_features) * (1 if x.expert is None else chosen) for x in linears}


def _all_windows(setup: ContextConfig, tokenizer: ModelFolder, bos: bool) -> dict[str, Windows]:
    """The windows of all texts, by role; UserError where two share one."""
    windows = {role: _windows(role, text, tokenizer, setup.base, bos) for role, text in setup.texts.items()}
    check_disjoint(windows)
    return windows


def _windows(role: str, text: Text, tokenizer: ModelFolder, base: Path, bos: bool) -> Windows:
    try:
        return token_windows(text, tokenizer.path, base, trusted=tokenizer.trusted, bos=bos)
    except UserError as error:
        named = str(error) if str(error).startswith(BOS) else f"texts.{role}: {error}"
        raise UserError(named) from None


def _draws(text: Text, count: int, tokenizer: ModelFolder, base: Path, bos: bool) -> list[Windows]:
    """Windows of the draws of a calibration text after the first: of the seeds, or the stretches, that follow."""
    if text.draw == "random":
        others = [text.model_copy(update={"seed": text.seed + index}) for index in range(1, count)]
        return [_windows("calibration", other, tokenizer, base, bos) for other in others]
    assert text.windows is not None
    try:
        whole = text.model_copy(update={"windows": count * text.windows, "every": 1})
        found = _windows("calibration", whole, tokenizer, base, bos)
    except UserError as error:
        reason = str(error).removeprefix("texts.calibration: ")
        raise UserError(
            f"texts.calibration.draws: {count} draws of {text.windows} windows follow each other in a text; {reason}, "
            'or draws, or set draw = "random"'
        ) from None
    return [thinned(stretch, text.every) for stretch in stretches(found, count)[1:]]
