"""A trial in a few words, the same on the screen, in notes, figures and reports."""

from optuna.trial import FrozenTrial, TrialState

from atp_tune.plan import shown
from atp_tune.storage import RETRIES, is_given_up
from atp_tune.summary import allocation_of, is_uniform, parameters_of


def plan_of(trial: FrozenTrial) -> str:
    """A trial's plan: `wanda atp β=0.00569`; as much of it as is drawn yet."""
    pruner = str(trial.params.get("pruner", ""))
    if "allocation" not in trial.params:
        return pruner
    if is_uniform(trial):
        return f"{pruner} uniform"
    return f"{pruner} {trial.params['allocation']} {shown(parameters_of(trial))}".rstrip()


def method_of(trial: FrozenTrial) -> str:
    """A trial's plan as a paper names it: `wanda + atp (β = 0.00569)`."""
    allocation = allocation_of(trial)
    parameters = "" if allocation == "uniform" else shown(parameters_of(trial))
    listed = ", ".join(part.replace("=", " = ") for part in parameters.split())
    return f"{trial.params['pruner']} + {allocation}" + (f" ({listed})" if listed else "")


def remark_of(trial: FrozenTrial) -> str:
    """Why a trial is no measurement of its own, or has no value; empty for the usual one."""
    attrs = trial.user_attrs
    if "repeats" in attrs:
        return f"as trial {attrs['repeats']}"
    if "stopped_after" in attrs:
        return f"stopped after {attrs['stopped_after']} windows"
    unknown = "gave no sign of life" if trial.state == TrialState.FAIL else ""
    reason = str(attrs.get("failure") or attrs.get("lost") or unknown)
    return f"{reason}, {RETRIES + 1} times: given up" if is_given_up(trial) else reason
