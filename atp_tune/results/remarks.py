"""Sentences on what is unusual in a study, the same on the screen, in notes and reports."""

from atp_tune.results.recovery import recovery_said
from atp_tune.results.summary import Summary
from atp_tune.spec.prune import PruneConfig


def study_remarks(summary: Summary) -> list[str]:
    """Sentences on what is unusual in a study: BOS, refined or trained weights, and trials on several devices."""
    refined, trained = _refinement(summary), recovery_said(summary)
    found = (summary.sign, _beginning(summary), refined, summary.rounded, trained, _mixture(summary))
    return [remark for remark in found if remark]


def _mixture(summary: Summary) -> str:
    """One sentence for a study with trials on several devices, in several dtypes or batch sizes; else ""."""
    if not summary.unlike:
        return ""
    others = ", ".join(dict.fromkeys(summary.unlike.values()))
    batches = ", those of different batches by about 1 %" if "batches" in others else ""
    return (
        f"{len(summary.unlike)} of {len(summary.trials)} trials ran {others}: perplexities of different devices differ "
        f"in the last digits, those of different number formats by per cents{batches}."
    )


def _beginning(summary: Summary) -> str:
    """One sentence for a study whose windows begin with BOS; else ""."""
    if not summary.bos:
        return ""
    return f"BOS: {summary.bos_effect or 'every window begins with it, as the study file asks'}."


def _refinement(summary: Summary) -> str:
    """One sentence for a study whose pruners are refined; else ""."""
    prune = summary.made_from.study.prune if summary.made_from else PruneConfig()
    ways = ((prune.swaps, "round", "of swaps in their masks"), (prune.refine, "step", "of conjugate gradients"))
    by = " and ".join(f"{count} {one}{'s' * (count > 1)} {what}" for count, one, what in ways if count)
    return f"Pruned weights are refined by {by}, those of uniform too." if by else ""
