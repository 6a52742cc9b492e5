r"""Export formats of a configuration: JSON for this program, llm-compressor's recipe, YAML and CSV for other code.

They need only the configuration, neither torch nor the model. A format is a function and a row of `FORMATS`.

yaml, csv  the sparsities as a table. block: index from 0; module: name in the model of the block, or of the linear if
sparsities differ within blocks; sparsity: share of zeros, of each row or of the matrix, depending on the pruner. Where
whole channels go it is the share of the channels, rows or columns, and the table says so: `shares_of`.

llm-compressor (0.14)  a recipe whose `oneshot` then prunes as `apply` does.

Its Wanda and SparseGPT modifiers take a list of sparsities, one for each module that `targets` names, in the order of
the model's modules, and prune all linears in a module to its sparsity. Here these modules are the blocks, named by
`re:model\.layers\.\d+$`, or single linears if sparsities differ within blocks. A modifier has one N:M, so a mixed
pattern becomes a modifier for each N.

A comment at the head of the recipe gives the arguments of `oneshot`: `pipeline="sequential"` measures a block's inputs
behind pruned blocks (`statistics = "block"`), with `propagate_error=False` on the dense model ("dense"), with
`sequential_targets=["Linear"]` behind pruned linears too ("sequential").

Wanda's masks are equal but for ties within the rounding of its scores. Its SparseGPT zeroes one weight more in each
block of columns, as the authors' code does.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from atp_tune.allocations.types import type_bits
from atp_tune.checkpoints.files import Table
from atp_tune.config.best import Config
from atp_tune.config.data import Text
from atp_tune.config.prune import QuantizeConfig, parse
from atp_tune.config.typed import block_name
from atp_tune.errors import UserError
from atp_tune.utils.cache import write_out

RECIPE = "llm-compressor"
ARGUMENTS = {
    "block": 'pipeline="sequential"',
    "dense": 'pipeline="sequential", propagate_error=False',
    "sequential": 'pipeline="sequential", sequential_targets=["Linear"]',
}
HEAD = """\
# {pruner} at {amount}, allocation {allocation}: {study}, found by atp_tune
# from llmcompressor import oneshot
# oneshot(model=MODEL, recipe=THIS_FILE, dataset=DATA, num_calibration_samples={windows}, max_seq_length={tokens},
#         precision="{dtype}", {arguments})
{bos}"""
BOS = "# DATA must be tokenised already, each sample beginning with the BOS token: a recipe cannot ask for it\n"


def as_csv(config: Config) -> str:
    """The table as CSV with a header."""
    text = io.StringIO()
    table = [row | _shares(config) for row in rows(config)]
    lines = csv.DictWriter(text, [*table[0]], lineterminator="\n")
    lines.writeheader()
    lines.writerows(table)
    return text.getvalue()


def as_yaml(config: Config) -> str:
    """The table as a list, with model, pruner, its settings and the target."""
    head: Table = {"study": config.study, "model": config.model.id}
    if config.by_bits and config.bits is not None and config.quantize is not None:
        head["quantizer"] = config.plan.method
        head |= {"settings": config.quantize.told(config.plan.method), "bits": config.bits.model_dump()}
    else:
        head |= {
            "pruner": config.plan.method,
            "pattern": config.prune.pattern,
            "settings": config.prune.told(config.plan.method),
            **({"refine": config.prune.refine} if config.prune.refine else {}),
            "sparsity": config.sparsity.model_dump(),
            **_shares(config),
        }
    return yaml.safe_dump({**head, "modules": list(rows(config))}, sort_keys=False, allow_unicode=True)


def _shares(config: Config) -> dict[str, str | int]:
    """The unit of the sparsities, if it is not a single weight."""
    return {"shares_of": "whole channels"} if parse(config.prune.pattern).channels else {}


def as_recipe(config: Config) -> str:
    """The recipe; UserError if llm-compressor lacks the pruner or a setting."""
    if config.bits is not None:
        stage = {"quantization_stage": {"bits_modifiers": modifier(config)}}
        return f"{_head(config, f'{config.bits.target:g} bits')}{yaml.safe_dump(stage, sort_keys=False, width=100)}"
    if parse(config.prune.pattern).channels:
        raise _cannot(RECIPE, "prune.pattern", config.prune.pattern, "zeroes single weights, no whole channels")
    if config.plan.method not in MODIFIERS:
        raise _cannot(RECIPE, "pruner", config.plan.method, f"has a modifier for {' and '.join(MODIFIERS)} alone")
    if config.prune.refine:
        lack = "has no refinement of kept weights; a study with prune.refine = 0 has none either"
        raise _cannot(RECIPE, "prune.refine", str(config.prune.refine), lack)
    name, settings = MODIFIERS[config.plan.method](config)
    stage = {f"group{index}_modifiers": {name: {**group, **settings}} for index, group in enumerate(_groups(config))}
    recipe = yaml.safe_dump({"sparsity_stage": stage}, sort_keys=False, width=100)
    return f"{_head(config, f'{config.sparsity.target:.4g}')}{recipe}"


def _wanda(config: Config) -> tuple[str, Table]:
    compare = config.prune.settings("wanda")["compare"]
    if compare != "row":
        raise _cannot(RECIPE, "prune.wanda.compare", compare, "compares scores of a row")
    if config.plan.by_row:
        raise _cannot(RECIPE, "allocation.name", config.plan.allocation, "gives all rows of a linear one sparsity")
    return "WandaPruningModifier", {}


def _sparsegpt(config: Config) -> tuple[str, Table]:
    if any(level.sparsity == 1 for level in config.plan.each_linear()):
        raise _cannot(RECIPE, "plan.levels", "1", "cannot zero a whole matrix by SparseGPT")
    settings = config.prune.settings("sparsegpt")
    columns, group = settings["columns"], settings["group"]
    width = max(columns // group, 1) * group if group else columns
    return "SparseGPTModifier", {"block_size": width, "dampening_frac": settings["damping"]}


MODIFIERS = {"wanda": _wanda, "sparsegpt": _sparsegpt}


def _groups(config: Config) -> list[Table]:
    """One modifier, with a sparsity for each block, or for each linear by name; of a pattern one for each number of
    zeros in a group of inputs, with the modules that have it.
    """
    sparsities = {row["module"]: row["sparsity"] for row in rows(config)}
    if expert := next((name for name in sparsities if name.endswith("]")), None):
        raise _cannot(RECIPE, "linears", expert, "has no name for a single expert in a tensor of many")
    group = parse(config.prune.pattern).group
    if not group:
        blocks = rf"re:{re.escape(names(config, 'blocks'))}\.\d+$"
        targets = [*sparsities] if config.plan.by_linear else [blocks]
        return [{"sparsity": [*sparsities.values()], "mask_structure": "0:0", "targets": targets}]
    modules = dict[int, list[str]]()
    for name, sparsity in sparsities.items():
        modules.setdefault(round(sparsity * group), []).append(name)
    return [
        {"sparsity": zeros / group, "mask_structure": f"{zeros}:{group}", "targets": own}
        for zeros, own in sorted(modules.items())
        if zeros
    ]


def _head(config: Config, amount: str) -> str:
    text = config.calibration
    if not isinstance(text, Text):
        raise UserError(
            "--format llm-compressor: calibrates on texts, and this is an image classifier; take yaml or csv"
        )
    if text.images is not None:
        raise UserError("--format llm-compressor: calibrates on texts, not on pairs with images; take yaml or csv")
    return HEAD.format(
        pruner=config.plan.method, amount=amount, allocation=config.plan.allocation,
        study="a plan" if config.trial is None else f"trial {config.trial}",
        windows=text.nsamples or "ALL", tokens=text.seqlen, dtype=config.model.dtype,
        arguments=ARGUMENTS[config.prune.statistics], bos=BOS if config.bos else "",
    )  # fmt: skip


# --- Names of the modules of a configuration, and a row for each with its block and sparsity, or bits.

NAMELESS = "lacks the names of its {}, as files of earlier versions do; `apply` it, and export --config {}"
NAME = re.compile(r"\w+(\.\w+)*(\[\d+\])?")


def rows(config: Config) -> Iterator[Table]:
    """Block, module and sparsity, or bits, of each row of the table.

    UserError if names are missing, or are not names of modules.
    """
    for index, block in enumerate(config.plan.levels):
        linears = names(config, "linears")[index] if block.linears else ("",)
        for linear, level in zip(linears, block.linears or (block,), strict=True):
            name = _named(config, index, f".{linear}" if block.linears else "")
            amounts = {"sparsity": level.sparsity, "bits": level.bits, "type": level.type}
            yield {"block": index, "module": name, **{key: own for key, own in amounts.items() if own is not None}}
    for name, kind in config.plan.outer.items():
        yield {"block": "", "module": name, "bits": type_bits(kind), "type": kind}


def _named(config: Config, index: int, ending: str) -> str:
    """The model's name of a linear of a block, or of the block; UserError for what a spreadsheet may take for code."""
    name = block_name(names(config, "blocks"), index) + ending
    if not NAME.fullmatch(name):
        raise UserError(f"linears: {name} is not the name of a module")
    return name


