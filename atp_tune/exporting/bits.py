"""Recipes of a configuration that rounds weights, for what stores the bits themselves.

llm-compressor  one modifier, with a group of its configuration for each number of bits. GPTQ: `GPTQModifier`, whose
                grids are those of the dense weights (also in act-order "weight"); RTN: `QuantizationModifier` with
                the observer `memoryless_minmax`. In float32 its weights are those of `apply`; in bfloat16 it computes
                scales and levels in bfloat16, and some weights are on another level.
gptqmodel       arguments of `QuantizeConfig`; `dynamic` has the bits of each block, or of each linear. It quantizes no
                linears outside of the blocks. A pattern for them, "-:", would be tried before all others.
torchao         a Python script with a `FqnToConfig`; it rounds to nearest, so that GPTQ's weights cannot be made.
llama.cpp       a file for `llama-quantize --tensor-type-file`: the plan's bits as k-quants of its own, which have
                other grids and more bits a weight: q2_k 2.6, q3_k 3.4, q4_k 4.5, q5_k 5.5, q6_k 6.6, q8_0 8.5.
"""

import json
import re
from pprint import pformat
from typing import Any

from atp_tune.errors import UserError
from atp_tune.exporting.modules import NAME, names
from atp_tune.spec.config import Config
from atp_tune.spec.data import Text
from atp_tune.spec.quantize import QuantizeConfig

