"""Quantized weights in full numbers, one tensor at a time: a model of any size is read back on any machine.

    FP8      W[i, j] = Q[i, j] S[i // a, j // b]            Q: float8; tiles a × b of `weight_block_size`, or S's own
    MXFP8    the same, tiles of 1 × 32, with S = 2^(E − 127) for a byte E
    MXFP4    W[.., 32 g + k, i] = F[Q[.., i, g, k]] 2^(E[.., i, g] − 127)     Q: 4 bits, two a byte, the low ones first
    LLM.int8 W[i, j] = Q[i, j] S[i] / 127                   Q: int8; bitsandbytes, 8 bits
    NF4, FP4 W[n] = M[Q[n]] A[n // b]                       Q: 4 bits, the high ones first; bitsandbytes, 4 bits
             A[m] = N[B[m]] C[m // c] + o                   where A itself is stored in bytes B ("double" or nested)

F are the sixteen numbers of E2M1, M and N tables of the file; n runs over a matrix row by row. The last tiles and
blocks may be cut off. Products are in float32, and are stored in the config's dtype, bf16 where it names none. Sources:
DeepSeek-V3, `fp8_cast_bf16.py`; OCP Microscaling Formats v1.0, section 5; transformers' `integrations.finegrained_fp8`
and `mxfp4`, which keep names and shapes so; Dettmers et al., 2022 (LLM.int8) and 2023 (QLoRA), and `bitsandbytes`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.checkpoints.devices import DTYPES
from atp_tune.checkpoints.headers import read_header
from atp_tune.checkpoints.quantized import FULL, parts_of, quantization_of, scales_of, without_quantization
from atp_tune.checkpoints.trust import read_table
from atp_tune.errors import UserError

INDEX = "model.safetensors.index.json"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_OF_ACTIVATIONS = ("activation_scale", "input_scale")


@dataclass(frozen=True)
class Stored:
    """The tensors of a quantized folder: where each lies, how it is stored, and what belongs together."""

    folder: Path

    @cached_property
    def files(self) -> list[Path]:
        """Its weight files: those of the index, if there is one."""
        index = self.folder / INDEX
        names = set(read_table(index)["weight_map"].values()) if index.is_file() else None
        return [file for file in sorted(self.folder.glob("*.safetensors")) if names is None or file.name in names]

    @cached_property
    def places(self) -> dict[str, tuple[Path, str]]:
        """File and number format of each tensor."""
        return {name: (file, entry["dtype"]) for file in self.files for name, entry in read_header(file).items()}

    @cached_property
    def beside(self) -> dict[str, list[str]]:
        """Names of what each quantized tensor is read with, its scales first."""
        inner: dict[str, list[str]] = {}
        for name in self.places:
            module, within, _ = name.partition(".weight.")
            if within:
                inner.setdefault(f"{module}.weight", []).append(name)
        codes = (name for name, (_, kind) in self.places.items() if kind not in FULL)
        found = {name: inner.get(name) or self._scales(name) for name in codes}
        return {name: others for name, others in found.items() if others}

    def _scales(self, name: str) -> list[str]:
        names = [f"{name.removesuffix('_blocks')}_scales"] if name.endswith("_blocks") else scales_of(name)
        found = [scale for scale in names if scale in self.places][:1]
        form = f"{name.rpartition('.')[0]}.weight_format"
        return [*found, form] if found and found[0].endswith(".SCB") and form in self.places else found

    def get(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        with safe_open(self.places[name][0], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    @cached_property
    def used(self) -> set[str]:
        """Names of what other tensors are read with."""
        return {other for others in self.beside.values() for other in others}

    def check(self) -> None:
        """UserError if codes have no scales, or scales no codes."""
        used = self.used
        for name, (_, kind) in self.places.items():
            coded = kind[:2] in ("F8", "F4", "F6", "I8", "U8") or (kind not in FULL and name.endswith(".weight"))
            if coded and name not in self.beside and name not in used:
                raise UserError(f"model.source: {self.folder} has {name} as {kind} without its scales")
            if name.endswith(("_scale_inv", "weight_scale", ".qscale_weight")) and name not in used:
                raise UserError(f"model.source: {self.folder} has scales ({name}) without their weights")


def dequantize_folder(source: Path, target: Path) -> None:
    """Writes the weights of a folder in full numbers into `target`, file by file, with its config and its index.

    Errors: UserError where something is stored in a way that is not known.
    """
    stored, config = Stored(source), read_table(source / "config.json")
    stored.check()
    index: dict[str, str] = {}
    for file in stored.files:
        tensors = dict(_full(stored, file, config))
        save_file(tensors, target / file.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
    if (source / INDEX).is_file():
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    (target / "config.json").write_text(json.dumps(without_quantization(config), indent=2))


def _full(stored: Stored, file: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor that a file holds when it is in full numbers."""
    table, dtype = quantization_of(config) or {}, _dtype(config)
    for name in read_header(file):
        if name in stored.used or name.rpartition(".")[2] in _OF_ACTIVATIONS:
            continue
        if name not in stored.beside:
            yield name, stored.get(name)
            continue
        try:
            full = _dequantized(stored, name, table, dtype)
        except (ValueError, KeyError) as error:
            raise UserError(f"model.source: {stored.folder} has {name} in a form that is not known: {error}") from None
        yield name.removesuffix("_blocks"), full.contiguous()


