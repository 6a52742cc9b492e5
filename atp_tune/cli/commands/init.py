"""`tune.py init`: asks for the settings of a study, and writes its file."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.terminal import console
from atp_tune.extras import as_typed


def init(
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; default: studies/NAME.toml.")
    ] = None,
) -> None:
    """Ask for model, sparsity, texts and trials, and write a study file with comments.

    Each answer is checked at once; Enter takes the default. Answers may also come from a pipe, one a line. An existing
    file is never replaced.

    Example: `python tune.py init`
    """
    from atp_tune.cli.interview import interview, study_name
    from atp_tune.spec.finding import HERE
    from atp_tune.spec.writing import write_study

    if out is not None and out.suffix != ".toml":
        raise typer.BadParameter("must end in .toml", param_hint="--out")
    try:
        _refuse(out)
        study = interview()
        name = study_name(study.model.source) if out is None else str(out)
    except KeyboardInterrupt:
        console.print("\nstopped: nothing was written")
        sys.exit(130)
    path = HERE / f"{name}.toml" if out is None else out
    _refuse(path)
    head = (shlex.join(["python", "tune.py", "--study", name]), "", "Written by `tune.py init`.")
    write_study(path, study, [*map(as_typed, head)], is_new=True)
    console.print(f"study file: {path}")
    console.print(f"its cost:   {shlex.join(['python', 'tune.py', 'plan', '--study', name])}")
    console.print(f"run it:     {shlex.join(['python', 'tune.py', '--study', name])}")


def _refuse(path: Path | None) -> None:
    """UserError if there is something at the path."""
    from atp_tune.errors import UserError

    if path is not None and (path.exists() or path.is_symlink()):
        raise UserError(f"{path}: exists already, and is not replaced; choose another place with --out FILE")
