"""Unites databases of one study."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    storages: Annotated[list[str], typer.Argument(metavar="FILE…", help="Databases of one study, or storage URLs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new database.")],
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name in them; needed where they hold several.")
    ] = None,
) -> None:
    """Unite what machines without a shared network have found of one study, in a new database.

    Example: `python tune.py merge here.db there.db --out both.db`
    """
    from atp_tune.cli.running import run_merge

    run_merge(storages, out, study)
