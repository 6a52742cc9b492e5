"""The pruned linears of a model, kept while its blocks pass by, so that the model can then be run as a whole."""

from collections.abc import Callable, Iterable, Iterator
from typing import Self

from torch import Tensor

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory, host_memory
from atp_tune.errors import UserError
from atp_tune.plan import Plan
from atp_tune.run.session import Session
from atp_tune.scores.evaluation import Block

ROOM = 0.5  # share of the device's free memory for a pruned copy of the linears


class KeptBlocks:
    """A second copy of the linears: in host memory while blocks pass by, then on the device if it has room.

    So work in between has as much of the device's memory as without the copy.
    """

    def __init__(self, checkpoint: Checkpoint, what: str, instead: str) -> None:
        """UserError if memory is too small; it names `what` needs the copy, and the command that needs none."""
        self._checkpoint = checkpoint
        self._blocks: list[dict[str, Tensor]] = []
        self._needed = sum(checkpoint.sizes) * checkpoint.dtype.itemsize
        self._on_host = self._needed <= host_memory()
        if not self._on_host and not self._fits_on_device():
            raise UserError(
                f"{what}: a pruned copy needs {self._needed / 1024**3:.1f} GiB beside the dense model; write it with "
                f"`apply`, then {instead}"
            )

    def follow(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yields blocks after keeping their linears."""
        for index, weights in blocks:
            own = {linear.key: weights[linear.key] for linear in self._checkpoint.linears[index]}
            self._blocks.append({key: tensor.cpu() for key, tensor in own.items()} if self._on_host else own)
            yield index, weights

    def settle(self) -> Self:
        """Moves the linears to the device if they fit there beside the dense ones."""
        if self._fits_on_device():
            device = self._checkpoint.device
            self._blocks = [{key: tensor.to(device) for key, tensor in own.items()} for own in self._blocks]
        return self

    def weights(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block on the compute device."""
        device, own = self._checkpoint.device, self._blocks[index]
        return {**self._checkpoint.weights(index), **{key: tensor.to(device) for key, tensor in own.items()}}

    def _fits_on_device(self) -> bool:
        return self._checkpoint.offload == "none" and self._needed < ROOM * free_memory(self._checkpoint.device)


def prune_whole(context: Session, plan: Plan, what: str, instead: str) -> Callable[[int], dict[str, Tensor]]:
    """Prunes the model to a plan; the returned function gives a block's tensors on the compute device.

    UserError if memory is too small for a second copy of the linears: see `KeptBlocks`.
    """
    kept = KeptBlocks(context.checkpoint, what, instead)
    for _ in kept.follow((block.index, block.weights) for block in context.prune(plan)):
        pass
    return kept.settle().weights
