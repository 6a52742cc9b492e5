"""`tune.py status`: shows the trials of a study."""

from datetime import datetime
from pathlib import Path

from atp_tune.cli.options import load_study, wrong


def status(
    *,
    study: str,
    watch: bool = False,
    every: float | None = None,
    json: bool = False,
    storage: str | None = None,
    study_name: str | None = None,
    set_: list[str] | None = None,
) -> None:
    """Show the trials of a study, the best one and the range of perplexities. Works while the study runs.

    `--watch` waits for a study that does not exist yet; Ctrl-C ends it with exit code 130. Without a terminal
    it prints, each time a trial starts or ends, the trials that changed; with `--json`, the whole document on one line.
    `atp_tune/results/status.py` lists the keys of the document.

    Example: `python tune.py status --study smol --watch`

    Options:
        watch: Repeat until the study is complete.
        every SECONDS 0.1..: Seconds between two updates of `--watch`; default: 2.
    """
    if every is not None and not watch:
        raise wrong("--every", "only with --watch")
    from atp_tune.cli.live_status import watch as follow
    from atp_tune.cli.tables import show_status
    from atp_tune.results.status import status_of, to_json
    from atp_tune.results.stored import stored_study
    from atp_tune.results.summary import summarise

    file = load_study(study, storage, None, set_)
    if watch:
        follow(file, study_name or file.name, every or 2, json)
        return
    found = summarise(stored_study(file, study_name))
    print(to_json(status_of(found, datetime.now()))) if json else show_status(found, file)


# --- `tune.py report`: writes a report of one or several studies.


def report(
    *,
    study: list[str],
    study_name: list[str] | None = None,
    format_: str | None = None,
    out: Path | None = None,
    storage: str | None = None,
    set_: list[str] | None = None,
) -> None:
    """Write a report with figures. It reads only the storage, so it works while the study runs.

    Example: `python tune.py report --study smol`

    Options:
        study NAME: Name or path of a study; several are compared.
        study_name NAME: Name in the storage: one per study, or several of one study.
        format_ FORMAT: html, md, json, png or latex; default: html.
        out FILE: Default: NAME.report.html beside the study file.
    """
    from atp_tune.cli.terminal import quiet
    from atp_tune.errors import printable
    from atp_tune.report import check, gather, kind_of, name_of, write
    from atp_tune.results.stored import stored_study

    kind = kind_of(format_, out)
    found = [(load_study(one, storage, None, set_), name) for one, name in _paired(study, study_name or [])]
    names = [name or file.name for file, name in found]
    target = out or found[0][0].beside(name_of(names, kind))
    check(kind, target)
    stored = [stored_study(file, name) for file, name in found]
    now = datetime.now()
    with quiet():
        write([gather(one, now) for one in stored], kind, target)
    print(printable(str(target)))


def _paired(studies: list[str], names: list[str]) -> list[tuple[str, str | None]]:
    """Studies with their names in the storage: none, one for each, or several of one study file."""
    from atp_tune.errors import UserError

    if len(studies) == 1 and names:
        return [(studies[0], name) for name in names]
    if names and len(names) != len(studies):
        raise UserError(f"--study-name: must be given once for each --study, got {len(names)} for {len(studies)}")
    return [(study, names[index] if names else None) for index, study in enumerate(studies)]
