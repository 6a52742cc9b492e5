"""`tune.py apply`: writes the sparse checkpoint of a configuration, and uploads it if asked to."""

from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.best import Best, BestOptions
from atp_tune.cli.commands.push import upload
from atp_tune.cli.options import DType, Private, UsageError, flag, option, wrong
from atp_tune.cli.terminal import console, markdown, working
from atp_tune.errors import printable

if TYPE_CHECKING:
    from atp_tune.measures import Estimate

TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


def apply(
    config: Annotated[Path | None, option("FILE", "Configuration, as a run or `export` writes it.")] = None,
    out: Annotated[Path | None, option("DIR", "Folder for the sparse checkpoint; new or empty.")] = None,
    packed: Annotated[bool, flag("--packed", "Write no zeros, and rounded weights in their number of bits.")] = False,
    slim: Annotated[
        bool,
        flag("--slim", 'Write the folder without the channels that `pattern = "channels"` prunes.'),
    ] = False,
    verify: Annotated[
        Path | None,
        option("DIR", "Only check whether the files of a sparse checkpoint are as they were written."),
    ] = None,
    push: Annotated[
        str | None,
        option("ORG/NAME", "Also upload the folder to this model repository on the hub."),
    ] = None,
    recover: Annotated[
        bool,
        typer.Option("--recover/--no-recover", help="Train the kept weights, where the configuration says so."),
    ] = True,
    dtype: DType = None,
    private: Private = False,
    *,
    options: BestOptions,
) -> None:
    """Prune the dense checkpoint to a configuration, save it as a Hugging Face folder, and measure its perplexity.

    `--packed` makes the folder smaller, and faster on a CPU: docs/speedup.md. Weights that were rounded to few bits are
    stored in so many bits: docs/bits.md. `--slim` makes the folder of pruned channels smaller and usually faster:
    docs/channels.md.

    If the study had `recover`, the kept weights are trained as it says; what its run has trained is taken from the
    cache. `--no-recover` leaves them as they were pruned: docs/finetune.md.

    The folder's weights are in the number format of the dense model's files, or of a .gguf file in that of the study,
    bfloat16 or float32. `--dtype` takes another; trained weights stay in the files' format.

    `--push` checks login and permission before it prunes. If the upload is cut off, the same command resumes it.

    `--verify DIR` compares all files with their SHA-256 in `atp_tune.json` (exit code 2 if one differs), and lists what
    differs between this machine and the one that wrote them.

    Example: `python tune.py apply --study smol --out smol-sparse`

    Example: `python tune.py apply --config studies/smol.best.json --out smol-sparse`

    Example: `python tune.py apply --verify smol-sparse`
    """
    if verify is not None:
        if (config, options.study, out, push) != (None, None, None, None) or packed or slim:
            said = "goes without --config, --study, --out, --packed, --slim and --push"
            raise wrong("--verify", said)
        _verify(verify)
        return
    options.check("--config FILE", config, storage=options.storage)
    if out is None:
        raise UsageError("Missing option '--out'.")
    if slim and packed:
        raise wrong("--slim", "a slim model has no zeros to pack; give one of both")
    if private and push is None:
        raise wrong("--private", "only with --push ORG/NAME")
    best = options.best(config)
    found = best.config
    if dtype is not None and recover and found.is_trained:
        raise wrong("--dtype", "trained weights stay in the format of the files; leave it out")
    if not recover:
        found = found.model_copy(update={"recovered": None})
        best = replace(best, config=found)
    if push is not None:
        from atp_tune.sparse.publishing import check_folder, check_permission, is_made_from

        check_permission(push, private)
        if dtype is None and is_made_from(out, found, packed, slim):
            check_folder(out)
            console.print(f"sparse checkpoint: {out} was written before, from this configuration")
            upload(out, push, private)
            return
    write(best, out, packed, slim, dtype and dtype.value)
    if push is not None:
        upload(out, push, private)


def write(best: Best, out: Path, packed: bool = False, slim: bool = False, dtype: str | None = None) -> None:
    """Writes the folder of a configuration, and prints what it has come to."""
    from atp_tune.checkpoints.trust import is_slim
    from atp_tune.sparse.provenance import ABOUT
    from atp_tune.sparse.publishing import compared
    from atp_tune.spec.config import read_config

    with working() as watch:
        measured = best.made(watch).save(out, packed=packed, slim=slim, dtype=dtype)
    found = best.config
    promised = found.final("test") or (found.final("validation") if found.is_trained else None)
    show(measured, promised, out, packed and found.quantize is not None)
    if packed or is_slim(out):
        console.print("transformers loads it after `import atp_tune`, or with trust_remote_code=True")
    if not found.is_trained and (said := compared(found, read_config(out / ABOUT).manifest)):
        console.print(said)


def _verify(folder: Path) -> None:
    """Prints that a folder's files are as they were written, and what differs here from where they were."""
    from atp_tune.sparse.publishing import verify

    found = verify(folder)
    console.print(f"{folder}: all {found.files} files are as they were written, {found.weights} of them with weights")
    if found.more:
        console.print(f"not of the checkpoint: {', '.join(found.more)}")
    console.print(f"written on {found.made.processor}, {found.made.device or 'unknown device'}")
    if not found.differences:
        console.print("versions and CPU instructions are the same here")
        return
    from rich.markup import escape

    rows = [[printable(escape(cell)) for cell in astuple(row)] for row in found.differences]
    console.print("what differs here, if the checkpoint is made again or computed with:")
    console.print(markdown(("", "there", "here", "effect"), rows))


def show(measured: "Estimate", promised: "Estimate | None", out: Path, codes: bool = False) -> None:
    """Prints where the sparse checkpoint is, and whether its perplexity is the configuration's."""
    console.print(f"sparse checkpoint: {out}")
    if promised is None:
        console.print(f"perplexity on the test text: {measured} (the configuration has none yet)")
        return
    change = measured.value / promised.value - 1
    console.print(f"perplexity on the test text: {measured}, the configuration says {promised} ({change:+.3%})")
    if abs(change) > TOLERANCE:
        why = "scales of 16 bits, " if codes else ""
        warning = f"warning: they differ by more than 0.1 %; {why}another device, number format or number of threads?"
        console.print(warning, style="yellow")
