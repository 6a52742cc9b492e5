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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints.blocks import Linear, classifies_images, model_config
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import GIB, find_dtype, free_memory
from atp_tune.checkpoints.files import read_headers, read_sizes
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config.prune import FEWEST, MOST, NLL_SHARES, SHARE, Training
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError
from atp_tune.folders.applying import check_model
from atp_tune.folders.card import ABOUT, PrunedWith
from atp_tune.folders.packing import Codes
from atp_tune.inputs.items import IDS, LABELS, Items
from atp_tune.inputs.windows import load_tokenizer
from atp_tune.packed.layout import spread
from atp_tune.scores.next_token import loss_gradient, mean_loss
from atp_tune.utils.cache import write_out

# --- The dense model whose predictions a sparse one learns, with the loss `kl`.


def find_teacher(
    source: str | None,
    pruning: PrunedWith | None,
    model: ModelFolder,
    notify: Callable[[str], None],
    allowed: Mapping[str, bool] | None = None,
) -> ModelFolder:
    """The folder of the dense model that `--teacher` names, or else of the one that `model` was pruned from.

    `allowed`: keys of `study.ModelConfig` that a configuration cannot set, for the latter.

    UserError if there is none, if it is not what the folder's configuration says, or if it has another vocabulary.
    """
    pruning = pruning if source is None else None
    if source is None and pruning is None:
        raise UserError(f"loss: {model.path} has no {ABOUT}, so its dense model is not known; name it by --teacher")
    try:
        if pruning:
            teacher = resolve(pruning.config.model.model(allowed), pruning.base, notify)
        else:
            teacher = resolve(ModelConfig(source=str(source)), Path(), notify)
    except UserError as error:
        where = "loss: the dense model: {}, or name it by --teacher" if pruning else "--teacher: {}"
        raise UserError(where.format(error)) from None
    if pruning:
        check_model(pruning.config, teacher)
        return teacher
    # Unless both models predict the same tokens, or classes.
    folders = model.path, teacher.path
    (ours, theirs), wrong = map(classifies_images, folders), ""
    own, other = (model_config(folder, False) for folder in folders)
    if ours or theirs:
        wrong = "has other classes than the sparse model" if ours != theirs or own.id2label != other.id2label else ""
    elif (size := own.get_text_config().vocab_size) != (other_s := other.get_text_config().vocab_size):
        wrong = f"has a vocabulary of {other_s:,} tokens, the sparse model one of {size:,}"
    elif load_tokenizer(teacher.path, False).get_vocab() != load_tokenizer(model.path, False).get_vocab():
        wrong = "its tokenizer has other tokens than the sparse model's"
    if wrong:
        raise UserError(f"--teacher {source}: {wrong}; give the model that it was pruned from")
    return teacher


# --- What is trained in the linears of a sparse checkpoint while every zero stays: scales, or masked LoRA (`lora`).
#
#     scales   y = eᵃ ⊙ W (eᵇ ⊙ x)          W' = diag(eᵃ) W diag(eᵇ)
#     groups   y = W' x                     W'_ij = W_ij exp c_ig      of rounded weights; input j lies in the group g
#
# W is the frozen weight of a linear [out, in] with its zeros; a [out], b [in] and c [out, groups] are trained in
# float32. A bias is not trained. With c rounded weights keep their codes and zero points, whose scales alone change
# (as of Esser et al., "Learned Step Size Quantization", ICLR 2020).
#
# The exponentials are never 0, so that W' has W's zeros and signs. The forward multiplies inputs and outputs, and needs
# no gradient of W's size; W' is rounded to W's format at the merge alone. Norm gains are not trained: a gain is a scale
# of the columns of all linears behind the norm.


