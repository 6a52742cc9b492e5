"""The fitness of EvoPress' candidates: KL from the dense model, or NLL, of models that are stitched in memory.

All levels of a linear by Wanda lie in one matrix of places: the weights with place < k are zero. SparseGPT's levels are
made when they are first met. A candidate differs from the parent in a few linears, so only those are made anew; and
candidates go through a block together, those that are the same up to it as one. The dense model's probabilities are
computed once for all candidates of a stage.

    KL(p ‖ q) = Σ_v p_v ln p_v - Σ_v p_v z_v + ln Σ_v exp z_v         p dense, z the candidate's logits; nats per token
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from evopress_search import State, share_of
from torch import Tensor

from atp_tune.blocks.prune_pass import BlockStatistics, advance, embed
from atp_tune.checkpoints.linears import Linear
from atp_tune.pruners import Pruner
from atp_tune.pruners.selection import zeroed
from atp_tune.pruners.wanda import Ranks
from atp_tune.run.session import Session
from atp_tune.scores.losses import rows_at_a_time, token_nlls

Row = tuple[int, ...]  # zeros in each row, one per linear of a block
Ranked = Sequence[Mapping[str, Ranks]]  # of the linears of each block, by name
Level = Callable[[int, Linear, Tensor, int], Tensor]  # by block, linear, weight [out, in], zeros in each row: pruned
KINDS = ("kl", "nll")


def by_wanda(ranked: Ranked) -> Level:
    """Levels by Wanda's scores of the dense model."""

    def level(index: int, linear: Linear, weight: Tensor, zeros: int) -> Tensor:
        return zeroed(weight, ranked[index][linear.name].places < zeros)

    return level


