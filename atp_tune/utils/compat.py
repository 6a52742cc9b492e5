"""The private parts of other libraries that this package uses, with the reason.

No other module imports a private name of another library. `tests/test_compat.py` reports which release removed one, and
pyproject.toml bounds the versions of these libraries. grpc and Ray are imported where they are needed.

Optuna's heartbeats
    BaseHeartbeat         the base class by which Optuna recognises a storage with heartbeats
    is_heartbeat_enabled  whether a storage has heartbeats. The public `fail_stale_trials` also fails trials whose
                          process is alive
    FrozenStudy           the type that the public `BaseStorage.get_all_studies` returns
Optuna's tables
    TrialHeartbeatModel, TrialModel  read all heartbeats, and the database's clock, in one query
    TrialUserAttributeModel, TrialSystemAttributeModel, StudySystemAttributeModel
                          write several attributes in one transaction; `set_trial_user_attr` writes one
    transaction           a transaction that Optuna's own calls join, with Optuna's errors
Optuna's Gaussian process
    SearchSpace           converts points to the GP's unit cube
"""

from typing import Any

from optuna._gp.search_space import SearchSpace
from optuna.samplers import GPSampler
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.storages._rdb.models import (
    StudySystemAttributeModel,
    TrialHeartbeatModel,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from optuna.storages._rdb.storage import _create_scoped_session as transaction
from optuna.study._frozen import FrozenStudy

__all__ = [
    "BaseHeartbeat", "FrozenStudy", "SearchSpace", "StudySystemAttributeModel", "TrialHeartbeatModel", "TrialModel",
    "TrialSystemAttributeModel", "TrialUserAttributeModel", "fitted", "is_heartbeat_enabled", "ray_address",
    "serve_storage", "storage_client", "transaction",
]  # fmt: skip


def fitted(sampler: GPSampler) -> Any:
    """The last fitted Gaussian process of the first objective: its `posterior` takes tensors like its `_X_train`."""
    assert sampler._gprs_cache_list is not None
    return sampler._gprs_cache_list[0]


def storage_client(channel: Any) -> tuple[Any, Any]:
    """A gRPC client of Optuna's on a channel, and its cache of finished trials.

    The public `GrpcStorageProxy` creates its own channel, without TLS, token and keepalives.
    """
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.client import GrpcClientCache

    stub = api_pb2_grpc.StorageServiceStub(channel)  # type: ignore[no-untyped-call]
    return stub, GrpcClientCache(stub)


def serve_storage(storage: BaseStorage, server: Any) -> None:
    """Adds a storage to a gRPC server. The public `run_grpc_proxy_server` accepts no interceptors, and blocks."""
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    service = OptunaStorageProxyService(storage)
    api_pb2_grpc.add_StorageServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]


def ray_address(name: str) -> str:
    """The HOST:PORT of a Ray cluster's name, such as `auto`; the public `ray.init` tries a bad one for minutes."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    return canonicalize_bootstrap_address_or_die(name)
