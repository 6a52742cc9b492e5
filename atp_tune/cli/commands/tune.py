"""`tune.py --study NAME`: runs a study."""

from typing import Annotated

import typer

import atp_tune
from atp_tune.cli.options import STUDY, StudyLabel, option, wrong
from atp_tune.cli.running import RunOptions, start


def _version(asked: bool) -> None:
    if asked:
        print(f"atp_tune {atp_tune.__version__}")
        raise typer.Exit


def run(
    context: typer.Context,
    study: Annotated[str | None, STUDY] = None,
    study_name: StudyLabel = None,
    version: Annotated[bool, option("", "Print the version.", "--version", is_eager=True, callback=_version)] = False,
    *,
    options: RunOptions,
) -> None:
    """Search for the per-block sparsities at which a pruned language model has the lowest perplexity.

    `python tune.py MODEL --sparsity 0.6` takes a model by its hub id, folder or .gguf file, writes a study file for it
    and runs it; `python tune.py MODEL --help` lists its options.

    `python tune.py --study smol` runs a study of a real 30-block Llama on a laptop. In each trial Optuna proposes the
    sparsities, the dense checkpoint is pruned to them, and the perplexity is measured. Each trial is stored when it
    ends; the same command resumes a study that was stopped.

    `--study smol-fast` is the same search, faster: it sets `search.screen`, `search.stopper` and `prune.statistics`,
    which docs/guides/faster.md explains. `plan` estimates the cost of a study.

    `python tune.py status --study smol` shows the trials. `python tune.py apply --config studies/smol.best.json
    --out DIR` writes the sparse checkpoint.
    """
    if context.invoked_subcommand is not None:
        return
    if study is None:
        missing = "give a model, as in `tune.py ORG/NAME`, or a study, as in --study smol; `studies` lists them"
        raise wrong("--study", missing)
    start(study, options, study_name)
