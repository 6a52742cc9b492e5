"""Shows a study."""

from typing import Annotated

import typer

from atp_tune.cli.options import Json, Overrides, Storage, StudyLabel, StudyName, load_study, stored_study


def status(
    study: StudyName,
    watch: Annotated[bool, typer.Option("--watch", metavar="", help="Draw again until the study is complete.")] = False,
    every: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Seconds between two looks of `--watch`; default: 2."),
    ] = None,
    json: Json = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    set_: Overrides = None,
) -> None:
    """Show a study's trials, the best and the spread; also while it runs.

    `--watch` waits for a study that is not there yet, and Ctrl-C ends it with exit code 130. In a pipe it prints, each
    time that a trial began or ended, what changed; with `--json` one line that holds the whole document. The
    document's keys are in `atp_tune/results/status.py`.

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
