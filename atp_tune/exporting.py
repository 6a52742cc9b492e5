r"""What a configuration is written as: for this program, for llm-compressor, for people's own code.

All are made from the configuration alone, without torch and the model. A format is a function and a row of `FORMATS`.

yaml, csv  the sparsities as a table. block: index, first = 0; module: its name in the model, the block's, or the
linear's where sparsities differ within blocks; sparsity: share of the weights that go, of each row or of the matrix, as
the pruner chooses.

llm-compressor (0.14)  a recipe whose `oneshot` then prunes as `apply` does.

Its Wanda and SparseGPT modifiers take a list of sparsities, one for each module that `targets` names, in the order of
the model's modules: all linears in such a module are pruned to it. Here these modules are the blocks, by the pattern
`re:model\.layers\.\d+$`, or single linears by name where sparsities differ within blocks. A modifier has one N:M, so
a mixed pattern becomes a modifier for each N.

What a recipe cannot say are arguments of `oneshot`, and stand in the recipe's head: `pipeline="sequential"` measures a
block's inputs when the blocks before it are pruned (`statistics = "block"`), with `propagate_error=False` on the dense
model ("dense"), with `sequential_targets=["Linear"]` when the linears before it are pruned too ("sequential").

Wanda's masks are equal but for ties within the rounding of its scores. SparseGPT zeroes one weight more in each block
of columns, as the authors' code does.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from atp_tune.cache import write_out
from atp_tune.errors import UserError
from atp_tune.spec.config import Config
from atp_tune.spec.patterns import parse

ARGUMENTS = {
    "block": 'pipeline="sequential"',
    "dense": 'pipeline="sequential", propagate_error=False',
    "sequential": 'pipeline="sequential", sequential_targets=["Linear"]',
}
HEAD = """\
# {pruner} at {sparsity:.4g}, allocation {allocation}: {study}, found by atp_tune
# from llmcompressor import oneshot
# oneshot(model=MODEL, recipe=THIS_FILE, dataset=DATA, num_calibration_samples={windows}, max_seq_length={tokens},
#         precision="{dtype}", {arguments})
{bos}"""
BOS = "# DATA must be tokenised already, each sample beginning with the BOS token: a recipe cannot ask for it\n"
NAMELESS = "does not say what the model calls its {}, as files of earlier versions; `apply` it, and export --config {}"
NAME = re.compile(r"\w+(\.\w+)*(\[\d+\])?")


def as_csv(config: Config) -> str:
    """A line for each module, under a head."""
    text = io.StringIO()
    lines = csv.DictWriter(text, ["block", "module", "sparsity"], lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows(config))
    return text.getvalue()


def as_yaml(config: Config) -> str:
    """The same as a list, with the pruner, the target and what else decides which weights go."""
    head = {
        "study": config.study,
        "model": config.model.id,
        "pruner": config.pruner,
        "pattern": config.prune.pattern,
        "settings": config.prune.settings(config.pruner),
        "sparsity": config.sparsity.model_dump(),
    }
    return yaml.safe_dump({**head, "modules": list(rows(config))}, sort_keys=False, allow_unicode=True)


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """Block, module and sparsity, first block first; UserError where the names are not known, or are none of modules,
    which a spreadsheet might take for formulas.
    """
    for index, sparsity in enumerate(config.block_sparsities):
        linears = config.linear_sparsities and zip(
            _names(config, "linears")[index], config.linear_sparsities[index], strict=True
        )
        for linear, share in linears or [("", sparsity)]:
            name = f"{_names(config, 'blocks')}.{index}" + (f".{linear}" if linears else "")
            if not NAME.fullmatch(name):
                raise UserError(f"linears: {name} is no name of a module of a model")
            yield {"block": index, "module": name, "sparsity": share}


def _names(config: Config, key: Literal["blocks", "linears"]) -> Any:
    """What the model calls its list of blocks, or the linears of each block."""
    found = getattr(config, key)
    if found is None:
        raise UserError(f"{key}: the configuration {NAMELESS.format(key, 'DIR/atp_tune.json')}")
    return found


def as_recipe(config: Config) -> str:
    """The recipe's text; UserError where llm-compressor has no such pruner, or cannot be told the same."""
    if config.pruner not in MODIFIERS:
        raise _not_to_be_said("pruner", config.pruner, f"has a modifier for {' and '.join(MODIFIERS)} alone")
    name, settings = MODIFIERS[config.pruner](config)
    group = parse(config.prune.pattern).group
    groups = _by_number(config, group) if group else [_by_sparsity(config)]
    stage = {f"group{index}_modifiers": {name: {**group, **settings}} for index, group in enumerate(groups)}
    recipe = yaml.safe_dump({"sparsity_stage": stage}, sort_keys=False, width=100)
    return f"{_head(config)}{recipe}"


