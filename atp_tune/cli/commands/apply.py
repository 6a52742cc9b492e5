"""`tune.py apply`: writes the sparse checkpoint of a configuration, and uploads it if asked to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.commands.push import upload
from atp_tune.cli.options import AllowPickle, Device, Private, TrustRemoteCode
from atp_tune.cli.terminal import console

if TYPE_CHECKING:
    from atp_tune.metrics.perplexity import Perplexity
    from atp_tune.spec.config import Config

TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


def apply(
    config: Annotated[Path, typer.Option(metavar="FILE", help="Configuration, as a run or `export` writes it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the sparse checkpoint; new or empty.")],
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Also upload the folder to this model repository on the hub."),
    ] = None,
    private: Private = False,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Prune the dense checkpoint to a configuration, save it as a Hugging Face folder, and measure its perplexity.

    `--push` checks login and permission before it prunes. If the upload is cut off, the same command resumes it.

    Example: `python tune.py apply --config studies/smol.best.json --out smol-sparse`
    """
    from atp_tune.spec.config import read_config

    if private and push is None:
        raise typer.BadParameter("only with --push ORG/NAME", param_hint="--private")
    found = read_config(config)
    if push is not None:
        from atp_tune.sparse.publishing import check_permission, is_made_from

        check_permission(push, private)
        if is_made_from(out, found):
            console.print(f"sparse checkpoint: {out} was written before, from this configuration")
            upload(out, push, private)
            return
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    _write(found, config.parent / found.folder, out, device or "auto", allowed)
    if push is not None:
        upload(out, push, private)


def _write(found: "Config", base: Path, out: Path, device: str, allowed: dict[str, bool]) -> None:
    from atp_tune.cli.display import Display
    from atp_tune.cli.runtime import quiet
    from atp_tune.sparse.applying import apply as write

    with quiet(), Display() as display:
        measured = write(found, base, out, device, display, allowed)
    show(measured, found.perplexity.test, out)


def show(measured: "Perplexity", promised: "Perplexity | None", out: Path) -> None:
    """Prints where the sparse checkpoint is, and whether its perplexity is the configuration's."""
    console.print(f"sparse checkpoint: {out}")
    if promised is None:
        console.print(f"perplexity on the test text: {measured} (the configuration has none yet)")
        return
    change = measured.value / promised.value - 1
    console.print(f"perplexity on the test text: {measured}, the configuration says {promised} ({change:+.3%})")
    if abs(change) > TOLERANCE:
        warning = "warning: they differ by more than 0.1 %; another device, number format or number of threads?"
        console.print(warning, style="yellow")
