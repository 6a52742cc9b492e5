"""Names of the modules of a configuration, and a row for each with its block and sparsity, or bits."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from atp_tune.errors import UserError
from atp_tune.spec.block_names import block_name
from atp_tune.spec.config import Config

NAMELESS = "lacks the names of its {}, as files of earlier versions do; `apply` it, and export --config {}"
NAME = re.compile(r"\w+(\.\w+)*(\[\d+\])?")


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """Block, module and sparsity, or bits, of each row of the table.

    UserError if names are missing, or are not names of modules, which a spreadsheet might take for formulas.
    """
    kind = "bits" if config.by_bits else "sparsity"
    for index, block in enumerate(config.plan.levels):
        linears = names(config, "linears")[index] if block.linears else ("",)
        for linear, level in zip(linears, block.linears or (block,), strict=True):
            name = block_name(names(config, "blocks"), index) + (f".{linear}" if block.linears else "")
            if not NAME.fullmatch(name):
                raise UserError(f"linears: {name} is not the name of a module")
            yield {"block": index, "module": name, kind: level.amount}


def names(config: Config, key: Literal["blocks", "linears"]) -> Any:
    """The model's name of its list of blocks, or its names of the linears of each block."""
    found = getattr(config, key)
    if found is None:
        raise UserError(f"{key}: the configuration {NAMELESS.format(key, 'DIR/atp_tune.json')}")
    return found
