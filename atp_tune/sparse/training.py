"""Trains adapters on a sparse checkpoint that keep its zeros: steps, held-out losses, saving and resuming.

    loss   next-token: mean NLL of a batch of windows, nats per token; of images mean cross-entropy of their classes
           kl: mean of KL(p ‖ q), p the dense model's distribution of the next token, or class, and q this model's
           both: the mean of the two (`scores.next_token`)
    rate   rises over the first 5 % of the steps, then falls along a cosine
    step   AdamW without weight decay; gradients are clipped to norm 1
    stop   the loss on held-out windows chooses the step whose adapters are merged (`EarlyStop`)

Dropout is off and the seed fixes the order of the windows, so a run that was interrupted and resumed ends with the same
weights as one that was not; on a GPU, whose attention adds gradients in no fixed order, but for rounding.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from atp_tune.cache import write_out
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import GIB, arithmetic, find_dtype, free_memory
from atp_tune.errors import UserError
from atp_tune.inputs.items import LABELS, Items
from atp_tune.scores.next_token import loss_gradient, mean_loss
from atp_tune.sparse.adapters import make_adapters, recompute_blocks
from atp_tune.sparse.teacher import Teacher
from atp_tune.spec.recover import FEWEST, MOST, NLL_SHARES, SHARE, Training

WARM_UP = 0.05  # of the steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
KEPT_SHARE = 0.5  # of the memory that training leaves, for the dense model's logits on held-out items
BEST = "best"  # of a parameter: its value at the step with the lowest held-out loss
Data = Tensor | Items  # token ids [windows, tokens], or labelled images


class Trainer:
    """Trains adapters on the linears of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        items: Data,
        settings: Training,
        held_out: Data | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """`held_out`: what early stopping measures on; `teacher`: the dense model of the loss `kl`.

        UserError if memory is too small, or windows exceed the model's positions.
        """
        if settings.seqlen is not None:
            check_length(checkpoint, settings.seqlen)
        self._model, self._device, self._settings = checkpoint.model, checkpoint.device, settings
        positions = items.positions if isinstance(items, Items) else None
        self.memory = memory_needed(checkpoint, settings, positions, teacher.bytes if teacher else 0)
        self._teacher = teacher.load() if teacher is not None else None
        if self.memory.recompute:
            recompute_blocks(checkpoint.blocks)
        self.adapters = make_adapters(checkpoint, settings)
        self._parameters = self.adapters.parameters()
        self._share = NLL_SHARES[settings.loss]
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=0)
        self._items, self._held_out, self._order = items, held_out, order(len(items), settings)
        fast = find_dtype("auto", checkpoint.device)
        self._mixed = torch.autocast(
            self._device.type, torch.bfloat16, enabled=fast == torch.bfloat16 and checkpoint.dtype == torch.float32
        )
        self.losses: list[float] = []
        self.early_stop = EarlyStop(settings.patience)
        self._best: dict[str, Tensor] = {}
        self._kept: dict[int, Tensor] = {}  # logits of the dense model on held-out batches, by the first item
        self._room = int(KEPT_SHARE * (self.memory.free - self.memory.needed))

    @property
    def has_ended(self) -> bool:
        """Whether all steps were done, or the held-out loss has not fallen for long enough."""
        return len(self.losses) == self._settings.steps or self.early_stop.has_ended

    @property
    def must_measure(self) -> bool:
        """Whether the held-out loss is due: before the first step, every `eval_every` steps, after the last."""
        done = len(self.losses)
        is_due = done % self._settings.eval_every == 0 or done == self._settings.steps
        return self._held_out is not None and is_due and done not in dict(self.early_stop.losses)

    def step(self) -> float:
        """One step on the next batch; its loss in nats per token, or per image."""
        done, settings = len(self.losses), self._settings
        rows = self._order[done * settings.batch :][: settings.batch]
        self._optimizer.zero_grad()
        loss = self._backward(self._items[rows])
        self._check(loss, f"the loss is {loss} at step {done + 1}")
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate(done, settings)
        self._optimizer.step()
        self.losses.append(loss)
        return loss

    @torch.no_grad()
    def measure(self) -> float:
        """The mean loss on the held-out windows, batch by batch; the adapters of the lowest one are kept."""
        assert self._held_out is not None
        total, done, size = 0.0, len(self.losses), self._settings.batch
        for start in range(0, len(self._held_out), size):
            batch = self._moved(self._held_out[start : start + size])
            dense = self._dense_held_out(start, batch)
            loss = mean_loss(self._logits(self._model, batch), targets_of(batch), dense, self._share).item()
            self._check(loss, f"the held-out loss is {loss} after step {done}")
            total += loss * len(batch)
        if self.early_stop.add(done, total / len(self._held_out)):
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        return self.early_stop.losses[-1][1]

    @torch.no_grad()
    def take_best(self) -> None:
        """Gives the adapters the values of the step with the lowest held-out loss; of the last step without one."""
        for name, value in self._best.items():
            self._parameters[name].copy_(value)

    def _check(self, loss: float, said: str) -> None:
        if not math.isfinite(loss):
            raise UserError(f"training: {said}; lower the learning rate")

    def _backward(self, items: Data) -> float:
        """The mean loss of a batch, whose gradients the parameters get."""
        batch = self._moved(items)
        targets, dense = targets_of(batch), self._dense(batch)
        logits = self._logits(self._model, batch)
        found = logits.detach()
        logits.backward(loss_gradient(found, targets, dense, 1 / len(found), self._share))  # type: ignore[no-untyped-call]
        return mean_loss(found, targets, dense, self._share).item()

    @torch.no_grad()
    def _dense(self, batch: Data) -> Tensor | None:
        """Logits of the dense model, if it is learnt from."""
        return None if self._teacher is None else self._logits(self._teacher, batch)

    def _dense_held_out(self, start: int, batch: Data) -> Tensor | None:
        """The same of a held-out batch whose first item is `start`: kept, as long as there is room."""
        if start in self._kept:
            return self._kept[start]
        found = self._dense(batch)
        if found is not None and found.nbytes <= self._room:
            self._kept[start], self._room = found, self._room - found.nbytes
        return found

    def _moved(self, items: Data) -> Data:
        found: Data = items.batch(self._device) if isinstance(items, Items) else items.to(self._device)
        return found

    def _logits(self, model: nn.Module, batch: Data) -> Tensor:
        """Logits [predicted tokens, vocabulary], or [images, classes]."""
        with self._mixed:
            if isinstance(batch, Items):
                return model(**batch.in_dtype(model.dtype)).logits  # type: ignore[no-any-return, arg-type]
            return model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)  # type: ignore[no-any-return]

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Writes adapters, moments and losses; `facts` identify the run. UserError if it cannot be written."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self._parameters.items():
            tensors[name] = parameter.detach()
            tensors |= {f"{name} {moment}": self._optimizer.state[parameter][moment] for moment in MOMENTS}
        tensors |= {f"{name} {BEST}": value for name, value in self._best.items()}
        tensors["held-out losses"] = torch.tensor(self.early_stop.losses, dtype=torch.float64)
        write_out(path, save({name: tensor.cpu() for name, tensor in tensors.items()}, facts))

    @torch.no_grad()
    def restore(self, path: Path, facts: dict[str, str]) -> None:
        """Resumes from a file of `save`; UserError if it belongs to another run."""
        try:
            with safe_open(path, "pt", device=str(self._device)) as stored:
                differing = [key for key, value in facts.items() if (stored.metadata() or {}).get(key) != value]
                if differing:
                    raise UserError(
                        f"{path}: was begun with another {differing[0]}; give the same options, or remove the file"
                    )
                self.losses = stored.get_tensor("losses").tolist()
                measured = stored.get_tensor("held-out losses").tolist()
                self.early_stop.losses = [(int(step), loss) for step, loss in measured]
                for name, parameter in self._parameters.items():
                    parameter.copy_(stored.get_tensor(name))
                    moments = {moment: stored.get_tensor(f"{name} {moment}") for moment in MOMENTS}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(len(self.losses))), **moments}
                if measured:
                    self._best = {name: stored.get_tensor(f"{name} {BEST}") for name in self._parameters}
        except SafetensorError:
            raise UserError(f"{path}: was not written by an earlier run; remove it") from None