def _dequantized(stored: Stored, name: str, table: dict[str, Any], dtype: torch.dtype) -> Tensor:
    codes, first = stored.get(name), stored.beside[name][0]
    if first.startswith(f"{name}."):
        parts = {other.removeprefix(f"{name}."): stored.get(other) for other in stored.beside[name]}
        return from_4bit(codes, parts).to(dtype)
    scales = stored.get(first)
    if first.endswith(".SCB"):
        if any(stored.get(form).any() for form in stored.beside[name][1:]):
            raise ValueError("sorted for one kind of GPU (weight_format)")
        return (codes.float() * scales[:, None] / 127).to(dtype)
    read, dims = (from_mxfp4, 3) if name.endswith("_blocks") else (partial(from_fp8, table=table), 2)
    if codes.dim() > dims and scales.dim():  # expert by expert: products in float32 are large
        return torch.stack([read(*one).to(dtype) for one in zip(codes, scales, strict=True)])
    return read(codes, scales).to(dtype)


def from_fp8(codes: Tensor, scales: Tensor, table: dict[str, Any]) -> Tensor:
    """W [.., out, in] in float32; `table`: the `quantization_config`. ValueError where the tiles do not fit."""
    if codes.dtype == torch.int8:
        if table.get("expert_dtype") != "fp4":
            raise ValueError("8-bit integers")
        values = _from_e2m1(codes.view(torch.uint8))
    elif not codes.is_floating_point():
        raise ValueError(f"codes of {str(codes.dtype).removeprefix('torch.')}")
    else:
        values = codes.float()
    scales = _powers(scales) if scales.dtype == torch.uint8 else scales.float()
    scales = scales.reshape(scales.shape + (1,) * (values.dim() - scales.dim()))
    usual = (1, 32) if table.get("quant_method") == "mxfp8" else (128, 128)
    block = table.get("weight_block_size", usual) or (0, 0)
    for dim in (-2, -1):
        size, count = values.shape[dim], scales.shape[dim]
        scales = scales.repeat_interleave(_tile(size, count, block[dim]), dim).narrow(dim, 0, size)
    return values * scales


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """W [.., in, out] in float32 of blocks [.., out, in / 32, 16] and scales [.., out, in / 32]; else ValueError."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"blocks {list(blocks.shape)}, scales {list(scales.shape)}")
    values = _from_e2m1(blocks) * _powers(scales)[..., None]
    return values.flatten(-2).transpose(-1, -2)


def from_4bit(codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """W [out, in] in float32 of bitsandbytes' bytes and what it keeps beside them; KeyError where something lacks."""
    states = [tensor for name, tensor in parts.items() if name.startswith("quant_state.")]
    if len(states) != 1:
        raise ValueError("no quant_state, or several")
    said = json.loads(bytes(states[0].tolist()))
    scales = parts["absmax"]
    if scales.dtype == torch.uint8:
        bytes_ = parts["nested_quant_map"][scales.int()]
        scales = _by_blocks(bytes_, parts["nested_absmax"], said["nested_blocksize"]) + said["nested_offset"]
    packed = codes.flatten()
    values = parts["quant_map"][torch.stack([packed >> 4, packed & 15], -1).int().flatten()]
    shape = torch.Size(said["shape"])
    return _by_blocks(values[: shape.numel()], scales, said["blocksize"]).reshape(shape)


def _by_blocks(values: Tensor, scales: Tensor, block: int) -> Tensor:
    return values * scales.repeat_interleave(block)[: len(values)]


def _tile(size: int, count: int, block: int) -> int:
    """Length of a tile where `count` of them, the last perhaps cut off, cover `size`."""
    if block and -(-size // block) == count:
        return block
    if count == 0 or size % count:
        raise ValueError(f"{count} scales for {size} values")
    return size // count


def _from_e2m1(packed: Tensor) -> Tensor:
    """Numbers of four bits, two a byte, the low ones first; the last dimension is twice as long."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return table[torch.stack([packed & 15, packed >> 4], -1).int()].flatten(-2)


def _powers(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)


def _dtype(config: dict[str, Any]) -> torch.dtype:
    """The number format of a config, or of the language model in it."""
    names = [str(part.get(key)) for part in parts_of(config) for key in ("dtype", "torch_dtype")]
    return next((DTYPES[name] for name in names if name in DTYPES), torch.bfloat16)
