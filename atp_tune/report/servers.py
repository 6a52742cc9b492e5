"""The two servers of `tune.py serve`: the dashboard over HTTP, and Optuna's storage proxy over gRPC for workers."""

import errno
import json
import logging
import re
import socket
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Lock, Thread
from time import monotonic, sleep
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import grpc
import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, get_storage
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import wsgi

from atp_tune.config.finding import known
from atp_tune.config.studyfile import absolute_storage, load
from atp_tune.errors import UserError
from atp_tune.report import formats
from atp_tune.report.figures import FIGURES
from atp_tune.report.publishing import (
    PREFIX,
    attach,
    best_as_json,
    columns,
    dashboard_figures,
    dashboard_note,
    study_note,
    trial_note,
    without_rests,
)
from atp_tune.results.goals import best_trial, pareto_front
from atp_tune.results.status import study_columns
from atp_tune.results.summary import final_numbers, summarise
from atp_tune.storage import progress
from atp_tune.storage.attributes import Attributes, ValidatedStudy
from atp_tune.storage.database import (
    CONFIG,
    REPORT,
    Database,
    Store,
    error_reason,
    is_away,
    may_pass,
    refuse_link,
    without_password,
)
from atp_tune.storage.opening import artifact_folder, find_study, is_remote, names_in, network_warning, open_database
from atp_tune.storage.remote import ALIVE, BROKEN, DATABASE, in_order, with_order
from atp_tune.utils.compat import FrozenStudy, serve_storage

# --- The storage as the dashboard sees it: with notes, figures and readable columns.
#
# Notes and figures are made when the dashboard asks for them, and are not stored. So they are always current and whole,
# cost a trial no time, and do not depend on the machine that ran it.


def make_view(address: str, storage: BaseStorage, join: str = "grpc://HOST:13000") -> "DashboardView":
    """The view of an existing database; `storage`: the same without additions; `join`: its URL for workers."""
    view = open_database(address, False, DashboardView)
    assert view is not None
    view.additions = Additions(storage, without_password(address), join)
    return view


class DashboardView(Database):
    """A database with notes and figures on its studies, and with attributes that fit the columns of a table."""

    retries = False
    additions: "Additions"

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies; notes and figures are made when they are read."""
        studies = super().get_all_studies()
        for study in studies:
            study.user_attrs = study_columns(study.user_attrs)
            study.system_attrs = cast(dict[str, Any], self._with_additions(study._study_id, study.system_attrs))
        return studies

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """System attributes of a study, with its notes and figures."""
        return dict(self._with_additions(study_id, super().get_study_system_attrs(study_id)))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """All trials, with the attributes for the table."""
        return [_in_columns(trial) for trial in super().get_all_trials(study_id, True, states)]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial, with the attributes for the table."""
        return _in_columns(super().get_trial(trial_id))

    def _with_additions(self, study_id: int, stored: Attributes) -> "Later":
        return Later(stored, lambda: self.additions.of(study_id, stored))


def _in_columns(trial: FrozenTrial) -> FrozenTrial:
    trial.user_attrs = columns(trial)
    trial.values = trial.values and [round(value, 4) for value in trial.values]  # the page prints all digits
    return trial


