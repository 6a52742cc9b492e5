"""`tune.py push`: uploads a sparse checkpoint to the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import Private
from atp_tune.cli.terminal import console


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint, as `apply` writes it.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Model repository on the hub; made if missing.")],
    private: Private = False,
) -> None:
    """Upload a sparse checkpoint with its model card to the Hugging Face hub.

    It uses the login of `hf auth login`. The same command resumes an upload that was cut off.

    Example: `python tune.py push smol-sparse ORG/NAME`
    """
    from atp_tune.sparse.pushing import check_folder, check_permission

    check_folder(folder)
    check_permission(name, private)
    upload(folder, name, private)


def upload(folder: Path, name: str, private: bool) -> None:
    """Uploads a checked folder, if it is as it was written, and prints where it is."""
    from atp_tune.cli.runtime import interruptible
    from atp_tune.sparse import pushing
    from atp_tune.sparse.verifying import verify

    verify(folder)

    console.print(f"uploading {folder} to {name}")
    with interruptible():
        try:
            address = pushing.upload(folder, name, private)
        except KeyboardInterrupt:
            console.print(f"stopped: resume with: python tune.py push {folder} {name}{' --private' if private else ''}")
            sys.exit(130)
    console.print(f"uploaded: {address}")
