"""Optuna's gRPC client of a storage server, for workers and a network that may fail.

`grpc://HOST:PORT` is a `tune.py serve`, `grpcs://HOST:PORT` a reverse proxy with TLS, which gets the token in
$ATP_TUNE_TOKEN. Requests are retried while the server is unreachable.

Errors: UserError if the server does not answer at the start, or for `retry.RETRY_SECONDS`.
"""

import copy
import logging
import os
from collections.abc import Callable, Container, Sequence
from functools import partial
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import grpc
import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import GrpcStorageProxy
from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import UserError
from atp_tune.storage.database import Retrying
from atp_tune.storage.progress import HEARTBEAT, experimental
from atp_tune.utils.compat import BaseHeartbeat, storage_client

log = logging.getLogger(__name__)

PORT = 13000  # of `serve`, and of Optuna
FIRST = 10  # seconds in which a server must answer at the start
DEADLINE = 30  # seconds for one request
PAUSE = 0.5  # seconds between attempts at the start
DATABASE = "its database: "  # begins a server's error about its database, not about the network
ALIVE = "alive"  # system attribute of a trial that the server takes as a heartbeat
ORDER = "order of parameters"  # system attribute in transit: Optuna's messages store parameters in unordered maps

BROKEN = grpc.StatusCode.FAILED_PRECONDITION
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
CHANNEL = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),  # without this a cut cable is noticed after 15 minutes
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def connect(address: str) -> "RemoteStorage":
    """The storage of a grpc:// or grpcs:// URL; UserError for another URL, or if no server answers."""
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port or (443 if url.scheme == "grpcs" else PORT)
    except ValueError:
        host, port = None, 0
    if not host or url.path.strip("/") or url.username or url.password:
        raise UserError("storage: not a server's URL; write grpc://HOST:13000, or grpcs://HOST:443 behind TLS")
    token = os.environ.get("ATP_TUNE_TOKEN") if url.scheme == "grpcs" else None  # never unencrypted
    with experimental():
        storage = RemoteStorage(f"[{host}]" if ":" in host else host, port, token, url.scheme)
    storage.check()
    return storage


class RemoteStorage(GrpcStorageProxy, BaseHeartbeat):
    """A client of a storage server, Optuna's with retries and heartbeats."""

    def __init__(self, host: str, port: int, token: str | None, scheme: str) -> None:
        self._scheme = scheme
        self._interceptor = Interceptor(f"{scheme}://{host}:{port}", token)
        super().__init__(host=host, port=port)

    def check(self) -> None:
        """UserError if the server does not answer within `FIRST` seconds, or refuses."""
        end = monotonic() + FIRST
        while not self._interceptor.is_known:
            try:
                self.get_all_studies()
                self._interceptor.is_known = True
            except grpc.RpcError as error:
                if error.code() not in AWAY or monotonic() >= end:
                    raise UserError(f"storage {self._interceptor.address}: {_reason(error, self._scheme)}") from None
                sleep(PAUSE)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Ends or takes a trial; no error if a first attempt, whose answer was lost, told it the same."""
        tell = partial(super().set_trial_state_values, trial_id, state, values)
        return self._interceptor.retrying.tell(tell, self, trial_id, state, values)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Keeps the order of parameters, which Optuna's messages lose."""
        return super().create_new_trial(study_id, template_trial and with_order(template_trial))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Keeps the order of parameters, which Optuna's messages lose."""
        return in_order(super().get_trial(trial_id))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Keeps the order of parameters, which Optuna's messages lose."""
        trials = [in_order(trial) for trial in super().get_all_trials(study_id, False, states)]
        return copy.deepcopy(trials) if deepcopy else trials

    def record_heartbeat(self, trial_id: int) -> None:
        """Sends a heartbeat; an unreachable server, or a trial that the server has failed, is no error."""
        try:
            self.set_trial_system_attr(trial_id, ALIVE, True)
        except (grpc.RpcError, UserError, UpdateFinishedTrialError, KeyError):
            log.debug("no heartbeat for trial id %d", trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        return []  # the server recovers them

    def get_heartbeat_interval(self) -> int:
        """Seconds between heartbeats of a running trial."""
        return HEARTBEAT

    def get_heartbeat_stale_trial_callback(self) -> Callable[[optuna.Study, FrozenTrial], None] | None:
        """None: the server queues lost trials again."""
        return None

    def _setup(self) -> None:
        target = f"{self._host}:{self._port}"
        if self._scheme == "grpcs":
            channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=CHANNEL)
        else:
            channel = grpc.insecure_channel(target, options=CHANNEL)
        self._channel = grpc.intercept_channel(channel, self._interceptor)
        self._stub, self._cache = storage_client(self._channel)


def with_order(trial: FrozenTrial) -> FrozenTrial:
    """A copy of the trial to send, whose system attribute `ORDER` lists the parameters."""
    sent = copy.copy(trial)
    sent.system_attrs = {**trial.system_attrs, ORDER: list(trial.params)}
    return sent


def in_order(trial: FrozenTrial) -> FrozenTrial:
    """The received trial as before `with_order`; unchanged if its sender's version did not add `ORDER`.

    ValueError or AttributeError if `ORDER` lists other parameters, or is no list.
    """
    names = trial.system_attrs.pop(ORDER, None)
    if names is not None:
        order = sorted(trial.params, key=names.index)
        trial.params = {name: trial.params[name] for name in order}
        trial.distributions = {name: trial.distributions[name] for name in order}
    return trial


class Interceptor(grpc.UnaryUnaryClientInterceptor):
    """Adds the token to each request, and retries requests once the server is known to be a storage server."""

    def __init__(self, address: str, token: str | None) -> None:
        self.is_known = False  # the server has answered as a storage server; until then requests are not retried
        self.address = address
        self.retrying = Retrying(address)
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """The answer to a request; UserError without one for `RETRY_SECONDS`."""
        metadata = (*(details.metadata or ()), *self._metadata)
        details = SimpleNamespace(method=details.method, timeout=DEADLINE, metadata=metadata)
        if not self.is_known:
            return continuation(details, request)

        def answered() -> tuple[Any, str]:
            """An answer, and why it is none: the server or its database is unreachable."""
            call = continuation(details, request)
            if call.code() not in AWAY:
                return call, ""
            words = _words(call)
            return call, f"says of {words}" if words.startswith(DATABASE) else "does not answer"

        call = self.retrying.ask(answered)
        if call.code() == BROKEN and (words := _words(call)).startswith(DATABASE):  # Optuna uses this code too
            raise UserError(f"{self.address}: {words}")
        return call


def _words(call: Any) -> str:
    return " ".join(str(call.details()).split())[:300]


def _reason(error: grpc.RpcError, scheme: str) -> str:
    code, words = error.code(), _words(error)[:200]
    if code in AWAY and "handshake" in words.lower():
        return f"no TLS that can be trusted ({words}); see docs/serving.md"
    if code in AWAY:
        tls = "" if "refused" in words or scheme == "grpcs" else " (or, where TLS is in front of it, write grpcs://)"
        return f"nobody answers; start it on that machine with: python tune.py serve --listen 0.0.0.0{tls}"
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return "refuses; set ATP_TUNE_TOKEN to the token that its proxy asks for"
    return f"is no server of trials ({code.name.lower()}: {words})"
