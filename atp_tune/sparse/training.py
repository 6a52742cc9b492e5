"""LoRA that keeps zeros, on peft's layers: masked adapters, training steps, saving and resuming.

    y = (W + M ⊙ s B A) x        M = [W ≠ 0], s = α / r

W is the frozen weight of a linear [out, in] with its zeros; A [r, in] and B [out, r] are trained in float32. The masked
product needs a matrix of W's size: LoRA's usual B (A x) cannot apply the mask, and a mask applied only at the merge
would change the trained model. So each forward, like the merge, computes the sum in float32 and rounds it once to W's
format: both give the same weights bit for bit. Source: Hu et al., LoRA, ICLR 2022.

    loss   mean NLL of a batch of windows, nats per token; of an image classifier the mean cross-entropy of its images
    rate   rises over the first 5 % of the steps, then falls along a cosine
    step   AdamW without weight decay; gradients are clipped to norm 1

Dropout is off and the seed fixes the order of the windows, so a run that was interrupted and resumed ends with the same
weights as one that was not.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.pytorch_utils import Conv1D

from atp_tune.cache import write_out
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import GIB, find_dtype, free_memory
from atp_tune.errors import UserError
from atp_tune.inputs.images import Images
from atp_tune.sparse.provenance import Settings

ADAPTER = "default"  # what peft calls an adapter
WARM_UP = 0.05  # of the steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SHARE = 0.5  # of free memory; if a step needs more, the backward pass recomputes blocks
ADAPTER_BYTES = 16  # per trained number: value, gradient and two moments in float32
WEIGHT_BYTES = 16  # per weight in a forward pass: sum, mask, rounded sum, and their gradients
LOGIT_BYTES = 16  # per logit: as computed, in float32, softmax and gradient


class MaskedLinear(LoraLinear):
    """peft's LoRA layer with the mask in its forward pass."""

    def tuned(self) -> Tensor:
        """W + M ⊙ s B A in W's own shape and format."""
        weight: Any = self.get_base_layer().weight
        with torch.autocast(weight.device.type, enabled=False):
            fixed = weight.float()
            mask = fixed.sign().abs()  # several times as fast as a comparison
            tuned: Tensor = (fixed + mask * self.get_delta_weight(ADAPTER)).to(weight.dtype)
        return tuned

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        y: Tensor = functional_call(self.get_base_layer(), {"weight": self.tuned()}, (x, *args), kwargs)
        return y


class Adapters:
    """Adapters on all linears of a checkpoint's blocks, except experts of a mixture, which are no modules.

    The checkpoint's model is changed: its linears become `MaskedLinear`.
    """

    def __init__(self, checkpoint: Checkpoint, rank: int, alpha: int, seed: int) -> None:
        """`seed` initialises A; B is zero, so training starts from the pruned model."""
        self._checkpoint = checkpoint
        found = [(i, x) for i, linears in enumerate(checkpoint.linears) for x in linears if x.expert is None]
        places = [f"{i}.{linear.name}" for i, linear in found]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=places)
        config._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # into the blocks alone: for some whole models peft rewrites target_modules
            inject_adapter_in_model(config, checkpoint.blocks, ADAPTER)
        self._layers: dict[str, Any] = {}
        for place, (i, linear) in zip(places, found, strict=True):
            layer: Any = checkpoint.blocks.get_submodule(place)
            layer.fan_in_fan_out = linear.transposed
            self._layers[checkpoint.key(i, linear)] = layer

    @property
    def names(self) -> set[str]:
        """Names in a checkpoint of the tensors that have an adapter."""
        weights = {name: layer.get_base_layer().weight for name, layer in self._layers.items()}
        return {part for name, w in weights.items() for part in self._checkpoint.as_saved(name, w.to("meta"))}

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every linear, in float32, by name."""
        found = {}
        for name, layer in self._layers.items():
            for side in ("lora_A", "lora_B"):
                matrix = getattr(layer, side)[ADAPTER].float()
                found[f"{name}.{side}"] = matrix.weight.requires_grad_()
        return found

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name on disk, weight before and weight with the adapter merged, linear by linear."""
        for name, layer in self._layers.items():
            tuned = self._checkpoint.as_saved(name, layer.tuned().cpu())
            for part, was in self._checkpoint.as_saved(name, layer.get_base_layer().weight.cpu()).items():
                yield part, was, tuned[part]


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Gradient checkpointing: each block keeps only its inputs, and is recomputed in the backward pass."""
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


class Trainer:
    """Trains adapters on the linears of a checkpoint with token ids [windows, tokens], or with labelled images."""

    def __init__(self, checkpoint: Checkpoint, items: Tensor | Images, settings: Settings) -> None:
        """UserError if memory is too small, or windows exceed the model's positions."""
        if settings.seqlen is not None:
            check_length(checkpoint, settings.seqlen)
        self._model, self._device, self._settings = checkpoint.model, checkpoint.device, settings
        if must_recompute(checkpoint, settings, items.positions if isinstance(items, Images) else None):
            recompute_blocks(checkpoint.blocks)
        self.adapters = Adapters(checkpoint, settings.rank, settings.alpha, settings.seed)
        self._parameters = self.adapters.parameters()
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=0)
        self._items, self._order = items, order(len(items), settings)
        fast = find_dtype("auto", checkpoint.device)
        self._mixed = torch.autocast(
            self._device.type, torch.bfloat16, enabled=fast == torch.bfloat16 and checkpoint.dtype == torch.float32
        )
        self.losses: list[float] = []

    def step(self) -> float:
        """One step on the next batch; its loss in nats per token, or per image."""
        done, settings = len(self.losses), self._settings
        rows = self._order[done * settings.batch :][: settings.batch]
        self._optimizer.zero_grad()
        loss = self._loss_of_images(self._items, rows) if isinstance(self._items, Images) else self._loss(rows)
        if not loss.isfinite():
            raise UserError(f"finetune: the loss is {loss.item()} at step {done + 1}; lower --learning-rate")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate(done, settings)
        self._optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def _loss(self, rows: Tensor) -> Tensor:
        assert isinstance(self._items, Tensor)
        batch = self._items[rows].to(self._device)
        with self._mixed:
            logits = self._model(input_ids=batch, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def _loss_of_images(self, images: Images, rows: Tensor) -> Tensor:
        pixels, classes = images.pixels[rows].to(self._device), images.classes[rows].to(self._device)
        dtype: Any = self._model.dtype
        with self._mixed:
            logits = self._model(pixel_values=pixels.to(dtype)).logits
        return nn.functional.cross_entropy(logits.float(), classes)

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Writes adapters, moments and losses; `facts` identify the run. UserError if it cannot be written."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self._parameters.items():
            tensors[name] = parameter.detach()
            tensors |= {f"{name} {moment}": self._optimizer.state[parameter][moment] for moment in MOMENTS}
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
                for name, parameter in self._parameters.items():
                    parameter.copy_(stored.get_tensor(name))
                    moments = {moment: stored.get_tensor(f"{name} {moment}") for moment in MOMENTS}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(len(self.losses))), **moments}
        except SafetensorError:
            raise UserError(f"{path}: was not written by an earlier run; remove it") from None


