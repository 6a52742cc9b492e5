"""The two servers of `tune.py serve`: the dashboard over HTTP, and Optuna's storage proxy over gRPC for workers."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import grpc
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.servicer import OptunaStorageProxyService
from optuna_dashboard import wsgi

from atp_tune.database import Database, is_away, reason_of
from atp_tune.errors import UserError
from atp_tune.remote import ALIVE

THREADS = 16  # requests of workers that are answered at a time
LAST_REQUESTS = 10  # seconds that requests in progress have to end when the server stops
PINGS = (
    ("grpc.so_reuseport", 0),  # two servers on one port would share the workers out between them
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.max_receive_message_length", -1),
)


class ServedDatabase(Database):
    """A database that takes the heartbeats of trials on other machines, by its own clock."""

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """As Optuna's, but for the attribute that is a sign of life."""
        if key == ALIVE:
            self.record_heartbeat(trial_id)
        else:
            super().set_trial_system_attr(trial_id, key, value)


@contextmanager
def dashboard(storage: BaseStorage, artifacts: FileSystemArtifactStore, host: str, port: int) -> Iterator[int]:
    """Optuna's dashboard on a port (0: any), which is yielded; requests in progress are answered before it ends."""
    check_free(host, port, "--port")
    server_class = type("Server", (_Server,), {"address_family": _family(host)})
    server: WSGIServer
    with make_server(host, port, wsgi(storage, artifacts), server_class, _Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="dashboard")
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = False  # closing waits for what is being written


class _Handler(WSGIRequestHandler):
    timeout = 30  # seconds for a browser to send its request

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a dashboard asks every few seconds."""


@contextmanager
def proxy(storage: BaseStorage, host: str, port: int) -> Iterator[int]:
    """Optuna's storage proxy on a port (0: any), which is yielded; requests in progress are answered before it ends."""
    check_free(host, port, "--grpc-port")
    server = grpc.server(ThreadPoolExecutor(THREADS), interceptors=[Relay()], options=PINGS)
    service = OptunaStorageProxyService(storage)
    api_pb2_grpc.add_StorageServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    server.start()
    try:
        yield bound
    finally:
        server.stop(LAST_REQUESTS).wait()


class Relay(grpc.ServerInterceptor):
    """Tells a worker that the database behind the server is away as if the server were: it asks again."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a request, so wrapped."""
        handler = continuation(details)
        return handler and handler._replace(unary_unary=lambda *asked: self._answer(handler.unary_unary, *asked))

    def _answer(self, answer: Callable[..., Any], request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request, context)
        except StorageInternalError as error:
            if not is_away(error):
                raise
            context.abort(grpc.StatusCode.UNAVAILABLE, f"the database: {reason_of(error)}")


def check_free(host: str, port: int, option: str) -> None:
    """UserError if nothing can listen there, saying why."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise UserError(f"--listen {host}: {error.strerror}; write an address of this machine") from None
        raise UserError(f"{host}:{port}: {error.strerror}; choose another port with {option} N") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