def _wanda(config: Config) -> tuple[str, dict[str, Any]]:
    compare = config.prune.settings("wanda")["compare"]
    if compare != "row":
        raise _not_to_be_said("prune.wanda.compare", compare, "compares scores of a row")
    return "WandaPruningModifier", {}


def _sparsegpt(config: Config) -> tuple[str, dict[str, Any]]:
    if 1 in config.block_sparsities or any(1 in block for block in config.linear_sparsities or ()):
        raise _not_to_be_said("block_sparsities", "1", "cannot zero a whole matrix by SparseGPT")
    settings = config.prune.settings("sparsegpt")
    columns, group = settings["columns"], settings["group"]
    width = max(columns // group, 1) * group if group else columns
    return "SparseGPTModifier", {"block_size": width, "dampening_frac": settings["damping"]}


MODIFIERS: dict[str, Callable[[Config], tuple[str, dict[str, Any]]]] = {"wanda": _wanda, "sparsegpt": _sparsegpt}


def _by_sparsity(config: Config) -> dict[str, Any]:
    """One modifier for all: a sparsity for each block, or for each linear by name."""
    modules = _modules(config)
    blocks = [rf"re:{re.escape(_names(config, 'blocks'))}\.\d+$"]
    targets = blocks if config.linear_sparsities is None else list(modules)
    return {"sparsity": list(modules.values()), "mask_structure": "0:0", "targets": targets}


def _by_number(config: Config, group: int) -> list[dict[str, Any]]:
    """A modifier for each number of zeros in a group of inputs, with the modules that get it."""
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
    return HEAD.format(
        pruner=config.pruner, sparsity=config.sparsity.target, allocation=config.allocation.name,
        study="a plan" if config.trial is None else f"trial {config.trial}",
        windows=text.nsamples or "ALL", tokens=text.seqlen, dtype=config.model.dtype,
        arguments=ARGUMENTS[config.prune.statistics], bos=BOS if config.bos else "",
    )  # fmt: skip


def _not_to_be_said(key: str, value: str, reason: str) -> UserError:
    return UserError(f"--format llm-compressor: {key} = {value}: llm-compressor {reason}; `apply` writes the folder")


@dataclass(frozen=True)
class Format:
    """The ending of a file's name, and what makes its text; UserError where the format cannot say it."""

    ending: str
    make: Callable[[Config], str]


FORMATS = {
    "json": Format(".json", Config.to_json),
    "llm-compressor": Format(".recipe.yaml", as_recipe),
    "yaml": Format(".yaml", as_yaml),
    "csv": Format(".csv", as_csv),
}


def kind_of(given: str | None, out: Path | None) -> str:
    """The format that was asked for: by name, else by the first ending that the file's name has; json where the name
    has none. UserError for others.
    """
    if given is None:
        name = out.name.lower() if out else ""
        found = next((kind for kind, known in FORMATS.items() if name.endswith(known.ending)), None)
        if found is None and Path(name).suffix:
            endings = ", ".join(known.ending for known in FORMATS.values())
            raise UserError(f"--out {out}: must end in one of {endings}, or give --format")
        return found or "json"
    if given not in FORMATS:
        raise UserError(f"--format {given}: must be one of {', '.join(FORMATS)}")
    return given


def write(config: Config, kind: str, out: Path) -> None:
    """Writes the file so that it is there whole or not at all; UserError where that is not possible."""
    write_out(out, FORMATS[kind].make(config).encode())
