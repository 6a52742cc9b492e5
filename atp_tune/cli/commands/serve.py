"""Shows studies in the browser, and lets workers join."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import Storage


def serve(
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Serve the storage of this study, and all others in it.")
    ] = None,
    storage: Storage = None,
    listen: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the dashboard.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port where workers join.")] = 13000,
    artifacts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Files that the dashboard offers; default: beside the database.")
    ] = None,
) -> None:
    """Show all studies of a storage in the browser while they run, and let workers on other machines join.

    Without `--study` and `--storage`: the database in `studies/` that was changed last.

    Example: `python tune.py serve`, then `python tune.py --study smol --storage grpc://HOST:13000` on any machine
    """
    from atp_tune.cli.running import run_serve
    from atp_tune.serving.serve import choose

    run_serve(choose(study, storage, listen, port, grpc_port, artifacts))