class Adapters:
    """Trained numbers in all linears of a checkpoint's blocks, except experts of a mixture, which are no modules."""

    bytes = 16, 8  # per weight: sum, mask or factor, rounded, gradients; per token and feature of a linear

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._layers: dict[str, Any] = {}  # by the name of their weight in the model
        self.parameters: dict[str, nn.Parameter] = {}  # what is trained, in float32

    @property
    def names(self) -> set[str]:
        """Names in a checkpoint of the tensors that are trained."""
        return {
            part
            for name, layer in self._layers.items()
            for part in self.checkpoint.as_saved(name, layer.get_base_layer().weight.to("meta"))
        }

    @torch.no_grad()
    def merged(self, codes: Codes | None = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name on disk, weight before and weight as trained, linear by linear; of rounded weights `codes` have them."""
        for name, layer in self._layers.items():
            tuned = self.checkpoint.as_saved(name, (layer.tuned() if codes is None else layer.factors()).cpu())
            for part, was in self.checkpoint.as_saved(name, layer.get_base_layer().weight.cpu()).items():
                yield part, was, tuned[part] if codes is None else codes.scaled(part, tuned[part])


class ScaledLinear(nn.Module):
    """A linear with scales, whose logarithms are trained: `rows` [out] and `columns` [in], or `groups` [out, groups].

    `group_size`: consecutive inputs of a row that share a scale (-1: all) where the weights are rounded, else None.
    """

    rows: Tensor
    columns: Tensor
    groups: Tensor

    def __init__(self, base: nn.Module, linear: Linear, group_size: int | None) -> None:
        super().__init__()
        self.base: Any = base
        rows, columns = linear.out_features, linear.in_features
        self._linear, self._size = linear, columns if group_size == -1 else group_size
        shapes: dict[str, tuple[int, ...]] = {"rows": (rows,), "columns": (columns,)}
        if self._size is not None:
            shapes = {"groups": (rows, -(-columns // self._size))}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=self.weight.device)))

    def get_base_layer(self) -> Any:
        """The linear itself, as in peft's layers."""
        return self.base

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that read its format or device."""
        weight: Tensor = self.base.weight
        return weight

    def tuned(self) -> Tensor:
        """W' in W's own shape and format."""
        return (self.weight.float() * self.factors()).to(self.weight.dtype)

    def factors(self) -> Tensor:
        """What each weight is multiplied by, in W's own shape, float32."""
        if self._size is None:
            scales = self.rows.exp()[:, None] * self.columns.exp()
        else:
            scales = spread(self.groups.exp(), self._size, self._linear.in_features)
        return scales.T if self._linear.transposed else scales

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] of inputs [..., in]; of groups, and of a class with a forward of its own, with W'."""
        if self._size is not None or type(self.base).forward not in (nn.Linear.forward, Conv1D.forward):
            return functional_call(self.base, {"weight": self.tuned()}, (x,))  # type: ignore[no-any-return]
        rows, bias = self.rows.exp(), self.base.bias
        own = {} if bias is None else {"bias": (bias / rows).to(bias.dtype)}
        y: Tensor = functional_call(self.base, own, ((x * self.columns.exp()).to(x.dtype),))
        return (y * rows).to(y.dtype)


class Scales(Adapters):
    """Scales; the checkpoint's model is changed: its linears become `ScaledLinear`."""

    def __init__(self, checkpoint: Checkpoint, group_size: int | None) -> None:
        """`group_size`: of the groups in which the weights are rounded; None: they are not."""
        super().__init__(checkpoint)
        if group_size is None:
            self.bytes = 4, 16  # per weight: as multiplied; per token and feature: with and without its scale
        for i, linear in trained_linears(checkpoint):
            base, name = checkpoint.blocks[i].get_submodule(linear.name), checkpoint.key(i, linear)
            layer = ScaledLinear(base, linear, group_size)
            checkpoint.blocks[i].set_submodule(linear.name, layer)
            self._layers[name] = layer
            self.parameters |= {f"{name}.{own}": scales for own, scales in layer.named_parameters(recurse=False)}


def trained_linears(checkpoint: Checkpoint) -> list[tuple[int, Linear]]:
    """The linears that are modules, each with the index of its block."""
    return [(i, x) for i, linears in enumerate(checkpoint.linears) for x in linears if x.expert is None]


# --- Steps, held-out losses, saving and resuming.

WARM_UP = 0.05  # of the steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
KEPT_SHARE = 0.5  # of the memory that training leaves, for the dense model's logits on held-out items
BEST = "best"  # of a parameter: its value at the step with the lowest held-out loss
Data = Tensor | Items  # a batch: token ids [windows, tokens], or labelled images


