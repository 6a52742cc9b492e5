"""`tune.py status`: shows the trials of a study."""

from typing import Annotated

import typer

from atp_tune.cli.options import Json, Overrides, Storage, StudyLabel, StudyName, load_study, stored_study


def status(
    study: StudyName,
    watch: Annotated[bool, typer.Option("--watch", metavar="", help="Repeat until the study is complete.")] = False,
    every: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Seconds between two updates of `--watch`; default: 2."),
    ] = None,
    json: Json = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    set_: Overrides = None,
) -> None:
    """Show the trials of a study, the best one and the range of perplexities. Works while the study runs.

    `--watch` waits for a study that does not exist yet; Ctrl-C ends it with exit code 130. Without a terminal
    it prints, each time a trial starts or ends, the trials that changed; with `--json`, the whole document on one line.
    `atp_tune/results/status.py` lists the keys of the document.

    Example: `python tune.py status --study smol --watch`
    """
    if every is not None and not watch:
        raise typer.BadParameter("only with --watch", param_hint="--every")
    from atp_tune.cli import live_status

    file = load_study(study, storage, None, set_)
    if watch:
        live_status.watch(file, study_name or file.name, every or 2, json)
    else:
        live_status.show_once(stored_study(file, study_name), file, json)
