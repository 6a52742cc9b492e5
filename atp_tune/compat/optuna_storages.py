"""Optuna: signs of life from running trials, and studies as storages hold them.

BaseHeartbeat: by this class Optuna knows a storage that takes signs of life, so one of ours that does must be of it.
is_heartbeat_enabled: whether it takes them. The public `fail_stale_trials` asks this too, but ends the trials at once,
also those whose process lives.
FrozenStudy: what the public `BaseStorage.get_all_studies` returns.
"""

from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
from optuna.study._frozen import FrozenStudy

__all__ = ["BaseHeartbeat", "FrozenStudy", "is_heartbeat_enabled"]
