"""Memory that training needs beside the weights of the sparse model, and whether blocks must be recomputed for it."""

from dataclasses import dataclass

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import GIB, free_memory
from atp_tune.errors import UserError
from atp_tune.sparse.provenance import Settings

SHARE = 0.5  # of free memory; if a step needs more, the backward pass recomputes blocks
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
    checkpoint: Checkpoint, settings: Settings, positions: int | None = None, teacher: int = 0
) -> MemoryNeeded:
    """The memory of a run, with recomputed blocks if it is short; UserError if it is too small even then.

    `positions`: hidden states of an image in the first block, of an image classifier; `teacher`: bytes of the dense
    model's weights, which are not loaded yet.
    """
    free = free_memory(checkpoint.device)
    for recompute in (False, True):
        needed = bytes_needed(checkpoint, settings, recompute, positions) + teacher
        if needed < (1 if recompute else SHARE) * free:
            return MemoryNeeded(needed, free, recompute)
    dense = f", with {teacher / GIB:.1f} GiB of the dense model" if teacher else ""
    raise UserError(
        f"finetune: needs {MemoryNeeded(needed, free, True)}{dense}; lower "
        f"--batch{', --seqlen' * (settings.seqlen is not None)}{' or --rank' * (settings.rank is not None)}, "
        "or take a larger device"
    )


def bytes_needed(checkpoint: Checkpoint, settings: Settings, recompute: bool, positions: int | None = None) -> int:
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