def targets_of(batch: Data) -> Tensor:
    """What a batch's logits predict: the next tokens [tokens], or the classes [images]."""
    return batch.tensors[LABELS] if isinstance(batch, Items) else batch[:, 1:].flatten()


def order(windows: int, settings: Training) -> Tensor:
    """Indices of windows [steps × batch]: all windows in a random order, then in another, and so on."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))]
    return torch.cat(rounds)[:needed]


def rate(done: int, settings: Training) -> float:
    """Learning rate of the step that follows `done` steps."""
    warm = math.ceil(WARM_UP * settings.steps)
    if done < warm:
        return settings.rate * (done + 1) / warm
    return settings.rate * (1 + math.cos(math.pi * (done - warm) / (settings.steps - warm))) / 2


def check_length(checkpoint: Checkpoint, tokens: int) -> None:
    """UserError if windows of so many tokens exceed the model's positions."""
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"seqlen: {tokens}, the model has {positions} positions; lower it")


def computed_in(folder: Path, device: torch.device) -> list[str]:
    """The number formats in which the model of a folder is trained, and its dense model predicts."""
    return [*arithmetic(device, stored_format(folder)), str(find_dtype("auto", device))]


def stored_format(folder: Path) -> torch.dtype:
    """The number format that rounds no weight of a folder: bfloat16 if all are stored as such, else float32."""
    kinds = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            kinds |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - it is no mapping
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


