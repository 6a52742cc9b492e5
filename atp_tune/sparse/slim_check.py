"""Compares a slim model with the masked one, which has zeros in the place of the channels that are gone.

Both compute the logits of a small batch from their folders, in float32 if that fits into memory: the weights are the
same numbers in both, so that only the order of sums differs. In 16 bits it would hide a difference of some per cent.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.classes import classifies_images
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.checkpoints.devices import free_memory, host_memory
from atp_tune.checkpoints.offload import FITS
from atp_tune.errors import UserError
from atp_tune.events import Message
from atp_tune.run.session import Session

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}  # relative difference of logits, by dtype
LOOSE = 0.05  # of others
POSITIONS = 12  # of the batch that both models compute


@torch.inference_mode()
def check_equal(context: Session, masked: Path, slim: Path) -> None:
    """UserError if the slim model's logits, with and without a cache, differ from those of the masked model.

    A message says what could not be compared, or not closely.
    """
    dtype = _dtype(context.checkpoint)
    tolerance = TOLERANCES.get(dtype, LOOSE)
    if dtype not in TOLERANCES:
        name = str(dtype).removeprefix("torch.")
        said = f"float32 does not fit into memory: compared in {name}, where {tolerance:.0%} of difference passes"
        context.watch(Message(f"--slim: {said}"))
    expected = _logits(context, masked, dtype)[0]
    has_cache = not classifies_images(slim)
    logits, cached, reason = _logits(context, slim, dtype, has_cache)
    if cached is None and has_cache:
        context.watch(Message(f"--slim: not compared with cached keys and values: {reason}"))
    for what, found in (("without", logits), ("with", cached)):
        if found is None:
            continue
        difference = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not difference <= tolerance:
            raise UserError(
                f"--slim: {type(context.checkpoint.model).__name__} computes other logits once its channels are cut "
                f"({what} cached keys: {difference:.2g} apart); `apply` without --slim writes it"
            )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the comparison: float32 in the place of one of 16 bits, if such a model fits beside this one."""
    if checkpoint.dtype in TOLERANCES:
        return checkpoint.dtype
    size = 4 * sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return torch.float32 if size <= FITS * min(free_memory(checkpoint.device), host_memory()) else checkpoint.dtype


def _logits(
    context: Session, folder: Path, dtype: torch.dtype, cached: bool = False
) -> tuple[Tensor, Tensor | None, str]:
    """Logits of a folder's model for a small batch, and if `cached` also with cached keys, or the reason for none."""
    try:
        with quiet("transformers"), Checkpoint.load(folder, dtype, context.checkpoint.device) as checkpoint:
            replay = Replay(checkpoint, context.inputs)
            _, batch, _ = context.inputs.examples(checkpoint, 1, POSITIONS)
            if checkpoint.offload != "none":
                hidden = replay.embed(batch)
                for index in range(len(checkpoint.blocks)):
                    hidden = replay.run(index, checkpoint.weights(index), hidden)
                return replay.logits(batch, hidden).cpu(), None, "the blocks are copied to the device one by one"
            found = replay.forward(batch).logits.cpu()
            return found, _cached(checkpoint.model, batch) if cached else None, "the model keeps none"
    except UserError:
        raise
    except Exception as error:  # models raise many types for shapes that do not fit
        raise UserError(f"--slim: this model cannot run with fewer channels: {one_line(error)}") from error


def _cached(model: Any, batch: Tensor) -> Tensor | None:
    """Logits for token ids [items, positions], half of them first, the others after their cached keys and values.

    None for a model that keeps none.
    """
    half = batch.shape[1] // 2
    first = model(batch[:, :half], use_cache=True)
    if getattr(first, "past_key_values", None) is None:
        return None
    second = model(batch[:, half:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], 1).cpu()
