"""Embedding and head, the matrices outside of the blocks, where weights are rounded to types of ggml.

The cost of a type, in the unit of the prices of linears: the KL from the dense model with the matrix at one type is
measured on the calibration text, and goes to the others by their squared errors, weighted by importance.

    cost = 2 / T · KL(t₀) · e(t) / e(t₀)        e(t) = Σ Δ_ij² importance_j, T predicted tokens of a window

since a price is the mean over windows of the squared slope of a window's mean loss, of which T / 2 is a KL per token.
"""

from collections.abc import Mapping
from contextlib import suppress
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atp_tune.allocations import Shape
from atp_tune.allocations.types import fitting, type_bits
from atp_tune.blocks.replay import AutoBatch, Reached, Replay
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError
from atp_tune.events import TrialStarted
from atp_tune.inputs import Batch
from atp_tune.pruners.ggml import importances, rounded
from atp_tune.pruners.statistics import InputMoments
from atp_tune.run.dense_model import dense_final_states
from atp_tune.scores.next_token import head_scores

if TYPE_CHECKING:
    from atp_tune.run.session import Session

MEASURED = 4.5  # bits of the type whose KL is measured
TOKENS = 8192  # of the calibration text, on which it is


class Outer:
    """The matrices of a checkpoint, by name; one that embeds and predicts is one.

    UserError for a model without them, and for mixtures, whose experts llama.cpp stores in one tensor.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        model: Any = checkpoint.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None or any(linear.expert is not None for row in checkpoint.linears for linear in row):
            why = "has no head" if head is None else "is a mixture, whose experts are one tensor of one type there"
            raise UserError(f'quantize.quantizers: the model {why}; take "gptq" or "rtn"')
        names = {module: name for name, module in model.named_modules()}
        self.modules = {names[embedding]: [embedding]}
        if head.weight is embedding.weight:
            self.modules[names[embedding]].append(head)
        else:
            self.modules[names[head]] = [head]
        self.head = head
        self._importance = torch.empty(0)

    @property
    def weights(self) -> dict[str, Any]:
        """The dense matrices."""
        return {name: modules[0].weight for name, modules in self.modules.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of all."""
        return {name: Shape(len(weight), weight.shape[1], attention=False) for name, weight in self.weights.items()}

    def measure(self, replay: Replay, heads: AutoBatch, items: Batch, hidden: Tensor) -> None:
        """Measures the importance of the head's inputs on items, from their final hidden states in the dense model."""
        device = replay.checkpoint.device
        moments = InputMoments(hidden.shape[-1], device)

        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments.add(args[0])
            raise Reached  # logits are not needed

        def step(rows: slice) -> None:
            with suppress(Reached):
                replay.logits(items[rows], hidden[rows].to(device))

        with self.head.register_forward_pre_hook(see):
            heads.over(len(items), step)
        self._importance = importances(moments)

    def importance(self, name: str) -> Tensor:
        """The importance of the columns of a matrix: that of the head's inputs; 1 of one that embeds alone."""
        return self._importance if self.head in self.modules[name] else torch.ones(self.weights[name].shape[1])

    def at(self, types: Mapping[str, str]) -> dict[nn.Module, Tensor]:
        """The modules of some matrices with their values at types of ggml."""
        values = {name: rounded(self.weights[name], kind, self.importance(name)) for name, kind in types.items()}
        return {module: values[name] for name in types for module in self.modules[name]}

    @torch.no_grad()
    def costs(self, session: "Session") -> list[list[float]]:
        """The cost of each matrix at each type that its rows can have, on the first windows of the calibration text."""
        items, replay = session.items("calibration"), session.replay.dense
        few, heads = items[: max(1, TOKENS // items.shape[1])], session.heads

        def final(replay: Replay) -> Tensor:
            [states] = dense_final_states(replay, session.batch("calibration"), [few], session.watch)
            return states.to(replay.checkpoint.device)

        session.watch(TrialStarted("embedding and head", None))
        dense, rows = final(replay), []
        for name, weight in self.weights.items():
            names = fitting(weight.shape[1])
            first = min(names, key=lambda kind: abs(type_bits(kind) - MEASURED))
            there, importance = replay.with_outer(self.at({name: first})), self.importance(name)
            kl = fmean(head_scores(there, session.score, heads, few, final(there), dense)["kls"])
            errors = dict[str, float]()
            for kind in names:
                squares = (rounded(weight, kind, importance).float() - weight.float()).square().sum(0).cpu()
                errors[kind] = float(squares @ importance)
            rows.append([2 / (items.shape[1] - 1) * kl * errors[kind] / (errors[first] or 1.0) for kind in names])
        return rows
