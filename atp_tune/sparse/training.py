"""The training of masked adapters: what a step is, what it needs, and how a run that was cut off goes on.

    loss   mean NLL of a batch of windows, nats per token
    rate   rises over the first 5 % of the steps, then falls along a cosine
    step   AdamW without weight decay; gradients are cut to a norm of 1

Dropout stays off and windows come in an order drawn by the seed, so that the file of a run that was cut off leads to
the weights of one that was not.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from atp_tune.cache import write_out
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import GIB, find_dtype, free_memory
from atp_tune.errors import UserError
from atp_tune.sparse.lora import Adapters, recompute_blocks
from atp_tune.sparse.provenance import Settings

WARM_UP = 0.05  # of the steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SHARE = 0.5  # of free memory; beyond it blocks are computed again in the backward pass
ADAPTER_BYTES = 16  # per trained number: value, gradient and two moments in float32
WEIGHT_BYTES = 16  # per weight in a forward: sum, mask, rounded sum, and their gradients
LOGIT_BYTES = 16  # per logit: as computed, in float32, softmax and gradient


class Trainer:
    """Trains adapters on the linears of a checkpoint with token ids [windows, tokens]."""

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, settings: Settings) -> None:
        """UserError if memory is too small, or windows are longer than the model's positions."""
        check_length(checkpoint, settings.tokens)
        self._model, self._device, self._settings = checkpoint.model, checkpoint.device, settings
        if must_recompute(checkpoint, settings):
            recompute_blocks(checkpoint.blocks)
        self.adapters = Adapters(checkpoint, settings.rank, settings.alpha, settings.seed)
        self._parameters = self.adapters.parameters()
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=0)
        self._ids, self._order = ids, order(len(ids), settings)
        fast = find_dtype("auto", checkpoint.device)
        self._mixed = torch.autocast(
            self._device.type, torch.bfloat16, enabled=fast == torch.bfloat16 and checkpoint.dtype == torch.float32
        )
        self.losses: list[float] = []

    def step(self) -> float:
        """One step on the next batch; its loss in nats per token."""
        done, settings = len(self.losses), self._settings
        batch = self._ids[self._order[done * settings.batch :][: settings.batch]].to(self._device)
        self._optimizer.zero_grad()
        loss = self._loss(batch)
        if not loss.isfinite():
            raise UserError(f"finetune: the loss is {loss.item()} at step {done + 1}; lower --learning-rate")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate(done, settings)
        self._optimizer.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def _loss(self, batch: Tensor) -> Tensor:
        with self._mixed:
            logits = self._model(input_ids=batch, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Writes adapters, moments and losses; `facts` say what the file is of. UserError where it cannot."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self._parameters.items():
            tensors[name] = parameter.detach()
            tensors |= {f"{name} {moment}": self._optimizer.state[parameter][moment] for moment in MOMENTS}
        write_out(path, save({name: tensor.cpu() for name, tensor in tensors.items()}, facts))

    @torch.no_grad()
    def restore(self, path: Path, facts: dict[str, str]) -> None:
        """Goes on from a file that `save` has written; UserError if it is of something else."""
        try:
            with safe_open(path, "pt", device=str(self._device)) as stored:
                differing = [key for key, value in facts.items() if (stored.metadata() or {}).get(key) != value]
                if differing:
                    raise UserError(
                        f"{path}: was begun with another {differing[0]}; give the same options again, or remove it"
                    )
                self.losses = stored.get_tensor("losses").tolist()
                for name, parameter in self._parameters.items():
                    parameter.copy_(stored.get_tensor(name))
                    moments = {moment: stored.get_tensor(f"{name} {moment}") for moment in MOMENTS}
                    self._optimizer.state[parameter] = {"step": torch.tensor(float(len(self.losses))), **moments}
        except SafetensorError:
            raise UserError(f"{path}: is not what an earlier run has left; remove it") from None


def order(windows: int, settings: Settings) -> Tensor:
    """Which window comes when [steps × batch]: all once in a random order, then again in another."""
    generator = torch.Generator().manual_seed(settings.seed)
    needed = settings.steps * settings.batch
    rounds = [torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))]
    return torch.cat(rounds)[:needed]


def rate(done: int, settings: Settings) -> float:
    """Learning rate of the step after so many."""
    warm = math.ceil(WARM_UP * settings.steps)
    if done < warm:
        return settings.learning_rate * (done + 1) / warm
    return settings.learning_rate * (1 + math.cos(math.pi * (done - warm) / (settings.steps - warm))) / 2


def must_recompute(checkpoint: Checkpoint, settings: Settings) -> bool:
    """Whether blocks are to be computed again in the backward pass; UserError if memory is too small even so."""
    free = free_memory(checkpoint.device)
    if bytes_needed(checkpoint, settings, recompute=False) < SHARE * free:
        return False
    needed = bytes_needed(checkpoint, settings, recompute=True)
    if needed > free:
        raise UserError(
            f"finetune: needs about {needed / GIB:.1f} GiB beside the weights, {free / GIB:.1f} GiB are free; lower "
            "--batch, --tokens or --rank, or take a larger device"
        )
    return True


def bytes_needed(checkpoint: Checkpoint, settings: Settings, recompute: bool) -> int:
    """Rough bytes beside the weights: adapters, summed weights and activations of all blocks or of one, logits."""
    config, tokens = checkpoint.config.get_text_config(), settings.batch * settings.tokens
    widths = [[x.in_features + x.out_features for x in linears if x.expert is None] for linears in checkpoint.linears]
    sizes = [sum(x.size for x in linears if x.expert is None) for linears in checkpoint.linears]
    adapters = settings.rank * sum(map(sum, widths)) * ADAPTER_BYTES
    blocks = [size * WEIGHT_BYTES + tokens * sum(w) * 8 for size, w in zip(sizes, widths, strict=True)]
    kept = max(blocks) + len(blocks) * tokens * config.hidden_size * 4 if recompute else sum(blocks)
    return int(adapters + kept + tokens * config.vocab_size * LOGIT_BYTES)


def check_length(checkpoint: Checkpoint, tokens: int) -> None:
    """UserError if windows are longer than a model has positions."""
    positions = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"--tokens {tokens}: the model has {positions} positions; lower it")


def stored_format(folder: Path) -> torch.dtype:
    """The number format that rounds no weight of a folder: bfloat16 if all are stored in it, else float32."""
    kinds = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as tensors:
            kinds |= {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - it is no mapping
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def facts_of(settings: Settings, **contents: str) -> dict[str, str]:
    """What decides a run, by the name of its option."""
    named = {key.replace("_", "-"): json.dumps(value) for key, value in settings.model_dump().items()}
    return {**named, **contents}
