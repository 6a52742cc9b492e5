"""Scores of next-token predictions: the NLL of each window, and the KL divergence from the dense model.

Logits are computed for a slice of positions at a time.

ids token ids [windows, tokens]; NLL in nats per token, mean over the tokens - 1 predicted positions of a window;
KL(p ‖ q) likewise, p next-token distribution of the dense model and q of this model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from atp_tune.blocks.prune_pass import advance, embed, entering
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.blocks.verification import Difference, ProbeRun, is_equal, is_near
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import Text
from atp_tune.config.prune import NLL_SHARES
from atp_tune.inputs import Batch
from atp_tune.inputs.items import IDS, Items
from atp_tune.inputs.windows import bos_id, first_windows, load_tokenizer, token_windows, vocabulary
from atp_tune.measures import MEASURES
from atp_tune.metrics import BOS_TOKENS, BOS_WINDOWS, BosEffect
from atp_tune.plugins import Checked, guarded
from atp_tune.scores import Score, Scores, joined
from atp_tune.utils.registry import Origin

# --- Losses by logits, and their gradient: NLL of the targets, and KL divergence from the dense model.
#
#     NLL         -ln q_y, q the softmax of the logits and y the target
#     KL(p ‖ q)   Σ p ln(p / q), p the softmax of the dense model's logits
#     loss        share · NLL + (1 - share) · KL(p ‖ q)
#     gradient    q - share · y - (1 - share) · p by the logits, y one-hot
#
# Source of the loss: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, with temperature 1.
#
# Logits [items, classes], of any number format, are converted to float32 a few rows at a time, so that the float32 copy
# stays in the CPU's cache: memory traffic would cost more than the matrix product.

CACHED = 1 << 17  # float32 logits at a time per thread of a CPU (512 KB); other devices take all
COMPARED = 1 << 28  # the same for KL on other devices (1 GB)


def token_nlls(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL [tokens] in float32 of logits z [tokens, vocabulary]: ln Σ exp(z - max z) - (z_target - max z)."""
    rows = rows_at_a_time(logits, len(logits))
    nlls = []
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        z = part.float()
        z = z - z.amax(1, keepdim=True)
        picked = z.gather(1, target[:, None]).squeeze(1)
        nlls.append(z.exp_().sum(1).log_() - picked)
    return torch.cat(nlls)


