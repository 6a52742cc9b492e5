"""`tune.py serve`: chooses the storage, and runs both servers and the maintenance of studies until told to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from optuna.storages import get_storage

from atp_tune.errors import UserError
from atp_tune.serving.dashboard_storage import make_view
from atp_tune.serving.maintenance import Maintenance
from atp_tune.serving.servers import ServedDatabase, dashboard, host_of, proxy
from atp_tune.spec.finding import known
from atp_tune.spec.studyfile import absolute_storage, load
from atp_tune.storage.artifacts import Store, refuse_link
from atp_tune.storage.opening import artifacts_of, is_remote, names_in, network_warning, open_database

TURN = 2  # seconds between two rounds of maintenance
LOOK = 0.1  # seconds between two checks whether to stop


@dataclass(frozen=True)
class Service:
    """What to serve and where: storage URL, address to listen on, two ports, folder of artifacts.

    `others`: studies whose databases could be served in its place, if none was named.
    """

    address: str
    listen: str
    port: int
    grpc_port: int
    artifacts: Path
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    """What is served: names of studies, and ports."""

    studies: list[str]
    port: int
    grpc_port: int


def serve(
    service: Service, is_told_to_stop: Callable[[], bool], ready: Callable[[Served], None], tell: Callable[[str], None]
) -> None:
    """Serves until `is_told_to_stop`, then lets requests in progress end; `tell` gets messages of one line.

    UserError if a port cannot be opened or a file cannot be written.
    """
    if is_remote(service.address):
        raise UserError("serve: a server's URL is for workers; serve the database itself, as in sqlite:///FILE.db")
    _check_folder(service.address)
    database = open_database(service.address, True, ServedDatabase)
    assert database is not None
    if warning := network_warning(service.address):
        tell(warning)
    storage = get_storage(database)  # with Optuna's cache of finished trials
    store = Store(_folder(service.artifacts))
    maintenance = Maintenance(storage, service.artifacts, tell)
    with proxy(storage, service.listen, service.grpc_port) as grpc_port:
        view = make_view(service.address, storage, f"grpc://{host_of(service.listen)}:{grpc_port}")
        with dashboard(view, store, service.listen, service.port) as port:
            ready(Served(names_in(storage), port, grpc_port))
            turn = 0.0
            while not is_told_to_stop():
                if monotonic() >= turn:
                    maintenance.turn()
                    turn = monotonic() + TURN
                sleep(LOOK)


def _check_folder(address: str) -> None:
    """UserError if the folder of a SQLite file does not exist, probably by a typing error."""
    _, is_sqlite, path = address.partition("sqlite:///")
    if is_sqlite and not Path(path.partition("?")[0]).parent.is_dir():
        raise UserError(f"storage {path}: its folder does not exist; name a file in a folder that does")


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--artifacts {path}: {error.strerror}; name a folder that can be written") from None
    return path


def choose(
    study: str | None, storage: str | None, listen: str, port: int, grpc_port: int, artifacts: Path | None
) -> Service:
    """The service that the options ask for; UserError if there is no database to serve."""
    others: tuple[str, ...] = ()
    if storage is not None:
        address = absolute_storage(storage, Path())
    elif study is not None:
        address = load(study).storage_url
    else:
        newest, *older = _databases()
        address, others = f"sqlite:///{newest}", tuple(file.stem for file in older)
    return Service(address, listen, port, grpc_port, artifacts or _beside(address), others)


def _beside(address: str) -> Path:
    """The default folder of a database's artifacts; UserError for a link, which a stranger may have made."""
    folder = artifacts_of(address)
    refuse_link(folder)
    return folder


def _databases() -> list[Path]:
    """The databases of the known studies, the one that was changed last first; UserError if there is none."""
    databases = set[Path]()
    for path in known():
        try:
            database = load(str(path)).database
        except UserError:  # an invalid study file does not prevent serving the others
            continue
        if database is not None and database.exists():
            databases.add(database)
    if not databases:
        raise UserError("serve: no study has a database yet; run one, as in: python tune.py --study smol")
    return sorted(databases, key=lambda database: database.stat().st_mtime, reverse=True)
