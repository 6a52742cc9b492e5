"""`tune.py push`: uploads a sparse checkpoint to the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.best import BestOptions
from atp_tune.cli.options import Private, wrong
from atp_tune.cli.terminal import console, working


def push(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[DIR] ORG/NAME",
            help="Sparse checkpoint, as `apply` writes it, and a model repository on the hub; made if missing.",
        ),
    ],
    private: Private = False,
    *,
    options: BestOptions,
) -> None:
    """Upload a sparse checkpoint with its model card to the Hugging Face hub.

    It uses the login of `hf auth login`. The same command resumes an upload that was cut off. With `--study` the best
    of a study is pruned, and uploaded from a folder that is removed in the end.

    Example: `python tune.py push smol-sparse ORG/NAME`

    Example: `python tune.py push --study smol ORG/NAME`
    """
    from atp_tune.sparse.publishing import check_folder, check_permission

    *folders, name = words
    folder = folders[0] if folders else None
    options.check("DIR", folder, storage=options.storage)
    if len(folders) > 1:
        raise wrong("DIR ORG/NAME", f"got {len(words)} words, and takes DIR ORG/NAME")
    if folders:
        check_folder(Path(folders[0]))
        check_permission(name, private)
        upload(Path(folders[0]), name, private)
        return

    best = options.best()
    with working() as watch:
        address = best.made(watch).push(name, private=private)
    console.print(f"uploaded: {address}")


def upload(folder: Path, name: str, private: bool) -> None:
    """Uploads a checked folder, if it is as it was written, and prints where it is."""
    from atp_tune.cli.terminal import interruptible
    from atp_tune.sparse import pushing
    from atp_tune.sparse.verifying import verify

    verify(folder)

    console.print(f"uploading {folder} to {name}")
    with interruptible():
        try:
            address = publishing.upload(folder, name, private)
        except KeyboardInterrupt:
            console.print(f"stopped: resume with: python tune.py push {folder} {name}{' --private' if private else ''}")
            sys.exit(130)
    console.print(f"uploaded: {address}")
