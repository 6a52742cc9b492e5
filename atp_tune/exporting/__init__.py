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

gptqmodel, torchao, llama.cpp  recipes of a configuration that rounds weights, see `exporting.bits`.

Wanda's masks are equal but for ties within the rounding of its scores. Its SparseGPT zeroes one weight more in each
block of columns, as the authors' code does.
"""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atp_tune.cache import write_out
from atp_tune.errors import UserError
from atp_tune.exporting import bits
from atp_tune.exporting.modules import names, rows
from atp_tune.spec.config import Config
from atp_tune.spec.data import Text
from atp_tune.spec.patterns import parse

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
    more = _shares(config)
    amount = "bits" if config.by_bits else "sparsity"
    lines = csv.DictWriter(text, ["block", "module", amount, *more], lineterminator="\n")
    lines.writeheader()
    lines.writerows(row | more for row in rows(config))
    return text.getvalue()


def as_yaml(config: Config) -> str:
    """The table as a list, with model, pruner, its settings and the target."""
    if config.by_bits and config.bits is not None and config.quantize is not None:
        head: dict[str, Any] = {
            "study": config.study,
            "model": config.model.id,
            "quantizer": config.plan.method,
            "settings": config.quantize.told(config.plan.method),
            "bits": config.bits.model_dump(),
        }
        return yaml.safe_dump({**head, "modules": list(rows(config))}, sort_keys=False, allow_unicode=True)
    head = {
        "study": config.study,
        "model": config.model.id,
        "pruner": config.plan.method,
        "pattern": config.prune.pattern,
        "settings": config.prune.told(config.plan.method),
        **config.prune.refinement,
        "sparsity": config.sparsity.model_dump(),
        **_shares(config),
    }
    return yaml.safe_dump({**head, "modules": list(rows(config))}, sort_keys=False, allow_unicode=True)


def _shares(config: Config) -> dict[str, str | int]:
    """What the sparsities are shares of, if not of single weights; the bits of kept weights, if they are rounded."""
    if config.plan.fixed_bits is not None:
        return {"bits": config.plan.fixed_bits}
    return {"shares_of": "whole channels"} if parse(config.prune.pattern).channels else {}


def as_recipe(config: Config) -> str:
    """The recipe; UserError if llm-compressor lacks the pruner or a setting."""
    bits.refuse_both(config, "llm-compressor")
    if config.by_bits:
        stage = {"quantization_stage": {"bits_modifiers": bits.modifier(config)}}
        return f"{_head(config)}{yaml.safe_dump(stage, sort_keys=False, width=100)}"
    if parse(config.prune.pattern).channels:
        raise _not_to_be_said("prune.pattern", config.prune.pattern, "zeroes single weights, no whole channels")
    if config.plan.method not in MODIFIERS:
        raise _not_to_be_said("pruner", config.plan.method, f"has a modifier for {' and '.join(MODIFIERS)} alone")
    for key, count in config.prune.refinement.items():
        what = {"swaps": "swaps in masks", "refine": "refinement of kept weights"}[key]
        lack = f"has no {what}; a study with prune.{key} = 0 has none either"
        raise _not_to_be_said(f"prune.{key}", str(count), lack)
    name, settings = MODIFIERS[config.plan.method](config)
    group = parse(config.prune.pattern).group
    groups = _by_number(config, group) if group else [_by_sparsity(config)]
    stage = {f"group{index}_modifiers": {name: {**group, **settings}} for index, group in enumerate(groups)}
    recipe = yaml.safe_dump({"sparsity_stage": stage}, sort_keys=False, width=100)
    return f"{_head(config)}{recipe}"


def _wanda(config: Config) -> tuple[str, dict[str, Any]]:
    compare = config.prune.settings("wanda")["compare"]
    if compare != "row":
        raise _not_to_be_said("prune.wanda.compare", compare, "compares scores of a row")
    if config.plan.by_row:
        raise _not_to_be_said("allocation.name", config.plan.allocation, "gives all rows of a linear one sparsity")
    return "WandaPruningModifier", {}


def _sparsegpt(config: Config) -> tuple[str, dict[str, Any]]:
    if any(level.sparsity == 1 for level in config.plan.each_linear()):
        raise _not_to_be_said("plan.levels", "1", "cannot zero a whole matrix by SparseGPT")
    settings = config.prune.settings("sparsegpt")
    columns, group = settings["columns"], settings["group"]
    width = max(columns // group, 1) * group if group else columns
    return "SparseGPTModifier", {"block_size": width, "dampening_frac": settings["damping"]}


MODIFIERS: dict[str, Callable[[Config], tuple[str, dict[str, Any]]]] = {"wanda": _wanda, "sparsegpt": _sparsegpt}


def _by_sparsity(config: Config) -> dict[str, Any]:
    """One modifier: a sparsity for each block, or for each linear by name."""
    modules = _modules(config)
    blocks = [rf"re:{re.escape(names(config, 'blocks'))}\.\d+$"]
    targets = list(modules) if config.plan.by_linear else blocks
    return {"sparsity": list(modules.values()), "mask_structure": "0:0", "targets": targets}


def _by_number(config: Config, group: int) -> list[dict[str, Any]]:
    """A modifier for each number of zeros in a group of inputs, with the modules that have it."""
    modules: dict[int, list[str]] = {}
    for name, sparsity in _modules(config).items():
        modules.setdefault(round(sparsity * group), []).append(name)
    return [
        {"sparsity": zeros / group, "mask_structure": f"{zeros}:{group}", "targets": names}
        for zeros, names in sorted(modules.items())
        if zeros
    ]


def _modules(config: Config) -> dict[str, float]:
    found = {row["module"]: row["sparsity"] for row in rows(config)}
    if expert := next((name for name in found if name.endswith("]")), None):
        raise _not_to_be_said("linears", expert, "has no name for a single expert in a tensor of many")
    return found


def _head(config: Config) -> str:
    text = config.calibration
    if not isinstance(text, Text):
        raise UserError(
            "--format llm-compressor: calibrates on texts, and this is an image classifier; take yaml or csv"
        )
    if text.images is not None:
        raise UserError("--format llm-compressor: calibrates on texts, not on pairs with images; take yaml or csv")
    amount = f"{config.sparsity.target:.4g}" if config.bits is None else f"{config.bits.target:g} bits"
    return HEAD.format(
        pruner=config.plan.method, amount=amount, allocation=config.plan.allocation,
        study="a plan" if config.trial is None else f"trial {config.trial}",
        windows=text.nsamples or "ALL", tokens=text.seqlen, dtype=config.model.dtype,
        arguments=ARGUMENTS[config.prune.statistics], bos=BOS if config.bos else "",
    )  # fmt: skip


def _not_to_be_said(key: str, value: str, reason: str) -> UserError:
    return UserError(f"--format llm-compressor: {key} = {value}: llm-compressor {reason}; `apply` writes the folder")


@dataclass(frozen=True)
class Format:
    """Ending of the file, and the function that makes its text; UserError if the format cannot express it."""

    ending: str
    make: Callable[[Config], str]


FORMATS = {
    "json": Format(".json", Config.to_json),
    "llm-compressor": Format(".recipe.yaml", as_recipe),
    "gptqmodel": Format(".gptqmodel.json", bits.as_gptqmodel),
    "torchao": Format(".torchao.py", bits.as_torchao),
    "llama.cpp": Format(".tensor-types.txt", bits.as_llama_cpp),
    "yaml": Format(".yaml", as_yaml),
    "csv": Format(".csv", as_csv),
}


def kind_of(given: str | None, out: Path | None) -> str:
    """The format: by its name, else by the ending of `out`, else json; UserError if it is unknown."""
    if given is None:
        name = out.name.lower() if out else ""
        fitting = [kind for kind, known in FORMATS.items() if name.endswith(known.ending)]
        found = max(fitting, key=lambda kind: len(FORMATS[kind].ending), default=None)
        if found is None and Path(name).suffix:
            endings = ", ".join(known.ending for known in FORMATS.values())
            raise UserError(f"--out {out}: must end in one of {endings}, or give --format")
        return found or "json"
    if given not in FORMATS:
        raise UserError(f"--format {given}: must be one of {', '.join(FORMATS)}")
    return given


def write(config: Config, kind: str, out: Path) -> None:
    """Writes the file atomically; UserError if it cannot be written."""
    write_out(out, FORMATS[kind].make(config).encode())
