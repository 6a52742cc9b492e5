"""Tiny checkpoints as they are published quantized, and the plainest way to read them back: loops over the format."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
F4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def read(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write(folder: Path, tensors: Tensors, table: Any, **changes: Any) -> None:
    """Replaces a folder's weights, and says in its config how they are stored."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    said = {} if table is None else {"quantization_config": table}
    (folder / "config.json").write_text(json.dumps({**config, **said, **changes}))


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or (name.endswith("_mqa.weight"))


def pair(dense: Path, how: Callable[[Path, Tensors], Tensors], dtype: torch.dtype | None = None) -> tuple[Path, Path]:
    """Folders `quantized` and `plain` beside a dense one; `how` writes the first and returns its numbers."""
    quantized, plain = dense.parent / "quantized", dense.parent / "plain"
    for folder in (quantized, plain):
        shutil.copytree(dense, folder)
    numbers = how(quantized, read(dense))
    write(plain, {name: tensor.to(dtype or tensor.dtype) for name, tensor in numbers.items()}, None)
    return quantized, plain


# FP8


def fp8(weight: Tensor, tile: tuple[int, int], bytes_: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, cut into tiles from its first row and column on."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(math.ceil(rows / tile[0]), math.ceil(columns / tile[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1])
            scale = weight[here].float().abs().max() / 448
            scales[i, j] = 2.0 ** math.ceil(math.log2(scale)) if bytes_ else scale
            codes[here] = (weight[here].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, (scales.log2().round() + 127).to(torch.uint8) if bytes_ else scales


def from_fp8(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    factors = ((scales.double() - 127).exp2() if scales.dtype == torch.uint8 else scales).tolist()
    rows = codes.float().tolist()
    return torch.tensor(
        [[code * factors[i // tile[0]][j // tile[1]] for j, code in enumerate(row)] for i, row in enumerate(rows)]
    )


def as_fp8(
    tile: tuple[int, int], table: dict[str, Any], suffix: str = ".weight_scale_inv", bytes_: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Path, Tensors], Tensors]:  # fmt: skip
    def how(folder: Path, tensors: Tensors) -> Tensors:
        stored, numbers = dict(tensors), dict(tensors)
        for name in filter(is_linear, tensors):
            codes, scales = fp8(tensors[name], tile, bytes_)
            stored |= {name: codes, name.removesuffix(".weight") + suffix: scales}
            numbers[name] = from_fp8(codes, scales, tile).to(dtype)
        write(folder, stored, table)
        return numbers

    return how


def fp8_table(tile: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(tile), **more}


# MXFP4


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [.., out, in / 32, 16] and scales [.., out, in / 32] of [.., in, out]: 32 inputs share an exponent."""
    groups = weight.float().transpose(-1, -2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1).log2().floor() - 2).clamp(min=-126)
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled[..., None] - torch.tensor(F4)).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, in, out], byte by byte."""
    numbers = [
        [
            [F4[half] * 2.0 ** (scale - 127) for group, scale in zip(*row, strict=True) for half in halves(group)]
            for row in zip(*expert, strict=True)
        ]
        for expert in zip(blocks.tolist(), scales.tolist(), strict=True)
    ]
    return torch.tensor(numbers).transpose(1, 2)


def halves(group: list[int]) -> list[int]:
    """Two codes a byte, the lower one first."""
    return [half for byte in group for half in (byte % 16, byte // 16)]


def as_mxfp4(folder: Path, tensors: Tensors) -> Tensors:
    stored, numbers = dict(tensors), dict(tensors)
    for name in [
        name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj")
    ]:
        blocks, scales = mxfp4(stored.pop(name))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers[name] = from_mxfp4(blocks, scales)
    write(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return numbers


# bitsandbytes

BLOCK, OUTER, OFFSET = 64, 256, 0.03


def as_int8(folder: Path, tensors: Tensors) -> Tensors:
    stored, numbers = dict(tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        module, most = name.removesuffix(".weight"), tensors[name].float().abs().amax(-1)
        codes = (tensors[name].float() / most[:, None] * 127).round().to(torch.int8)
        stored |= {name: codes, f"{module}.SCB": most, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        numbers[name] = torch.stack([row.float() * s / 127 for row, s in zip(codes, most, strict=True)])
    write(folder, stored, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False})
    return numbers


# Formats that transformers reads


def as_metal(bits: int, group: int) -> Callable[[Path, Tensors], Tensors]:
    """W = s q + b for groups of inputs; codes lie in words of 32 bits, the first one lowest."""

    def how(folder: Path, tensors: Tensors) -> Tensors:
        stored, numbers = dict(tensors), dict(tensors)
        for name in filter(is_linear, tensors):
            module, grouped = name.removesuffix(".weight"), tensors[name].float().unflatten(-1, (-1, group))
            low, high = grouped.amin(-1), grouped.amax(-1)
            scales = (high - low) / (2**bits - 1)
            codes = ((grouped - low[..., None]) / scales[..., None]).round().flatten(-2).int()
            words = codes.unflatten(-1, (-1, 32 // bits))
            packed = sum(words[..., k].long() << bits * k for k in range(32 // bits))
            assert isinstance(packed, Tensor)
            stored |= {name: packed.to(torch.uint32), f"{module}.scales": scales, f"{module}.qbiases": low}
            numbers[name] = (codes.unflatten(-1, (-1, group)) * scales[..., None] + low[..., None]).flatten(-2)
        write(folder, stored, {"quant_method": "metal", "bits": bits, "group_size": group})
        return numbers

    return how