def token_kls(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) [tokens] in float32, p from dense logits [tokens, vocabulary], q from `logits`; never negative."""
    rows = rows_at_a_time(logits, COMPARED // logits.shape[1])
    kls = []
    for one, other in zip(torch.split(dense, rows), torch.split(logits, rows), strict=True):
        p, q = one.float().log_softmax(1), other.float().log_softmax(1)
        kls.append(functional.kl_div(q, p, reduction="none", log_target=True).sum(1).clamp_(min=0))
    return torch.cat(kls)


def mean_loss(logits: Tensor, targets: Tensor, dense: Tensor | None, share: float) -> Tensor:
    """The mean over items of the loss, in float32; without `dense` logits the mean NLL."""
    nll = token_nlls(logits, targets).mean()
    return nll if dense is None else share * nll + (1 - share) * token_kls(dense, logits).mean()


def loss_gradient(
    logits: Tensor, targets: Tensor, dense: Tensor | None, weight: float = 1.0, share: float = 0.5
) -> Tensor:
    """Gradient of `weight` times the summed loss by the logits, in their format; without `dense` logits of the NLL."""
    gradient, rows = torch.empty_like(logits), rows_at_a_time(logits, COMPARED // logits.shape[1])
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        q, target = logits[here].float().softmax(1), targets[here]
        if dense is not None:
            q.sub_(dense[here].float().softmax(1), alpha=1 - share)
        q[torch.arange(len(q), device=q.device), target] -= 1.0 if dense is None else share
        gradient[here] = q.mul_(weight)
    return gradient


def rows_at_a_time(logits: Tensor, most: int) -> int:
    """Number of float32 rows of logits [tokens, vocabulary] that fit in a CPU's caches; `most` on other devices."""
    return torch.get_num_threads() * max(1, CACHED // logits.shape[1]) if logits.is_cpu else max(1, most)


SCALE = 256.0  # of gradients by logits in float16, per predicted token, whose largest is then near it
POSITIONS = 256  # positions of each window whose logits are computed at a time
HEAD_BYTES = 12  # bytes per logit: bf16 or float32 logits, their float32 copy and its log-softmax
WINDOWS, TOKENS = 2, 16  # shape of a probe
PART = slice(4, 11)  # positions whose logits are also computed alone


class NextToken:
    """The `Score` of causal language models, whose inputs are token ids."""

    def probes(self, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
        """Random ids [windows, tokens], and the same ids with other tokens in the second half of each window."""
        draw = torch.Generator().manual_seed(0)
        ids, other = torch.randint(vocabulary(checkpoint), (2, WINDOWS, TOKENS), generator=draw)
        other[:, : TOKENS // 2] = ids[:, : TOKENS // 2]
        return ids.to(checkpoint.device), other.to(checkpoint.device)

    def check_head(self, replay: Replay, runs: Sequence[ProbeRun], logits: Tensor, is_routed: bool) -> None:
        """Raises Difference unless logits are causal and computed from the hidden states, position by position."""
        (ids, hidden), (other, others) = ((run.batch, run.hidden) for run in runs)
        if logits.shape[:2] != ids.shape:
            raise Difference("has no logits for each token")
        if not is_equal(replay.logits(ids, hidden), logits):
            raise Difference("computes its logits from more than the hidden states that leave its last block")
        if not is_near(replay.logits(ids[:, PART], hidden[:, PART]), logits[:, PART]):
            raise Difference("does not compute its logits position by position")
        if not is_causal(logits, replay.logits(other, others), is_routed):
            raise Difference("predicts tokens from those that come later, so it is no causal language model")

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """Number of positions of a window whose logits are computed at a time, and bytes for each."""
        return min(positions, POSITIONS), HEAD_BYTES * vocabulary(checkpoint)

    def items(self, replay: Replay, batch: Tensor | Items, hidden: Tensor, dense: Tensor | None) -> Scores:
        """Scores of each window in nats per token; norm and head are applied to slices of positions.

        Of pairs of image and text, tokens that stand for an image are not predicted.
        """
        ids, image = (batch, None) if isinstance(batch, Tensor) else (batch.tensors[IDS], batch.image)
        counted = torch.ones_like(ids[:, 1:], dtype=torch.bool) if image is None else torch.ne(ids[:, 1:], image)
        nlls, kls = torch.zeros(2, len(ids), dtype=torch.float32, device=ids.device)
        beside = list[tuple[Tensor, Tensor]]()
        for start in range(0, counted.shape[1], POSITIONS):
            here = slice(start, min(start + POSITIONS, counted.shape[1]))
            of_text = counted[:, here]
            logits = replay.logits(ids[:, here], hidden[:, here]).flatten(0, 1)
            targets = ids[:, here.start + 1 : here.stop + 1].flatten()
            nlls += (token_nlls(logits, targets).view_as(of_text) * of_text).sum(1)
            if dense is not None:
                others = replay.dense.logits(ids[:, here], dense[:, here].to(ids.device)).flatten(0, 1)
                divergences = token_kls(others, logits).view_as(of_text)
                kls += (divergences * of_text).sum(1)
                beside.append((divergences, (others.argmax(1) == logits.argmax(1)).view_as(divergences)))
        predicted = counted.sum(1)
        scores = {"nlls": (nlls / predicted).tolist()}
        if dense is not None:
            scores |= {"kls": (kls / predicted).tolist(), **beside_dense(beside, counted)}
        return scores

    def gradient(
        self, replay: Replay, batch: Tensor, hidden: Tensor, dense: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """Gradient of each window's loss by its final hidden states [windows, tokens, width], slice by slice.

        Of float16, whose range is too small for it, in float32.
        """
        predicted, is_half = batch.shape[1] - 1, hidden.dtype == torch.float16
        gradient = torch.zeros_like(hidden, dtype=torch.float32 if is_half else hidden.dtype)
        scale = SCALE * predicted if is_half else 1.0
        for start in range(0, predicted, POSITIONS):
            here = slice(start, min(start + POSITIONS, predicted))
            part = hidden[:, here].detach().requires_grad_()
            targets = batch[:, here.start + 1 : here.stop + 1].flatten()
            likely = None
            if dense is not None:
                likely = replay.logits(batch[:, here], dense[:, here].to(batch.device)).flatten(0, 1)
            with torch.enable_grad():
                logits = replay.logits(batch[:, here], part).flatten(0, 1)
            by_logits = loss_gradient(logits.detach(), targets, likely, scale / predicted, share)
            gradient[:, here] = torch.autograd.grad(logits, part, by_logits)[0].to(gradient.dtype) / scale
        return gradient


NEXT_TOKEN = NextToken()


def beside_dense(parts: Sequence[tuple[Tensor, Tensor]], counted: Tensor) -> dict[str, list[float]]:
    """The 99th percentile of each window's KL, and its share of positions with the dense model's most likely token.

    `parts`: of slices of positions, KL and whether both models have one most likely token [windows, positions];
    `counted`: of all positions, which of them count.
    """
    kls, same = (torch.cat(each, 1).float().masked_fill(~counted, torch.nan) for each in zip(*parts, strict=True))
    return {"kls_99": kls.nanquantile(0.99, dim=1).tolist(), "same_tops": same.nanmean(1).tolist()}


def is_causal(logits: Tensor, other: Tensor, is_routed: bool) -> bool:
    """Whether the logits of both probes are equal in the first half, where their tokens are equal.

    Bit-identical if tokens are not routed, since all shapes are the same. With routing, the number of tokens that are
    multiplied by the same expert affects rounding.
    """
    early, others = logits[:, : TOKENS // 2], other[:, : TOKENS // 2]
    return is_equal(early, others) or (is_routed and is_near(early, others))


# --- Scores of a model whose weights are given block by block.
#
# Each block is used once, in order, so a model may be larger than memory. For KL the dense model is given by its final
# hidden states; its logits would need too much memory, so they are computed again.

Block = tuple[int, dict[str, Tensor]]  # index, tensors by name


@dataclass(eq=False)
class Passing:
    """Hidden states of groups of items, while blocks pass by.

    `states`: of each group [items, positions, width], after the last block; in a vision tower those before it, since
    the model's own code runs a tower as a whole when all of its blocks are known.
    """

    replay: Replay
    batch: AutoBatch
    groups: Sequence[Batch]

    def __post_init__(self) -> None:
        self.states = [embed(self.replay, self.batch, group) for group in self.groups]
        self._tower = list[dict[str, Tensor]]()

    def block(self, index: int, weights: dict[str, Tensor]) -> None:
        """Runs all groups through a block."""
        if index < self.replay.in_tower:
            self._tower.append(weights)
            return
        for group, hidden in enumerate(self.states):
            entered = entering(self.replay, self.batch, index, hidden, self.groups[group], self._tower)
            self.states[group] = advance(self.replay, self.batch, index, weights, entered)


def head_scores(
    replay: Replay, score: Score, heads: AutoBatch, items: Batch, hidden: Tensor, dense: Tensor | None = None
) -> Scores:
    """Scores of items, from their final hidden states [items, positions, width]."""

    def step(rows: slice) -> Scores:
        return score.items(replay, items[rows], hidden[rows], None if dense is None else dense[rows])

    return joined(heads.over(len(items), step))


@torch.inference_mode()
def compare_bos(
    replay: Replay,
    batch: AutoBatch,
    heads: AutoBatch,
    folder: ModelFolder,
    text: Text,
    base: Path,
) -> BosEffect | None:
    """Perplexity of the same tokens with and without BOS; None if the tokenizer or the model has no BOS.

    Windows without BOS are those with BOS, minus the first token; the prediction right after BOS does not count. Both
    go through the dense blocks together, so that streamed weights are copied once.
    """
    tokenizer = load_tokenizer(folder.path, folder.trusted)
    bos = bos_id(tokenizer)
    if bos is None or bos >= vocabulary(replay.checkpoint):
        return None
    few = text.model_copy(update={"nsamples": BOS_WINDOWS, "seqlen": min(BOS_TOKENS, text.seqlen), "stride": 1})
    if text.sampling == "random":
        windows = token_windows(few, folder.path, base, trusted=folder.trusted, bos=True)
    else:
        windows = first_windows(few, folder, base, BOS_WINDOWS, bos=True)
    ids = windows.tensors[IDS].to(replay.checkpoint.device)
    plain = ids[:, 1:].contiguous()
    passing = Passing(replay, batch, [ids, plain])
    for index in range(len(replay.checkpoint.blocks)):
        passing.block(index, replay.checkpoint.weights(index))
    with_bos, without = (
        head_scores(replay, NEXT_TOKEN, heads, plain, hidden)["nlls"]
        for hidden in (passing.states[0][:, 1:], passing.states[1])
    )
    return BosEffect.of(str(tokenizer.bos_token), with_bos, without, ids.shape[1])


# --- A score that is a plug-in, checked each time: one finite number, or NaN, for each item.

ITEMS = {by.items for by in MEASURES.values()} - {"ranks"}  # which images have
METHODS = ("probes", "check_head", "head_cost", "items")


class CheckedScore(Checked):
    """The `Score` around a plug-in.

    `Difference`, by which `check_head` says that it does not fit the model, is no error of the plug-in.
    """

    @property
    def content(self) -> str:
        """Name and content: what was measured with another one does not count."""
        return f"{self._origin.name} {self._origin.sha256}"

    def probes(self, checkpoint: Checkpoint) -> Any:
        """The plug-in's probes."""
        with guarded(self._origin, "probes"):
            return self._plugin.probes(checkpoint)

    def check_head(self, replay: Replay, runs: Sequence[ProbeRun], logits: Tensor, is_routed: bool) -> None:
        """The plug-in's check."""
        self._plugin.check_head(replay, runs, logits, is_routed)

    def head_cost(self, checkpoint: Checkpoint, positions: int) -> tuple[int, int]:
        """The plug-in's cost of the head."""
        with guarded(self._origin, "head_cost"):
            at_a_time, size = self._plugin.head_cost(checkpoint, positions)
            return int(at_a_time), int(size)

    def items(self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None) -> Scores:
        """The plug-in's scores, by the items of measures."""
        with guarded(self._origin, "items"):
            given = dict(self._plugin.items(replay, batch, hidden, dense))
            scores = {key: [float(one) for one in row] for key, row in given.items()}
        needed = {"nlls"} if dense is None else {"nlls", "kls"}
        if not needed <= scores.keys() <= ITEMS or any(len(row) != len(hidden) for row in scores.values()):
            many = ", ".join(f"{len(row)} {key}" for key, row in scores.items()) or "nothing"
            must = f"there must be {len(hidden)} {' and '.join(sorted(needed))}"
            raise self.wrong("items", f"returned {many}, where {must}")
        return scores

    def gradient(
        self, replay: Replay, batch: Batch, hidden: Tensor, dense: Tensor | None = None, share: float = 0.5
    ) -> Tensor:
        """The plug-in's gradient, of its own loss if it takes no `dense` or `share`.

        PluginError if it has none, or if it does not take both where the loss is neither the NLL nor the mean.
        """
        if not hasattr(self._plugin, "gradient"):
            raise self.wrong("has no method", "gradient, which the allocation gradient needs")
        with guarded(self._origin, "gradient"):
            parameters, takes = signature(self._plugin.gradient).parameters, {"dense": dense, "share": share}
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                takes = {name: value for name, value in takes.items() if name in parameters}
            if len(takes) < 2 and dense is not None and share != NLL_SHARES["both"]:
                raise self.wrong(
                    "gradient",
                    f"takes no {'share' if 'dense' in takes else 'dense'}, which prune.loss needs; add it, or leave "
                    "prune.loss out",
                )
            gradient: Tensor = self._plugin.gradient(replay, batch, hidden, **takes)
        if not isinstance(gradient, Tensor) or gradient.shape != hidden.shape:
            raise self.wrong("gradient", f"returned something else than a tensor {list(hidden.shape)}")
        return gradient


def finished(plugin: Any, origin: Origin) -> CheckedScore:
    """The score of a plug-in; UserError if it is none."""
    return CheckedScore.finished(plugin, origin, **dict.fromkeys(METHODS, "; inherit from NextToken, or see Score"))