@dataclass(eq=False)
class Later(Mapping[str, Any]):
    """Stored attributes, and additions that are made when one of them, or the whole mapping, is first read.

    The dashboard's list of studies reads one stored attribute of each study, and need not draw figures.
    """

    stored: Attributes
    make: Callable[[], Attributes]

    def __getitem__(self, key: str) -> Any:
        return self._whole[key] if key.startswith(PREFIX) else self.stored[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    @cached_property
    def _whole(self) -> Attributes:
        return {**self.stored, **self.make()}


@dataclass(eq=False)
class Additions:
    """Notes and figures of studies, remade when a study has changed; thread-safe."""

    storage: BaseStorage
    address: str
    join: str
    _lock: Lock = field(default_factory=Lock)
    _made: dict[int, tuple[object, Attributes]] = field(default_factory=dict)
    _changes: int = 0

    def of(self, study_id: int, stored: Attributes) -> Attributes:
        """The notes and figures of a study, as system attributes in the dashboard's format."""
        with self._lock:
            study = ValidatedStudy(self.storage.get_study_name_from_id(study_id), self.storage)
            # A value that changes when notes or figures must be remade.
            trials = [(trial.state, len(trial.user_attrs)) for trial in progress.trials_in(study)]
            attrs, own = study.user_attrs, {key: value for key, value in stored.items() if key.startswith(PREFIX)}
            state = trials, attrs.get("total"), final_numbers(study), attrs.get("gp_posterior"), own
            if study_id not in self._made or self._made[study_id][0] != state:
                self._changes += 1
                summary = summarise(study)
                notes = dashboard_note(study_note(summary, self.address, self.join), stored, step=self._changes)
                for trial in summary.trials:
                    notes |= dashboard_note(trial_note(trial, summary), stored, trial._trial_id, self._changes)
                self._made[study_id] = state, without_rests(dashboard_figures(summary) | notes, stored)
            return self._made[study_id][1]


# --- What a server does for its studies: queues lost trials again, and keeps artifacts current.


@dataclass(eq=False)
class Maintenance:
    """Maintains all studies of a storage; `artifacts` is the folder of the files that the dashboard offers."""

    storage: BaseStorage
    artifacts: Path
    tell: Callable[[str], None]
    _seen: dict[int, object] = field(default_factory=dict)
    _trouble: str = ""
    _told: dict[str, str] = field(default_factory=dict)

    def turn(self) -> None:
        """One round over all studies; an error is reported once, and retried in the next round."""
        trouble = ""
        try:
            attached = False
            for name in names_in(self.storage):
                study = find_study(self.storage, name)
                if study is None or "fingerprint" not in study.user_attrs:
                    continue
                try:
                    # Queues lost trials again, since workers on other machines cannot detect that a trial is lost.
                    for number in progress.requeue_lost(study):
                        trial = progress.trials_in(study)[number]
                        reason, why = trial.user_attrs.get("lost", "sent no heartbeat"), progress.given_up(trial)
                        end = f"cut off {why}, it is given up" if why else "it is queued again"
                        self.tell(f"{study.study_name}: trial {number}: {reason}; {end}")
                    attached = attached or self._attach(study)  # one per round: a report takes half a second and 5 MB
                except UserError as error:
                    if self._told.get(name) != str(error):
                        self.tell(f"warning: {error}")
                    self._told[name] = str(error)
        except (OSError, StorageInternalError, UserError) as error:
            trouble = f"warning: {error_reason(error)}"
        if trouble and trouble != self._trouble:
            self.tell(trouble)
        self._trouble = trouble

    def _attach(self, study: optuna.Study) -> bool:
        """Attaches best configuration and report if best trial, front or final numbers changed; whether it did."""
        best = best_trial(study)
        state = best and (best.number, final_numbers(study), [trial.number for trial in pareto_front(study)])
        if best is None or self._seen.get(study._study_id) == state:
            return False
        attach(study, self.artifacts, REPORT, formats.html([formats.gather(study, datetime.now())]))
        if (config := best_as_json(study, summarise(study))) is not None:
            attach(study, self.artifacts, CONFIG, config)
        self._seen[study._study_id] = state
        return True


STUDY = re.compile(r"/api/studies/\d+")  # path of a study and its figures
FILE = "/artifacts/"  # start of the path of an artifact; its name is at the end
APART = [  # gives a page among the artifacts another origin than the dashboard: it cannot delete studies
    ("Content-Security-Policy", "sandbox allow-scripts allow-downloads allow-modals allow-popups"),
    ("X-Content-Type-Options", "nosniff"),
]
THREADS = 16  # requests of workers that are answered in parallel
LAST_REQUESTS = 10  # seconds for requests in progress when the server stops
PINGS = (
    ("grpc.so_reuseport", 0),  # two servers on one port would each get some of the workers
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.max_receive_message_length", -1),
)


class ServedDatabase(Database):
    """A database that records heartbeats of trials on other machines with its own clock."""

    retries = False

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Stores the attribute, or records a heartbeat if it is `ALIVE`."""
        if key == ALIVE:
            self.record_heartbeat(trial_id)
        else:
            super().set_trial_system_attr(trial_id, key, value)


@contextmanager
def dashboard(storage: BaseStorage, artifacts: Store, host: str, port: int) -> Iterator[int]:
    """Serves Optuna's dashboard and yields its port (0: any); at the end answers requests in progress."""
    check_free(host, port, "--port")
    logging.getLogger("optuna_dashboard").setLevel(logging.CRITICAL)  # browser and maintenance show errors
    server_class = type("Server", (_Server,), {"address_family": _family(host)})
    server: WSGIServer
    app = _guarded(wsgi(storage, artifacts), artifacts, is_loopback(host))
    with make_server(host, port, app, server_class, _Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="dashboard")
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _guarded(app: Any, artifacts: Store, is_local: bool) -> Any:
    """The app, with artifacts in a sandbox, since a study may come from a stranger, and figures in order.

    `is_local`: it answers requests to an IP address or localhost alone. Otherwise a stranger's page, with a host name
    that resolves to this machine, could use it from the user's browser.
    """

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        def refused(status: str, why: bytes) -> list[bytes]:
            start_response(status, [("Content-Type", "text/plain")])
            return [why]

        path, name = environ.get("PATH_INFO", ""), re.sub(r":\d*$", "", environ.get("HTTP_HOST", "")).strip("[]")
        if is_local and name.lower() != "localhost" and not _is_address(name):
            return refused(
                "403 Forbidden", b"ask for localhost; behind a proxy, pass on its Host as docs/nginx.conf does\n"
            )
        if path.startswith(FILE):
            if not artifacts.has(path.rpartition("/")[2]):
                return refused("404 Not Found", b"no such artifact\n")
            return app(environ, lambda status, headers, *more: start_response(status, [*headers, *APART], *more))
        if not STUDY.fullmatch(path) or environ["REQUEST_METHOD"] != "GET":
            return app(environ, start_response)
        # A study, with its figures in the order of `FIGURES`: the dashboard keeps them in a set.
        begun = list[Any]()
        body = b"".join(app(environ, lambda *arguments: begun.append(arguments)))
        status, headers = begun[0][:2]
        if status.startswith("200"):
            study = json.loads(body)
            study["plotly_graph_objects"].sort(key=lambda figure: [*FIGURES, figure["id"]].index(figure["id"]))
            body = json.dumps(study).encode()
        others = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*others, ("Content-Length", str(len(body)))])
        return [body]

    return answer


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = False  # closing waits for responses in progress


