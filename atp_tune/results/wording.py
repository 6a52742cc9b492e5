"""A trial in a few words, the same on the screen, in notes, figures and reports."""

import shlex

from optuna.trial import FrozenTrial, TrialState

from atp_tune.plan import shown
from atp_tune.results.summary import Summary, allocation_of, is_uniform, parameters_of
from atp_tune.trials.storage import RETRIES, is_given_up


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
    return f"{trial.params.get('pruner', '')} + {allocation}" + (f" ({listed})" if listed else "")


def duration(seconds: float) -> str:
    """A time as people say it, in one unit: `48 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def remark_of(trial: FrozenTrial, summary: Summary | None = None) -> str:
    """What is unusual about a trial: why it has no value of its own, and where it ran if others of its study did not.

    The latter takes the summary. Empty for the usual trial.
    """
    unlike = summary.unlike.get(trial.number, "") if summary else ""
    return "; ".join(part for part in (_reason(trial), unlike) if part)


def mixture_of(summary: Summary) -> str:
    """One sentence for a study whose trials ran on several devices or in several number formats; else empty."""
    if not summary.unlike:
        return ""
    others = ", ".join(dict.fromkeys(summary.unlike.values()))
    return (
        f"{len(summary.unlike)} of {len(summary.trials)} trials ran {others}: perplexities of different devices differ "
        "in the last digits, those of different number formats by per cents."
    )


def beginning_of(summary: Summary) -> str:
    """One sentence for a study whose windows begin with BOS; else empty."""
    if not summary.bos:
        return ""
    return f"BOS: {summary.bos_effect or 'every window begins with it, as the study file asks'}."


def _reason(trial: FrozenTrial) -> str:
    attrs = trial.user_attrs
    if "repeats" in attrs:
        return f"as trial {attrs['repeats']}"
    if "stopped_after" in attrs:
        return f"stopped after {attrs['stopped_after']} windows"
    unknown = "gave no sign of life" if trial.state == TrialState.FAIL else ""
    reason = str(attrs.get("failure") or attrs.get("lost") or unknown)
    return f"{reason}, {RETRIES + 1} times: given up" if is_given_up(trial) else reason


def command_of(summary: Summary, *more: str) -> str:
    """The command that goes on with a study, with all that it was last run with; its study file must be known."""
    file = summary.made_from
    assert file is not None
    words = ["--study", file.name, *(["--study-name", summary.name] if summary.name != file.name else [])]
    for override in file.overrides:
        key, _, value = override.partition("=")
        words += ["--trials", value] if key == "search.trials" else ["--set", override]
    return shlex.join(["python", "tune.py", *words, *more])
