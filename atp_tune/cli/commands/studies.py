"""Lists the studies."""

from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.options import Json

if TYPE_CHECKING:
    from atp_tune.results.status import Listed


def studies(json: Json = False) -> None:
    """List the studies that can be run by name, with their state.

    Example: `python tune.py studies`
    """
    from atp_tune.cli.outcomes import show_studies
    from atp_tune.results.status import to_json
    from atp_tune.spec.studyfile import known

    found = [_listed(path) for path in known()]
    print(to_json(found)) if json else show_studies(found)


def _listed(path: Path) -> "Listed":
    from atp_tune.errors import UserError
    from atp_tune.results.status import invalid, listed
    from atp_tune.results.summary import summarise
    from atp_tune.spec.studyfile import load
    from atp_tune.trials.storage import find_study, open_storage

    try:
        file = load(str(path))
        db = open_storage(file.storage_url, create=False) if file.database else None
        study = find_study(db, file.name) if db else None
        return listed(file, summarise(study) if study else None)
    except UserError as error:
        return invalid(path, str(error))