class BySparseGPT:
    """Levels by SparseGPT with statistics of the dense model, each made once; `seconds` that this took, by `now`."""

    def __init__(self, pruner: Pruner, statistics: Sequence[BlockStatistics], now: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._pruner, self._statistics, self._now = pruner, list(statistics), now
        self._known: dict[tuple[int, str, int], Tensor] = {}

    def __call__(self, index: int, linear: Linear, weight: Tensor, zeros: int) -> Tensor:
        """A pruned weight [out, in]; SparseGPT shares out its zeros over the rows of 128 columns."""
        key = index, linear.name, zeros
        if key not in self._known:
            began = self._now()
            share = share_of(zeros, linear.in_features)
            self._known[key] = self._pruner.prune(weight, share, self._statistics[index][linear.name]).contiguous()
            self.seconds += self._now() - began
        return self._known[key]


class Stitched:
    """Blocks of a checkpoint whose linears have so many zeros in each row; only what differs from `keep` is made."""

    def __init__(self, context: Session, level: Level) -> None:
        self._checkpoint = context.checkpoint
        self._level = level
        self._kept: dict[int, tuple[Row, dict[str, Tensor]]] = {}
        self._made: dict[tuple[int, Row], dict[str, Tensor]] = {}

    def keep(self, state: State) -> None:
        """Makes this state the one that others are made from, and forgets the others."""
        self._kept = {index: (row, self.block(index, row)) for index, row in enumerate(state)}
        self._made = {}

    def block(self, index: int, row: Row) -> dict[str, Tensor]:
        """The tensors of a block by name."""
        kept, known = self._kept.get(index, ((), {}))
        if kept == row:
            return known
        if (index, row) not in self._made:
            self._made[index, row] = self._stitch(index, row, kept, known)
        return self._made[index, row]

    def _stitch(self, index: int, row: Row, kept: Row, known: dict[str, Tensor]) -> dict[str, Tensor]:
        linears, dense = self._checkpoint.linears[index], self._checkpoint.weights(index)
        known = known or dense
        changed = [x for place, x in enumerate(linears) if not kept or row[place] != kept[place]]
        fresh = {key: known[key].clone() for key in {linear.key for linear in changed}}
        for linear in changed:
            zeros, weight = row[linears.index(linear)], linear.matrix(dense[linear.key])
            linear.matrix(fresh[linear.key]).copy_(self._level(index, linear, weight, zeros))
        return {**known, **fresh}


class TextFitness:
    """Fitness on windows of a pool of ids [windows, tokens], in nats per token; `kind`: a row of `KINDS`."""

    def __init__(self, context: Session, pool: Tensor, level: Level, kind: str) -> None:
        self.stitched = Stitched(context, level)
        self._level = level
        self._context = context
        self._replay = context.replay
        self._pool = pool
        self._kind = kind
        self._dense = torch.empty(0)  # final hidden states [windows, tokens, width] of the dense model on the pool

    def __call__(self, states: Sequence[State], windows: Sequence[int]) -> list[float]:
        """The mean over windows, for each state."""
        return self._of(states, windows, (self._kind,))[self._kind]

    @property
    def free_seconds(self) -> float:
        """Seconds that levels took which EvoPress has made before its search."""
        return self._level.seconds if isinstance(self._level, BySparseGPT) else 0.0

    def both(self, state: State) -> dict[str, float]:
        """KL and NLL on the whole pool."""
        return {kind: found[0] for kind, found in self._of([state], range(len(self._pool)), KINDS).items()}

    @torch.inference_mode()
    def prepare(self) -> None:
        """Runs the dense model on the pool."""
        if not len(self._dense):
            batch, checkpoint = self._context.batch("calibration"), self._context.checkpoint
            self._dense = embed(self._replay, batch, self._pool)
            for index in range(len(checkpoint.linears)):
                self._dense = advance(self._replay, batch, index, checkpoint.weights(index), self._dense)

    @torch.inference_mode()
    def _of(self, states: Sequence[State], windows: Sequence[int], kinds: Sequence[str]) -> dict[str, list[float]]:
        self.prepare()
        chosen = torch.tensor(list(windows))
        ids, dense = self._pool[chosen], self._dense[chosen]
        finals = self.final_states(states, ids)
        sums = {kind: [0.0] * len(states) for kind in kinds}

        def step(rows: slice) -> None:
            entering, targets = ids[rows, :-1], ids[rows, 1:].flatten()
            of: dict[str, Callable[[Tensor], float]] = {"nll": lambda z: float(token_nlls(z, targets).sum())}
            if "kl" in kinds:
                of["kl"] = partial(divergence, *probabilities(self._replay.logits(entering, dense[rows, :-1])))
            for number, hidden in enumerate(finals):
                logits = self._replay.logits(entering, hidden[rows, :-1]).flatten(0, 1)
                for kind in kinds:
                    sums[kind][number] += of[kind](logits)

        self._context.heads.over(len(ids), step)
        return {kind: [total / ids[:, 1:].numel() for total in totals] for kind, totals in sums.items()}

    def final_states(self, states: Sequence[State], ids: Tensor) -> list[Tensor]:
        """Final hidden states [windows, tokens, width] of each candidate; what they have in common is run once."""
        batch = self._context.batch("calibration")
        tensors, own = [embed(self._replay, batch, ids)], [0] * len(states)  # own: the tensor of each candidate
        for index in range(len(self._context.checkpoint.linears)):
            pairs = [(states[number][index], own[number]) for number in range(len(states))]
            after: dict[tuple[Row, int], Tensor] = {}
            for row in dict.fromkeys(row for row, _ in pairs):
                entering = list(dict.fromkeys(tensor for other, tensor in pairs if other == row))
                hidden = torch.cat([tensors[tensor] for tensor in entering])
                for part in by_powers(hidden, batch.windows):
                    advance(self._replay, batch, index, self.stitched.block(index, row), part)
                for tensor, part in zip(entering, torch.split(hidden, len(ids)), strict=True):
                    after[row, tensor] = part
            places = {pair: place for place, pair in enumerate(after)}
            tensors, own = list(after.values()), [places[pair] for pair in pairs]
        return [tensors[place] for place in own]


def by_powers(hidden: Tensor, most: int) -> Iterator[Tensor]:
    """Parts of hidden states, of 2ⁿ windows each: the replay knows the arguments of a few batch sizes only."""
    while len(hidden):
        size = min(most, 1 << (len(hidden).bit_length() - 1))
        yield hidden[:size]
        hidden = hidden[size:]


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities p [tokens, vocabulary], float32, of logits [windows, tokens, vocabulary], and Σ p ln p [tokens]."""
    logs = logits.flatten(0, 1).float().log_softmax(1)
    p = logs.exp()
    return p, (p * logs).sum(1)


def divergence(p: Tensor, information: Tensor, logits: Tensor) -> float:
    """The sum over tokens of KL(p ‖ q) in nats, q by logits z [tokens, vocabulary]; `information`: Σ p ln p."""
    rows = rows_at_a_time(logits) or len(logits)
    total = float(information.sum(dtype=torch.float64))
    for one, part in zip(torch.split(p, rows), torch.split(logits, rows), strict=True):
        z = part.float()
        total += float((z.logsumexp(1) - (one * z).sum(1)).sum(dtype=torch.float64))
    return total
