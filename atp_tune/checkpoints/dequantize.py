"""Dequantizes weights one tensor at a time, so that a model of any size can be converted.

    FP8      W[i, j] = Q[i, j] S[i // a, j // b]            Q: float8; tiles a × b of `weight_block_size`, or S's own
    MXFP8    the same, tiles of 1 × 32, with S = 2^(E − 127) for a byte E
    MXFP4    W[.., 32 g + k, i] = F[Q[.., i, g, k]] 2^(E[.., i, g] − 127)     Q: 4 bits, two per byte, low bits first
    LLM.int8 W[i, j] = Q[i, j] S[i] / 127                   Q: int8; bitsandbytes, 8 bits
    NF4, FP4 W[n] = M[Q[n]] A[n // b]                       Q: 4 bits, high bits first; bitsandbytes, 4 bits
             A[m] = N[B[m]] C[m // c] + o                   if A itself is quantized to bytes B (double quantization)

F are the sixteen numbers of E2M1; M and N are tables in the file; n goes through a matrix row by row. The last tiles
and blocks may be incomplete. Products are in float32, and are stored in the dtype of the config, by default bf16.
Sources: DeepSeek-V3, `fp8_cast_bf16.py`; OCP Microscaling Formats v1.0, section 5; names and shapes from transformers'
`integrations.finegrained_fp8` and `mxfp4`; Dettmers et al., 2022 (LLM.int8) and 2023 (QLoRA), and `bitsandbytes`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.checkpoints.devices import DTYPES
from atp_tune.checkpoints.files import (
    FULL,
    Table,
    find_quantization,
    nested_configs,
    read_header,
    read_table,
    scale_names,
    without_quantization,
    write_table,
)
from atp_tune.errors import UserError

INDEX = "model.safetensors.index.json"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_OF_ACTIVATIONS = ("activation_scale", "input_scale")


@dataclass(frozen=True)
class Stored:
    """The tensors of a quantized folder: their files and dtypes, and the tensors that each needs for dequantization."""

    folder: Path

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, those of the index if there is one."""
        index = self.folder / INDEX
        names = set(read_table(index)["weight_map"].values()) if index.is_file() else None
        return [file for file in sorted(self.folder.glob("*.safetensors")) if names is None or file.name in names]

    @cached_property
    def entries(self) -> dict[str, tuple[Path, str]]:
        """File and dtype of each tensor."""
        return {name: (file, entry["dtype"]) for file in self.files for name, entry in read_header(file).items()}

    @cached_property
    def beside(self) -> dict[str, list[str]]:
        """For each quantized tensor, the names of the tensors that dequantize it, its scales first."""
        inner = dict[str, list[str]]()
        for name in self.entries:
            module, within, _ = name.partition(".weight.")
            if within:
                inner.setdefault(f"{module}.weight", []).append(name)
        scales = {
            name: inner.get(name) or self._scales(name) for name, (_, kind) in self.entries.items() if kind not in FULL
        }
        return {name: others for name, others in scales.items() if others}

    def _scales(self, name: str) -> list[str]:
        names = [f"{name.removesuffix('_blocks')}_scales"] if name.endswith("_blocks") else scale_names(name)
        scales = [scale for scale in names if scale in self.entries][:1]
        form = f"{name.rpartition('.')[0]}.weight_format"
        return [*scales, form] if scales and scales[0].endswith(".SCB") and form in self.entries else scales

    def get(self, name: str) -> Tensor:
        """A stored tensor."""
        with safe_open(self.entries[name][0], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    @cached_property
    def used(self) -> set[str]:
        """Names of all tensors that dequantize others."""
        return {other for others in self.beside.values() for other in others}

    def check(self) -> None:
        """UserError if a quantized tensor has no scales, or scales have no tensor."""
        used = self.used
        for name, (_, kind) in self.entries.items():
            coded = kind[:2] in ("F8", "F4", "F6", "I8", "U8") or (kind not in FULL and name.endswith(".weight"))
            if coded and name not in self.beside and name not in used:
                raise UserError(f"model.source: {self.folder} has {name} as {kind} without its scales")
            if name.endswith(("_scale_inv", "weight_scale", ".qscale_weight")) and name not in used:
                raise UserError(f"model.source: {self.folder} has scales ({name}) without their weights")


def dequantize_folder(source: Path, target: Path) -> None:
    """Writes the dequantized weights of a folder to `target`, file by file, with config and index.

    Errors: UserError for an unknown form of storage.
    """
    stored, config = Stored(source), read_table(source / "config.json")
    stored.check()
    index = dict[str, str]()
    for file in stored.files:
        tensors = dict(_full(stored, file, config))
        save_file(tensors, target / file.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file.name)
    if (source / INDEX).is_file():
        write_table(target / INDEX, {"metadata": {}, "weight_map": index})
    write_table(target / "config.json", without_quantization(config))


def _full(stored: Stored, file: Path, config: Table) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the dequantized tensors of a file."""
    # The dtype in a config or in its parts; bf16 if there is none.
    names = [str(part.get(key)) for part in nested_configs(config) for key in ("dtype", "torch_dtype")]
    table = find_quantization(config) or {}
    dtype = next((DTYPES[name] for name in names if name in DTYPES), torch.bfloat16)
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


def _dequantized(stored: Stored, name: str, table: Table, dtype: torch.dtype) -> Tensor:
    codes, first = stored.get(name), stored.beside[name][0]
    if first.startswith(f"{name}."):
        parts = {other.removeprefix(f"{name}."): stored.get(other) for other in stored.beside[name]}
        # W [out, in] in float32 from the bytes of bitsandbytes and its other tensors; KeyError if one is missing.
        states = [tensor for name, tensor in parts.items() if name.startswith("quant_state.")]
        if len(states) != 1:
            raise ValueError("no quant_state, or several")
        state = json.loads(bytes(states[0].tolist()))
        scales = parts["absmax"]
        if scales.dtype == torch.uint8:
            values = parts["nested_quant_map"][scales.int()]
            scales = _by_blocks(values, parts["nested_absmax"], state["nested_blocksize"]) + state["nested_offset"]
        packed = codes.flatten()
        values = parts["quant_map"][torch.stack([packed >> 4, packed & 15], -1).int().flatten()]
        shape = torch.Size(state["shape"])
        return _by_blocks(values[: shape.numel()], scales, state["blocksize"]).reshape(shape).to(dtype)
    scales = stored.get(first)
    if first.endswith(".SCB"):
        if any(stored.get(form).any() for form in stored.beside[name][1:]):
            raise ValueError("sorted for one kind of GPU (weight_format)")
        return (codes.float() * scales[:, None] / 127).to(dtype)
    read, dims = (from_mxfp4, 3) if name.endswith("_blocks") else (partial(from_fp8, table=table), 2)
    if codes.dim() > dims and scales.dim():  # expert by expert to save memory
        return torch.stack([read(*one).to(dtype) for one in zip(codes, scales, strict=True)])
    return read(codes, scales).to(dtype)


def from_fp8(codes: Tensor, scales: Tensor, table: Table) -> Tensor:
    """W [.., out, in] in float32; `table`: the `quantization_config`. ValueError if the tiles do not fit."""
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
        size, count, tile = values.shape[dim], scales.shape[dim], block[dim]
        if not tile or -(-size // tile) != count:  # so that `count` tiles, the last perhaps incomplete, cover `size`
            if count == 0 or size % count:
                raise ValueError(f"{count} scales for {size} values")
            tile = size // count
        scales = scales.repeat_interleave(tile, dim).narrow(dim, 0, size)
    return values * scales


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """W [.., in, out] in float32, from blocks [.., out, in / 32, 16] and scales [.., out, in / 32]; else ValueError."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"blocks {list(blocks.shape)}, scales {list(scales.shape)}")
    values = _from_e2m1(blocks) * _powers(scales)[..., None]
    return values.flatten(-2).transpose(-1, -2)


def _by_blocks(values: Tensor, scales: Tensor, block: int) -> Tensor:
    return values * scales.repeat_interleave(block)[: len(values)]


def _from_e2m1(packed: Tensor) -> Tensor:
    """Unpacks E2M1 numbers, two per byte, low bits first; the last dimension doubles."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return table[torch.stack([packed & 15, packed >> 4], -1).int()].flatten(-2)


def _powers(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
