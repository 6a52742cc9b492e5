"""`tune.py merge`: copies the trials of several databases into a new one."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import option
from atp_tune.cli.terminal import console, trials


def merge(
    storages: Annotated[list[str], typer.Argument(metavar="FILE…", help="Databases or storage URLs of one study.")],
    out: Annotated[Path, option("FILE", "The new database.")],
    study: Annotated[str | None, option("NAME", "Name of the study; needed if the databases hold several.")] = None,
) -> None:
    """Merge the trials of one study from several databases, as of machines without a shared network, into a new one.

    Example: `python tune.py merge here.db there.db --out both.db`
    """
    from atp_tune.cli.terminal import quiet
    from atp_tune.merging import merge as unite
    from atp_tune.results.summary import summarise

    with quiet():
        merged = unite(storages, out, study)
    for share in merged.shares:
        known = f", {share.known} of them known already" if share.known else ""
        left = f"; {share.unfinished} running or waiting trials are left out" if share.unfinished else ""
        console.print(f"{share.address}: {trials(share.trials)}{known}{left}")
    found = summarise(merged.study)
    console.print(f"{out}: {trials(len(found.trials))}, {found.done} of {found.total} done")
    file = found.made_from.name if found.made_from else "NAME"
    other = "" if found.name == file else f" --study-name {found.name}"
    console.print(f"resume: python tune.py --study {file}{other} --storage sqlite:///{out}")
