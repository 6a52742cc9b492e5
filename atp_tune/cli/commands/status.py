"""`tune.py status`: shows the trials of a study."""

from typing import Annotated

from atp_tune.cli.options import (
    Json,
    Overrides,
    Storage,
    StudyLabel,
    StudyName,
    flag,
    load_study,
    option,
    stored_study,
    wrong,
)


def status(
    study: StudyName,
    watch: Annotated[bool, flag("--watch", "Repeat until the study is complete.")] = False,
    every: Annotated[
        float | None,
        option("SECONDS", "Seconds between two updates of `--watch`; default: 2.", min=0.1),
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
        raise wrong("--every", "only with --watch")
    from atp_tune.cli import live_status

    file = load_study(study, storage, None, set_)
    if watch:
        live_status.watch(file, study_name or file.name, every or 2, json)
    else:
        live_status.show_once(stored_study(file, study_name), file, json)