STEP_SHARE = 0.5  # of free memory; if a step needs more, the backward pass recomputes blocks
ADAPTER_BYTES = 20  # per trained number in float32: value, gradient, two moments, and the best value so far
LORA_BYTES = (16, 8)  # per weight: sum, mask, rounded sum, gradients; per token and feature of a linear
SCALE_BYTES = (4, 16)  # per weight: as multiplied; per token and feature: with and without its scale
LOGIT_BYTES = 16  # per logit: its value and gradient, both with and without the last position
TEACHER_BYTES = 8  # per logit of the dense model: its value, with and without the last position


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes that training needs beside the weights of the sparse model, bytes that are free, and what to do."""

    needed: int
    free: int
    recompute: bool

    def __str__(self) -> str:
        return f"about {self.needed / GIB:.1f} GiB beside the weights, {self.free / GIB:.1f} GiB are free"


def memory_needed(
    checkpoint: Checkpoint, settings: Training, positions: int | None = None, teacher: int = 0
) -> MemoryNeeded:
    """The memory of a run, with recomputed blocks if it is short; UserError if it is too small even then.

    `positions`: hidden states of an image in the first block, of an image classifier; `teacher`: bytes of the dense
    model's weights, which are not loaded yet.
    """
    free = free_memory(checkpoint.device)
    for recompute in (False, True):
        needed = bytes_needed(checkpoint, settings, recompute, positions) + teacher
        if needed < (1 if recompute else STEP_SHARE) * free:
            return MemoryNeeded(needed, free, recompute)
    dense = f", with {teacher / GIB:.1f} GiB of the dense model" if teacher else ""
    raise UserError(
        f"training: needs {MemoryNeeded(needed, free, True)}{dense}; lower "
        f"batch{', seqlen' * (settings.seqlen is not None)}{' or rank' * (settings.rank is not None)}, "
        "or take a larger device"
    )


def bytes_needed(checkpoint: Checkpoint, settings: Training, recompute: bool, positions: int | None = None) -> int:
    """Estimate of the bytes beside the weights: adapters, summed weights, activations of all blocks or one, logits."""
    tokens = settings.batch * (positions or settings.seqlen or 1)
    widths = [[x.in_features + x.out_features for x in linears if x.expert is None] for linears in checkpoint.linears]
    sizes = [sum(x.size for x in linears if x.expert is None) for linears in checkpoint.linears]
    adapters = (settings.rank or 1) * sum(map(sum, widths)) * ADAPTER_BYTES
    per_weight, per_feature = LORA_BYTES if settings.rank else SCALE_BYTES
    blocks = [size * per_weight + tokens * sum(w) * per_feature for size, w in zip(sizes, widths, strict=True)]
    if positions:  # of an image classifier, whose stages may have other widths
        width = max(x.in_features for linears in checkpoint.linears for x in linears)
        logits = settings.batch * checkpoint.config.num_labels
    else:
        config = checkpoint.config.get_text_config()
        width, logits = config.hidden_size, tokens * config.vocab_size
    kept = max(blocks) + len(blocks) * tokens * width * 4 if recompute else sum(blocks)
    return int(adapters + kept + logits * (LOGIT_BYTES + TEACHER_BYTES * settings.has_teacher))


class EarlyStop:
    """Held-out losses by step, from step 0, which is the pruned model."""

    def __init__(self, patience: int, losses: list[tuple[int, float]] | None = None) -> None:
        """`patience`: measurements without a lower loss after which training ends."""
        self._patience = patience
        self.losses = losses or []

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest loss, the first of equals, and its loss."""
        return min(self.losses, key=lambda each: each[1])

    @property
    def has_ended(self) -> bool:
        """Whether the last `patience` measurements have not lowered the loss."""
        return bool(self.losses) and len(self.losses) - 1 - self.losses.index(self.best) >= self._patience

    def add(self, step: int, loss: float) -> bool:
        """Notes a measurement; whether it is the best so far."""
        self.losses.append((step, loss))
        return self.best[0] == step


def windows_read(settings: Training) -> int:
    """How many windows, or images, a run reads: those of its steps, and those that it holds out."""
    needed = settings.steps * settings.batch
    return needed + (min(max(math.ceil(needed / (SHARE - 1)), FEWEST), MOST) if settings.patience else 0)


def windows_held_out(found: int, settings: Training) -> int:
    """How many of the windows that were found are held out, at their end; 0 where too few would be left to train on."""
    own = min(max(found // SHARE, FEWEST), MOST) if settings.patience else 0
    return own if found - own >= min(settings.steps * settings.batch, own) else 0
