"""What this package takes from the private parts of other libraries, and for want of what public part.

Nothing else in the package imports a name with an underscore of another library. `tests/test_compat.py` says in one
line which release of which library took one away, and pyproject.toml bounds the versions of these libraries. grpc and
Ray are imported by those who need them alone.

Optuna, studies and signs of life
    BaseHeartbeat         by this class Optuna knows a storage that takes signs of life: one of ours must be of it
    is_heartbeat_enabled  whether a storage takes them. The public `fail_stale_trials` asks this too, but ends the
                          trials at once, also those whose process lives
    FrozenStudy           what the public `BaseStorage.get_all_studies` returns
Optuna, the tables of its databases
    TrialHeartbeatModel, TrialModel  to read all signs of life by the database's own clock in one query
    TrialUserAttributeModel          to write several attributes in one transaction; `set_trial_user_attr` writes one
    transaction           in the session that Optuna's own calls join, and with their errors
Optuna, its Gaussian process
    SearchSpace           points as the process sees them, in the unit cube
"""

from typing import Any

from optuna._gp.search_space import SearchSpace
from optuna.samplers import GPSampler
from optuna.storages import BaseStorage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.storages._rdb.models import TrialHeartbeatModel, TrialModel, TrialUserAttributeModel
from optuna.storages._rdb.storage import _create_scoped_session as transaction
from optuna.study._frozen import FrozenStudy

__all__ = [
    "BaseHeartbeat", "FrozenStudy", "SearchSpace", "TrialHeartbeatModel", "TrialModel", "TrialUserAttributeModel",
    "fitted", "is_heartbeat_enabled", "ray_address", "serve_storage", "storage_client", "transaction",
]  # fmt: skip


def fitted(sampler: GPSampler) -> Any:
    """The Gaussian process of the first objective as it was fitted last: `posterior` takes tensors like its `_X_train`.

    Nothing of it is public.
    """
    assert sampler._gprs_cache_list is not None
    return sampler._gprs_cache_list[0]


def storage_client(channel: Any) -> tuple[Any, Any]:
    """Optuna's gRPC client on a channel, and its memory of finished trials.

    The public `GrpcStorageProxy` makes both with a channel of its own, without TLS, token or keepalives.
    """
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.client import GrpcClientCache

    stub = api_pb2_grpc.StorageServiceStub(channel)  # type: ignore[no-untyped-call]
    return stub, GrpcClientCache(stub)


def serve_storage(storage: BaseStorage, server: Any) -> None:
    """Lets a gRPC server answer for a storage. The public `run_grpc_proxy_server` takes no interceptors, and blocks."""
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    service = OptunaStorageProxyService(storage)
    api_pb2_grpc.add_StorageServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]


def ray_address(name: str) -> str:
    """What people write for a Ray cluster, `auto` too, as HOST:PORT; the public `ray.init` would try it for minutes."""
    from ray._private.services import canonicalize_bootstrap_address_or_die

    return canonicalize_bootstrap_address_or_die(name)
