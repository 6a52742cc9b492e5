"""How much a study compresses, in words: sparsity, or bits per weight where it rounds weights."""

from optuna.trial import FrozenTrial

from atp_tune.plan import Plan, percent
from atp_tune.results.summary import Summary
from atp_tune.spec.study import Study

DENSE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def wanted(study: Study) -> str:
    """What a study asks for: `60% sparsity`, `3.5 bits`."""
    if study.sparsity is None:
        return f"{study.bits:g} bits"
    return f"{percent(study.sparsity)} sparsity" + ("" if study.bits is None else f" at {study.bits:g} bits")


def asked(summary: Summary, study: Study) -> str:
    """The same of a stored study, or of its study file where it is not stored yet."""
    if summary.bits is not None:
        return f"{summary.bits:g} bits"
    return f"{percent(summary.sparsity)} sparsity" if summary.sparsity and study.bits is None else wanted(study)


def column(summary: Summary) -> str:
    """The head of the column of amounts."""
    return "sparsity" if summary.bits is None else "bits"


def amount_of(trial: FrozenTrial, summary: Summary) -> str:
    """The share of zeros that a trial counted, or its bits per weight without and with scales; "" if not known."""
    attrs = trial.user_attrs
    if summary.bits is None:
        return f"{attrs['realised']:.2%}" if "realised" in attrs else ""
    plan, sizes = Plan.stored_in(attrs), summary.sizes
    if plan is None:
        return ""
    nominal = plan.mean_bits(sizes if len(sizes) == len(plan.levels) else [1] * len(plan.levels))
    effective = f" ({attrs['effective_bits']:.2f} with scales)" if "effective_bits" in attrs else ""
    return f"{nominal:.2f}{effective}"


def dense_amount(summary: Summary) -> str:
    """The amount of the dense model."""
    if summary.bits is None:
        return "0%"
    best = summary.best_trial
    return str(DENSE_BITS.get(best.user_attrs.get("dtype", "") if best else "", "–"))