def order(windows: int, settings: Settings) -> Tensor:
    """Indices of windows [steps × batch]: all windows in a random order, then in another, and so on."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))]
    return torch.cat(rounds)[:needed]


def rate(done: int, settings: Settings) -> float:
    """Learning rate of the step that follows `done` steps."""
    warm = math.ceil(WARM_UP * settings.steps)
    if done < warm:
        return settings.learning_rate * (done + 1) / warm
    return settings.learning_rate * (1 + math.cos(math.pi * (done - warm) / (settings.steps - warm))) / 2


def must_recompute(checkpoint: Checkpoint, settings: Settings, positions: int | None = None) -> bool:
    """Whether to recompute blocks in the backward pass; UserError if memory is too small even then.

    `positions`: hidden states of an image in the first block, of an image classifier.
    """
    free = free_memory(checkpoint.device)
    if bytes_needed(checkpoint, settings, False, positions) < SHARE * free:
        return False
    needed = bytes_needed(checkpoint, settings, True, positions)
    if needed > free:
        raise UserError(
            f"finetune: needs about {needed / GIB:.1f} GiB beside the weights, {free / GIB:.1f} GiB are free; lower "
            "--batch, --seqlen or --rank, or take a larger device"
        )
    return True


def bytes_needed(checkpoint: Checkpoint, settings: Settings, recompute: bool, positions: int | None = None) -> int:
    """Estimate of the bytes beside the weights: adapters, summed weights, activations of all blocks or one, logits."""
    tokens = settings.batch * (positions or settings.seqlen or 1)
    widths = [[x.in_features + x.out_features for x in linears if x.expert is None] for linears in checkpoint.linears]
    sizes = [sum(x.size for x in linears if x.expert is None) for linears in checkpoint.linears]
    adapters = settings.rank * sum(map(sum, widths)) * ADAPTER_BYTES
    blocks = [size * WEIGHT_BYTES + tokens * sum(w) * 8 for size, w in zip(sizes, widths, strict=True)]
    if positions:  # of an image classifier, whose stages may have other widths
        width = max(x.in_features for linears in checkpoint.linears for x in linears)
        logits = settings.batch * checkpoint.config.num_labels
    else:
        config = checkpoint.config.get_text_config()
        width, logits = config.hidden_size, tokens * config.vocab_size
    kept = max(blocks) + len(blocks) * tokens * width * 4 if recompute else sum(blocks)
    return int(adapters + kept + logits * LOGIT_BYTES)


def check_length(checkpoint: Checkpoint, tokens: int) -> None:
    """UserError if windows of so many tokens exceed the model's positions."""
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"--seqlen {tokens}: the model has {positions} positions; lower it")


def stored_format(folder: Path) -> torch.dtype:
    """The number format that rounds no weight of a folder: bfloat16 if all are stored as such, else float32."""
    kinds = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            kinds |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - it is no mapping
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def facts_of(settings: Settings, **contents: str) -> dict[str, str]:
    """What identifies a run: settings by the names of their options, and `contents`."""
    named = {key.replace("_", "-"): json.dumps(value) for key, value in settings.model_dump().items()}
    return {**named, **contents}
