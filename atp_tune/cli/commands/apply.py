"""Writes the sparse checkpoint of a configuration."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import AllowPickle, Device, TrustRemoteCode


def apply(
    config: Annotated[Path, typer.Option(metavar="FILE", help="A configuration written by a run or by `export`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the sparse checkpoint; new or empty.")],
    device: Device = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Prune as a configuration says, into a folder that `from_pretrained` loads, and measure it again.

    Example: `python tune.py apply --config studies/smol.best.json --out smol-sparse`
    """
    from atp_tune.cli.running import run_apply

    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    run_apply(config, out, device or "auto", allowed)