class Trainer:
    """Trains adapters on the linears of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        items: Items,
        settings: Training,
        held_out: Items | None = None,
        teacher: ModelFolder | None = None,
        group_size: int | None = None,
    ) -> None:
        """`held_out`: what early stopping measures on; `teacher`: the dense model of the loss `kl`, not loaded yet.

        `group_size`: of the groups in which the weights are rounded; None: they are not.

        That lies as a whole on the CPU or GPU, in the format that is fast there. UserError if memory is too small, or
        windows exceed the model's positions.
        """
        maximum = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
        if settings.seqlen is not None and maximum is not None and settings.seqlen > maximum:
            raise UserError(f"seqlen: {settings.seqlen}, the model has {maximum} positions; lower it")
        self._model, self._device, self._settings = checkpoint.model, checkpoint.device, settings
        fast, positions = find_dtype("auto", checkpoint.device), None if IDS in items.tensors else items.positions
        size = read_sizes(teacher.path).total * fast.itemsize if teacher else 0
        self.adapters: Adapters
        if settings.rank is None or settings.alpha is None:
            self.adapters = Scales(checkpoint, group_size)
        else:
            from atp_tune.folders.lora import Lora  # needs the extra

            self.adapters = Lora(checkpoint, settings.rank, settings.alpha, settings.seed)
        self.memory = memory_needed(self.adapters, settings, positions, size)
        self._teacher: nn.Module | None = None
        if teacher is not None:
            self._teacher = Checkpoint.load(teacher.path, fast, self._device, offload="none").take_model()
        if self.memory.recompute:  # gradient checkpointing: each block keeps only its inputs
            for block in checkpoint.blocks:
                block.forward = partial(recomputed, block.forward, use_reentrant=False)
        self._parameters = self.adapters.parameters
        self._share = NLL_SHARES[settings.loss]
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=0)
        self._items, self._held_out, self._order = items, held_out, order(len(items), settings)
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
        self._optimizer.zero_grad()
        loss = self._backward(self._items[self._order[done * settings.batch :][: settings.batch]])
        _check_finite(loss, f"the loss is {loss} at step {done + 1}")
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
            batch = self._held_out[start : start + size].batch(self._device)
            dense = self._kept.get(start)
            if dense is None and self._teacher is not None:
                dense = self._logits(self._teacher, batch)
                if dense.nbytes <= self._room:  # kept, as long as there is room
                    self._kept[start], self._room = dense, self._room - dense.nbytes
            loss = mean_loss(self._logits(self._model, batch), batch_targets(batch), dense, self._share).item()
            _check_finite(loss, f"the held-out loss is {loss} after step {done}")
            total += loss * len(batch)
        if self.early_stop.add(done, total / len(self._held_out)):
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        return self.early_stop.losses[-1][1]

    @torch.no_grad()
    def take_best(self) -> None:
        """Gives the adapters the values of the step with the lowest held-out loss; of the last step without one."""
        for name, value in self._best.items():
            self._parameters[name].copy_(value)

    def _backward(self, items: Items) -> float:
        """The mean loss of a batch, whose gradients the parameters get."""
        batch: Data = items.batch(self._device)
        with torch.no_grad():
            dense = None if self._teacher is None else self._logits(self._teacher, batch)
        targets, logits = batch_targets(batch), self._logits(self._model, batch)
        values = logits.detach()
        logits.backward(loss_gradient(values, targets, dense, 1 / len(values), self._share))  # type: ignore[no-untyped-call]
        return mean_loss(values, targets, dense, self._share).item()

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
                self.losses[:] = stored.get_tensor("losses").tolist()
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


def batch_targets(batch: Data) -> Tensor:
    """The targets of a batch's logits: the next tokens [tokens], or the classes [images]."""
    return batch.tensors[LABELS] if isinstance(batch, Items) else batch[:, 1:].flatten()


