"""Optuna: the tables of its databases, and its way to write to them.

TrialHeartbeatModel, TrialModel: to read all signs of life by the database's own clock in one query; no public method
tells them.
TrialUserAttributeModel: to write several attributes in one transaction; the public `set_trial_user_attr` writes one.
transaction: in the session that Optuna's own calls join, and with their errors; no public method begins one.
"""

from optuna.storages._rdb.models import TrialHeartbeatModel, TrialModel, TrialUserAttributeModel
from optuna.storages._rdb.storage import _create_scoped_session as transaction

__all__ = ["TrialHeartbeatModel", "TrialModel", "TrialUserAttributeModel", "transaction"]
