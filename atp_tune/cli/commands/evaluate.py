"""Scores models on tasks of lm-eval."""

from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.options import AllowPickle, Device, Json, TrustRemoteCode


def evaluate(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A configuration: dense, uniform and best are compared, in memory."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Or one model's folder, as `apply` writes it.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Tasks or groups of lm-eval, FOLDER/ or FILE.yaml, with commas between; zero-shot: the papers' seven.",
        ),
    ] = "zero-shot",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, metavar="K", help="Examples before each item; default: 0.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that go through the model at a time.")] = 8,
    device: Device = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where the study is; default: NAME.db beside the configuration."),
    ] = None,
    json: Json = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score models on tasks of lm-eval (`pip install 'atp-tune[eval]'`): zero-shot accuracy with its standard error.

    The scores of a configuration are stored in it, and on its study, whose report shows them. Code in a folder of tasks
    runs, as with lm-eval itself. `zero-shot` is boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge and
    openbookqa, whose data comes from the hub; `scripts/offline-tasks DIR` makes tasks that need no network.

    Example: `python tune.py evaluate --config studies/smol.best.json --tasks boolq,piqa --limit 100`
    """
    if (config is None) == (model is None):
        raise typer.BadParameter("give one of --config FILE and --model DIR", param_hint="--config")
    if model is not None and storage is not None:
        raise typer.BadParameter("only with --config", param_hint="--storage")
    from atp_tune.cli.evaluating import run_evaluate, run_evaluate_folder
    from atp_tune.zeroshot.comparison import Asked

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    asked = Asked(names, limit, num_fewshot, batch, device or "auto")
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    if config is not None:
        run_evaluate(config, asked, storage, json, allowed)
    elif model is not None:
        run_evaluate_folder(model, asked, json, allowed)
