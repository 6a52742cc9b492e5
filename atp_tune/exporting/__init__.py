"""What a configuration is written as: for this program, for llm-compressor, for people's own code.

A format is one file and one row of the table. All are made from the configuration alone, without torch and the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from atp_tune.cache import write_out
from atp_tune.errors import UserError
from atp_tune.exporting import llm_compressor, tables
from atp_tune.spec.config import Config

__all__ = ["FORMATS", "kind_of", "write"]


@dataclass(frozen=True)
class Format:
    """The ending of a file's name, and what makes its text; UserError where the format cannot say it."""

    ending: str
    make: Callable[[Config], str]


FORMATS = {
    "json": Format(".json", Config.to_json),
    "llm-compressor": Format(".recipe.yaml", llm_compressor.make),
    "yaml": Format(".yaml", tables.as_yaml),
    "csv": Format(".csv", tables.as_csv),
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
