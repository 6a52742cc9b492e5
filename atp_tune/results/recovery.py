"""The training of the best plan's kept weights, in rows and in one sentence, the same in every table and note."""

from atp_tune.results.amounts import amount_of
from atp_tune.results.formatting import NOTHING, cells, method_of
from atp_tune.results.summary import Summary
from atp_tune.spec.config import scores_after
from atp_tune.spec.recover import Loss, RecoverConfig

LOSSES: dict[Loss, str] = {
    "both": "by NLL and KL from the dense model",
    "kl": "by KL from the dense model",
    "next-token": "by the next token",
}


def trained_rows(summary: Summary, columns: int) -> list[list[str]]:
    """The row of the trained plan in a table of so many columns; none if it was not trained."""
    best, found = summary.best_trial, summary.trained
    if best is None or found is None:
        return []
    change = NOTHING if found.against_uniform is None else str(found.against_uniform)
    row = [f"{method_of(best)}, trained", amount_of(best, summary) or NOTHING, *cells(scores_after(found)), change]
    return [row + [NOTHING] * (columns - len(row))]


def recovery_said(summary: Summary) -> str:
    """How the best plan was trained and what its perplexity came to, or why it was not; "" without `recover`."""
    found, asked = summary.recovered, summary.made_from.study.recover if summary.made_from else None
    if found is None or (not found.kept and asked is not None and asked != found.settings):
        return _pending(summary, asked)
    how = _how(found.settings)
    if found.skipped:
        return f"Not trained after pruning: {found.reason}."
    if not found.kept:
        return f"Not trained after pruning: with {how}, {found.reason}."
    texts = {"validation": found.validation, "test": found.test}
    changes = " and ".join(
        f"{each.change.beside('')} on the {name} {summary.data}" for name, each in texts.items() if each
    )
    return (
        f"Trained after pruning: {how}, of which step {found.step} was taken; its perplexity is {changes}, against the "
        "same plan as it was pruned. `apply` writes the trained model."
    )


def _pending(summary: Summary, asked: RecoverConfig | None) -> str:
    if asked is None or not summary.complete or summary.best_trial is None:
        return ""
    if summary.training:
        return f"The best plan is being trained on {summary.training}, with {_how(asked)}."
    return f"Not trained yet: the same command trains the best plan, with {_how(asked)}."


def _how(settings: RecoverConfig) -> str:
    what = "scales of rows and columns" if settings.train == "scales" else "masked LoRA"
    return f"{settings.steps} steps of {what} {LOSSES[settings.loss]} on the calibration text"
