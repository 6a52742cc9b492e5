"""Which storage `serve` serves: the named one, a study's, or the one that was changed last."""

from pathlib import Path

from atp_tune.errors import UserError
from atp_tune.serving.serve import Service
from atp_tune.spec.finding import known
from atp_tune.spec.studyfile import absolute_storage, load
from atp_tune.storage.opening import artifacts_of


def choose(
    study: str | None, storage: str | None, listen: str, port: int, grpc_port: int, artifacts: Path | None
) -> Service:
    """The service that was asked for; UserError if it is not clear which."""
    if storage is not None:
        address = absolute_storage(storage, Path())
    else:
        address = load(study).storage_url if study is not None else f"sqlite:///{_newest()}"
    return Service(address, listen, port, grpc_port, artifacts or _beside(address))


def _beside(address: str) -> Path:
    """The folder of artifacts that belongs to a database; UserError for a link, which may be a stranger's."""
    folder = artifacts_of(address)
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a link to {folder.resolve()}, where files would be written; name that folder with "
            "--artifacts DIR, or remove the link"
        )
    return folder


def _newest() -> Path:
    databases = []
    for path in known():
        try:
            database = load(str(path)).database
        except UserError:  # an invalid study file is no reason not to serve the others
            continue
        if database is not None and database.exists():
            databases.append(database)
    if not databases:
        raise UserError("serve: no study has a database yet; run one, as in: python tune.py --study smol")
    return max(databases, key=lambda database: database.stat().st_mtime)
