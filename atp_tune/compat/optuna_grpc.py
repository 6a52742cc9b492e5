"""Optuna: the two ends of its storage proxy.

api_pb2_grpc: the protocol. The public `run_grpc_proxy_server` takes no interceptors, and blocks for ever; the public
`GrpcStorageProxy` takes no TLS, token or keepalives.
GrpcClientCache: the client's memory of finished trials, which it makes together with its own channel.
OptunaStorageProxyService: what the public server serves.
"""

from optuna.storages._grpc.auto_generated import api_pb2_grpc
from optuna.storages._grpc.client import GrpcClientCache
from optuna.storages._grpc.servicer import OptunaStorageProxyService

__all__ = ["GrpcClientCache", "OptunaStorageProxyService", "api_pb2_grpc"]