class _Handler(WSGIRequestHandler):
    timeout = 30  # seconds for a browser to send its request

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: a dashboard sends a request every few seconds."""


@contextmanager
def proxy(storage: BaseStorage, host: str, port: int) -> Iterator[int]:
    """Serves Optuna's storage proxy and yields its port (0: any); at the end answers requests in progress."""
    check_free(host, port, "--grpc-port")
    server = grpc.server(ThreadPoolExecutor(THREADS), interceptors=[Relay()], options=PINGS)
    serve_storage(cast(BaseStorage, InOrder(storage)), server)
    bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(LAST_REQUESTS).wait()


@dataclass(eq=False)
class InOrder:
    """The storage for the proxy: adds the order of parameters to trials, which gRPC messages lose."""

    storage: BaseStorage

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None) -> int:
        """Stores a trial that a worker sent."""
        return self.storage.create_new_trial(study_id, template_trial and in_order(template_trial))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial to send."""
        return with_order(self.storage.get_trial(trial_id))

    def get_all_trials(self, study_id: int, deepcopy: bool) -> list[FrozenTrial]:
        """Trials to send."""
        return [with_order(trial) for trial in self.storage.get_all_trials(study_id, deepcopy)]


class Relay(grpc.ServerInterceptor):
    """Reports errors of the database to workers: as unavailable, so that they retry, if it is away or its disk is full.

    Other errors are sent as such, since retries would not help.
    """

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a request, with errors of the database reported."""
        handler = continuation(details)
        return handler and handler._replace(unary_unary=lambda *args: self._answer(handler.unary_unary, *args))

    def _answer(self, answer: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request, context)
        except StorageInternalError as error:
            if not is_away(error):
                raise
            context.abort(grpc.StatusCode.UNAVAILABLE, f"{DATABASE}{error_reason(error)}")
        except UserError as error:
            context.abort(grpc.StatusCode.UNAVAILABLE if may_pass(error) else BROKEN, f"{DATABASE}{error}")