K_QUANTS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
TENSORS = {  # of llama.cpp, by the last part of a linear's name in the families that share these names
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
OF_LANGUAGE = ("gptqmodel", "llama.cpp")
TORCHAO = '''\
"""Rounds a model by torchao as {study} says: {bits:g} bits a weight in the mean, found by atp_tune."""

import torch
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

LINEARS = {linears}  # bits: names


def config(model: torch.nn.Module) -> FqnToConfig:
    """The configuration of each linear; AttributeError if the model lacks one."""
    found = {{}}
    for bits, names in LINEARS.items():
        for name in names:
            model.get_submodule(name)
            found[name] = IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{{bits}}"),
                granularity={granularity},
                mapping_type=MappingType.ASYMMETRIC,
            )
    return FqnToConfig(found)


def quantize(model: torch.nn.Module) -> None:
    """Rounds the model in memory."""
    quantize_(model, config(model), filter_fn=None)
'''


def modifier(config: Config) -> dict[str, Any]:
    """llm-compressor's modifier by name, with its arguments."""
    quantize, groups = _asked(config, "llm-compressor"), dict[str, Any]()
    is_row = quantize.group_size == -1
    for index, (bits, linears) in enumerate(_linears(config, "llm-compressor").items()):
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": quantize.symmetric}
        weights |= {"strategy": "channel"} if is_row else {"strategy": "group", "group_size": quantize.group_size}
        weights["observer"] = "memoryless_minmax"
        groups[f"group_{index}"] = {"targets": linears, "weights": weights}
    if config.plan.method == "rtn":
        return {"QuantizationModifier": {"config_groups": groups}}
    order = "weight" if quantize.act_order else None  # the groups of the dense weights, then the order
    return {"GPTQModifier": {"config_groups": groups, "actorder": order, "dampening_frac": quantize.damping}}


def as_gptqmodel(config: Config) -> str:
    """The arguments of gptqmodel's `QuantizeConfig` as JSON; UserError for what it has not."""
    quantize = _asked(config, "gptqmodel")
    if config.plan.method != "gptq":
        raise _cannot("gptqmodel", "pruner", config.plan.method, "quantizes by gptq alone")
    if config.prune.statistics == "dense":
        raise _cannot("gptqmodel", "prune.statistics", "dense", "measures inputs behind rounded blocks")
    by_bits = _linears(config, "gptqmodel")
    most = max(by_bits, key=lambda bits: len(by_bits[bits]))
    of_blocks = not config.plan.by_linear
    made = {
        "bits": most,
        "dynamic": {f"+:{_pattern(linears, of_blocks)}": {"bits": bits} for bits, linears in by_bits.items()},
        "group_size": quantize.group_size, "sym": quantize.symmetric,
        "desc_act": quantize.act_order, "act_group_aware": False, "static_groups": True,
        "damp_percent": quantize.damping,
        "true_sequential": config.prune.statistics == "sequential",
        "meta": {"calibration": config.calibration.model_dump(mode="json", exclude_none=True) | {"bos": config.bos}},
    }  # fmt: skip
    return json.dumps(made, indent=2) + "\n"


def _pattern(linears: list[str], of_blocks: bool) -> str:
    """A regular expression of linears, short for large models too; or of all that their blocks hold, since vLLM joins
    linears under names of its own.
    """
    numbers: dict[tuple[str, str], dict[str, None]] = {}
    for name in linears:
        place, number, linear = re.split(r"\.(\d+)\.", name, maxsplit=1)
        numbers.setdefault((place, "" if of_blocks else linear), {})[number] = None
    ways = (
        rf"{re.escape(place)}\.({'|'.join(found)})\.{re.escape(linear)}{'$' * bool(linear)}"
        for (place, linear), found in numbers.items()
    )
    return f"^({'|'.join(ways)})"


def as_torchao(config: Config) -> str:
    """A script that rounds a model by torchao; UserError for GPTQ's weights."""
    quantize = _asked(config, "torchao")
    if config.plan.method != "rtn":
        raise _cannot("torchao", "pruner", config.plan.method, "rounds to nearest alone")
    if quantize.symmetric:
        raise _cannot("torchao", "quantize.symmetric", "true", "rounds the largest weight of a group the other way")
    assert config.bits is not None
    study = "a plan" if config.trial is None else f"trial {config.trial} of a study"
    size = quantize.group_size
    return TORCHAO.format(
        study=study, bits=config.bits.target, linears=pformat(_linears(config, "torchao"), width=100),
        granularity="PerAxis(0)" if size == -1 else f"PerGroup({size})",
    )  # fmt: skip


def as_llama_cpp(config: Config) -> str:
    """Lines for `llama-quantize --tensor-type-file`; UserError for what it does not read."""
    _asked(config, "llama.cpp")
    found = _blocks_of_tensors(config)
    if wrong := next((bits for _, bits in found if bits not in K_QUANTS), None):
        raise _cannot("llama.cpp", "plan.levels", str(wrong), f"has k-quants of {', '.join(map(str, K_QUANTS))} bits")
    lines = (
        rf"blk\.({'|'.join(map(str, blocks))})\.{tensor}={K_QUANTS[bits]}"
        for (tensor, bits), blocks in sorted(found.items(), key=lambda row: row[0][1])
    )
    return "\n".join(lines) + "\n"


def _linears(config: Config, kind: str) -> dict[int, list[str]]:
    """The model's names of the linears that have each number of bits; UserError for what is no `nn.Linear`."""
    if config.conv1d:
        raise _cannot(kind, "model", config.model.id, "rounds nn.Linear alone, and this model has Conv1D")
    place, found = names(config, "blocks"), dict[int, list[str]]()
    for index, linears in enumerate(names(config, "linears")):
        for linear, level in zip(linears, config.plan.of(index, len(linears)), strict=True):
            found.setdefault(int(level.amount), []).append(f"{place}.{index}.{linear}")
    found = dict(sorted(found.items()))
    for name in (name for own in found.values() for name in own):
        if not NAME.fullmatch(name):
            raise UserError(f"linears: {name} is not the name of a module")
        if name.endswith("]"):
            raise _cannot(kind, "linears", name, "has no name for a single expert in a tensor of many")
    return found


def _blocks_of_tensors(config: Config) -> dict[tuple[str, int], list[int]]:
    """The blocks in which llama.cpp's tensors, a pattern, have so many bits; UserError for linears without one."""
    found: dict[tuple[str, int], list[int]] = {}
    for index, block in enumerate(config.plan.levels):
        if not block.linears:
            found.setdefault(("(attn|ffn)_.*", int(block.amount)), []).append(index)
            continue
        for linear, level in zip(names(config, "linears")[index], block.linears, strict=True):
            tensor = TENSORS.get(linear.rpartition(".")[2])
            if tensor is None:
                raise _cannot("llama.cpp", "linears", linear, "is told the tensors of the families of Llama alone")
            found.setdefault((rf"{tensor}\.weight", int(level.amount)), []).append(index)
    return found


def refuse_both(config: Config, kind: str) -> None:
    """UserError for a configuration that prunes and rounds, which no recipe of one stage says."""
    if config.bits is not None and not config.by_bits:
        raise UserError(
            f"--format {kind}: says zeros or bits, and this configuration has both; `apply` writes the folder"
        )


def _asked(config: Config, kind: str) -> QuantizeConfig:
    """The settings of rounding; UserError for a configuration that prunes."""
    refuse_both(config, kind)
    if kind in OF_LANGUAGE and not isinstance(config.texts.test, Text):
        raise UserError(f"--format {kind}: reads language models, and this is an image classifier; take yaml or csv")
    if config.quantize is None:
        raise UserError(
            f"--format {kind}: is of rounded weights, and this configuration has zeros; take llm-compressor"
        )
    return config.quantize


def _cannot(kind: str, key: str, value: str, reason: str) -> UserError:
    return UserError(f"--format {kind}: {key} = {value}: {kind} {reason}; `apply` writes the folder")