def order(windows: int, settings: Training) -> Tensor:
    """Indices of windows [steps × batch]: all windows in a random order, then in another, and so on."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))])[:needed]


def rate(done: int, settings: Training) -> float:
    """Learning rate of the step that follows `done` steps."""
    warm = math.ceil(WARM_UP * settings.steps)
    if done < warm:
        return settings.rate * (done + 1) / warm
    return settings.rate * (1 + math.cos(math.pi * (done - warm) / (settings.steps - warm))) / 2


def _check_finite(loss: float, text: str) -> None:
    if not math.isfinite(loss):
        raise UserError(f"training: {text}; lower the learning rate")


def stored_format(folder: Path) -> torch.dtype:
    """The number format that rounds no weight of a folder: bfloat16 if all are stored as such, else float32."""
    kinds = {entry["dtype"] for entry in read_headers(folder).values()}
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


STEP_SHARE = 0.5  # of free memory; if a step needs more, the backward pass recomputes blocks
ADAPTER_BYTES = 20  # per trained number in float32: value, gradient, two moments, and the best value so far
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


def memory_needed(adapters: Adapters, settings: Training, positions: int | None, teacher: int) -> MemoryNeeded:
    """The memory of a run, with recomputed blocks if it is short; UserError if it is too small even then.

    `positions`: hidden states of an image in the first block, of an image classifier; `teacher`: bytes of the dense
    model's weights, which are not loaded yet.
    """
    free = free_memory(adapters.checkpoint.device)
    for recompute in (False, True):
        needed = bytes_needed(adapters, settings, recompute, positions) + teacher
        if needed < (1 if recompute else STEP_SHARE) * free:
            return MemoryNeeded(needed, free, recompute)
    dense = f", with {teacher / GIB:.1f} GiB of the dense model" if teacher else ""
    raise UserError(
        f"training: needs {MemoryNeeded(needed, free, True)}{dense}; lower "
        f"batch{', seqlen' * (settings.seqlen is not None)}{' or rank' * (settings.rank is not None)}, "
        "or take a larger device"
    )


def bytes_needed(adapters: Adapters, settings: Training, recompute: bool, positions: int | None = None) -> int:
    """Estimate of the bytes beside the weights: adapters, summed weights, activations of all blocks or one, logits."""
    checkpoint, tokens = adapters.checkpoint, settings.batch * (positions or settings.seqlen or 1)
    per_weight, per_feature = adapters.bytes
    blocks = [0] * len(checkpoint.linears)
    for index, x in trained_linears(checkpoint):
        blocks[index] += x.size * per_weight + tokens * (x.in_features + x.out_features) * per_feature
    if positions:  # of an image classifier, whose stages may have other widths
        width = max(x.in_features for linears in checkpoint.linears for x in linears)
        logits = settings.batch * checkpoint.config.num_labels
    else:
        config = checkpoint.config.get_text_config()
        width, logits = config.hidden_size, tokens * config.vocab_size
    of_blocks = max(blocks) + len(blocks) * tokens * width * 4 if recompute else sum(blocks)
    trained = ADAPTER_BYTES * sum(numbers.numel() for numbers in adapters.parameters.values())
    return int(trained + of_blocks + logits * (LOGIT_BYTES + TEACHER_BYTES * settings.has_teacher))


@dataclass(eq=False)
class EarlyStop:
    """Held-out losses by step, from step 0, which is the pruned model.

    `patience`: measurements without a lower loss after which training ends.
    """

    patience: int
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest loss, the first of equals, and its loss."""
        return min(self.losses, key=lambda each: each[1])

    @property
    def has_ended(self) -> bool:
        """Whether the last `patience` measurements have not lowered the loss."""
        return bool(self.losses) and len(self.losses) - 1 - self.losses.index(self.best) >= self.patience

    def add(self, step: int, loss: float) -> bool:
        """Notes a measurement; whether it is the best so far."""
        self.losses.append((step, loss))
        return self.best[0] == step


def windows_read(settings: Training) -> int:
    """How many windows, or images, a run reads: those of its steps, and those that it holds out."""
    needed = settings.steps * settings.batch
    return needed + (min(max(math.ceil(needed / (SHARE - 1)), FEWEST), MOST) if settings.patience else 0)


def windows_held_out(count: int, settings: Training) -> int:
    """How many of the windows that were found are held out, at their end; 0 where too few would be left to train on."""
    own = min(max(count // SHARE, FEWEST), MOST) if settings.patience else 0
    return own if count - own >= min(settings.steps * settings.batch, own) else 0