def check_free(host: str, port: int, option: str) -> None:
    """UserError with the reason if the port cannot be opened."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--listen {host}: {error.strerror}; write an address of this machine") from None
        raise UserError(f"{host}:{port}: {error.strerror}; choose another port with {option} N") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reachable_host(listen: str) -> str:
    """The host by which others reach a listening address, as in URLs."""
    host = listen if listen not in ("0.0.0.0", "::") else socket.gethostname()
    return f"[{host}]" if ":" in host else host


# --- `tune.py serve`: chooses the storage, and runs both servers and the maintenance of studies until told to stop.

TURN = 2  # seconds between two rounds of maintenance
LOOK = 0.1  # seconds between two checks whether to stop


def serve(
    address: str,
    listen: str,
    ports: tuple[int, int],
    artifacts: Path | None,
    is_told_to_stop: Callable[[], bool],
    ready: Callable[[list[str], int, int], None],
    tell: Callable[[str], None],
) -> None:
    """Serves until `is_told_to_stop`, then lets requests in progress end; `tell` gets messages of one line.

    `ports`: of the dashboard and of workers; `ready` gets the names of the studies and the ports that are served.
    `artifacts`: by default the folder beside the database. UserError if a port cannot be opened or a file cannot be
    written.
    """
    if artifacts is None:  # a link is refused, which a stranger may have made
        refuse_link(artifacts := artifact_folder(address))
    if is_remote(address):
        raise UserError("serve: a server's URL is for workers; serve the database itself, as in sqlite:///FILE.db")
    # UserError if the folder of a SQLite file does not exist, probably by a typing error.
    _, is_sqlite, path = address.partition("sqlite:///")
    if is_sqlite and not Path(path.partition("?")[0]).parent.is_dir():
        raise UserError(f"storage {path}: its folder does not exist; name a file in a folder that does")
    database = open_database(address, True, ServedDatabase)
    assert database is not None
    if warning := network_warning(address):
        tell(warning)
    storage = get_storage(database)  # with Optuna's cache of finished trials
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--artifacts {artifacts}: {error.strerror}; name a folder that can be written") from None
    maintenance = Maintenance(storage, artifacts, tell)
    with proxy(storage, listen, ports[1]) as grpc_port:
        view = make_view(address, storage, f"grpc://{reachable_host(listen)}:{grpc_port}")
        with dashboard(view, Store(artifacts), listen, ports[0]) as port:
            ready(names_in(storage), port, grpc_port)
            turn = 0.0
            while not is_told_to_stop():
                if monotonic() >= turn:
                    maintenance.turn()
                    turn = monotonic() + TURN
                sleep(LOOK)


def choose(study: str | None, storage: str | None) -> tuple[str, list[str]]:
    """The storage to serve, and studies whose databases could be served in its place, if none was named.

    UserError if there is no database to serve.
    """
    if storage is not None:
        return absolute_storage(storage, Path()), []
    if study is not None:
        return load(study).storage_url, []
    # The databases of the known studies, the one that was changed last first.
    databases = set[Path]()
    for path in known().values():
        try:
            database = load(str(path)).database
        except UserError:  # an invalid study file does not prevent serving the others
            continue
        if database is not None and database.exists():
            databases.add(database)
    if not databases:
        raise UserError("serve: no study has a database yet; run one, as in: python tune.py --study smol")
    newest, *older = sorted(databases, key=lambda database: database.stat().st_mtime, reverse=True)
    return f"sqlite:///{newest}", [file.stem for file in older]
