"""The sparsities as a table for people's own code: a module of the model, and the share of zeros in its linears.

block     index, first = 0
module    name in the model: the block's, or the linear's where sparsities differ within blocks
sparsity  share of the weights that go, of each row or of the matrix, as the pruner chooses
"""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

import yaml

from atp_tune.errors import UserError
from atp_tune.spec.config import Config

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
    """Block, module and sparsity, first block first; UserError where the names are not known."""
    if config.linear_sparsities is None:
        for index, sparsity in enumerate(config.block_sparsities):
            yield {"block": index, "module": _module(f"{blocks_of(config)}.{index}"), "sparsity": sparsity}
        return
    for index, (names, sparsities) in enumerate(zip(linears_of(config), config.linear_sparsities, strict=True)):
        for name, sparsity in zip(names, sparsities, strict=True):
            yield {"block": index, "module": _module(f"{blocks_of(config)}.{index}.{name}"), "sparsity": sparsity}


def _module(name: str) -> str:
    """The name itself; UserError for one that no module has, and that a spreadsheet might take for a formula."""
    if not NAME.fullmatch(name):
        raise UserError(f"linears: {name} is no name of a module of a model")
    return name


def blocks_of(config: Config) -> str:
    """Name of the model's list of blocks; UserError where the configuration does not have it."""
    if config.blocks is None:
        raise UserError(f"blocks: the configuration {NAMELESS.format('blocks', 'DIR/atp_tune.json')}")
    return config.blocks


def linears_of(config: Config) -> tuple[tuple[str, ...], ...]:
    """Names of the linears of each block; UserError where the configuration does not have them."""
    if config.linears is None:
        raise UserError(f"linears: the configuration {NAMELESS.format('linears', 'DIR/atp_tune.json')}")
    return config.linears