def names(config: Config, key: Literal["blocks", "linears"]) -> Any:
    """The model's name of its list of blocks, or its names of the linears of each block."""
    value = getattr(config, key)
    if value is None:
        raise UserError(f"{key}: the configuration {NAMELESS.format(key, 'DIR/atp_tune.json')}")
    return value


# --- A configuration that rounds weights, for what stores the bits themselves.
#
# llm-compressor  one modifier, with a group of its configuration for each number of bits. GPTQ: `GPTQModifier`, whose
#                 grids are those of the dense weights (also in act-order "weight"); RTN: `QuantizationModifier` with
#                 the observer `memoryless_minmax`. In float32 its weights are those of `apply`; in bfloat16 it computes
#                 scales and levels in bfloat16, and some weights are on another level.
#
# `packing` writes the same groups into the config of a folder.


def modifier(config: Config) -> Table:
    """llm-compressor's modifier by name, with its arguments."""
    rounding, widths = linear_widths(config, RECIPE)
    groups = config_groups(rounding, widths, observer="memoryless_minmax")
    if config.plan.method == "rtn":
        return {"QuantizationModifier": {"config_groups": groups}}
    order = "weight" if rounding.act_order else None  # the groups of the dense weights, then the order
    return {"GPTQModifier": {"config_groups": groups, "actorder": order, "dampening_frac": rounding.damping}}


