"""Fine-tunes a sparse checkpoint, zeros kept."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import Device

TEXT = "SOURCE|TABLE"


def finetune(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A sparse folder, written by `apply` or `prune --out`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the fine-tuned checkpoint; new or empty.")],
    text: Annotated[
        str | None,
        typer.Option(metavar=TEXT, help="Train on hub:ORG/NAME, file:PATH, … instead of the calibration text."),
    ] = None,
    report_text: Annotated[
        str | None,
        typer.Option(metavar=TEXT, help="Measure on another text than the folder's report text."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps, of a batch each.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    alpha: Annotated[
        int | None, typer.Option(min=1, help="Their weight is alpha / rank; default: twice the rank.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Its highest value, after a warm-up.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, help="Draws adapters and the order of windows.")] = 0,
    device: Device = None,
) -> None:
    """Train a sparse checkpoint with LoRA, every zero kept, and measure it before and after.

    The adapters are masked while they are trained, and merged at the end: the folder is an ordinary one. A run that was
    cut off goes on with the same command. Needs the extra `finetune`.

    Example: `python tune.py finetune --model smol-sparse --out smol-tuned --text file:articles.txt`

    Example: `python tune.py finetune --model DIR --out DIR2 --text '{source = "hub:ORG/NAME", split = "train"}'`
    """
    from atp_tune.cli.running import run_finetune
    from atp_tune.sparse.provenance import Settings, read_text

    if not 0 < learning_rate < float("inf"):
        raise typer.BadParameter("must be greater than 0", param_hint="--learning-rate")
    alpha = alpha or 2 * rank
    settings = Settings(
        steps=steps, rank=rank, alpha=alpha, learning_rate=learning_rate, tokens=tokens, batch=batch, seed=seed
    )
    named = text and read_text("--text", text, tokens)
    measured = report_text and read_text("--report-text", report_text, tokens)
    run_finetune(model, out, named or None, measured or None, settings, device or "auto")
