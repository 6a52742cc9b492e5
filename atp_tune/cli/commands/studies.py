"""`tune.py studies`: lists the studies."""

from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.options import Json
from atp_tune.cli.terminal import console, table

if TYPE_CHECKING:
    from atp_tune.results.status import Listed


def studies(json: Json = False) -> None:
    """List the studies in `studies/` and how far each of them is.

    Example: `python tune.py studies`
    """
    from atp_tune.results.status import to_json
    from atp_tune.spec.finding import known

    found = [study for path in known() for study in _listed(path)]
    if json:
        print(to_json(found))
        return
    rows = table("study", "state", "what")
    rows.columns[0].no_wrap = False  # beside a long name the description would have no room
    for one in found:
        rows.add_row(one.name, _state(one), one.error or one.description.removeprefix(f"{one.name}: "))
    console.print(rows)


def _state(study: "Listed") -> str:
    if study.state in ("complete", "unfinished"):
        best = f", best {study.best.value:.2f}" if study.best else ""
        return f"{study.done} of {study.total}{best}"
    return "see status" if study.state == "unknown" else study.state


def _listed(path: Path) -> "list[Listed]":
    """The study that a study file names, then the studies that were run from it with `--study-name`."""
    from atp_tune.errors import UserError
    from atp_tune.results.status import invalid, listed
    from atp_tune.results.summary import summarise
    from atp_tune.spec.studyfile import load
    from atp_tune.storage.fingerprint import is_screening
    from atp_tune.storage.opening import find_study, names_in, open_storage

    try:
        file = load(str(path))
        db = open_storage(file.storage_url, create=False) if file.database else None
        found = [find_study(db, name) for name in names_in(db)] if db else []
        own = {study.study_name: summarise(study) for study in found if study and not is_screening(study)}
        first = listed(file, own.pop(file.name, None))
        others = (one for one in own.values() if one.made_from and one.made_from.name == file.name)
        return [first, *(listed(file, one) for one in others)]
    except UserError as error:
        return [invalid(path, str(error))]