def config_groups(rounding: QuantizeConfig, widths: Mapping[str, int], **more: object) -> Table:
    """The groups of compressed-tensors, one for each number of bits of `linear_widths`, with `more` in each."""
    size = rounding.group_size
    more |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    return {
        f"group_{index}": {
            "targets": [name for name, own in widths.items() if own == width],
            "weights": {"num_bits": width, "type": "int", "symmetric": rounding.symmetric, **more},
        }
        for index, width in enumerate(sorted({*widths.values()}))
    }


def linear_widths(config: Config, kind: str) -> tuple[QuantizeConfig, dict[str, int]]:
    """The settings of rounding, and the bits of each linear by its name in the model.

    UserError for zeros, for types of ggml, and for what is no `nn.Linear`.
    """
    rounding = config.quantize
    if rounding is None or rounding.by_types or not config.by_bits:
        raise UserError(
            f"--format {kind}: is of weights that are rounded to numbers of bits, without zeros and types of ggml; "
            "`apply` writes the others"
        )
    if config.conv1d:
        raise _cannot(kind, "model", config.model.id, "rounds nn.Linear alone, and this model has Conv1D")
    widths = {
        _named(config, index, f".{linear}"): int(level.width)
        for index, linears in enumerate(names(config, "linears"))
        for linear, level in zip(linears, config.plan.of(index, len(linears)), strict=True)
    }
    if experts := [name for name in widths if name.endswith("]")]:
        raise _cannot(kind, "linears", experts[0], "has no name for a single expert in a tensor of many")
    return rounding, widths


def _cannot(kind: str, key: str, value: str, reason: str) -> UserError:
    return UserError(f"--format {kind}: {key} = {value}: {kind} {reason}; `apply` writes the folder")


# --- Formats by name: the ending of the file, and what makes its text; UserError if the format cannot express it.


FORMATS = {
    "json": (".json", Config.to_json),
    "llm-compressor": (".recipe.yaml", as_recipe),
    "yaml": (".yaml", as_yaml),
    "csv": (".csv", as_csv),
}


def write(config: Config, kind: str, out: Path) -> None:
    """Writes the file atomically; UserError if it cannot be written."""
    write_out(out, FORMATS[kind][1](config).encode())
