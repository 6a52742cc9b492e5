"""Codes of rounded weights on their way from the pass over the blocks to a packed folder.

The sparse checkpoint that is packed gets the weights that the codes give, with scales of 16 bits, so that packing it
changes nothing, and its perplexity is that of the packed folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError
from atp_tune.packed.codes import Coded, Parts, encode, spread
from atp_tune.quantizers.grid import Grid
from atp_tune.spec.quantize import QuantizeConfig


class Codes:
    """The codes of each rounded tensor of a checkpoint, by its name on the disk, in files of the folder `place`."""

    def __init__(self, place: Path, quantize: QuantizeConfig) -> None:
        self._place, self._quantize = place, quantize
        self._known: dict[str, tuple[Path, Coded]] = {}  # where their parts are, and the rest
        self._stored = set[str]()

    def save(self, checkpoint: Checkpoint, block: PrunedBlock, key: str) -> dict[str, Tensor]:
        """Keeps the codes of a tensor of a block, and returns the weights that they give, by name on the disk: the
        rounded ones bit for bit, but for the 16 bits of the scales. UserError if codes cannot give them.
        """
        linears = [linear for linear in checkpoint.linears[block.index] if linear.key == key]
        name, turned = checkpoint.key(block.index, linears[0]), linears[0].transposed
        ways = (block.weights[key].cpu(), *_of_weights(self._quantize.group_size, block, linears, block.weights[key]))
        weights, *grids = (checkpoint.as_saved(name, tensor) for tensor in ways)
        found: dict[str, Tensor] = {}
        for part, weight in weights.items():
            try:
                coded = _encoded([weight, *(grid[part] for grid in grids)], self._quantize, turned)
            except ValueError as error:
                raise UserError(f"--packed: {part} cannot be stored as codes: {error}") from None
            found[part] = coded.decoded()
            file = self._place / f"{len(self._known)}.safetensors"
            save_file(coded.parts, file)
            self._known[part] = file, replace(coded, parts=Parts())
        return found

    def find(self, names: tuple[str, ...]) -> Coded | None:
        """The codes of a tensor by the names that it may have; None if it was not rounded."""
        name = next((name for name in names if name in self._known), None)
        if name is None:
            return None
        self._stored.add(name)
        file, coded = self._known[name]
        return replace(coded, parts=Parts(load_file(file)))

    def check_all_stored(self) -> None:
        """UserError if a rounded tensor was not asked for."""
        if lacking := self._known.keys() - self._stored:
            raise UserError(f"--packed: the checkpoint has no tensor {min(lacking)}, whose codes are to be stored")

    def in_memory(self, fits: bool) -> dict[str, Any]:
        """How linears that stay packed in memory are kept there, by the keys of a config's table: as int8 values if
        their codes fit, else as floats.
        """
        size = self._quantize.group_size
        return {"values": "int8" if fits else "same", "group_size": size if fits and size != -1 else None}


def _of_weights(group_size: int, block: PrunedBlock, linears: list[Linear], weights: Tensor) -> tuple[Tensor, ...]:
    """Scale, zero point and bits of each weight of a tensor, so that they go the way of the weights to the disk."""
    scales, zeros, bits = (torch.empty(weights.shape) for _ in range(3))
    for linear in linears:
        grid, columns = block.grids[linear.name], linear.in_features
        size = columns if group_size == -1 else group_size
        linear.matrix(scales).copy_(spread(grid.scale.cpu(), size, columns))
        linear.matrix(zeros).copy_(spread(grid.zero.cpu(), size, columns))
        linear.matrix(bits).fill_(block.bits[linear.name])
    return scales, zeros, bits


def _encoded(saved: list[Tensor], quantize: QuantizeConfig, turned: bool) -> Coded:
    """The codes of weights; ValueError if groups of consecutive inputs do not share scales, zero points and bits.

    saved: weights, and scale, zero point and bits of each, [..., rows, columns], or if `turned` the other way round.
    """
    weight, scales, zeros, bits = (tensor.mT if turned else tensor for tensor in saved)
    columns = weight.shape[-1]
    size = columns if quantize.group_size == -1 else quantize.group_size
    groups = [part[..., ::size].contiguous() for part in (scales, zeros)]
    again = [spread(part, size, columns) for part in groups]
    if not all(torch.equal(*pair) for pair in zip(again, (scales, zeros), strict=True)):
        raise ValueError("its columns lie in another order there")
    width = int(bits.max())
    if int(bits.min()) != width:
        raise ValueError("its experts have different numbers of bits")
    grid = Grid(groups[0], groups[1], float(2**width - 1))
    return encode(weight.contiguous(), grid, width, quantize.group_size, quantize.symmetric, turned)
